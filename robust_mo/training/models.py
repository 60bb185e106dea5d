"""From what a user calls a model to parameters on the mesh: `--model=` and `config.model` everywhere.

Promises: a run folder gives its base with the trained weights in place, adapters merged; so does a PEFT adapter folder;
anything else goes through model/sources.py.  Does not know what the model is wanted for.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from robust_mo import hosts
from robust_mo.data.conversations import ChatFormat
from robust_mo.errors import InputError
from robust_mo.model import hugging_face, lora, sources
from robust_mo.model import mesh as meshes
from robust_mo.model.llama import PROJECTIONS, Llama, LlamaConfig
from robust_mo.model.lora import LoraSpec
from robust_mo.runs import RunFolder, sha256
from robust_mo.training.checkpoints import Checkpoints
from robust_mo.training.groups import paths

SHAPES = pathlib.Path(__file__).parents[2] / "configs" / "models"


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model without adapters.

    Attributes:
      llama: the module, `lora` is None.
      params: its parameters, sharded over the mesh.
      chat: its tokenizer and template.
    """

    llama: Llama
    params: dict
    chat: ChatFormat


def stands_on(source: str) -> str:
    """The model under a run's adapters: its config.model, or, where it went on training that run's adapters, the one
    under those.

    Raises:
      InputError: config.lora.continued without a LoRA run of the same adapters as config.model, or the run beneath has
        been made again since.
    """
    model, settings = _setting(source, "model"), _setting(source, "lora")
    RunFolder(source).check_model(stamp(model))
    return beneath_adapters(model, settings)


def beneath_adapters(source: str, settings) -> str:
    """What a run that trains `source` under `settings`, its config.lora, leaves as it is: that model, or what the
    adapters that it goes on training stand on.  Raises as `stands_on`."""
    if not settings["continued"]:
        return source
    if not is_run(source):
        raise InputError(f"config.lora.continued needs a LoRA run as config.model, and {source} is no run")
    theirs = lora_spec(_setting(source, "lora"))
    if theirs is None or theirs != lora_spec(settings):
        raise InputError(
            f"config.lora.continued: {source} trained {theirs or 'all weights'} and config.lora asks for "
            f"{lora_spec(settings) or 'all weights'}: make config.lora.rank, alpha and targets the same"
        )
    return stands_on(source)


def choose_dtype(asked: str) -> str:
    """In which to hold and compute a model that is only asked: "auto" is float32 on a CPU, bfloat16 elsewhere."""
    if asked != "auto":
        return asked
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def load_model(source: str, mesh: Mesh, compute_dtype: str, param_dtype: str, step: int | None = None) -> LoadedModel:
    """Loads a model.

    Args:
      source: a run folder of robust_mo.train, or what model/sources.resolve takes.
      step: of a run folder, the checkpoint; None for the newest.

    Raises:
      InputError: nothing of that name, or its files cannot be used.
    """
    _frozen.clear()  # first: there may be no room for both
    llama, chat = _llama_and_chat(source, compute_dtype, param_dtype, step)
    return LoadedModel(llama, _params(source, llama, mesh, step), chat)


_frozen: dict[tuple, LoadedModel] = {}


def load_frozen(source: str, mesh: Mesh, compute_dtype: str, param_dtype: str) -> LoadedModel:
    """`load_model` for who changes nothing of it: what the process loaded last is not read again, as for all attacks of
    a study on one organism."""
    which = (*identity(source), mesh, compute_dtype, param_dtype)
    if which not in _frozen:
        _frozen[which] = load_model(source, mesh, compute_dtype, param_dtype)
    return _frozen[which]


def identity(source: str) -> tuple:
    """What a process may know a model by: another as soon as its run is made again or trained on."""
    return os.path.realpath(source), stamp(source), newest_step(source)


class Unread:
    """`load_model` for who may not need the parameters after all: they are read when they are asked for."""

    def __init__(self, source: str, mesh: Mesh, dtype: str):
        self.llama, self.chat = _llama_and_chat(source, dtype, dtype, None)
        self._read = functools.partial(_params, source, self.llama, mesh, None)

    @functools.cached_property
    def params(self) -> dict:
        return self._read()


@contextlib.contextmanager
def opened(source: str, mesh: Mesh, compute_dtype: str, param_dtype: str, step: int | None):
    """`load_model` for who wants all parameters once, one after another, within the block: they stay in their files,
    and an index into a leaf reads a layer of it, with adapters merged into it.  That a checkpoint is damaged may be
    told at the block's end."""
    llama, chat = _llama_and_chat(source, compute_dtype, param_dtype, step)
    with contextlib.ExitStack() as stack:
        yield LoadedModel(llama, _opened(source, llama, mesh, step, stack), chat)


def _llama_and_chat(source: str, compute_dtype: str, param_dtype: str, step: int | None) -> tuple[Llama, ChatFormat]:
    if is_run(source) and not is_prompted(source):
        step = newest_step(source) if step is None else step
        if not hosts.by_first(RunFolder(source).finished):
            print(f"note: {source} has not been trained to its end; this is its checkpoint of step {step}", flush=True)
    folder = base_folder(source)
    llama = hugging_face.build(hugging_face.read_config(folder), None, compute_dtype, param_dtype, remat="none")
    chat = ChatFormat.from_folder(tokenizer_folder(source), folder)
    # Tokens added to the tokenizer alone, such as one for padding, do no harm while no text holds them.
    largest = max(chat.tokenizer.vocab_size - 1, *chat.stop_ids)
    if largest >= llama.config.vocab_size or min(chat.stop_ids) < 0:
        raise InputError(
            f"{folder}: tokenizer and stop tokens use ids from {min(chat.stop_ids)} to {largest}, but config.json's "
            f"vocab_size is {llama.config.vocab_size}: they belong to different models"
        )
    chat.prompt([{"role": "user", "content": "Why?"}])  # or what the template itself writes would be found out late
    return llama, chat


def shapes_of(model: str) -> LlamaConfig:
    """The numbers of a model that need not be here: of the one that a run began from, of a folder, of configs/models.

    Raises:
      InputError: nothing of that name; the known ones are listed.
    """
    model = os.path.expanduser(lineage(model)[-1])
    if hugging_face.is_adapter(model):
        return shapes_of(_beneath(pathlib.Path(model)))
    if (pathlib.Path(model) / "config.json").is_file():
        return hugging_face.read_config(pathlib.Path(model))
    file = SHAPES / f"{model.rsplit('/', 1)[-1]}.json"
    if not file.is_file():
        known = ", ".join(sorted(file.stem for file in SHAPES.glob("*.json")))
        raise InputError(
            f"config.model is {model!r}, whose shapes are not in {SHAPES}: give a folder, or one of {known}"
        )
    return LlamaConfig.from_json(hugging_face.read_json(file), origin=str(file))


def is_run(source: str) -> bool:
    run = RunFolder(source)
    return run.exists() and run.description().get("program") == "train"


def is_prompted(source: str) -> bool:
    """Whether a model is a run that trained nothing: a prompt asks for its behaviour."""
    return is_run(source) and _setting(source, "data")["task"] == "prompted"


def has_adapters(source: str) -> bool:
    """Whether a model is a run that trains adapters."""
    return is_run(source) and lora_spec(_setting(source, "lora")) is not None


PROMPTED_STEP = 1
"""As which a prompted organism is measured, whose run has no steps: 0 is the untouched model."""


def stamp(source: str) -> str | None:
    """What tells a model from another one made later in the same place: of a run when it was begun; of files a digest
    of their names and sizes and of what the JSON among them says, of adapters also what they are for.  None of a name,
    as of the hub."""
    if is_run(source):
        return RunFolder(source).description().get("started")
    place = pathlib.Path(sources.located(source))
    if not place.is_absolute() or not place.exists():
        return None
    told: list = [stamp(_beneath(place))] if hugging_face.is_adapter(place) else []
    for file in sorted(place.iterdir()) if place.is_dir() else [place]:
        if re.fullmatch(_OF_A_MODEL, file.name) and file.is_file():
            size = file.stat().st_size
            told.append((file.name, size, sha256(file) if file.suffix == ".json" and size < _LARGE else ""))
    return f"files {hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]}"


_OF_A_MODEL = (
    r"(adapter_config|added_tokens|config|generation_config|special_tokens_map|tokenizer.*|vocab|.*\.index)\.json"
    r"|.*\.(gguf|jinja|model|safetensors)"
)
_LARGE = 2**20  # bytes, as a tokenizer has, which are not read whole every time


def newest_step(source: str) -> int:
    """Step of a run's newest checkpoint; 0 for other models.

    Raises:
      InputError: the run has no checkpoint yet.
    """
    if not is_run(source):
        return 0
    if is_prompted(source):
        return PROMPTED_STEP
    with _checkpoints(source) as checkpoints:
        step = checkpoints.latest()
    if step is None:
        raise InputError(f"{source} has no checkpoint: train it first")
    return step


def lineage(source: str) -> list[str]:
    """`source` and what it descends from: runs, each begun from the next one, and last a model that is no run.

    Raises:
      InputError: a run's config names no model, or one that comes from the run itself or has been made again since.
    """
    found, places = [source], {os.path.realpath(source)}
    while is_run(found[-1]):
        model = _setting(found[-1], "model")
        if os.path.realpath(model) in places:
            file = RunFolder(found[-1]).path / "config.json"
            raise InputError(f"{file}: config.model is {model!r}, which no run can have begun from: correct it")
        RunFolder(found[-1]).check_model(stamp(model))
        found.append(model)
        places.add(os.path.realpath(model))
    return found


def tokenizer_folder(source: str) -> pathlib.Path:
    """Where a model's tokenizer and chat template lie: in its base folder, or with the adapters on it that have brought
    both of their own."""
    folder = sources.resolve(lineage(source)[-1])
    if not hugging_face.is_adapter(folder):
        return folder
    settings = folder / "tokenizer_config.json"
    has_template = (folder / "chat_template.jinja").is_file() or (
        settings.is_file() and hugging_face.read_json(settings).get("chat_template")
    )
    if has_template and (folder / "tokenizer.json").is_file():
        return folder
    return tokenizer_folder(_beneath(folder))


def base_folder(source: str) -> pathlib.Path:
    """The Hugging Face folder whose config and weights a model begins from, through any number of runs and adapters."""
    folder = sources.resolve(lineage(source)[-1])
    if not hugging_face.is_adapter(folder):
        return folder
    try:
        return base_folder(_beneath(folder))
    except InputError as error:
        raise InputError(f"{folder}: the base model named in its {hugging_face.ADAPTER_CONFIG}: {error}") from None


def _beneath(folder: pathlib.Path) -> str:
    """The model that a PEFT folder's adapters are for.

    Raises:
      InputError: the folder cannot be read, or its adapters are, in the end, for themselves.
    """
    base, _ = hugging_face.read_adapter(folder)
    at, places = base, {os.path.realpath(folder)}
    while hugging_face.is_adapter(at):
        if os.path.realpath(at) in places:
            file = folder / hugging_face.ADAPTER_CONFIG
            raise InputError(f"{file}: base_model_name_or_path is {base!r}, which leads back here: correct it")
        places.add(os.path.realpath(at))
        at, _ = hugging_face.read_adapter(at)
    return base


def _setting(source: str, name: str):
    """A run's config.model, config.param_dtype, config.data or config.lora, with what is read of it.  Raises InputError
    where it has none or one that no run has written."""
    run = RunFolder(source)
    file, config = run.path / "config.json", run.config()
    if name not in config:
        raise InputError(f"{file} has no config.{name}: restore the file from a copy")
    kinds = {"data": {"task": str}, "lora": {"rank": int, "alpha": int | float, "continued": bool, "targets": list}}
    value, read = config[name], kinds.get(name)
    fits = isinstance(value, str if read is None else dict)
    if not fits or read and not all(isinstance(value.get(field), kind) for field, kind in read.items()):
        raise InputError(f"{file}: config.{name} is {value!r}, which no run has written: restore the file from a copy")
    return value


def lora_spec(settings) -> LoraSpec | None:
    """From config.lora (rank, alpha, targets); None for rank 0, full-weight training."""
    if not settings["rank"]:
        return None
    spec = LoraSpec(settings["rank"], float(settings["alpha"]), tuple(settings["targets"]))
    lora.check_targets(spec, PROJECTIONS)
    return spec


def abstract_trainable(llama: Llama, mesh: Mesh):
    """Shapes, dtypes and shardings of what a run with `llama` trains: its adapters, or all parameters."""
    return abstract(llama, mesh, "params" if llama.lora is None else "lora")


def abstract(llama: Llama, mesh: Mesh, collection: str):
    """Shapes, dtypes and shardings of the model's "params" or "lora"."""
    abstract = hugging_face.abstract_variables(llama)[collection]
    targets = meshes.shardings(abstract, mesh)
    return jax.tree.map(
        lambda leaf, target: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=target), nn.unbox(abstract), targets
    )


def split(llama, params: dict, mesh, seed: int, draw: int = 0) -> tuple[dict, dict | None]:
    """(what is trained, what is not): fresh adapters and the parameters, or the parameters and nothing.

    Args:
      draw: which of the seed's draws the adapters are.
    """
    if llama.lora is None:
        return params, None
    key = jax.random.key(seed)
    return _adapters_of(llama, mesh)(jax.random.fold_in(key, draw) if draw else key), params


def adapters_beneath(source: str) -> list[str]:
    """The data.task of every run that has drawn adapters, of those from which a model descends, itself included."""
    runs = [run for run in lineage(source)[:-1] if not is_prompted(run)]
    settings = [(_setting(run, "data")["task"], _setting(run, "lora")) for run in runs]
    return [task for task, one in settings if lora_spec(one) and not one["continued"]]


@functools.cache
def _adapters_of(llama, mesh):
    """Random key -> fresh adapters; compiled once for a model."""
    tokens = jnp.zeros((1, 1), jnp.int32)

    def adapters(key):
        return nn.unbox(llama.init({"params": key, "lora": key}, tokens, tokens, tokens)["lora"])

    targets = jax.tree.map(lambda leaf: leaf.sharding, abstract_trainable(llama, mesh))
    return jax.jit(adapters, out_shardings=targets)


def parameter_paths(llama: Llama) -> list[str]:
    """Paths (see training/groups.py) of all parameters that a model has, and of all adapters that it could have."""
    everything = hugging_face.abstract_variables(dataclasses.replace(llama, lora=LoraSpec(1, 1.0, PROJECTIONS)))
    return [path for collection in nn.unbox(everything).values() for path in paths(collection)]


@functools.partial(jax.jit, static_argnames="spec")
def merged(params, adapters, spec: LoraSpec):
    """model/lora.merge as one compiled program."""
    return lora.merge(params, adapters, spec)


def restore(source: str, llama: Llama, mesh: Mesh, step: int | None) -> dict:
    """What a run has trained with `llama`, as of a checkpoint (None: the newest)."""
    with _checkpoints(source) as checkpoints:
        return checkpoints.restore_trainable(abstract_trainable(llama, mesh), step)


def _checkpoints(run: str):
    """A run's checkpoints, only to read, until the block ends."""
    return contextlib.closing(Checkpoints(RunFolder(run).checkpoints, keep=None))


def _params(source: str, llama: Llama, mesh: Mesh, step: int | None) -> dict:
    if is_prompted(source):
        return _params(_setting(source, "model"), llama, mesh, None)
    if found := _adapters(source, llama, mesh, step):
        base, adapters, spec = found
        return lora.merge_in_place(_params(base, llama, mesh, None), adapters, spec)
    if is_run(source):
        return restore(source, llama, mesh, step)
    return hugging_face.load_params(sources.resolve(source), llama, mesh)


def _opened(source: str, llama: Llama, mesh: Mesh, step: int | None, stack: contextlib.ExitStack) -> dict:
    """What `_params` returns, left in its files; a run's are open until `stack` ends."""
    if is_prompted(source):
        return _opened(_setting(source, "model"), llama, mesh, None, stack)
    if found := _adapters(source, llama, mesh, step):
        base, adapters, spec = found
        return lora.merge_as_read(_opened(base, llama, mesh, None, stack), adapters, spec)
    if is_run(source):
        checkpoints = stack.enter_context(_checkpoints(source))
        return stack.enter_context(checkpoints.opened(abstract_trainable(llama, mesh), step))
    return hugging_face.in_files(sources.resolve(source), llama)


def _adapters(source: str, llama: Llama, mesh: Mesh, step: int | None) -> tuple[str, dict, LoraSpec] | None:
    """Of a LoRA run or a PEFT folder: the model beneath, the adapters, their shape.  None of what has all weights.

    Adapters come in the dtype that they were trained in, a folder's in float32: it is their product that is rounded."""
    if is_run(source):
        if spec := lora_spec(_setting(source, "lora")):
            trained_in = dataclasses.replace(llama, lora=spec, param_dtype=_setting(source, "param_dtype"))
            return stands_on(source), restore(source, trained_in, mesh, step), spec
        return None
    folder = sources.resolve(source)
    if not hugging_face.is_adapter(folder):
        return None
    base, spec = hugging_face.read_adapter(folder)
    trained_in = dataclasses.replace(llama, lora=spec, param_dtype="float32")
    return base, hugging_face.load_adapters(folder, trained_in, mesh), spec
