"""Attention over a cache, to which the tokens that ask add their own entries first.

Promises: what `attention.attend` gives with the mask of the entries 0..position, softmax in float32, and the cache with
the new keys and values in it.  A new token is written in place and costs what its row holds so far, not what the cache
has room for: on a TPU through a kernel whose grid takes rows block by block, on a GPU through one that loops over a
row's own blocks, where that gives what products give.  Several tokens at once, other devices, and a cache that blocks
do not fit: products over all of it.

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
# Bytes of a block of k and one of v, and of those fetched meanwhile; a v5e gives a kernel 16 MiB.
_MOST_IN_VMEM = 8 * 2**20
_GPU_BLOCKS = (128, 64, 32, 16)
_FEWEST_QUERIES = 16
# Of a TPU's tiles: entries of k, which lie along lanes, and of v, along lines (16 of 16 bits, a multiple of 8 of 32).
_LANES, _LINES = 128, 16


@jax.jit  # so that layers of equal shape are traced once
def attend_live(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    k_BGKS: jax.Array,
    v_BGSK: jax.Array,
    positions_BT: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Writes keys and values at their positions into the cache k_BGKS, v_BGSK, and then gives, of every query,
    softmax(q k^T / sqrt(K)) v over its row's entries 0..position.

    Returns:
      ([B, T, H, K] in q's dtype, k_BGKS, v_BGSK).
    """
    _, T, H, K = q_BTHK.shape
    given = (q_BTHK, k_BTGK, v_BTGK, k_BGKS, v_BGSK, positions_BT)
    if T > 1:
        return _by_products(*given)
    if jax.default_backend() == "gpu" and _block(k_BGKS, _GPU_BLOCKS) and _agrees(H, k_BGKS.shape[1], K, q_BTHK.dtype):
        return by_kernel(*given, kernel=on_gpu)
    if not _block(k_BGKS, _TPU_BLOCKS):
        return _by_products(*given)
    return jax.lax.platform_dependent(*given, tpu=functools.partial(by_kernel, kernel=on_tpu), default=_by_products)


def _written(k_BTGK, v_BTGK, k_BGKS, v_BGSK, positions_BT):
    rows, all_of = jnp.arange(len(positions_BT))[:, None], slice(None)
    return k_BGKS.at[rows, all_of, all_of, positions_BT].set(k_BTGK), v_BGSK.at[rows, all_of, positions_BT].set(v_BTGK)


def _by_products(q_BTHK, k_BTGK, v_BTGK, k_BGKS, v_BGSK, positions_BT):
    k_BGKS, v_BGSK = _written(k_BTGK, v_BTGK, k_BGKS, v_BGSK, positions_BT)
    mask = attention.cached_mask(positions_BT, k_BGKS.shape[-1])
    return attention.attend(q_BTHK, k_BGKS, v_BGSK, mask), k_BGKS, v_BGSK


def _block(k_BGKS, sizes: tuple[int, ...]) -> int | None:
    return next((size for size in sizes if k_BGKS.shape[-1] % size == 0), None)


@functools.cache
def _agrees(H: int, G: int, K: int, dtype) -> bool:
    """Whether this GPU's kernel gives what products give; where not, that is said, once."""

    def on(attend):
        keys = jax.random.split(jax.random.key(0), 5)
        cache = (4, G, K, 384), (4, G, 384, K)  # blocks of the size that decoding's caches have
        shapes = (4, 1, H, K), (4, 1, G, K), (4, 1, G, K), *cache
        given = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]
        return list(attend(*given, jnp.array([[0], [127], [200], [383]])))

    kernel = functools.partial(_by_kernel_here, kernel=on_gpu)
    return attention.gives_the_same("Triton", lambda: on(kernel), lambda: on(_by_products))


def by_kernel(q_B1HK, k_B1GK, v_B1GK, k_BGKS, v_BGSK, positions_B1, kernel):
    """As `attend_live`, of one token a row; `kernel`: `on_tpu` or `on_gpu`."""
    here = functools.partial(_by_kernel_here, kernel=kernel)
    if not jax.sharding.get_abstract_mesh().empty:
        rows, heads = attention.parts(*k_BGKS.shape[:2])
        token, cache = PartitionSpec(rows, None, heads), PartitionSpec(rows, heads)
        cut = (token, token, token, cache, cache, PartitionSpec(rows))
        here = jax.shard_map(here, in_specs=cut, out_specs=(token, cache, cache), check_vma=False)
    return here(q_B1HK, k_B1GK, v_B1GK, k_BGKS, v_BGSK, positions_B1)


def _by_kernel_here(q_B1HK, k_B1GK, v_B1GK, k_BGKS, v_BGSK, positions_B1, kernel):
    B, _, H, K = q_B1HK.shape
    G = k_BGKS.shape[1]
    q_BGMK = (q_B1HK * jnp.asarray(K**-0.5, q_B1HK.dtype)).reshape(B, G, H // G, K)
    q_BGMK = jnp.pad(q_BGMK, ((0, 0), (0, 0), (0, max(0, _FEWEST_QUERIES - H // G)), (0, 0)))
    mixed_BGMK, *cache = kernel(positions_B1, q_BGMK, k_B1GK, v_B1GK, k_BGKS, v_BGSK)
    return mixed_BGMK[:, :, : H // G].reshape(B, 1, H, K), *cache


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


def _of_one_entry(q_MK, k_1K, v_1K):
    """The running softmax after one entry."""
    M, K = q_MK.shape
    scores_M1 = (q_MK.astype(jnp.float32) * k_1K.astype(jnp.float32)).sum(axis=1, keepdims=True)
    return scores_M1, jnp.ones((M, 1), jnp.float32), jnp.broadcast_to(v_1K.astype(jnp.float32), (M, K))


def on_tpu(positions_B1, q_BGMK, k_B1GK, v_B1GK, k_BGKS, v_BGSK, interpret: bool = False):
    """A step of the grid is a block of a row's entries, all heads; blocks beyond the row's last one are not fetched,
    since the fetch of a block that is there already is left out.  Of the last one the kernel writes back the tiles that
    hold the new entry: a scatter of XLA's would turn the whole cache to a layout of its own, in every step, and back.
    `interpret`: on any device, slowly."""
    B, G, M, K = q_BGMK.shape
    entry = 4 * G * K * k_BGKS.dtype.itemsize
    *larger, smallest = _TPU_BLOCKS
    block = _block(k_BGKS, (*(size for size in larger if size * entry <= _MOST_IN_VMEM), smallest))

    def with_new(new, old, at, axis):
        # Not every TPU works on elements of 16 bits; through 32 nothing is lost.
        here = jax.lax.broadcasted_iota(jnp.int32, old.shape, axis) == at
        return jnp.where(here, new.astype(jnp.float32), old.astype(jnp.float32)).astype(old.dtype)

    def kernel(positions, q, new_k, new_v, k, v, out, k_out, v_out, *carried):
        row, number = pl.program_id(0), pl.program_id(1)
        position = positions[row]

        def carry(g, running):
            for part, value in zip(carried, running, strict=True):
                part[g] = value

        @pl.when(number == 0)
        def _():
            for g in range(G):
                carry(g, _of_one_entry(q[0, g], new_k[0, g], new_v[0, g]))

        @pl.when(number * block < position)
        def _():
            for g in range(G):
                before = tuple(part[g] for part in carried)
                carry(g, _with_block(before, q[0, g], k[0, g], v[0, g], number * block, position))

        @pl.when(number == position // block)
        def _():
            at = position % block
            lane, line = (pl.multiple_of(at // tile * tile, tile) for tile in (_LANES, _LINES))
            for g in range(G):
                column = jnp.broadcast_to(new_k[0, g].astype(jnp.float32), (_LANES, K)).T
                k_out[0, g] = with_new(column, k[0, g, :, pl.ds(lane, _LANES)], at - lane, axis=1)
                v_out[0, g] = with_new(new_v[0, g], v[0, g, pl.ds(line, _LINES), :], at - line, axis=0)

        @pl.when(number == pl.num_programs(1) - 1)
        def _():
            _, total, mixed = carried
            out[0] = (mixed[...] / total[...]).astype(out.dtype)

    def of_row(*shape):
        return pl.BlockSpec((1, G, *shape), lambda row, *_: (row, 0, 0, 0))

    def read(row, number, positions):
        return jnp.minimum(number, positions[row] // block)

    new = [x.transpose(0, 2, 1, 3) for x in (k_B1GK, v_B1GK)]
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, k_BGKS.shape[-1] // block),
            in_specs=[
                of_row(M, K),
                of_row(1, K),
                of_row(1, K),
                pl.BlockSpec((1, G, K, block), lambda *step: (step[0], 0, 0, read(*step))),
                pl.BlockSpec((1, G, block, K), lambda *step: (step[0], 0, read(*step), 0)),
            ],
            out_specs=[
                of_row(M, K),
                pl.BlockSpec((1, G, K, _LANES), lambda row, _, positions: (row, 0, 0, positions[row] // _LANES)),
                pl.BlockSpec((1, G, _LINES, K), lambda row, _, positions: (row, 0, positions[row] // _LINES, 0)),
            ],
            scratch_shapes=[pltpu.VMEM((G, M, width), jnp.float32) for width in (1, 1, K)],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BGMK, k_BGKS, v_BGSK)],
        input_output_aliases={4: 1, 5: 2},
        interpret=interpret,
    )(positions_B1[:, 0], q_BGMK, *new, k_BGKS, v_BGSK)


def on_gpu(positions_B1, q_BGMK, k_B1GK, v_B1GK, k_BGKS, v_BGSK, interpret: bool = False):
    """A program for each row and key head, which loops over the row's blocks.  `interpret`: on any device, slowly."""
    from jax.experimental.pallas import triton  # where a jax has none, `_agrees` says so

    k_BGKS, v_BGSK = _written(k_B1GK, v_B1GK, k_BGKS, v_BGSK, positions_B1)
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

    mixed_BGMK = pl.pallas_call(
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
    )(positions_B1[:, 0] + 1, q_BGMK, k_BGKS, v_BGSK)
    return mixed_BGMK, k_BGKS, v_BGSK
