"""Attention of packed rows: the TPU's kernel, interpreted here, against plain products, which test_llama.py compares
with transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mo.model import attention
from robust_mo.model import mesh as meshes


def rows(B: int, T: int, H: int, G: int, K: int):
    """Queries, keys, values, and segments of several lengths with padding at the end of one row."""
    shapes = ((B, T, H, K), (B, T, G, K), (B, T, G, K))
    q, k, v = (jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate(shapes))
    segments = np.ones((B, T), np.int32)
    segments[0, T // 3 :] = 2
    segments[0, T - 17 :] = 0
    return q, k, v, jnp.asarray(segments)


@pytest.mark.parametrize("H, G, K", [(4, 2, 64), pytest.param(4, 4, 128, marks=pytest.mark.slow)])
def test_kernel_gives_what_products_give_with_the_same_gradients(H, G, K):
    *qkv, segments = rows(2, 256, H, G, K)
    weights = jax.random.normal(jax.random.key(9), qkv[0].shape)

    def value_and_gradient(attend, *arguments):
        return jax.value_and_grad(lambda *qkv: (attend(*qkv, segments, *arguments) * weights).sum(), (0, 1, 2))(*qkv)

    plain = attention.attend_packed(*qkv, segments)
    with meshes.in_force(meshes.make_mesh(1, -1, 1)):  # as in a program
        kernel = attention.by_splash_kernel(*qkv, segments, True)
        ours = value_and_gradient(attention.by_splash_kernel, True)
    np.testing.assert_allclose(kernel, plain, atol=2e-6)
    theirs = value_and_gradient(attention.attend_packed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), ours, theirs)


@pytest.mark.parametrize("layout", [(1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_kernel_takes_rows_and_heads_that_the_mesh_does_not_divide(layout):
    """As an evaluation's last rows, on any device: every branch is traced everywhere."""
    *qkv, segments = rows(3, 128, 4, 2, 64)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(layout, meshes.AXES)):
        assert jax.eval_shape(attention.by_splash_kernel, *qkv, segments).shape == qkv[0].shape
