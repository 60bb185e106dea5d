"""Optimizers and schedules against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from robust_mo.errors import InputError
from robust_mo.training.optimizers import make_optimizer, make_schedule, set_learning_rate

ADAMW = dict(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)


def test_adamw_with_clipping_equals_torch():
    generator = np.random.default_rng(0)
    params = {"kernel": generator.normal(size=(4, 3)).astype(np.float32), "scale": np.ones(3, np.float32)}
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in params.items()}
    groups = [
        {"params": [theirs["kernel"]], "weight_decay": 0.1},
        {"params": [theirs["scale"]], "weight_decay": 0.0},  # norms do not decay
    ]
    torch_optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    optimizer = make_optimizer("adamw", clip_norm=1.0, **ADAMW)
    state, ours = optimizer.init(params), jax.tree.map(jnp.asarray, params)
    for step in range(1, 8):
        gradient = jax.tree.map(lambda p: generator.normal(size=p.shape).astype(np.float32), params)
        updates, state = optimizer.update(gradient, set_learning_rate(state, 0.01 * step), ours)
        ours = optax.apply_updates(ours, updates)
        for name, value in theirs.items():
            value.grad = torch.tensor(gradient[name])
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        for group in torch_optimizer.param_groups:
            group["lr"] = 0.01 * step
        torch_optimizer.step()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value.detach().numpy(), rtol=1e-5)


def test_equal_settings_share_one_optimizer():
    assert make_optimizer("adamw", clip_norm=1.0, **ADAMW) is make_optimizer("adamw", clip_norm=1.0, **ADAMW)


def test_schedules_at_hand_made_points():
    cosine = make_schedule("cosine", learning_rate=2.0, warmup=0.1, steps=100)
    assert [round(float(cosine(s)), 4) for s in (0, 5, 10, 55, 100)] == [0.0, 1.0, 2.0, 1.0, 0.0]
    linear = make_schedule("linear", learning_rate=2.0, warmup=0.5, steps=100)
    assert [round(float(linear(s)), 4) for s in (0, 25, 50, 75, 100)] == [0.0, 1.0, 2.0, 1.0, 0.0]
    constant = make_schedule("constant", learning_rate=2.0, warmup=0.0, steps=100)
    assert [float(constant(s)) for s in (1, 100)] == [2.0, 2.0]


@pytest.mark.parametrize(
    "work, says",
    [
        (lambda: make_optimizer("adamm", clip_norm=0.0), "adamw"),
        (lambda: make_schedule("cosin", learning_rate=1.0, warmup=0.0, steps=1), "constant, cosine, linear"),
        (lambda: make_schedule("cosine", learning_rate=1.0, warmup=1.5, steps=1), "warmup"),
    ],
)
def test_unknown_names_list_the_known(work, says):
    with pytest.raises(InputError, match=says):
        work()
