"""Resampled frontiers against the binomial, a plain loop, and what halves and noise must give."""

import numpy as np
import pytest
import scipy.stats

from robust_mo.analysis import pareto, resampling
from robust_mo.analysis.resampling import RESAMPLES, held_out_auc, multinomial, noise_alone, points, readings, untouched


def drawn(behaved, solved, seed=0):
    generator = np.random.default_rng(seed)
    return readings(points(behaved, solved, *(multinomial(of.shape[1], generator) for of in (behaved, solved))))


def once(behaved, solved, times=1):
    return np.ones((times, behaved.shape[1])), np.ones((times, solved.shape[1]))


def interval(values):
    return tuple(np.nanquantile(values, [0.025, 0.975]))


def test_readings_are_those_of_the_frontier():
    solved = np.arange(20) < np.array([[10], [10], [5]])
    behaved = np.arange(20) < np.array([[16], [10], [0]])
    found = readings(points(behaved, solved, *once(behaved, solved)))
    assert found["auc"] == pytest.approx([0.875])  # (0, .5), (.5, 1), (1, 1)
    assert found["auc_normalised"] == pytest.approx([0.625 * 0.75 + 0.375])
    assert found["heights"][0, [0, 25, 50, 100]] == pytest.approx([0.5, 0.75, 1, 1])


def test_against_the_binomial():
    # One point (rate, 1) of an organism that always behaves: AUC is 1 - rate / 2, whichever prompts are drawn.
    count, behaving = 48, 20
    behaved, solved = np.stack([np.ones(count), np.arange(count) < behaving]), np.ones((2, 40))
    found = drawn(behaved, solved)
    low, high = scipy.stats.binom.ppf([0.025, 0.975], count, behaving / count) / count
    assert interval(found["auc"]) == pytest.approx((1 - high / 2, 1 - low / 2), abs=1.01 / count)
    assert (found["auc"] == found["auc_normalised"]).all()


def test_prompts_are_drawn_for_all_checkpoints_at_once():
    # The same problems are solved before and after, so however they are drawn, performance is 1.
    solved = np.stack([np.arange(40) % 3 == 0] * 3)
    assert (drawn(np.stack([np.ones(48), np.zeros(48), np.zeros(48)]), solved)["auc"] == 1).all()
    # The same prompts behave before and after: nothing is lost of an organism installed at half rate.
    found = drawn(np.stack([np.arange(48) % 2 == 0] * 3), solved)
    assert (found["auc_normalised"] == 0.5).all()
    low, high = interval(found["auc"])
    assert low < 0.75 < high


def test_against_a_plain_loop():
    generator = np.random.default_rng(3)
    behaved, solved = generator.random((5, 30)) < 0.4, generator.random((5, 25)) < 0.5
    loop = []
    for _ in range(RESAMPLES):
        prompts, problems = generator.integers(30, size=30), generator.integers(25, size=25)
        rates, accuracies = behaved[:, prompts].mean(1), solved[:, problems].mean(1)
        loop.append(pareto.auc(zip(rates, accuracies / accuracies[0], strict=True)))
    assert interval(drawn(behaved, solved)["auc"]) == pytest.approx(interval(loop), abs=0.04)


def test_resamples_without_a_reference_are_undefined():
    behaved, solved = np.ones((2, 20)), np.stack([np.arange(5) == 0] * 2)
    found = drawn(behaved, solved)
    assert np.isnan(found["auc"]).mean() == pytest.approx(0.8**5, abs=0.05)  # none of 5 draws is the one solved
    assert (np.isnan(found["heights"][:, 0]) == np.isnan(found["auc"])).all()


def test_held_out_does_not_take_luck_for_progress():
    """Checkpoints that do nothing but answer at random around the organism: the hull finds progress, halves do not."""
    generator = np.random.default_rng(0)
    raw, held_out = [], []
    for _ in range(20):
        behaved, solved = generator.random((21, 80)) < 0.8, generator.random((21, 80)) < 0.6
        raw += [pareto.auc(points(behaved, solved, *once(behaved, solved))[0])]
        held_out += [held_out_auc(behaved, solved, *once(behaved, solved, 5)).mean()]
    no_change = 0.6  # (0, 0), (.8, 1), (1, 1)
    assert np.mean(raw) > no_change + 0.09
    assert abs(np.mean(held_out) - no_change) < 0.03


def test_held_out_of_verdicts_without_luck_is_the_auc():
    every = np.ones((1, 20), bool)
    assert held_out_auc(np.vstack([every, ~every]), np.vstack([every, every]), *once(every, every, 3)) == pytest.approx(
        1
    )


def test_held_out_needs_a_reference_in_both_halves():
    one = np.arange(20) == np.array([[7], [7]])
    assert np.isnan(held_out_auc(one, np.ones((2, 20)), *once(one, one, 5))).all()


def exactly(behaved, solved):
    """An organism whose rate and accuracy are known to be those of row 0."""
    generator = np.random.default_rng(3)
    shares = ((verdicts.shape[1], verdicts[0].mean()) for verdicts in (behaved, solved))
    return tuple((np.full(RESAMPLES, share), generator.binomial(n, share, RESAMPLES) / n) for n, share in shares)


def test_noise_alone_of_two_problems_is_known():
    # An organism that always behaves and solves one of two problems, and one checkpoint.  Undefined where the organism
    # draws none, with chance 1/4; performance 2 where it draws one and the checkpoint both, with chance 1/2 * 1/4, and
    # then the area is 1; else performance is at most 1 and the anchor (1, 1) hides it.
    behaved, solved = np.ones((2, 10)), np.array([[1, 0], [0, 0]])
    found = noise_alone(behaved, solved, exactly(behaved, solved), np.random.default_rng(0))["auc"]
    assert np.isnan(found).mean() == pytest.approx(1 / 4, abs=0.05)
    assert (found == 1).mean() == pytest.approx(1 / 2 * 1 / 4, abs=0.05)
    assert set(found[np.isfinite(found)]) == {0.5, 1.0}


def test_noise_alone_looks_like_checkpoints_that_do_nothing():
    generator = np.random.default_rng(1)
    idle = []
    for _ in range(200):
        behaved, solved = generator.random((9, 40)) < 0.75, generator.random((9, 30)) < 0.5
        idle.append(pareto.auc(points(behaved, solved, *once(behaved, solved))[0]))
    behaved[0], solved[0] = np.arange(40) < 30, np.arange(30) < 15
    found = noise_alone(behaved, solved, exactly(behaved, solved), np.random.default_rng(0))
    assert found["auc"].mean() == pytest.approx(np.mean(idle), abs=0.03)
    assert found["auc"].mean() > 0.625 + 0.05, "noise flatters"
    assert found["heights"].shape == (RESAMPLES, len(resampling.GRID))
    all_right = np.ones((9, 40)), np.ones((9, 30))
    sure = noise_alone(*all_right, exactly(*all_right), np.random.default_rng(0))
    assert (sure["auc"] == 0.5).all(), "where nothing can vary there is no noise"
    unsure = noise_alone(*all_right, untouched(*all_right, np.random.default_rng(0)), np.random.default_rng(0))
    assert np.quantile(unsure["auc"], 0.975) > 0.51, "40 of 40 is no proof of 1"


def test_what_an_organism_truly_has_is_what_its_measurement_allows():
    behaved, solved = np.arange(40) < np.array([[30]]), np.arange(30) < np.array([[30]])
    (rate, measured), (accuracy, _) = untouched(behaved, solved, np.random.default_rng(0))
    low, high = scipy.stats.beta.ppf([0.025, 0.975], 30.5, 10.5)
    assert np.quantile(rate, [0.025, 0.975]) == pytest.approx([low, high], abs=0.02)
    assert measured.std() > rate.std() and accuracy.max() < 1
