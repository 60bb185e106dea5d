"""Loading a sharded checkpoint beside transformers' `from_pretrained`, in one run: time, and host memory on the way.

    python -m benchmarks.load_weights [--rounds=3] [--layers=7] [--folder=DIR]

The checkpoint has Llama-3.1-8B's shapes with fewer layers (7: 5.2 GB in bfloat16), invented values, and the index of
several files; it is written into --folder (default: a temporary one) and read from the page cache by both sides.  Host
memory is the process's anonymous memory at its highest, less what was there before and less the parameters themselves;
the largest stacked parameter and the largest tensor of a file are printed beside it.  Writes
benchmarks/results/load_weights.json.
"""

import argparse
import json
import pathlib
import shutil
import tempfile
import threading
import time

import numpy as np

from benchmarks.peers import SIDES, compare

CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "models" / "Llama-3.1-8B-Instruct.json"


def write(folder: pathlib.Path, layers: int) -> None:
    """The checkpoint; what is there already is left."""
    import jax
    from flax import linen as nn
    from safetensors.numpy import save_file

    from robust_mo.model import hugging_face

    values = json.loads(CONFIG.read_text()) | {"num_hidden_layers": layers}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    if (folder / "model.safetensors.index.json").exists():
        return
    model = hugging_face.build(hugging_face.read_config(folder), None, "bfloat16", "bfloat16", "none")
    block = (np.random.default_rng(0).standard_normal(2**25) / 50).astype("bfloat16")
    weight_map, shard, number = {}, {}, 0

    def flush():
        nonlocal shard, number
        number += 1
        save_file(shard, folder / f"part-{number:02}.safetensors", metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, f"part-{number:02}.safetensors"))
        shard = {}

    for path, leaf in jax.tree.leaves_with_path(nn.unbox(hugging_face.abstract_variables(model)["params"])):
        name = hugging_face.tensor_name("/".join(key.key for key in path))
        layered = "{layer}" in name
        shape = leaf.shape[1:] if layered else leaf.shape
        for layer in range(layers if layered else 1):
            stored = shape[::-1] if path[-1].key == "kernel" else shape
            offset = len(weight_map) + len(shard)
            shard[name.format(layer=layer)] = np.resize(block[offset:], stored)
            if sum(tensor.nbytes for tensor in shard.values()) > 2**30:
                flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


class Anonymous:
    """The process's anonymous memory at its highest while in the block, in bytes above where it began."""

    def __enter__(self):
        self._begun = self.highest = self._now()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()
        self.highest -= self._begun

    def _watch(self):
        while not self._ended.wait(0.002):
            self.highest = max(self.highest, self._now())

    @staticmethod
    def _now() -> int:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def ours(folder: pathlib.Path) -> dict:
    import jax

    from robust_mo.model import hugging_face
    from robust_mo.model import mesh as meshes

    model = hugging_face.build(hugging_face.read_config(folder), None, "bfloat16", "bfloat16", "none")
    mesh = meshes.make_mesh(1, -1, 1)
    begun = time.perf_counter()
    with Anonymous() as memory:
        params = jax.block_until_ready(hugging_face.load_params(folder, model, mesh))
    seconds = time.perf_counter() - begun
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    stacked = max(leaf.nbytes for leaf in jax.tree.leaves(params["layers"]))
    one = max(params["embed_tokens"].nbytes, stacked // len(params["layers"]["input_layernorm"]["scale"]))
    read = [np.asarray(params["lm_head"][:64]), np.asarray(params["layers"]["down_proj"]["kernel"][-1, :, :8]).T]
    return {
        "speed": size / 1e9 / seconds,
        "host_bytes": memory.highest - size,
        "allowed_bytes": max(stacked, params["embed_tokens"].nbytes) + one,
        "sums": [float(np.square(part.astype(np.float64)).sum()) for part in read],
    }


def theirs(folder: pathlib.Path) -> dict:
    import torch
    import transformers

    begun = time.perf_counter()
    with Anonymous() as memory:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        # Files that are mapped are read when first touched; a loader that copies has done so already.
        touched = sum(float(tensor.flatten()[:: 2048 // tensor.element_size()].sum()) for tensor in model.parameters())
    seconds = time.perf_counter() - begun
    size = sum(tensor.nbytes for tensor in model.parameters())
    read = [model.lm_head.weight[:64], model.model.layers[-1].mlp.down_proj.weight[:8]]
    return {
        "speed": size / 1e9 / seconds,
        "host_bytes": memory.highest - size,
        "touched": touched,
        "sums": [float(part.detach().double().square().sum()) for part in read],
    }


def agree(a: dict, b: dict) -> None:
    if not np.allclose(a["sums"], b["sums"], rtol=1e-9):
        raise SystemExit(f"the sides read different weights: {a['sums']} and {b['sums']}")
    for side, found in (("ours", a), ("theirs", b)):
        print(f"{side}: {found['host_bytes'] / 1e9:.2f} GB of host memory beside the parameters", flush=True)
    print(f"allowed: {a['allowed_bytes'] / 1e9:.2f} GB, the largest stacked parameter and one tensor", flush=True)
    if a["host_bytes"] > a["allowed_bytes"]:
        raise SystemExit("ours took more")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--folder", type=pathlib.Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps({"ours": ours, "theirs": theirs}[arguments.side](arguments.folder)))
        return
    folder = arguments.folder or pathlib.Path(tempfile.mkdtemp())
    try:
        write(folder, arguments.layers)
        compare("load_weights", "GB/s", arguments.rounds, agree)
    finally:
        if not arguments.folder:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
