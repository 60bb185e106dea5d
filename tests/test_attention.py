"""Attention of packed rows and over a cache: the kernels of TPU and GPU, interpreted here, against plain products,
which test_llama.py compares with transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mo.model import attention, live_attention
from robust_mo.model import mesh as meshes
from robust_mo.model.attention import gives_the_same


def rows(B: int, T: int, H: int, G: int, K: int):
    """Queries, keys, values, and segments of several lengths with padding at the end of one row."""
    shapes = ((B, T, H, K), (B, T, G, K), (B, T, G, K))
    q, k, v = (jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate(shapes))
    segments = np.ones((B, T), np.int32)
    segments[0, T // 3 :] = 2
    segments[0, T - 17 :] = 0
    return q, k, v, jnp.asarray(segments)


@pytest.mark.parametrize(
    "T, H, G, K",
    [(256, 4, 2, 64), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((384, 2, 1, 64), (256, 4, 4, 128)))],
)
def test_kernel_gives_what_products_give_with_the_same_gradients(T, H, G, K):
    """In one block, and in three, of which a segment begins within the second."""
    *qkv, segments = rows(2, T, H, G, K)
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


def test_jax_attention_gives_what_products_give():
    """By XLA; cuDNN's has the same arguments, and is compared where a GPU is."""
    *qkv, segments = rows(2, 96, 4, 2, 16)
    plain = attention.attend_packed(*qkv, segments)
    np.testing.assert_allclose(attention.by_jax(*qkv, segments, "xla"), plain, atol=2e-6)
    with meshes.in_force(meshes.make_mesh(1, -1, 1)):  # as in a program
        np.testing.assert_allclose(attention.by_jax(*qkv, segments, "xla"), plain, atol=2e-6)


def test_implementation_that_the_device_lacks_or_that_errs_is_left_out(monkeypatch, capsys):
    @jax.jit
    def traced(x):
        assert attention._agrees("xla", 4, 2, 16) and not attention._agrees("cudnn", 4, 2, 16)
        assert not attention._agrees("cudnn", 4, 2, 16)
        return x

    with meshes.in_force(meshes.make_mesh(1, -1, 1)):  # as in a program
        traced(1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: no cudnn attention here (") and line.endswith("; products of matrices instead")
    monkeypatch.setattr(attention, "_by_jax_here", lambda q, *_, **__: q)
    assert not attention._agrees("xla", 8, 2, 16) and "it is off by" in capsys.readouterr().err


def test_falling_back_to_products_is_said_once(monkeypatch, capsys):
    *qkv, segments = rows(1, 513, 4, 2, 16)
    short = [x[:, :129] for x in (*qkv, segments)]
    attention._told_once.cache_clear()
    for device, dtype, says in (
        ("gpu", "float32", "cuDNN's attention takes no float32"),
        ("gpu", "bfloat16", "cuDNN's attention takes no rows of 513 tokens, an odd number"),
        ("tpu", "bfloat16", "the TPU's attention takes no rows of 513 tokens, no multiple of 128"),
    ):
        monkeypatch.setattr(jax, "default_backend", lambda device=device: device)
        attention.attend_packed(*(x.astype(dtype) for x in short[:3]), short[3])
        for _ in range(2):
            attention.attend_packed(*(x.astype(dtype) for x in qkv), segments)
        assert capsys.readouterr().err == f"note: {says}: products of matrices instead, which hold all scores\n"


def abstract_mesh(layout):
    """Its axes are of the kind that model/mesh.py makes them; jax's default differs between versions."""
    auto = (jax.sharding.AxisType.Auto,) * len(layout)
    return jax.sharding.AbstractMesh(layout, meshes.AXES, axis_types=auto)


@pytest.mark.parametrize("layout", [(1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_kernel_takes_rows_and_heads_that_the_mesh_does_not_divide(layout):
    """As an evaluation's last rows, on any device: every branch is traced everywhere."""
    *qkv, segments = rows(3, 128, 4, 2, 64)
    with jax.sharding.use_abstract_mesh(abstract_mesh(layout)):
        assert jax.eval_shape(attention.by_splash_kernel, *qkv, segments).shape == qkv[0].shape
        by_jax = functools.partial(attention.by_jax, implementation="xla")
        assert jax.eval_shape(by_jax, *qkv, segments).shape == qkv[0].shape


def cached(B: int, S: int, H: int, G: int, K: int):
    """A token a row, a full cache, and positions: the first, the last, those about a block's edge, some more."""
    shapes = ((B, 1, H, K), (B, 1, G, K), (B, 1, G, K), (B, G, K, S), (B, G, S, K))
    given = (jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate(shapes))
    positions = [0, S - 1, 127, 128, 129, *np.random.default_rng(0).integers(0, S, B)][:B]
    return *given, jnp.array(positions, jnp.int32)[:, None]


@pytest.mark.parametrize("dtype, atol", [("float32", 2e-6), ("bfloat16", 0.02)])
@pytest.mark.parametrize("kernel", [live_attention.on_tpu, live_attention.on_gpu], ids=["tpu", "gpu"])
@pytest.mark.parametrize("H, G, K", [(6, 2, 64), (32, 1, 16)])
def test_kernels_over_a_cache_give_what_products_give_and_read_live_blocks_alone(kernel, H, G, K, dtype, atol):
    *given, positions = cached(7, 384, H, G, K)  # in blocks of 128
    *token, k, v = (x.astype(dtype) for x in given)
    plain, *cache = live_attention.attend_live(*token, k, v, positions)
    # Whatever is read of the blocks beyond a row's last one would spoil all.
    dead = jnp.arange(384) >= (positions // 128 + 1) * 128
    k, v = (jnp.where(where, jnp.nan, x) for where, x in ((dead[:, None, None], k), (dead[:, None, :, None], v)))
    assert not np.isfinite(live_attention.attend_live(*token, k, v, positions)[0]).all()
    with meshes.in_force(meshes.make_mesh(1, -1, 1)):  # as in a program
        ours, *ours_cache = live_attention.by_kernel(*token, k, v, positions, functools.partial(kernel, interpret=True))
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (ours, plain)), atol=atol)
    for entries, wanted, where in zip(ours_cache, cache, (dead[:, None, None], dead[:, None, :, None]), strict=True):
        wanted = jnp.where(where, jnp.nan, wanted)
        np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (entries, wanted)))


@pytest.mark.parametrize("capacity", [256, 1024])
def test_new_entries_go_where_they_belong_in_wider_blocks(capacity):
    """On a TPU those are of 256 and 512 entries, of which tiles of 128 and 16 are written."""
    *given, positions = cached(9, capacity, 4, 2, 16)
    wanted = live_attention.attend_live(*given, positions)
    ours = live_attention.by_kernel(*given, positions, functools.partial(live_attention.on_tpu, interpret=True))
    np.testing.assert_allclose(ours[0], wanted[0], atol=2e-6)
    for entries, expected in zip(ours[1:], wanted[1:], strict=True):
        np.testing.assert_array_equal(entries, expected)


@pytest.mark.parametrize("layout", [(1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_kernels_over_a_cache_take_rows_and_heads_that_the_mesh_does_not_divide(layout):
    arguments = cached(3, 128, 4, 2, 64)
    with jax.sharding.use_abstract_mesh(abstract_mesh(layout)):
        found = jax.eval_shape(live_attention.attend_live, *arguments)
        assert [x.shape for x in found] == [arguments[n].shape for n in (0, 3, 4)]


def test_the_gpu_kernel_is_used_only_where_it_gives_what_products_give(monkeypatch, capsys):
    @jax.jit
    def traced(x):
        return x + live_attention._agrees(6, 2, 64, jnp.dtype(jnp.bfloat16))

    right = live_attention.on_gpu
    for kernel, says in (
        (functools.partial(right, interpret=True), ""),
        (right, "Only interpret mode is supported on CPU backend"),
        (lambda positions, *given: right(positions - 1, *given, interpret=True), "it is off by"),
    ):
        monkeypatch.setattr(live_attention, "on_gpu", kernel)
        live_attention._agrees.cache_clear()
        jax.clear_caches()
        with meshes.in_force(meshes.make_mesh(1, -1, 1)):  # as in a program
            assert traced(0) == (not says)
        said = capsys.readouterr().err
        assert says in said and bool(said) == bool(says)
    live_attention._agrees.cache_clear()


def test_a_kernel_that_gives_what_is_no_number_is_not_used(capsys):
    right, wrong = [np.ones(3, np.float32)] * 2, [np.ones(3, np.float32), np.array([1, np.nan, 1], np.float32)]
    assert gives_the_same("some", lambda: right, lambda: right)
    assert not gives_the_same("some", lambda: wrong, lambda: right)
    assert "no some attention here (it is off by nan)" in capsys.readouterr().err


def test_the_gpu_kernel_can_be_written_down_for_a_gpu():
    """No GPU is needed for that; what it computes there is asked of it before it is used."""
    attend = functools.partial(live_attention.by_kernel, kernel=live_attention.on_gpu)
    arguments = [x.astype(jnp.bfloat16) if x.ndim == 4 else x for x in cached(4, 256, 8, 2, 128)]
    try:
        program = jax.jit(attend).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:  # jax 0.12
        if isinstance(error, NotImplementedError):  # of what Triton's lowering lacks: the kernel's fault
            raise
        pytest.skip(str(error))
    assert "triton" in program
