"""Optimizers, decays, groups and schedules against torch, the papers' arithmetic in NumPy, and optax's own ones."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen as nn

from configs import default
from robust_mo.errors import InputError
from robust_mo.model import hugging_face
from robust_mo.model import mesh as meshes
from robust_mo.model.llama import LlamaConfig
from robust_mo.training import models
from robust_mo.training.checkpoints import Checkpoints
from robust_mo.training.groups import Group, check_groups, make_groups, norms, paths
from robust_mo.training.optimizers import (
    OPTIMIZERS,
    SCHEDULES,
    gradient_point,
    health,
    make_optimizer,
    make_schedule,
    notes,
)
from robust_mo.training.soap import soap
from robust_mo.training.step import TrainState, train_step
from robust_mo.training.weight_decay import WeightDecay

CONFIG = default.get_config()
GROUPS = make_groups(CONFIG.groups)
NO_DECAY = WeightDecay("none", 0.0, "factors", None)
NAMES = sorted(set(OPTIMIZERS) - {"adam"})  # which is adamw
NO_MOMENT_DTYPE = ("adafactor", "schedule_free")
LAYERS, STEPS = 2, 6


COMMON = dict(groups=GROUPS, decay=NO_DECAY, clip_norm=0.0, moment_dtype="", rounding="nearest", places=None)


def optimizer_named(name, decay=NO_DECAY, **changes):
    settings = COMMON | {"decay": decay} | CONFIG.optimizer[name].to_dict()
    if name == "muon":
        settings["iterations"] = 2  # quicker to compile
    return make_optimizer(name, **(settings | changes))


def parameters(scale=1.0) -> dict:
    """A small model of stacked layers: both orientations of a kernel, norms, an embedding."""
    normal = functools.partial(np.random.default_rng(0).normal, scale=scale)
    shapes = {
        "embed_tokens": (5, 3),
        "layers": {
            "q_proj": {"kernel": (LAYERS, 4, 3)},
            "up_proj": {"kernel": (LAYERS, 3, 6)},
            "input_layernorm": {"scale": (LAYERS, 3)},
        },
        "norm": {"scale": (3,)},
    }
    return jax.tree.map(lambda s: jnp.float32(normal(size=s)), shapes, is_leaf=lambda s: isinstance(s, tuple))


def adapters() -> dict:
    normal = np.random.default_rng(1).normal
    return {"layers": {"q_proj": {n: jnp.float32(normal(size=s)) for n, s in (("a", (2, 4, 2)), ("b", (2, 2, 3)))}}}


def gradients(params, steps=STEPS) -> list:
    generator = np.random.default_rng(2)
    return [jax.tree.map(lambda p: jnp.float32(generator.normal(size=p.shape)), params) for _ in range(steps)]


def rate(step: int) -> float:
    return 0.02 * share(step)


def share(step: int) -> float:
    return (step + 1) / STEPS


def run(optimizer, params, start=None):
    """The parameters after every step."""
    state, trace = optimizer.init(params), []
    start = params if start is None else start
    update = jax.jit(optimizer.update)
    for step, gradient in enumerate(gradients(params)):
        updates, state = update(gradient, state, params, learning_rate=0.02, share=share(step), start=start)
        params = optax.apply_updates(params, updates)
        trace.append(params)
    return trace, state


def matrices(tree):
    """The leaves with stacked layers taken apart: what an optimizer without a notion of layers sees."""
    return [
        part
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
        for part in (np.asarray(leaf) if keys[0].key == "layers" else [np.asarray(leaf)])
    ]


def run_torch(make, params, clip_norm=0.0):
    """The same with a torch optimizer that gets every layer as a parameter of its own."""
    theirs = [torch.nn.Parameter(torch.tensor(part)) for part in matrices(params)]
    optimizers, trace = make(theirs), []
    for step, gradient in enumerate(gradients(params)):
        for parameter, part in zip(theirs, matrices(gradient), strict=True):
            parameter.grad = torch.tensor(part)
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(theirs, clip_norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            optimizer.step()
        trace.append([parameter.detach().numpy().copy() for parameter in theirs])
    return trace


def assert_same(ours, theirs, **tolerance):
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        for a, b in zip(matrices(mine), other, strict=True):
            np.testing.assert_allclose(a, b, **{"rtol": 1e-5, "atol": 1e-6, **tolerance}, err_msg=f"step {step}")


def decayed_alone(make, decay):
    """Torch optimizers of which one decays kernels and the other nothing."""

    def optimizers(theirs):
        kernels = [p for p in theirs if p.ndim == 2 and p.shape != (5, 3)]
        others = [p for p in theirs if all(p is not kernel for kernel in kernels)]
        return [make(kernels, weight_decay=decay), make(others, weight_decay=0.0)]

    return optimizers


@pytest.mark.parametrize(
    "name, kind, theirs",
    [
        ("adamw", "decoupled", functools.partial(torch.optim.AdamW, betas=(0.9, 0.95))),
        ("adam", "l2", functools.partial(torch.optim.Adam, betas=(0.9, 0.95))),
        ("sgd", "l2", functools.partial(torch.optim.SGD, momentum=0.9, lr=1.0)),
        ("adafactor", "decoupled", torch.optim.Adafactor),
    ],
)
def test_equals_torch(monkeypatch, name, kind, theirs):
    """With clipping, a learning rate that changes, and decay of kernels alone."""
    if name == "adafactor":  # torch factors all matrices; optax those with two sides of at least 128
        one = optax.scale_by_factored_rms
        monkeypatch.setattr(optax, "scale_by_factored_rms", functools.partial(one, min_dim_size_to_factor=2))
    make_optimizer.cache_clear()
    optimizer = optimizer_named(name, WeightDecay(kind, 0.1, "factors", None), clip_norm=1.5)
    ours, state = run(optimizer, parameters())
    assert_same(ours, run_torch(decayed_alone(theirs, 0.1), parameters(), clip_norm=1.5))
    assert health(state)["clipped_steps"] == 1


def test_muon_equals_torch(monkeypatch):
    """Newton-Schulz in float32 for torch too; without Nesterov, whose bias optax corrects and torch does not."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)

    def theirs(parameters):
        kernels = [p for p in parameters if p.ndim == 2 and p.shape != (5, 3)]
        others = [p for p in parameters if all(p is not kernel for kernel in kernels)]
        muon = torch.optim.Muon(kernels, weight_decay=0.1, nesterov=False, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.Adam(others, betas=(0.9, 0.95))]

    optimizer = optimizer_named("muon", WeightDecay("decoupled", 0.1, "factors", None), nesterov=False, iterations=5)
    ours, _ = run(optimizer, parameters())
    assert_same(ours, run_torch(theirs, parameters()), rtol=1e-4, atol=1e-5)


def test_muon_equals_optax_on_single_matrices():
    """Stacked kernels are as many matrices; embeddings and norms are Adam's; adapters are matrices."""
    for params in (parameters(), adapters()):
        ours, _ = run(optimizer_named("muon", iterations=5), params)
        taken_apart = matrices(params)
        chosen = [i for i, m in enumerate(taken_apart) if m.ndim == 2 and m.shape != (5, 3)]
        theirs = [jnp.asarray(taken_apart[i]) for i in chosen]
        state = optax.contrib.muon(0.0).init(theirs)

        @jax.jit
        def update(gradient, state, theirs, rate):
            return optax.contrib.muon(rate, consistent_rms=0.2).update(gradient, state, theirs)

        for step, gradient in enumerate(gradients(params)):
            parts = matrices(gradient)
            updates, state = update([jnp.asarray(parts[i]) for i in chosen], state, theirs, rate(step))
            theirs = optax.apply_updates(theirs, updates)
        for i, other in zip(chosen, theirs, strict=True):
            np.testing.assert_allclose(matrices(ours[-1])[i], other, rtol=1e-5, atol=1e-6)


def test_lion_equals_its_paper():
    ours, _ = run(optimizer_named("lion"), parameters())
    theirs, moments, trace = matrices(parameters()), [0.0] * len(matrices(parameters())), []
    for step, gradient in enumerate(gradients(parameters())):
        for i, g in enumerate(matrices(gradient)):
            theirs[i] = theirs[i] - rate(step) * np.sign(0.9 * moments[i] + 0.1 * g)
            moments[i] = 0.99 * moments[i] + 0.01 * g
        trace.append(list(theirs))
    assert_same(ours, trace)


def test_schedule_free_equals_optax_at_its_average():
    """Gradients that depend on where they are taken: those of 1/2 ||p - target||^2."""
    params, target = parameters(), jax.tree.map(lambda p: p + 1, parameters())
    optimizer = optimizer_named("schedule_free")
    theirs = optax.contrib.schedule_free_adamw(0.02, b1=0.9, b2=0.95, weight_decay=0.0)
    point, their_state = params, theirs.init(params)
    theirs = theirs._replace(update=jax.jit(theirs.update))
    ours, state = params, optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(STEPS):
        updates, their_state = theirs.update(jax.tree.map(jnp.subtract, point, target), their_state, point)
        point = optax.apply_updates(point, updates)
        gradient = jax.tree.map(jnp.subtract, gradient_point(state, ours), target)
        updates, state = update(gradient, state, ours, learning_rate=0.02, share=1.0, start=None)
        ours = optax.apply_updates(ours, updates)
    average = optax.contrib.schedule_free_eval_params(their_state, point)
    assert_same([ours], [matrices(average)])
    assert np.abs(matrices(ours)[0] - matrices(point)[0]).max() > 1e-3  # the two places are not one


@pytest.mark.parametrize("given", [dict(shampoo_beta=0.9, one_sided_ratio=1.5), dict(shampoo_beta=0.0)], ids=str)
@pytest.mark.parametrize("first_basis", ["eigh", "qr"])
def test_soap_gets_its_settings(given, first_basis):
    """No two of which are alike, and all of which tell here but for the precision, which a CPU does not know."""
    common = dict(b1=0.8, b2=0.7, eps=1e-3, refresh="staggered", precision="high", first_basis=first_basis)
    settings = common | dict(frequency=2, longest_side=5, one_sided_ratio=0.0) | given
    ours, _ = run(optimizer_named("soap", **settings), parameters())
    theirs = soap(
        **common,
        learning_rate=rate,
        precondition_frequency=2,
        max_precondition_dim=5,
        shampoo_beta=given["shampoo_beta"] or None,
        one_sided_ratio=given.get("one_sided_ratio"),
    )
    params, state, trace = parameters(), theirs.init(parameters()), []
    for gradient in gradients(parameters()):
        changes, state = theirs.update(gradient, state, params)
        params = optax.apply_updates(params, changes)
        trace.append(matrices(params))
    assert_same(ours, trace)


@pytest.mark.parametrize("name", ["full", "high", "fast"])
def test_soap_gets_its_precision(name):
    """Of products with gradients; refreshing has the full one."""
    optimizer, params = optimizer_named("soap", precision=name), parameters()
    at = dict(learning_rate=0.1, share=1.0, start=None)
    told = str(jax.make_jaxpr(lambda g, s, p: optimizer.update(g, s, p, **at))(params, optimizer.init(params), params))
    found = set(re.findall(r"precision=(?:\(Precision\.)?(\w+)", told))
    assert found == {"HIGHEST", {"full": "HIGHEST", "high": "HIGH", "fast": "DEFAULT"}[name]}


def test_soap_that_is_adam_for_most_of_a_model_says_so():
    params = {"embed_tokens": jnp.ones((64, 8)), "layers": {"up_proj": {"kernel": jnp.ones((2, 8, 32))}}}
    params["layers"]["norm"] = {"scale": jnp.ones((2, 8))}
    assert notes(optimizer_named("soap", longest_side=8).init(params)) == []
    (note,) = notes(jax.eval_shape(optimizer_named("soap", longest_side=7).init, params))
    assert note.startswith("soap has bases for 0% of what it trains")
    half = {"embed_tokens": jnp.ones((64, 16)), "layers": params["layers"]}
    (note,) = notes(optimizer_named("soap", longest_side=8).init(half))
    assert "for 33% of" in note and notes(optimizer_named("adamw").init(half)) == []


def by_hand(params, kind, strength, direction=lambda g: g, groups=None, start=None):
    """SGD without momentum and a decay, leaf by leaf in NumPy float64."""
    start = params if start is None else start
    trace = []
    for step, gradient in enumerate(gradients(params)):

        def move(keys, p, g, p0, step=step):
            path = "/".join(key.key for key in keys)
            decays = not re.fullmatch("embed_tokens|.*norm/scale", path)
            p, g, p0 = (np.asarray(x, np.float64) for x in (p, g, p0))
            lr, s = rate(step), share(step)
            if not decays or kind == "none":
                return p - lr * g
            return {
                "l2": p - lr * (g + strength * p),
                "decoupled": p - lr * g - lr * strength * p,
                "independent": p - lr * g - s * strength * p,
                "to_start": p - lr * g - lr * strength * (p - p0),
            }[kind]

        params = jax.tree.map_with_path(move, params, gradient, start)
        trace.append(matrices(params))
    return trace


@pytest.mark.parametrize("kind", ["none", "l2", "decoupled", "independent", "to_start"])
def test_decay_by_hand(kind):
    decay = WeightDecay(kind, 0.3, "factors", None)
    start = jax.tree.map(lambda p: p + 0.5, parameters())  # as if resumed: the parameters have moved already
    ours, _ = run(optimizer_named("sgd", decay, momentum=0.0), parameters(), start)
    assert_same(ours, by_hand(parameters(), kind, 0.3, start=start))
    if kind != "none":
        with pytest.raises(AssertionError):
            assert_same(ours, by_hand(parameters(), "none", 0.3))


@pytest.mark.parametrize(
    "name, dtype", [*((n, "float32") for n in NAMES), *((n, "bfloat16") for n in NAMES if n != "schedule_free")]
)
def test_decay_is_the_same_for_every_optimizer(name, dtype):
    """One step with decay minus one without, from the same place, is the pull alone; in bfloat16 it is not lost beside
    a direction some hundred times as large."""
    params = jax.tree.map(lambda p: p.astype(dtype), parameters(0.01))

    @jax.jit
    def steps(gradient):
        def step(decay):
            optimizer = optimizer_named(name, decay)
            state = optimizer.init(params)
            rate = dict(learning_rate=jnp.float32(0.02), share=jnp.float32(0.5), start=None)
            return optimizer.update(gradient, state, params, **rate)[0]

        return {kind: step(WeightDecay(kind, 0.3, "factors", None)) for kind in ("none", "decoupled", "independent")}

    found = steps(jax.tree.map(lambda g: g.astype(dtype), gradients(params)[0]))
    for kind, coefficient in (("decoupled", 0.01 * 0.3), ("independent", 0.5 * 0.3)):
        pull = jax.tree.map(jnp.subtract, found[kind], found["none"])
        expected = jax.tree.map_with_path(
            lambda keys, p, c=coefficient: -c * jnp.float32(p) * (keys[-1].key == "kernel"), params
        )
        assert_same([pull], [matrices(expected)], atol=2e-8 if name == "sgd" else 2e-7)


@pytest.mark.parametrize("product", [False, True])
def test_decay_of_adapters(product):
    """Of the factors, or of what they add: the gradient of 1/2 ||s a b||^2 by torch, which forms the whole product."""
    scale = 3.0
    decay = WeightDecay("decoupled", 0.05, "product" if product else "factors", scale)
    ours, _ = run(optimizer_named("sgd", decay, momentum=0.0), adapters())
    a, b = (torch.tensor(np.asarray(adapters()["layers"]["q_proj"][n]), dtype=torch.float64) for n in "ab")
    for step, gradient in enumerate(gradients(adapters())):
        a.requires_grad_(), b.requires_grad_()
        penalty = 0.5 * ((scale * a @ b) ** 2).sum() if product else 0.5 * ((a**2).sum() + (b**2).sum())
        pulls = torch.autograd.grad(penalty, (a, b))
        with torch.no_grad():
            g = [torch.tensor(np.asarray(gradient["layers"]["q_proj"][n]), dtype=torch.float64) for n in "ab"]
            a, b = (p - rate(step) * (d + 0.05 * pull) for p, d, pull in zip((a, b), g, pulls, strict=True))
    for name, value in (("a", a), ("b", b)):
        np.testing.assert_allclose(ours[-1]["layers"]["q_proj"][name], value.numpy(), rtol=1e-5, atol=1e-6)


def test_product_decay_forms_no_product():
    decay = WeightDecay("decoupled", 0.05, "product", 2.0)
    shapes = {"layers": {"q_proj": {"a": (3, 700, 4), "b": (3, 4, 500)}}}
    params = jax.tree.map(lambda s: jnp.zeros(s, jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple))
    optimizer = optimizer_named("sgd", decay)
    lowered = jax.jit(optimizer.update).lower(
        params, optimizer.init(params), params, learning_rate=1.0, share=1.0, start=None
    )
    assert "3x700x4" in lowered.as_text() and "700x500" not in lowered.as_text()


def test_factors_on_the_learning_rate():
    """LoRA+ (arXiv 2402.12354): b at 16 times the rate of a, its decoupled decay too; independent decay is not."""
    groups = tuple(Group(g.name, g.path, 16.0 if g.name == "lora_b" else 1.0, g.weight_decay) for g in GROUPS)
    for kind, decay_of_b in (("decoupled", 16 * 0.01 * 0.3), ("independent", 0.5 * 0.3)):
        optimizer = optimizer_named("sgd", WeightDecay(kind, 0.3, "factors", None), groups=groups, momentum=0.0)
        params, gradient = adapters(), gradients(adapters())[0]
        updates, _ = optimizer.update(
            gradient, optimizer.init(params), params, learning_rate=0.02, share=0.5, start=None
        )
        found, b = (tree["layers"]["q_proj"]["b"] for tree in (updates, params))
        expected = -16 * 0.01 * gradient["layers"]["q_proj"]["b"] - decay_of_b * b
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_one_compiled_step_for_all_learning_rates(name):
    params, gradient = parameters(), gradients(parameters())[0]
    traces = []

    @functools.partial(jax.jit, static_argnames="optimizer")
    def step(optimizer, state, learning_rate, share):
        traces.append(name)
        return optimizer.update(gradient, state, params, learning_rate=learning_rate, share=share, start=params)

    moved = []
    for learning_rate in (0.01, 0.02, 0.04):
        optimizer = optimizer_named(name, WeightDecay("independent", 0.1, "factors", None), clip_norm=1.0)
        state = optimizer.init(params)
        for share in (0.5, 1.0):
            updates, state = step(optimizer, state, jnp.float32(learning_rate), jnp.float32(share))
        moved.append(float(updates["norm"]["scale"][0]))
    assert len(traces) == 1
    np.testing.assert_allclose(moved[1] / moved[0], 2, rtol=1e-3)
    np.testing.assert_allclose(moved[2] / moved[0], 4, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_restored_run_goes_on_with_the_same_bits(tmp_path, name):
    params = parameters()
    dtype = "" if name in NO_MOMENT_DTYPE else "bfloat16"
    optimizer = optimizer_named(name, WeightDecay("to_start", 0.1, "factors", None), clip_norm=1.0, moment_dtype=dtype)
    update = jax.jit(optimizer.update)
    state, now = optimizer.init(params), params
    for step, gradient in enumerate(gradients(params)):
        if step == 3:
            checkpoints = Checkpoints(tmp_path, keep=1)
            checkpoints.save(TrainState(jnp.int32(3), now, state), {})
            checkpoints.close()
            fresh = TrainState(jnp.int32(0), params, optimizer.init(params))
            reopened = Checkpoints(tmp_path, keep=1)
            restored, _ = reopened.restore(fresh)
            reopened.close()
            other, other_state = restored.trainable, restored.optimizer
        updates, state = update(gradient, state, now, learning_rate=0.02, share=share(step), start=params)
        now = optax.apply_updates(now, updates)
        if step >= 3:
            updates, other_state = update(
                gradient, other_state, other, learning_rate=0.02, share=share(step), start=params
            )
            other = optax.apply_updates(other, updates)
    jax.tree.map(np.testing.assert_array_equal, (now, state), (other, other_state))


def test_state_of_another_optimizer_is_refused(tmp_path):
    params = parameters()
    for name in ("adamw", "sgd"):
        checkpoints = Checkpoints(tmp_path, keep=1)
        state = TrainState(jnp.int32(1), params, optimizer_named(name).init(params))
        if name == "adamw":
            checkpoints.save(state, {})
        else:
            with pytest.raises(InputError, match=f"{tmp_path}/1 was saved with another optimizer"):
                checkpoints.restore(state)
        checkpoints.close()


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(NO_MOMENT_DTYPE)))
def test_first_moment_in_bfloat16(name):
    params = parameters()
    exact, _ = run(optimizer_named(name), params)
    rounded, state = run(optimizer_named(name, moment_dtype="bfloat16"), params)
    kept = [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert kept.count(jnp.bfloat16) == len(jax.tree.leaves(params))
    moved, apart = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.tree.map(jnp.subtract, exact[-1], other))])
        for other in (params, rounded[-1])
    )
    assert np.linalg.norm(apart) < 0.02 * np.linalg.norm(moved)


def test_adafactor_goes_on_adapting_in_bfloat16():
    """After 1,000 gradients a hundred smaller ones: its means are those of the same numbers in float32."""

    def after(dtype):
        kernel = jnp.ones((2, 128, 256), dtype)
        params = {"layers": {"q_proj": {"kernel": kernel}}, "norm": {"scale": jnp.ones(8, dtype)}}
        optimizer = optimizer_named("adafactor")

        def one(state, step):
            gradient = jax.tree.map(lambda p: jnp.full_like(p, jnp.where(step < 1000, 1.0, 0.125)), params)
            at = dict(learning_rate=jnp.float32(1e-3), share=jnp.float32(1), start=None)
            return optimizer.update(gradient, state, params, **at)[1], None

        return jax.jit(lambda state: jax.lax.scan(one, state, jnp.arange(1100))[0])(optimizer.init(params))

    jax.tree.map(np.testing.assert_array_equal, after(jnp.bfloat16), after(jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32 updates", "bfloat16 updates"])
def test_stochastic_rounding_goes_to_a_neighbour_and_is_right_in_the_mean(dtype):
    count, step = 2**16, 2.0**-7  # between two bfloat16 numbers from 1 to 2
    params = {"up": jnp.ones(count), "down": -jnp.ones(count), "exact": jnp.full(count, 1.5), "zero": jnp.zeros(count)}
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    updates = {"up": 0.3 * step, "down": -0.3 * step, "exact": 2 * step, "zero": 0.0}
    updates = {name: jnp.full(count, update, dtype) for name, update in updates.items()}
    optimizer = optimizer_named("sgd", rounding="stochastic")
    found = {name: np.float64(x) for name, x in optimizer.added(params, updates, jnp.int32(3)).items()}
    assert set(found["up"]) == {1.0, 1.0 + step} and set(found["down"]) == {-1.0, -1.0 - step}
    for name, sign in (("up", 1), ("down", -1)):  # five standard deviations
        assert abs(sign * found[name].mean() - 1 - 0.3 * step) < 5 * step * (0.3 * 0.7 / count) ** 0.5
    assert set(found["exact"]) == {1.5 + 2 * step} and set(found["zero"]) == {0.0}
    assert not np.array_equal(found["up"], np.float64(optimizer.added(params, updates, jnp.int32(4))["up"]))


def test_small_steps_add_up_where_they_are_rounded_stochastically():
    """400 steps of a hundredth of what separates two bfloat16 numbers, beside the same in float32."""
    steps, rate = 400, 2.0**-7 / 100

    def after(rounding, dtype):
        optimizer = optimizer_named("sgd", momentum=0.0, rounding=rounding)
        params = {"norm": {"scale": jnp.ones(1024, dtype)}}
        gradient = jax.tree.map(jnp.ones_like, params)

        def one(carry, step):
            params, state = carry
            at = dict(learning_rate=jnp.float32(rate), share=jnp.float32(1), start=None)
            updates, state = optimizer.update(gradient, state, params, **at)
            return (optimizer.added(params, updates, step), state), None

        (params, _), _ = jax.jit(jax.lax.scan, static_argnums=0)(
            one, (params, optimizer.init(params)), jnp.arange(steps)
        )
        return np.float64(params["norm"]["scale"])

    exact = after("nearest", jnp.float32).mean()
    assert (after("nearest", jnp.bfloat16) == 1).all()
    np.testing.assert_allclose(after("stochastic", jnp.bfloat16).mean() - 1, exact - 1, rtol=0.02)


@pytest.mark.parametrize("name", sorted(file.stem for file in models.SHAPES.glob("*.json")))
def test_default_groups_fit_every_model_that_is_known(name):
    llama = hugging_face.build(models.shapes_of(name), None, "float32", "float32", "none")
    trained = paths(models.abstract_trainable(llama, meshes.make_mesh(1, -1, 1)))
    check_groups(GROUPS, models.parameter_paths(llama), trained)


def test_norms_of_groups():
    found = norms(GROUPS, parameters())
    leaves = {
        "embeddings": [parameters()["embed_tokens"]],
        "norms": [parameters()["norm"]["scale"], parameters()["layers"]["input_layernorm"]["scale"]],
        "attention": [parameters()["layers"]["q_proj"]["kernel"]],
        "mlp": [parameters()["layers"]["up_proj"]["kernel"]],
    }
    assert set(found) == set(leaves)
    for name, members in leaves.items():
        expected = np.linalg.norm(np.concatenate([np.ravel(m) for m in members]))
        np.testing.assert_allclose(found[name], expected, rtol=1e-6)
    assert {name: n.dtype for name, n in norms(GROUPS, {"norm": {"scale": jnp.ones(3, jnp.bfloat16)}}).items()} == {
        "norms": jnp.float32
    }


def test_runs_of_all_optimizers_have_the_same_curves():
    """But for what each says of itself, under `optimizer/`."""
    llama = hugging_face.build(
        LlamaConfig(64, 16, 32, 2, 2, 1, 8, 64, 1e-5, 1e4, None, True, False, False), None, "float32", "float32", "none"
    )
    params = nn.unbox(hugging_face.abstract_variables(llama)["params"])
    whole = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    batch = dict.fromkeys(("tokens", "positions", "segments", "targets"), whole)
    batch["loss_mask"] = jax.ShapeDtypeStruct((2, 8), jnp.bool)
    curves = {}
    for name in NAMES:
        optimizer = optimizer_named(name, clip_norm=1.0)
        state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(optimizer.init, params))
        step = functools.partial(train_step, model=llama, optimizer=optimizer, chunk=8, micro_batches=1)
        _, metrics = jax.eval_shape(step, state, None, params, batch, jnp.float32(1), jnp.float32(1))
        curves[name] = {curve for curve in metrics if not curve.startswith("optimizer/")}
    assert {"loss", "distance_from_start", "update_norm/mlp", "start_distance/attention"} <= curves["soap"]
    assert all(found == curves["adamw"] for found in curves.values()), curves


def test_share_of_clipped_steps():
    params = {"norm": {"scale": jnp.ones(3)}}
    optimizer = optimizer_named("sgd", clip_norm=2.0)
    state = optimizer.init(params)
    for size in (1.0, 5.0, 1.0, 1.0):
        gradient = {"norm": {"scale": jnp.array([size, 0, 0])}}
        _, state = optimizer.update(gradient, state, params, learning_rate=1.0, share=1.0, start=None)
    assert health(state) == {"clipped_steps": 0.25}
    assert health(optimizer_named("sgd").init(params)) == {}


def test_schedules_at_hand_made_points():
    def points(name, warmup, steps):
        schedule = make_schedule(name, warmup=warmup, descent=0.2, steps=100)
        return [round(float(schedule(step)), 4) for step in steps]

    assert points("cosine", 0.1, (0, 5, 10, 55, 100)) == [0.0, 0.5, 1.0, 0.5, 0.0]
    assert points("linear", 0.5, (0, 25, 50, 75, 100)) == [0.0, 0.5, 1.0, 0.5, 0.0]
    assert points("linear", 0.0, (0, 25, 100)) == [1.0, 0.75, 0.0]
    assert points("constant", 0.0, (1, 100)) == [1.0, 1.0]
    assert points("constant", 0.1, (1, 10, 100)) == [0.1, 1.0, 1.0]
    assert points("warmup_stable_decay", 0.1, (0, 5, 10, 80, 90, 100)) == [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"constant"}))
def test_schedules_of_few_steps_end_at_zero(name):
    """Where the shares of climb and descent, rounded apart, have a step more than the run."""
    for steps, warmup in itertools.product((1, 2, 3, 7, 31), (0.0, 0.5, 0.99)):
        schedule = make_schedule(name, warmup=warmup, descent=1 - warmup, steps=steps)
        shares = np.asarray(jax.vmap(schedule)(jnp.arange(steps + 1)))
        assert abs(shares[-1]) < 1e-6 and (steps == 1 or max(shares[1:]) > 0.4), (steps, warmup, shares)


RULES = dict(everything=["norm/scale", "layers/q_proj/kernel"], trained=["norm/scale"])


@pytest.mark.parametrize(
    "work, says",
    [
        (lambda: make_optimizer("adamm", **COMMON), "adam, adamw"),
        (lambda: optimizer_named("sgd", rounding="up"), "rounding is 'up': choose from nearest, stochastic"),
        (lambda: optimizer_named("lion", b3=0.5), "lion takes b1, b2, moment_dtype; look at b3"),
        (lambda: optimizer_named("adamw", moment_dtype="float16"), "float16.*: choose float32, bfloat16"),
        (lambda: optimizer_named("adafactor", moment_dtype="bfloat16"), "but adafactor takes none"),
        (lambda: optimizer_named("schedule_free", b1=0.0).init({}), "schedule_free.b1 is 0.0"),
        (lambda: optimizer_named("schedule_free").init({"a": jnp.ones(1, jnp.bfloat16)}), "param_dtype float32"),
        (lambda: WeightDecay("decuopled", 0.1, "factors", None), "none, l2, decoupled, independent, to_start"),
        (lambda: WeightDecay("decoupled", 0.1, "a", None), "config.weight_decay.adapters is 'a'.*factors, product"),
        (lambda: WeightDecay("decoupled", -0.1, "factors", None), "strength is -0.1"),
        (lambda: WeightDecay("decoupled", float("nan"), "factors", None), "strength is nan"),
        (lambda: WeightDecay("to_start", 0.1, "product", 2.0), "product is pulled to zero alone"),
        (lambda: make_schedule("cosin", warmup=0.0, descent=0.2, steps=1), "constant, cosine, linear, warmup_stable"),
        (lambda: make_schedule("cosine", warmup=1.5, descent=0.2, steps=1), "warmup is 1.5"),
        (lambda: make_schedule("cosine", warmup=float("nan"), descent=0.2, steps=1), "warmup is nan"),
        (lambda: make_schedule("warmup_stable_decay", warmup=0.5, descent=0.6, steps=1), "descent is 0.6"),
        (lambda: make_groups({"x": dict(path="(", learning_rate=1.0, weight_decay=0.0)}), "x.path .* no regular"),
        (lambda: make_groups({"x": dict(path="a", learning_rate=-1.0, weight_decay=0.0)}), "x.learning_rate is -1.0"),
        (lambda: make_groups({"x": dict(path="a", learning_rate=1.0, weight_decay=float("nan"))}), "decay is nan"),
        (lambda: check_groups((Group("x", "norm/scale", 1, 0),), **RULES), "^layers/q_proj/kernel: no config.groups"),
        (
            lambda: check_groups((Group("x", ".*", 1, 0), Group("y", "norm.*", 1, 0)), **RULES),
            "^norm/scale: several config.groups",
        ),
        (
            lambda: check_groups((Group("x", ".*", 1, 0), Group("y", "lora", 1, 0)), **RULES),
            "groups.y.path is 'lora', which fits none of norm/scale, layers/q_proj/kernel",
        ),
        (
            lambda: check_groups((Group("x", "norm.*", 1, 0), Group("y", ".*kernel", 2, 0)), **RULES),
            "groups.y.learning_rate is 2, but nothing of this group is trained",
        ),
    ],
)
def test_what_cannot_be_used_is_named(work, says):
    with pytest.raises(InputError, match=says):
        work()


def test_equal_settings_share_one_optimizer():
    assert OPTIMIZERS["adam"] is OPTIMIZERS["adamw"]
    assert optimizer_named("muon") is optimizer_named("muon")
    assert optimizer_named("muon") is not optimizer_named("muon", iterations=4)
