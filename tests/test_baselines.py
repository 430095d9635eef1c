"""The baselines against scikit-learn and plain loops, in a process without SciPy and pandas, and with damaged files."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import cosine_similarity

from shopai.core.config import UsageError
from shopai.core.testing import toy_shop
from shopai.data.histories import SECONDS_A_DAY, Histories, shuffled
from shopai.data.interactions import Interactions, purchases
from shopai.recommend.baselines import EASE, ItemKNN, Popularity, RecentPopularity

MODELS = {
    "popularity": Popularity(), "recent": RecentPopularity(days=20), "knn": ItemKNN(neighbours=5, shrinkage=2.0),
    "knn, all": ItemKNN(neighbours=None), "ease": EASE(regularisation=30.0), "ease, decay": EASE(regularisation=10.0, half_life=25.0),
}
DAY = SECONDS_A_DAY


def random_shop(seed, rows=400, users=30, items=20, days=100):
    rng = np.random.default_rng(seed)
    bought = {"user_id": rng.integers(0, users, rows), "item_id": (items * rng.random(rows) ** 2).astype(int)}
    return Interactions.from_frame(pd.DataFrame(bought | {"event_time": rng.integers(0, days * DAY, rows)}))


def fresh(model):
    return type(model)(**model.params())


@pytest.fixture(scope="module")
def shop():
    return purchases(toy_shop(seed=3, customers=200, items=60).events)


@pytest.fixture(scope="module", params=MODELS)
def fitted(request, shop):
    return fresh(MODELS[request.param]).fit(shop)


def ages(interactions):
    return (interactions.now - interactions.times) / DAY


# Against other implementations

@pytest.mark.parametrize("seed", range(3))
def test_ease_is_a_ridge_regression_of_each_item_on_all_others(seed):
    x = random_shop(seed)
    matrix = (x.matrix().toarray() > 0).astype(float)
    weights = EASE(regularisation=7.0).fit(x).weights
    for j in range(x.n_items):
        others = np.delete(np.arange(x.n_items), j)
        ridge = Ridge(alpha=7.0, fit_intercept=False, solver="cholesky").fit(matrix[:, others], matrix[:, j])
        np.testing.assert_allclose(weights[others, j], ridge.coef_, atol=1e-6)
        assert weights[j, j] == 0


@pytest.mark.parametrize("half_life", [None, 5.0, 40.0])
def test_ease_with_decay_is_a_ridge_regression_on_decayed_rows(half_life):
    x = random_shop(1)
    matrix = np.zeros((x.n_users, x.n_items))
    for user, item, age in zip(x.users, x.items, ages(x), strict=True):
        matrix[user, item] = max(matrix[user, item], 1.0 if half_life is None else 0.5 ** (age / half_life))
    model = EASE(regularisation=3.0, half_life=half_life).fit(x)
    j = 4
    others = np.delete(np.arange(x.n_items), j)
    ridge = Ridge(alpha=3.0, fit_intercept=False, solver="cholesky").fit(matrix[:, others], matrix[:, j])
    np.testing.assert_allclose(model.weights[others, j], ridge.coef_, atol=1e-6)
    np.testing.assert_allclose(model.score(x.histories()), matrix @ model.weights, atol=1e-5)


@pytest.mark.parametrize("neighbours", [None, 1, 4, 1000])
def test_item_neighbours_are_the_cosines_of_scikit_learn(neighbours):
    x = random_shop(2, rows=150)
    matrix = (x.matrix().toarray() > 0).astype(float)
    likeness = cosine_similarity(matrix.T)
    np.fill_diagonal(likeness, 0)
    for j in range(x.n_items):  # keep the nearest of each candidate
        order = sorted(range(x.n_items), key=lambda i: (-np.float32(likeness[i, j]), i))
        likeness[order[neighbours:] if neighbours else [], j] = 0
    model = ItemKNN(neighbours=neighbours).fit(x)
    np.testing.assert_allclose(model.score(x.histories()), matrix @ likeness, atol=1e-5)
    codes, values = model.similar(3, k=5)
    np.testing.assert_allclose(values, np.sort(likeness[:, 3])[::-1][:len(values)], atol=1e-6)
    assert (likeness[codes, 3] > 0).all()


def test_shrinkage_by_loops():
    x = random_shop(4, rows=120)
    bought = [set(x.items[x.users == u].tolist()) for u in range(x.n_users)]
    table = ItemKNN(neighbours=None, shrinkage=3.0).fit(x).score(Histories.of([[i] for i in range(x.n_items)]))
    for i in range(x.n_items):
        for j in range(x.n_items):
            n_i, n_j, both = (sum(items <= row for row in bought) for items in ({i}, {j}, {i, j}))
            expected = 0 if i == j or not both else both / (n_i * n_j) ** 0.5 * both / (both + 3)
            assert table[i, j] == pytest.approx(expected, abs=1e-6)


def test_popularity_by_loops():
    x = random_shop(5)
    everyone, recent = Popularity().fit(x), RecentPopularity(days=30).fit(x)
    for i in range(x.n_items):
        assert everyone.counts[i] == len(set(x.users[x.items == i].tolist()))
        assert recent.counts[i] == sum(age <= 30 for age in ages(x)[x.items == i])


# What every model promises

def test_a_fit_does_not_see_what_comes_later():
    x = random_shop(6)
    cut = x.before(60 * DAY)
    for model in MODELS.values():
        later = x.where(x.times < 60 * DAY)  # the same rows, without a note of where they end
        expected = fresh(model).fit(Interactions(x.user_ids, x.item_ids, later.users, later.items, later.times, until=60 * DAY)).score(cut.histories())
        assert (fresh(model).fit(cut).score(cut.histories()) == expected).all()


def test_one_by_one_or_in_a_batch(fitted, shop):
    rows = shop.histories()
    scores = fitted.score(rows)
    assert scores.dtype == np.float32 and scores.shape == (shop.n_users, shop.n_items) and np.isfinite(scores).all()
    for u in range(0, shop.n_users, 17):
        assert (fitted.score(shop.histories([u]))[0] == scores[u]).all()


def test_the_order_of_a_history_matters_only_where_the_model_says_so(fitted, shop):
    rows = shop.histories()
    assert (fitted.score(shuffled(rows, seed=1)) == fitted.score(rows)).all() == fitted.order_free
    repeated = Histories.of([[3, 5], [5, 3], [5, 3, 3, 5]])
    assert (fitted.score(repeated) == fitted.score(repeated)[0]).all()


def test_an_empty_history_is_answered(fitted):
    scores = fitted.score(Histories.of([[], [1]]))
    assert np.isfinite(scores).all()
    assert fitted.score(Histories.of([])).shape == (0, fitted.n_items)


def test_fitting_twice_gives_the_same_model(fitted, shop, tmp_path):
    again = fresh(fitted).fit(shop)
    for name in ("arrays.npz", "model.json"):
        assert (fitted.save(tmp_path / "a") / name).read_bytes() == (again.save(tmp_path / "b") / name).read_bytes()


def test_a_round_trip_to_disk_is_exact(fitted, shop, tmp_path):
    again = type(fitted).load(fitted.save(tmp_path / "model"))
    assert again.params() == fitted.params()
    assert (again.score(shop.histories()) == fitted.score(shop.histories())).all()
    for mine, theirs in zip(again.similar(7, 12), fitted.similar(7, 12), strict=True):
        assert (mine == theirs).all()


def test_similar_never_names_the_item_itself(fitted):
    for item in range(fitted.n_items):
        codes, values = fitted.similar(item, k=10)
        assert item not in codes and len(set(codes.tolist())) == len(codes) <= 10
        assert len(codes) == len(values) and (np.diff(values) <= 0).all()


def test_what_a_model_cannot_do_is_said(fitted, shop):
    unfitted = fresh(fitted)
    for call in (lambda: unfitted.score(Histories.of([[0]])), lambda: unfitted.similar(0), lambda: unfitted.save("never")):
        with pytest.raises(UsageError, match="call fit or load first"):
            call()
    with pytest.raises(UsageError, match="there are no interactions to fit"):
        unfitted.fit(shop.where(shop.users < 0))
    for codes in ([-1], [shop.n_items]):
        with pytest.raises(UsageError, match="item codes must lie between 0 and"):
            fitted.score(Histories.of([codes]))
        with pytest.raises(UsageError, match="item codes must lie between 0 and"):
            fitted.similar(codes[0])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 40 * DAY)), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_the_order_of_rows_in_the_data_is_of_no_matter(rows, random):
    def build(rows): return Interactions.from_frame(pd.DataFrame(rows, columns=["user_id", "item_id", "event_time"]))

    mixed = list(rows)
    random.shuffle(mixed)
    for model in MODELS.values():
        one = fresh(model).fit(build(rows)).score(build(rows).histories())
        assert (fresh(model).fit(build(mixed)).score(build(mixed).histories()) == one).all()


# Files

@pytest.fixture
def saved(shop, tmp_path):
    return {name: fresh(model).fit(shop).save(tmp_path / name) for name, model in MODELS.items()}


def test_a_process_that_answers_needs_numpy_alone(saved, shop):
    script = textwrap.dedent("""
        import importlib.abc, json, sys
        class Refuse(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {"pandas", "scipy", "sklearn", "torch", "pyarrow", "mlflow"}: raise ImportError(name + " is not installed here")
        sys.meta_path.insert(0, Refuse())
        from shopai.data.histories import Histories
        from shopai.recommend import baselines
        classes = {c.kind: c for c in (baselines.Popularity, baselines.RecentPopularity, baselines.ItemKNN, baselines.EASE)}
        for folder in sys.argv[1:]:
            model = classes[json.load(open(folder + "/model.json"))["kind"]].load(folder)
            print(model.score(Histories.of([[1, 2, 3]]))[0, :3].tolist(), model.similar(0, 2)[0].tolist())
    """)
    result = subprocess.run([sys.executable, "-c", script, *map(str, saved.values())], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    models = [fresh(model).fit(shop) for model in MODELS.values()]
    expected = [f"{m.score(Histories.of([[1, 2, 3]]))[0, :3].tolist()} {m.similar(0, 2)[0].tolist()}" for m in models]
    assert result.stdout.splitlines() == expected


def damage(folder, **arrays):
    with np.load(folder / "arrays.npz") as stored:
        kept = {name: stored[name] for name in stored.files}
    np.savez(folder / "arrays.npz", **{name: value for name, value in (kept | arrays).items() if value is not None})


def describe(folder, **facts):
    (folder / "model.json").write_text(json.dumps({"kind": "ease", "params": {}, "n_items": 60} | facts))


@pytest.mark.parametrize("change, message", [
    (lambda f: damage(f, weights=None), "weights"),
    (lambda f: damage(f, weights=np.zeros((60, 59), np.float32)), r"weights is float32 \(60, 59\), expected float32 \(n n\) with n = 60"),
    (lambda f: damage(f, weights=np.zeros((60, 60))), "weights is float64"),
    (lambda f: (f / "arrays.npz").write_bytes((f / "arrays.npz").read_bytes()[:-500]), "arrays.npz"),
    (lambda f: (f / "arrays.npz").write_bytes(b""), "arrays.npz"),
    (lambda f: (f / "arrays.npz").unlink(), "No such file"),
    (lambda f: (f / "model.json").write_text("{"), "model.json"),
    (lambda f: (f / "model.json").write_text("[]"), "model.json"),
    (lambda f: (f / "model.json").unlink(), "No such file"),
    (lambda f: describe(f, params={"lambda": 1}), "unexpected keyword argument 'lambda'"),
    (lambda f: describe(f, params={"regularisation": -1}), "regularisation must be more than 0"),
    (lambda f: describe(f, n_items=61), "with n = 61"),
    (lambda f: describe(f, kind="popularity"), "of the kind 'popularity', not 'ease'"),
])
def test_a_damaged_model_is_refused_in_one_line(saved, change, message):
    change(saved["ease"])
    with pytest.raises(UsageError, match=message) as error:
        EASE.load(saved["ease"])
    assert str(saved["ease"]) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("arrays, message", [
    ({"candidates": np.full(300, 60, np.int32)}, "codes that are no items"),
    ({"indptr": np.zeros(61, np.int64)}, "indptr does not fit candidates"),
    ({"indptr": np.zeros(60, np.int64)}, r"expected int64 \(n\+1\)"),
    ({"likeness": np.zeros(3, np.float32)}, r"likeness is float32 \(3,\), expected float32 \(m\)"),
])
def test_neighbour_lists_that_contradict_themselves_are_refused(saved, arrays, message):
    with np.load(saved["knn"] / "arrays.npz") as stored:
        arrays = {name: value[:len(stored[name])] if name == "candidates" else value for name, value in arrays.items()}
    damage(saved["knn"], **arrays)
    with pytest.raises(UsageError, match=message):
        ItemKNN.load(saved["knn"])


class Trap:
    def __reduce__(self):
        return (print, ("the trap was sprung",))


def test_a_pickle_in_the_file_is_not_opened(saved, capsys):
    damage(saved["popularity"], counts=np.array([Trap()], dtype=object))
    capsys.readouterr()
    with pytest.raises(UsageError, match="allow_pickle=False"):
        Popularity.load(saved["popularity"])
    assert "sprung" not in capsys.readouterr().out


@pytest.mark.parametrize("build, message", [
    (lambda: EASE(regularisation=0), "regularisation must be more than 0"),
    (lambda: EASE(half_life=0), "half_life must be more than 0 days or None"),
    (lambda: ItemKNN(neighbours=0), "neighbours must be at least 1 or None"),
    (lambda: ItemKNN(shrinkage=-0.1), "shrinkage must be at least 0"),
    (lambda: RecentPopularity(days=-1), "days must be more than 0"),
])
def test_parameters_out_of_range_are_refused(build, message):
    with pytest.raises(UsageError, match=message):
        build()


def test_a_catalogue_too_large_for_ease_is_refused_before_any_work(shop):
    with pytest.raises(UsageError, match="max_items is 59, but the catalogue has 60 items, which would take 0.0 GB; leave out rare items or raise max_items"):
        EASE(max_items=59).fit(shop)
