"""Optimizers and learning-rate schedules by name.

Promises: what changes from step to step (learning rate, schedule, starting weights) is handed to every update and never
built in, so that runs that differ in it alone share one compiled step.  Stacked layers `[layers, in, out]` are as many
matrices.  The parameters are always what is to be evaluated and saved; `gradient_point` says where the gradient is due.
Does not know about models; parameters are told apart by their path.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from robust_mo.errors import InputError
from robust_mo.training.groups import Group, factors, norms, whole_norm
from robust_mo.training.soap import SoapState, soap, state_shardings
from robust_mo.training.weight_decay import WeightDecay

# --- directions: gradient -> what the parameters move against, before decay and learning rate


def _adam(b1, b2, eps, moment_dtype):
    """arXiv 1412.6980."""
    return optax.scale_by_adam(b1, b2, eps, mu_dtype=moment_dtype)


def _adafactor(decay_rate, clipping_threshold, parameter_scale):
    """arXiv 1804.04235: no first moment; parameter_scale makes steps relative to the size of what they change."""
    steps = [optax.scale_by_factored_rms(decay_rate=decay_rate), optax.clip_by_block_rms(clipping_threshold)]
    inner = optax.chain(*steps, *[optax.scale_by_param_block_rms()] * parameter_scale)

    # optax keeps its means in the parameters' dtype, and in bfloat16 they would stand still after some hundred steps.
    def wide(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    one = optax.GradientTransformation(
        lambda params: inner.init(wide(params)),
        lambda gradient, state, params: inner.update(wide(gradient), state, wide(params)),
    )
    # Its means are those of a matrix, not of the stack.
    each = optax.GradientTransformation(jax.vmap(one.init), jax.vmap(one.update))
    return optax.partition({True: each, False: one}, _map_paths(lambda names: names[0] == "layers"))


def _lion(b1, b2, moment_dtype):
    """arXiv 2302.06675."""
    return optax.scale_by_lion(b1, b2, moment_dtype)


def _sgd(momentum, nesterov, moment_dtype):
    return optax.trace(momentum, nesterov, moment_dtype)


def _muon(momentum, nesterov, iterations, rms, b1, b2, eps, moment_dtype):
    """Momentum made orthogonal by Newton-Schulz (K. Jordan's Muon), for kernels and adapters; the rest by Adam.

    Elements of its direction have the root mean square `rms`, so that one learning rate suits both (arXiv 2502.16982).
    """

    def axes(tree):
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), tree)

    orthogonal = optax.contrib.scale_by_muon(
        ns_steps=iterations, beta=momentum, nesterov=nesterov, mu_dtype=moment_dtype, weight_dimension_numbers=axes
    )
    scale = optax.stateless_with_tree_map(lambda u, _: u * rms * max(u.shape[-2:]) ** 0.5)
    return optax.partition(
        {True: optax.chain(orthogonal, scale), False: _adam(b1, b2, eps, moment_dtype)},
        _map_paths(lambda names: names[-1] in ("kernel", "a", "b")),
    )


def _schedule_free(b1, b2, eps):
    """arXiv 2405.15682 around Adam without its first moment; `b1` is the averaging's, see `_averaged`."""
    return optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True)


def _map_paths(function: Callable):
    """tree -> tree of function(names on the path to the leaf)"""
    return lambda tree: jax.tree.map_with_path(lambda keys, _: function([key.key for key in keys]), tree)


def _soap(
    b1,
    b2,
    shampoo_beta,
    eps,
    frequency,
    longest_side,
    one_sided_ratio,
    refresh,
    precision,
    first_basis,
    moment_dtype,
    places,
):
    """arXiv 2409.11321, see training/soap.py; a shampoo_beta or one_sided_ratio of 0 stands for None there.

    Decay is training/weight_decay.py's, as of every optimizer: so it pulls at the first gradient too, which else moves
    nothing, and at the weights before the step, not after it.
    """
    transformation = soap(
        1.0,
        b1=b1,
        b2=b2,
        shampoo_beta=shampoo_beta or None,
        eps=eps,
        precondition_frequency=frequency,
        max_precondition_dim=longest_side,
        one_sided_ratio=one_sided_ratio or None,
        refresh=refresh,
        precision=precision,
        first_basis=first_basis,
        mu_dtype=moment_dtype,
        places=places,
    )
    return optax.chain(transformation, optax.scale(-1.0))


# What the post's factors and their rivals ask for; a line here and a group in configs/default.py add another of optax's
# that needs gradients alone.  optax's sophia estimates a Hessian: by default from forward derivatives of the gradient,
# which what training/loss.py and the attention kernels say of their backward passes has none of; its other estimator
# wants a second gradient, of labels that the model draws, which no step here takes.
OPTIMIZERS = {
    "adamw": _adam,  # as "adam": which of the two it is, the decay says
    "adam": _adam,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
    "schedule_free": _schedule_free,
    "sgd": _sgd,
    "soap": _soap,
}


# --- from a direction to an optimizer


@dataclasses.dataclass(frozen=True, eq=False)  # told apart by identity, since `make_optimizer` keeps what it has made
class Optimizer:
    """An optax transformation for every learning rate.

    Attributes:
      groups: of the parameters.
      at: (learning rate at the peak, share of it in this step, parameters before the first step) -> transformation.
      rounding: of parameters in bfloat16 after a step, one of ROUNDINGS.
    """

    groups: tuple[Group, ...]
    at: Callable[..., optax.GradientTransformation]
    rounding: str = "nearest"

    def init(self, params):
        return self.at(0.0, 0.0, None).init(params)

    def update(self, gradient, state, params, *, learning_rate, share, start):
        """(update to be added to `params`, new state).

        Args:
          gradient: taken at `gradient_point(state, params)`.
          learning_rate: float32 scalar, the peak.
          share: float32 scalar, the share of it in this step.
          start: the parameters before the first step; None where the decay is not to them.
        """
        return self.at(learning_rate, share, start).update(gradient, state, params)

    def added(self, params, updates, step):
        """The parameters after a step.

        Args:
          step: int32 scalar, from which the random numbers of stochastic rounding are made.
        """
        if self.rounding == "nearest":
            return optax.apply_updates(params, updates)
        leaves, outline = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), len(leaves))
        sums = (
            p.astype(jnp.float32) + u.astype(jnp.float32)
            for p, u in zip(leaves, outline.flatten_up_to(updates), strict=True)
        )
        return outline.unflatten(map(_rounded_at_random, sums, keys))


ROUNDINGS = ("nearest", "stochastic")


def _rounded_at_random(x, key):
    """float32 to bfloat16: to one of the two neighbours, each the more probable the nearer it is, so that the mean is x
    (arXiv 2010.06192).  What is smaller than half a last bit then adds up, where rounding to the nearest would lose it.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jax.random.bits(key, x.shape, jnp.uint16)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


@functools.lru_cache  # equal settings give one object, so that the compiled step is found again
def make_optimizer(
    name: str,
    *,
    groups: tuple[Group, ...],
    decay: WeightDecay,
    clip_norm: float,
    moment_dtype: str,
    rounding: str,
    places: tuple[NamedSharding, ...] | None,
    **settings,
) -> Optimizer:
    """The optimizer `name`, behind clipping of the whole gradient to `clip_norm` (0: no clipping).

    Args:
      places: of the parameters, in the order of their leaves, for soap, which cuts its state over their devices; None
        for a single one.
      moment_dtype: in which the first moment is kept; "" for the parameters' own, or SOAP's.
      rounding: of parameters in bfloat16, one of ROUNDINGS.
      settings: what the optimizer takes, see OPTIMIZERS.

    Raises:
      InputError: unknown name, dtype or rounding, or settings that are not its own.
    """
    if name not in OPTIMIZERS:
        raise InputError(f"config.optimizer.name is {name!r}: choose from {', '.join(sorted(OPTIMIZERS))}")
    own = set(inspect.signature(OPTIMIZERS[name]).parameters)
    if moment_dtype not in ("", "float32", "bfloat16"):
        raise InputError(f"config.optimizer.moment_dtype is {moment_dtype!r}: choose float32, bfloat16 or ''")
    if rounding not in ROUNDINGS:
        raise InputError(f"config.optimizer.rounding is {rounding!r}: choose from {', '.join(ROUNDINGS)}")
    if "moment_dtype" in own:
        settings["moment_dtype"] = moment_dtype or None
    elif moment_dtype:
        raise InputError(f"config.optimizer.moment_dtype is {moment_dtype!r}, but {name} takes none: give ''")
    if "places" in own:
        settings["places"] = places
    if wrong := own ^ set(settings):
        raise InputError(
            f"config.optimizer: {name} takes {', '.join(sorted(own - {'places'}))}; look at {', '.join(sorted(wrong))}"
        )
    direction = OPTIMIZERS[name](**settings)

    def at(learning_rate, share, start):
        rate = learning_rate * share
        inner = decay.around(direction, _step_size(rate, groups), groups=groups, share=share, start=start)
        if clip_norm:
            inner = optax.chain(_clip(clip_norm, groups), inner)
        return _averaged(inner, rate, settings["b1"]) if name == "schedule_free" else inner

    return Optimizer(groups, at, rounding)


def _step_size(rate, groups: tuple[Group, ...]) -> optax.GradientTransformation:
    """Times minus the learning rate, times each group's factor on it."""

    def update(updates, state, params):
        return jax.tree.map(lambda u, f: -rate * f * u, updates, factors(groups, params, "learning_rate")), state

    return optax.GradientTransformation(optax.init_empty_state, update)


class ClipState(NamedTuple):
    """How many steps there were, and how many were clipped; int32 scalars."""

    steps: jax.Array
    clipped: jax.Array

    def health(self) -> dict[str, jax.Array]:
        return {"clipped_steps": self.clipped / jnp.maximum(self.steps, 1)}


def _clip(largest: float, groups: tuple[Group, ...]) -> optax.GradientTransformation:
    """Scales the gradient down where its norm is above `largest`."""

    def init(params):
        return ClipState(jnp.int32(0), jnp.int32(0))

    def update(gradient, state, params):
        norm = whole_norm(norms(groups, gradient))
        above = norm > largest
        scale = jnp.where(above, largest / norm, 1.0)
        clipped = jax.tree.map(lambda g: (scale * g).astype(g.dtype), gradient)
        return clipped, ClipState(state.steps + 1, state.clipped + above)

    return optax.GradientTransformation(init, update)


def _averaged(inner: optax.GradientTransformation, rate, b1: float) -> optax.GradientTransformation:
    """optax's schedule_free with the average as the parameters; there they are the point of the gradient."""
    if not 0 < b1 < 1:
        raise InputError(f"config.optimizer.schedule_free.b1 is {b1}: give a number above 0 and below 1")
    free = optax.contrib.schedule_free(inner, rate, b1)

    def init(params):
        if any(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(params)):
            raise InputError("schedule_free averages over all steps: it needs config.param_dtype float32")
        return free.init(params)

    def update(gradient, state, average):
        point = gradient_point(state, average)
        updates, state = free.update(gradient, state, point)
        new = optax.contrib.schedule_free_eval_params(state, optax.apply_updates(point, updates))
        return jax.tree.map(jnp.subtract, new, average), state

    return optax.GradientTransformation(init, update)


def gradient_point(optimizer_state, params):
    """Where the gradient of the next step is to be taken: the parameters, but for schedule_free."""
    if not isinstance(optimizer_state, optax.contrib.ScheduleFreeState):
        return params
    b1 = optimizer_state.b1
    return jax.tree.map(lambda x, z: b1 * x + (1 - b1) * z, params, optimizer_state.z)


def placed_like(trainable, optimizer_state, mesh):
    """The shapes of an optimizer's state with the places where `init` puts it: SOAP's by a rule of its own, any other's
    beside the parameter at the same place, as `zeros_like` does, and counts on every device.  So the step that is
    compiled for these shapes is the one that runs.

    Args:
      trainable: shapes and shardings of what is trained.
    """
    parameters = dict(jax.tree.leaves_with_path(trainable))

    def place(path, leaf):
        if isinstance(leaf, SoapState):
            return jax.tree.map(
                lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                leaf,
                state_shardings(leaf, mesh),
            )
        tails = (parameters.get(path[start:]) for start in range(len(path)))
        parameter = next((found for found in tails if found is not None), None)
        if parameter is None or parameter.shape != leaf.shape:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=parameter.sharding)

    return jax.tree.map_with_path(place, optimizer_state, is_leaf=lambda part: isinstance(part, SoapState))


def health(optimizer_state) -> dict[str, jax.Array]:
    """What the parts of the state say of themselves: each may have a method health() -> name -> scalar."""
    parts = jax.tree.leaves(optimizer_state, is_leaf=lambda part: hasattr(part, "health"))
    return {name: value for part in parts if hasattr(part, "health") for name, value in part.health().items()}


def notes(optimizer_state) -> list[str]:
    """What a user should know before the first step: the parts of the state may have a method note()."""
    parts = jax.tree.leaves(optimizer_state, is_leaf=lambda part: hasattr(part, "note"))
    return [text for part in parts if hasattr(part, "note") and (text := part.note())]


# --- schedules: (warm-up steps, steps, steps of the final descent) -> share of the peak at a step


def _constant(warmup, steps, descent):
    return optax.warmup_constant_schedule(0.0, 1.0, warmup) if warmup else optax.constant_schedule(1.0)


def _cosine(warmup, steps, descent):
    return optax.warmup_cosine_decay_schedule(0.0 if warmup else 1.0, 1.0, warmup, max(steps, warmup + 1))


def _linear(warmup, steps, descent):
    return _warmup_stable_decay(warmup, steps, steps - warmup)


def _warmup_stable_decay(warmup, steps, descent):
    up, down = optax.linear_schedule(0.0, 1.0, max(warmup, 1)), optax.linear_schedule(1.0, 0.0, max(descent, 1))
    return optax.join_schedules([up, optax.constant_schedule(1.0), down], [warmup, max(steps - descent, warmup)])


SCHEDULES = {
    "constant": _constant,
    "cosine": _cosine,
    "linear": _linear,
    "warmup_stable_decay": _warmup_stable_decay,
}


def make_schedule(name: str, *, warmup: float, descent: float, steps: int) -> optax.Schedule:
    """Share of the peak learning rate as a function of the step, counted from 1.

    Args:
      warmup: share of `steps` over which it climbs linearly from 0.
      descent: warmup_stable_decay alone (arXiv 2405.18392): share of `steps` at the end over which it falls linearly.
      steps: length of the run; all but constant reach 0 there.

    Raises:
      InputError: unknown name, or a share outside [0, 1).
    """
    if name not in SCHEDULES:
        raise InputError(f"config.schedule.name is {name!r}: choose from {', '.join(sorted(SCHEDULES))}")
    if not 0 <= warmup < 1:
        raise InputError(f"config.schedule.warmup is {warmup}: give a share of the run, at least 0 and below 1")
    most = 1 - warmup if name == "warmup_stable_decay" else 1
    if not 0 < descent <= most + 1e-9:  # 1 - 0.8 is less than 0.2
        raise InputError(f"config.schedule.descent is {descent}: give a share above 0 and at most {most:g}")
    climb = min(round(warmup * steps), steps - 1)  # rounded apart the two may be a step longer than the run
    return SCHEDULES[name](climb, steps, min(max(1, round(descent * steps)), steps - climb))
