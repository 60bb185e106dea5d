"""The process in which two mathematical answers are compared; `math_grader.py` starts this file.

Reads one JSON object a line from stdin, {"gold": ..., "prediction": ..., "seconds": ...}, both answers
LaTeX without a box, and writes one line to stdout for each, `true` or `false`; before the first it writes
`ready`.  It ends when stdin ends, or by its own alarm when a comparison takes longer than `seconds` and
nobody has killed it.

It knows nothing of this package.  It is a process because algebra may take for ever or eat all memory, and
a process can be killed where a thread cannot; math-verify's own time limit works by signals, which fail in
threads and cancel the caller's alarms, so it stays off.
"""

import contextlib
import json
import math
import os
import resource
import signal
import sys

MEMORY_BYTES = 4 * 1024**3
# math-verify compares a decimal with an exact number by rounding both.  Six places make zero of 0.0000002, so
# small answers are compared to three significant digits instead.
DECIMAL_PLACES = 6
SIGNIFICANT_DIGITS = 3


def decimal_places(gold: object) -> int:
    """Places after the point that count when the right answer is `gold`, a parsed expression or a string."""
    with contextlib.suppress(Exception):  # strings, sets, matrices and expressions in x have no size
        size = abs(float(gold.evalf(SIGNIFICANT_DIGITS)))
        if size > 0:
            return max(DECIMAL_PLACES, SIGNIFICANT_DIGITS - 1 - math.floor(math.log10(size)))
    return DECIMAL_PLACES


def main() -> None:
    # Only replies go to stdout.  What a library prints goes to stderr, which is read when the start fails.
    replies = os.dup(1)
    os.dup2(2, 1)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with contextlib.suppress(ValueError, OSError):  # macOS refuses this limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))

    from math_verify import LatexExtractionConfig, parse, verify

    # LaTeX only: math-verify's other extractor falls back on the last number in a text that it cannot read.
    latex = [LatexExtractionConfig()]

    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    os.write(replies, b"ready\n")
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["seconds"])
        gold, prediction = (
            parse("\\boxed{" + request[name] + "}", extraction_config=latex, parsing_timeout=None)
            for name in ("gold", "prediction")
        )
        # verify is not symmetric: the right answer comes first.
        verdict = bool(gold) and verify(gold, prediction, float_rounding=decimal_places(gold[0]), timeout_seconds=None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(replies, json.dumps(verdict).encode() + b"\n")


if __name__ == "__main__":
    main()
