"""Whether a config fits, before anyone pays for the machine: compiles its program for devices that are not here.

    python -m robust_mo.preflight --config=configs/red_full.py:8b --topology=v5e:4x4
    python -m robust_mo.preflight --config=configs/red_full.py:8b --topology=v5e:4x4 --program=sample

The real program is compiled by the TPU's own compiler, which the package libtpu brings, from shapes alone: no TPU, no
weights, no network.  cpu:8 compiles for eight pretend devices of a CPU.  --program=train is the training step; sample
is a step of decoding in the config's evaluations, with every slot at its longest answer, beside the model as it was
loaded (in the middle of training the optimizer's state lies there too).  Prints bytes per chip beside the chip's limit,
FLOPs, collectives, and how long compiling took; with --json, the last line is one JSON object with the same.  Where it
does not fit, --suggest compiles one change after another and names the first that does.  The model's shapes come from
configs/models by the last part of config.model, or from a folder that is here.
"""

import functools
import importlib.util
import json
import math
import os
import pathlib
import re
import signal
import tempfile
import time

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from robust_mo import command_line
from robust_mo.analysis.programs import collectives, product_flops
from robust_mo.configured.checks import check, check_rows
from robust_mo.configured.data import asking
from robust_mo.configured.program import judge_held, step_program
from robust_mo.errors import InputError, first_line
from robust_mo.model import hugging_face
from robust_mo.model import mesh as meshes
from robust_mo.model.llama import AUTOMATIC_REMAT, Llama
from robust_mo.sampling.sampler import decode_program, lies_so, own_copy
from robust_mo.training import models
from robust_mo.training.memory import Need, held, needed, out_of_memory

# Names that libtpu 0.0.52 knows, for the message; any other that the compiler takes works too.
TOPOLOGIES = "v5e:2x2 v5e:4x4 v5e:16x16 v5p:2x2x2 v5p:4x4x4 v6e:4x4 v6e:8x8 v6e:16x16".split()

_ROWS = 128  # of --program=sample where config.evaluation.batch_size leaves it to the memory
_LONGEST_PROMPT = 512  # tokens, of --program=sample; an assumption
_GIB = 2**30


def devices_of(topology: str) -> list[jax.Device]:
    """Devices to compile for.

    Raises:
      InputError: an unknown topology, or libtpu is not installed.
    """
    kind, _, size = topology.partition(":")
    jax.config.update("jax_platforms", "cpu")
    if kind == "cpu":
        if not size.isdecimal() or int(size) < 1:
            raise InputError(f"--topology={topology}: give a number of devices, as in cpu:8")
        jax.config.update("jax_num_cpu_devices", int(size))
        return jax.devices()
    # Sides of 0 end libtpu, and it takes a third one of slices that have two.
    sides = {"v5e": 2, "v6e": 2, "v5p": 3}.get(kind)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", size) or sides not in (None, size.count("x") + 1):
        raise InputError(f"--topology={topology} is no slice: known are {', '.join(TOPOLOGIES)}, cpu:N")
    if importlib.util.find_spec("libtpu") is None:
        how = ".venv/bin/python -m pip install -r requirements-preflight.txt"
        raise InputError(f"--topology={topology} needs the TPU compiler (Linux on x86_64): {how}")
    # What libtpu would else ask of the TPU machine that it takes this one for; and other programs may use it too.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # of the plugin; their classes differ
        reason = first_line(error)
        raise InputError(f"--topology={topology}: {reason}; known are {', '.join(TOPOLOGIES)}, cpu:N") from None


def train_program(config: ConfigDict, mesh: Mesh):
    """(function, arguments, static arguments) of the training step, as robust_mo.train calls it."""
    check_rows(config.batch, mesh)
    return step_program(config, models.shapes_of(config.model), mesh, config.remat)


def sample_program(config: ConfigDict, mesh: Mesh):
    """(function, arguments, static arguments) of decoding, as the config's evaluations do it."""
    llama = _measured_model(config)
    asked = [config.evals[name].get("max_new_tokens", 0) for name in config.evaluation.names]
    if not any(asked):
        raise InputError("--program=sample: config.evaluation.names has no evaluator that samples, such as math500")
    slots = config.evaluation.batch_size or _ROWS
    loaded = models.abstract(llama, mesh, "params")
    params = own_copy(llama, loaded, chip_limit(mesh) - held(loaded))
    return decode_program(llama, params, slots, _LONGEST_PROMPT, max(asked))


def _measured_model(config: ConfigDict) -> Llama:
    dtypes = config.compute_dtype, config.param_dtype
    return hugging_face.build(models.shapes_of(config.model), None, *dtypes, "none")


def beside(config: ConfigDict, program: str, mesh: Mesh) -> int:
    """Bytes of a chip that are taken while the program runs by what it is not given."""
    if program == "train":
        judged = "judge" in asking(config)
        return judge_held(config, models.shapes_of(config.evals.judge.model), mesh) if judged else 0
    llama = _measured_model(config)
    loaded = models.abstract(llama, mesh, "params")
    copy = own_copy(llama, loaded, chip_limit(mesh) - held(loaded))

    # On a CPU the sampler has each layer's parameters apart.
    everything = mesh.devices.flat[0].platform == "cpu"
    return held(
        [x for x, to in zip(*map(jax.tree.leaves, (loaded, copy)), strict=True) if everything or not lies_so(x, to)]
    )


PROGRAMS = {"train": train_program, "sample": sample_program}


def changes(config: ConfigDict, program: str, mesh: Mesh):
    """Settings that need less memory, the ones that cost least speed first, each with those before it: {"remat":
    "full"}, {"remat": "full", "batch.micro_batches": 2}, ..."""
    made: dict[str, str | int] = {}
    training, apart = program == "train", meshes.rows_apart(mesh)
    if training and config.remat != "full":
        yield (made := made | {"remat": "full"})
    parts = config.batch.micro_batches
    while training and config.batch.rows % (apart * parts * 2) == 0:
        parts *= 2
        yield (made := made | {"batch.micro_batches": parts})
    if mesh.shape["replica"] > 1:
        yield (made := made | {"mesh.replica": 1, "mesh.fsdp": apart})
    heads, tensor = models.shapes_of(config.model).num_key_value_heads, mesh.shape["tensor"]
    while mesh.size % (tensor * 2) == 0 and heads % (tensor * 2) == 0:
        tensor *= 2
        apart = mesh.size // tensor
        made = made | {"mesh.replica": 1, "mesh.fsdp": apart, "mesh.tensor": tensor}
        yield (made := made | ({"batch.micro_batches": config.batch.rows // apart} if training else {}))
    rows = config.batch.rows
    while training and rows % (apart * 2) == 0:
        rows //= 2
        yield (made := made | {"batch.rows": rows, "batch.micro_batches": rows // apart})
    slots = config.evaluation.batch_size or _ROWS
    while not training and slots > apart:
        slots = apart * math.ceil(slots / 2 / apart)  # as many on every device
        yield (made := made | {"evaluation.batch_size": slots})


def suggest(config: ConfigDict, program: str, mesh: Mesh, found: dict) -> dict | None:
    """The first of `changes` with which a program fits that was found not to; None where none does.  Prints what it
    tries."""
    limit = found["limit_bytes"]
    # What decoding is given has the answers' caches in it, which fewer answers make smaller.
    if program == "train" and found["bytes_per_chip"]["arguments"] > limit and mesh.shape["replica"] == 1:
        print("weights and state alone are more than a chip holds: take more chips, LoRA, or a smaller model")
        return None
    for change in changes(config, program, mesh):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(change)
        tried_mesh = meshes.make_mesh(**changed.mesh, devices=list(mesh.devices.flat))
        taken = beside(changed, program, tried_mesh)
        tried = measure(PROGRAMS[program](changed, tried_mesh), limit, taken)
        gib = tried["bytes_per_chip"]["total"] / _GIB
        print(f"{as_flags(change)}: {gib:.2f} GiB, {'fits' if tried['fits'] else 'does not fit'}", flush=True)
        if tried["fits"]:
            return change
    print(f"nothing tried fits: take more chips, {'LoRA, ' if program == 'train' else ''}or a smaller model")
    return None


def as_flags(change: dict) -> str:
    return " ".join(f"--config.{name}={value}" for name, value in change.items())


def measure(program, limit: int, taken: int = 0) -> dict:
    """Compiles a program and says what --json prints.  Where what it is given is more than a chip holds nothing is
    compiled, and temporaries, output and collectives are None; the last also where the compiler refuses.

    Args:
      limit: bytes of a chip.
      taken: those of them that other things take; they are counted among the arguments.
    """
    function, arguments, settings = program
    mesh = meshes.of(arguments)  # which sampling may have chosen itself
    with meshes.in_force(mesh):
        traced = function.trace(*arguments, **settings)
        flops = product_flops(traced.jaxpr.jaxpr)
        given = taken + held(arguments)
        sizes = {"arguments": given, "temporaries": None, "output": None, "total": given}
        fits, told, begun = False, None, time.monotonic()
        if given <= limit:
            need, text = _compile(traced.lower(), arguments)
            sizes = {
                "arguments": taken + need.arguments,
                "temporaries": need.temporaries,
                "output": need.output,
                "total": taken + need.total,
            }
            fits = not need.refused and sizes["total"] <= limit
            told = collectives(text) if text else None
    return {
        "fits": fits,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "bytes_per_chip": sizes,
        "limit_bytes": limit,
        "flops": flops,
        "flops_per_chip": flops // mesh.size,
        "collectives": told,
        "compile_seconds": round(time.monotonic() - begun, 1),
    }


def _compile(lowered: jax.stages.Lowered, arguments) -> tuple[Need, str]:
    """What a program needs, and its optimized HLO, which is empty where the compiler refused it.

    The compiler itself writes the HLO down: Compiled.as_text() cannot read back the work of v5p's sparse cores.
    """
    with tempfile.TemporaryDirectory() as folder:
        need = needed(lowered, arguments, {"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        if need.refused:
            return need, ""
        (written,) = pathlib.Path(folder).glob("*after_optimizations.txt")
        return need, written.read_text()


@functools.cache
def chip_limit(mesh: Mesh) -> int:
    """Bytes that a program may use of one chip, out of the compiler's refusal of one that asks for a petabyte; of a
    pretend device its share of the host's."""
    if mesh.devices.flat[0].platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // mesh.size
    huge = jax.ShapeDtypeStruct((2**20, 2**30), jnp.int8, sharding=meshes.replicated(mesh))
    try:
        jax.jit(lambda x: x + jnp.int8(1)).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        if found := out_of_memory(error):
            return found[1]
        raise
    raise AssertionError("the compiler found room for a petabyte")


def report(found: dict, program: str, tokens: int) -> list[str]:
    given = ", optimizer state and batch" if program == "train" else " and caches"
    sizes, limit = found["bytes_per_chip"], found["limit_bytes"]
    spare = limit - sizes["total"]
    if sizes["temporaries"] is None:
        return [
            f"DOES NOT FIT: weights{given} alone are {sizes['total'] / _GIB:.2f} GiB per chip, "
            f"which holds {limit / _GIB:.2f}; not compiled"
        ]
    moved = found["collectives"] or {}
    parts = ", ".join(f"{name} {sizes[name] / _GIB:.2f}" for name in ("arguments", "temporaries", "output"))
    return [
        f"GiB per chip: {parts}; together {sizes['total'] / _GIB:.2f} of {limit / _GIB:.2f}",
        f"fits, with {spare / _GIB:.2f} GiB to spare" if found["fits"] else f"DOES NOT FIT by {-spare / _GIB:.2f} GiB",
        f"FLOPs of matrix products: {found['flops']:.3e} a step, {found['flops_per_chip']:.3e} a chip, "
        f"{found['flops'] / tokens:.3e} a token",
        *(f"{kind}: {n['count']}, {n['bytes'] / _GIB:.2f} GiB per chip" for kind, n in moved.items()),
        f"compiled in {found['compile_seconds']} s",
    ]


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "training config file, with :argument where it takes one")
    flags.DEFINE_string("topology", None, f"cpu:N, or a slice such as {', '.join(TOPOLOGIES[:4])}")
    flags.DEFINE_enum("program", "train", list(PROGRAMS), "what to compile")
    flags.DEFINE_bool("suggest", False, "where it does not fit, look for a setting that does")
    flags.DEFINE_bool("json", False, "print one JSON object last")


def main(args: flags.FlagValues) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # there is nothing to save
        signal.signal(number, signal.SIG_DFL)
    config = args.config
    check(config)
    jax.config.update("jax_enable_compilation_cache", False)  # or compile_seconds would be those of a look-up
    mesh = meshes.make_mesh(**config.mesh, devices=devices_of(args.topology))
    limit = chip_limit(mesh)
    automatic = args.program == "train" and config.remat == "auto"
    for remat in AUTOMATIC_REMAT if automatic else [config.remat]:
        config.remat = remat
        found = measure(PROGRAMS[args.program](config, mesh), limit, beside(config, args.program, mesh))
        if found["fits"]:
            break
    shape = " x ".join(f"{name} {size}" for name, size in found["mesh"].items())
    if args.program == "train":
        tokens = config.batch.rows * config.data.length
        about = f"{config.batch.rows} rows of {config.data.length} tokens"
    else:
        tokens = config.evaluation.batch_size or _ROWS
        about = f"{tokens} answers at once, each with room for the longest"
    print(f"{config.model} on {args.topology}, {mesh.size} chips ({shape}), {about}")
    if found["mesh"] != dict(mesh.shape):
        print(
            "this mesh is sampling's own: on the config's, weights not cut along fsdp take over half of a chip's room"
        )
    if automatic:
        print(f"config.remat auto: {config.remat}")
    print("\n".join(report(found, args.program, tokens)), flush=True)
    if args.suggest and not found["fits"]:
        found["suggestion"] = suggest(config, args.program, mesh, found)
        if found["suggestion"]:
            print(f"nearest that fits: {as_flags(found['suggestion'])}")
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    command_line.run(main, define_flags, required=("config", "topology"))
