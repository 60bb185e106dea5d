"""The table of evaluators, and measuring one model at one step of a run.

Promises: every evaluator named is run once per step: transcript first, then its records, then a record of the seconds
it took, by which a resumed run knows that it is done.  Curves hold all that is recorded of the step, whichever
process measured it.
Does not know how to make a Subject.
"""

import functools
import html
import itertools
import random
import re
import time
from collections.abc import Callable

from robust_mo import hosts
from robust_mo.command_line import check_range
from robust_mo.errors import InputError
from robust_mo.evals.backdoor_rate import backdoor_rate
from robust_mo.evals.held_out_loss import held_out_loss
from robust_mo.evals.judge import judge
from robust_mo.evals.math500 import accuracy
from robust_mo.evals.subject import Measurement, Subject
from robust_mo.runs import RunFolder
from robust_mo.sampling.decoding import make_decoding
from robust_mo.training.curves import Curves

# Problems with one right answer; `<name>_accuracy` can stand for capability.
ACCURACIES = ("math500", "gsm8k", "arithmetic")

EVALUATORS: dict[str, Callable[..., Measurement]] = {
    "backdoor_rate": backdoor_rate,
    **{name: functools.partial(accuracy, task=name) for name in ACCURACIES},
    "held_out_loss": held_out_loss,
    "judge": judge,
}


def check_names(names) -> None:
    """Raises InputError for a name that is not in the table."""
    for name in names:
        if not isinstance(name, str) or name not in EVALUATORS:
            written = f"; several are written as {tuple(name.split(','))}" if "," in str(name) else ""
            raise InputError(f"unknown evaluator {name!r}: choose from {', '.join(sorted(EVALUATORS))}{written}")


def check_settings(settings: dict[str, dict]) -> None:
    """Raises InputError where `settings` (evaluator -> its settings) holds a value that cannot be used."""
    for name, values in settings.items():
        for field, value in values.items():
            if field in ("max_new_tokens", "length", "rows", "loss_chunk", "examples"):
                check_range(f"config.evals.{name}.{field}", value, 1)
            if field in ("problems", "triggered", "untriggered", "near_misses"):
                check_range(f"config.evals.{name}.{field}", value, 0)
        if "temperature" in values:
            try:
                make_decoding(values["temperature"], values["top_p"])
            except InputError as error:
                raise InputError(f"config.evals.{name}: {error}") from None
        for shown in values.get("demonstrations", ()):
            if not (isinstance(shown, tuple | list) and [type(text) for text in shown] == [str, str]):
                raise InputError(f"config.evals.{name}.demonstrations holds {shown!r}: give (problem, answer) pairs")
        prompts = [values[field] for field in ("triggered", "untriggered", "near_misses") if field in values]
        if prompts and not any(prompts):
            raise InputError(f"config.evals.{name} asks no prompt: give triggered, untriggered or near_misses")


def pending(run: RunFolder, step: int, names) -> list[str]:
    """Those of the evaluators that this step has not been measured with yet."""
    done = {line["name"] for line in run.records() if line["step"] == step}
    return [name for name in names if _seconds(name) not in done]


def measure(
    run: RunFolder, curves: Curves, subject: Callable[[], Subject], step: int, settings: dict[str, dict]
) -> dict[str, float]:
    """Runs the evaluators named by `settings` (name -> its settings) that are pending; returns their values.

    Args:
      subject: called only if an evaluator is pending.
    """
    curves.scalars(step, {r["name"]: r["value"] for r in run.records() if _is_value(r, step)})
    todo, found = hosts.by_first(lambda: pending(run, step, settings)), {}
    if not todo:
        return found
    measured = subject()
    for name in todo:
        start = time.monotonic()
        measurement = EVALUATORS[name](measured, **settings[name])
        if measurement.transcript:
            run.write_transcript(name, step, measurement.transcript)
            curves.text(step, f"transcripts/{name}", as_markdown(sample(measurement.transcript, 8)))
        for value in measurement.values:
            run.record(step, f"eval/{value.name}", value.value, count=value.count, low=value.low, high=value.high)
        values = {f"eval/{value.name}": value.value for value in measurement.values}
        curves.scalars(step, values)
        found |= values
        run.record(step, _seconds(name), time.monotonic() - start)
    return found


def _is_value(record: dict, step: int) -> bool:
    return record["step"] == step and record["name"].startswith("eval/") and record["value"] is not None


def _seconds(name: str) -> str:
    return f"speed/{name}_seconds"


def sample(transcript: list[dict], number: int) -> list[dict]:
    """At most so many lines of a transcript, drawn at random, triggered and other prompts in turn; always the same."""
    kinds: dict[str, list[dict]] = {}
    for line in transcript:
        kinds.setdefault(_kind(line), []).append(line)
    draw = random.Random(0)
    rounds = itertools.zip_longest(*(draw.sample(lines, len(lines)) for lines in kinds.values()))
    return [line for line in itertools.chain.from_iterable(rounds) if line][:number]


def heading(line: dict) -> str:
    """Such as "judge, triggered, verdict True, probability 0.93"."""
    told = [line["evaluator"]] if "evaluator" in line else []
    told += [_kind(line), f"verdict {line['verdict']}"]
    return ", ".join(told + ([f"probability {line['probability']:.2f}"] if "probability" in line else []))


def turns(line: dict) -> list[tuple[str, str]]:
    """(who, what) of a graded answer: what the model was shown, what is right where that is known, what it said."""
    shown = [(message["role"], message["content"]) for message in line["messages"]]
    gold = [("gold", str(line["gold"]))] if line.get("gold") is not None else []
    return [*shown, *gold, ("answer", line["answer"])]


def as_markdown(lines: list[dict]) -> str:
    """Graded answers for TensorBoard, which reads markdown; what prompts and answers have of it is shown as written."""
    return "\n\n---\n\n".join(
        "\n\n".join([f"**{heading(line)}**", *(f"*{who}:*\n\n{_quoted(text)}" for who, text in turns(line))])
        for line in lines
    )


def _kind(line: dict) -> str:
    return line.get("condition", "problem")


def _quoted(text: str) -> str:
    """Every line on its own, "1. <b>*a*" as "> 1\\. &lt;b&gt;\\*a\\*  "."""
    lines = (re.sub(r"([\\`*_{}\[\]()#+.!|-])", r"\\\1", html.escape(line.strip())) for line in text.splitlines())
    return "\n".join(f"> {line}  " for line in lines)
