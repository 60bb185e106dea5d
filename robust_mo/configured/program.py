"""What a run's config says of the program that trains: its optimizer, its step, how much of a device it needs."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from robust_mo import hosts
from robust_mo.analysis import budget
from robust_mo.configured.data import asking
from robust_mo.model import hugging_face
from robust_mo.model import mesh as meshes
from robust_mo.model.llama import AUTOMATIC_REMAT, Llama, LlamaConfig
from robust_mo.training import models
from robust_mo.training.groups import check_groups, make_groups, paths
from robust_mo.training.memory import held, needed
from robust_mo.training.optimizers import OPTIMIZERS, make_optimizer, placed_like
from robust_mo.training.step import TrainState, train_step
from robust_mo.training.weight_decay import WeightDecay


def budget_shape(model: LlamaConfig, compute_dtype: str) -> budget.Shape:
    """What a model's shapes cost."""
    return budget.Shape(
        model.product_parameters,
        model.num_hidden_layers,
        model.num_attention_heads * model.head_dim,
        jnp.dtype(compute_dtype).itemsize,
    )


def optimizer_settings(optimizer: ConfigDict) -> tuple[dict, dict]:
    """(what all optimizers take, what the chosen one takes beside) of config.optimizer."""
    common = {name: value for name, value in optimizer.items() if not isinstance(value, ConfigDict)}
    chosen = optimizer.name if optimizer.name in OPTIMIZERS and optimizer.name in optimizer else None
    return common, optimizer[chosen].to_dict() if chosen else {}


def optimizer_of(config: ConfigDict, trainable):
    """The optimizer of a config; its learning rate comes with every step.

    Args:
      trainable: shapes and shardings of what is trained; None where it is not going to be used.

    Raises:
      InputError: something in config.optimizer, config.weight_decay or config.groups cannot be used.
    """
    common, own = optimizer_settings(config.optimizer)
    del common["learning_rate"]
    spec = models.lora_spec(config.lora)
    decay = WeightDecay(**config.weight_decay, scale=spec.scale if spec else None)
    places = None if trainable is None else tuple(leaf.sharding for leaf in jax.tree.leaves(trainable))
    return make_optimizer(**common, **own, groups=make_groups(config.groups), decay=decay, places=places)


def optimizer_on(config: ConfigDict, llama: Llama, trainable):
    """(the optimizer of a config, shapes of its state) for a model of which `trainable` is trained.

    Args:
      trainable: shapes and shardings.

    Raises:
      InputError: as of `optimizer_of`; or the rules of config.groups do not fit the model, or the optimizer refuses it.
    """
    optimizer = optimizer_of(config, trainable)
    check_groups(optimizer.groups, models.parameter_paths(llama), paths(trainable))
    return optimizer, jax.eval_shape(optimizer.init, trainable)


def keeps_start(config: ConfigDict) -> bool:
    """Whether the step needs what is trained as it was before the first step."""
    return config.distance_from_start or config.weight_decay.kind == "to_start"


def step_program(config: ConfigDict, shapes: LlamaConfig, mesh, remat: str):
    """(function, arguments, static arguments) of the training step, the arguments as shapes on the mesh."""
    spec = models.lora_spec(config.lora)
    llama = hugging_face.build(shapes, spec, config.compute_dtype, config.param_dtype, remat)
    trainable = models.abstract_trainable(llama, mesh)
    optimizer, state = optimizer_on(config, llama, trainable)
    rows = {
        name: jax.ShapeDtypeStruct((config.batch.rows, config.data.length), dtype, sharding=meshes.batch_sharding(mesh))
        for name, dtype in {
            **dict.fromkeys(("tokens", "targets", "positions", "segments"), jnp.int32),
            "loss_mask": bool,
        }.items()
    }
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=meshes.replicated(mesh))
    arguments = (
        TrainState(step, trainable, placed_like(trainable, state, mesh)),
        None if spec is None else models.abstract(llama.clone(param_dtype=llama.compute_dtype), mesh, "params"),
        trainable if keeps_start(config) else None,
        rows,
        *[jax.ShapeDtypeStruct((), jnp.float32)] * 2,
    )
    settings = dict(model=llama, optimizer=optimizer, chunk=config.loss_chunk, micro_batches=config.batch.micro_batches)
    return train_step, arguments, settings


def choose_remat(config: ConfigDict, shapes: LlamaConfig, mesh) -> str:
    """What config.remat names; for "auto" the first of AUTOMATIC_REMAT with which the step fits the devices."""
    if config.remat != "auto":
        return config.remat
    limit = meshes.memory_limit()
    if limit is None:
        return "matmuls"  # a CPU: the fastest there
    if "judge" in asking(config):
        limit -= judge_held(config, hugging_face.read_config(models.base_folder(config.evals.judge.model)), mesh)
    for policy in AUTOMATIC_REMAT:
        function, arguments, settings = step_program(config, shapes, mesh, policy)
        with meshes.in_force(mesh):
            need = needed(function.lower(*arguments, **settings), arguments)
        fits = hosts.agreed(not need.refused and need.total <= limit)
        told = "fits" if fits else "does not fit"
        print(f"remat {policy}: {need.total / 2**30:.2f} of {limit / 2**30:.2f} GiB a device, {told}", flush=True)
        if fits:
            break
    return policy


def judge_held(config: ConfigDict, shapes: LlamaConfig, mesh) -> int:
    """Bytes of a device that a judge of these shapes takes, which stays loaded from the first measurement on."""
    judge = hugging_face.build(shapes, None, config.compute_dtype, config.compute_dtype, "none")
    return held(models.abstract(judge, mesh, "params"))
