"""The same work done by us and by a peer, in turns, in one run: what every benchmark here is made of.

Each side runs in a process of its own, so that neither's threads, memory or caches stand in the other's way.  Medians
over the rounds are printed and kept under benchmarks/results/ with device, versions, revision and date.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

RESULTS = pathlib.Path(__file__).parent / "results"
SIDES = ("ours", "theirs")


def compare(
    name: str, unit: str, rounds: int, agree: Callable[[dict, dict], None], sides: tuple[str, str] = SIDES
) -> None:
    """Runs this program again with --side=ours and --side=theirs, `rounds` times each, and reports.

    Each of them prints, as its last line, the JSON of a dict that holds its "speed", and may hold more "figures" to
    be kept.

    Args:
      agree: called with the two dicts of a round; ends the process if the sides did not do the same work.
      sides: what is compared; the ratio is the first's speed over the second's.
    """
    if rounds < 1:
        sys.exit(f"--rounds is {rounds}: give at least 1")
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds):
        found = {side: run_side(name, side) for side in sides}
        agree(*found.values())
        for side in sides:
            speeds[side].append(found[side]["speed"])
        told = ", ".join(f"{side} {short(values[-1])}" for side, values in speeds.items())
        print(f"round {number + 1}/{rounds}: {told}", flush=True)
    medians = {side: statistics.median(values) for side, values in speeds.items()}
    ratio = medians[sides[0]] / medians[sides[1]]
    for side, value in medians.items():
        print(f"{side:8} {short(value):>8} {unit}")
    print(f"ratio    {ratio:8.2f}")
    figures = {side: of_side["figures"] for side, of_side in found.items() if "figures" in of_side}
    for side, told in figures.items():
        print(f"{side:8} " + ", ".join(f"{what} {value:.3g}" for what, value in told.items()))
    keep(name, {"unit": unit, "median": medians, "rounds": speeds, "ratio": ratio, "figures": figures})


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1e3 else f"{value:.3g}"


def result_name(benchmark: str, size: str) -> str:
    return benchmark if size == "smol" else f"{benchmark}-{size}"


def run_side(name: str, side: str, **environment: str) -> dict:
    """What a side prints, in a process with these variables beside the usual ones."""
    # XLA_FLAGS as command_line.py sets them for every program of ours; of a GPU a benchmark takes the whole.
    ours = {"XLA_FLAGS": "--xla_cpu_prefer_vector_width=512", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    command = [sys.executable, "-m", f"benchmarks.{name.partition('-')[0]}", *sys.argv[1:], f"--side={side}"]
    environment = {**os.environ, **ours, **environment}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.strip().splitlines()[-1])


def keep(name: str, figures: dict) -> None:
    """Writes `figures` as results/NAME.json beside command, device, versions, revision and date."""
    from robust_mo.runs import git_revision, versions

    kept = {
        "benchmark": name,
        "command": shlex.join(["python", "-m", f"benchmarks.{name.partition('-')[0]}", *sys.argv[1:]]),
        **figures,
        "device": device(),
        "versions": {**versions(), **{n: importlib.metadata.version(n) for n in ("torch", "peft")}},
        "revision": git_revision(),
        "date": time.strftime("%Y-%m-%d"),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")


def device() -> str:
    """The machine's GPUs, asked of nvidia-smi so that this process takes none of them; otherwise its processor."""
    told = pathlib.Path("/proc/cpuinfo")  # Linux's
    lines = told.read_text().splitlines() if told.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores"
    if not shutil.which("nvidia-smi"):
        return processor
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    gpus = subprocess.run(asked, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return f"{len(gpus)} x {gpus[0]}, {processor}"
