"""From the start of a process to the end of its first training step: cold, warm, and transformers'.

    python -m benchmarks.start [--size=smol] [--lora] [--rounds=3]

What benchmarks/training.py trains: imports, weights from the page cache, compilation, one step.  "cold" begins with
nothing compiled before, "warm" finds the programs that "cold" left in jax's compilation cache; all must have the same
loss.  Writes
benchmarks/results/start[-SIZE][-lora].json.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time

import numpy as np

from benchmarks import sizes, training
from benchmarks.peers import keep, on_one_platform, result_name, run_side, tell
from benchmarks.sizes import SIZES

KINDS = ("cold", "warm", "theirs")
BATCH = "BENCHMARK_BATCH"  # the environment variable with the file of what is trained on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="smol")
    parser.add_argument("--lora", action="store_true", help=f"adapters of rank {training.RANK}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side is not None:
        side = training.theirs if args.side == "theirs" else training.ours
        batch = dict(np.load(os.environ[BATCH]))
        losses, *_ = side(args.size, [batch], args.lora, training.LEARNING_RATE)
        tell(args.side, {"loss": losses[0]})
        return

    if args.rounds < 1:
        parser.error("--rounds: give at least 1")
    name, found = result_name("start", args.size) + "-lora" * args.lora, {kind: [] for kind in KINDS}
    sizes.read_once(sizes.folder(args.size))  # and fetched or invented before the clock runs
    for number in range(args.rounds):
        told = {}
        with tempfile.TemporaryDirectory() as cache:
            # Made here, so that the peer need not import what makes it.
            file = f"{cache}/batch.npz"
            np.savez(file, **training.make_batches(args.size, "ours", packed=False)[0])
            for kind in KINDS:
                begun = time.perf_counter()
                told[kind] = run_side(name, kind, JAX_COMPILATION_CACHE_DIR=cache, **{BATCH: file})
                found[kind].append(time.perf_counter() - begun)
        platform, losses = on_one_platform(told), {kind: told[kind]["loss"] for kind in KINDS}
        if not np.allclose(list(losses.values()), losses["cold"], atol=training.TOLERANCES[SIZES[args.size].dtype]):
            sys.exit(f"the losses differ: {losses}")
        taken = ", ".join(f"{kind} {seconds[-1]:.1f} s" for kind, seconds in found.items())
        print(f"round {number + 1}/{args.rounds}: {taken}", flush=True)
    medians = {kind: statistics.median(taken) for kind, taken in found.items()}
    print("\n".join(f"{kind:8} {value:6.1f} s" for kind, value in medians.items()))
    keep(name, {"unit": "s", "median": medians, "rounds": found}, platform)


if __name__ == "__main__":
    main()
