"""Results of a study: the AUC of a selection of its cells, averaged, and which of two is the smaller.

A result is a name and a selection: some of the study's arms, blue methods and backdoors.  Its AUC is the mean, over the
organisms in it, of the AUC under the selected methods together.  Intervals are a bootstrap that draws backdoors,
prompts and problems again, the same for every result, so that what two results have in common cancels in their
difference.

A hull takes the checkpoints that came out best, with their luck.  The AUC *held out* has little of it: the corners are
chosen on one half of the prompts and problems and read on the other half, whatever they are there.

Knows nothing of files, and nothing of what the arms are.
"""

import dataclasses
import itertools
import math

import numpy as np

from robust_mo.analysis import pareto
from robust_mo.errors import InputError

RESAMPLES, SPLITS, SEED = 1000, 20, 0


@dataclasses.dataclass(frozen=True)
class Attacked:
    """An organism and its checkpoints under attack, as verdicts.

    Attributes:
      arm, backdoor: what it is.
      methods: of each checkpoint, its blue method.
      behaved: bool [1 + checkpoints, prompts], whether a triggered prompt got the behaviour; row 0 is the organism
        before blue training.
      solved: bool [1 + checkpoints, problems].
    """

    arm: str
    backdoor: str
    methods: tuple[str, ...]
    behaved: np.ndarray
    solved: np.ndarray

    def rows(self, methods) -> list[int]:
        """Row 0 and those of the methods; all where none is named."""
        return [0, *(i for i, method in enumerate(self.methods, 1) if not methods or method in methods)]

    def points(self, methods, prompts: np.ndarray, problems: np.ndarray) -> list[pareto.Point] | None:
        """(rate, performance) of the organism and its checkpoints where prompt i counts `prompts[i]` times and problem
        j `problems[j]` times; None where the organism itself, so weighted, never behaves or solves nothing."""
        rows = self.rows(methods)
        # Sums of many equal terms can pass 1 by rounding.
        rates = np.minimum(self.behaved[rows] @ prompts / prompts.sum(), 1.0)
        accuracies = self.solved[rows] @ problems / problems.sum()
        if rates[0] == 0 or accuracies[0] == 0:
            return None
        return list(zip(rates.tolist(), (accuracies / accuracies[0]).tolist(), strict=True))


def held_out_auc(attacked: Attacked, methods) -> float:
    """Area under the line through the anchors and the corners that one half of the prompts and problems chose, each
    corner where the other half puts it: mean over both directions of SPLITS halvings; NaN where no half has points."""
    generator = np.random.default_rng(SEED)
    areas = []
    for _ in range(SPLITS):
        of_prompts, of_problems = (_halves(v.shape[1], generator) for v in (attacked.behaved, attacked.solved))
        points = [attacked.points(methods, of_prompts[half], of_problems[half]) for half in (0, 1)]
        for chosen_on, read_on in (points, points[::-1]) if None not in points else ():
            corners = set(pareto.frontier(chosen_on))
            read = [there for here, there in zip(chosen_on, read_on, strict=True) if here in corners]
            line = sorted([*pareto.ANCHORS, *read])
            areas.append(math.fsum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in itertools.pairwise(line)))
    return float(np.mean(areas)) if areas else math.nan


def _halves(count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Weights that keep a random half, and those that keep the other."""
    kept = np.zeros(count)
    kept[generator.permutation(count)[: count // 2]] = 1
    return kept, 1 - kept


def compare(measured: list[Attacked], results: dict[str, dict], orderings) -> dict:
    """The results, and how they compare.

    Args:
      measured: the organisms that were attacked, all asked the same number of prompts and problems.
      results: name -> {"arms", "methods", "backdoors"}; an empty one stands for all.
      orderings: pairs of names, of which the first should have the smaller AUC.

    Returns:
      {"results": name -> {"organisms": count, "auc": [value, low, high], "auc_normalised": [value, low, high],
      "auc_held_out": value}, None where no organism belongs to it; "orderings": [{"smaller", "larger", "difference":
      [value, low, high], "verdict"}]}.  The difference is the second's AUC less the first's; the verdict is "holds" or
      "reversed" where its 95% interval leaves 0 out, else "not resolved", or "not measured" where a result is None.

    Raises:
      InputError: an ordering names no result, or organisms were asked different numbers of prompts.
    """
    for name in itertools.chain.from_iterable(orderings):
        if name not in results:
            raise InputError(f"config.study.orderings names {name!r}: choose from {', '.join(results)}")
    if len({(one.behaved.shape[1], one.solved.shape[1]) for one in measured}) > 1:
        raise InputError("the study's organisms were asked different numbers of prompts: evaluate all on the same ones")
    members = {name: [one for one in measured if _belongs(one, chosen)] for name, chosen in results.items()}
    members = {name: those for name, those in members.items() if those}
    found: dict[str, dict | None] = dict.fromkeys(results)
    whole, drawn = _bootstrap(measured, members, results) if members else ({}, {})
    for name, those in members.items():
        auc, normalised = ([float(whole[name][i]), *_bounds(drawn[name][:, i])] for i in (0, 1))
        found[name] = {
            "organisms": len(those),
            "auc": auc,
            "auc_normalised": normalised,
            "auc_held_out": float(np.mean([held_out_auc(one, results[name]["methods"]) for one in those])),
        }
    return {
        "results": found,
        "orderings": [_ordering(smaller, larger, whole, drawn) for smaller, larger in orderings],
    }


def _belongs(attacked: Attacked, chosen: dict) -> bool:
    return (
        (not chosen["arms"] or attacked.arm in chosen["arms"])
        and (not chosen["backdoors"] or attacked.backdoor in chosen["backdoors"])
        and len(attacked.rows(chosen["methods"])) > 1
    )


def _bootstrap(measured, members, results) -> tuple[dict, dict]:
    """(result -> (AUC, normalised AUC), result -> the same [RESAMPLES, 2] over what is drawn again)"""
    backdoors = sorted({one.backdoor for one in measured})
    sizes = (len(backdoors), measured[0].behaved.shape[1], measured[0].solved.shape[1])
    generator = np.random.default_rng(SEED)

    def aucs(weights) -> dict[str, np.ndarray]:
        of_backdoors, of_prompts, of_problems = weights
        weight = dict(zip(backdoors, of_backdoors, strict=True))
        known: dict[tuple, np.ndarray] = {}  # results share organisms

        def auc(one, methods) -> np.ndarray:
            key = (id(one), tuple(one.rows(methods)))
            if key not in known:
                points = one.points(methods, of_prompts, of_problems)
                nothing = np.full(2, math.nan)
                known[key] = (
                    nothing
                    if points is None
                    else np.array([pareto.auc(points), pareto.auc(pareto.normalised(points, points[0][0]))])
                )
            return known[key]

        means = {}
        for name, those in members.items():
            values = [(auc(one, results[name]["methods"]), weight[one.backdoor]) for one in those]
            values = [(value, times) for value, times in values if times and not math.isnan(value[0])]
            total = sum(times for _, times in values)
            means[name] = sum(value * times for value, times in values) / total if values else np.full(2, math.nan)
        return means

    whole = aucs([np.ones(size) for size in sizes])
    draws = [
        aucs([generator.multinomial(size, np.full(size, 1 / size)).astype(float) for size in sizes])
        for _ in range(RESAMPLES)
    ]
    return whole, {name: np.array([draw[name] for draw in draws]) for name in members}


def _bounds(values: np.ndarray) -> list[float]:
    return np.nanquantile(values, [0.025, 0.975]).tolist()


def _ordering(smaller: str, larger: str, whole, drawn) -> dict:
    ordering = {"smaller": smaller, "larger": larger}
    if smaller not in whole or larger not in whole:
        return ordering | {"difference": None, "verdict": "not measured"}
    low, high = _bounds((drawn[larger] - drawn[smaller])[:, 0])
    verdict = "holds" if low > 0 else "reversed" if high < 0 else "not resolved"
    difference = float(whole[larger][0] - whole[smaller][0])
    return ordering | {"difference": [difference, low, high], "verdict": verdict}
