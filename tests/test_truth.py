"""The truth of a simulated shop against the simulator: what is stated must happen, and formulas must agree with small steps."""

import numpy as np
import pytest

from shopai.core.config import UsageError
from shopai.data.policies import Fixed, NoSlate, Plenty, Policies
from shopai.data.simulator import simulate
from shopai.data.truth import HORIZONS, Notes, Truth, coming, interest_ends
from shopai.data.world import make_world

SEEDS, DAYS, ITEMS = (0, 1), 60, 60


def sold(world, seed, factor=1., items=(), recommend=None):
    "A run with full shelves and constant prices."
    return simulate(world, Policies(recommend or NoSlate(), Fixed(factor, items), Plenty()), seed=seed, tables=False)


@pytest.fixture(scope="module")
def world():
    return make_world(customers=1_500, items=ITEMS, days=DAYS, seed=11)


@pytest.fixture(scope="module")
def truth(world):
    return Truth(world, SEEDS)


@pytest.fixture(scope="module")
def runs(world):
    return [sold(world, seed) for seed in SEEDS]


def test_expected_lines_pieces_and_profit_are_those_of_runs_with_the_same_visits(truth, runs):
    "Only the luck of choices and of carts is left: a few per cent of the whole, and the stated spread for each item."
    demand = truth.demand() * DAYS * len(SEEDS)
    items = sum(run.items[["lines", "pieces", "revenue", "profit"]] for run in runs)
    for what, tolerance in (("lines", .03), ("pieces", .05), ("revenue", .05), ("profit", .05)):  # a cart left behind takes all its lines along
        assert items[what].sum() == pytest.approx(demand[what].sum(), rel=tolerance)
    off_by = (items.lines - demand.lines) / np.sqrt(demand.lines.clip(lower=1))
    assert abs(off_by).max() < 4.5


def test_expected_demand_is_unbiased_over_other_luck(world, truth):
    "Runs whose visits were not looked into: the difference is within four standard errors."
    demand = truth.demand()
    other = [sold(world, seed).items.pieces.sum() / DAYS for seed in range(100, 106)]
    error = np.hypot(np.std(other, ddof=1) / np.sqrt(len(other)), np.std(other, ddof=1) / np.sqrt(len(SEEDS)))
    assert abs(np.mean(other) - demand.pieces.sum()) < 4 * error


@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("rise", [True, False])
def test_elasticities_are_the_derivatives_of_demand(world, truth, horizon, rise):
    step, J = 1e-4 if rise else -1e-4, len(world.catalogue)
    before = truth.demand(horizon=horizon).pieces
    stated = truth.elasticity(horizon=horizon, rise=rise)
    for item in before.sort_values().index[-5:]:
        dearer = world.catalogue.price * np.exp(step * (np.arange(J) == item))
        measured = np.log(truth.demand(dearer, horizon).pieces[item] / before[item]) / step
        assert measured == pytest.approx(stated[item], abs=.02)  # the total of habits moves a little with one item of sixty; the formula leaves it


def test_away_from_the_list_price_too(world, truth):
    prices = world.catalogue.price * np.linspace(.8, 1.4, len(world.catalogue))
    stated = truth.elasticity(horizon="short", price=prices)
    for item in (3, 30, 50):
        dearer = prices * np.where(np.arange(len(prices)) == item, np.exp(1e-4), 1.)
        measured = np.log(truth.demand(dearer, "short", prices).pieces[item] / truth.demand(prices, "short", prices).pieces[item]) / 1e-4
        assert measured == pytest.approx(stated[item], abs=2e-3)


def test_neighbours_gain_what_an_item_loses_but_not_all(world, truth):
    "Cross-elasticities are positive inside a category, zero outside, and the pieces won are fewer than the pieces lost."
    demand = truth.demand()
    leaf = np.bincount(world.catalogue.leaf).argmax()
    inside = np.flatnonzero(world.catalogue.leaf == leaf)
    outside = np.flatnonzero(world.catalogue.leaf != leaf)[:2]
    cross = truth.cross_elasticity([*inside, *outside], "short")
    assert (cross.loc[inside, outside] == 0).all(axis=None) and (cross.loc[outside, inside] == 0).all(axis=None)
    own = cross.loc[inside, inside].to_numpy()
    assert (own[~np.eye(len(inside), dtype=bool)] > 0).all() and (np.diag(own) < 0).all()
    lines = demand.lines[inside].to_numpy()
    assert ((own * lines[:, None]).sum(axis=0) < 0).all()


@pytest.mark.parametrize("factor", [.7, 1.4])
def test_habits_follow_prices_as_they_do_in_the_simulator(world, truth, factor):
    "Look into the minds of shops that really had the other prices, where pasts are what they became: the same lines as foretold."
    items = tuple(range(0, ITEMS, 3))
    notes = Notes(world, DAYS)
    real = sum(sold(world, seed, factor, items, notes).items.lines.to_numpy()[list(items)].sum() for seed in SEEDS)
    price = world.catalogue.price * np.where(np.isin(np.arange(ITEMS), items), factor, 1.)
    foretold = truth.demand(price, "run").lines[list(items)].sum() * DAYS * len(SEEDS)
    assert real == pytest.approx(foretold, rel=.05)


def test_brute_force_finds_the_clairvoyant_factor(world, truth, runs):
    grid = 1.1 ** np.arange(-3, 5)
    profit = [sum(run.items.profit.sum() for run in (runs if abs(factor - 1) < 1e-9 else [sold(world, seed, factor) for seed in SEEDS])) for factor in grid]
    found = grid[np.argmax(profit)]
    for horizon in ("run", "long"):
        assert abs(np.log(found / truth.clairvoyant_factor(horizon))) < np.log(1.1) * 1.01


def test_brute_force_finds_clairvoyant_prices_of_items(world, truth, runs):
    "One item of each category in the same run; where the simulated profit has its centre, the price must be."
    lines, leaf = truth.demand().lines, world.catalogue.leaf
    chosen = [int(lines[leaf == code].idxmax()) for code in np.unique(leaf)]
    grid = 1.1 ** np.arange(-3, 6)
    profit = np.array([sum(run.items.profit.to_numpy()[chosen] for run in [sold(world, seed, factor, tuple(chosen)) for seed in SEEDS]) for factor in grid])
    x, total = np.log(grid), profit.sum(axis=1)
    best = np.log(truth.clairvoyant_price(chosen, horizon="run").factor.to_numpy())
    foretold = np.array([truth.demand_curve(item, grid, "run").profit.to_numpy() for item in chosen]).sum(axis=0)
    assert abs(x[total.argmax()] - x[foretold.argmax()]) < np.log(1.1) * 1.01
    assert abs(np.median(x[profit.argmax(axis=0)] - best)) < np.log(1.1)


@pytest.mark.parametrize("name", ["email", "social", "paid_search"])
def test_a_silent_channel_loses_what_was_stated(world, truth, runs, name):
    lost = []
    for seed, run in zip(SEEDS, runs, strict=True):
        quiet = sold(world.without(name), seed)
        assert run.totals().visits["all"] - quiet.totals().visits["all"] == run.causes.visits[name]
        lost.append(run.causes.visits[name])
    stated = truth.channel_lift().loc[name]
    assert abs(np.mean(lost) - stated.visits) < 4 * np.sqrt(stated.visits / len(SEEDS))  # visits are nearly Poisson
    assert 0 < stated.profit < stated.revenue and 0 < stated.orders < stated.visits


def test_nobody_comes_after_interest_has_ended_and_chances_are_chances(world):
    notes = Notes(world, DAYS)
    sold(world, 5, recommend=notes)
    ends = interest_ends(world)
    assert all((page.day < ends[page.customer]).all() and (page.day >= world.customers.joined[page.customer]).all() for page in notes.pages)
    here, only, come = coming(world, 40, np.full((3, len(world.customers)), .5))
    assert (only >= 0).all() and (only.sum(axis=0) <= come + 1e-12).all() and (come <= 1).all() and len(here) == only.shape[1]


def test_what_is_launched_after_the_end_is_not_sold(world):
    short = Truth(world, days=7)
    late = world.catalogue.launch >= 7
    assert late.any() and (short.demand().lines[late] == 0).all() and np.isnan(short.clairvoyant_price(np.flatnonzero(late)[:1]).price).all()


def test_same_seeds_same_truth(world, truth):
    assert Truth(world, SEEDS).demand().equals(truth.demand())
    assert not Truth(world, (9,)).demand().equals(truth.demand())


def test_mistakes_are_named(world, truth):
    mistakes = {
        f"{ITEMS} numbers above 0": lambda: truth.demand(np.ones(3)),
        "above 0": lambda: truth.demand(-1.),
        "horizon must be": lambda: truth.elasticity(horizon="x"),
        "scope must be": lambda: truth.clairvoyant_price([0], scope="x"),
        "discount must be": lambda: truth.uplift(2.),
        "days must lie": lambda: truth.demand_quantiles(0, (5, 2)),
    }
    for words, call in mistakes.items():
        with pytest.raises(UsageError, match=words):
            call()
