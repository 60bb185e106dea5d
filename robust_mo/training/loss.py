"""Cross-entropy of next tokens, summed, without ever holding the logits of a whole batch.

Promises: sums of losses and of counts, never means, so that micro-batches, hosts and packed rows of any fill can be
added up and divided once.  The gradient is formed chunk by chunk in the forward pass (the logits of a chunk are there
anyway), so nothing is recomputed; chunks in which no token carries a loss are skipped.  Devices tell each other the
head and its gradient once, however many chunks there are.
Does not know about models, batches or optimizers.

Shape letters: B rows, T positions, N positions of a chunk in all rows, D hidden, V vocabulary, P parts of the rows that
lie on different devices.
"""

import functools
import math

import jax
import jax.numpy as jnp

from robust_mo.model import mesh as meshes

_PIECES = 16  # of the head's gradient, in which devices sum it


def summed_cross_entropy(hidden_BTD, head_VD, targets_BT, mask_BT, chunk: int) -> jax.Array:
    """Sum over masked positions of -log softmax(hidden @ head.T)[target], natural log, float32 scalar.

    Positions that carry no loss are moved to the end of their row first (a row stays on its devices), so that only
    as many chunks of the head are computed as the fullest row needs.

    Args:
      hidden_BTD: final hidden states; their dtype is the dtype of the product, which accumulates in float32.
      head_VD: output head.
      targets_BT: int32 next tokens.
      mask_BT: bool, True where a loss is taken.
      chunk: positions of each row that are handled at once; T need not be a multiple.
    """
    order_BT = jnp.argsort(~mask_BT, axis=1, stable=True)
    hidden_BTD = jnp.take_along_axis(hidden_BTD, order_BT[:, :, None], axis=1)
    targets_BT = jnp.take_along_axis(targets_BT, order_BT, axis=1)
    mask_BT = jnp.take_along_axis(mask_BT, order_BT, axis=1)
    length = targets_BT.shape[1]
    chunk = min(chunk, length)
    if extra := -length % chunk:
        hidden_BTD, targets_BT, mask_BT = (
            jnp.pad(x, ((0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 2)) for x in (hidden_BTD, targets_BT, mask_BT)
        )
    return _chunked(hidden_BTD, head_VD, targets_BT, mask_BT, chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(hidden_BTD, head_VD, targets_BT, mask_BT, chunk):
    head_VD = _gathered(head_VD, hidden_BTD.dtype)

    def add(total, piece):
        hidden_ND, targets_N, mask_N = piece

        def compute():
            return _losses(_logits(hidden_ND, head_VD), targets_N, mask_N)[0]

        return total + jax.lax.cond(mask_N.any(), compute, lambda: jnp.float32(0)), None

    return jax.lax.scan(add, jnp.float32(0), _split(chunk, hidden_BTD, targets_BT, mask_BT))[0]


def _gathered(head_VD, dtype):
    """The head as the products read it.  Before the scan: in it, it would be gathered for every chunk."""
    return meshes.constrained(head_VD.astype(dtype), ("vocab", None))


def _logits(hidden_ND, head_VD):
    return jnp.einsum("nd,vd->nv", hidden_ND, head_VD, preferred_element_type=jnp.float32)


def _losses(logits_NV, targets_N, mask_N):
    """(summed loss, log of the partition function [N])"""
    log_z_N = jax.nn.logsumexp(logits_NV, axis=-1)
    target_logits_N = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]
    return jnp.sum(jnp.where(mask_N, log_z_N - target_logits_N, 0.0)), log_z_N


def _split(chunk, *arrays):
    """[B, T, ...] -> [T / chunk, N, ...]: the same positions of all rows make one chunk."""
    return tuple(
        x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1).reshape(-1, x.shape[0] * chunk, *x.shape[2:])
        for x in arrays
    )


def _forward(hidden, head, targets, mask, chunk):
    """Loss, and its gradients as residuals.  `perturbed` tells whether the head is being trained at all."""
    hidden_BTD, targets_BT, mask_BT = hidden.value, targets.value, mask.value
    head_VD, train_head = _gathered(head.value, hidden_BTD.dtype), head.perturbed
    rows, _, width = hidden_BTD.shape
    parts = meshes.parts_of("batch", rows)

    def add(carry, piece):
        hidden_ND, targets_N, mask_N = piece
        total, grad_head_PVD = carry

        def compute():
            logits_NV = _logits(hidden_ND, head_VD)
            loss, log_z_N = _losses(logits_NV, targets_N, mask_N)
            one_hot_NV = targets_N[:, None] == jnp.arange(logits_NV.shape[-1])
            grad_NV = jnp.where(mask_N[:, None], jnp.exp(logits_NV - log_z_N[:, None]) - one_hot_NV, 0.0)
            grad_NV = grad_NV.astype(hidden_ND.dtype)
            grad_hidden_ND = grad_NV @ head_VD
            if not train_head:
                return loss, None, grad_hidden_ND
            by_part = (x.reshape(parts, -1, x.shape[-1]) for x in (grad_NV, hidden_ND))
            product_PVD = jnp.einsum("pnv,pnd->pvd", *by_part, preferred_element_type=jnp.float32)
            return loss, grad_head_PVD + product_PVD, grad_hidden_ND

        def skip():
            return jnp.float32(0), grad_head_PVD, jnp.zeros_like(hidden_ND)

        loss, grad_head_PVD, grad_hidden_ND = jax.lax.cond(mask_N.any(), compute, skip)
        return (total + loss, grad_head_PVD), grad_hidden_ND

    # Each device adds up what its own rows give, and all devices' sums are added after the scan.
    grad_head_PVD = None
    if train_head:
        zeros_PVD = jnp.zeros((parts, *head_VD.shape), jnp.float32)
        grad_head_PVD = meshes.constrained(zeros_PVD, ("batch", "vocab", None))
    pieces = _split(chunk, hidden_BTD, targets_BT, mask_BT)
    (total, grad_head_PVD), grad_hidden = jax.lax.scan(add, (jnp.float32(0), grad_head_PVD), pieces)
    grad_hidden_BTD = grad_hidden.reshape(-1, rows, chunk, width).swapaxes(0, 1).reshape(hidden_BTD.shape)
    if not train_head:
        return total, (grad_hidden_BTD, None)
    grad_head_VD = _summed(grad_head_PVD).astype(head.value.dtype)
    if parts > 1:  # or the sum would be put off to the end of the step, and a whole head lie there until then
        grad_hidden_BTD, grad_head_VD = jax.lax.optimization_barrier((grad_hidden_BTD, grad_head_VD))
    return total, (grad_hidden_BTD, grad_head_VD)


def _summed(grad_head_PVD):
    """The sum over P, cut as the head is.  Piece by piece of the vocabulary, or another whole head would lie beside
    what the scan has left."""
    parts, vocabulary, width = grad_head_PVD.shape
    if parts == 1:
        return grad_head_PVD[0]
    cuts = meshes.parts_of("vocab", vocabulary)
    pieces = math.gcd(vocabulary // cuts, _PIECES)
    split = grad_head_PVD.reshape(parts, cuts, pieces, -1, width)

    def summed(piece):
        return meshes.constrained(split[:, :, piece].sum(0), ("vocab", None, "embed"))

    return jax.lax.map(summed, jnp.arange(pieces)).swapaxes(0, 1).reshape(vocabulary, width)


def _backward(chunk, residuals, cotangent):
    grad_hidden_BTD, grad_head_VD = residuals
    scaled = (cotangent * grad_hidden_BTD).astype(grad_hidden_BTD.dtype)
    if grad_head_VD is not None:
        grad_head_VD = (cotangent * grad_head_VD).astype(grad_head_VD.dtype)
    return scaled, grad_head_VD, None, None


_chunked.defvjp(_forward, _backward, symbolic_zeros=True)
