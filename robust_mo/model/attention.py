"""Causal attention with grouped queries: over packed rows in training, over a cache in sampling.

Promises: plain functions of arrays, softmax in float32, no parameters.  Packed rows go through jax's splash kernel
where the program is compiled for a TPU, so that scores are never held; elsewhere through products of matrices.
Shape letters: B rows, T query positions, S key positions, H query heads, G key/value heads, K head size,
M queries of one key head.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

# Sizes of the kernel's blocks, of which a row's length must be a multiple; the first that fits is taken.
_BLOCKS = (1024, 512, 256, 128)


def attend_packed(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Attention of packed rows, see `packed_mask`; returns [B, T, H, K] in q's dtype."""
    if q_BTHK.shape[1] % _BLOCKS[-1]:
        return _by_products(q_BTHK, k_BTGK, v_BTGK, segments_BT)
    return jax.lax.platform_dependent(q_BTHK, k_BTGK, v_BTGK, segments_BT, tpu=by_splash_kernel, default=_by_products)


def _by_products(q_BTHK, k_BTGK, v_BTGK, segments_BT):
    return attend(q_BTHK, k_BTGK.transpose(0, 2, 3, 1), v_BTGK.swapaxes(1, 2), packed_mask(segments_BT))


def by_splash_kernel(q_BTHK, k_BTGK, v_BTGK, segments_BT, interpret: bool = False):
    """As `attend_packed`, with T a multiple of 128.

    The compiler cannot cut a kernel over devices, so that every one of them is told to work on its own rows and heads.

    Args:
      interpret: run on any device, slowly.
    """
    B, T, _, K = q_BTHK.shape
    mesh = jax.sharding.get_abstract_mesh()
    block = next(size for size in _BLOCKS if T % size == 0)
    blocks = splash.BlockSizes(
        **dict.fromkeys(("block_q", "block_kv", "block_kv_compute"), block),
        **dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"), block),
        use_fused_bwd_kernel=True,
    )

    def here(q_BHTK, k_BGTK, v_BGTK, segments_BT):
        mask = splash.MultiHeadMask([splash.CausalMask((T, T))] * q_BHTK.shape[1])
        kernel = splash.make_splash_mha_single_device(mask, block_sizes=blocks, interpret=interpret)
        return jax.vmap(kernel)(q_BHTK, k_BGTK, v_BGTK, splash.SegmentIds(segments_BT, segments_BT))

    if not mesh.empty:
        # Rows or heads that their devices do not divide evenly are worked on by all of them.
        rows = ("replica", "fsdp") if B % (mesh.shape["replica"] * mesh.shape["fsdp"]) == 0 else None
        cut = PartitionSpec(rows, "tensor" if k_BTGK.shape[2] % mesh.shape["tensor"] == 0 else None)
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
