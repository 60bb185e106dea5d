"""The same work done by us and by a peer, in turns, in one run: what every benchmark here is made of.

Each side runs in a process of its own, so that neither's threads, memory or caches stand in the other's way.  Medians
over the rounds are printed and kept under benchmarks/results/ with device, versions, revision and date.
"""

import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

RESULTS = pathlib.Path(__file__).parent / "results"
SIDES = ("ours", "theirs")


def compare(name: str, unit: str, rounds: int, agree: Callable[[dict, dict], None]) -> None:
    """Runs this program again with --side=ours and --side=theirs, `rounds` times each, and reports.

    Each of them prints, as its last line, the JSON of a dict that holds its "speed".

    Args:
      agree: called with the two dicts of a round; ends the process if the sides did not do the same work.
    """
    speeds: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(rounds):
        found = {side: _run(name, side) for side in SIDES}
        agree(found["ours"], found["theirs"])
        for side in SIDES:
            speeds[side].append(found[side]["speed"])
        print(f"round {number + 1}/{rounds}: " + ", ".join(f"{s} {v[-1]:.1f}" for s, v in speeds.items()), flush=True)
    medians = {side: statistics.median(values) for side, values in speeds.items()}
    ratio = medians["ours"] / medians["theirs"]
    for side, value in medians.items():
        print(f"{side:8} {value:8.1f} {unit}")
    print(f"ratio    {ratio:8.2f}")
    keep(name, {"unit": unit, "median": medians, "rounds": speeds, "ratio": ratio})


def _run(name: str, side: str) -> dict:
    # XLA_FLAGS as command_line.py sets them for every program of ours.
    environment = {**os.environ, "XLA_FLAGS": "--xla_cpu_prefer_vector_width=512"}
    command = [sys.executable, "-m", f"benchmarks.{name.partition('-')[0]}", *sys.argv[1:], f"--side={side}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.strip().splitlines()[-1])


def keep(name: str, figures: dict) -> None:
    """Writes `figures` as results/NAME.json beside command, device, versions, revision and date."""
    import torch

    from robust_mo.runs import git_revision, versions

    models = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    kept = {
        "benchmark": name,
        "command": " ".join(["python", "-m", f"benchmarks.{name.partition('-')[0]}", *sys.argv[1:]]),
        **figures,
        "device": f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores",
        "versions": {**versions(), "torch": torch.__version__},
        "revision": git_revision(),
        "date": time.strftime("%Y-%m-%d"),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
