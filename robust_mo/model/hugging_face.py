"""Weights of a Hugging Face folder, as the parameter dict of model/llama.py.

Promises: every tensor of the folder is used and every parameter filled, otherwise an error that lists the names;
slices go from the safetensors files straight into each device's shard, so the host never holds a whole model.
Does not know where the folder came from (see model/sources.py).
"""

import contextlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open

from robust_mo.errors import InputError
from robust_mo.model import mesh as meshes
from robust_mo.model.llama import Llama, LlamaConfig
from robust_mo.model.lora import LoraSpec

_TOP = {
    "embed_tokens": "model.embed_tokens.weight",
    "norm/scale": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
_FLOATS = ("BF16", "F16", "F32", "F64")
_PARENT = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"), "self_attn."),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp."),
    **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), ""),
}


def tensor_name(path: str) -> str:
    """'layers/q_proj/kernel' -> 'model.layers.{layer}.self_attn.q_proj.weight'; the top level has no {layer}."""
    if path in _TOP:
        return _TOP[path]
    _, module, kind = path.split("/")
    return f"model.layers.{{layer}}.{_PARENT[module]}{module}.{'bias' if kind == 'bias' else 'weight'}"


def read_json(file: pathlib.Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file.parent} has no {file.name}; a model folder needs one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not valid JSON ({error}); get the file again") from None


def read_config(folder: pathlib.Path) -> LlamaConfig:
    file = pathlib.Path(folder) / "config.json"
    return LlamaConfig.from_json(read_json(file), origin=str(file))


def abstract_variables(model: Llama) -> dict:
    """Shapes and logical axes of {"params", "lora"} without computing anything."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    keys = {name: jax.eval_shape(lambda: jax.random.key(0)) for name in ("params", "lora")}
    return jax.eval_shape(model.init, keys, tokens, tokens, tokens)


def build(config: LlamaConfig, lora: LoraSpec | None, compute_dtype: str, param_dtype: str, remat: str) -> Llama:
    return Llama(config, lora, jnp.dtype(compute_dtype), jnp.dtype(param_dtype), remat)


def load_params(folder: pathlib.Path, model: Llama, mesh: Mesh) -> dict:
    """Reads the folder's safetensors into `model`'s parameters, sharded by model/mesh.py's rules.

    Kernels are stored `[out, in]` in the files; they are read and placed so, then transposed and cast to the model's
    parameter dtype on the device, where that is quick.

    Returns:
      The nested dict of parameters, each a jax.Array of dtype `model.param_dtype`.

    Raises:
      InputError: a file is damaged or missing, tensors are left over or missing, or a shape differs from the config.
    """
    abstract = abstract_variables(model)["params"]
    targets = meshes.shardings(abstract, mesh)
    with contextlib.ExitStack() as stack:
        files = _open(pathlib.Path(folder), stack)
        wanted: dict[str, tuple] = {}

        def expect(path, leaf):
            name = tensor_name(_join(path))
            layered = "{layer}" in name
            shape = leaf.shape[1:] if layered else leaf.shape
            shape = shape[::-1] if _is_kernel(path) else shape
            for layer in range(leaf.shape[0] if layered else 1):
                wanted[name.format(layer=layer)] = tuple(shape)

        jax.tree.map_with_path(expect, nn.unbox(abstract))
        _check(folder, wanted, files)

        def read(path, leaf, target):
            name = tensor_name(_join(path))
            transposed = _is_kernel(path)
            spec = (*target.spec, *(None,) * (leaf.ndim - len(target.spec)))
            shape, order = leaf.shape, tuple(range(leaf.ndim))
            if transposed:
                order = (*order[:-2], order[-1], order[-2])
                shape, spec = (tuple(values[axis] for axis in order) for values in (shape, spec))

            def shard(index):
                if "{layer}" not in name:
                    return files[name].get_slice(name)[index]
                names = [name.format(layer=layer) for layer in range(*index[0].indices(shape[0]))]
                return np.stack([files[n].get_slice(n)[index[1:]] for n in names])

            stored = jax.make_array_from_callback(shape, NamedSharding(mesh, PartitionSpec(*spec)), shard)
            if not transposed and stored.dtype == leaf.dtype:
                return stored
            place = jax.jit(lambda x: x.transpose(order).astype(leaf.dtype), out_shardings=target)
            return place(stored)

        try:
            return jax.tree.map_with_path(read, nn.unbox(abstract), targets)
        except SafetensorError as error:
            raise InputError(f"{folder}: a weight file cannot be read ({error}); get it again") from None


def _join(path) -> str:
    return "/".join(key.key for key in path)


def _is_kernel(path) -> bool:
    return path[-1].key == "kernel"


def _open(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict:
    """Tensor name -> open safetensors file."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index)["weight_map"].values()))
    else:
        names = sorted(file.name for file in folder.glob("*.safetensors"))
    if not names:
        raise InputError(f"{folder} has no .safetensors file; only safetensors and GGUF weights are read")
    found = {}
    for name in names:
        try:
            file = stack.enter_context(safe_open(folder / name, framework="numpy"))
        except FileNotFoundError:
            raise InputError(f"{folder}: weight file {name} is missing; get the model again") from None
        except SafetensorError as error:
            raise InputError(f"{folder / name} is damaged or cut short ({error}); get the file again") from None
        found.update(dict.fromkeys(file.keys(), file))
    return found


def _check(folder, wanted: dict[str, tuple], files: dict) -> None:
    extra = sorted(set(files) - set(wanted))
    if wanted.get("lm_head.weight") is None:
        # Some exporters write the tied head a second time; it is the embedding, and transformers ignores it too.
        extra = [name for name in extra if name != "lm_head.weight"]
    missing = sorted(set(wanted) - set(files))
    for what, names in (("tensors that no parameter takes", extra), ("no tensor for", missing)):
        if names:
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise InputError(f"{folder} has {what}: {shown}; the files do not match config.json")
    for name, shape in wanted.items():
        tensor = files[name].get_slice(name)
        stored = tuple(tensor.get_shape())
        if stored != shape:
            raise InputError(f"{folder}: {name} has shape {stored}, config.json asks for {shape}")
        if tensor.get_dtype() not in _FLOATS:
            raise InputError(
                f"{folder}: {name} is stored as {tensor.get_dtype()}; quantized weights are not read, get the model in "
                f"one of {', '.join(_FLOATS)}"
            )
