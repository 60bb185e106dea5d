"""The chunked loss against torch's cross-entropy, value and gradients; what devices tell each other for it."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import REPOSITORY

from robust_mo.training.loss import summed_cross_entropy


def example(fill):
    generator = np.random.default_rng(0)
    hidden = generator.normal(size=(3, 10, 8)).astype(np.float32)
    head = generator.normal(size=(40, 8)).astype(np.float32)
    targets = generator.integers(0, 40, (3, 10)).astype(np.int32)
    mask = generator.random((3, 10)) < fill
    return hidden, head, targets, mask


@pytest.mark.parametrize("chunk", [1, 3, 5, 10, 64])
@pytest.mark.parametrize("fill", [0.0, 0.3, 1.0])
def test_value_and_gradients_equal_torch(chunk, fill):
    hidden, head, targets, mask = example(fill)

    def ours(hidden, head):
        return 0.5 * summed_cross_entropy(hidden, head, targets, mask, chunk)

    value, (grad_hidden, grad_head) = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(hidden, head)
    assert np.isclose(jax.jit(ours)(hidden, head), value, rtol=1e-6)  # without a gradient

    h, w = (torch.tensor(x, requires_grad=True) for x in (hidden, head))
    labels = torch.tensor(np.where(mask, targets, -100).reshape(-1), dtype=torch.long)
    loss = 0.5 * torch.nn.functional.cross_entropy((h @ w.T).reshape(-1, 40), labels, reduction="sum")
    loss.backward()
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grad_hidden, h.grad.numpy(), atol=1e-5)
    np.testing.assert_allclose(grad_head, w.grad.numpy(), atol=1e-5)


def test_frozen_head_costs_no_gradient():
    hidden, head, targets, mask = example(1.0)

    def products(argnums):
        gradient = jax.grad(lambda h, w: summed_cross_entropy(h, w, targets, mask, 5), argnums)
        return str(jax.make_jaxpr(gradient)(hidden, head)).count("dot_general")

    assert products(0) == products((0, 1)) - 1


def test_logits_of_the_whole_batch_are_never_there():
    hidden = jnp.zeros((2, 64, 8))
    head, targets, mask = jnp.zeros((999, 8)), jnp.zeros((2, 64), int), jnp.ones((2, 64), bool)
    gradient = jax.grad(lambda h, w: summed_cross_entropy(h, w, targets, mask, 16), argnums=(0, 1))
    program = str(jax.make_jaxpr(gradient)(hidden, head))
    assert "f32[32,999]" in program
    assert "64,999" not in program and "128,999" not in program


EIGHT_DEVICES = """
import json
import jax, jax.numpy as jnp
from robust_mo.analysis.programs import collectives
from robust_mo.model import mesh as meshes
from robust_mo.training.loss import summed_cross_entropy

mesh, found = meshes.make_mesh(2, 2, 2), {}

def shape(dtype, *sizes, names):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=meshes.sharding(sizes, names, mesh))

def program(kind, chunk, hidden, head, targets, mask):
    loss = lambda hidden, head: summed_cross_entropy(hidden, head, targets, mask, chunk)
    return {"trained": jax.grad(loss, (0, 1)), "frozen": jax.grad(loss), "value": loss}[kind](hidden, head)

hidden = shape(jnp.float32, 8, 64, 32, names=("batch", None, None))
head = shape(jnp.float32, 1024, 32, names=("vocab", "embed"))
targets, mask = (shape(dtype, 8, 64, names=("batch", None)) for dtype in (jnp.int32, bool))
for kind in ("trained", "frozen", "value"):
    for chunks in (1, 8):
        with meshes.in_force(mesh):
            lowered = jax.jit(program, static_argnums=(0, 1)).lower(kind, 64 // chunks, hidden, head, targets, mask)
        told = collectives(lowered.compile().as_text())
        found[f"{kind} {chunks}"] = {name: told[name]["bytes"] for name in ("all-gather", "all-reduce")}

like, keys = (hidden, head, targets, mask), jax.random.split(jax.random.key(0), 4)
normal = [jax.random.normal(key, x.shape) for key, x in zip(keys, like[:2])]
values = *normal, jax.random.randint(keys[2], targets.shape, 0, 1024), jax.random.bernoulli(keys[3], 0.5, mask.shape)
alone = jax.device_get(program("trained", 16, *values))
with meshes.in_force(mesh):
    placed = [jax.device_put(value, x.sharding) for value, x in zip(values, like)]
    shared = jax.device_get(jax.jit(program, static_argnums=(0, 1))("trained", 16, *placed))
apart = [float(abs(a - b).max() / abs(a).max()) for a, b in zip(alone, shared)]
print(json.dumps([found, apart]))
"""


def test_devices_tell_each_other_the_head_once():
    """However many chunks there are: the half with which a device works is gathered, and its gradient summed.  Which is
    that of one device."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(REPOSITORY),
    }
    done = subprocess.run([sys.executable, "-c", EIGHT_DEVICES], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found, apart = json.loads(done.stdout.splitlines()[-1])
    assert len(apart) == 2 and max(apart) < 1e-5
    half = 1024 // 2 * 32 * 4
    assert {told["all-gather"] for told in found.values()} == {half}
    for chunks in (1, 8):
        assert found[f"trained {chunks}"]["all-reduce"] - found[f"frozen {chunks}"]["all-reduce"] == half
