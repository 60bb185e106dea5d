"""LoRA against PEFT: the same adapter, the same logits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import linen as nn

from robust_mo.errors import InputError
from robust_mo.model import hugging_face, lora
from robust_mo.model import mesh as meshes
from robust_mo.model.llama import PROJECTIONS, unembed
from robust_mo.model.lora import LoraSpec
from robust_mo.training import models

TARGETS = ("q_proj", "v_proj", "down_proj")


def random_adapters(model, seed):
    tokens = np.zeros((1, 1), np.int32)
    key = jax.random.key(seed)
    adapters = nn.unbox(model.init({"params": key, "lora": key}, tokens, tokens, tokens)["lora"])
    # b begins at zero: give it values, or the adapter would do nothing
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), adapters)


def test_logits_equal_peft_and_merging_changes_none(tiny):
    spec = LoraSpec(rank=4, alpha=6.0, targets=TARGETS)
    config = hugging_face.read_config(tiny)
    model = hugging_face.build(config, spec, "float32", "float32", "none")
    params = hugging_face.load_params(tiny, model, meshes.make_mesh(1, -1, 1))
    adapters = random_adapters(model, 3)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=6.0, target_modules=list(TARGETS))).eval()
    state = theirs.state_dict()
    for layer in range(config.num_hidden_layers):
        for target in TARGETS:
            parent = "mlp" if target == "down_proj" else "self_attn"
            for factor, name in (("a", "lora_A"), ("b", "lora_B")):
                key = f"base_model.model.model.layers.{layer}.{parent}.{target}.{name}.default.weight"
                state[key].copy_(torch.tensor(np.asarray(adapters["layers"][target][factor][layer]).T))

    tokens = np.random.default_rng(0).integers(0, 250, (2, 20)).astype(np.int32)
    positions, segments = np.broadcast_to(np.arange(20), tokens.shape), np.ones_like(tokens)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    with jax.default_matmul_precision("highest"):
        hidden, _ = model.apply({"params": params, "lora": adapters}, tokens, positions, segments)
        ours = np.asarray(unembed(params, hidden))
        plain = hugging_face.build(config, None, "float32", "float32", "none")
        base = np.asarray(unembed(params, plain.apply({"params": params}, tokens, positions, segments)[0]))
        folded = lora.merge(params, adapters, spec)
        merged = np.asarray(unembed(folded, plain.apply({"params": folded}, tokens, positions, segments)[0]))
    assert np.abs(base - expected).max() > 0.01  # the adapter does something
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    np.testing.assert_allclose(merged, expected, atol=1e-4)
    assert folded["layers"]["k_proj"]["kernel"] is params["layers"]["k_proj"]["kernel"]


def test_merging_in_place_needs_no_second_model(tiny):
    spec = LoraSpec(rank=4, alpha=6.0, targets=TARGETS)
    model = hugging_face.build(hugging_face.read_config(tiny), spec, "float32", "float32", "none")
    params, adapters = hugging_face.load_params(tiny, model, meshes.make_mesh(1, -1, 1)), random_adapters(model, 3)
    folded = jax.device_get(lora.merge(params, adapters, spec))
    placed = lora.merge_in_place(params, adapters, spec)
    jax.tree.map(np.testing.assert_array_equal, placed, folded)
    gone = {name for name in PROJECTIONS if params["layers"][name]["kernel"].is_deleted()}
    assert gone == set(TARGETS) and not params["embed_tokens"].is_deleted()


@pytest.mark.parametrize("layers", [4, 32])
def test_merging_takes_the_memory_of_a_few_layers(layers):
    stacks = [jax.ShapeDtypeStruct((layers, *shape), jnp.float32) for shape in ((256, 512), (256, 4), (4, 512))]
    memory = lora._donated_stack.lower(*stacks, 2.0).compile().memory_analysis()
    assert memory.alias_size_in_bytes == 4 * layers * 256 * 512
    assert memory.temp_size_in_bytes < 3 * 4 * 256 * 512


def test_fresh_adapters_change_nothing_and_start_like_pefts(tiny):
    spec = LoraSpec(rank=8, alpha=16.0, targets=PROJECTIONS)
    model = hugging_face.build(hugging_face.read_config(tiny), spec, "float32", "float32", "none")
    tokens, key = np.zeros((1, 1), np.int32), jax.random.key(0)
    adapters = nn.unbox(model.init({"params": key, "lora": key}, tokens, tokens, tokens)["lora"])["layers"]
    assert set(adapters) == set(PROJECTIONS)
    for target, factors in adapters.items():
        assert not np.any(factors["b"]), target
        bound = factors["a"].shape[1] ** -0.5
        assert 0.9 * bound < np.abs(factors["a"]).max() <= bound
        assert not np.allclose(factors["a"][0], factors["a"][1]), "layers share their random numbers"
    assert not np.allclose(adapters["q_proj"]["a"], adapters["o_proj"]["a"]), "projections share their random numbers"


def test_a_seed_draws_the_adapters_that_kept_results_began_with():
    """They hang on how often flax traces the loop over layers, for one; results/ and the quickstart's numbers hang on
    them."""
    llama = models.shapes_of("smollm2-135m")
    llama = hugging_face.build(llama, LoraSpec(4, 8.0, ("q_proj", "down_proj")), "float32", "float32", "none")
    adapters = models.split(llama, {}, meshes.make_mesh(1, 1, 1, jax.devices()[:1]), seed=0)[0]["layers"]
    drawn = adapters["q_proj"]["a"][0, 0], adapters["down_proj"]["a"][1, 0]
    in_2026 = [-0.00200668, 0.01125284, -0.0389717, -0.00970114], [-0.02209876, 0.01457554, 0.00176835, -0.02301026]
    np.testing.assert_allclose(drawn, in_2026, atol=1e-7)
    # Other draws are others.
    mesh = meshes.make_mesh(1, 1, 1, jax.devices()[:1])
    others = [models.split(llama, {}, mesh, seed=0, draw=n)[0]["layers"]["q_proj"]["a"] for n in (0, 1, 2)]
    np.testing.assert_array_equal(others[0], adapters["q_proj"]["a"])
    assert all(np.abs(a - b).mean() > 0.01 for a, b in itertools.combinations(others, 2))


@pytest.mark.parametrize(
    "rank, targets, says",
    [(0, ("q_proj",), "rank is 0"), (4, ("query",), r"targets is .*'query'"), (4, (), "targets is ")],
)
def test_impossible_specs_are_refused(rank, targets, says):
    with pytest.raises(InputError, match=says):
        lora.check_targets(LoraSpec(rank, 1.0, targets), PROJECTIONS)
