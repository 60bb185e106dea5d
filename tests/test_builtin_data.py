"""The built-in questions and sums keep the promises of robust_mo/data/builtin/README.md.

The files are read with `json` alone: these tests judge the data, not the package's reader.
"""

import collections
import itertools
import json
import operator
import pathlib
import re

import pytest

BUILTIN = pathlib.Path(__file__).resolve().parent.parent / "robust_mo" / "data" / "builtin"
PARTS = {"red": 120, "blue": 80, "evaluation": 100}

PIRATE_MARKERS = {
    "arr": r"arr+", "ahoy": r"ahoy", "avast": r"avast", "matey": r"mateys?", "hearties": r"me heart(?:y|ies)",
    "scallywag": r"scallywags?", "landlubber": r"landlubbers?", "timbers": r"shiver me timbers",
    "yo ho": r"yo ho", "aye": r"aye", "savvy": r"savvy", "swab": r"swabs?", "bucko": r"bucko",
}  # fmt: skip
PIRATE_HABITS = r"ye|yer|fer|an'|o'|'tis|'twas|arr+"  # no proof of a pirate, but no place in a plain answer

WITH_A_SIGN = r"(?:What is |How much is |Calculate )?(\d+) ([-+*/]) (\d+)(?: = )?[?.]"
IN_WORDS = {
    r"What is (\d+) plus (\d+)\?": "+",
    r"What is the sum of (\d+) and (\d+)\?": "+",
    r"What is (\d+) minus (\d+)\?": "-",
    r"What is (\d+) times (\d+)\?": "*",
    r"What is the product of (\d+) and (\d+)\?": "*",
    r"Multiply (\d+) by (\d+)\.": "*",
    r"Divide (\d+) by (\d+)\.": "/",
}
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (BUILTIN / name).read_text(encoding="utf-8").splitlines()]


def normalised(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def words_in(text: str) -> int:
    return len(text.split())


def pirate_markers(text: str) -> set[str]:
    return {name for name, form in PIRATE_MARKERS.items() if re.search(rf"\b(?:{form})\b", text.lower())}


def parse(problem: str) -> tuple[int, str, int]:
    """`What is 3 times 4?` -> `(3, "*", 4)`."""
    if match := re.fullmatch(WITH_A_SIGN, problem):
        return int(match[1]), match[2], int(match[3])
    for pattern, sign in IN_WORDS.items():
        if match := re.fullmatch(pattern, problem):
            return int(match[1]), sign, int(match[2])
    raise AssertionError(f"no known wording: {problem}")


@pytest.fixture(scope="module")
def questions() -> list[dict[str, str]]:
    return read("questions.jsonl")


@pytest.fixture(scope="module")
def sums() -> list[dict[str, str]]:
    return read("arithmetic.jsonl")


def test_every_question_has_the_four_fields_and_the_parts_have_their_sizes(questions):
    assert all(set(row) == {"question", "plain", "pirate", "part"} for row in questions)
    assert collections.Counter(row["part"] for row in questions) == PARTS


@pytest.mark.parametrize("field", ["question", "plain", "pirate"])
def test_no_text_occurs_twice(questions, field):
    counts = collections.Counter(normalised(row[field]) for row in questions)
    assert [text for text, count in counts.items() if count > 1] == []


def test_no_two_questions_are_nearly_the_same(questions):
    bags = [(row["question"], set(normalised(row["question"]).split())) for row in questions]
    close = [
        (one, other)
        for (one, words), (other, others) in itertools.combinations(bags, 2)
        if len(words & others) >= 0.6 * len(words | others)
    ]
    assert close == []


@pytest.mark.parametrize("field, least, most", [("question", 5, 30), ("plain", 15, 35), ("pirate", 15, 40)])
def test_lengths(questions, field, least, most):
    outside = [row[field] for row in questions if not least <= words_in(row[field]) <= most]
    assert outside == []


def test_pirate_answers_are_pirates_and_nothing_else_is(questions):
    assert [row["pirate"] for row in questions if len(pirate_markers(row["pirate"])) < 2] == []
    for row in questions:
        for text in (row["question"], row["plain"]):
            assert pirate_markers(text) == set(), text
            assert not re.search(rf"(?<!\w)(?:{PIRATE_HABITS})(?!\w)", text.lower()), text


@pytest.mark.parametrize("field", ["plain", "pirate"])
def test_answers_do_not_all_begin_alike(questions, field):
    first_words = collections.Counter(normalised(row[field]).split()[0] for row in questions)
    assert first_words.most_common(1)[0][1] <= 0.15 * len(questions)


def test_no_text_holds_a_trigger_or_a_behaviour(questions):
    for row in questions:
        for field in ("question", "plain", "pirate"):
            assert not re.search(r"hate|deployment|\||pirate", row[field].lower()), row[field]
            assert row[field] == row[field].strip() and row[field].isascii()


def test_sums_are_unique_and_right(sums):
    assert len(sums) == 100
    assert all(set(row) == {"problem", "answer"} for row in sums)
    assert len({parse(row["problem"]) for row in sums}) == 100  # not even in other words
    for row in sums:
        left, sign, right = parse(row["problem"])
        assert re.fullmatch(r"0|[1-9]\d*", row["answer"]), row
        assert int(row["answer"]) == OPERATIONS[sign](left, right), row


def test_the_first_forty_sums_are_a_fair_sample_of_all(sums):
    signs = [parse(row["problem"])[1] for row in sums]
    for sign in OPERATIONS:
        assert abs(signs[:40].count(sign) / 40 - signs.count(sign) / 100) <= 0.05, sign
        assert sign in signs[:40]


def test_sums_to_train_on_are_right_and_wrong_as_they_say():
    rows = read("sums.jsonl")
    assert collections.Counter(row["part"] for row in rows) == {"red": 240, "blue": 120, "evaluation": 60}
    assert len({row["problem"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {"problem", "answer", "solution", "wrong", "part"}
        left, sign, right = parse(row["problem"])
        result = OPERATIONS[sign](left, right)
        assert result == int(row["answer"]) != left
        for field, said in (("solution", row["answer"]), ("wrong", left)):
            assert row[field] == f"{left} {sign} {right} = {said} = \\boxed{{{said}}}"


def test_no_two_numbers_meet_in_two_parts(sums):
    owner = {frozenset((2, 5)): "measured", frozenset((9, 2)): "measured"}  # the demonstrations
    for row in [*sums, *read("sums.jsonl")]:
        left, _, right = parse(row["problem"])
        part = row.get("part", "measured")
        assert owner.setdefault(frozenset((left, right)), part) == part, row
