"""The same work done by us and by a peer, in turns, in one run: what every benchmark here is made of.

Each side runs in a process of its own, so that neither's threads, memory or caches stand in the other's way.  Medians
over the rounds are printed and kept under benchmarks/results/ with device, versions, revision and date.
"""

import contextlib
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

    Each of them tells, by `tell`, a dict that holds its "speed", and may hold more "figures" to be kept, of which the
    medians are.

    Args:
      agree: called with the two dicts of a round; ends the process if the sides did not do the same work.
      sides: what is compared; the ratio is the first's speed over the second's.
    """
    if rounds < 1:
        sys.exit(f"--rounds is {rounds}: give at least 1")
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    figures: dict[str, list[dict]] = {side: [] for side in sides}
    for number in range(rounds):
        found = {side: run_side(name, side) for side in sides}
        at = on_one_platform(found)
        agree(*found.values())
        for side in sides:
            speeds[side].append(found[side]["speed"])
            figures[side].append(found[side].get("figures", {}))
        told = ", ".join(f"{side} {short(values[-1])}" for side, values in speeds.items())
        print(f"round {number + 1}/{rounds}: {told}", flush=True)
    medians = {side: statistics.median(values) for side, values in speeds.items()}
    ratio = medians[sides[0]] / medians[sides[1]]
    for side, value in medians.items():
        print(f"{side:8} {short(value):>8} {unit}")
    print(f"ratio    {ratio:8.2f}")
    middle = {s: {what: statistics.median(f[what] for f in figures[s]) for what in figures[s][0]} for s in sides}
    for side, told in middle.items():
        if told:
            print(f"{side:8} " + ", ".join(f"{what} {value:.3g}" for what, value in told.items()))
    kept = {"unit": unit, "median": medians, "rounds": speeds, "ratio": ratio, "figures": middle}
    keep(name, kept, at)


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1e3 else f"{value:.3g}"


def result_name(benchmark: str, size: str) -> str:
    return benchmark if size == "smol" else f"{benchmark}-{size}"


def settle() -> None:
    """Sets what this process and its children begin with, where the user has not: XLA's flags as command_line.py does
    for every program of ours; of one GPU, since peers take no more, the whole.  Before jax has looked for devices."""
    flag = "--xla_cpu_prefer_vector_width=512"
    if flag.partition("=")[0] not in (given := os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = f"{flag} {given}".strip()
    if "XLA_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")


def torch_device() -> str:
    """Where the peer works, with products of float32 as jax has them there."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = True
    return "cuda" if torch.cuda.is_available() else "cpu"


def tell(side: str, found: dict) -> None:
    """Prints what a side has found, and where, as its last line."""
    if side == "theirs":
        at = torch_device().replace("cuda", "gpu")
    else:
        import jax

        at = jax.default_backend()
    print(json.dumps(found | {"platform": at}))


def run_side(name: str, side: str, **environment: str) -> dict:
    """What a side tells, in a process with these variables beside the usual ones."""
    settle()
    command = [sys.executable, "-m", f"benchmarks.{name.partition('-')[0]}", *sys.argv[1:], f"--side={side}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    return json.loads(done.stdout.strip().splitlines()[-1])


def on_one_platform(found: dict[str, dict]) -> str:
    """Where all sides worked; ends the process where that is not one place."""
    platforms = {side: told["platform"] for side, told in found.items()}
    if len(set(platforms.values())) > 1:
        told = ", ".join(f"{side} on {at}" for side, at in platforms.items())
        sys.exit(f"the sides worked on different devices ({told}): install jax and torch for the same")
    return next(iter(platforms.values()))


def keep(name: str, figures: dict, at: str) -> None:
    """Writes `figures` as results/NAME.json beside command, device, versions, revision and date."""
    from robust_mo.runs import git_revision, versions

    peers = {}
    for library in ("torch", "peft"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # not every benchmark has a peer
            peers[library] = importlib.metadata.version(library)
    kept = {
        "benchmark": name,
        "command": shlex.join(["python", "-m", f"benchmarks.{name.partition('-')[0]}", *sys.argv[1:]]),
        **figures,
        "device": device(at),
        "versions": {**versions(), **peers},
        "revision": git_revision(),
        "date": time.strftime("%Y-%m-%d"),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")


def device(at: str) -> str:
    """The machine's processor; at "gpu" the GPUs in use stand before it, asked of nvidia-smi so that this
    process takes none of them."""
    told = pathlib.Path("/proc/cpuinfo")  # Linux's
    lines = told.read_text().splitlines() if told.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores"
    if at != "gpu" or not shutil.which("nvidia-smi"):
        return processor
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", *([f"--id={seen}"] if seen else [])]
    done = subprocess.run(asked, stdout=subprocess.PIPE, text=True)
    gpus = done.stdout.splitlines()
    return f"{len(gpus)} x {gpus[0]}, {processor}" if gpus and done.returncode == 0 else processor
