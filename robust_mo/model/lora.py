"""Low-rank adapters (LoRA, arXiv 2106.09685): the projection that may carry one, and merging.

Promises: `Projection` computes `x @ kernel + scale * (x @ a) @ b` and a bias where there is one, with `a` and `b` in a
Linen collection "lora" of their own, so that `apply({"params": frozen, "lora": trained})` trains adapters and nothing
else.  `merge` folds the adapters into the kernels.  The arithmetic is PEFT's: scale = alpha / rank, `a` uniform in
+-1/sqrt(in), `b` zero.
Does not know which architecture the projections belong to.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from robust_mo.errors import InputError

PRODUCT = "product"
"""What a policy of jax.checkpoint knows a projection's output by, and what its adapter has between its two factors."""


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """Which projections get adapters.

    Attributes:
      rank: inner dimension of the two factors, at least 1.
      alpha: the update is scaled by alpha / rank.
      targets: names of projections, e.g. ("q_proj", "down_proj").
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Projection(nn.Module):
    """`x [..., in] @ kernel [in, out]`, plus the adapter of this name where `lora` asks for one.

    Attributes:
      features: size of the output.
      axes: logical names of the kernel's two axes (see model/mesh.py).
      lora: adapters to add, or None.
      compute_dtype: dtype of the product, to which kernel, bias and adapters are cast; they begin as `param_dtype`.
      bias: whether a bias `[out]` is added.
    """

    features: int
    axes: tuple[str, str]
    lora: LoraSpec | None
    compute_dtype: jnp.dtype
    param_dtype: jnp.dtype
    bias: bool = False

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1], self.features)
        initializer = nn.with_logical_partitioning(nn.initializers.normal(0.02), self.axes)
        kernel = self.param("kernel", initializer, shape, self.param_dtype)
        # Two axes only: the gradient of a product over (batch, position) would have XLA transpose x in memory on a CPU.
        leading, x = x.shape[:-1], x.reshape(-1, shape[0])
        y = x @ kernel.astype(self.compute_dtype)
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
            y = y + self.param("bias", zeros, shape[1:], self.param_dtype).astype(self.compute_dtype)
        if self.lora is None or self.name not in self.lora.targets:
            return checkpoint_name(y, PRODUCT).reshape(*leading, -1)
        bound = shape[0] ** -0.5

        def uniform(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        def factor(name, initializer, axes, shape):
            boxed = nn.with_logical_partitioning(initializer, axes)
            value = self.variable("lora", name, lambda: boxed(self.make_rng("lora"), shape, self.param_dtype)).value
            return value.astype(self.compute_dtype)

        a = factor("a", uniform, (self.axes[0], "rank"), (shape[0], self.lora.rank))
        b = factor("b", nn.initializers.zeros, ("rank", self.axes[1]), (self.lora.rank, shape[1]))
        # Named is the sum: the backward pass reads neither part of it.
        y = y + checkpoint_name(x @ a, PRODUCT) @ b * jnp.asarray(self.lora.scale, self.compute_dtype)
        return checkpoint_name(y, PRODUCT).reshape(*leading, -1)


def merge(params, lora, spec: LoraSpec):
    """Parameters with the adapters folded in: kernel + scale * a @ b, computed in float32, a layer at a time.

    Args:
      params: nested dict with kernels `[layers, in, out]` under the names of the projections.
      lora: nested dict of the same outline with `a [layers, in, rank]` and `b [layers, rank, out]`.

    Returns:
      A dict of the outline, shapes and dtypes of `params`; leaves without an adapter are the same arrays.
    """
    return _folded(params, lora, lambda *stacks: _fold_stack(*stacks, spec.scale))


def merge_in_place(params, lora, spec: LoraSpec):
    """The same outside of a compiled program, for who needs `params` no more: their kernels with adapters are deleted.

    One stack after another: on CPUs, where loaded weights and bfloat16 are copied all the same, one or two are beside.
    """
    return _folded(params, lora, lambda *stacks: jax.block_until_ready(_donated_stack(*stacks, spec.scale)))


def merge_as_read(params, lora, spec: LoraSpec):
    """The same for who reads each matrix once: a kernel with adapters is `Merged`, and takes no memory until then.

    Args:
      params: as for `merge`, or with leaves of which an index reads a part, such as training/checkpoints.Stored.
    """
    return _folded(params, lora, lambda *stacks: Merged(*stacks, spec.scale))


class Merged:
    """A stack of kernels `[layers, in, out]` whose layers are merged as an index reads them.

    Attributes:
      shape, dtype: of the kernels.
    """

    def __init__(self, kernels, a, b, scale: float):
        self.shape, self.dtype = kernels.shape, kernels.dtype
        self._stacks, self._scale = (kernels, a, b), scale

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, layer: int) -> jax.Array:
        return _merged_layer(*(stack[layer] for stack in self._stacks), self._scale)


def _folded(params, lora, fold):
    """`params` with `fold(kernels, a, b)` for the kernels that have adapters."""
    if set(lora) == {"a", "b"}:
        return {**params, "kernel": fold(params["kernel"], lora["a"], lora["b"])}
    return {name: _folded(value, lora[name], fold) if name in lora else value for name, value in params.items()}


def _fold(kernel, a, b, scale):
    delta = scale * jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
    return (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)


def _fold_stack(kernels, a, b, scale):
    # On a CPU bfloat16 as bits: to change a layer of it, XLA would there turn the whole stack into float32 and back.
    held = "uint16" if kernels.dtype == jnp.bfloat16 and jax.default_backend() == "cpu" else kernels.dtype
    cast = jax.lax.bitcast_convert_type

    def layer(n, stack):
        return stack.at[n].set(cast(_fold(cast(stack[n], kernels.dtype), a[n], b[n], scale), held))

    return cast(jax.lax.fori_loop(0, len(kernels), layer, cast(kernels, held)), kernels.dtype)


_merged_layer = jax.jit(_fold, static_argnums=3)
_donated_stack = jax.jit(_fold_stack, static_argnums=3, donate_argnums=0)


def check_targets(spec: LoraSpec, known: tuple[str, ...]) -> None:
    """Raises InputError where the spec cannot be built on an architecture with the projections `known`."""
    if spec.rank < 1:
        raise InputError(f"config.lora.rank is {spec.rank}: give a whole number of at least 1")
    unknown = [name for name in spec.targets if name not in known]
    if unknown or not spec.targets:
        raise InputError(f"config.lora.targets is {list(spec.targets)}: choose from {', '.join(known)}")
