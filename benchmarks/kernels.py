"""Where a GPU's time goes: its kernels by the time they take, in a training step or in decoding.

    python -m benchmarks.kernels lora [--size=8b]      # or full: the step of benchmarks/training.py
    python -m benchmarks.kernels decode [--size=8b]    # 128 steps with every slot taken, and the prompts before them

jax's profiler watches work that has been done before, so that nothing is compiled in it.  Writes
benchmarks/results/kernels-WORK[-SIZE].txt: the span from the first kernel to the end of the last, the sum over the
kernels, and of each name its milliseconds and calls.
"""

import argparse
import collections
import contextlib
import gzip
import json
import pathlib
import sys
import tempfile
from collections.abc import Iterator

import jax
import numpy as np

from benchmarks import sizes, training
from benchmarks.peers import RESULTS, device, result_name, settle
from benchmarks.sizes import SIZES

WORK = ("lora", "full", "decode")
PROMPT, STEPS = 448, 128


@contextlib.contextmanager
def watched(folder: str) -> Iterator[None]:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level, options.host_tracer_level = 0, 1
    jax.profiler.start_trace(folder, create_perfetto_trace=True, profiler_options=options)
    try:
        yield
    finally:
        jax.profiler.stop_trace()


def train(size: str, lora: bool, folder: str) -> None:
    def batches():
        made = training.make_batches(size, "ours", packed=False)
        yield from made[: training.WARM_UP]
        with watched(folder):
            yield made[training.WARM_UP]  # the step is over when the next one is asked for

    training.ours(size, batches(), lora, training.LEARNING_RATE)


def decode(size: str, folder: str) -> None:
    from robust_mo.sampling.decoding import Greedy
    from robust_mo.sampling.sampler import Request, Sampler

    slots, (model, params) = SIZES[size].slots, sizes.loaded(size)
    sampler = Sampler(model, params, ())
    del params
    generator = np.random.default_rng(0)
    prompts = generator.integers(0, model.config.vocab_size, (slots, PROMPT), np.int32)
    for watching in (contextlib.nullcontext(), watched(folder)):
        with watching:
            for _ in sampler.answers([Request(p, STEPS + 1) for p in prompts], Greedy(), 0, slots, lambda *_: None):
                pass


def kernels(folder: str) -> tuple[float, dict[str, tuple[float, int]]]:
    """(milliseconds from the first kernel to the end of the last, name -> (milliseconds, calls))."""
    (file,) = pathlib.Path(folder).rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    named = {name: {} for name in ("process_name", "thread_name")}
    for event in events:
        if event.get("ph") == "M" and event["name"] in named:
            named[event["name"]][event["pid"], event.get("tid")] = event["args"]["name"]
    gpus = {process for (process, _), name in named["process_name"].items() if "GPU" in name}
    streams = {where for where, name in named["thread_name"].items() if where[0] in gpus and "Stream" in name}
    ran = [e for e in events if e.get("ph") == "X" and (e["pid"], e.get("tid")) in streams]
    if not ran:
        sys.exit("the profiler saw no GPU at work: this benchmark is for GPUs")
    taken = collections.defaultdict(lambda: (0.0, 0))
    for event in ran:
        milliseconds, calls = taken[event["name"]]
        taken[event["name"]] = milliseconds + event["dur"] / 1e3, calls + 1
    span = max(e["ts"] + e["dur"] for e in ran) - min(e["ts"] for e in ran)
    return span / 1e3, dict(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=WORK)
    parser.add_argument("--size", choices=SIZES, default="smol")
    args = parser.parse_args()
    settle()
    with tempfile.TemporaryDirectory() as folder:
        if args.work == "decode":
            decode(args.size, folder)
        else:
            train(args.size, args.work == "lora", folder)
        span, taken = kernels(folder)
    busy = sum(milliseconds for milliseconds, _ in taken.values())
    lines = [f"{device(jax.default_backend())}, jax {jax.__version__}: span {span:.2f} ms, kernels {busy:.2f} ms"]
    for name, (milliseconds, calls) in sorted(taken.items(), key=lambda item: -item[1][0])[:40]:
        lines.append(f"{milliseconds:10.3f} ms {calls:7} x {name[:100]}")
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{result_name(f'kernels-{args.work}', args.size)}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
