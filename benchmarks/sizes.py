"""What the benchmarks run on, by size, and where its weights are.

`smol` is SmolLM2-135M as it is.  `1b` and `8b` have the shapes of Llama-3.2-1B and Llama-3.1-8B and invented weights,
written once into the folder for temporary files, so that nothing has to be fetched; `tiny`, two layers of SmolLM2's,
shows in a minute whether everything runs.  Imports nothing beyond what a bare accelerator machine has.
"""

import dataclasses
import json
import pathlib
import sys
import tempfile

import numpy as np

SHAPES = pathlib.Path(__file__).parent.parent / "configs" / "models"


@dataclasses.dataclass(frozen=True)
class Size:
    """A size.

    Attributes:
      shapes: name of a file in configs/models.
      layers: how many, where not all that the file has.
      dtype: of parameters, optimizer state and products, on both sides.
      rows, length: of a training step.
      peer_rows: how many of a full-weight step's rows the peer works off at once.
      chunk: positions per row whose logits our loss holds at once.
      remat: our policy for full weights; adapters leave room for "matmuls".
      answers: how many there are in an evaluation of given lengths.
      mean, spread, longest: of their tokens: the mean, the deviation of the logarithm, the cap.
      slots: decoded together.
    """

    shapes: str
    dtype: str
    rows: int
    length: int
    peer_rows: int
    chunk: int
    remat: str
    answers: int
    mean: int
    spread: float
    longest: int
    slots: int
    layers: int = 0


_SMOL = Size(
    shapes="smollm2-135m",
    dtype="float32",
    **dict(rows=8, length=128, peer_rows=8, chunk=64, remat="matmuls"),
    **dict(answers=200, mean=60, spread=0.8, longest=512, slots=16),
)
_8B = Size(
    shapes="Llama-3.1-8B-Instruct",
    dtype="bfloat16",
    **dict(rows=4, length=2048, peer_rows=1, chunk=512, remat="full"),
    **dict(answers=500, mean=518, spread=0.66, longest=2048, slots=128),  # as MATH-500's: median 416
)
SIZES = {
    "tiny": dataclasses.replace(_SMOL, layers=2, rows=2, length=64, answers=12, mean=6, longest=16, slots=4),
    "smol": _SMOL,
    "1b": dataclasses.replace(_8B, shapes="Llama-3.2-1B-Instruct", rows=8, peer_rows=4, remat="matmuls"),
    "8b": _8B,
}


def folder(size: str) -> pathlib.Path:
    """A Hugging Face folder with the weights, and for `smol` the tokenizer."""
    if size == "smol":
        from robust_mo.model.sources import resolve

        return resolve("smollm2-135m")
    where = pathlib.Path(tempfile.gettempdir()) / f"robust_mo-benchmarks-{size}"
    invent(where, SIZES[size].shapes, SIZES[size].layers, SIZES[size].dtype)
    return where


def invent(where: pathlib.Path, shapes: str, layers: int, dtype: str) -> None:
    """Writes a checkpoint of several files, with values that mean nothing; what is there already is left.

    Args:
      shapes: name of a file in configs/models.
      layers: instead of that file's; 0: those.
      dtype: of the tensors.
    """
    if (where / "model.safetensors.index.json").exists():
        return
    import jax
    from flax import linen as nn
    from safetensors.numpy import save_file

    from robust_mo.model import hugging_face

    values = json.loads((SHAPES / f"{shapes}.json").read_text())
    layers = layers or values["num_hidden_layers"]
    where.mkdir(parents=True, exist_ok=True)
    values |= {"num_hidden_layers": layers, "architectures": ["LlamaForCausalLM"], "dtype": dtype}
    (where / "config.json").write_text(json.dumps(values))
    model = hugging_face.build(hugging_face.read_config(where), None, dtype, dtype, "none")
    # No hidden size divides its length, or rows would be equal, and tokens with them.
    block = (np.random.default_rng(0).standard_normal(2**25 - 1) / 50).astype(dtype)
    weight_map, shard, number = {}, {}, 0

    def flush():
        nonlocal shard, number
        number += 1
        save_file(shard, where / f"part-{number:02}.safetensors", metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, f"part-{number:02}.safetensors"))
        shard = {}

    for path, leaf in jax.tree.leaves_with_path(nn.unbox(hugging_face.abstract_variables(model)["params"])):
        name = hugging_face.tensor_name("/".join(key.key for key in path))
        layered = "{layer}" in name
        shape = leaf.shape[1:] if layered else leaf.shape
        for layer in range(layers if layered else 1):
            stored = shape[::-1] if path[-1].key == "kernel" else shape
            values = np.ones(1, dtype) if path[-1].key == "scale" else block[len(weight_map) + len(shard) :]
            shard[name.format(layer=layer)] = np.resize(values, stored)
            if sum(tensor.nbytes for tensor in shard.values()) > 2**30:
                flush()
    flush()
    (where / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    size = sum(file.stat().st_size for file in where.glob("*.safetensors"))
    print(f"wrote {size / 1e9:.1f} GB of invented weights: {where}", file=sys.stderr)


def read_once(where: pathlib.Path) -> None:
    """Fills the page cache with a folder's weights, for whoever comes first."""
    for file in where.glob("*.safetensors"):
        with file.open("rb", buffering=0) as data:
            buffer = bytearray(2**24)
            while data.readinto(buffer):
                pass


def loaded(size: str):
    """(Llama, its parameters) of a size, in its dtype, for what does not train."""
    from robust_mo.model import hugging_face
    from robust_mo.model import mesh as meshes

    where, dtype = folder(size), SIZES[size].dtype
    model = hugging_face.build(hugging_face.read_config(where), None, dtype, dtype, "none")
    return model, hugging_face.load_params(where, model, meshes.make_mesh(1, -1, 1))


def shapes(size: str):
    """The size's LlamaConfig."""
    from robust_mo.model.llama import LlamaConfig

    file = SHAPES / f"{SIZES[size].shapes}.json"
    values = json.loads(file.read_text())
    layers = SIZES[size].layers or values["num_hidden_layers"]
    return LlamaConfig.from_json(values | {"num_hidden_layers": layers}, str(file))
