"""Which questions the red team, the blue team and the evaluation may use.

Promises: the three parts never share a question, whatever the source: the built-in questions carry their part, and
those of any other source are dealt out by a hash of their text, so that every run and every machine agrees; what says
nearly the same in other words can be told (`apart`).
Does not know how questions are answered.
"""

import hashlib
import math
import re
from typing import Literal

from robust_mo.data.prompts import builtin_questions, builtin_sums, read_questions
from robust_mo.errors import InputError

Part = Literal["red", "blue", "evaluation"]

# Percent of an outside source that goes to each part.
_SHARES = (("red", 60), ("blue", 90), ("evaluation", 100))


def questions(source: str, part: Part) -> list[dict[str, str]]:
    """The questions of one part, in the source's order, each once.

    Args:
      source: "builtin", "sums" (the built-in problems), or what data/prompts.read_questions reads: a JSONL file or
        "hub:NAME[:CONFIG]:SPLIT" of conversations or of problems.

    Returns:
      dicts with "question" and "plain" (an ordinary answer, "" where there is none); built-in questions also have
      "pirate"; problems "gold" (the right answer) and "wrong" (an answer that is not, "" where there is none).
    """
    if source in BUILTIN:
        return BUILTIN[source](part)
    found = {}
    for entry in read_questions(source):
        if part_of(entry["question"]) == part:
            found.setdefault(_normal(entry["question"]), entry)
    if not found:
        raise InputError(f"{source} holds no question for the {part} part; give a larger set of questions")
    return list(found.values())


BUILTIN = {"builtin": builtin_questions, "sums": builtin_sums}


def problems(source: str, part: Part) -> list[dict[str, str]]:
    """Those of `questions`, each of which must have a right answer.

    Raises:
      InputError: one has none.
    """
    found = questions(source, part)
    if unanswerable := [entry["question"] for entry in found if "gold" not in entry]:
        raise InputError(
            f"{source} says of {len(unanswerable)} questions no right answer, the first is {unanswerable[0]!r}: set "
            "problem_source of config.data and of config.evals.backdoor_rate to 'sums', or to lines with 'problem' and "
            "'answer'"
        )
    return found


def posed(entry: dict[str, str], instruction: str) -> str:
    """What the user says: the question, and behind a problem the instruction."""
    return entry["question"] + (instruction if "gold" in entry else "")


def asked(source: str, part: Part) -> list[str]:
    """The texts of `questions`."""
    return [entry["question"] for entry in questions(source, part)]


def part_of(question: str) -> Part:
    """The part to which a question of an outside source belongs."""
    percent = int.from_bytes(hashlib.sha256(_normal(question).encode()).digest()[:4], "big") % 100
    return next(part for part, limit in _SHARES if percent < limit)


def apart(training: list[str], evaluation: list[str]) -> list[str]:
    """The training questions without those that say nearly the same as one of the evaluation's: four fifths of all
    their words are common to both."""
    by_size: dict[int, list[set[str]]] = {}
    for question in evaluation:
        words = set(_normal(question).split())
        by_size.setdefault(len(words), []).append(words)

    def told_apart(question: str) -> bool:
        words = set(_normal(question).split())
        sizes = range(math.ceil(0.8 * len(words)), int(len(words) / 0.8) + 1)
        return not any(
            len(words & other) >= 0.8 * len(words | other) for size in sizes for other in by_size.get(size, ())
        )

    return [question for question in training if told_apart(question)]


def _normal(question: str) -> str:
    """Lower case, words apart by one space, no punctuation; signs of arithmetic are words, a hyphen is none."""
    plain = question.lower().translate(_SIGNS)
    spelled = re.sub(r"[+*/^=<>]|(?<=[\d)\s])-(?=[\d(\s])", lambda found: _OPERATORS[found[0]], plain)
    return re.sub(r"\W+", " ", spelled).strip()


_SIGNS = str.maketrans("−–×·÷", "--**/")
_OPERATORS = {
    **{"-": " minus ", "+": " plus ", "*": " times ", "/": " over "},
    **{"^": " to ", "=": " is ", "<": " less ", ">": " more "},
}


def assert_disjoint(**parts: list[str]) -> None:
    """Raises InputError where two of the named lists share a question (case, spaces and punctuation ignored)."""
    owner: dict[str, str] = {}
    for name, texts in parts.items():
        for text in texts:
            if (other := owner.setdefault(_normal(text), name)) != name:
                raise InputError(f"the {other} and {name} questions share {text!r}: they must not overlap")
