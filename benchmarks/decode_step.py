"""Milliseconds of a decode step, every slot taken, beside what the memory's bandwidth allows.

    python -m benchmarks.decode_step [--size=8b] [--rows 1 128] [--prompt=448] [--steps=128]

Rows of equal prompts are answered with one token and with that many more; the difference of the best of three times,
divided by the steps, is a step's: scheduling is in it, reading the prompts is not.  The floor is what has to be read,
weights once and every row's live cache, over the bandwidth in the maker's data sheet.  Writes
benchmarks/results/decode_step[-SIZE].json.
"""

import argparse
import time

import jax
import numpy as np

from benchmarks import sizes
from benchmarks.peers import keep, result_name, settle
from benchmarks.sizes import SIZES
from robust_mo.analysis import budget
from robust_mo.sampling.decoding import Greedy
from robust_mo.sampling.sampler import Request, Sampler


def seconds(sampler: Sampler, prompts: list[np.ndarray], new_tokens: int) -> float:
    requests = [Request(prompt, new_tokens) for prompt in prompts]
    taken = []
    for _ in range(4):  # the first one compiles
        start = time.perf_counter()
        for _ in sampler.answers(requests, Greedy(), 0, len(prompts), lambda *_: None):
            pass
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def floor(params, config, rows: int, entries: float) -> float | None:
    """Milliseconds; None where the bandwidth is not known."""
    chip = budget.chip(jax.devices()[0].device_kind)
    if chip is None:
        return None
    size = next(iter(jax.tree.leaves(params))).dtype.itemsize
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * entries * rows
    return 1e3 * size * (config.product_parameters + cache) / chip.bandwidth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="smol")
    parser.add_argument("--rows", type=int, nargs="+", help="by default 1 and as many as the size has slots")
    parser.add_argument("--prompt", type=int, default=448, help="tokens")
    parser.add_argument("--steps", type=int, default=128)
    args = parser.parse_args()

    settle()
    model, params = sizes.loaded(args.size)
    sampler = Sampler(model, params, ())
    generator, found = np.random.default_rng(0), {}
    for rows in args.rows or (1, SIZES[args.size].slots):
        # No two begin alike: what is shared would be read once for all.
        prompts = list(generator.integers(0, model.config.vocab_size, (rows, args.prompt), np.int32))
        whole, first = (seconds(sampler, prompts, n) for n in (1 + args.steps, 1))
        step = 1e3 * (whole - first) / args.steps
        least = floor(params, model.config, rows, args.prompt + args.steps / 2)
        found[rows] = {"milliseconds": step, "floor": least, "tokens/s": 1e3 * rows / step}
        told = f", at least {least:.2f}" if least else ""
        print(f"{rows:4} rows: {step:.2f} ms a step{told}, {1e3 * rows / step:.0f} tokens/s", flush=True)
    told = {"rows": found, "prompt": args.prompt, "steps": args.steps}
    keep(result_name("decode_step", args.size), told, jax.default_backend())


if __name__ == "__main__":
    main()
