"""Frontier, AUC, rate at a cost and their intervals, against hand-made cases and scipy."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.spatial
import scipy.stats

from robust_mo.analysis.intervals import paired_difference, wilson
from robust_mo.analysis.pareto import auc, average, frontier, held_out_auc, normalised, rate_at_cost
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
    wrong = "performance" if point[0] == 0.5 else "rate"
    for function in (frontier, auc, rate_at_cost):
        with pytest.raises(InputError, match=wrong):
            function([(0.5, 0.5), point])
    with pytest.raises(InputError, match=wrong):
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
        expected = scipy.stats.binomtest(successes, count).proportion_ci(method="wilson")
        assert wilson(successes, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_paired_difference():
    """It holds the truth as often as it says, and what nobody changed is still not known."""
    pairs = [(True, True)] * 36 + [(True, False)] * 12 + [(False, True)] * 2
    found = paired_difference(*zip(*pairs, strict=True))
    assert found == pytest.approx((-0.2, -0.3404, -0.0569), abs=1e-4)  # as Newcombe gives them
    value, low, high = paired_difference([False] * 60, [False] * 60)
    assert (value, high) == (0, pytest.approx(wilson(0, 60)[1])) and low == -high
    generator, inside = np.random.default_rng(0), 0
    for _ in range(1000):
        before = generator.random(40) < 0.3
        after = np.where(generator.random(40) < 0.7, before, generator.random(40) < 0.6)
        _, low, high = paired_difference(before.tolist(), after.tolist())
        inside += low <= 0.3 * (0.6 - 0.3) <= high
    assert 0.93 <= inside / 1000 <= 0.99


def test_wilson_ends_and_refusals():
    assert wilson(0, 40)[0] == 0.0
    assert wilson(40, 40)[1] == 1.0
    for arguments in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(InputError):
            wilson(*arguments)


def test_average_is_taken_at_every_rate():
    frail, tough = frontier([(0.2, 1.0)]), frontier([(0.8, 0.9)])  # corners (0, 0), (.2, 1), (1, 1); (.8, .9)
    mean = average([frail, tough])
    assert mean == [(0, 0), (0.2, pytest.approx((1 + 0.225) / 2)), (0.8, pytest.approx(0.95)), (1, 1)]
    assert auc(mean) == pytest.approx((auc(frail) + auc(tough)) / 2)
    assert average([frail]) == frail


def test_held_out_auc_reads_the_chosen_corners_where_they_come_to_lie():
    chosen_on = [(1.0, 1.0), (0.5, 1.0), (0.2, 0.3), (0.0, 0.5)]  # the third is no corner
    read_on = [(1.0, 1.0), (0.6, 0.9), (0.2, 9.0), (0.1, 0.4)]
    by_hand = 0.1 * 0.4 / 2 + 0.5 * (0.4 + 0.9) / 2 + 0.4 * (0.9 + 1) / 2  # (0, 0), (.1, .4), (.6, .9), (1, 1)
    assert held_out_auc(chosen_on, read_on) == pytest.approx(by_hand)
    assert held_out_auc(chosen_on, chosen_on) == pytest.approx(auc(chosen_on))
    # Two corners that changed places: the way back from .6 to .4 counts negative.
    chosen_on, read_on = [(0.4, 0.8), (0.6, 1.0)], [(0.6, 0.8), (0.4, 1.0)]
    assert held_out_auc(chosen_on, read_on) == pytest.approx(0.6 * 0.4 - 0.2 * 0.9 + 0.6 * 1.0)
