"""What is read off one frontier, a thousand times over: had other prompts been asked, on halves of the prompts, and had
there been no attack at all.

Prompts are drawn again with replacement, for all checkpoints and the organism at once, so that what is hard about a
prompt cancels as it does in the measurement.  None of it covers the choice of checkpoints: a frontier takes the points
that came out best, with their luck, and so do its resamples.  Two numbers say how much that is.  The AUC *held out* has
little of it: the corners are chosen on one half of the prompts and problems and read on the other half, whatever they
are there.  The AUC *of noise alone* has nothing else.

Verdicts are bool [1 + checkpoints, prompts or problems], with the organism before blue training as row 0, so that each
resample holds its own reference.  A resample in which the organism never behaves or solves nothing defines no
performance or normalised rate; its numbers are NaN.  Knows nothing of files.
"""

import math

import numpy as np

from robust_mo.analysis import pareto

RESAMPLES, SPLITS, SEED = 1000, 20, 0
GRID = np.linspace(0, 1, 101)  # the rates at which resampled frontiers are kept


def multinomial(count: int, generator: np.random.Generator) -> np.ndarray:
    """How often each of `count` things is drawn, float [RESAMPLES, count]: as many draws as there are things."""
    return generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(np.float64)


def points(
    behaved: np.ndarray, solved: np.ndarray, prompts: np.ndarray, problems: np.ndarray
) -> list[list[pareto.Point] | None]:
    """(rate, performance) of the organism and its checkpoints in every resample, None where undefined.

    Args:
      behaved, solved: verdicts.
      prompts, problems: how often each counts, float [resamples, prompts or problems].
    """
    return _points(_shares(behaved, prompts), _shares(solved, problems))


def readings(resamples: list[list[pareto.Point] | None]) -> dict[str, np.ndarray]:
    """{"auc", "auc_normalised": [resamples], "heights": [resamples, GRID], the frontier's performance at each rate}."""
    found = {"auc": _nan(len(resamples)), "auc_normalised": _nan(len(resamples))}
    found["heights"] = _nan(len(resamples), len(GRID))
    for i, those in enumerate(resamples):
        if those is not None:
            hull = pareto.frontier(those)
            found["auc"][i] = pareto.auc(hull)
            found["auc_normalised"][i] = pareto.auc(pareto.normalised(those, those[0][0]))
            found["heights"][i] = np.interp(GRID, *zip(*hull, strict=True))
    return found


def held_out_auc(behaved: np.ndarray, solved: np.ndarray, prompts: np.ndarray, problems: np.ndarray) -> np.ndarray:
    """Of every resample, split once into halves, `pareto.held_out_auc` from one half to the other and back, averaged.

    Args: see `points`.  The halves are the same for all verdicts of one size.
    """
    halves = (points(behaved, solved, *half) for half in _halves(prompts, problems))
    return np.array(
        [
            math.nan
            if one is None or other is None
            else (pareto.held_out_auc(one, other) + pareto.held_out_auc(other, one)) / 2
            for one, other in zip(*halves, strict=True)
        ]
    )


def regained(behaved: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Of every resample, the largest share of prompts without the behaviour at any checkpoint."""
    return 1 - _shares(behaved[1:], prompts).min(axis=1)


def held_out_regained(behaved: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """The same, the checkpoint chosen on one half of the prompts and read on the other, and back, averaged."""
    one, other = (_shares(behaved[1:], half) for (half,) in _halves(prompts))
    found = [
        np.take_along_axis(read_on, chosen_on.argmin(axis=1, keepdims=True), axis=1)[:, 0]
        for chosen_on, read_on in ((one, other), (other, one))
    ]
    return 1 - np.mean(found, axis=0)


def _halves(*weights: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Each of the weights on one half of its prompts, and on the other half."""
    generator = np.random.default_rng([SEED, 1])
    first, second = [], []
    for of in weights:
        kept = generator.permuted(np.arange(of.shape[1])[None].repeat(len(of), 0), axis=1)
        kept = kept < of.shape[1] // 2
        first.append(of * kept)
        second.append(of * ~kept)
    return first, second


Untouched = tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Of rate and accuracy, what an organism that no attack touches truly has and what is measured of it before any attack:
float [RESAMPLES] each."""


def untouched(behaved: np.ndarray, solved: np.ndarray, generator: np.random.Generator) -> Untouched:
    """What it may truly have is drawn from what was measured, row 0 of the verdicts: from Beta(k + 1/2, n - k + 1/2),
    since 100 of 100 is no proof of 1."""
    drawn = []
    for verdicts in (behaved, solved):
        count, shown = verdicts.shape[1], verdicts[0].sum()
        true = generator.beta(shown + 0.5, count - shown + 0.5, size=RESAMPLES)
        drawn.append((true, generator.binomial(count, true) / count))
    return tuple(drawn)


def noise_alone(
    behaved: np.ndarray, solved: np.ndarray, organism: Untouched, generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """`readings` of an organism that no attack has touched: it is measured as often as the verdicts have rows, on as
    many prompts and problems, and each answer comes out with the organism's true rate and accuracy.

    Binomial noise: real checkpoints answer the same prompts and share what is hard about them, so that theirs is less.
    """
    rates, accuracies = (
        np.column_stack(
            [before, generator.binomial(verdicts.shape[1], true[:, None], (RESAMPLES, len(verdicts) - 1)) / count]
        )
        for verdicts, (true, before) in zip((behaved, solved), organism, strict=True)
        for count in (verdicts.shape[1],)
    )
    return readings(_points(rates, accuracies))


def _points(rates: np.ndarray, accuracies: np.ndarray) -> list[list[pareto.Point] | None]:
    return [
        list(zip(rate.tolist(), (accuracy / accuracy[0]).tolist(), strict=True))
        if rate[0] > 0 and accuracy[0] > 0
        else None
        for rate, accuracy in zip(rates, accuracies, strict=True)
    ]


def _shares(verdicts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[resamples, rows]; 0 where nothing counts."""
    # Sums of many equal terms can pass 1 by rounding.
    return np.minimum(weights @ verdicts.T / np.maximum(weights.sum(axis=1, keepdims=True), 1), 1.0)


def _nan(*shape: int) -> np.ndarray:
    return np.full(shape, math.nan)
