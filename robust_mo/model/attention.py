"""Causal attention with grouped queries: over packed rows in training, over a cache in sampling.

Promises: plain functions of arrays, softmax in float32, no parameters.  Packed rows go through jax's splash kernel
where the program is compiled for a TPU and through cuDNN's on a GPU that gives with it what products give, so that
scores are never held; elsewhere through products of matrices.
Shape letters: B rows, T query positions, S key positions, H query heads, G key/value heads, K head size,
M queries of one key head.
"""

import functools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

from robust_mo.errors import first_line
from robust_mo.model import mesh as meshes

# Sizes of the kernel's blocks, of which a row's length must be a multiple; the first that fits is taken.
_BLOCKS = (1024, 512, 256, 128)
# Products leave out the keys behind a part of the queries: of a long row's, in four parts, three eighths.  Eight leave
# out a little more, but a step of SmolLM2 is not faster, and compiles in 5.3 s instead of 3.7 (3.0 in one part; medians
# of five, two cores of an AMD EPYC).
_PARTS, _FEWEST_QUERIES = 4, 64
# Tokens of a row from which on a user is told that scores are held: not of what is traced for its shapes alone.
_MANY_SCORES = 512


SPLASH = "splash attention"
"""What a policy of jax.checkpoint knows by that which splash's backward pass reads of its forward pass."""


def attend_packed(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Attention of packed rows, see `packed_mask`; returns [B, T, H, K] in q's dtype."""
    _, T, H, K = q_BTHK.shape
    device, why = jax.default_backend(), ""
    if device == "gpu" and q_BTHK.dtype.itemsize > 2:
        why = f"cuDNN's attention takes no {q_BTHK.dtype}"
    elif device == "gpu" and T % 2:
        why = f"cuDNN's attention takes no rows of {T} tokens, an odd number"
    elif device == "gpu" and _agrees("cudnn", H, k_BTGK.shape[2], K):
        return by_jax(q_BTHK, k_BTGK, v_BTGK, segments_BT, "cudnn")
    elif device == "tpu" and T % _BLOCKS[-1]:
        why = f"the TPU's attention takes no rows of {T} tokens, no multiple of {_BLOCKS[-1]}"
    if why and T >= _MANY_SCORES:
        _told_once(why)
    if T % _BLOCKS[-1]:
        return _by_products(q_BTHK, k_BTGK, v_BTGK, segments_BT)
    return jax.lax.platform_dependent(q_BTHK, k_BTGK, v_BTGK, segments_BT, tpu=by_splash_kernel, default=_by_products)


@functools.cache
def _told_once(why: str) -> None:
    print(f"note: {why}: products of matrices instead, which hold all scores", file=sys.stderr)


def _by_products(q_BTHK, k_BTGK, v_BTGK, segments_BT):
    k_BGKT, v_BGTK, mask_BTT = k_BTGK.transpose(0, 2, 3, 1), v_BTGK.swapaxes(1, 2), packed_mask(segments_BT)
    length = q_BTHK.shape[1]
    size = max(_FEWEST_QUERIES, -(-length // _PARTS))

    def part(begin):
        end = min(begin + size, length)
        return attend(q_BTHK[:, begin:end], k_BGKT[..., :end], v_BGTK[:, :, :end], mask_BTT[:, begin:end, :end])

    return jnp.concatenate([part(begin) for begin in range(0, length, size)], axis=1)


def by_jax(q_BTHK, k_BTGK, v_BTGK, segments_BT, implementation: str):
    """As `attend_packed`, through jax.nn.dot_product_attention; the mask of the segments is [B, 1, T, T]."""
    here = functools.partial(_by_jax_here, implementation=implementation)
    if not jax.sharding.get_abstract_mesh().empty:
        rows, heads = parts(len(k_BTGK), k_BTGK.shape[2])
        cut, cut_rows = PartitionSpec(rows, None, heads), PartitionSpec(rows)
        here = jax.shard_map(here, in_specs=(cut, cut, cut, cut_rows), out_specs=cut, check_vma=False)
    return here(q_BTHK, k_BTGK, v_BTGK, segments_BT)


def _by_jax_here(q_BTHK, k_BTGK, v_BTGK, segments_BT, implementation):
    mask_B1TT = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
    return jax.nn.dot_product_attention(
        q_BTHK, k_BTGK, v_BTGK, mask=mask_B1TT, is_causal=True, implementation=implementation
    )


def cudnn_saveable(primitive, *_, **__) -> bool:
    """A policy of jax.checkpoint that keeps what cuDNN's attention gave, its statistics with it, which the backward
    pass asks for: a name for the output would still have all of it computed again."""
    return primitive.name.startswith("dot_product_attention_fwd")


def parts(B: int, G: int):
    """The axes of the mesh in force along which rows, and heads, are cut, so that every device works on its own: the
    compiler cannot cut a kernel.  Those that their devices do not divide evenly are worked on by all of them."""
    return meshes.sharding((B, G), ("batch", "kv_heads"), jax.sharding.get_abstract_mesh()).spec


@functools.cache
def _agrees(implementation: str, H: int, G: int, K: int) -> bool:
    """Whether this device has an implementation for such heads, and it gives what products give, with the same
    gradients, to the last digits of bfloat16.  Where not, that is said, once."""

    def outcome(attend):
        key = jax.random.key(0)
        qkv = [jax.random.normal(key, (2, 256, heads, K), jnp.bfloat16) for heads in (H, G, G)]
        weights = jax.random.normal(key, (2, 256, H, K))
        segments = jnp.repeat(jnp.array([[1, 1, 2, 0], [1, 2, 3, 3]]), 64, axis=1)

        def weighted(*qkv):
            attended = attend(*qkv, segments)
            return (attended.astype(jnp.float32) * weights).sum(), attended

        return jax.tree.leaves(jax.jit(jax.grad(weighted, (0, 1, 2), has_aux=True))(*qkv))

    return gives_the_same(
        implementation,
        lambda: outcome(functools.partial(_by_jax_here, implementation=implementation)),
        lambda: outcome(_by_products),
    )


def gives_the_same(name: str, found: Callable[[], list[jax.Array]], wanted: Callable[[], list[jax.Array]]) -> bool:
    """Whether `found` runs on this device and gives what `wanted` does, to the last digits of bfloat16; where not, that
    is said of the attention called `name`."""
    try:
        # A program that is being traced asks; another thread is within no trace and no mesh.
        with ThreadPoolExecutor(1) as thread:
            sides = [[np.asarray(x, np.float32) for x in thread.submit(side).result()] for side in (found, wanted)]
        errors = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(*sides, strict=True)]
        worst = np.max(errors)  # which NaN is, wherever it stands
        reason = "" if worst < 0.03 else f"it is off by {worst:.2g}"
    except Exception as error:  # of jax, XLA or cuDNN; their classes differ
        reason = first_line(error)
    if reason:
        print(f"note: no {name} attention here ({reason}); products of matrices instead", file=sys.stderr)
    return not reason


def by_splash_kernel(q_BTHK, k_BTGK, v_BTGK, segments_BT, interpret: bool = False):
    """As `attend_packed`, with T a multiple of 128.

    Args:
      interpret: run on any device, slowly.
    """
    B, T, _, K = q_BTHK.shape
    block = next(size for size in _BLOCKS if T % size == 0)
    blocks = splash.BlockSizes(
        **dict.fromkeys(("block_q", "block_kv", "block_kv_compute"), block),
        **dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"), block),
        use_fused_bwd_kernel=True,
    )

    def here(q_BHTK, k_BGTK, v_BGTK, segments_BT):
        mask = splash.MultiHeadMask([splash.CausalMask((T, T))] * q_BHTK.shape[1])
        kernel = splash.make_splash_mha_single_device(
            mask, block_sizes=blocks, residual_checkpoint_name=SPLASH, interpret=interpret
        )
        return jax.vmap(kernel)(q_BHTK, k_BGTK, v_BGTK, splash.SegmentIds(segments_BT, segments_BT))

    if not jax.sharding.get_abstract_mesh().empty:
        rows, heads = parts(B, k_BTGK.shape[2])
        cut = PartitionSpec(rows, heads)
        here = jax.shard_map(here, in_specs=(cut, cut, cut, PartitionSpec(rows)), out_specs=cut, check_vma=False)
    q, k, v = (x.swapaxes(1, 2) for x in (q_BTHK * jnp.asarray(K**-0.5, q_BTHK.dtype), k_BTGK, v_BTGK))
    return here(q, k, v, segments_BT).swapaxes(1, 2).astype(q_BTHK.dtype)


def packed_mask(segments_BT: jax.Array) -> jax.Array:
    """bool [B, T, T]: a position sees itself and what came before it in its own segment.

    Padding is a segment of its own (number 0): its outputs mean nothing, but stay finite.
    """
    length = segments_BT.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return causal & (segments_BT[:, :, None] == segments_BT[:, None, :])


def cached_mask(positions_BT: jax.Array, capacity: int) -> jax.Array:
    """bool [B, T, S]: a query at position p sees the cache entries 0..p.  `capacity` is S."""
    return jnp.arange(capacity) <= positions_BT[:, :, None]


def attend(q_BTHK: jax.Array, k_BGKS: jax.Array, v_BGSK: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v with H / G query heads to each key head; returns [B, T, H, K] in q's dtype."""
    B, T, H, K = q_BTHK.shape
    G = k_BGKS.shape[1]
    # As products of matrices, the queries of a key head below one another: einsum would turn the keys into the left
    # factor and transpose what comes out.
    q_BGMK = q_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4).reshape(B, G, -1, K)
    scores = jnp.matmul(q_BGMK * jnp.asarray(K**-0.5, q_BTHK.dtype), k_BGKS, preferred_element_type=jnp.float32)
    scores = scores.reshape(B, G, H // G, T, -1)
    scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BGSK.dtype)
    mixed = jnp.matmul(weights.reshape(B, G, -1, weights.shape[-1]), v_BGSK)
    return mixed.reshape(B, G, H // G, T, K).transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)
