"""Results of a study: the frontier of a selection of its cells, averaged, and which of two results is the smaller.

A result is a name and a selection: some of the study's arms, blue methods and backdoors.  An organism under one blue
seed has one frontier, that of its checkpoints under the selected methods together.  A result's numbers are means of
theirs: more seeds are no further chances to come out best.  Its frontier, for the figure, is the mean at every rate;
the area under that is the mean AUC, but the rate left at a cost is not read off it, where one organism with a
performance far above 1 would decide for all.

Intervals are a bootstrap that draws backdoors, red seeds, blue seeds, prompts and problems again, the same for every
result, so that what two results have in common cancels in their difference.

Knows nothing of files, and nothing of what the arms are.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np

from robust_mo.analysis import pareto, resampling
from robust_mo.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Attacked:
    """An organism and its checkpoints under attack, as verdicts.

    Attributes:
      arm, backdoor, seed: what it is; the seed is that of the red run, None where the study leaves it to config.red.
      methods, seeds: of each checkpoint, its blue method and blue seed.
      unfinished: blue methods of which an attack has not come to its end.
      behaved: bool [1 + checkpoints, prompts], whether a triggered prompt got the behaviour; row 0 is the organism
        before blue training.
      solved: bool [1 + checkpoints, problems].
      has_frontier: whether it behaves and solves enough before blue training for a checkpoint to be set against that;
        what it regains is known without.
    """

    arm: str
    backdoor: str
    seed: int | None
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    unfinished: frozenset[str]
    behaved: np.ndarray
    solved: np.ndarray
    has_frontier: bool = True

    def attacks(self, methods=()) -> list["Attack"]:
        """One for each blue seed under which the methods were tried; all methods where none is named."""
        rows: dict[int, list[int]] = {}
        for row, (method, seed) in enumerate(zip(self.methods, self.seeds, strict=True), 1):
            if not methods or method in methods:
                rows.setdefault(seed, [0]).append(row)
        complete = not self.unfinished.intersection(methods or self.unfinished)
        return [Attack(self, seed, tuple(those), complete) for seed, those in rows.items()]


@dataclasses.dataclass(frozen=True)
class Attack:
    """What has one frontier, if any: an organism and those rows of its verdicts that one blue seed made, after row 0.

    `complete`: every attack on it of the methods asked for has come to its end; with fewer points a frontier can only
    be lower.
    """

    organism: Attacked
    seed: int
    rows: tuple[int, ...]
    complete: bool

    @property
    def along(self) -> tuple:
        """Where it lies on the axes that are drawn again: backdoor, red seed, blue seed."""
        return self.organism.backdoor, self.organism.seed, self.seed

    @property
    def verdicts(self) -> tuple[np.ndarray, np.ndarray]:
        """(behaved, solved)"""
        return self.organism.behaved[list(self.rows)], self.organism.solved[list(self.rows)]


@dataclasses.dataclass(frozen=True)
class Missing:
    """Attacks that the study asks for and of which nothing is measured: on an organism that passed its gate, or that
    has begun and has not come to it; of the methods named, or of all."""

    arm: str
    backdoor: str
    methods: frozenset[str]


ORDERED_BY = {"auc": ("auc", "auc_held_out"), "accuracy": ("regained", "regained_held_out")}
"""What a study's orderings are tested by, from what it compares itself with."""


class Study:
    """The attacked organisms of a study, and all that may be drawn again.

    Args:
      organisms: all asked the same number of prompts and problems.
      missing: what is not among them yet.
      cost: of `pareto.rate_at_cost`.

    Raises:
      InputError: organisms were asked different numbers of prompts.
    """

    def __init__(self, organisms: list[Attacked], *, missing: list[Missing] = (), cost: float):
        sizes = {(one.behaved.shape[1], one.solved.shape[1]) for one in organisms}
        if len(sizes) > 1:
            raise InputError(
                "the study's organisms were asked different numbers of prompts: evaluate all on the same ones"
            )
        self._organisms, self._missing, self._cost = organisms, missing, cost
        generator = np.random.default_rng(resampling.SEED)
        self._asked = [resampling.multinomial(size, generator) for size in itertools.chain.from_iterable(sizes)]
        # Each axis is drawn once for all that lies along it, as what a seed does to every backdoor is one draw of it.
        self._times = [
            dict(zip(names, resampling.multinomial(len(names), generator).T, strict=True))
            for names in (
                dict.fromkeys(one.backdoor for one in organisms),
                dict.fromkeys(one.seed for one in organisms),
                dict.fromkeys(seed for one in organisms for seed in one.seeds),
            )
            if names  # no organism, no axis
        ]
        self._noise = np.random.default_rng([resampling.SEED, 2])
        self._untouched: dict[Attacked, resampling.Untouched] = {}  # one measurement, whatever its blue seeds
        self._known: dict[Attack, tuple[dict, dict]] = {}  # selections share attacks

    def select(self, *, arms=(), methods=(), backdoors=()) -> list[Attack]:
        """The attacks of a selection; an empty one stands for all."""
        return [
            attack
            for one in self._organisms
            if (not arms or one.arm in arms) and (not backdoors or one.backdoor in backdoors)
            for attack in one.attacks(methods)
        ]

    def lacks(self, *, arms=(), methods=(), backdoors=()) -> bool:
        """Whether attacks are missing that would be in the selection."""
        return any(
            (not arms or one.arm in arms)
            and (not backdoors or one.backdoor in backdoors)
            and (not methods or not one.methods or not one.methods.isdisjoint(methods))
            for one in self._missing
        )

    def measure(self, attacks: list[Attack], some_missing: bool = False) -> dict | None:
        """Means of what is read off the attacks' frontiers; None where there are none.

        Returns:
          {"organisms", "points": counts; "complete": whether all have ended and not `some_missing`;
          "auc", "auc_normalised", "auc_held_out", "auc_noise", "rate_at_cost", "rate_noise": [value, low, high], None
          where undefined; "frontier": corners; "band": [rate, low, high] of the frontier; "noise": [rate, performance]
          of the frontier that noise alone has on average}.  Of the two of noise, the value is a mean and the rest where
          95% of unattacked organisms come to lie; of the others, a 95% interval.
        """
        if not (attacks := [attack for attack in attacks if attack.organism.has_frontier]):
            return None
        values, drawn = self._mean(attacks, self._read)
        for name in ("auc_noise", "rate_noise"):
            values[name] = float(np.nanmean(drawn[name]))
        frontier = pareto.average([self._known[attack][0]["frontier"] for attack in attacks])
        return {
            "organisms": len({attack.organism for attack in attacks}),
            "points": sum(len(attack.rows) - 1 for attack in attacks),
            "complete": not some_missing and all(attack.complete for attack in attacks),
            **{name: _interval(value, drawn[name]) for name, value in values.items()},
            "frontier": [list(corner) for corner in frontier],
            "band": _rows(*_bounds(drawn["heights"])),
            "noise": _rows(np.nanmean(drawn["noise_heights"], axis=0)),
        }

    def order(self, smaller: list[Attack], larger: list[Attack], by: tuple[str, ...], some_missing=False) -> dict:
        """An ordering as `compare` describes it, without its names.

        Where the two share backdoors and seeds only those count, as one side may lack some whose gate was not passed;
        not so where what they share is the same attack on both sides, of groups that overlap.
        """
        read = self._read if by == ORDERED_BY["auc"] else self._read_regained
        if read == self._read:
            smaller, larger = ([one for one in side if one.organism.has_frontier] for side in (smaller, larger))
        shared = set() if set(smaller) & set(larger) else {one.along for one in smaller} & {one.along for one in larger}
        smaller, larger = ([one for one in side if not shared or one.along in shared] for side in (smaller, larger))
        found: dict = {
            "shared": len({backdoor for backdoor, *_ in shared}),
            "attacks": [len(smaller), len(larger)],
        }
        if not smaller or not larger:
            return found | dict.fromkeys(by, {"difference": None, "verdict": "not measured"})
        (first, first_drawn), (second, second_drawn) = self._mean(smaller, read), self._mean(larger, read)
        complete = not some_missing and all(one.complete for one in (*smaller, *larger))
        for name in by:
            difference = _interval(second[name] - first[name], second_drawn[name] - first_drawn[name])
            verdict = "not measured"
            if difference:
                _, low, high = difference
                verdict = "holds" if low > _ROUNDING else "reversed" if high < -_ROUNDING else "not resolved"
                verdict = verdict if complete else "attacks missing"
            found[name] = {"difference": difference, "verdict": verdict}
        return found

    def _mean(self, attacks: list[Attack], read: Callable) -> tuple[dict, dict[str, np.ndarray]]:
        """Means of what `read` finds of the attacks: numbers as measured, and what is drawn in every resample."""
        each = [read(attack) for attack in attacks]
        values = {name: float(np.mean([one[name] for one, _ in each])) for name in each[0][0] if name != "frontier"}
        # An axis draws its names as often for every attack along it, where they lie at several places of it; noise has
        # no axis.
        spread = [len(set(places)) > 1 for places in zip(*(attack.along for attack in attacks), strict=True)]
        weights = [
            np.prod(
                [axis[name] for axis, name, drawn in zip(self._times, attack.along, spread, strict=True) if drawn]
                or [np.ones(resampling.RESAMPLES)],
                axis=0,
            )
            for attack in attacks
        ]
        drawn = {}
        for name in each[0][1]:
            draws = [found[name] for _, found in each]
            if name in ("auc_noise", "rate_noise", "noise_heights"):
                drawn[name] = _weighted(draws, np.ones_like(weights))
            else:
                drawn[name] = _weighted(draws, weights, strict=name != "heights")
                if name != "auc_held_out" and np.isfinite(drawn[name]).mean() < _ENOUGH:
                    drawn[name] = _weighted(draws, weights)
        return values, drawn

    def _read_regained(self, attack: Attack) -> tuple[dict, dict[str, np.ndarray]]:
        """The best of an attack's checkpoints, whatever it cost: as measured, and in every resample."""
        (behaved, _), (prompts, _) = attack.verdicts, self._asked
        once, splits = (np.ones((times, behaved.shape[1])) for times in (1, resampling.SPLITS))
        values = {
            "regained": resampling.regained(behaved, once)[0],
            "regained_held_out": resampling.held_out_regained(behaved, splits).mean(),
        }
        return values, {
            "regained": resampling.regained(behaved, prompts),
            "regained_held_out": resampling.held_out_regained(behaved, prompts),
        }

    def _read(self, attack: Attack) -> tuple[dict, dict[str, np.ndarray]]:
        """What is read off an attack's frontier: as measured, and in every resample."""
        if attack not in self._known:
            verdicts = attack.verdicts
            once, splits = ([np.ones((times, of.shape[1])) for of in verdicts] for times in (1, resampling.SPLITS))
            (points,) = resampling.points(*verdicts, *once)
            halves = resampling.held_out_auc(*verdicts, *splits)
            values = {
                "frontier": pareto.frontier(points),
                "auc": pareto.auc(points),
                "auc_normalised": pareto.auc(pareto.normalised(points, points[0][0])),
                "auc_held_out": np.nanmean(halves) if np.isfinite(halves).any() else math.nan,
                "rate_at_cost": pareto.rate_at_cost(points, self._cost),
            }
            drawn = resampling.readings(resampling.points(*verdicts, *self._asked))
            drawn["rate_at_cost"] = self._rates_left(drawn["heights"])
            drawn["auc_held_out"] = resampling.held_out_auc(*verdicts, *self._asked)
            if attack.organism not in self._untouched:
                self._untouched[attack.organism] = resampling.untouched(*verdicts, self._noise)
            noise = resampling.noise_alone(*verdicts, self._untouched[attack.organism], self._noise)
            noise = {
                "auc_noise": noise["auc"],
                "rate_noise": self._rates_left(noise["heights"]),
                "noise_heights": noise["heights"],
            }
            self._known[attack] = values, drawn | noise
        return self._known[attack]

    def _rates_left(self, heights: np.ndarray) -> np.ndarray:
        """`pareto.rate_at_cost` of frontiers on the grid: up to half a hundredth high where a corner lies off it."""
        # A frontier is concave, so it rises up to its highest place.
        return np.array([np.interp(1 - self._cost, np.maximum.accumulate(row), resampling.GRID) for row in heights])


def compare(study: Study, results: dict[str, dict], orderings, by: tuple[str, ...] = ORDERED_BY["auc"]) -> dict:
    """The results, and how they compare.

    Args:
      results: name -> {"arms", "methods", "backdoors"}; an empty one stands for all.
      orderings: pairs of names, of which the first should have the smaller AUC.
      by: what else than the AUC should be the smaller, see ORDERED_BY: "regained" is the mean over attacks of the
        largest share of triggered prompts that do not get the behaviour at any checkpoint.

    Returns:
      {"results": name -> `Study.measure`; "orderings": [{"smaller", "larger", "shared": number of backdoors that both
      have with the same seeds, "attacks": how many count on either side, and for each of `by` {"difference": [value,
      low, high], "verdict"}}]}.  The difference is the second's less the first's; the verdict is "holds" or "reversed"
      where its 95% interval leaves 0 out, else "not resolved", and instead of these "attacks missing" where some have
      not ended, or "not measured" where there is no difference.

    Raises:
      InputError: an ordering names no result.
    """
    for name in itertools.chain.from_iterable(orderings):
        if name not in results:
            raise InputError(f"config.study.orderings names {name!r}: choose from {', '.join(results)}")
    axes = ("arms", "methods", "backdoors")
    asked_for = {name: {axis: chosen[axis] for axis in axes} for name, chosen in results.items()}
    members = {name: study.select(**chosen) for name, chosen in asked_for.items()}
    lacks = {name: study.lacks(**chosen) for name, chosen in asked_for.items()}
    return {
        "results": {name: study.measure(attacks, lacks[name]) for name, attacks in members.items()},
        "orderings": [
            {"smaller": smaller, "larger": larger}
            | study.order(members[smaller], members[larger], by, lacks[smaller] or lacks[larger])
            for smaller, larger in orderings
        ],
    }


def _weighted(numbers: list[np.ndarray], weights, strict: bool = False) -> np.ndarray:
    """Mean of arrays [RESAMPLES, ...] with weights [RESAMPLES] each, in every resample.  NaN has no weight, or if
    `strict`, what has a weight and is NaN makes the mean so: the others do not stand for it."""
    total, count = np.zeros_like(numbers[0].T), np.zeros(len(numbers[0]))
    for values, times in zip(numbers, weights, strict=True):
        undefined = np.isnan(values.T if values.ndim == 1 else values[:, 0])
        counted = times * ~undefined
        total += np.nan_to_num(values.T) * counted + np.where(strict & undefined & (times > 0), math.nan, 0)
        count += counted
    return np.divide(total, count, out=np.full_like(total, math.nan), where=count > 0).T


_ROUNDING = 1e-9
_ENOUGH = 0.5  # share of the resamples in which all is defined, for the rest to be left out


def _rows(*heights: np.ndarray) -> list[list[float]]:
    """[rate, *heights] along the grid, with as many digits as a figure shows."""
    return np.column_stack([resampling.GRID, *heights]).round(5).tolist()


def _bounds(draws: np.ndarray) -> np.ndarray:
    return np.nanquantile(draws, [0.025, 0.975], axis=0)


def _interval(value: float, draws: np.ndarray) -> list[float] | None:
    enough = np.isfinite(draws).mean() >= _ENOUGH
    return None if math.isnan(value) or not enough else [value, *_bounds(draws).tolist()]
