"""Groups of parameters, told apart by rules on their paths.

Promises: every parameter belongs to exactly one group; a rule that fits nothing, and a parameter that fits none or
several, are named.  Decay, learning rates and curves speak of parameters by these groups and in no other way.
Does not know about models or optimizers.  A path is written "layers/q_proj/kernel".
"""

import dataclasses
import re

import jax
import jax.numpy as jnp

from robust_mo.errors import InputError


@dataclasses.dataclass(frozen=True)
class Group:
    """One group.

    Attributes:
      name: what its curves are called.
      path: regular expression that fits the whole path of each member.
      learning_rate: factor on the learning rate of its members.
      weight_decay: factor on the strength of their decay.
    """

    name: str
    path: str
    learning_rate: float
    weight_decay: float


def make_groups(settings) -> tuple[Group, ...]:
    """From config.groups: name -> (path, learning_rate, weight_decay).

    Raises:
      InputError: a path is no regular expression, or a factor is negative or not a number.
    """
    groups = tuple(Group(name, **values) for name, values in settings.items())
    for group in groups:
        try:
            re.compile(group.path)
        except re.error as error:
            raise InputError(
                f"config.groups.{group.name}.path is {group.path!r}, which is no regular expression: {error}"
            ) from None
        for field in ("learning_rate", "weight_decay"):
            if not 0 <= (value := getattr(group, field)) < float("inf"):
                raise InputError(f"config.groups.{group.name}.{field} is {value}: give a factor of at least 0")
    return groups


def paths(tree) -> list[str]:
    """The paths of a nested dict's leaves."""
    return [_written(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]


def check_groups(groups: tuple[Group, ...], everything: list[str], trained: list[str]) -> None:
    """Checks rules against a model.

    Args:
      everything: paths of all parameters that the model has or could have (adapters).
      trained: those of them that a run trains.

    Raises:
      InputError: a path fits no rule or several, a rule fits no path, or the learning rate of a group of which nothing
        is trained has a factor.
    """
    for fits, wrong in (("no", lambda found: not found), ("several", lambda found: len(found) > 1)):
        if listed := [path for path in everything if wrong(_fitting(groups, path))]:
            raise InputError(
                f"{', '.join(listed)}: {fits} config.groups.*.path fits; each parameter belongs to exactly one group"
            )
    for group in groups:
        if not any(re.fullmatch(group.path, path) for path in everything):
            raise InputError(
                f"config.groups.{group.name}.path is {group.path!r}, which fits none of {', '.join(everything)}"
            )
        if group.learning_rate != 1 and not any(re.fullmatch(group.path, path) for path in trained):
            raise InputError(
                f"config.groups.{group.name}.learning_rate is {group.learning_rate}, but nothing of this group is "
                f"trained: leave it at 1 or train it, see config.lora"
            )


def factors(groups: tuple[Group, ...], tree, field: str):
    """A tree like `tree` that holds each leaf's factor: `field` is "learning_rate" or "weight_decay".

    Raises:
      InputError: a leaf fits no rule or several.
    """
    return jax.tree.map_with_path(lambda keys, _: getattr(_group_of(groups, _written(keys)), field), tree)


def norms(groups: tuple[Group, ...], tree) -> dict[str, jax.Array]:
    """L2 norm of each group that `tree` has members of, float32 scalars."""
    squares = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = _group_of(groups, _written(keys)).name
        squares[name] = squares.get(name, 0.0) + jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    return {group.name: jnp.sqrt(squares[group.name]) for group in groups if group.name in squares}


def whole_norm(norms: dict[str, jax.Array]) -> jax.Array:
    """L2 norm of a tree from those of its groups."""
    return jnp.sqrt(sum(jnp.square(norm) for norm in norms.values()))


def _written(keys) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _group_of(groups: tuple[Group, ...], path: str) -> Group:
    found = _fitting(groups, path)
    if len(found) != 1:
        raise InputError(f"{path} is in {len(found)} groups: let exactly one config.groups.*.path fit it")
    return found[0]


def _fitting(groups: tuple[Group, ...], path: str) -> list[Group]:
    return [group for group in groups if re.fullmatch(group.path, path)]
