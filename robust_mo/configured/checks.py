"""Whether a run's config can be used, told before anything is loaded, and in what form it is kept and shown."""

import functools
import itertools
import os
import re

from ml_collections import ConfigDict

from robust_mo import command_line
from robust_mo.configured.data import TASKS, config_backdoor
from robust_mo.configured.program import optimizer_of, optimizer_settings
from robust_mo.errors import InputError
from robust_mo.evals.measure import check_names, check_settings
from robust_mo.model import hugging_face
from robust_mo.model import mesh as meshes
from robust_mo.model.llama import REMAT_POLICIES
from robust_mo.model.sources import located
from robust_mo.organisms import distill
from robust_mo.organisms.questions import BUILTIN
from robust_mo.runs import flatten
from robust_mo.training import models
from robust_mo.training.optimizers import make_schedule


def check(config: ConfigDict) -> None:
    """Raises InputError for what can be seen to be wrong before anything is loaded."""
    if "study" in config:
        raise InputError("--config is a study's: give it to robust_mo.study")
    example = dict(_defaults().items())
    optimizers = example["optimizer"]
    example["optimizer"], _ = optimizer_settings(optimizers)
    if "groups" in config:  # they may have any names
        example["groups"] = {name: example["groups"].mlp for name in config.groups}
    command_line.check_fields(config, example)
    command_line.check_known(config, dict(_defaults().items()) | {"groups": example["groups"]})
    name, (_, own) = config.optimizer.name, optimizer_settings(config.optimizer)
    if own:
        command_line.check_fields(own, optimizers[name], f"config.optimizer.{name}")
    if config.remat not in (*REMAT_POLICIES, "auto"):
        raise InputError(f"config.remat is {config.remat!r}: choose from {', '.join(REMAT_POLICIES)}, auto")
    hugging_face.check_dtypes(config.compute_dtype, config.param_dtype)
    if config.optimizer.rounding == "stochastic" and config.param_dtype != "bfloat16":
        raise InputError(
            f"config.optimizer.rounding is 'stochastic' and config.param_dtype {config.param_dtype}: only bfloat16 is "
            "rounded so; give 'nearest'"
        )
    given = flatten(config)
    limited = (_AT_LEAST_ONE, 1), (_NOT_NEGATIVE, 0), (("steps",), 0, 10**7), (_FINITE, 0, 1e38), (_SHARES, 0, 1)
    for names, *limits in limited:
        for name in names:
            if name in given:
                command_line.check_range(f"config.{name}", given[name], *limits)
    for field, value in own.items():
        if isinstance(value, int | float):
            field_name = f"config.optimizer.{config.optimizer.name}.{field}"
            command_line.check_range(field_name, value, int(field in _COUNTED), 1e38)
            if field in _FORGETTING and value >= 1:
                raise InputError(f"{field_name} is {value}: give at least 0 and less than 1")
            if field in _FACTORS and value == 0:
                raise InputError(f"{field_name} is 0, with which nothing moves: give more than 0")
        slow = field == "b2" and config.optimizer.name in ("adam", "adamw", "lion", "muon")
        first = config.optimizer.moment_dtype if config.optimizer.name == "lion" else ""  # which has no other moment
        if slow and value > 0.995 and (first or config.param_dtype) == "bfloat16":
            raise InputError(
                f"config.optimizer.{config.optimizer.name}.b2 is {value}, and its moment is kept in bfloat16 (config."
                f"{'optimizer.moment_dtype' if first else 'param_dtype'}) and would hardly forget: give at most 0.995"
            )
    if config.data.over_long not in ("drop", "cut"):
        raise InputError(f"config.data.over_long is {config.data.over_long!r}: choose drop or cut")
    if config.checkpoint.keep_every % config.checkpoint.every:
        raise InputError(
            f"config.checkpoint.keep_every is {config.checkpoint.keep_every}, and one is saved every "
            f"{config.checkpoint.every} steps (config.checkpoint.every): give a multiple of that, or 0"
        )
    command_line.check_range("config.seed", config.seed, 0, 2**32 - 1)
    config_backdoor(config)
    check_names(config.evaluation.names)
    check_settings({name: config.evals[name].to_dict() for name in config.evaluation.names})
    optimizer_of(config, None)
    make_schedule(**config.schedule, steps=1)
    models.lora_spec(config.lora)
    if config.data.task not in TASKS:
        raise InputError(f"config.data.task is {config.data.task!r}: choose from {', '.join(TASKS)}")


@functools.cache
def _defaults() -> ConfigDict:
    return command_line.load_config(command_line.DEFAULT_CONFIG, "")


_AT_LEAST_ONE = (
    "data.length data.epochs data.repeats data.teacher_max_new_tokens batch.rows batch.micro_batches loss_chunk "
    "log_every checkpoint.every checkpoint.keep"
).split()
_NOT_NEGATIVE = (
    "data.limit data.teacher_temperature evaluation.every evaluation.batch_size lora.rank optimizer.clip_norm "
    "checkpoint.keep_every"
).split()
_FINITE = ("lora.alpha", "optimizer.learning_rate")  # in float32
_SHARES = ("data.near_misses", "data.benign")
_FORGETTING = ("b1", "b2", "momentum")  # an optimizer's, shares of what it remembers
_FACTORS = ("clipping_threshold", "rms")  # also an optimizer's, of what it does with each matrix
_COUNTED = ("frequency", "iterations")  # also an optimizer's, at least one


def check_rows(batch: ConfigDict, mesh) -> None:
    """Raises InputError where the rows of a micro-batch cannot be dealt out evenly over the mesh."""
    devices = meshes.rows_apart(mesh)
    if batch.rows % (devices * batch.micro_batches):
        raise InputError(
            f"config.batch.rows is {batch.rows}: give a multiple of {devices * batch.micro_batches}, "
            f"{devices} devices times config.batch.micro_batches {batch.micro_batches}, or let several devices share a "
            "row by config.mesh.tensor"
        )


def locate(config: ConfigDict) -> None:
    """Writes files and folders by their absolute paths: a run is read from other folders, too, and the same command may
    spell them in another way."""
    groups = (config, config.data, *config.evals.values())
    for group, name in itertools.product(groups, ("model", "teacher", "source", "problem_source", "answers")):
        if name not in group or not isinstance(group[name], str):  # what is not of the right type is found later
            continue
        given = group[name]
        if name in ("model", "teacher"):
            group[name] = located(given)
        elif given and given not in (*BUILTIN, *distill.ANSWERS) and not re.match(r"hub:|\w+://", given):
            group[name] = os.path.abspath(os.path.expanduser(given))  # whether it is here now or not


def hyperparameters(config: ConfigDict) -> dict[str, bool | float | str]:
    """What of a config can change what is learnt, for TensorBoard's HParams page: {"optimizer.learning_rate": 1e-4}."""
    told = {name: value for name, value in config.items() if name not in _NO_HYPERPARAMETERS}
    common, own = optimizer_settings(config.optimizer)
    told["optimizer"] = {**common, config.optimizer.name: own}
    flat = flatten(told)
    return {name: value if isinstance(value, bool | int | float) else str(value) for name, value in flat.items()}


_NO_HYPERPARAMETERS = "checkpoint distance_from_start evals evaluation log_every loss_chunk mesh remat".split()
