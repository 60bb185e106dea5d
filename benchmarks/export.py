"""Exporting a LoRA run, merged, beside PEFT's merging of the same adapters, in one run: time, and memory on the way.

    python -m benchmarks.export [--size=8b] [--rounds=1]

The model is that of benchmarks/sizes.py, read from the page cache and written in its own dtype; the adapters have rank
16 and invented values.  Either side is a process on a CPU, timed with the imports of its libraries.  Host memory is the
process's anonymous memory at its highest; PEFT holds the model, of which it maps the files until it changes them.
Writes benchmarks/results/export[-SIZE].json.
"""

import argparse
import json
import os
import pathlib
import shutil
import tempfile
import time

import numpy as np

from benchmarks import sizes
from benchmarks.load_weights import Anonymous
from benchmarks.peers import SIDES, compare, result_name, tell
from benchmarks.sizes import SIZES

RANK = 16
# The same for the sides, which are processes of their own.
TEMPORARY = pathlib.Path(tempfile.gettempdir()) / "robust_mo-export"
RUN, ADAPTER = TEMPORARY / "run", TEMPORARY / "adapter"


def prepare(size: str) -> None:
    """A run folder with adapters as a training run would have left them, and the same as a PEFT folder."""
    import jax
    import jax.numpy as jnp

    from configs import default
    from robust_mo import export
    from robust_mo.model import hugging_face, sources
    from robust_mo.model import mesh as meshes
    from robust_mo.runs import RunFolder
    from robust_mo.training import models
    from robust_mo.training.checkpoints import Checkpoints
    from robust_mo.training.step import TrainState

    base, dtype = TEMPORARY / "base", SIZES[size].dtype
    base.mkdir(parents=True)
    for file in sizes.folder(size).iterdir():
        (base / file.name).symlink_to(file)
    for name in export.TOKENIZER_FILES:  # invented models have none
        if (file := sources.resolve("smollm2-135m") / name).exists() and not (base / name).exists():
            (base / name).symlink_to(file)
    config = default.get_config()
    config.model, config.param_dtype, config.compute_dtype = str(base), dtype, dtype
    config.lora.rank, config.lora.alpha = RANK, 2.0 * RANK
    llama = hugging_face.build(
        hugging_face.read_config(base), models.lora_spec(config.lora), dtype, dtype, remat="none"
    )
    mesh, random = meshes.make_mesh(1, -1, 1), np.random.default_rng(0)

    def invented(leaf):
        return jnp.asarray(0.05 * random.standard_normal(leaf.shape, np.float32), leaf.dtype)

    adapters = jax.tree.map(invented, models.abstract_trainable(llama, mesh))
    run = RunFolder(RUN)
    with run.claim("train", config.to_dict(), 0):
        checkpoints = Checkpoints(run.checkpoints, keep=1)
        state = TrainState(jax.device_put(jnp.int32(1), meshes.replicated(mesh)), adapters, {"count": jnp.int32(0)})
        checkpoints.save(state, {})
        checkpoints.close()
        run.finish(1)
    export.export(str(RUN), ADAPTER, "peft", None, None, None)


def ours() -> None:
    from robust_mo import export

    export.export(str(RUN), TEMPORARY / "ours", "merged", None, None, None)


def theirs() -> None:
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(TEMPORARY / "base", dtype="auto")
    model = peft.PeftModel.from_pretrained(base, ADAPTER).merge_and_unload()
    model.save_pretrained(TEMPORARY / "theirs")


def agree(a: dict, b: dict) -> None:
    """PEFT rounds the product before it adds it, and the sum again."""
    for name in a["matrices"]:
        one, other = (np.asarray(side["matrices"][name]) for side in (a, b))
        if np.abs(one - other).max() > 0.02 * np.abs(one).max():
            raise SystemExit(f"the sides wrote different weights, in {name}")


def corner_of(folder: pathlib.Path, name: str) -> list:
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    file = json.loads(index.read_text())["weight_map"][name] if index.exists() else "model.safetensors"
    with safe_open(folder / file, framework="numpy") as tensors:
        return tensors.get_slice(name)[:8, :8].astype(np.float32).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="smol")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        output = TEMPORARY / args.side
        begun = time.perf_counter()
        with Anonymous() as memory:
            {"ours": ours, "theirs": theirs}[args.side]()
        seconds = time.perf_counter() - begun
        last = SIZES[args.size].layers or sizes.shapes(args.size).num_hidden_layers
        names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, last - 1)]
        found = {name: corner_of(output, name) for name in names}
        gigabytes = sum(file.stat().st_size for file in output.glob("*.safetensors")) / 1e9
        shutil.rmtree(output)
        told = {"seconds": seconds, "GB of host memory": memory.highest / 1e9, "GB written": gigabytes}
        tell(args.side, {"speed": gigabytes / seconds, "figures": told, "matrices": found})
        return
    shutil.rmtree(TEMPORARY, ignore_errors=True)
    os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    try:
        prepare(args.size)
        sizes.read_once(TEMPORARY / "base")
        compare(result_name("export", args.size), "GB/s", args.rounds, agree)
    finally:
        shutil.rmtree(TEMPORARY, ignore_errors=True)


if __name__ == "__main__":
    main()
