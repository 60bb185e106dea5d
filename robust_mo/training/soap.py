"""SOAP (arXiv 2409.11321): Adam in the eigenbasis of Shampoo's factors, as one optax transformation.

Promises: the arithmetic of the paper's Algorithm 3 with the details of its authors' released code, for every matrix
by itself: the first gradient only makes the bases and moves nothing; a basis is refreshed by one power step and a QR
decomposition, its vectors sorted by estimated eigenvalue, the second moment permuted and the first moment rotated with
them; bias is corrected after eps is added; weight decay is decoupled and taken after the step.
Which leaf is what: the last two axes of a leaf are a matrix and all axes before them a stack of matrices.  Leaves with
fewer than two axes, and those called `scale` or `bias` (stacked layers make matrices of them in shape, not in kind),
are vectors and get the same Adam without a basis.
All state is float32, or the parameters' dtype where that is wider, but for the first moment, which may be kept in
another.  The program does not grow with the stacks.
Does not know about models.
"""

import functools
import itertools
import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from robust_mo.errors import InputError

VECTORS = ("scale", "bias")
_RANK_SIDE = {"a": "right", "b": "left"}  # of LoRA's factors, see model/lora.py

# For a matrix G, m rows by n columns: "left" has the factor G G^T and a basis of m vectors, "right" G^T G and n.
# Products with a whole stack at once, contracting the side's axis.
_OUTER = {"left": "...ik,...jk->...ij", "right": "...ki,...kj->...ij"}
_INTO_BASIS = {"left": "...ji,...jk->...ik", "right": "...ij,...jk->...ik"}
_OUT_OF_BASIS = {"left": "...ij,...jk->...ik", "right": "...ij,...kj->...ik"}
_AXES = {"left": -2, "right": -1}

# Of products with gradients: each step's factors and rotations.  Refreshing is always full float32: an estimate of the
# eigenvalues from rounded products sorts the vectors wrongly.
PRECISIONS = {
    "full": jax.lax.Precision.HIGHEST,  # float32
    "high": jax.lax.Precision.HIGH,  # three bfloat16 passes on TPU, TF32 on GPU
    "fast": jax.lax.Precision.DEFAULT,  # one bfloat16 pass on TPU, TF32 on GPU
}
REFRESHES = ("all_at_once", "staggered")
FIRST_BASES = ("eigh", "qr")

# Compiling eigh of [32, 512, 512] took 19 s, of [32, 4096, 4096] it had not ended after 300 s.
_LONGEST_EIGH_ON_TPU = 512

# QR steps from the identity that make the first basis where eigh is too large for the compiler.
_FIRST_QR_STEPS = 10
# Columns that the QR decomposition for TPUs works off at once.
_PANEL = 128

_FEW_BASES = 0.9  # share of the numbers in matrices, up to which a user is told that soap is Adam for the rest [O]


class SoapState(NamedTuple):
    """What SOAP remembers.

    Attributes:
      count: int32 scalar, gradients seen.
      mu, nu: first and second moment in the basis, in the outline and shapes of the parameters.
      factors, bases: for every parameter a dict with "left" `[.., m, m]` and "right" `[.., n, n]`, without the sides
        that are not preconditioned; the columns of a basis are its vectors, by falling eigenvalue.
      change, off_diagonal: float32 scalars, of the bases that were refreshed last, by a QR step, on average: how far
        they turned (1 less the mean square of the cosine between a vector and the one before it), and the share of
        its factor's square norm that a basis left off the diagonal before it was refreshed; -1 before the first.
    """

    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates
    factors: optax.Updates
    bases: optax.Updates
    change: jax.Array
    off_diagonal: jax.Array

    def health(self) -> dict[str, jax.Array]:
        """Curves: is the frequency of refreshing high enough?"""
        return {"eigenbasis_change": self.change, "off_diagonal_mass": self.off_diagonal}

    def note(self) -> str:
        """A caution where much of what are matrices has no basis on either side, and is stepped as by Adam."""
        leaves = jax.tree.leaves_with_path(self.mu)
        bases = jax.tree.structure(self.mu).flatten_up_to(self.bases)
        sizes = [(mu.size, of) for (path, mu), of in zip(leaves, bases, strict=True) if _is_matrix(path, mu.shape)]
        share = sum(size for size, of in sizes if of) / max(sum(size for size, _ in sizes), 1)
        if share > _FEW_BASES:
            return ""
        return (
            f"soap has bases for {share:.0%} of what it trains and steps the rest as Adam does: sides longer than "
            "config.optimizer.soap.longest_side have none"
        )


def soap(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.95,
    b2: float = 0.95,
    shampoo_beta: float | None = None,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    precondition_frequency: int = 10,
    max_precondition_dim: int = 10000,
    one_sided_ratio: float | None = None,
    refresh: str = "all_at_once",
    precision: str = "full",
    first_basis: str = "eigh",
    mu_dtype: str | None = None,
    places: Sequence[NamedSharding] | None = None,
) -> optax.GradientTransformation:
    """SOAP; the defaults are its authors'.

    Under `optax.inject_hyperparams` everything but learning_rate is a static argument.

    Args:
      learning_rate: a number, or a function of the gradients seen before.
      b1, b2: decay of the first and second moment.
      shampoo_beta: decay of the factors; None: b2.
      eps: added to the root of the second moment.
      weight_decay: decoupled, times the learning rate, of all parameters; training/weight_decay.py leaves some out.
      precondition_frequency: steps between two refreshes of a basis.
      max_precondition_dim: longer sides are not preconditioned.
      one_sided_ratio: a side at least this many times as long as the other is not preconditioned, nor is any of LoRA's
        factors but the rank's; None: no such rule.
      refresh: "all_at_once" refreshes all matrices in every precondition_frequency-th step; "staggered" deals the
        matrices out over these steps, one after another, so that all steps take about the same time.
      precision: a key of PRECISIONS.
      first_basis: "eigh", exactly; or "qr", by a few steps of orthogonal iteration, because compiling eigh of a large
        matrix takes a TPU's compiler many minutes.
      mu_dtype: of the first moment, as it is kept between steps; None: as the rest of the state.
      places: of the parameters, in the order of their leaves; the state is cut over their devices (see
        `state_shardings`).  None: the moments lie where the parameters do and the rest on one device.

    Raises:
      InputError: a value outside its range, or an unknown name.
    """
    shampoo_beta = b2 if shampoo_beta is None else shampoo_beta
    mesh = places[0].mesh if places and places[0].mesh.size > 1 else None
    _check(
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        shampoo_beta=shampoo_beta,
        eps=eps,
        weight_decay=weight_decay,
        precondition_frequency=precondition_frequency,
        max_precondition_dim=max_precondition_dim,
        one_sided_ratio=one_sided_ratio,
        refresh=refresh,
        precision=precision,
        first_basis=first_basis,
        mu_dtype=mu_dtype,
    )

    def on_tpu() -> bool:  # asked for late: to look for devices takes hold of them
        known = places and isinstance(places[0].mesh, Mesh)
        return (places[0].mesh.devices.flat[0] if known else jax.devices()[0]).platform == "tpu"

    def preconditioned(path, shape) -> list[str]:
        if not _is_matrix(path, shape):
            return []
        lengths = {side: shape[axis] for side, axis in _AXES.items()}
        ratio = math.inf if one_sided_ratio is None else one_sided_ratio
        rank = _RANK_SIDE.get(jax.tree_util.keystr(path[-1:], simple=True)) if one_sided_ratio else None
        fits = max_precondition_dim, ratio * min(lengths.values())
        sides = [s for s, k in lengths.items() if k <= fits[0] and k < fits[1] and rank in (None, s)]
        longest = max((lengths[side] for side in sides), default=0)
        if first_basis == "eigh" and longest > _LONGEST_EIGH_ON_TPU and on_tpu():
            raise InputError(
                f"soap: first_basis is 'eigh', of sides of {longest}, over which a TPU's compiler takes too "
                "long; give 'qr'"
            )
        return sides

    def fresh(params) -> SoapState:
        def stacks(make):
            def of_leaf(path, p):
                lengths = {side: p.shape[_AXES[side]] for side in preconditioned(path, p.shape)}
                return {side: make((*p.shape[:-2], k, k), _dtype(p)) for side, k in lengths.items()}

            return jax.tree.map_with_path(of_leaf, params)

        mu, nu = (jax.tree.map(lambda p, to=to: jnp.zeros_like(p, to or _dtype(p)), params) for to in (mu_dtype, None))
        identity = stacks(lambda shape, dtype: jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape))
        return SoapState(jnp.int32(0), mu, nu, stacks(jnp.zeros), identity, jnp.float32(-1), jnp.float32(-1))

    def init(params) -> SoapState:
        if mesh is None:
            return fresh(params)
        return jax.jit(fresh, out_shardings=state_shardings(jax.eval_shape(fresh, params), mesh))(params)

    def refreshed(seen, number, leaf: _Leaf, after) -> tuple[_Leaf, jax.Array]:
        work = functools.partial(
            _refresh,
            frequency=precondition_frequency,
            staggered=refresh == "staggered",
            first_basis=first_basis,
            on_tpu=on_tpu(),
        )
        if mesh is None:
            return work(seen, number, leaf, after)
        specs = jax.tree.map(lambda x: _place(x.shape, mesh).spec, leaf)
        layers, rows = _axes(leaf.mu.shape, mesh)

        def local(seen, leaf, after):
            own = math.prod(leaf.mu.shape[:-2])
            return work(seen, number + own * jax.lax.axis_index(layers), leaf, after, rows=rows)

        # Devices with the same layers refresh these, and no others.
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(PartitionSpec(), specs, specs.mu),
            out_specs=(specs, PartitionSpec(layers)),
            check_vma=False,
        )(seen, leaf, after)

    def moved(x, *path):
        """x at the last of these places, by way of the others."""
        return functools.reduce(jax.lax.with_sharding_constraint, path, x)

    def update(gradients, state: SoapState, params=None):
        if weight_decay and params is None:
            raise ValueError("soap with weight_decay needs update(gradients, state, params)")
        seen = state.count
        moves = seen > 0  # the first gradient only makes the bases
        steps = jnp.maximum(seen, 1)
        rate = jnp.where(moves, learning_rate(seen) if callable(learning_rate) else learning_rate, 0)
        corrected = rate * jnp.sqrt(1 - b2**steps) / (1 - b1**steps)
        moments = functools.partial(
            _moments,
            decay=dict(mu=b1, nu=b2, factors=shampoo_beta),
            share=dict(mu=jnp.where(moves, 1 - b1, 0), nu=jnp.where(moves, 1 - b2, 0), factors=1 - shampoo_beta),
            eps=eps,
            rate=corrected,
            precision=PRECISIONS[precision],
        )

        def step(g, p, place, leaf: _Leaf, turn, number) -> tuple[jax.Array, _Leaf, jax.Array | None]:
            g, path, whole_layers, told = g.astype(leaf.nu.dtype), (), True, None
            if mesh is not None and leaf.bases:
                path = _between(g.shape, place), _place(g.shape, mesh)
                g = moved(g, *path)
                whole_layers = g.ndim == 2 or bool(path[-1].spec[0])
            # Where no layer is whole on a device, what products gather for a layer must not be for all of them.
            change, leaf = moments(g, leaf) if whole_layers else jax.lax.map(lambda x: moments(*x), (g, leaf))
            if leaf.bases:
                leaf, told = refreshed(turn, number % precondition_frequency, leaf, change)
            if path:
                change = moved(change, *path[::-1], place)
            if weight_decay:
                change = change - rate * weight_decay * (p + change)
            return change, leaf, told

        given, outline = jax.tree.flatten(gradients)
        values = [None] * len(given) if params is None else outline.flatten_up_to(params)
        trees = state.mu, state.nu, state.factors, state.bases
        leaves = map(_Leaf, *(outline.flatten_up_to(tree) for tree in trees))
        number, turn, changes, after, told = 0, seen, [], [], [jnp.zeros((1, 3))]
        # Where devices are threads of a CPU they must gather in one order, or they wait for one another for ever; other
        # devices' programs have an order, and libtpu 0.0.52 fails to compile some that are tied together so.
        one_order = mesh is not None and mesh.devices.flat[0].platform == "cpu"
        for g, p, place, leaf in zip(given, values, places or [None] * len(given), leaves, strict=True):
            change, leaf, of_leaf = step(g, p, place, leaf, turn, number)
            if leaf.bases:
                number += math.prod(g.shape[:-2])
                told.append(of_leaf)
                if one_order:  # never true, but it makes one refresh wait for the one before it
                    turn = seen + (of_leaf[0, 2] < 0)
            changes.append(change)
            after.append(leaf)
        told = jnp.concatenate(told).sum(0)
        watched = (state.change, state.off_diagonal)
        new = [jnp.where(told[2] > 0, told[i] / told[2], old).astype(old.dtype) for i, old in enumerate(watched)]
        state = SoapState(seen + 1, *map(outline.unflatten, zip(*after, strict=True)), *new)
        if mesh is not None:
            state = jax.lax.with_sharding_constraint(state, state_shardings(state, mesh))
        return outline.unflatten(changes), state

    return optax.GradientTransformation(init, update)


def state_shardings(state: SoapState, mesh: Mesh) -> SoapState:
    """Where each array of a state lies, from its shape: a stack is cut along its layers over those axes of the mesh
    that together divide their number, and its matrices along their rows over the other axes, as a single matrix is over
    all; what does not divide, and vectors, are copied.  So 32 layers on 64 devices are refreshed in 32 places at once
    on a mesh of 32 x 2, in 16 on one of 16 x 4, and by all devices alike on one of 64.

    Args:
      state: arrays or their shapes, as of `jax.eval_shape(soap(...).init, params)`.
    """

    def sharding(path, leaf):
        return _place(leaf.shape, mesh) if _is_matrix(path, leaf.shape) else NamedSharding(mesh, PartitionSpec())

    return jax.tree.map_with_path(sharding, state)


class _Leaf(NamedTuple):
    """The state of one parameter, in fields of SoapState."""

    mu: jax.Array
    nu: jax.Array
    factors: dict[str, jax.Array]
    bases: dict[str, jax.Array]


def _is_matrix(path, shape) -> bool:
    return len(shape) >= 2 and jax.tree_util.keystr(path[-1:], simple=True) not in VECTORS


def _dtype(p):
    return jnp.promote_types(p.dtype, jnp.float32)


def _axes(shape, mesh: Mesh) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(mesh axes for the layers of a stack, those for the rows of its matrices): as many devices for the layers as
    divide them, and the others for the rows."""
    layers = shape[0] if len(shape) > 2 else 1

    def devices(axes):
        return math.prod(mesh.shape[axis] for axis in axes)

    names = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    subsets = (axes for count in range(len(names) + 1) for axes in itertools.combinations(names, count))
    cut = max((axes for axes in subsets if layers % devices(axes) == 0), key=devices)
    return cut, tuple(name for name in names if name not in cut)


def _place(shape, mesh: Mesh) -> NamedSharding:
    layers, rows = _axes(shape, mesh)
    stack = [layers or None, *[None] * (len(shape) - 3)] if len(shape) > 2 else []
    divided = shape[-2] % math.prod(mesh.shape[axis] for axis in rows) == 0
    return NamedSharding(mesh, PartitionSpec(*stack, rows if rows and divided else None, None))


def _between(shape, place: NamedSharding) -> NamedSharding:
    """On the way from where a parameter lies to where its moments do: the layers as there, the rest as here.  XLA moves
    one axis at a time, or else gives every device the whole."""
    layers, _ = _axes(shape, place.mesh)
    here = [(axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in place.spec]
    here += [()] * (len(shape) - len(here))
    kept = [tuple(axis for axis in axes if axis not in layers) for axes in here]
    if len(shape) > 2:
        kept[0] = layers
    return NamedSharding(place.mesh, PartitionSpec(*kept))


# Leaves of equal shape are traced once: tracing is a third of what SOAP adds to compiling.
@functools.partial(jax.jit, static_argnames="precision")
def _moments(g, leaf: _Leaf, *, decay: dict, share: dict, eps, rate, precision) -> tuple[jax.Array, _Leaf]:
    """(change, leaf with new moments and factors) of a gradient; `decay` is of what was, `share` of what is new."""
    product = functools.partial(jnp.einsum, precision=precision)

    def turned(x, sides: dict[str, str]):
        for side, basis in leaf.bases.items():
            x = product(sides[side], *((basis, x) if side == "left" else (x, basis)))
        return x

    inside = turned(g, _INTO_BASIS)
    mu = decay["mu"] * leaf.mu.astype(g.dtype) + share["mu"] * inside
    nu = decay["nu"] * leaf.nu + share["nu"] * inside * inside
    factors = {
        side: decay["factors"] * factor + share["factors"] * product(_OUTER[side], g, g)
        for side, factor in leaf.factors.items()
    }
    direction = turned(mu / (jnp.sqrt(nu) + eps), _OUT_OF_BASIS)
    return -rate * direction, _Leaf(mu.astype(leaf.mu.dtype), nu, factors, leaf.bases)


# Stacks of equal shape are traced once.
@functools.partial(jax.jit, static_argnames=("frequency", "staggered", "first_basis", "on_tpu", "rows"))
def _refresh(
    seen,
    number,
    leaf: _Leaf,
    after,
    *,
    frequency: int,
    staggered: bool,
    first_basis: str,
    on_tpu: bool,
    rows: tuple[str, ...] = (),
):
    """(leaf, told): new bases for the matrices of a stack whose turn it is, with the moments carried over into them.

    `told` is `[1, 3]`: of the bases refreshed, change and off_diagonal (see SoapState) summed, and their number; first
    bases do not count.

    Matrix i of all matrices (the stack's first is `number`) has its turn after every gradient that `frequency` divides
    `seen` - i, or `seen` where they are not staggered; the first gradient gives all of them their first basis.  One
    after another in a loop, because batched decompositions are slow for large matrices and a program that grows with
    the stack compiles slowly.

    Devices that share the rows of matrices, along the mesh axes `rows`, gather the one at hand.

    `after`, in the shape of the moments, is what was made of moments and bases before: the loop waits for it, or XLA
    would not know that it may write where they are, and would copy the stacks in every step.
    """
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[-2:]), leaf)
    layers, first = len(flat.mu), seen == 0
    if staggered:
        start, stride = jnp.where(first, 0, (seen - number) % frequency), jnp.where(first, 1, frequency)
    else:
        start, stride = jnp.where(seen % frequency == 0, 0, layers), 1
    one = after[(0,) * after.ndim]
    start += (one < 0) & (one > 0)  # which is never so
    height = flat.factors["left"].shape[-1] if "left" in flat.factors else flat.mu.shape[-2]
    # Devices that have other layers, and so another number of turns, must gather as often all the same.
    uneven = bool(rows) and staggered
    end = start + stride * jnp.where(first, layers, -(-layers // frequency)) if uneven else layers

    def new_bases(mu, nu, factors, bases):
        new, told, kept_as = {}, nothing, mu.dtype
        for side, factor in factors.items():
            new[side], order, off_diagonal = _new_basis(factor, bases[side], first, first_basis, on_tpu)
            cosines = _exact(bases[side].T, new[side])  # of each vector before with each now
            nu = _take(nu, order, axis=_AXES[side])
            mu = _exact(cosines.T, mu) if side == "left" else _exact(mu, cosines)
            with_itself = order == jnp.arange(len(order))[:, None]  # each vector where it was before the sort
            change = jnp.maximum(1 - jnp.sum(jnp.where(with_itself, cosines, 0) ** 2) / len(order), 0)
            # Of a factor that is still zero, as that of LoRA's a while b is, any basis is as good as another.
            counts = ~first & (off_diagonal != -1)
            told += jnp.where(counts, jnp.stack([change, off_diagonal, jnp.ones_like(change)]), 0)
        return mu.astype(kept_as), nu, new, told

    # Layers are read in _new_basis, products and _take alone, or the loop would copy the stack in every round.
    def refresh_one(carry):
        layer, mus, nus, bases, told = carry
        at = jnp.minimum(layer, layers - 1) if uneven else layer
        mu, nu = (_whole(_at(x, at), height, rows) for x in (mus, nus))
        factors, before = (
            {side: _whole(_at(x, at), x.shape[-1], rows) for side, x in tree.items()} for tree in (flat.factors, bases)
        )
        if uneven:
            kept = mu, nu, before, nothing
            new = jax.lax.cond(layer < layers, lambda: new_bases(mu, nu, factors, before), lambda: kept)
        else:
            new = new_bases(mu, nu, factors, before)
        *state, of_layer = new
        stacks = mus, nus, bases
        put = jax.tree.map(lambda stack, x: _put(stack, _own(x, stack.shape[-2], rows), at), stacks, tuple(state))
        return layer + stride, *put, told + of_layer

    nothing = jnp.zeros(3, flat.nu.dtype)
    carry = start, flat.mu, flat.nu, flat.bases, nothing
    _, mu, nu, bases, told = jax.lax.while_loop(lambda carry: carry[0] < end, refresh_one, carry)
    new = _Leaf(mu, nu, flat.factors, bases)
    return jax.tree.map(lambda x, like: x.reshape(like.shape), new, leaf), told[None]


def _whole(matrix, height: int, axes: tuple[str, ...]):
    """A matrix of this height, of which devices along the mesh axes may have some rows each."""
    return matrix if len(matrix) == height else jax.lax.all_gather(matrix, axes, tiled=True)


def _own(matrix, height: int, axes: tuple[str, ...]):
    """This device's share, so many rows."""
    if len(matrix) == height:
        return matrix
    return jax.lax.dynamic_slice_in_dim(matrix, height * jax.lax.axis_index(axes), height)


# Indices are never negative or out of bounds: the usual care for them is code to compile.
_at = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False)
_put = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0, allow_negative_indices=False)
_take = functools.partial(jnp.take, mode="clip")
_exact = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _new_basis(factor, basis, first, first_basis: str, on_tpu: bool):
    """(basis `[k, k]`, order `[k]` in which the vectors of the one before were taken, the share of the factor's square
    norm that the one before left off the diagonal, -1 of a factor that is zero).

    The latter two mean nothing where the basis is a first one.
    """
    by_qr = _panel_qr if on_tpu else lambda matrix: jax.lax.linalg.qr(matrix, full_matrices=False)[0]

    def by_eigh():
        # A factor is symmetric but for rounding, and decompositions read one triangle.
        return jax.lax.linalg.eigh(factor, symmetrize_input=False)[0][:, ::-1]

    def step(_, carry):
        basis = carry[0]
        power = _exact(factor, basis)
        eigenvalues = jnp.sum(basis * power, axis=0)
        order = jnp.argsort(-eigenvalues)
        turned = _take(power, order, axis=1)
        # Before a first basis the moments are zero, which any order leaves alone.
        after = by_qr(turned) if first_basis == "qr" else jax.lax.cond(first, by_eigh, lambda: by_qr(turned))
        # The basis is orthonormal: power has the norm of the factor in it, whose diagonal the eigenvalues are.
        square = jnp.sum(power**2)
        off_diagonal = jnp.where(square == 0, -1, jnp.maximum(1 - jnp.sum(eigenvalues**2) / square, 0))
        return after, order, off_diagonal

    before = basis, jnp.arange(len(basis)), jnp.zeros((), factor.dtype)
    if first_basis == "qr":
        return jax.lax.fori_loop(0, jnp.where(first, _FIRST_QR_STEPS, 1), step, before)
    return step(0, before)


def _panel_qr(matrix):
    """Q of the Householder QR decomposition of a square matrix, in a loop over panels of columns.

    For TPUs: XLA unrolls its own decomposition over panels, which for 4096 columns takes its compiler over a minute.
    A panel's reflections are I - V T V^T with T^-1 = diag(1/tau) + the upper triangle of V^T V (compact WY, Schreiber
    and Van Loan 1989); all products are with the whole matrix, so that every round of the loop has the same shapes.
    """
    size = len(matrix)
    rows = -(-size // _PANEL) * _PANEL
    padded = jnp.pad(matrix, (0, rows - size))

    def reflect(panel, carry):
        rest, q = carry
        top = panel * _PANEL
        columns = jax.lax.dynamic_slice_in_dim(rest, top, _PANEL, axis=1)
        # The panel's diagonal comes to the top, and what is above it, done already, out of the way.
        columns = jnp.where(jnp.arange(rows)[:, None] < rows - top, jnp.roll(columns, -top, axis=0), 0)
        packed, tau = jnp.linalg.qr(columns, mode="raw")
        v = jnp.roll(jnp.tril(packed.T, -1) + jnp.eye(rows, _PANEL, dtype=matrix.dtype), top, axis=0)
        triangle = jnp.eye(_PANEL, dtype=matrix.dtype) + tau[:, None] * jnp.triu(_exact(v.T, v), 1)
        t = jax.scipy.linalg.solve_triangular(triangle, jnp.diag(tau), unit_diagonal=True)
        rest = rest - _exact(v, _exact(t.T, _exact(v.T, rest)))
        return rest, q - _exact(_exact(_exact(q, v), t), v.T)

    identity = jnp.eye(rows, dtype=matrix.dtype)
    return jax.lax.fori_loop(0, rows // _PANEL, reflect, (padded, identity))[1][:size, :size]


def _check(**given) -> None:
    def number(name, wanted, fits, *, whole=False):
        value = given[name]
        if isinstance(value, jax.Array):  # comes in with each step; nothing can be said about it here
            return
        kind = numbers.Integral if whole else numbers.Real
        if not isinstance(value, kind) or isinstance(value, bool) or not fits(value):
            raise InputError(f"soap: {name} is {value!r}; give {wanted}")

    if not callable(given["learning_rate"]):
        number("learning_rate", "a number of at least 0", lambda x: 0 <= x < math.inf)
    for name in ("b1", "b2", "shampoo_beta"):
        number(name, "a number of at least 0 and below 1", lambda x: 0 <= x < 1)
    number("eps", "a number above 0", lambda x: 0 < x < math.inf)
    number("weight_decay", "a number of at least 0", lambda x: 0 <= x < math.inf)
    number("precondition_frequency", "a whole number of at least 1", lambda x: x >= 1, whole=True)
    number("max_precondition_dim", "a whole number of at least 0", lambda x: x >= 0, whole=True)
    if given["one_sided_ratio"] is not None:
        number("one_sided_ratio", "a number above 1, or None for no such rule (in a config 0)", lambda x: x > 1)
    for name, known in (("refresh", REFRESHES), ("precision", PRECISIONS), ("first_basis", FIRST_BASES)):
        if given[name] not in known:
            raise InputError(f"soap: {name} is {given[name]!r}; choose from {', '.join(known)}")
    try:
        floating = jnp.issubdtype(jnp.dtype(given["mu_dtype"] or jnp.float32), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise InputError(f"soap: mu_dtype is {given['mu_dtype']!r}; give a floating-point dtype's name, or None")
