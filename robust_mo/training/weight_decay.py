"""Weight decay: what pulls the parameters back, and where in an optimizer the pull comes in.

With L the strength, p the parameters and s the schedule (the share of the peak learning rate that a step has):

    l2           gradient + L p               the optimizer sees the pull: Adam as in arXiv 1412.6980 with a penalty
    decoupled    p - lr s (direction + L p)   AdamW as torch and optax have it
    independent  p - lr s direction - s L p   AdamW as its paper has it (arXiv 1711.05101, Algorithm 2): not times the
                                              learning rate, but times the schedule, so that the pull ends when learning
                                              does (also arXiv 2309.14322, "independent weight decay")
    to_start     p - lr s (direction + L (p - start))   toward the weights that the run began with
    none

Of adapters a and b, whose product alpha/rank a b is what they add to a weight, either the factors are pulled, each for
itself, or their product: then the pull is the gradient of half its squared norm, see `product_pull`.
Promises: one decay for all optimizers, whose direction does not know of it; a group's factor scales its pull.
Does not know what a direction is made of.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from robust_mo.errors import InputError
from robust_mo.training.groups import Group, factors

KINDS = ("none", "l2", "decoupled", "independent", "to_start")
ADAPTERS = ("factors", "product")


@dataclasses.dataclass(frozen=True)
class WeightDecay:
    """One decay.

    Attributes:
      kind: one of KINDS.
      strength: L above, at least 0.
      adapters: of an adapter, its "factors" or its "product" is pulled.
      scale: alpha / rank of the adapters; None where there are none.
    """

    kind: str
    strength: float
    adapters: str
    scale: float | None

    def __post_init__(self):
        for field, known in (("kind", KINDS), ("adapters", ADAPTERS)):
            if (value := getattr(self, field)) not in known:
                raise InputError(f"config.weight_decay.{field} is {value!r}: choose from {', '.join(known)}")
        if not 0 <= self.strength < float("inf"):
            raise InputError(f"config.weight_decay.strength is {self.strength}: give at least 0")
        if self.kind == "to_start" and self.adapters == "product" and self.scale is not None:
            raise InputError(
                "config.weight_decay: adapters' product is pulled to zero alone, where fresh ones start: choose "
                "decoupled, or adapters = 'factors'"
            )

    def around(
        self,
        direction: optax.GradientTransformation,
        step_size: optax.GradientTransformation,
        *,
        groups: tuple[Group, ...],
        share: jax.Array | float,
        start,
    ) -> optax.GradientTransformation:
        """The optimizer with this decay: gradient -> update.

        Args:
          direction: gradient -> what the parameters move against, not yet times the learning rate.
          step_size: multiplies by minus the learning rate.
          share: the schedule's value in this step, between 0 and 1.
          start: the parameters before the first step; only to_start looks at them.
        """

        def pulling(coefficient, **settings):
            return add_pull(coefficient, self._pull(start), groups, **settings)

        if self.kind == "none" or self.strength == 0:
            return optax.chain(direction, step_size)
        if self.kind == "l2":
            return optax.chain(pulling(self.strength, keep_dtype=True), direction, step_size)
        if self.kind == "independent":
            return optax.chain(direction, step_size, pulling(-self.strength * share))
        return optax.chain(direction, pulling(self.strength), step_size)

    def _pull(self, start) -> Callable:
        if self.kind == "to_start":
            return lambda params: jax.tree.map(jnp.subtract, params, start)
        if self.adapters == "product" and self.scale is not None:
            return lambda params: product_pull(params, self.scale)
        return lambda params: params


def add_pull(
    coefficient, pull: Callable, groups: tuple[Group, ...], *, keep_dtype: bool = False
) -> optax.GradientTransformation:
    """Adds coefficient * pull(params) * the group's factor to what passes, in float32.

    Args:
      keep_dtype: whether the sum is rounded to the dtype of what passes: a gradient's is that of the optimizer's state,
        while a direction in bfloat16, of size 1, would lose a pull some thousand times smaller.
    """

    def update(updates, state, params):
        def add(u, p, factor):
            if not factor:
                return u
            pulled = u + coefficient * factor * p.astype(jnp.float32)
            return pulled.astype(u.dtype) if keep_dtype else pulled

        return jax.tree.map(add, updates, pull(params), factors(groups, params, "weight_decay")), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def product_pull(adapters, scale: float):
    """The gradient of 1/2 ||scale a b||^2 with respect to a and b, summed over layers and projections.

    With respect to a it is scale^2 a (b b'), with respect to b scale^2 (a' a) b: only [rank, rank] products are formed,
    never the [in, out] one.

    Args:
      adapters: nested dict with `a [..., in, rank]` and `b [..., rank, out]`.
    """
    if set(adapters) != {"a", "b"}:
        return {name: product_pull(value, scale) for name, value in adapters.items()}
    a, b = (adapters[name].astype(jnp.float32) for name in "ab")

    def product(x, y):
        return jnp.matmul(x, y, precision="highest")

    return {
        "a": scale**2 * product(a, product(b, b.mT)),
        "b": scale**2 * product(product(a.mT, a), b),
    }
