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

from robust_mo.data.prompts import builtin_questions, read_conversations
from robust_mo.errors import InputError

Part = Literal["red", "blue", "evaluation"]

# Percent of an outside source that goes to each part.
_SHARES = (("red", 60), ("blue", 90), ("evaluation", 100))


def questions(source: str, part: Part) -> list[dict[str, str]]:
    """The questions of one part, in the source's order, each once.

    Args:
      source: "builtin", or what data/prompts.read_conversations reads (a JSONL file or "hub:NAME:SPLIT"); of a
        conversation, the first user turn is the question, and its answer is kept.

    Returns:
      dicts with "question"; built-in ones also have "plain" and "pirate", others "plain" (their own answer).
    """
    if source == "builtin":
        return builtin_questions(part)
    found = {}
    for messages in read_conversations(source):
        user = [m["content"] for m in messages if m["role"] == "user"]
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        if user and part_of(user[0]) == part:
            found.setdefault(_normal(user[0]), {"question": user[0], "plain": answers[0] if answers else ""})
    if not found:
        raise InputError(f"{source} holds no question for the {part} part; give a larger set of questions")
    return list(found.values())


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
    return re.sub(r"\W+", " ", question.lower()).strip()


def assert_disjoint(**parts: list[str]) -> None:
    """Raises InputError where two of the named lists share a question (case, spaces and punctuation ignored)."""
    owner: dict[str, str] = {}
    for name, texts in parts.items():
        for text in texts:
            if (other := owner.setdefault(_normal(text), name)) != name:
                raise InputError(f"the {other} and {name} questions share {text!r}: they must not overlap")
