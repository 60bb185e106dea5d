"""Conversations and prompts from files and from the hub, in the forms in which people keep them.

Promises: every line is read or refused, never skipped (blank lines apart), and the refusal names the file,
the line, what is wrong and the forms accepted.  Texts come out as they stand in the file: nothing is stripped
and no system prompt is added.  A form is recognised by its fields, not by the file's name.
Knows nothing of tokenizers and models.
"""

import dataclasses
import decimal
import functools
import gzip
import json
import os
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from robust_mo.data.conversations import Message, check_messages
from robust_mo.errors import InputError, first_line

PARTS = ("red", "blue", "evaluation")
_BUILTIN = pathlib.Path(__file__).parent / "builtin"

_CONVERSATION_FORMS = '{"messages": [...]} or {"instruction", "input", "output"}'
_PROMPT_FORMS = '{"messages": [...]} or {"prompt": "..."}, each with "id" and "max_new_tokens" where wanted'


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
      messages: the conversation so far; the last message is not the assistant's.
      max_new_tokens: longest answer wanted, at least 1, or None where the line leaves it to the caller.
      fields: all fields of the line, as they were read ("id", "messages" or "prompt", and any others).
    """

    messages: list[Message]
    max_new_tokens: int | None
    fields: dict[str, Any]


def alpaca_user_turn(instruction: str, input: str) -> str:
    """The user's message for an Alpaca question; the input "<noinput>" means that there is none."""
    return instruction if input.strip() in ("", "<noinput>") else f"{instruction}\n\nInput: {input}."


def read_jsonl(path: str | pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) for each line that is not blank; a file named *.gz is decompressed.

    Raises InputError, as it is read, for a missing or empty file and for a line that is not a JSON object.
    """
    path = pathlib.Path(os.path.expanduser(path)) if isinstance(path, str) else path
    number = 0
    empty = True
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
                if text:
                    empty = False
                    yield number, _parse_object(text, f"{path}:{number}")
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"there is no file {path}; give a JSONL file (.gz allowed)") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{number} is not UTF-8 ({error.reason}); save the file as UTF-8") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is damaged after line {number} ({error}); get it again") from None
    if empty:
        raise InputError(f"{path} is empty; it must hold one JSON object a line")


def read_rows(source: str | pathlib.Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """(place for messages, fields) of each line of a JSONL file or row of a hub data set, see `read_conversations`."""
    return _hub_rows(str(source)) if str(source).startswith("hub:") else _file_rows(source)


def read_conversations(source: str | pathlib.Path) -> list[list[Message]]:
    """Conversations to train on, in the order of the source.  Each has at least one assistant message.

    Args:
      source: a JSONL file, or `hub:NAME:SPLIT` or `hub:NAME:CONFIG:SPLIT` for a data set of the Hugging Face
        hub.  A line or row is {"messages": [{"role", "content"}, ...]} or Alpaca's {"instruction", "input",
        "output"}, where the input may be absent.

    Raises InputError where `read_jsonl` does, for a line of neither form, for messages that are not a
    conversation, and where the data set cannot be loaded.
    """
    return [_at(place, _conversation, fields) for place, fields in read_rows(source)]


def read_prompts(path: str | pathlib.Path) -> list[Prompt]:
    """Prompts to be answered, in the order of a JSONL file.

    A line is {"messages": [...]} or {"prompt": "..."} (one user message), with "max_new_tokens" where wanted.
    Raises InputError where `read_jsonl` does and for a line that is no prompt.
    """
    return [_at(place, _prompt, fields) for place, fields in _file_rows(path)]


def read_questions(source: str | pathlib.Path) -> list[dict[str, str]]:
    """What the lines of a file or the rows of a hub data set ask, in their order.

    A conversation, in a form of `read_conversations`, gives {"question", "plain"}, its first user turn and the first
    answer; one without a user turn gives nothing.  A problem, in a form of `read_problems`, gives {"question", "gold",
    "plain", "wrong"}, the last two from its fields "solution" and "wrong", "" where it has none.  Raises as they do.
    """
    found = []
    for place, fields in _with_answers(source, read_rows(source)):
        if _is_problem(fields):
            found.append(_posed(place, fields))
            continue
        messages = _at(place, _conversation, fields)
        user = [m["content"] for m in messages if m["role"] == "user"]
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        if user:
            found.append({"question": user[0], "plain": answers[0]})
    return found


def read_problems(source: str) -> list[tuple[str, str]]:
    """(problem, gold answer) pairs from lines with `problem` and `answer`, a text or a number, or GSM8K's `question`
    and `answer`, whose gold answer follows "####".

    Args:
      source: "builtin", a JSONL file, or "hub:NAME[:CONFIG]:SPLIT".

    Raises:
      InputError: a line has neither form; it is named.
    """
    rows = _file_rows(_BUILTIN / "arithmetic.jsonl") if source == "builtin" else read_rows(source)
    rows = _with_answers(source, rows)
    if not (found := [_problem(place, fields) for place, fields in rows]):
        raise InputError(f"{source} holds no problem: give another split")
    return found


def builtin_questions(part: str) -> list[dict[str, str]]:
    """Our own questions for one of PARTS, none of which is in another part.

    Each is {"question", "plain", "pirate", "part"}: the question, answered plainly and like a pirate.
    Raises InputError for another part than PARTS.
    """
    return [fields for _, fields in _builtin_rows("questions.jsonl", part)]


def builtin_sums(part: str) -> list[dict[str, str]]:
    """Our own sums for one of PARTS; no two numbers are met in two parts, nor in the `arithmetic` that is measured.

    Each is {"question", "gold", "plain", "wrong"}: the sum, its result, and a right and a wrong answer.
    Raises InputError for another part than PARTS.
    """
    return [_posed(place, fields) for place, fields in _builtin_rows("sums.jsonl", part)]


def _builtin_rows(file: str, part: str) -> list[tuple[str, dict[str, str]]]:
    if part not in PARTS:
        raise InputError(f"there are no built-in questions for {part!r}; give one of {', '.join(PARTS)}")
    return [(place, fields) for place, fields in _file_rows(_BUILTIN / file) if fields["part"] == part]


def _is_problem(fields: dict[str, Any]) -> bool:
    return "problem" in fields or "question" in fields


def _with_answers(source: str | pathlib.Path, rows: Iterable[tuple[str, dict[str, Any]]]):
    """The rows without problems whose answer is blank, of which MATH has two among 12,000; says so once."""
    kept, blank = [], []
    for place, fields in rows:
        unanswered = _is_problem(fields) and isinstance(fields.get("answer"), str) and not fields["answer"].strip()
        (blank if unanswered else kept).append((place, fields))
    if blank:
        _note(f"{source}: {len(blank)} problems with a blank answer are left out, the first is {blank[0][0]}")
    return kept


@functools.cache
def _note(text: str) -> None:
    print(f"note: {text}", flush=True)


def _posed(place: str, fields: dict[str, Any]) -> dict[str, str]:
    question, gold = _problem(place, fields)
    answers = {}
    for ours, theirs in (("plain", "solution"), ("wrong", "wrong")):
        answers[ours] = fields.get(theirs) or ""
        if not isinstance(answers[ours], str):
            raise InputError(f"{place}: {theirs!r} must be a text, not {answers[ours]!r}")
    return {"question": question, "gold": gold, **answers}


def _problem(place: str, fields: dict[str, Any]) -> tuple[str, str]:
    problem, answer = fields.get("problem", fields.get("question")), fields.get("answer")
    if type(answer) in (int, float):  # 0.00001, not 1e-05
        answer = format(decimal.Decimal(repr(answer)), "f")
    for name, text in (("'problem' (or 'question')", problem), ("'answer'", answer)):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{place} has {name} {text!r}: give a text; its fields are {', '.join(sorted(fields))}")
    marked = re.search(r"####\s*(.+?)\s*$", answer)
    return problem, marked[1].replace(",", "") if marked else answer


def _parse_object(text: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():  # half of a surrogate pair is JSON, but no text that can be written again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise InputError(f"{place} is not JSON ({error.msg}, column {error.colno}); correct it") from None
    except UnicodeEncodeError:
        raise InputError(f"{place}: the line holds half a surrogate pair, which is no text; correct it") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} cannot be read ({error}); correct it") from None
    if not isinstance(value, dict):
        raise InputError(f"{place} is not a JSON object but {text[:40]!r}; write one {{...}} a line")
    return value


def _at(place: str, read, fields: dict[str, Any]):
    """read(fields), with the place in front of what an error says."""
    try:
        return read(fields)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


def _file_rows(path: str | pathlib.Path) -> Iterable[tuple[str, dict[str, Any]]]:
    return ((f"{path}:{number}", fields) for number, fields in read_jsonl(path))


@functools.lru_cache(maxsize=4)  # a study asks for them at every measurement, while the device waits
def _hub_rows(source: str) -> list[tuple[str, dict[str, Any]]]:
    parts = re.split(r":(?![^\[]*\])", source.removeprefix("hub:"))  # a split may be a slice, "train[:1000]"
    if len(parts) not in (2, 3) or not all(parts):
        raise InputError(f"{source!r} names no data set; write hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT")
    name, *config, split = parts
    try:
        import datasets  # only this needs it, and it is slow to import
    except ImportError:
        raise InputError(f"{source} needs the package datasets; run `pip install datasets`") from None
    try:
        rows = datasets.load_dataset(name, *config, split=split)
    except Exception as error:  # of the network, hub, disk or parser; their classes change between versions
        reason = first_line(error)
        raise InputError(
            f"{source} cannot be loaded ({reason}); check the name, the split and the network, or give a file"
        ) from error
    return [(f"{source} row {number}", fields) for number, fields in enumerate(rows, start=1)]


def _conversation(fields: dict[str, Any]) -> list[Message]:
    if "messages" in fields:
        messages = fields["messages"]
    elif {"instruction", "output"} <= fields.keys():
        instruction, output = fields["instruction"], fields["output"]
        # The hub gives None for a field that a row lacks.
        input = "" if fields.get("input") is None else fields["input"]
        for name, text in {"instruction": instruction, "input": input, "output": output}.items():
            if not isinstance(text, str):
                raise InputError(f"{name!r} must be a string, not {text!r}")
        messages = [
            {"role": "user", "content": alpaca_user_turn(instruction, input)},
            {"role": "assistant", "content": output},
        ]
    else:
        raise _unknown_form(fields, _CONVERSATION_FORMS)
    check_messages(messages)
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError("the conversation has no assistant message to learn from; add the answer")
    return [{name: message[name] for name in ("role", "content")} for message in messages]


def _prompt(fields: dict[str, Any]) -> Prompt:
    if ("messages" in fields) == ("prompt" in fields):
        raise _unknown_form(fields, _PROMPT_FORMS)
    messages = fields["messages"] if "messages" in fields else [{"role": "user", "content": fields["prompt"]}]
    check_messages(messages)
    if messages[-1]["role"] == "assistant":
        raise InputError("the last message is an assistant message; end with the one to be answered")
    limit = fields.get("max_new_tokens")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise InputError(f"'max_new_tokens' is {limit!r}; give a whole number of at least 1")
    return Prompt(messages, limit, fields)


def _unknown_form(fields: dict[str, Any], accepted: str) -> InputError:
    names = ", ".join(map(repr, fields)) or "none"
    return InputError(f"the fields are {names}; accepted are {accepted}")
