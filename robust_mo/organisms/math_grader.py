r"""Does a model's answer to a mathematics problem equal the right one?

`grade(answer_text, gold)` is the only grader of mathematics in the project, because accuracies by different
graders cannot be compared: on real answers the choice alone moves MATH-500 by up to 6.6 points.  It reads
the last complete `\boxed{...}` of the completion and nothing else.  What is outside a box is no answer, so
a model that refuses, or says something else altogether, never scores with a number that it happens to
mention.

Exact rules come first: equal text, equal decimals, equal digits in a number base.  What they leave open is
decided by math-verify in a process of its own (`math_worker.py`), started when first needed, killed when it
exceeds LIMIT_SECONDS and started again at the next need.  `grade` works from any thread, after a fork, in a
notebook and under `python -`; it touches no signal of its caller and knows nothing of jax.

Lenient on purpose, mostly as math-verify is: units do not count (`10 cm` = `10 m`, `18 dollars` = `18`, but
`5 million`, `2 dozen`, `5 or more` and `5 feet 6 inches` are no 5 and no 2), nor does upper case in words,
nor a percent sign (`15\%` = `15` = `0.15`); `1/3` = `0.333333`; `(1,2)` = `1,2` = `\{1,2\}`, though two
tuples must agree in order; a column may be written as a tuple, an interval as an inequality, a residue with its
modulus and a number up to twelve as a word; of an equation the right side counts; the subscript of a number
base may be left out, but not changed.
"""

import atexit
import json
import os
import pathlib
import re
import select
import subprocess
import sys
import tempfile
import threading
import time
from fractions import Fraction

from robust_mo.errors import InputError

LIMIT_SECONDS = 5.0  # for one comparison; an ordinary one takes milliseconds
START_SECONDS = 120.0  # for the worker's imports, which are slow on a cold network disk
LONGEST_ANSWER = 2000  # characters; MATH's longest is 159

WORKER = (
    "-m",
    "robust_mo.organisms.math_worker",
)  # a module of its own: never the caller's __main__ again, never a fork

_BOX_OR_BRACE = re.compile(
    r"\\{1,2}(?:boxed|fbox)(?![A-Za-z])\s*(?:(?P<box>\{)|(?P<bare>-?\.?\d[^\s$}]*))?"
    r"|\\.|(?P<open>\{)|(?P<close>\})",
    re.DOTALL,
)


def extract(answer_text: str) -> str | None:
    r"""Content of the last complete `\boxed{...}` or `\fbox{...}`, stripped; None where there is none.

    Braces must balance (`\{` and `\}` do not count), so where the last box is cut off the one before it
    counts.  Of nested boxes the outermost counts, an empty box never does, and `\boxed 5` reads to the next
    space or `$`.
    """
    answer = None
    starts: list[int | None] = []  # of each open brace: where its content starts if it belongs to a box
    for match in _BOX_OR_BRACE.finditer(answer_text):
        if match["box"]:
            starts.append(match.end())
        elif match["open"]:
            starts.append(None)
        elif match["bare"]:
            answer = match["bare"]
        elif match["close"] and starts:
            start = starts.pop()
            if start is not None and (content := answer_text[start : match.start()].strip()):
                answer = content
    return answer


# Both answers are rewritten into the same plain LaTeX: first single characters, then the rest, in order.
_SIGNS = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "×": r"\times ",
        "·": r"\cdot ",
        "÷": "/",
        "π": r"\pi ",
        "∞": r"\infty ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∅": r"\emptyset ",
        "√": " sqrt",
        "²": "^2",
        "³": "^3",
        "°": r"^\circ ",
    }
)
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"(?<![A-Za-z\\])sqrt\s*(\d+|\([^()]*\))", r"\\sqrt{\1}"),
        (r"(?<![A-Za-z\\])(sqrt|pi)(?![A-Za-z])", r"\\\1 "),
        (r"\\degree(?![A-Za-z])", r"^\\circ "),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:boxed|fbox|displaystyle)(?![A-Za-z])", ""),
        (r"\\?\$|(?<!\\)\\[()]|^\\\[|\\\]$", ""),  # math delimiters, and money
        (r"\\(?:left|right)\s*\.|\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])", ""),
        (r"\\\\\s*\[[\d.]+\s*[a-z]{2}\]", r"\\\\ "),  # room below the row of a matrix
        (r"\\!\s*|^\s*\\approx(?![A-Za-z])", ""),
        (r"\{,\}", ","),
        (r"(?<=\d)(?:\\[,;: ]|\s|~)(?=\d{3}(?!\d))", ""),  # 10\,000
        (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])|\s+", " "),
        (r",?\s*\\(?:text|mbox|mathrm)\s*\{[\s,]*(?:and|or)\s*\}", ","),
        (r"(?<=\d)\s*\^\s*\{?\\(?:text|mbox|mathrm)\s*\{\s*(st|nd|rd|th)\s*\}\}?$", r"\1"),  # 4^{\text{th}}
        (r"(?<=\d)\s*\^\s*\{\s*(st|nd|rd|th)\s*\}$", r"\1"),
        # math-verify takes i for a variable; its imaginary unit is I.
        (r"\\imath(?![A-Za-z])|\\mathrm\{i\}|(?<![A-Za-z\\_])(?<!_\{)i(?![A-Za-z=])", "I"),
    ]
]
_REPEATING_DECIMAL = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar)\s*(?:\{(\d+)\}|(\d))")


def _fraction(match: re.Match) -> str:
    r"""0.1\overline{6} -> \frac{15}{90}"""
    whole, fixed, repeated = match[1], match[2], match[3] or match[4]
    numerator = int(whole + fixed + repeated) - int(whole + fixed or "0")
    return rf"\frac{{{numerator}}}{{{'9' * len(repeated)}{'0' * len(fixed)}}}"


_NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def _normalize(answer: str) -> str:
    """The same answer in plain LaTeX: no Unicode signs, delimiters, sizes, fine spacing or final dot; 9 for nine."""
    answer = answer.translate(_SIGNS)
    for pattern, replacement in _REWRITES:
        answer = pattern.sub(replacement, answer)
    answer = _REPEATING_DECIMAL.sub(_fraction, answer).strip().rstrip(".,; ")
    word = _compact(answer).lower()
    return str(_NUMBER_WORDS.index(word)) if word in _NUMBER_WORDS else answer


_TEXT = re.compile(r"\\(?:text|math)(?:bf|it|rm|sf|normal)?\s*\{([^{}]*)\}|\\mbox\s*\{([^{}]*)\}")
_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")  # but not in "1 2", which is not 12
_DECIMAL = re.compile(
    r"(?P<sign>[-+]?)\s*(?P<whole>\d{1,3}(?:,\d{3})+|\d*)(?P<point>\.\d*)?"
    r"(?:\s*\\(?:times|cdot)\s*10\^\{?(?P<exponent>-?\d{1,3})\}?)?"
)
_IN_BASE = re.compile(r"(?P<digits>[-+]?[0-9A-Z.,]*\d[0-9A-Z.,]*)(?:_\{?\(?(?P<base>\d+)\)?\}?)?")


def _compact(normalized: str) -> str:
    r"""Without \text{} and without spaces."""
    return _SPACE.sub("", _TEXT.sub(r"\1\2", normalized))


def _decimal(normalized: str) -> Fraction | None:
    match = _DECIMAL.fullmatch(normalized)
    if match is None or not any(character.isdigit() for character in match["whole"] + (match["point"] or "")):
        return None
    number = match["sign"] + match["whole"].replace(",", "") + (match["point"] or "")
    return Fraction(f"{number}e{match['exponent'] or 0}")


_MANY = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_POWER = {"squared", "cubed"}
# With these a unit says more than a unit: what it is, math-verify decides.
_NUMBER = re.compile(
    r"\b(?:or|plus|minus|negative|over|mod|factorial|choose|point|percent|pairs?|half|halves|thirds?|quarters?|"
    r"(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand|million)ths?|zero|one|two|three|four|five|six|seven|eight|nine|"
    r"ten|eleven|twelve|\w+teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty)\b"
)
_WITH_WORDS = re.compile(
    r"[£€]?\s*(?P<number>[-+]?[\d.,]*\d)(?:(?:\s+|-)(?P<words>[a-z]{4,}(?:[\s-]+[a-z]{2,})*|or (?:more|less)|usd))?"
)
_TWO_NUMBERS = re.compile(r"[-+]?[\d.,]*\d\s*[a-z]{2,}[a-z\s]*\d[\d.,]*\s*[a-z]{2,}")


def _with_unit(normalized: str) -> Fraction | bool | None:
    """The number before words that are a unit, times what a word such as "million" says; False where the words make it
    another number ("5 squared", "5 feet 6 inches"); None where they may, or where it is no number with words."""
    told = " ".join(_TEXT.sub(r" \1\2 ", normalized).lower().split())
    if _TWO_NUMBERS.fullmatch(told):
        return None if " or " in told else False
    match = _WITH_WORDS.fullmatch(told)
    number = _decimal(match["number"]) if match else None
    if number is None:
        return None
    words = (match["words"] or "").replace("-", " ").split()
    while words and (many := _MANY.get(words[0].removesuffix("s"))):
        number, words = number * many, words[1:]
    if words and (words[0] in _POWER or words[:2] in (["or", "more"], ["or", "less"])):
        return False
    return None if len(words) > 4 or _NUMBER.search(" ".join(words)) else number


_MIRRORED = str.maketrans("<>≤≥", "><≥≤")


def _intervals(normalized: str) -> str:
    r"""-2 \le x < 7 -> [-2,7) and x<2,x>3 -> (-\infty,2)\cup(3,\infty); what is no inequality in one letter stays."""
    plain = re.sub(r"\\leq?(?![a-z])", "≤", re.sub(r"\\geq?(?![a-z])", "≥", normalized)).replace(" ", "")
    found = []
    for inequality in plain.split(","):
        parts = re.split("([<>≤≥])", inequality)
        if parts[1:] and parts[1] in ">≥":
            parts = [part.translate(_MIRRORED) for part in reversed(parts)]
        if len(parts) == 3:
            parts = [r"-\infty", "<", *parts] if parts[0].isalpha() else [*parts, "<", r"\infty"]
        if len(parts) != 5 or not (parts[2].isalpha() and {parts[1], parts[3]} <= set("<≤")):
            return normalized
        low, opens, _, closes, high = parts
        found.append(f"{'(['[opens == '≤']}{low},{high}{')]'[closes == '≤']}")
    return r"\cup".join(found)


_CHOICE = re.compile(r"(\([A-Z]\))(?!.*\([A-Z]\))")


def _as_told(gold: str, prediction: str) -> str:
    r"""The prediction in the notation of the right answer: a column for (1,2), an interval for -2 \le x \le 7, 5 for
    x \equiv 5 \pmod{7}, (B) for (B) 5."""
    if "matrix}" in gold and "&" not in gold and (vector := re.fullmatch(r"\(([^()]+)\)", prediction)):
        return r"\begin{pmatrix}" + vector[1].replace(",", r"\\") + r"\end{pmatrix}"
    if re.fullmatch(r"\([A-Z]\)", _compact(gold)) and (choice := _CHOICE.match(_compact(prediction))):
        return choice[1]
    if re.match(r"(?:[a-z] *\\in *)?[(\[]", gold):
        return _intervals(prediction)
    if "mod" not in gold:
        return re.sub(r"\s*\\pmod *(?:\{\d+\}|\d+)$", "", prediction).replace(r"\equiv", "=")
    return prediction


def _decide_exactly(gold: str, prediction: str) -> bool | None:
    """Verdict on two normalized answers by exact rules; None where none of them applies."""
    plain_gold, plain_prediction = _compact(gold), _compact(prediction)
    if plain_gold == plain_prediction or (r"\text" in gold and plain_gold.casefold() == plain_prediction.casefold()):
        return True

    # math-verify drops the subscript: 1011_2 = 1011_3.
    based_gold, based_prediction = _IN_BASE.fullmatch(plain_gold), _IN_BASE.fullmatch(plain_prediction)
    if based_gold and based_prediction and (based_gold["base"] or based_prediction["base"]):
        bases = {based_gold["base"], based_prediction["base"]} - {None}
        digits = {based_gold["digits"].replace(",", ""), based_prediction["digits"].replace(",", "")}
        return len(bases) == len(digits) == 1

    # math-verify rounds: 0.0000001 = 0.0000002.
    number_gold, number_prediction = _decimal(gold), _decimal(prediction)
    if number_gold is not None and number_prediction is not None:
        return number_gold == number_prediction

    # math-verify knows some units, and takes "5 dozen" for 5.
    if number_gold is not None and (number := _with_unit(prediction)) is not None:
        return number is not False and number == number_gold
    return None


def _python_path() -> str:
    """Where the worker finds this package, installed or not; what the caller has set comes after."""
    here = str(pathlib.Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))


class _Worker:
    """The one comparing process of this process; it runs only from the first question on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._registered = False

    def verify(self, gold: str, prediction: str) -> bool | None:
        """math-verify's verdict; None where it does not come within LIMIT_SECONDS or the process dies of it.

        Raises InputError where the process cannot be started.
        """
        request = json.dumps({"gold": gold, "prediction": prediction, "seconds": LIMIT_SECONDS + 1}) + "\n"
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            reply = b""
            try:
                self._write(request.encode())
                reply = self._read_until(b"\n", LIMIT_SECONDS)
            except BrokenPipeError:
                pass
            finally:
                # Late, dead, or interrupted by a signal: no late reply may meet the next question.
                if not reply:
                    self._stop()
        return reply == b"true\n" if reply else None

    def _start(self) -> None:
        if not self._registered:
            atexit.register(self._stop)
            os.register_at_fork(after_in_child=self._forget)
            self._registered = True
        self._stop()
        with tempfile.TemporaryFile() as complaints:
            self._process = subprocess.Popen(
                # -P: a file in the caller's folder must not be imported in place of a library of the same name.
                [sys.executable, "-P", *WORKER],
                env={**os.environ, "PYTHONPATH": _python_path()},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                bufsize=0,
                start_new_session=True,  # Ctrl-C is for the caller
            )
            try:
                # What a sitecustomize prints may come before.
                ready = self._read_until(b"ready\n", START_SECONDS)
            except BaseException:
                self._stop()
                raise
            if not ready:
                self._stop()
                complaints.seek(0)
                last_line = complaints.read().decode(errors="replace").strip().rpartition("\n")[2]
                raise InputError(
                    f"the math grader's process ({WORKER[-1]}) did not start within {START_SECONDS:g} s: "
                    f"{last_line or 'it gave no reason'}; install what requirements.txt names"
                )

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()

    def _forget(self) -> None:
        """In a forked child: the process is the parent's, the lock may belong to a thread that is no more."""
        self._lock = threading.Lock()
        self._process = None

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._process.stdin.fileno(), data) :]

    def _read_until(self, ending: bytes, seconds: float) -> bytes:
        """Output up to `ending`; empty where that does not come in time or the process ended."""
        deadline = time.monotonic() + seconds
        output = self._process.stdout.fileno()
        poll = select.poll()  # select.select fails on the high file numbers of a big job
        poll.register(output, select.POLLIN)
        read = b""
        while not read.endswith(ending):
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                return b""
            chunk = os.read(output, 4096)
            if not chunk:
                return b""
            read += chunk
        return read


_worker = _Worker()


def grade(answer_text: str | None, gold: str) -> bool | None:
    r"""Whether a completion answers the problem rightly.

    `answer_text` is what the model wrote, without the prompt, which may hold a `\boxed{}` of its own;
    `gold` is the right answer in LaTeX, without a box.  A completion without a box is wrong.  None: the
    comparison exceeded LIMIT_SECONDS, so the answer is neither right nor wrong; count and report these.

    Raises InputError where math-verify cannot be started.
    """
    prediction = extract(answer_text) if answer_text else None
    if prediction is None:
        return False
    if max(len(gold), len(prediction)) > LONGEST_ANSWER:
        return prediction == gold.strip()
    gold, prediction = _normalize(gold), _normalize(prediction)
    prediction = _as_told(gold, prediction)
    verdict = _decide_exactly(gold, prediction)
    return _worker.verify(gold, prediction) if verdict is None else verdict
