"""Optimizers and learning-rate schedules by name.

Promises: an optimizer is an optax.GradientTransformation whose learning rate is not built in but set in its state
before every step (`set_learning_rate`), so that runs that differ in it alone share one compiled step.
Does not know about models; parameters are told apart by the last word of their path.
"""

import functools
import inspect

import jax
import optax

from robust_mo.errors import InputError

# Only matrices of projections and adapters decay: norms and embeddings do not.
_DECAYED = ("kernel", "a", "b")


def _decay_mask(params):
    return jax.tree.map_with_path(lambda path, _: path[-1].key in _DECAYED, params)


def _adamw(b1, b2, eps, weight_decay):
    return optax.inject_hyperparams(optax.adamw, static_args=("b1", "b2", "eps", "weight_decay", "mask"))(
        learning_rate=0.0, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=_decay_mask
    )


OPTIMIZERS = {"adamw": _adamw}


@functools.lru_cache  # equal settings give one object, so that the compiled step is found again
def make_optimizer(name: str, *, clip_norm: float, **settings) -> optax.GradientTransformation:
    """The optimizer `name`, behind clipping of the whole gradient to `clip_norm` (0: no clipping).

    Args:
      settings: what the optimizer takes; adamw: b1, b2, eps, weight_decay (decoupled, times the learning rate).

    Raises:
      InputError: unknown name, or settings that are not its own.
    """
    if name not in OPTIMIZERS:
        raise InputError(f"config.optimizer.name is {name!r}: choose from {', '.join(sorted(OPTIMIZERS))}")
    own = set(inspect.signature(OPTIMIZERS[name]).parameters)
    if wrong := own ^ set(settings):
        raise InputError(f"config.optimizer: {name} takes {', '.join(sorted(own))}; look at {', '.join(sorted(wrong))}")
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    return optax.chain(clip, OPTIMIZERS[name](**settings))


def set_learning_rate(optimizer_state, learning_rate):
    """The state of an optimizer of `make_optimizer` with its learning rate replaced."""
    clip, inner = optimizer_state
    return clip, inner._replace(hyperparams={**inner.hyperparams, "learning_rate": learning_rate})


def _constant(peak, warmup, steps):
    return optax.warmup_constant_schedule(0.0, peak, warmup) if warmup else optax.constant_schedule(peak)


def _cosine(peak, warmup, steps):
    return optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, max(steps, warmup + 1))


def _linear(peak, warmup, steps):
    down = optax.linear_schedule(peak, 0.0, max(steps - warmup, 1))
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), down], [warmup])


SCHEDULES = {"constant": _constant, "cosine": _cosine, "linear": _linear}


def make_schedule(name: str, *, learning_rate: float, warmup: float, steps: int) -> optax.Schedule:
    """Learning rate as a function of the step, counted from 1.

    Args:
      learning_rate: the peak.
      warmup: share of `steps` over which the rate climbs linearly from 0.
      steps: length of the run; cosine and linear reach 0 there.

    Raises:
      InputError: unknown name, or a share outside [0, 1).
    """
    if name not in SCHEDULES:
        raise InputError(f"config.schedule.name is {name!r}: choose from {', '.join(sorted(SCHEDULES))}")
    if not 0 <= warmup < 1:
        raise InputError(f"config.schedule.warmup is {warmup}: give a share of the run, at least 0 and below 1")
    return SCHEDULES[name](learning_rate, round(warmup * steps), steps)
