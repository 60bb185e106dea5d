"""Causal attention with grouped queries: over packed rows in training, over a cache in sampling.

Promises: plain functions of arrays, softmax in float32, no parameters.
Shape letters: B rows, T query positions, S key positions, H query heads, G key/value heads, K head size,
M queries of one key head.
"""

import jax
import jax.numpy as jnp


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
