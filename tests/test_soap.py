"""SOAP against the paper's algorithm in NumPy, against another library's, and against what it must not become."""

import functools
import inspect
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import pytorch_optimizer
import torch
from flax import linen as nn

from benchmarks.optimizer_step import per_tensor_soap
from robust_mo.errors import InputError
from robust_mo.model import hugging_face
from robust_mo.model.llama import PROJECTIONS, LlamaConfig
from robust_mo.model.lora import LoraSpec
from robust_mo.training import soap as module
from robust_mo.training.checkpoints import Checkpoints
from robust_mo.training.soap import soap
from robust_mo.training.step import TrainState

STEPS, FREQUENCY, LIMIT, RATE, DECAY = 30, 4, 9, 0.02, 0.1
# Square, wide, tall, one side over LIMIT, a stack of three, a vector, a stack of vectors.
SHAPES = {
    "square": (6, 6),
    "wide": (4, 9),
    "tall": (7, 3),
    "long": (12, 5),
    "stack": (3, 6, 5),
    "vector": (7,),
    "scale": (3, 5),
}


class Paper:
    """Algorithm 3 of arXiv 2409.11321 for one array of at most two axes, float64, with its authors' details.

    It has its turn `phase` steps after those that the frequency divides.  Flags make it wrong in one way each:
    `refreshes` False never refreshes; `delay` refreshes that many steps late; `permutes` False leaves the second moment
    where it was when the vectors are sorted.
    """

    def __init__(self, weights, *, frequency=FREQUENCY, limit=LIMIT, phase=0, refreshes=True, delay=0, permutes=True):
        self.w, self.frequency, self.phase = weights, frequency, phase
        self.refreshes, self.delay, self.permutes = refreshes, delay, permutes
        matrix = weights.ndim == 2
        self.sides = [axis for axis in range(2) if matrix and weights.shape[axis] <= limit]
        self.F = {axis: np.zeros((weights.shape[axis],) * 2) for axis in self.sides}
        self.Q = None
        self.M, self.V, self.t = np.zeros_like(weights), np.zeros_like(weights), 0

    def turn(self, x, back=False):
        """x in the basis (one axis after the other), or back out of it."""
        for axis in self.sides:
            q = self.Q[axis] if back else self.Q[axis].T
            x = np.moveaxis(np.tensordot(q, x, axes=(1, axis)), 0, axis)
        return x

    def gather(self, G, beta):
        for axis in self.sides:
            self.F[axis] = beta * self.F[axis] + (1 - beta) * (G @ G.T if axis == 0 else G.T @ G)

    def step(self, G, bases=None, *, rate=RATE, b1=0.9, b2=0.93, beta=0.97, eps=1e-8, decay=DECAY):
        """One gradient; `bases` are the first ones, where eigenvalues repeat and eigenvectors are anyone's choice."""
        if self.Q is None:
            self.gather(G, beta)
            self.Q = bases if bases is not None else {a: np.linalg.eigh(f)[1][:, ::-1] for a, f in self.F.items()}
            return
        self.t += 1
        rotated = self.turn(G)
        # The first moment stays in the parameters' own space here and is turned anew in each step.
        self.M = b1 * self.M + (1 - b1) * G
        self.V = b2 * self.V + (1 - b2) * rotated**2
        direction = self.turn(self.turn(self.M) / (np.sqrt(self.V) + eps), back=True)
        self.w = self.w - rate * np.sqrt(1 - b2**self.t) / (1 - b1**self.t) * direction
        self.w = self.w - rate * decay * self.w
        self.gather(G, beta)
        due = self.t - self.delay
        if self.refreshes and due > 0 and (due - self.phase) % self.frequency == 0:
            for axis in self.sides:
                power = self.F[axis] @ self.Q[axis]
                order = np.argsort(-np.diag(self.Q[axis].T @ power))
                if self.permutes:
                    self.V = np.take(self.V, order, axis=axis)
                self.Q[axis] = np.linalg.qr(power[:, order])[0]


def gradients(shapes, steps, seed=0):
    """Random gradients, spread over three decades in fixed, turned directions; with time the order is turned round.

    Spread, so that few eigenvalues come near one another; turned round, so that vectors have to be sorted anew.
    """
    generator = np.random.default_rng(seed)
    directions = {
        name: [np.linalg.qr(generator.normal(size=(k, k)))[0] for k in shape[-2:]] for name, shape in shapes.items()
    }
    for step in range(steps):
        found = {}
        for name, shape in shapes.items():
            g = generator.normal(size=shape)
            if len(shape) > 1 and name != "scale":
                exponent = 0.75 * np.cos(np.pi * step / STEPS)
                left, right = (q * np.logspace(exponent, -exponent, len(q)) for q in directions[name])
                g = left @ g @ right.T + 0.01 * generator.normal(size=shape)
            found[name] = g
        yield found


def starting(shapes):
    generator = np.random.default_rng(1)
    return {name: generator.normal(size=shape) for name, shape in shapes.items()}


def run(optimizer, params, given, state=None):
    """Parameters and state after each of the gradients."""
    params = jax.tree.map(jnp.asarray, params)
    state, update = optimizer.init(params) if state is None else state, jax.jit(optimizer.update)
    history = []
    for gradient in given:
        changes, state = update(jax.tree.map(lambda g, p: jnp.asarray(g, p.dtype), gradient, params), state, params)
        params = optax.apply_updates(params, changes)
        history.append((params, state))
    return history


OURS = dict(
    learning_rate=RATE,
    b1=0.9,
    b2=0.93,
    shampoo_beta=0.97,
    weight_decay=DECAY,
    precondition_frequency=FREQUENCY,
    max_precondition_dim=LIMIT,
)


@pytest.fixture(scope="module")
def unbroken():
    return in_float64()


def in_float64(shapes=SHAPES, **settings):
    """(parameters, state) after each of STEPS gradients, in float64 so that ties and rounding decide nothing."""
    with jax.enable_x64(True):
        history = run(soap(**OURS, **settings), starting(shapes), gradients(shapes, STEPS))
        assert history[-1][1].mu["stack"].dtype == jnp.float64
        return jax.device_get(history)


def single(tree, name, layer):
    """One matrix or vector of a leaf."""
    return tree[name] if layer is None else tree[name][layer]


def matrices(shapes=SHAPES):
    for name, shape in shapes.items():
        stacked = len(shape) == 3 or name == "scale"
        yield from ((name, layer) for layer in (range(shape[0]) if stacked else (None,)))


def distance_from_paper(unbroken, name, layer, shapes=SHAPES, **wrong):
    """Largest difference between our weights and the paper's in any step, relative to how far the paper's went."""
    weights = single(starting(shapes), name, layer)
    paper, worst = Paper(weights, **wrong), 0
    first = unbroken[0][1].bases[name]
    bases = {axis: single(first, side, layer) for axis, side in enumerate(("left", "right")) if side in first}
    for (params, _), gradient in zip(unbroken, gradients(shapes, STEPS), strict=True):
        paper.step(single(gradient, name, layer), bases=bases.copy())
        worst = max(worst, np.abs(paper.w - single(params, name, layer)).max())
    return worst / np.abs(paper.w - weights).max()


@pytest.mark.parametrize("name, layer", matrices())
def test_thirty_steps_equal_the_paper(unbroken, name, layer):
    # float64 on both sides: 1e-9 leaves room for rounding through seven refreshes and none for another formula.
    assert distance_from_paper(unbroken, name, layer) < 1e-9


def test_staggered_steps_equal_the_papers_at_every_matrix_turn():
    # Two gradients, after which the second matrix has its turn, must give all sides a factor of full rank.
    shapes = {"long": (12, 5), "short": (4, 5), "square": (6, 6), "stack": (3, 6, 5)}
    history = in_float64(shapes, refresh="staggered")
    for number, place in enumerate(matrices(shapes)):
        phase = number % FREQUENCY
        assert distance_from_paper(history, *place, shapes, phase=phase) < 1e-9, place
        assert distance_from_paper(history, *place, shapes, phase=(phase + 1) % FREQUENCY) > 1e-3, place


@pytest.mark.parametrize("wrong", [dict(refreshes=False), dict(delay=1), dict(permutes=False)], ids=str)
def test_a_wrong_algorithm_is_told_apart(unbroken, wrong):
    for name, layer in matrices():
        if name not in ("vector", "scale"):
            assert distance_from_paper(unbroken, name, layer, **wrong) > 1e-3, (name, layer)


def test_the_first_bases_are_eigenvectors_by_falling_eigenvalue(unbroken):
    first = next(gradients(SHAPES, 1))
    for name in ("square", "wide", "tall", "long", "stack"):
        g = first[name]
        sides = {"left": g @ g.swapaxes(-1, -2), "right": g.swapaxes(-1, -2) @ g}
        for side, basis in unbroken[0][1].bases[name].items():
            transposed = basis.swapaxes(-1, -2)
            np.testing.assert_allclose(
                transposed @ basis, np.broadcast_to(np.eye(basis.shape[-1]), basis.shape), atol=1e-12
            )
            values = np.linalg.eigvalsh(0.05 * sides[side])[..., ::-1]
            diagonal = values[..., None] * np.eye(basis.shape[-1])
            np.testing.assert_allclose(transposed @ (0.05 * sides[side]) @ basis, diagonal, atol=1e-12)


def test_the_first_gradient_moves_nothing(unbroken):
    start, (params, state) = starting(SHAPES), unbroken[0]
    for name, value in start.items():
        np.testing.assert_array_equal(params[name], value)
        assert not state.mu[name].any() and not state.nu[name].any()


def test_loosely_equals_another_librarys():
    """float64 on both sides, but theirs rounds its bases to float32 (1e-7), which a small second moment enlarges.

    Sides longer than the other are over the limit here: a first gradient says nothing of all their eigenvectors.
    """
    shapes = {"square": (6, 6), "wide": (4, 9), "tall": (9, 4), "stack": (3, 6, 6), "vector": (7,)}
    settings = {**OURS, "max_precondition_dim": 6}
    start = starting(shapes)
    with jax.enable_x64(True):
        ours = jax.device_get(run(soap(**settings), start, gradients(shapes, STEPS))[-1][0])
    layers = {(name, i): part for name, value in start.items() for i, part in enumerate(parts(value))}
    theirs = {key: torch.nn.Parameter(torch.tensor(np.array(value))) for key, value in layers.items()}
    optimizer = pytorch_optimizer.SOAP(
        list(theirs.values()),
        lr=RATE,
        betas=(0.9, 0.93),
        shampoo_beta=0.97,
        weight_decay=DECAY,
        precondition_frequency=FREQUENCY,
        max_precondition_dim=6,
    )
    for gradient in gradients(shapes, STEPS):
        for (name, i), value in theirs.items():
            value.grad = torch.tensor(parts(gradient[name])[i])
        optimizer.step()
    for (name, i), value in theirs.items():
        gone = np.abs(value.detach().numpy() - layers[name, i]).max()
        np.testing.assert_allclose(parts(ours[name])[i], value.detach().numpy(), rtol=0, atol=1e-4 * gone)


def test_equals_soap_as_it_is_often_written():
    """A matrix at a time, which is what the benchmark sets beside it."""
    shapes = {"stack": (3, 6, 5), "square": (6, 6), "vector": (7,), "scale": (3, 7)}
    start, given = starting(shapes), list(gradients(shapes, 25))
    with jax.enable_x64(True):
        ours, theirs = (run(optimizer, start, given)[-1][0] for optimizer in (soap(RATE), per_tensor_soap(RATE)))
        for name, value in start.items():
            gone = np.abs(ours[name] - value).max()
            np.testing.assert_allclose(theirs[name], ours[name], rtol=0, atol=1e-9 * gone)


def parts(value):
    return list(value) if value.ndim == 3 else [value]


def test_without_preconditioning_it_is_adam_that_never_saw_the_first_gradient():
    """optax.adam adds eps after correcting nu's bias; adding eps * sqrt(1 - b2^t) there is adding eps before."""
    start = starting(SHAPES)
    given = list(gradients(SHAPES, 12))
    eps = 1e-3  # large, so that its place shows
    ours = run(soap(RATE, b1=0.9, eps=eps, max_precondition_dim=0), start, given)
    assert not jax.tree.leaves(ours[-1][1].factors)
    params, moments = jax.tree.map(jnp.asarray, start), optax.adam(1.0, 0.9, 0.95).init(start)
    for t, gradient in enumerate(given[1:], 1):
        adam = optax.adam(RATE, 0.9, 0.95, eps=eps / np.sqrt(1 - 0.95**t))
        changes, moments = adam.update(gradient, moments, params)
        params = optax.apply_updates(params, changes)
    for name in start:
        np.testing.assert_allclose(ours[-1][0][name], params[name], rtol=0, atol=1e-6)


def test_a_restored_run_equals_the_unbroken_one(tmp_path):
    shapes = {name: SHAPES[name] for name in ("stack", "vector")}
    start = {name: value.astype(np.float32) for name, value in starting(shapes).items()}
    optimizer, given = soap(**OURS), list(gradients(shapes, 12))
    whole, half = run(optimizer, start, given)[-1][0], run(optimizer, start, given[:6])[-1]
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(TrainState(jnp.int32(6), *half), {})
    empty = jax.tree.map(jnp.zeros_like, half)
    restored, _ = checkpoints.restore(TrainState(jnp.int32(0), *empty))
    checkpoints.close()
    again = run(optimizer, restored.trainable, given[6:], restored.optimizer)[-1][0]
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def refreshed_layers(history, name):
    """Whether each layer's left basis changed, `[gradients after the first, layers]`."""
    bases = np.stack([np.asarray(state.bases[name]["left"]) for _, state in history])
    return (bases[1:] != bases[:-1]).any(axis=(-1, -2))


def test_health_is_that_of_the_bases_that_were_refreshed_last():
    history = run(soap(RATE, precondition_frequency=3), starting({"square": (4, 4)}), gradients({"square": (4, 4)}, 6))
    told = [{name: float(value) for name, value in state.health().items()} for _, state in history]
    assert told[0] == told[2] == {"eigenbasis_change": -1, "off_diagonal_mass": -1}  # the first are made, not refreshed
    changes, masses = [], []
    for side in ("left", "right"):
        before, after = (np.asarray(history[i][1].bases["square"][side], np.float64) for i in (2, 3))
        inside = before.T @ np.asarray(history[3][1].factors["square"][side], np.float64) @ before
        masses.append(1 - (np.diag(inside) ** 2).sum() / (inside**2).sum())
        cosines = (before[:, np.argsort(-np.diag(inside))] * after).sum(0)
        changes.append(1 - (cosines**2).mean())
    assert told[3] == told[5] and min(*changes, *masses) > 1e-3
    np.testing.assert_allclose(list(told[3].values()), [np.mean(changes), np.mean(masses)], rtol=1e-3)


def test_bases_that_stand_still_have_turned_by_nothing():
    """Less than nothing, by rounding, would read as having nothing to say."""
    shapes = {"square": (2, 2)}
    still = next(gradients(shapes, 1))
    history = run(soap(RATE, precondition_frequency=1), starting(shapes), [still] * 40)
    assert all(state.change >= 0 for _, state in history[1:]) and history[-1][1].change < 1e-3


def test_health_is_not_that_of_a_factor_without_a_gradient():
    """Such as that of LoRA's a, while b is zero: any basis is as good as another."""
    shapes = {"moves": (4, 4), "rests": (6, 6)}
    given = list(gradients(shapes, 3))
    still = [found | {"rests": np.zeros((6, 6), np.float32)} for found in given]
    optimizer = soap(RATE, precondition_frequency=1)
    told = [
        run(optimizer, {name: start[name] for name in names}, [{name: g[name] for name in names} for g in still])[-1]
        for start, names in ((starting(shapes), ("moves", "rests")), (starting(shapes), ("moves",)))
    ]
    assert told[0][1].health() == told[1][1].health()


def test_health_of_what_is_not_a_number_is_none():
    shapes = {"square": (4, 4)}
    *given, last = gradients(shapes, 3)
    last["square"][0, 0] = np.nan
    _, state = run(soap(RATE, precondition_frequency=1), starting(shapes), [*given, last])[-1]
    assert np.isnan(list(state.health().values())).all()


STACKS = {"first": (5, 4, 3), "second": (2, 3, 4)}


@pytest.mark.parametrize("frequency", [1, 2, 3])
def test_the_frequency_is_steps_between_refreshes(frequency):
    history = run(soap(RATE, precondition_frequency=frequency), starting(STACKS), gradients(STACKS, 8))
    expected = np.arange(1, 8) % frequency == 0
    np.testing.assert_array_equal(refreshed_layers(history, "first"), expected[:, None].repeat(5, axis=1))


def test_staggered_refreshes_every_layer_once_per_frequency():
    staggered = soap(RATE, precondition_frequency=3, refresh="staggered")
    history = run(staggered, starting(STACKS), gradients(STACKS, 10))
    together = np.concatenate([refreshed_layers(history, name) for name in STACKS], axis=1)
    for begin in range(0, 9 - 3 + 1):
        np.testing.assert_array_equal(together[begin : begin + 3].sum(axis=0), 1)
    # Seven matrices over three steps: never more than three at once, whichever leaf they belong to.
    assert together.sum(axis=1).max() == 3 and refreshed_layers(history, "first").sum(axis=1).max() == 2


def test_staggered_at_every_step_is_all_at_once():
    given = list(gradients(STACKS, 6))
    ours = [
        run(soap(RATE, precondition_frequency=1, refresh=refresh), starting(STACKS), given)[-1]
        for refresh in ("staggered", "all_at_once")
    ]
    jax.tree.map(np.testing.assert_array_equal, *ours)


@pytest.mark.parametrize("refresh", ["all_at_once", "staggered"])
def test_all_axes_before_the_last_two_are_one_stack(refresh):
    flat, nested = (in_float64({"stack": shape}, refresh=refresh)[-1] for shape in ((6, 6, 5), (2, 3, 6, 5)))
    for one, other in zip(jax.tree.leaves(flat), jax.tree.leaves(nested), strict=True):
        np.testing.assert_allclose(other.reshape(one.shape), one, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "settings, sides",
    [
        (dict(), {"a": "left right", "b": "left right", "square": "left right"}),
        (dict(max_precondition_dim=63), {"a": "right", "b": "left", "square": ""}),
        (dict(one_sided_ratio=4), {"a": "right", "b": "left", "square": "left right"}),
        (dict(one_sided_ratio=4.1), {"a": "right", "b": "left", "square": "left right"}),
        (dict(one_sided_ratio=2, max_precondition_dim=15), {"a": "", "b": "", "square": ""}),
    ],
    ids=str,
)
def test_which_sides_are_preconditioned(settings, sides):
    shapes = {"a": (2, 64, 16), "b": (2, 16, 64), "square": (64, 64), "scale": (2, 64), "bias": (64,)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    state = jax.eval_shape(soap(RATE, **settings).init, params)
    assert {name: " ".join(found) for name, found in state.factors.items()} == sides | {"scale": "", "bias": ""}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state[1:])} == {"float32"}


def test_rank_sides_cost_two_percent_of_adamws_state_at_8b():
    config = LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, 131072, 1e-5, 5e5, None, False, False, False)
    llama = hugging_face.build(config, LoraSpec(16, 16.0, PROJECTIONS), "bfloat16", "float32", "none")
    adapters = nn.unbox(hugging_face.abstract_variables(llama)["lora"])

    def size(optimizer):
        return sum(
            leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(optimizer.init, adapters))
        )

    assert size(soap(RATE, one_sided_ratio=4)) <= 1.02 * size(optax.adamw(RATE))
    assert size(soap(RATE)) > 100 * size(optax.adamw(RATE))  # what the authors' defaults would hold


@pytest.mark.parametrize("refresh", ["all_at_once", "staggered"])
def test_the_program_does_not_grow_with_the_layers(refresh):
    optimizer = soap(RATE, refresh=refresh)

    def lines(layers):
        params = {"kernel": jax.ShapeDtypeStruct((layers, 8, 6), jnp.float32)}
        lowered = jax.jit(optimizer.update).lower(params, jax.eval_shape(optimizer.init, params), params)
        return len(lowered.as_text().splitlines())

    assert lines(3) == lines(64)


def products(jaxpr):
    """Precisions of all matrix products in a jaxpr and those inside it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"]
        for value in jax.tree.leaves(equation.params):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


@pytest.mark.parametrize("refresh", ["all_at_once", "staggered"])
def test_a_step_copies_no_stack(refresh):
    """What a round of the loop reads of a stack that it writes makes XLA copy the whole of it, and so does what is read
    of a stack at a time that XLA does not know to be before the loop."""
    params = {"kernel": jax.ShapeDtypeStruct((6, 8, 24), jnp.float32)}
    optimizer = soap(RATE, refresh=refresh)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, gradient):
        changes, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, changes), state

    text = step.lower(params, jax.eval_shape(optimizer.init, params), params).compile().as_text()
    assert re.search(r"f32\[6,8,24\]\S* .*while\(", text)
    assert not re.findall(r"= f32\[6,\S* copy\(.*", text)


def test_only_refreshing_is_always_full_float32():
    params = {"kernel": jnp.ones((4, 4))}

    def precisions(**settings):
        optimizer = soap(RATE, precision="fast", **settings)
        return list(products(jax.make_jaxpr(optimizer.update)(params, optimizer.init(params)).jaxpr))

    counts = [precisions().count((p, p)) for p in (jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGHEST)]
    assert counts[0] == 6  # two sides: into the basis, out of it, factor
    assert counts[1] >= 2 * 3  # two sides: power step, cosines between the bases, first moment by them
    assert sum(counts) == len(precisions())


def test_the_first_basis_by_qr_comes_near_the_eigenvectors():
    """Share of a factor's norm that is off the diagonal in its basis, of a first gradient with 1/i singular values."""
    generator = np.random.default_rng(0)
    left, right = (np.linalg.qr(generator.normal(size=(40, 40)))[0] for _ in range(2))
    gradient = {"kernel": (left / np.arange(1, 41)) @ right.T}

    def off_diagonal(basis):
        turned = basis.T @ gradient["kernel"] @ gradient["kernel"].T @ basis
        return np.linalg.norm(turned - np.diag(np.diag(turned))) / np.linalg.norm(turned)

    found = {
        first_basis: run(soap(RATE, first_basis=first_basis), gradient, [gradient])[0][1].bases["kernel"]["left"]
        for first_basis in ("eigh", "qr")
    }
    assert off_diagonal(np.eye(40)) > 0.3
    assert off_diagonal(found["eigh"]) < 1e-6
    assert off_diagonal(found["qr"]) < 1e-2
    np.testing.assert_allclose(found["qr"].T @ found["qr"], np.eye(40), atol=1e-5)


@pytest.mark.parametrize("size, rank", [(300, 300), (256, 40), (130, 0)])
def test_the_qr_decomposition_for_tpus(size, rank):
    generator = np.random.default_rng(0)
    matrix = (generator.normal(size=(size, rank)) @ generator.normal(size=(rank, size))).astype(np.float32)
    q = np.asarray(jax.jit(module._panel_qr)(matrix), np.float64)
    np.testing.assert_allclose(q.T @ q, np.eye(size), atol=1e-5)
    np.testing.assert_allclose(np.tril(q.T @ matrix, -1), 0, atol=1e-5 * max(1, np.abs(matrix).max()) * size**0.5)
    if rank == size:  # then Q is unique but for signs, and LAPACK's are those of the same reflections
        np.testing.assert_allclose(q, np.linalg.qr(matrix)[0], atol=1e-3)


@pytest.mark.parametrize("first", [True, False])
def test_a_basis_is_the_same_by_the_qr_decomposition_for_tpus(first):
    generator = np.random.default_rng(0)
    turned, basis = (np.linalg.qr(generator.normal(size=(150, 150)))[0] for _ in range(2))
    factor = (turned * np.linspace(1, 0.5, 150) @ turned.T).astype(np.float32)
    refreshed = jax.jit(module._new_basis, static_argnums=(3, 4))
    ours, theirs = (refreshed(factor, basis.astype(np.float32), first, "qr", on_tpu) for on_tpu in (True, False))
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-4)
    np.testing.assert_array_equal(ours[1], theirs[1])
    np.testing.assert_allclose(ours[2], theirs[2], rtol=1e-4)
    assert np.abs(ours[0] - basis).max() > 0.1


def test_the_learning_rate_may_come_with_every_step():
    """As training/optimizers.py has it: everything else static, the rate replaced in the state before each step."""
    static = tuple(name for name in inspect.signature(soap).parameters if name != "learning_rate")
    injected = optax.inject_hyperparams(soap, static_args=static)(**{**OURS, "learning_rate": 0.0})
    assert hash(injected) and hash(tuple(OURS.items()))
    given, rates = list(gradients(STACKS, 6)), jnp.linspace(0.01, 0.06, 6)
    params = jax.tree.map(jnp.asarray, starting(STACKS))
    state, update = injected.init(params), jax.jit(injected.update)
    for gradient, rate in zip(given, rates, strict=True):
        state = state._replace(hyperparams={**state.hyperparams, "learning_rate": rate})
        changes, state = update(jax.tree.map(jnp.float32, gradient), state, params)
        params = optax.apply_updates(params, changes)
    assert update._cache_size() == 1
    scheduled = run(soap(**{**OURS, "learning_rate": lambda seen: rates[seen]}), starting(STACKS), given)[-1][0]
    for name in STACKS:
        np.testing.assert_allclose(params[name], scheduled[name], rtol=1e-6, atol=1e-7)
        assert np.abs(params[name] - starting(STACKS)[name]).max() > 0.05


@pytest.mark.parametrize(
    "wrong",
    [
        dict(learning_rate=-1.0),
        dict(learning_rate=float("nan")),
        dict(b1=1.0),
        dict(b2=float("nan")),
        dict(shampoo_beta=-0.1),
        dict(eps=0.0),
        dict(weight_decay=-0.1),
        dict(weight_decay=float("inf")),
        dict(precondition_frequency=0),
        dict(precondition_frequency=2.5),
        dict(max_precondition_dim=-1),
        dict(one_sided_ratio=1.0),
        dict(one_sided_ratio=float("nan")),
        dict(refresh="sometimes"),
        dict(precision="double"),
        dict(first_basis="svd"),
        dict(mu_dtype="nonsense"),
        dict(mu_dtype="int32"),
    ],
    ids=str,
)
def test_bad_input_is_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(InputError, match=f"soap: {name} is {value!r}; "):
        soap(**{"learning_rate": RATE, **wrong})


SHARDED = """
import sys
import jax, numpy as np, optax
from jax.sharding import NamedSharding, PartitionSpec as P
from robust_mo.model.mesh import make_mesh
from robust_mo.training.soap import soap, state_shardings

mesh = make_mesh(1, 4, 2)
given = dict(np.load(sys.argv[1]))
where = {"cut": P(None, "fsdp", "tensor"), "uncut": P(None, "fsdp", "tensor"), "embedding": P("tensor", "fsdp"),
         "scale": P(), "mixed": P(None, "fsdp", "tensor"), "odd": P(None, "fsdp"), "turns": P(None, "fsdp", "tensor")}
# Parameters that are cut, and parameters of which every device has a copy: they must stay so.
for refresh, cut in (("all_at_once", True), ("staggered", False)):
    params = {n: jax.device_put(given[n], NamedSharding(mesh, where[n] if cut else P())) for n in where}
    places = [leaf.sharding for leaf in jax.tree.leaves(params)]
    optimizer = soap(0.02, precondition_frequency=3, max_precondition_dim=8, refresh=refresh, places=places)
    state = optimizer.init(params)
    own = {n: jax.tree.map(lambda x: x.addressable_shards[0].data.shape, (state.mu[n], state.bases[n])) for n in where}
    assert own["cut"] == ((2, 8, 8), {"left": (2, 8, 8), "right": (2, 8, 8)}), own
    assert own["uncut"] == ((3, 1, 8), {"left": (3, 1, 8), "right": (3, 1, 8)}), own
    assert own["embedding"] == ((2, 8), {"right": (1, 8)}), own
    assert own["odd"] == ((9, 8), {"right": (1, 8)}), own
    assert own["mixed"] == ((3, 4, 16), {"left": (3, 4, 8)}), own  # four groups of two devices
    assert own["turns"] == ((5, 4, 16), {"left": (5, 4, 8)}), own  # one or two of five layers have their turn in a step
    before = jax.tree.map(lambda x: x.sharding, (params, state))

    @jax.jit
    def step(params, state, gradient):
        changes, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, changes), state

    for t in range(8):
        gradient = {n: jax.device_put(given[f"{n}{t}"], params[n].sharding) for n in where}
        params, state = step(params, state, gradient)
        for x, s in zip(jax.tree.leaves((params, state)), jax.tree.leaves(before), strict=True):
            assert x.sharding.is_equivalent_to(s, x.ndim), f"{x.sharding} was {s}"
    np.savez(f"{sys.argv[2]}/{refresh}.npz", **params)
"""


@pytest.mark.slow
def test_eight_devices_make_the_same_updates_as_one(tmp_path):
    """In float64: sums over devices are taken in another order, and which vectors belong to the smallest eigenvalues
    of a first factor in float32 is a matter of rounding."""
    shapes = {"cut": (16, 8, 8), "uncut": (3, 8, 8), "embedding": (16, 8), "scale": (16, 8), "mixed": (12, 8, 16)}
    shapes |= {"odd": (9, 8), "turns": (20, 8, 16)}  # nothing divides the former's rows
    start, given = starting(shapes), list(gradients(shapes, 8))
    everything = {f"{name}{t}": g for t, found in enumerate(given) for name, g in found.items()}
    np.savez(tmp_path / "given.npz", **start, **everything)
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
    }
    command = [sys.executable, "-c", SHARDED, str(tmp_path / "given.npz"), str(tmp_path)]
    subprocess.run(command, check=True, env=environment)
    for refresh in ("all_at_once", "staggered"):
        optimizer = soap(0.02, precondition_frequency=3, max_precondition_dim=8, refresh=refresh)
        with jax.enable_x64(True):
            one = jax.device_get(run(optimizer, start, given)[-1][0])
        eight = np.load(tmp_path / f"{refresh}.npz")
        for name in shapes:
            np.testing.assert_allclose(eight[name], one[name], rtol=0, atol=1e-9)


HELD = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from robust_mo.model import mesh as meshes
from robust_mo.training.soap import soap, state_shardings

where = {"up": ((32, 256, 384), P(None, "fsdp", "tensor")), "down": ((32, 384, 256), P(None, "tensor", "fsdp"))}
for sizes in ((1, 64, 1), (1, 16, 4), (2, 32, 1)):
    mesh = meshes.make_mesh(*sizes)
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for name, (shape, spec) in where.items()
    }
    places = [leaf.sharding for leaf in jax.tree.leaves(params)]
    optimizer = soap(0.1, max_precondition_dim=256, refresh="staggered", first_basis="qr", places=places)
    state = jax.eval_shape(optimizer.init, params)
    state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, state_shardings(state, mesh)
    )
    with meshes.in_force(mesh):
        compiled = jax.jit(optimizer.update, donate_argnums=1).lower(params, state, params).compile()
    print(compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.slow
def test_no_device_holds_a_whole_stack():
    """Of 64, which do not divide 32 layers: two stacks of 12.6 MB, of which one whole would be more than all it may."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=64", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", HELD], check=True, env=environment, stdout=subprocess.PIPE, text=True)
    assert all(int(held) < 4e6 for held in done.stdout.split()), done.stdout
