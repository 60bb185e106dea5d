"""Attention over a cache; of one new token in each row it reads the entries in use alone.

Promises: what `attention.attend` gives with the mask of the entries 0..position, softmax in float32.  A new token costs
what its row holds so far, not what the cache has room for: on a TPU through a kernel whose grid takes rows block by
block, on a GPU through one that loops over a row's own blocks, where that gives what products give.  Several tokens at
once, other devices, and a cache that blocks do not fit: products over all of it.
Does not know who writes the cache.

Shape letters: as in attention.py; M queries of one key head, filled up to what a unit for products takes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from robust_mo.model import attention

# Sizes of a block of entries, which must divide the cache's capacity; the first that does is taken.
_TPU_BLOCKS = (512, 256, 128)
_GPU_BLOCKS = (128, 64, 32, 16)
_FEWEST_QUERIES = 16


def attend_live(q_BTHK: jax.Array, k_BGKS: jax.Array, v_BGSK: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over each row's entries 0..position; returns [B, T, H, K] in q's dtype."""
    _, T, H, K = q_BTHK.shape
    given = (q_BTHK, k_BGKS, v_BGSK, positions_BT)
    if T > 1:
        return _by_products(*given)
    if jax.default_backend() == "gpu" and _block(k_BGKS, _GPU_BLOCKS) and _agrees(H, k_BGKS.shape[1], K, q_BTHK.dtype):
        return by_kernel(*given, on_gpu)
    if not _block(k_BGKS, _TPU_BLOCKS):
        return _by_products(*given)
    return jax.lax.platform_dependent(*given, tpu=functools.partial(by_kernel, kernel=on_tpu), default=_by_products)


def _by_products(q_BTHK, k_BGKS, v_BGSK, positions_BT):
    mask = attention.cached_mask(positions_BT, k_BGKS.shape[-1])
    return attention.attend(q_BTHK, k_BGKS, v_BGSK, mask)


def _block(k_BGKS, sizes: tuple[int, ...]) -> int | None:
    return next((size for size in sizes if k_BGKS.shape[-1] % size == 0), None)


@functools.cache
def _agrees(H: int, G: int, K: int, dtype) -> bool:
    """Whether this GPU's kernel gives what products give; where not, that is said, once."""

    def on(attend):
        keys = jax.random.split(jax.random.key(0), 3)
        shapes = ((4, 1, H, K), (4, G, K, 384), (4, G, 384, K))  # blocks of the size that decoding's caches have
        q, k, v = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
        return [attend(q, k, v, jnp.array([[0], [127], [200], [383]]))]

    kernel = functools.partial(_by_kernel_here, kernel=on_gpu)
    return attention.gives_the_same("Triton", lambda: on(kernel), lambda: on(_by_products))


def by_kernel(q_B1HK, k_BGKS, v_BGSK, positions_B1, kernel):
    """As `attend_live`, of one token a row; `kernel`: `on_tpu` or `on_gpu`."""
    here = functools.partial(_by_kernel_here, kernel=kernel)
    if not jax.sharding.get_abstract_mesh().empty:
        rows, heads = attention.parts(*k_BGKS.shape[:2])
        queries, cache = PartitionSpec(rows, None, heads), PartitionSpec(rows, heads)
        cut = (queries, cache, cache, PartitionSpec(rows))
        here = jax.shard_map(here, in_specs=cut, out_specs=queries, check_vma=False)
    return here(q_B1HK, k_BGKS, v_BGSK, positions_B1)


def _by_kernel_here(q_B1HK, k_BGKS, v_BGSK, positions_B1, kernel):
    B, _, H, K = q_B1HK.shape
    G = k_BGKS.shape[1]
    q_BGMK = (q_B1HK * jnp.asarray(K**-0.5, q_B1HK.dtype)).reshape(B, G, H // G, K)
    q_BGMK = jnp.pad(q_BGMK, ((0, 0), (0, 0), (0, max(0, _FEWEST_QUERIES - H // G)), (0, 0)))
    mixed_BGMK = kernel(positions_B1[:, 0] + 1, q_BGMK, k_BGKS, v_BGSK)
    return mixed_BGMK[:, :, : H // G].reshape(B, 1, H, K)


def _with_block(carry, q_MK, k_KS, v_SK, begin, length):
    """The running softmax (highest score, sum of weights, weighted values) with a block of entries from `begin` on."""
    top_M1, sum_M1, mixed_MK = carry
    scores_MS = jnp.dot(q_MK, k_KS, preferred_element_type=jnp.float32)
    live = begin + jax.lax.broadcasted_iota(jnp.int32, scores_MS.shape, 1) < length
    scores_MS = jnp.where(live, scores_MS, jnp.finfo(jnp.float32).min)
    highest_M1 = jnp.maximum(top_M1, scores_MS.max(axis=1, keepdims=True))
    weights_MS, kept_M1 = jnp.exp(scores_MS - highest_M1), jnp.exp(top_M1 - highest_M1)
    added_MK = jnp.dot(weights_MS.astype(v_SK.dtype), v_SK, preferred_element_type=jnp.float32)
    return highest_M1, kept_M1 * sum_M1 + weights_MS.sum(axis=1, keepdims=True), kept_M1 * mixed_MK + added_MK


def _nothing(M: int, K: int):
    """The running softmax before the first block."""
    column = jnp.zeros((M, 1), jnp.float32)
    return column + jnp.finfo(jnp.float32).min, column, jnp.zeros((M, K), jnp.float32)


def on_tpu(lengths_B, q_BGMK, k_BGKS, v_BGSK, interpret: bool = False):
    """A step of the grid is a block of a row's entries, all heads; blocks beyond the row's last one are not fetched,
    since the fetch of a block that is there already is left out.  `interpret`: on any device, slowly."""
    B, G, M, K = q_BGMK.shape
    block = _block(k_BGKS, _TPU_BLOCKS)

    def kernel(lengths, q, k, v, out, *carried):
        row, number = pl.program_id(0), pl.program_id(1)

        @pl.when(number == 0)
        def _():
            for part, first in zip(carried, _nothing(M, K), strict=True):
                part[...] = jnp.broadcast_to(first, part.shape)

        @pl.when(number * block < lengths[row])
        def _():
            for g in range(G):
                carry = tuple(part[g] for part in carried)
                for part, new in zip(
                    carried, _with_block(carry, q[0, g], k[0, g], v[0, g], number * block, lengths[row]), strict=True
                ):
                    part[g] = new

        @pl.when(number == pl.num_programs(1) - 1)
        def _():
            _, total, mixed = carried
            out[0] = (mixed[...] / total[...]).astype(out.dtype)

    def last(lengths, row, number):
        return jnp.minimum(number, (lengths[row] - 1) // block)

    whole = pl.BlockSpec((1, G, M, K), lambda row, number, lengths: (row, 0, 0, 0))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, k_BGKS.shape[-1] // block),
            in_specs=[
                whole,
                pl.BlockSpec((1, G, K, block), lambda row, number, lengths: (row, 0, 0, last(lengths, row, number))),
                pl.BlockSpec((1, G, block, K), lambda row, number, lengths: (row, 0, last(lengths, row, number), 0)),
            ],
            out_specs=whole,
            scratch_shapes=[pltpu.VMEM((G, M, width), jnp.float32) for width in (1, 1, K)],
        ),
        out_shape=jax.ShapeDtypeStruct(q_BGMK.shape, q_BGMK.dtype),
        interpret=interpret,
    )(lengths_B, q_BGMK, k_BGKS, v_BGSK)


def on_gpu(lengths_B, q_BGMK, k_BGKS, v_BGSK, interpret: bool = False):
    """A program for each row and key head, which loops over the row's blocks.  `interpret`: on any device, slowly."""
    from jax.experimental.pallas import triton  # where a jax has none, `_agrees` says so

    B, G, M, K = q_BGMK.shape
    block, capacity = _block(k_BGKS, _GPU_BLOCKS), k_BGKS.shape[-1]

    def kernel(length, q, k, v, out):
        length, q_MK = length[0], q[...]

        def add(number, carry):
            entries = pl.ds(number * block, block)
            return _with_block(carry, q_MK, k[:, entries], v[entries, :], number * block, length)

        _, total, mixed = jax.lax.fori_loop(0, pl.cdiv(length, block), add, _nothing(M, K))
        out[...] = (mixed / total).astype(out.dtype)

    def of_head(*shape):
        return pl.BlockSpec((None, None, *shape), lambda row, head: (row, head, 0, 0))

    return pl.pallas_call(
        kernel,
        grid=(B, G),
        in_specs=[
            pl.BlockSpec((1,), lambda row, head: (row,)),
            of_head(M, K),
            of_head(K, capacity),
            of_head(capacity, K),
        ],
        out_specs=of_head(M, K),
        out_shape=jax.ShapeDtypeStruct(q_BGMK.shape, q_BGMK.dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(lengths_B, q_BGMK, k_BGKS, v_BGSK)
