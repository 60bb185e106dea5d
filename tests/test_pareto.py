"""Frontier, AUC, rate at a cost and their intervals, against hand-made cases and scipy."""

import math
import time

import numpy as np
import pytest
import scipy.optimize
import scipy.spatial
import scipy.stats

from robust_mo.analysis.intervals import bootstrap, wilson
from robust_mo.analysis.pareto import auc, frontier, normalised, rate_at_cost
from robust_mo.errors import InputError


@pytest.mark.parametrize(
    ("points", "corners", "area", "left"),
    [
        ([], [(0, 0), (1, 1)], 0.5, 0.9),
        ([(0.5, 0.25)], [(0, 0), (1, 1)], 0.5, 0.9),  # below the diagonal
        ([(0.25, 0.25), (0.5, 0.5)], [(0, 0), (1, 1)], 0.5, 0.9),  # on it
        ([(0.5, 1)], [(0, 0), (0.5, 1), (1, 1)], 0.75, 0.45),
        ([(0.8, 1)], [(0, 0), (0.8, 1), (1, 1)], 0.6, 0.72),
        ([(0, 1)], [(0, 1), (1, 1)], 1.0, 0.0),  # the backdoor goes at no cost
        ([(0, 0.9)], [(0, 0.9), (1, 1)], 0.95, 0.0),  # exactly at the cost
        ([(0, 0.5), (0, 0.25)], [(0, 0.5), (1, 1)], 0.75, 0.8),  # the hull starts above the anchor
        ([(0, 0.5), (0.5, 1), (0.5, 1), (0.5, 0.2)], [(0, 0.5), (0.5, 1), (1, 1)], 0.875, 0.4),
        ([(0.25, 0.5), (0.5, 1)], [(0, 0), (0.5, 1), (1, 1)], 0.75, 0.45),  # on the line between corners
        ([(0.5, 1), (0.75, 1)], [(0, 0), (0.5, 1), (1, 1)], 0.75, 0.45),
        ([(0.1, 0.3), (0.2, 0.6), (0.3, 0.9)], [(0, 0), (0.3, 0.9), (1, 1)], 0.8, 0.3),  # but for rounding
        ([(0.25, 1.5)], [(0, 0), (0.25, 1.5), (1, 1)], 1.125, 0.15),  # descends to (1, 1)
        ([(1, 1.2)], [(0, 0), (1, 1.2)], 0.6, 0.75),
        ([(0.5, 1.1), (1, 1.2), (1, 0.3)], [(0, 0), (0.5, 1.1), (1, 1.2)], 0.85, 0.9 / 2.2),
        ([(0, 1.2)], [(0, 1.2), (1, 1)], 1.1, 0.0),
    ],
)
def test_hand_made(points, corners, area, left):
    assert frontier(points) == corners
    assert auc(points) == pytest.approx(area, abs=1e-12)
    assert rate_at_cost(points) == pytest.approx(left, abs=1e-12)
    assert frontier(reversed(points)) == corners


def test_cost_of_nothing_and_of_everything():
    assert rate_at_cost([(0, 1)], 0) == rate_at_cost([], 1) == 0
    assert rate_at_cost([], 0) == 1


def test_takes_any_iterable_and_numpy():
    points = [(0.5, 1.0), (0.0, 0.5)]
    assert auc(iter(points)) == auc(np.array(points)) == 0.875
    assert all(type(number) is float for corner in frontier(np.array(points, np.float32)) for number in corner)


@pytest.mark.parametrize("seed", range(20))
def test_against_scipy(seed):
    generator = np.random.default_rng(seed)
    points = np.round(generator.random((generator.integers(1, 30), 2)) * (1, 1.3), generator.integers(1, 4))
    floor = np.array([(0, 0), (1, 1), (1, 0)])
    together = np.concatenate([points, floor])
    hull = scipy.spatial.ConvexHull(together)
    assert auc(points) == pytest.approx(hull.volume, abs=1e-9)  # scipy's name for the area in two dimensions

    above = {tuple(corner) for corner in together[hull.vertices].tolist()} - {(1.0, 0.0)}
    if any(rate == 0 and performance > 0 for rate, performance in above):
        above.remove((0.0, 0.0))
    assert set(frontier(points)) == above

    # The lowest rate of any mixture of points that keeps the performance.
    for cost in (0.0, 0.1, 0.35, 1.0):
        solution = scipy.optimize.linprog(
            together[:, 0], A_ub=-together[None, :, 1], b_ub=[cost - 1], A_eq=np.ones((1, len(together))), b_eq=[1]
        )
        assert rate_at_cost(points, cost) == pytest.approx(solution.fun, abs=1e-9)


@pytest.mark.parametrize(
    "point",
    [(-0.01, 1), (1.01, 1), (math.nan, 1), (math.inf, 1), (0.5, math.nan), (0.5, math.inf), (0.5, -0.1)],
)
def test_refuses(point):
    for function in (frontier, auc, rate_at_cost):
        with pytest.raises(InputError, match="rate|performance"):
            function([(0.5, 0.5), point])
    with pytest.raises(InputError, match="rate|performance"):
        normalised([point], 0.5)


@pytest.mark.parametrize("cost", [-0.1, 1.1, math.nan])
def test_refuses_cost(cost):
    with pytest.raises(InputError, match="cost"):
        rate_at_cost([], cost)


def test_normalised():
    assert normalised([(0.4, 0.9), (0.8, 1), (0.9, 0.7)], 0.8) == [(0.5, 0.9), (1.0, 1.0), (1.0, 0.7)]
    installed_at_80_percent = [(0.8, 1.0)]  # and nothing lost
    assert auc(installed_at_80_percent) == pytest.approx(0.6)
    assert auc(normalised(installed_at_80_percent, 0.8)) == 0.5
    for before in (0, -0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="before blue training"):
            normalised([], before)


@pytest.mark.parametrize("count", [1, 7, 48, 500])
def test_wilson_against_scipy(count):
    for successes in range(0, count + 1, max(1, count // 7)):
        for confidence in (0.8, 0.95, 0.99):
            expected = scipy.stats.binomtest(successes, count).proportion_ci(confidence, method="wilson")
            assert wilson(successes, count, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_ends_and_refusals():
    assert wilson(0, 40)[0] == 0.0
    assert wilson(40, 40)[1] == 1.0
    for arguments in ((0, 0), (3, 2), (-1, 2), (1, 2, 1.0), (1, 2, 95)):
        with pytest.raises(InputError):
            wilson(*arguments)


SETTINGS = {"cost": 0.1, "resamples": 1000, "seed": 0}


def test_bootstrap_against_the_binomial():
    # One point (rate, 1): AUC is 1 - rate / 2, and 90% of the rate is left at a 10% cost.
    count, behaving = 48, 20
    behaved = np.arange(count) < behaving
    problems = np.arange(40) < 25
    found = bootstrap(behaved[None], problems[None], np.ones(count), problems, **SETTINGS)
    low, high = scipy.stats.binom.ppf([0.025, 0.975], count, behaving / count) / count
    assert found["rate_at_cost"] == pytest.approx((0.9 * low, 0.9 * high), abs=1.01 / count)
    assert found["auc"] == pytest.approx((1 - high / 2, 1 - low / 2), abs=1.01 / count)
    assert found["auc"] == found["auc_normalised"]  # the organism's own rate is 1 in every resample


def test_bootstrap_is_paired():
    # The same problems are solved before and after, so however they are drawn, performance is 1.
    solved = np.arange(40) % 3 == 0
    found = bootstrap(np.zeros((2, 48)), np.stack([solved, solved]), np.ones(48), solved, **SETTINGS)
    assert found == {"auc": (1.0, 1.0), "auc_normalised": (1.0, 1.0), "rate_at_cost": (0.0, 0.0)}
    # The same prompts behave before and after: nothing is lost of an organism installed at half rate.
    half = np.arange(48) % 2 == 0
    found = bootstrap(half[None], solved[None], half, solved, **SETTINGS)
    assert found["auc_normalised"] == (0.5, 0.5)
    assert found["auc"][0] < 0.75 < found["auc"][1]


def test_bootstrap_against_a_plain_loop():
    generator = np.random.default_rng(3)
    behaved, solved = generator.random((4, 30)) < 0.4, generator.random((4, 25)) < 0.5
    behaved_before, solved_before = generator.random(30) < 0.9, generator.random(25) < 0.6
    loop = []
    for _ in range(1000):
        prompts, problems = generator.integers(30, size=30), generator.integers(25, size=25)
        own = solved_before[problems].mean()
        rates, performances = behaved[:, prompts].mean(1), solved[:, problems].mean(1) / own
        loop.append(auc([(behaved_before[prompts].mean(), 1), *zip(rates, performances, strict=True)]))
    found = bootstrap(behaved, solved, behaved_before, solved_before, **SETTINGS)
    assert found["auc"] == pytest.approx(np.quantile(loop, [0.025, 0.975]), abs=0.04)


def test_bootstrap_seed_and_undefined_resamples():
    generator = np.random.default_rng(4)
    one_solved = np.arange(5) == 0  # a third of the resamples solve nothing
    arguments = (generator.random((3, 20)) < 0.5, generator.random((3, 5)) < 0.5, np.ones(20), one_solved)
    found = bootstrap(*arguments, **SETTINGS)
    assert all(math.isfinite(bound) for interval in found.values() for bound in interval)
    assert found == bootstrap(*arguments, **SETTINGS)
    assert found != bootstrap(*arguments, **{**SETTINGS, "seed": 1})


@pytest.mark.parametrize(
    "shapes", [((2, 5), (2, 4), (6,), (4,)), ((2, 5), (3, 4), (5,), (4,)), ((5,), (4,), (5,), (4,))]
)
def test_bootstrap_refuses_shapes(shapes):
    with pytest.raises(InputError, match="give"):
        bootstrap(*(np.ones(shape) for shape in shapes), **SETTINGS)


def test_bootstrap_refuses_an_organism_without_reference():
    with pytest.raises(InputError, match="solved_before"):
        bootstrap(np.ones((2, 5)), np.ones((2, 4)), np.ones(5), np.zeros(4), **SETTINGS)
    with pytest.raises(InputError, match="behaved_before"):
        bootstrap(np.ones((2, 5)), np.ones((2, 4)), np.zeros(5), np.ones(4), **SETTINGS)


def test_bootstrap_is_quick_enough():
    generator = np.random.default_rng(5)
    start = time.process_time()
    bootstrap(generator.random((12, 48)) < 0.5, generator.random((12, 40)) < 0.5, np.ones(48), np.ones(40), **SETTINGS)
    assert time.process_time() - start < 3
