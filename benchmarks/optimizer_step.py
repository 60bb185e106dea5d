"""What a step costs with each optimizer, and with SOAP as it is often written, in one run.

    python -m benchmarks.optimizer_step [--size=smol] [--lora] [--rows=16] [--length=512] [--steps=22] [--rounds=3]
        [--compilations=9] [--only NAME ...]

Optimizer alone: update and addition on random gradients, the first two steps (compiling, first bases) left out and two
rounds of refreshes covered.  Whole step: training/step.py's second, on random tokens that all carry a loss, in which
"all at once" and `per_tensor` refresh nothing, "staggered" its share; compiling is tracing, lowering and compiling it
anew, with nothing left from before.  For these two the optimizers take turns.
`per_tensor` is SOAP as it is often written: a matrix at a time, all sides, both moments' rotations in every step.
Parameters and the optimizer's state are float32, of the size's shapes and random; SOAP's products are of precision
"full" (on a CPU the configs' "high" is the same).
Writes benchmarks/results/optimizer_step[-SIZE][-lora].json.
"""

import argparse
import functools
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from benchmarks import sizes, table
from benchmarks.peers import keep, result_name, settle
from benchmarks.sizes import SIZES
from benchmarks.training import CLIP_NORM, make
from robust_mo.model import hugging_face
from robust_mo.model import mesh as meshes
from robust_mo.model.llama import PROJECTIONS
from robust_mo.model.lora import LoraSpec
from robust_mo.training.optimizers import Optimizer
from robust_mo.training.soap import VECTORS
from robust_mo.training.step import TrainState, train_step

RANK, FREQUENCY, LEARNING_RATE = 16, 10, 1e-4


class PerTensorState(NamedTuple):
    count: jax.Array
    leaves: list


def per_tensor_soap(learning_rate) -> optax.GradientTransformation:
    """SOAP with the paper's settings, every layer's matrix or vector by itself."""
    dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def split(path, leaf):
        stacked = leaf.ndim == 3 or leaf.ndim == 2 and jax.tree_util.keystr(path[-1:], simple=True) in VECTORS
        return list(leaf) if stacked else [leaf]

    def tensors(tree):
        return [part for path, leaf in jax.tree.leaves_with_path(tree) for part in split(path, leaf)]

    def init(params):
        def fresh(p):
            lengths = p.shape if p.ndim == 2 else ()
            q = {axis: jnp.eye(size) for axis, size in enumerate(lengths) if size <= 10000}
            f = jax.tree.map(jnp.zeros_like, q)
            return {"m": jnp.zeros_like(p), "v": jnp.zeros_like(p), "f": f, "q": q}

        return PerTensorState(jnp.int32(0), [fresh(p) for p in tensors(params)])

    def turn(x, q, back=False):
        for axis, basis in q.items():
            basis = basis.T if back else basis
            x = dot(basis.T, x) if axis == 0 else dot(x, basis)
        return x

    def step(count, g, s):
        moves, steps = count > 0, jnp.maximum(count, 1)
        m = jnp.where(moves, 0.95 * s["m"] + 0.05 * g, s["m"])
        v = jnp.where(moves, 0.95 * s["v"] + 0.05 * turn(g, s["q"]) ** 2, s["v"])
        direction = turn(turn(m, s["q"]) / (jnp.sqrt(v) + 1e-8), s["q"], back=True)
        rate = jnp.where(moves, learning_rate, 0) * jnp.sqrt(1 - 0.95**steps) / (1 - 0.95**steps)
        factors = {a: 0.95 * f + 0.05 * (dot(g, g.T) if a == 0 else dot(g.T, g)) for a, f in s["f"].items()}

        def refresh(v, q):
            q = dict(q)
            for axis, factor in factors.items():
                order = jnp.argsort(-jnp.diag(dot(dot(q[axis].T, factor), q[axis])))
                v = jnp.take(v, order, axis=axis)
                q[axis] = jnp.linalg.qr(dot(factor, q[axis][:, order]))[0]
            return v, q

        def first(v, q):
            return v, {axis: jnp.linalg.eigh(factor)[1][:, ::-1] for axis, factor in factors.items()}

        which = jnp.where(moves, jnp.where(count % FREQUENCY == 0, 1, 0), 2)
        v, q = jax.lax.switch(which, (lambda v, q: (v, q), refresh, first), v, s["q"])
        return -rate * direction, {"m": m, "v": v, "f": factors, "q": q}

    def update(gradients, state, params=None):
        done = [step(state.count, g, s) for g, s in zip(tensors(gradients), state.leaves, strict=True)]
        changes, leaves = iter([change for change, _ in done]), [leaf for _, leaf in done]
        parts = [[next(changes) for _ in split(path, g)] for path, g in jax.tree.leaves_with_path(gradients)]
        stacked = [jnp.stack(part).reshape(g.shape) for part, g in zip(parts, jax.tree.leaves(gradients), strict=True)]
        return jax.tree.structure(gradients).unflatten(stacked), PerTensorState(state.count + 1, leaves)

    return optax.GradientTransformation(init, update)


def optimizers(hidden_size: int, lora: bool) -> dict[str, Optimizer]:
    """The first is what the others are set beside."""
    # The hidden size's sides of all matrices and keys' and values' own; for adapters the rank's side alone.
    sides = dict(longest_side=hidden_size, one_sided_ratio=4.0 if lora else 0.0)
    common = dict(b1=0.95, b2=0.95, shampoo_beta=0.0, eps=1e-8, frequency=FREQUENCY, precision="full", **sides)
    adamw, clip = make("adamw", b1=0.9, b2=0.95, eps=1e-8), optax.clip_by_global_norm(CLIP_NORM)
    return {
        "adamw": adamw,
        "soap, all at once": make("soap", refresh="all_at_once", first_basis="eigh", **common),
        "soap, staggered": make("soap", refresh="staggered", first_basis="eigh", **common),
        "adafactor": make("adafactor", decay_rate=0.8, clipping_threshold=1.0, parameter_scale=True),
        "lion": make("lion", b1=0.9, b2=0.99),
        "muon": make("muon", momentum=0.95, nesterov=True, iterations=5, rms=0.2, b1=0.9, b2=0.95, eps=1e-8),
        "schedule_free": make("schedule_free", b1=0.9, b2=0.95, eps=1e-8),
        "sgd": make("sgd", momentum=0.9, nesterov=False),
        "per_tensor": Optimizer(adamw.groups, lambda rate, share, start: optax.chain(clip, per_tensor_soap(rate))),
    }


def seconds(step, state, count: int) -> tuple[list[float], TrainState]:
    """Seconds of each of `count` steps, and the state after them."""
    taken = []
    for _ in range(count):
        start = time.perf_counter()
        state = jax.block_until_ready(step(state))
        taken.append(time.perf_counter() - start)
    return taken, state


def measure_alone(optimizer, trainable, steps: int) -> dict:
    """Seconds of the optimizer's first step and of `steps` - 2 later ones."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, gradient):
        rate = dict(learning_rate=jnp.float32(LEARNING_RATE), share=jnp.float32(1), start=None)
        changes, after = optimizer.update(gradient, state.optimizer, state.trainable, **rate)
        return TrainState(state.step + 1, optax.apply_updates(state.trainable, changes), after)

    gradient = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape) * 1e-4, trainable)
    (first, _, *taken), _ = seconds(lambda state: step(state, gradient), fresh(optimizer, trainable), steps)
    told = {"median": statistics.median(taken), "mean": statistics.mean(taken), "max": max(taken)}
    return {"first": first, "alone": told}


def in_turns(optimizers: dict, rounds: int, measure) -> dict[str, list[float]]:
    """What `measure` says of each optimizer, by name, in each round."""
    taken, order = {name: [] for name in optimizers}, list(optimizers)
    for _ in range(rounds):
        for name in order:
            taken[name].append(measure(name, optimizers[name]))
        order = [*order[1:], order[0]]  # who comes first waits for the memory that the one before has left
    return taken


def fresh(optimizer, trainable) -> TrainState:
    copied = jax.tree.map(jnp.copy, trainable)
    return TrainState(jnp.int32(0), copied, optimizer.init(copied))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="smol")
    parser.add_argument("--lora", action="store_true", help=f"adapters of rank {RANK} on all projections")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2 + 2 * FREQUENCY)
    parser.add_argument("--rounds", type=int, default=3, help="of whole steps")
    parser.add_argument("--compilations", type=int, default=9)
    parser.add_argument("--only", nargs="+", default=("",), help="beside adamw; or how their names begin")
    args = parser.parse_args()
    if args.steps < 3:
        parser.error("--steps: give at least 3, since the first two are left out: they compile")
    if args.rounds < 1 or args.compilations < 1:
        parser.error("--rounds, --compilations: give at least 1")
    settle()
    meshes.leave_out_absent_tpus()
    jax.config.update("jax_enable_compilation_cache", False)  # or compiling would be a look-up

    spec = LoraSpec(RANK, float(RANK), PROJECTIONS) if args.lora else None
    config, one = sizes.shapes(args.size), SIZES[args.size]
    llama = hugging_face.build(config, spec, one.dtype, "float32", "matmuls")
    tokens = jax.random.randint(jax.random.key(0), (args.rows, args.length), 0, config.vocab_size)
    batch = {
        "tokens": tokens,
        "positions": jnp.broadcast_to(jnp.arange(args.length), tokens.shape),
        "segments": jnp.ones_like(tokens),
        "targets": tokens,
        "loss_mask": jnp.ones(tokens.shape, bool),
    }
    keys = {"params": jax.random.key(1), "lora": jax.random.key(2)}
    made = nn.unbox(jax.jit(llama.init)(keys, *[jnp.zeros((1, 1), jnp.int32)] * 3))
    trainable, frozen = (made["lora"], made["params"]) if args.lora else (made["params"], None)

    inputs = (frozen, None, batch, jnp.float32(LEARNING_RATE), jnp.float32(1))
    statics = dict(model=llama, chunk=one.chunk, micro_batches=1)
    chosen = optimizers(config.hidden_size, args.lora)
    chosen = {name: chosen[name] for name in chosen if name == "adamw" or name.startswith(tuple(args.only))}

    found = {}
    print(
        f"{args.rows * args.length} tokens a step, {config.num_hidden_layers} layers; seconds: median (largest)",
        flush=True,
    )
    for name, optimizer in chosen.items():
        found[name] = measure_alone(optimizer, trainable, args.steps)
        first, alone = found[name]["first"], found[name]["alone"]
        print(f"{name:18} alone {alone['median']:7.3f} ({alone['max']:7.3f})  first {first:.0f}", flush=True)
    steps = {}

    def compile_anew(name, optimizer) -> float:
        jax.clear_caches()
        shapes = jax.eval_shape(functools.partial(fresh, optimizer), trainable)
        start = time.perf_counter()
        steps[name] = train_step.lower(shapes, *inputs, optimizer=optimizer, **statics).compile()
        return time.perf_counter() - start

    def second_step(name, optimizer) -> float:
        (_, second), _ = seconds(lambda state: steps[name](state, *inputs)[0], fresh(optimizer, trainable), 2)
        return second

    compiling = in_turns(chosen, args.compilations, compile_anew)
    whole = in_turns(chosen, args.rounds, second_step)
    for name in chosen:
        for what, times in (("compiling", compiling[name]), ("whole", whole[name])):
            found[name][what] = {"median": statistics.median(times), "rounds": times}
        row, adamw = found[name], found["adamw"]
        told = (
            f"{what} {row[what]['median']:6.2f} ({row[what]['median'] / adamw[what]['median']:.2f} of adamw's)"
            for what in ("whole", "compiling")
        )
        print(f"{name:18}", *told, f"alone adds {table.added(found, name):+.1%}", sep="  ", flush=True)
    name = result_name("optimizer_step", args.size) + "-lora" * args.lora
    keep(name, {"seconds": found, "tokens": args.rows * args.length}, jax.default_backend())


if __name__ == "__main__":
    main()
