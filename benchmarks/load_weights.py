"""Loading a sharded checkpoint beside transformers' `from_pretrained`, in one run: time, and host memory on the way.

    python -m benchmarks.load_weights [--rounds=3] [--dtype=bfloat16] [--size=8b | --layers=7 --folder=DIR]

The checkpoint has Llama-3.1-8B's shapes with fewer layers (7: 5.2 GB in bfloat16), invented values, and the index of
several files; it is written into --folder (default: a temporary one) and read from the page cache by both sides, which
have imported what they need before.  With --size it is that of benchmarks/sizes.py, whole.  Both sides load it in
float32, in which training holds what it trains (config.param_dtype), or in --dtype; on an accelerator ours compiles its
programs in that time.  In the dtype of the files `from_pretrained` on a CPU maps them and reads nothing; its weights
are loaded here when each has been copied from there, as training or a device needs them, and the figures say how long
it takes to map them and to read every page once, which is all that sampling on a CPU needs.  A virtual
machine whose host takes back what lies idle hands memory out slowly the first time, to either side.

The speed is the files' bytes by seconds.  Host memory is the process's anonymous memory at its highest, less what was
there before and less the parameters themselves; allowed is the largest tensor of the files.
Writes benchmarks/results/load_weights[-SIZE][-bfloat16].json.
"""

import argparse
import json
import mmap
import pathlib
import shutil
import tempfile
import threading
import time

import numpy as np

from benchmarks import sizes
from benchmarks.peers import SIDES, compare, tell, torch_device
from benchmarks.sizes import SIZES

# The same for the sides, which are processes of their own.
TEMPORARY = pathlib.Path(tempfile.gettempdir()) / "robust_mo-load_weights"


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
        while not self._ended.wait(0.005):  # oftener takes from what is measured
            self.highest = max(self.highest, self._now())

    @staticmethod
    def _now() -> int:
        _, resident, shared, *_ = pathlib.Path("/proc/self/statm").read_text().split()
        return mmap.PAGESIZE * (int(resident) - int(shared))


def _measured(load):
    """(what `load` returns, memory while it ran, seconds)"""
    begun = time.perf_counter()
    with Anonymous() as memory:
        loaded = load()
    return loaded, memory, time.perf_counter() - begun


def _stored(folder: pathlib.Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _gigabytes(beside: int, allowed: int | None = None) -> dict:
    told = {"GB of host memory beside the parameters": beside / 1e9}
    return told if allowed is None else told | {"allowed": allowed / 1e9}


def ours(folder: pathlib.Path, dtype: str) -> dict:
    import jax

    from robust_mo.model import hugging_face
    from robust_mo.model import mesh as meshes
    from robust_mo.model.llama import output_head

    model = hugging_face.build(hugging_face.read_config(folder), None, "bfloat16", dtype, "none")
    mesh = meshes.make_mesh(1, -1, 1)

    def load():
        return jax.block_until_ready(hugging_face.load_params(folder, model, mesh))

    params, memory, seconds = _measured(load)
    on_the_host = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) if jax.default_backend() == "cpu" else 0
    leaves = jax.tree.leaves(params)
    of_a_layer = max(leaf.size // leaf.shape[0] for leaf in jax.tree.leaves(params["layers"]))
    allowed = round(_stored(folder) / sum(leaf.size for leaf in leaves)) * max(of_a_layer, params["embed_tokens"].size)
    read = [np.asarray(output_head(params)[:64]), np.asarray(params["layers"]["down_proj"]["kernel"][-1, :, :8]).T]
    return {
        "speed": _stored(folder) / 1e9 / seconds,
        "host_bytes": memory.highest - on_the_host,
        "allowed_bytes": allowed,
        "figures": {"GB of files": _stored(folder) / 1e9, **_gigabytes(memory.highest - on_the_host, allowed)},
        "sums": [float(np.square(part.astype(np.float64)).sum()) for part in read],
    }


def theirs(folder: pathlib.Path, dtype: str) -> dict:
    import torch
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401, or loading would pay for the import

    config = json.loads((folder / "config.json").read_text())
    device = torch_device()
    mapped = device == "cpu" and dtype == (config.get("dtype") or config.get("torch_dtype"))
    torch.zeros(1, device=device)  # which is ready before, as ours is

    @torch.no_grad()
    def load():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)

    @torch.no_grad()
    def read_once():
        for tensor in load().parameters():
            float(tensor.flatten()[:: 2048 // tensor.element_size()].sum())

    @torch.no_grad()
    def copy():
        model = load()
        for tensor in model.parameters():
            tensor.data = tensor.clone()
        return model

    model, memory, seconds = _measured(copy if mapped else load)
    # On a device they are no anonymous memory.
    on_the_host = 0 if device == "cuda" else sum(tensor.nbytes for tensor in model.parameters())
    read = [model.lm_head.weight[:64], model.model.layers[-1].mlp.down_proj.weight[:8]]
    told = {
        "speed": _stored(folder) / 1e9 / seconds,
        "figures": _gigabytes(memory.highest - on_the_host),
        "sums": [float(part.detach().double().square().sum()) for part in read],
    }
    del model, read
    if mapped:  # after the first call, which this one may not help
        _, _, seconds = _measured(read_once)
        told["figures"]["GB/s where the files stay mapped"] = _stored(folder) / 1e9 / seconds
    return told


def agree(a: dict, b: dict) -> None:
    if not np.allclose(a["sums"], b["sums"], rtol=1e-9):
        raise SystemExit(f"the sides read different weights: {a['sums']} and {b['sums']}")
    # Of a small checkpoint the process's own needs are the larger part.
    if a["host_bytes"] > a["allowed_bytes"] > 1e9:
        raise SystemExit("ours took more")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--size", choices=SIZES)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--folder", type=pathlib.Path, default=TEMPORARY)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = sizes.folder(arguments.size) if arguments.size else arguments.folder
    if arguments.side:
        tell(arguments.side, {"ours": ours, "theirs": theirs}[arguments.side](folder, arguments.dtype))
        return
    try:
        if not arguments.size:
            sizes.invent(folder, "Llama-3.1-8B-Instruct", arguments.layers, "bfloat16")
        sizes.read_once(folder)
        layers, own = parser.get_default("layers"), folder != TEMPORARY and not arguments.size
        suffixes = (
            arguments.size,
            folder.name if own else None,
            None if arguments.layers == layers else f"{arguments.layers}_layers",
            None if arguments.dtype == "float32" else arguments.dtype,
        )
        name = "-".join(["load_weights", *filter(None, suffixes)])
        compare(name, "GB/s", arguments.rounds, agree)
    finally:
        if folder == TEMPORARY:
            shutil.rmtree(TEMPORARY)


if __name__ == "__main__":
    main()
