"""Causal attention with grouped queries: over packed rows in training, over a cache in sampling.

Promises: plain functions of arrays, softmax in float32, no parameters.
Shape letters: B rows, T query positions, S key positions, H query heads, G key/value heads, K head size.
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


def attend(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v with H / G query heads to each key head; returns [B, T, H, K] in q's dtype."""
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BTGHK = q_BTHK.reshape(B, T, G, H // G, K) * jnp.asarray(K**-0.5, q_BTHK.dtype)
    scores = jnp.einsum("btghk,bsgk->bghts", q_BTGHK, k_BSGK, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSGK.dtype)
    return jnp.einsum("bghts,bsgk->btghk", weights, v_BSGK).reshape(B, T, H, K)
