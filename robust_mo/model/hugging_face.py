"""Weights of a Hugging Face folder or a PEFT adapter folder, as the parameter dicts of model/llama.py, and back.

Promises: every tensor of the folder is used and every parameter filled, otherwise an error that lists the names;
slices go from the safetensors files straight into each device's shard, and back one file at a time, so the host never
holds a whole model.  Of several hosts each takes its slices alone into memory; its disk or file server may have to
read everything all the same, as it reads whole pages and ahead, and a page holds columns of several hosts.
Does not know where a folder came from (see model/sources.py) or what else belongs in one that is written.
"""

import concurrent.futures
import ctypes
import dataclasses
import functools
import gc
import itertools
import json
import math
import mmap
import os
import pathlib
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from robust_mo.errors import InputError
from robust_mo.model import mesh as meshes
from robust_mo.model.llama import PROJECTIONS, Llama, LlamaConfig
from robust_mo.model.lora import LoraSpec

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_TOP = {"embed_tokens": _EMBEDDING, "norm/scale": "model.norm.weight", "lm_head": _HEAD}
_FLOATS = {name: np.dtype(kind) for name, kind in (("BF16", jnp.bfloat16), ("F16", "f2"), ("F32", "f4"), ("F64", "f8"))}
_BYTES_ON_CPUS, _COLUMNS_ON_CPUS = 2**21, 1024
"""A piece that fits the caches of a CPU, in either order of its axes."""
_BYTES_ON_ACCELERATORS = 2**25
"""Whole rows, of which few suffice: every piece costs a call of a compiled program."""
_MADV_POPULATE_WRITE = 23  # of Linux's <linux/mman.h>; Python has no name for it
_PARENT = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"), "self_attn."),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp."),
    **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), ""),
}
_FACTORS = {"a": "lora_A", "b": "lora_B"}
_TRANSPOSED = ("kernel", *_FACTORS)
"""Stored [out, in] in the files, and [in, out] in the parameters."""

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Fields of an adapter_config.json under which an adapter is more than `x @ a @ b * alpha / rank`.
_BEYOND_LORA = (
    "use_dora use_qalora use_bdlora lora_bias fan_in_fan_out modules_to_save rank_pattern alpha_pattern "
    "layer_replication trainable_token_indices target_parameters alora_invocation_tokens arrow_config kasa_config "
    "layers_to_transform"
).split()
_LORA_A = re.compile(r"\.(\w+)\.lora_A\.weight$")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base model's weights alone."""


def tensor_name(path: str) -> str:
    """'layers/q_proj/kernel' -> 'model.layers.{layer}.self_attn.q_proj.weight'; the top level has no {layer}.

    'layers/q_proj/a' -> 'base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight', PEFT's name.
    """
    if path in _TOP:
        return _TOP[path]
    _, module, kind = path.split("/")
    stem = f"model.layers.{{layer}}.{_PARENT[module]}{module}"
    if kind in _FACTORS:
        return f"base_model.model.{stem}.{_FACTORS[kind]}.weight"
    return f"{stem}.{'bias' if kind == 'bias' else 'weight'}"


def read_json(file: pathlib.Path) -> dict:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file.parent} has no {file.name}; a model folder needs one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not valid JSON ({error}); get the file again") from None
    if not isinstance(value, dict):
        raise InputError(f"{file} is not a JSON object; get the file again")
    return value


def read_config(folder: pathlib.Path) -> LlamaConfig:
    file = pathlib.Path(folder) / "config.json"
    return LlamaConfig.from_json(read_json(file), origin=str(file))


@functools.cache  # tracing takes a tenth of a second, and a program asks several times
def abstract_variables(model: Llama) -> dict:
    """Shapes and logical axes of {"params", "lora"} without computing anything."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    keys = {name: jax.eval_shape(lambda: jax.random.key(0)) for name in ("params", "lora")}
    return jax.eval_shape(model.init, keys, tokens, tokens, tokens)


def check_dtypes(compute_dtype: str, param_dtype: str) -> None:
    """Raises InputError where a dtype is none in which we compute or keep parameters."""
    for name, value in {"compute_dtype": compute_dtype, "param_dtype": param_dtype}.items():
        if value not in ("float32", "bfloat16"):
            raise InputError(f"config.{name} is {value!r}: choose float32 or bfloat16")


def build(config: LlamaConfig, lora: LoraSpec | None, compute_dtype: str, param_dtype: str, remat: str) -> Llama:
    check_dtypes(compute_dtype, param_dtype)
    return Llama(config, lora, jnp.dtype(compute_dtype), jnp.dtype(param_dtype), remat)


def load_params(folder: pathlib.Path, model: Llama, mesh: Mesh) -> dict:
    """Reads the folder's safetensors into `model`'s parameters, sharded by model/mesh.py's rules.

    Kernels are stored `[out, in]` in the files; an accelerator transposes them itself.

    Returns:
      The nested dict of parameters, each a jax.Array of dtype `model.param_dtype`.

    Raises:
      InputError: a file is damaged or missing, tensors are left over or missing, or a shape differs from the config.
    """
    folder = pathlib.Path(folder)
    return _load(folder, _weight_files(folder), abstract_variables(model)["params"], mesh, "config.json")


@dataclasses.dataclass(frozen=True)
class InFiles:
    """A parameter that stays in its files: an index reads a layer of it, `...` the whole of one that has none.

    Attributes:
      shape, dtype: of the parameter.
      tensors: of the files, which are mapped into memory, for each layer, or the one.
      transposed: whether these have their last two axes the other way round.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    tensors: list[np.ndarray]
    transposed: bool

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, layer) -> jax.Array:
        tensor = self.tensors[0 if layer is ... else layer]
        return _stored(tensor, None, transposed=self.transposed, dtype=self.dtype)


def in_files(folder: pathlib.Path, model: Llama) -> dict:
    """The folder's parameters as `InFiles`: `load_params` for who wants them one after another.

    Raises:
      InputError: as `load_params`.
    """
    folder = pathlib.Path(folder)
    return _in_files(folder, _weight_files(folder), abstract_variables(model)["params"], "config.json")


def is_adapter(folder) -> bool:
    return (pathlib.Path(folder) / ADAPTER_CONFIG).is_file()


def read_adapter(folder) -> tuple[str, LoraSpec]:
    """The base model and the shape of the adapters in a PEFT folder.

    Raises:
      InputError: it is damaged, names no base, or its adapters are not plain LoRA on a Llama's projections.
    """
    folder = pathlib.Path(folder)
    file = folder / ADAPTER_CONFIG
    values = read_json(file)
    base, rank, alpha = (values.get(name) for name in ("base_model_name_or_path", "r", "lora_alpha"))
    if not isinstance(base, str) or not base:
        raise InputError(f"{file}: base_model_name_or_path is {base!r}: write the model there that the adapter is for")
    beyond = [name for name in _BEYOND_LORA if values.get(name)]
    beyond += [name for name, usual in (("peft_type", "LORA"), ("bias", "none")) if values.get(name, usual) != usual]
    beyond += [name for name in ("init_lora_weights",) if values.get(name) not in _STARTS]
    if beyond or type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        shown = ", ".join(f"{name} {values.get(name)!r}" for name in beyond or ("r", "lora_alpha"))
        raise InputError(
            f"{file} asks for {shown}; only plain LoRA is read: merge the adapter with PEFT, and give the merged folder"
        )
    if not (folder / ADAPTER_WEIGHTS).exists():
        raise InputError(f"{folder} has no {ADAPTER_WEIGHTS}; pickled weights are not read, save it as safetensors")
    found = {match[1] for name in _open(folder, [ADAPTER_WEIGHTS]) if (match := _LORA_A.search(name))}
    targets = tuple(name for name in PROJECTIONS if name in found)
    if not targets:
        raise InputError(f"{folder / ADAPTER_WEIGHTS} has no adapter for any of {', '.join(PROJECTIONS)}")
    return base, LoraSpec(rank, alpha * math.sqrt(rank) if values.get("use_rslora") else float(alpha), targets)


def load_adapters(folder, model: Llama, mesh: Mesh) -> dict:
    """Reads a PEFT folder into the adapters of `model`, whose `lora` is what `read_adapter` returns for it.

    Raises:
      InputError: a file is damaged, or its tensors do not fit `model`.
    """
    folder, base = pathlib.Path(folder), read_adapter(folder)[0]
    layers = {match[1] for name in _open(folder, [ADAPTER_WEIGHTS]) if (match := _LAYER.search(name))}
    if len(layers) < (count := model.config.num_hidden_layers):
        raise InputError(
            f"{folder} adapts {len(layers)} of the {count} layers of its base {base}; only adapters of all layers are "
            f"read: correct base_model_name_or_path in {ADAPTER_CONFIG}, or merge with PEFT and give the merged folder"
        )
    against = f"its base {base} (base_model_name_or_path in {ADAPTER_CONFIG})"
    return _load(folder, [ADAPTER_WEIGHTS], abstract_variables(model)["lora"], mesh, against)


def _load(folder: pathlib.Path, names: list[str], abstract, mesh: Mesh, against: str) -> dict:
    """The tensors in the files `names` as a tree of the outline of `abstract`.  `against` says what decided it."""
    stored = _in_files(folder, names, abstract, against)
    placements = jax.tree.map(_Placement, stored, meshes.shardings(abstract, mesh))
    if not _is_cpu(mesh):
        return jax.tree.map(_on_accelerators, placements)
    collecting = gc.isenabled()
    gc.disable()  # or it would look through all that was imported, 0.06 s, with every thread waiting
    pool = concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count()))  # each holds a piece
    try:
        begun = jax.tree.map(functools.partial(_begun_on_cpus, pool=pool), placements)
        return jax.tree.map(lambda finish: finish(), begun)
    finally:
        pool.shutdown(cancel_futures=True)
        if collecting:
            gc.enable()


def _in_files(folder: pathlib.Path, names: list[str], abstract, against: str) -> dict:
    """The same tree, each parameter `InFiles`."""
    wanted: dict[str, tuple] = {}

    def expect(path, leaf):
        name = tensor_name(_join(path))
        layered = "{layer}" in name
        shape = leaf.shape[1:] if layered else leaf.shape
        shape = shape[::-1] if path[-1].key in _TRANSPOSED else shape
        for layer in range(leaf.shape[0] if layered else 1):
            wanted[name.format(layer=layer)] = tuple(shape)

    jax.tree.map_with_path(expect, nn.unbox(abstract))
    files = _open(folder, names)
    _check(folder, wanted, files, against)

    def find(path, leaf) -> InFiles:
        name = tensor_name(_join(path))
        stored = [name.format(layer=layer) for layer in range(leaf.shape[0] if "{layer}" in name else 1)]
        tensors = [files[each].values for each in stored]
        return InFiles(leaf.shape, leaf.dtype, tensors, transposed=path[-1].key in _TRANSPOSED)

    return jax.tree.map_with_path(find, nn.unbox(abstract))


class _Placement:
    """How a parameter gets from its files onto the devices of a mesh: all shards piece by piece, so that the host holds
    at most one tensor beside them.

    Attributes:
      stored, target: the parameter, and where it is to lie.
      axes: the order of its axes in the files.
      shape, filled_as, shard: its shape, its place and the shape of a shard; where it has no layers, with one.
      same: the devices that hold the same, by where that begins in the files.
    """

    def __init__(self, stored: InFiles, target: NamedSharding):
        self.stored, self.target = stored, target
        alone = 1 if stored.tensors[0].ndim == len(stored.shape) else 0
        self.axes = (0, 2, 1) if stored.transposed else tuple(range(alone + len(stored.shape)))
        self.shape = (1,) * alone + stored.shape
        self.filled_as = NamedSharding(target.mesh, PartitionSpec(*(None,) * alone, *target.spec))
        self.shard = self.filled_as.shard_shape(self.shape)
        self.same: dict[tuple, list] = {}
        for device, index in self.filled_as.addressable_devices_indices_map(self.shape).items():
            self.same.setdefault(self.turned([part.start or 0 for part in index]), []).append(device)

    def turned(self, values) -> tuple:
        """From the order of the parameter's axes to that of the files', or back."""
        return tuple(values[axis] for axis in self.axes)

    def cuts(self, most_bytes: int, most_columns: int | None = None) -> tuple:
        """Of the axes of a shard, as in the files: numbers of layers, and for each of a tensor's sides its parts, so
        that a piece has at most so many bytes and columns."""
        layers, *rows, width = self.turned(self.shard)
        most = most_bytes // self.stored.tensors[0].itemsize
        columns = _even(width, min(most, most_columns or most))
        steps = [*(_even(side, most // columns) for side in rows), columns]
        parts = (
            [slice(begin, min(begin + step, side)) for begin in range(0, side, step)]
            for side, step in zip((*rows, width), steps, strict=True)
        )
        return range(layers), *parts

    def read(self, begins: tuple, layer: int, *piece: slice) -> np.ndarray:
        """A piece of the shard that begins there."""
        first_layer, *first = begins
        there = (slice(a + part.start, a + part.stop) for a, part in zip(first, piece, strict=True))
        return self.stored.tensors[first_layer + layer][tuple(there)]


def _begun_on_cpus(to: _Placement, pool: concurrent.futures.Executor) -> Callable[[], jax.Array]:
    """Has threads fill the parameter.  The function that is returned waits for them."""
    held = {begins: _host_memory(to.shard, to.stored.dtype) for begins in to.same}
    layers, bands, *across = to.turned(to.cuts(_BYTES_ON_CPUS, _COLUMNS_ON_CPUS if to.stored.transposed else None))

    def fill(begins, layer, band):
        memory = held[begins][layer, band]
        _fetch_pages(memory)
        for rest in itertools.product(*across):
            values = to.read(begins, *to.turned((layer, band, *rest)))
            if to.stored.transposed:  # numpy takes ten times as long as jax
                values = np.asarray(jax.device_put(values.T, to.same[begins][0]))
            memory[(slice(None), *rest)] = values

    filling = [pool.submit(fill, *place) for place in itertools.product(held, layers, bands)]

    def finish() -> jax.Array:
        for each in filling:
            each.result()
        alone = len(to.shape) - len(to.stored.shape)
        arrays = [
            jax.device_put(memory.reshape(memory.shape[alone:]), device, may_alias=True)
            for begins, memory in held.items()
            for device in to.same[begins]
        ]
        return jax.make_array_from_single_device_arrays(to.stored.shape, to.target, arrays)

    return finish


def _on_accelerators(to: _Placement) -> jax.Array:
    """The parameter.  Pieces are put in order and into their places on the devices."""
    pieces_as = NamedSharding(to.target.mesh, PartitionSpec(*to.turned(to.filled_as.spec)))
    parts = to.turned([size // cut for size, cut in zip(to.shape, to.shard, strict=True)])
    filled = jnp.zeros(to.shape, to.stored.dtype, device=to.filled_as)
    layers, *cuts = to.cuts(_BYTES_ON_ACCELERATORS)
    for layer in layers:
        for piece in itertools.product(*cuts):
            arrays = []
            for begins, devices in to.same.items():
                values = to.read(begins, layer, *piece)[None]
                arrays += [jax.device_put(values, device) for device in devices]
            together = tuple(size * count for size, count in zip(values.shape, parts, strict=True))
            pieces = jax.make_array_from_single_device_arrays(together, pieces_as, arrays)
            place = to.turned((layer, *(part.start for part in piece)))
            filled = _filled_in(filled, pieces, place, to.filled_as, pieces_as, to.axes)
        jax.block_until_ready(filled)  # what is read ahead takes memory
    return _unlayered(filled, to.target) if len(to.shape) > len(to.stored.shape) else filled


def _even(side: int, most: int) -> int:
    """A step of at most so much that cuts it evenly; where it can, into whole lines of a cache and lanes of a TPU."""
    step = math.ceil(side / math.ceil(side / max(1, most)))
    wider = 128 * math.ceil(step / 128)
    return min(side, wider) if wider <= most else step


def _host_memory(shape: tuple, dtype) -> np.ndarray:
    """Memory that jax takes as a CPU device's own, since it begins at a page.  A program that it is donated to copies
    it, once.

    Why not numpy's: that asks for large pages, with which loading is a little faster where they lie ready, and half as
    fast on a virtual machine whose host takes back what lies idle (0.34 to 0.46 GB/s, not 0.60 to 0.93; 2026-11-28).
    """
    size = math.prod(shape)
    memory = mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, dtype, size).reshape(shape)


def _fetch_pages(memory: np.ndarray) -> None:
    """Has all pages of a contiguous array come at once, from Linux 5.14 on: each at its first write takes 2.4 s of CPU
    for 5.2 GB, not 1.5 (2026-11-29); and what is filled next lies in caches."""
    if sys.platform == "linux":
        begin = memory.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
        length = memory.ctypes.data + memory.nbytes - begin
        # mmap's own method keeps other threads waiting.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), _MADV_POPULATE_WRITE)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=1)
def _unlayered(filled, target):
    return jax.lax.with_sharding_constraint(filled[0], target)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4, 5))
def _filled_in(filled, pieces, place, filled_as, pieces_as, axes):
    """`filled` with each device's of `pieces`, its axes put in order, at `place` of its shard."""

    def fill(shard, piece, place):
        return jax.lax.dynamic_update_slice(shard, piece.transpose(axes).astype(shard.dtype), place)

    given = (filled_as.spec, pieces_as.spec, PartitionSpec())
    fill = jax.shard_map(fill, mesh=filled_as.mesh, in_specs=given, out_specs=filled_as.spec, check_vma=False)
    return fill(filled, pieces, place)


def _is_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def _join(path) -> str:
    return "/".join(key.key for key in path)


def _weight_files(folder: pathlib.Path) -> list[str]:
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    if WEIGHTS in names:  # alone it is whole; beside it lie copies, the same in another form, or what it has replaced
        return [WEIGHTS]
    index = folder / INDEX
    if index.exists():
        return sorted(set(read_json(index)["weight_map"].values()))
    if names:
        return names
    raise InputError(f"{folder} has no .safetensors file; only safetensors and GGUF weights are read")


class _Tensor(NamedTuple):
    """Of a file: dtype and shape by its header, and the values, mapped into memory; none where they are no floats."""

    dtype: str
    shape: tuple[int, ...]
    values: np.ndarray | None


def _open(folder: pathlib.Path, names: list[str]) -> dict[str, _Tensor]:
    """What the files hold, by name.  Their library checks them, and would copy what is read once more."""
    found: dict[str, _Tensor] = {}
    for name in names:
        file = folder / name
        try:
            with safe_open(file, framework="numpy"), file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(length))
        except FileNotFoundError:
            raise InputError(f"{folder}: weight file {name} is missing; get the model again") from None
        except SafetensorError as error:
            raise InputError(f"{file} is damaged or cut short ({error}); get the file again") from None
        header.pop("__metadata__", None)
        if twice := sorted(set(header) & set(found)):
            raise InputError(f"{folder}: {twice[0]} is in {name} and in another file too; take one of them away")
        content = np.memmap(file, np.uint8, "r")
        for each, entry in header.items():
            dtype, shape, begin = entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
            values = np.ndarray(shape, _FLOATS[dtype], content, begin) if dtype in _FLOATS else None
            found[each] = _Tensor(dtype, shape, values)
    return found


def _check(folder, wanted: dict[str, tuple], files: dict[str, _Tensor], against: str) -> None:
    extra = sorted(set(files) - set(wanted))
    if _HEAD in extra and _EMBEDDING in files:  # some exporters write a tied head a second time
        if not _equal(files[_HEAD], files[_EMBEDDING]):
            raise InputError(
                f"{folder} has a {_HEAD} that is not its {_EMBEDDING}, and {against} says they are tied: set "
                "tie_word_embeddings to false there"
            )
        extra.remove(_HEAD)
    # A table of angles that old versions of transformers saved; it follows from config.json.
    extra = [name for name in extra if not name.endswith(".rotary_emb.inv_freq")]
    missing = sorted(set(wanted) - set(files))
    for what, names in (("tensors that no parameter takes", extra), ("no tensor for", missing)):
        if names:
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise InputError(f"{folder} has {what}: {shown}; the files do not match {against}")
    for name, shape in wanted.items():
        tensor = files[name]
        if tensor.shape != shape:
            raise InputError(f"{folder}: {name} has shape {tensor.shape}, {against} asks for {shape}")
        if tensor.values is None:
            raise InputError(
                f"{folder}: {name} is stored as {tensor.dtype}; quantized weights are not read, get the model in one "
                f"of {', '.join(_FLOATS)}"
            )


def _equal(one: _Tensor, other: _Tensor) -> bool:
    """Whether two tensors hold the same, compared some rows after others."""
    if one[:2] != other[:2] or one.values is None:
        return one[:2] == other[:2]
    rows, width = one.shape
    step = max(1, _BYTES_ON_CPUS // width)
    parts = (slice(row, row + step) for row in range(0, rows, step))
    return all(np.array_equal(one.values[part], other.values[part]) for part in parts)


def save_params(
    folder: pathlib.Path, params: dict, dtype: str, shard_bytes: int, on_tensor: Callable[[int, int], None]
):
    """Writes parameters as safetensors files of at most `shard_bytes` (or one tensor) each, and their index.

    One file's tensors are held in host memory at a time; each is transposed and rounded to `dtype` on the device.

    Args:
      params: as `load_params` returns them, every shard on this process's devices; or leaves of which an index reads a
        layer, such as `InFiles`, each read once.
      on_tensor: called with (tensors done, tensors in all) before each; may raise to stop.
    """
    tensors = _tensors(params)
    shards: list[list] = []
    room = 0
    for tensor in tensors:
        size = math.prod(tensor[2]) * jnp.dtype(dtype).itemsize
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= size
    done, weight_map = 0, {}
    for number, shard in enumerate(shards, 1):
        file, arrays = f"model-{number:05}-of-{len(shards):05}.safetensors", {}
        for name, fetch, _ in shard:
            on_tensor(done, len(tensors))
            arrays[name] = fetch(dtype)
            done += 1
        _write_safetensors(folder / file, arrays)
        weight_map.update(dict.fromkeys(arrays, file))
    total = sum(math.prod(shape) for *_, shape in tensors) * jnp.dtype(dtype).itemsize
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def save_adapters(folder: pathlib.Path, adapters: dict, spec: LoraSpec, base: str, dtype: str) -> None:
    """Writes adapters as a PEFT folder for the model `base`."""
    arrays = {name: fetch(dtype) for name, fetch, _ in _tensors(adapters)}
    _write_safetensors(folder / ADAPTER_WEIGHTS, arrays)
    _write_json(
        folder / ADAPTER_CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": spec.rank,
            "lora_alpha": spec.alpha,
            "target_modules": list(spec.targets),
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
        },
    )


def _write_safetensors(file: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    try:
        save_file(arrays, file, metadata={"format": "pt"})
    except SafetensorError as error:  # as which a full disk comes
        raise InputError(f"{file} cannot be written ({error})") from None


def _tensors(params: dict) -> list[tuple[str, Callable[[str], np.ndarray], tuple]]:
    """(name in the files, function of a dtype that fetches it from the device, shape), layer after layer."""
    top, layered = [], {}
    for path, leaf in jax.tree.leaves_with_path(params):
        name, transposed = tensor_name(_join(path)), path[-1].key in _TRANSPOSED
        layers = range(len(leaf)) if "{layer}" in name else [None]
        for layer in layers:
            shape = leaf.shape if layer is None else leaf.shape[1:]
            fetch = functools.partial(_fetch, leaf, layer, transposed)
            tensor = (name.format(layer=layer), fetch, shape)
            (top if layer is None else layered.setdefault(layer, [])).append(tensor)
    return top + [tensor for layer in layered.values() for tensor in layer]


def _fetch(leaf, layer: int | None, transposed: bool, dtype: str) -> np.ndarray:
    if not isinstance(leaf, jax.Array):
        leaf = leaf[...] if layer is None else leaf[layer]
        layer = None
    # Safetensors writes memory as it lies, whatever the strides, and a device may give an array back by columns.
    return np.ascontiguousarray(jax.device_get(_stored(leaf, layer, transposed=transposed, dtype=dtype)))


@functools.partial(jax.jit, static_argnames=("transposed", "dtype"))
def _stored(leaf, layer, *, transposed, dtype):
    matrix = leaf if layer is None else leaf[layer]
    return (matrix.T if transposed else matrix).astype(dtype)


def _write_json(file: pathlib.Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
