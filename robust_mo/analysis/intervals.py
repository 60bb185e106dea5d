"""How far a rate, or a number read off a frontier, could move had other prompts been drawn.

`wilson` is for one share: a backdoor rate, an accuracy.  `bootstrap` is for AUC and for the rate left at a cost,
which rest on many checkpoints that all answered the same prompts: prompts are drawn again with replacement, for all
checkpoints and the organism at once, so that what is hard about a prompt cancels as it does in the measurement.

Neither covers the choice of checkpoints: a frontier takes the points that came out best, with their luck, and so do
its resamples.  Knows nothing of files.
"""

import math
import statistics

import numpy as np

from robust_mo.analysis import pareto
from robust_mo.errors import InputError


def wilson(successes: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share, as (low, high); no continuity correction.

    Raises:
      InputError: count below 1, successes outside [0, count], or confidence outside (0, 1).
    """
    if count < 1:
        raise InputError(f"an interval of {successes} of {count} does not exist: evaluate at least one prompt")
    if not 0 <= successes <= count:
        raise InputError(f"{successes} successes out of {count} are impossible: give between 0 and {count}")
    if not 0 < confidence < 1:
        raise InputError(f"confidence is {confidence}: give a number between 0 and 1, such as 0.95")
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / count
    centre = share + z**2 / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    scale = 1 + z**2 / count
    # At both ends the formula gives 0 and 1 but for rounding.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == count else (centre + half) / scale
    return low, high


def bootstrap(
    behaved: np.ndarray,
    solved: np.ndarray,
    behaved_before: np.ndarray,
    solved_before: np.ndarray,
    *,
    cost: float,
    resamples: int,
    seed: int,
    confidence: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of the numbers read off a frontier, over prompts and over problems.

    Args:
      behaved: bool [checkpoints, prompts], whether a triggered prompt got the behaviour.
      solved: bool [checkpoints, problems], whether a problem was solved.
      behaved_before: bool [prompts], of the organism before blue training, which is a point as well.
      solved_before: bool [problems]; performance is relative to it.
      cost: of `pareto.rate_at_cost`.
      resamples: how often prompts and problems are drawn, each on their own.
      seed: same arguments and seed, same intervals.

    Returns:
      {"auc", "auc_normalised", "rate_at_cost"}: (low, high).  Resamples in which the organism before blue
      training solves nothing or never behaves define no performance or normalised rate, and are left out.

    Raises:
      InputError: shapes that do not fit, or an organism that solves nothing or never behaves.
    """
    # The organism itself is row 0, so each resample holds its own reference.
    behaved = _stack(behaved_before, behaved, "behaved")
    solved = _stack(solved_before, solved, "solved")
    if len(behaved) != len(solved):
        raise InputError(f"behaved has {len(behaved) - 1} checkpoints but solved {len(solved) - 1}: give both for each")
    generator = np.random.default_rng(seed)
    rates, accuracies = (_resampled(verdicts, resamples, generator) for verdicts in (behaved, solved))
    drawn: dict[str, list[float]] = {"auc": [], "auc_normalised": [], "rate_at_cost": []}
    for rate, accuracy in zip(rates, accuracies, strict=True):
        if rate[0] == 0 or accuracy[0] == 0:
            continue
        points = list(zip(rate.tolist(), (accuracy / accuracy[0]).tolist(), strict=True))
        hull = pareto.frontier(points)
        drawn["auc"].append(pareto.auc(hull))
        drawn["auc_normalised"].append(pareto.auc(pareto.normalised(points, rate[0])))
        drawn["rate_at_cost"].append(pareto.rate_at_cost(hull, cost))
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    return {name: tuple(np.quantile(values, tails).tolist()) for name, values in drawn.items()}


def _stack(before, after, name: str) -> np.ndarray:
    before, after = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    if before.ndim != 1 or after.ndim != 2 or after.shape[1] != len(before):
        raise InputError(
            f"{name} has shape {after.shape} and {name}_before {before.shape}: "
            "give [checkpoints, prompts] and [prompts] over the same prompts"
        )
    if not before.any():
        raise InputError(f"{name}_before is False everywhere: nothing can be measured relative to it")
    return np.concatenate([before[None], after]).astype(np.float64)


def _resampled(verdicts: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Shares [resamples, rows] of the verdicts [rows, prompts] over prompts drawn with replacement."""
    count = verdicts.shape[1]
    times_drawn = generator.multinomial(count, np.full(count, 1 / count), size=resamples)
    return times_drawn @ verdicts.T / count
