"""What an optimizer costs per chip at Llama-3.1-8B's shapes: whole training steps compiled for TPUs that are not here.

    pip install libtpu; JAX_PLATFORMS=cpu python -m benchmarks.optimizer_memory [--case=NAME]

Needs no TPU: libtpu brings the real compiler.  A row is one train_step (float32 parameters and state, bfloat16
products, layers recomputed in the backward pass) as the compiler laid it out: bytes per chip that stay between steps,
and that come and go within one.  Writes benchmarks/results/optimizer_memory.json.
"""

import argparse
import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from benchmarks.optimizer_step import injected
from benchmarks.peers import keep
from robust_mo.model import hugging_face
from robust_mo.model import mesh as meshes
from robust_mo.model.llama import PROJECTIONS, LlamaConfig, RopeScaling
from robust_mo.model.lora import LoraSpec
from robust_mo.training.models import abstract_trainable
from robust_mo.training.soap import soap, state_shardings
from robust_mo.training.step import TrainState, train_step

LLAMA = LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, 131072, 1e-5, 5e5, RopeScaling(8.0, 1.0, 4.0, 8192), False)
LENGTH = 2048
# Without the sides of 14,336 and of the vocabulary; for LoRA the rank's side alone.
FULL = dict(max_precondition_dim=4096, refresh="staggered", precision="high", first_basis="qr")
RANK = dict(one_sided_ratio=4, refresh="staggered", precision="high", first_basis="qr")
# name: (slice, rank of the adapters or 0, optimizer, its settings)
CASES = {
    "all weights, adamw": ("v5p:2x2x2", 0, optax.adamw, {}),
    "all weights, soap": ("v5p:2x2x2", 0, soap, FULL),
    "LoRA r16, adamw": ("v5e:2x2", 16, optax.adamw, {}),
    "LoRA r16, soap": ("v5e:2x2", 16, soap, RANK),
}


def compiled(topology: str, rank: int, make, settings: dict) -> dict:
    """GiB per chip and seconds of one case."""
    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    mesh = Mesh(devices.reshape(1, -1, 1), meshes.AXES, axis_types=(AxisType.Auto,) * 3)
    spec = LoraSpec(rank, float(rank), PROJECTIONS) if rank else None
    llama = hugging_face.build(LLAMA, spec, "bfloat16", "float32", "full")
    trainable = abstract_trainable(llama, mesh)
    frozen = None
    if spec:
        bare = hugging_face.build(LLAMA, None, "bfloat16", "bfloat16", "full")
        frozen = abstract_trainable(bare, mesh)
    if make is soap:
        settings = {**settings, "mesh": mesh}
    optimizer = injected(make, b1=0.9, b2=0.95, **settings)
    state = jax.tree.map(
        lambda leaf: abstract(leaf, meshes.replicated(mesh)), jax.eval_shape(optimizer.init, trainable)
    )
    clip, inner = state
    if make is soap:
        placed = jax.tree.map(abstract, inner.inner_state, state_shardings(inner.inner_state, mesh))
    else:
        placed = optax.tree.map_params(
            optimizer.init, lambda leaf, like: abstract(leaf, like.sharding), state, trainable
        )
        placed = placed[1].inner_state
    state = TrainState(
        abstract(jax.ShapeDtypeStruct((), jnp.int32), meshes.replicated(mesh)),
        trainable,
        (clip, inner._replace(inner_state=placed)),
    )
    rows = jax.ShapeDtypeStruct((len(devices.flat), LENGTH), jnp.int32, sharding=meshes.batch_sharding(mesh))
    batch = dict.fromkeys(("tokens", "positions", "segments", "targets"), rows)
    batch["loss_mask"] = jax.ShapeDtypeStruct(rows.shape, jnp.bool_, sharding=rows.sharding)
    rate = abstract(jax.ShapeDtypeStruct((), jnp.float32), meshes.replicated(mesh))
    start = time.perf_counter()
    with nn.logical_axis_rules(meshes.RULES), jax.set_mesh(mesh):
        lowered = train_step.lower(
            state, frozen, None, batch, rate, model=llama, optimizer=optimizer, chunk=512, micro_batches=1
        )
    memory = lowered.compile().memory_analysis()
    gib = {
        "kept": memory.argument_size_in_bytes / 2**30,
        "passing": memory.temp_size_in_bytes / 2**30,
        "new": (memory.output_size_in_bytes - memory.alias_size_in_bytes) / 2**30,
    }
    return {"slice": topology, **gib, "compile_seconds": time.perf_counter() - start}


def abstract(leaf, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="this one alone, and keep no result")
    args = parser.parse_args()
    found = {}
    for name in [args.case] if args.case else CASES:
        found[name] = compiled(*CASES[name])
        print(name, json.dumps(found[name]), flush=True)
    if not args.case:
        keep("optimizer_memory", {"unit": "GiB per chip", "cases": found})


if __name__ == "__main__":
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # asks no cloud who it is
    main()
