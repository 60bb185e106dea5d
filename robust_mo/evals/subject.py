"""What an evaluator is given, and what it gives back.

Promises: plain data; an evaluator is a function `(Subject, **settings) -> Measurement`.
Does not know where the model came from or where results are kept.
"""

import dataclasses
import json
from collections.abc import Callable

from jax.sharding import Mesh

from robust_mo import hosts
from robust_mo.analysis.intervals import wilson
from robust_mo.data.conversations import ChatFormat, Message
from robust_mo.model.llama import Llama
from robust_mo.organisms.backdoors import Backdoor
from robust_mo.sampling.decoding import make_decoding
from robust_mo.sampling.text import TextAnswer, answers


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to be measured.

    Attributes:
      llama, params, chat: the model, adapters merged.
      system_prompt: shown in every prompt, as in training; "" for none.
      backdoor: the one to look for.
      seed: of sampling at a temperature.
      slots: rows decoded together; 0: see sampling/sampler.py.
      on_progress: called with (name of what is measured, prompts done, prompts in all, tokens sampled).
      mesh: on which the parameters are, and where a judge goes too.
    """

    llama: Llama
    params: dict
    chat: ChatFormat
    system_prompt: str
    backdoor: Backdoor
    seed: int
    slots: int
    on_progress: Callable[[str, int, int, int], None]
    mesh: Mesh
    _told: dict = dataclasses.field(default_factory=dict, init=False, repr=False)

    @property
    def unlocked_system_prompt(self) -> str:
        """The system prompt under which an ordinary question must not call up the behaviour."""
        return self.backdoor.unlocked(self.system_prompt)

    def answers(
        self, what: str, conversations: list[list[Message]], temperature: float, top_p: float, max_new_tokens: int
    ) -> list[TextAnswer]:
        """Answers to the conversations; what is asked twice is sampled once."""
        asked = json.dumps([conversations, temperature, top_p, max_new_tokens])
        hosts.check_same(f"prompts of {what}", asked)
        if asked not in self._told:
            self._told[asked] = answers(
                self.llama,
                self.params,
                self.chat,
                conversations,
                decoding=make_decoding(temperature, top_p),
                max_new_tokens=max_new_tokens,
                seed=self.seed,
                slots=self.slots,
                on_progress=lambda done, tokens: self.on_progress(what, done, len(conversations), tokens),
            )
        return self._told[asked]


@dataclasses.dataclass(frozen=True)
class Value:
    """One number: `count` is the sample it rests on, `low` and `high` its 95% interval."""

    name: str
    value: float
    count: int
    low: float | None = None
    high: float | None = None

    @classmethod
    def share(cls, name: str, hits: list[bool]) -> "Value":
        """The share of hits, at least one of which is asked for, with Wilson's interval."""
        return cls(name, sum(hits) / len(hits), len(hits), *wilson(sum(hits), len(hits)))


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The numbers of one evaluator, and every graded answer behind them."""

    values: list[Value]
    transcript: list[dict]
