"Bundles: what was saved is what answers, whole or not at all."

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shop_server import ROOT, flip, toy_bundle

from shopai.core.artifacts import BundleError, write_manifest
from shopai.core.config import UsageError
from shopai.core.testing import toy_shop
from shopai.data.histories import Histories
from shopai.data.interactions import Interactions, purchases
from shopai.data.splits import temporal_split
from shopai.recommend.baselines import EASE, ItemKNN, Popularity, RecentPopularity
from shopai.recommend.bundle import MODELS, Recommender, Strings, UnknownItem, model_class, save_bundle
from shopai.recommend.leaderboard import evaluate

BASELINES = [Popularity(), RecentPopularity(), ItemKNN(), EASE(regularisation=50.0), EASE(regularisation=50.0, half_life=60.0)]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "Folder of a bundle, its interactions, its model, and the loaded bundle."
    folder = tmp_path_factory.mktemp("toy") / "bundle"
    bought, model = toy_bundle(folder)
    return folder, bought, model, Recommender.load(folder)


@pytest.mark.parametrize("model", BASELINES, ids=lambda model: f"{model.kind}-{getattr(model, 'half_life', '')}")
def test_a_loaded_bundle_answers_as_the_model_in_memory(tmp_path, model):
    "Every customer, by an independent ranking of the fitted model's own scores."
    bought, fitted = toy_bundle(tmp_path / "b", model)
    recommender = Recommender.load(tmp_path / "b")
    histories = bought.histories()
    scores = fitted.score(histories).astype(float)
    for row, user in enumerate(bought.user_ids):
        seen = histories.row(row)[0]
        order = sorted(set(range(bought.n_items)) - set(seen.tolist()), key=lambda item, row=row: (-scores[row, item], item))
        expected = [item for item in order if np.isfinite(scores[row, item])][:10]
        answer = recommender.recommend(user_id=user)
        if answer.fallback is None:  # a model that has nothing to say about somebody is another test's matter
            assert [item.score for item in answer.items] == pytest.approx(scores[row, expected].tolist(), rel=1e-5, abs=1e-5)
            assert [item.item_id for item in answer.items] == bought.item_ids[expected].tolist()


def test_every_kind_of_baseline_is_registered():
    assert {model.kind for model in BASELINES} <= set(MODELS)
    for model in BASELINES: assert model_class(model.kind) is type(model)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_an_answer_keeps_its_promises(toy, data):
    "Whatever is asked: ranks count from 1, scores fall, no item twice, none that is had, sent or excluded; and the same question gives the same answer."
    _, bought, _, recommender = toy
    item = st.sampled_from([*bought.item_ids.tolist(), "no-such-item", ""])
    k, exclude = data.draw(st.integers(1, 60)), data.draw(st.lists(item, max_size=50))
    if data.draw(st.booleans()):
        user = data.draw(st.sampled_from([*bought.user_ids.tolist(), "nobody"]))
        ask = {"user_id": user}
        had = set(bought.item_ids[bought.items[bought.user_ids[bought.users] == user]])
    else:
        ask = {"item_ids": data.draw(st.lists(item, min_size=1, max_size=20))}
        had = set(ask["item_ids"])
    answer = recommender.recommend(**ask, k=k, exclude=exclude)
    names = [item.item_id for item in answer.items]
    assert [item.rank for item in answer.items] == list(range(1, len(names) + 1))
    assert (np.diff([item.score for item in answer.items]) <= 0).all()
    assert len(set(names)) == len(names) <= k
    assert not set(names) & (had | set(exclude))
    assert len(names) == min(k, bought.n_items - len((had | set(exclude)) & set(bought.item_ids)))
    assert recommender.recommend(**ask, k=k, exclude=exclude) == answer


def test_a_batch_gives_what_single_questions_give(toy):
    _, bought, _, recommender = toy
    users = [*bought.user_ids, "nobody"]
    assert recommender.recommend_many(users, k=7) == [recommender.recommend(user_id=user, k=7) for user in users]


@given(st.lists(st.text(), unique=True, max_size=50), st.text())
@settings(max_examples=200, deadline=None)
def test_strings_find_what_a_list_finds(texts, other):
    texts = sorted(text for text in texts if not any("\ud800" <= c <= "\udfff" for c in text))
    packed = Strings.of(texts)
    assert list(packed) == texts
    assert [packed.find(text) for text in texts] == list(range(len(texts)))
    assert packed.find(other) == (texts.index(other) if other in texts else -1)


def test_one_flipped_byte_in_any_file_is_refused_by_name(tmp_path):
    toy_bundle(tmp_path / "b")
    files = [path for path in (tmp_path / "b").rglob("*") if path.is_file()]
    assert len(files) > 8
    for file in files:
        flip(file)
        with pytest.raises(BundleError, match=file.name.replace(".", r"\.")): Recommender.load(tmp_path / "b")
        flip(file)
    assert Recommender.load(tmp_path / "b").recommend(user_id="nobody").items


def test_a_missing_file_is_refused_by_name(tmp_path):
    toy_bundle(tmp_path / "b")
    (tmp_path / "b" / "customers" / "times.npy").unlink()
    with pytest.raises(BundleError, match="customers/times.npy"): Recommender.load(tmp_path / "b")


def test_a_bundle_cannot_name_a_class_of_its_own(tmp_path):
    "A forger who seals the bundle anew still gets nothing but the classes of the table."
    toy_bundle(tmp_path / "b")
    about = json.loads((tmp_path / "b" / "bundle.json").read_text())
    (tmp_path / "b" / "bundle.json").write_text(json.dumps({**about, "model": "os:system"}))
    (tmp_path / "b" / "manifest.json").unlink()
    write_manifest(tmp_path / "b", name="recommend", kind="ease")
    with pytest.raises(UsageError, match="unknown kind of model 'os:system'"): Recommender.load(tmp_path / "b")


def test_names_and_titles_survive_whatever_they_are(tmp_path):
    "Slashes, spaces, other scripts, no title at all."
    items = {"a/b": "Tasse/Teller", "ä ö": None, "語": "磁器", "😀": float("nan"), "z%2F?": " ", "'; drop table": "x"}
    sold = [*list(items) * 4, "a/b", "語"]  # not all alike, or popularity would have nothing to say
    rows = [(f"user {u % 5}/ü", item, u) for u, item in enumerate(sold)]
    bought = Interactions.from_frame(pd.DataFrame(rows, columns=["user_id", "item_id", "event_time"]))
    save_bundle(tmp_path / "b", Popularity().fit(bought), bought, items, Popularity().fit(bought))
    recommender = Recommender.load(tmp_path / "b")
    found = {item.item_id: item.title for item in recommender.recommend(user_id="nobody").items}
    assert found == {item: title if isinstance(title, str) else None for item, title in items.items()}
    assert recommender.recommend(user_id="user 1/ü").fallback is None
    assert recommender.recommend(item_ids=["語"]).fallback is None
    with pytest.raises(UnknownItem, match="unknown item"): recommender.similar("\ud800")


def test_a_customer_who_only_has_items_newer_than_the_weights_gets_popularity(tmp_path):
    "Weights of an earlier time, histories of today: items that the weights don't know must not lead to the first items of the alphabet."
    bought = purchases(toy_shop().events)
    first_sold = np.full(bought.n_items, np.iinfo(np.int64).max)
    np.minimum.at(first_sold, bought.items, bought.times)
    newest = int(first_sold.argmax())
    past = bought.before(int(first_sold[newest]))
    model, popularity = EASE(regularisation=50.0).fit(past), Popularity().fit(past)
    save_bundle(tmp_path / "b", model, bought, {}, popularity)
    recommender = Recommender.load(tmp_path / "b")
    answer = recommender.recommend(item_ids=[str(bought.item_ids[newest])], k=3)
    assert answer.fallback == "unknown_items"
    assert recommender.similar(str(bought.item_ids[newest])) == []
    best = recommender.recommend(user_id="nobody", k=4).items
    assert [item.item_id for item in answer.items] == [item.item_id for item in best if item.item_id != bought.item_ids[newest]][:3]


def test_a_ranker_gives_the_bundles_scores_in_any_vocabulary(toy):
    "A shuffled vocabulary with strangers in it: what the bundle would rank, it ranks."
    _, bought, _, recommender = toy
    rng = np.random.default_rng(0)
    theirs = rng.permutation([*bought.item_ids[5:], "new-1", "new-2"])  # five items of the bundle have left the shop
    ranker = recommender.ranker(theirs)
    code = {item: i for i, item in enumerate(theirs)}
    histories = bought.histories()
    sessions = [[code[item] for item in bought.item_ids[histories.row(u)[0]] if item in code] for u in range(len(histories))]
    scores = ranker.score(Histories.of(sessions, histories.now))
    for row, session in enumerate(sessions):
        own = recommender.recommend(item_ids=theirs[session].tolist() or ["none"], k=100)
        expected = [item.item_id for item in own.items if item.item_id in code]
        ranked = sorted(set(range(len(theirs))) - set(session), key=lambda i, row=row: (-scores[row, i], str(theirs[i])))
        assert [str(theirs[i]) for i in ranked if np.isfinite(scores[row, i])] == expected


def test_what_is_served_is_what_was_measured(tmp_path):
    "The leaderboard gives a loaded bundle, asked in the vocabulary of the holdout, the figures of the model that went into it."
    bought = purchases(toy_shop(customers=300).events)
    holdout = temporal_split(bought).test
    model = EASE(regularisation=50.0).fit(holdout.history)
    save_bundle(tmp_path / "b", model, bought, {}, Popularity().fit(holdout.history))
    figures = evaluate(model, holdout)
    assert evaluate(Recommender.load(tmp_path / "b").ranker(bought.item_ids), holdout) == pytest.approx(figures)
    assert figures["ndcg@10"] > 0


def test_a_network_is_bundled_and_answers_without_torch(tmp_path):
    "A transformer of one epoch: ONNX Runtime gives the scores that PyTorch gave, in a process that has no PyTorch."
    transformer = pytest.importorskip("shopai.recommend.transformer")
    bought = purchases(toy_shop().events)
    model = transformer.RecTransformer(d_model=16, blocks=1, heads=1, epochs=1, seed=0).fit(bought)
    save_bundle(tmp_path / "b", model, bought, {}, Popularity().fit(bought))
    users = bought.user_ids[:10].tolist()
    code = f"""
import json, sys
sys.modules.update(dict.fromkeys(("torch", "pandas", "scipy", "lightning")))  # importing one of them fails
from shopai.recommend.bundle import Recommender
recommender = Recommender.load({str(tmp_path / "b")!r})
print(json.dumps([answer.to_dict() for answer in recommender.recommend_many({users!r})]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    scores = model.score(bought.histories())
    for row, answer in enumerate(json.loads(done.stdout)):
        assert answer["fallback"] is None and len(answer["items"]) == 10
        codes = np.searchsorted(bought.item_ids, [item["item_id"] for item in answer["items"]])
        assert [item["score"] for item in answer["items"]] == pytest.approx(scores[row, codes].tolist(), rel=1e-4, abs=1e-4)


def test_parts_that_do_not_belong_together_are_refused(tmp_path, toy):
    _, bought, model, _ = toy
    other = purchases(toy_shop(items=20).events)
    with pytest.raises(UsageError, match="fallback scores 20 items, but interactions hold"):
        save_bundle(tmp_path / "b", model, bought, {}, Popularity().fit(other))
    assert not (tmp_path / "b" / "manifest.json").exists()


def test_a_bundle_answers_without_the_training_libraries(toy):
    "In a fresh process, since this one has them all."
    folder, bought, _, recommender = toy
    code = f"""
import json, sys
from shopai.recommend.bundle import Recommender
answer = Recommender.load({str(folder)!r}).recommend(user_id={str(bought.user_ids[0])!r}).to_dict()
heavy = sorted(set(sys.modules) & {{"torch", "mlflow", "pandas", "scipy", "pyarrow", "sklearn", "lightning", "feast", "onnxruntime"}})
print(json.dumps([answer, heavy]))
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    answer, heavy = json.loads(out)
    assert heavy == []
    assert answer == recommender.recommend(user_id=bought.user_ids[0]).to_dict()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_customers_are_mapped_and_not_read(tmp_path):
    "A shop of many customers: opening the bundle must not cost memory for each of them, in every worker."
    n = 200_000
    bought = Interactions(np.array([f"{i:012d}" for i in range(n)]), np.array(["a", "b"]), np.repeat(np.arange(n, dtype=np.int32), 5),
                          np.tile(np.array([0, 1, 0, 1, 0], np.int32), n), np.arange(5 * n, dtype=np.int64))
    popularity = Popularity().fit(bought)
    save_bundle(tmp_path / "b", popularity, bought, {}, popularity)
    code = f"""
from pathlib import Path
from shopai.recommend.bundle import Recommender
def own(): return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
before = own()
recommender = Recommender.load({str(tmp_path / "b")!r})
recommender.recommend(user_id="000000123456"); recommender.recommend(user_id="000000000000")
print((own() - before) / 1000)
"""
    on_disk = sum(path.stat().st_size for path in Path(tmp_path / "b").rglob("*.npy")) / 1e6
    grown = float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout)
    assert on_disk > 15
    assert grown < on_disk / 3, f"{grown:.1f} MB of its own for a bundle of {on_disk:.1f} MB"
