"""The Llama-3.1 architecture in Flax Linen, and its near relatives: Qwen2.5 and Qwen3, the dense ones.

Promises: given a Hugging Face config.json's numbers and its weights, the same float32 logits as `transformers` to 1e-4
where they are about 10; where they reach 40 (SmolLM2), its float64 ones to 0.5e-4 if products are summed exactly.
Behaviour hangs on the fields of the config alone, never on a model's name.  Parameters are a plain nested dict: layers
stacked, `params["layers"]["q_proj"]["kernel"]` is `[layers, in, out]`; embedding and output head are `[vocabulary,
hidden]`, as in the files.  Does not know about files, tokenizers, losses or devices.

Shape letters: B rows, T positions, S cache entries, D hidden, H query heads, G key/value heads, K head size,
F feed-forward, V vocabulary, L layers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from robust_mo.errors import InputError
from robust_mo.model import attention
from robust_mo.model import mesh as meshes
from robust_mo.model.live_attention import attend_live
from robust_mo.model.lora import PRODUCT, LoraSpec, Projection

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_NAMED = ("queries", "keys", "values", "attended", "between")  # of a layer's values, about half of what products give

# What the backward pass keeps of a layer, beside its input, by falling memory.  "none" recomputes nothing.  "matmuls"
# keeps what products with weights gave and recomputes the cheap rest (on a CPU faster than "none", which writes it all
# to memory: 13.2 s against 15.4 s of a step's backward pass, SmolLM2, 1,024 tokens).  "gate_up" recomputes the two
# widest products too, of the feed-forward part: a third of the memory, for an eighth (SmolLM2) to a quarter (8B, LoRA)
# more FLOPs.  "offload" keeps the same in the host's memory.  "full" keeps nothing, for a third (LoRA: half) more.
# "matmuls" and "gate_up" keep what the attention kernels of cuDNN and of TPUs gave, too.
REMAT_POLICIES = {
    "none": None,
    "matmuls": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names(PRODUCT, attention.SPLASH), attention.cudnn_saveable
    ),
    "gate_up": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names(*_NAMED, attention.SPLASH), attention.cudnn_saveable
    ),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=(),
        names_which_can_be_offloaded=_NAMED,
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}

AUTOMATIC_REMAT = ("none", "matmuls", "gate_up", "full")
"""Where the device's memory decides, the first that fits is taken: from the least work to the least memory."""

# model_type -> (attention_bias, query_key_norm).  Only these are read off the type: transformers has them in the code
# of each architecture, and a config.json does not say them (Qwen2's has no `attention_bias`, Qwen3's says false).
_ARCHITECTURES = {"llama": (False, False), "qwen2": (True, False), "qwen3": (False, True)}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1's stretching of rotary frequencies; fields as in config.json."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The numbers of a config.json that the architecture depends on, under the names they have there.

    Two more stand for what else tells the architectures apart:
      attention_bias: whether the projections to queries, keys and values add a bias (Qwen2).
      query_key_norm: whether queries and keys are normalised, each head by itself, before they are rotated (Qwen3).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    attention_bias: bool
    query_key_norm: bool

    @property
    def product_parameters(self) -> int:
        """Parameters that take part in matrix products: all kernels and the head; the embedding's look-up is none."""
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        layer = self.hidden_size * (2 * queries + 2 * keys + 3 * self.intermediate_size)
        return self.num_hidden_layers * layer + self.vocab_size * self.hidden_size

    @classmethod
    def from_json(cls, values: dict, origin: str) -> "LlamaConfig":
        """Reads the dict of a config.json (transformers 4 or 5 style).

        Raises:
          InputError: a needed field is missing, or a field asks for something that this model does not compute;
            `origin` names the file in the message.
        """

        def need(name, kind, source=values):
            value = source.get(name)
            if value is None:
                raise InputError(f"{origin} has no field {name!r}; the config.json of a model needs it")
            fits = type(value) is kind or (kind is float and type(value) is int)
            if not fits or (kind is not bool and not 0 < value < float("inf")):
                what = "true or false" if kind is bool else f"a positive {kind.__name__}"
                raise InputError(f"{origin}: {name} is {value!r}; it must be {what}")
            return value

        architecture = values.get("model_type")
        if architecture not in _ARCHITECTURES:
            known = ", ".join(_ARCHITECTURES)
            raise InputError(f"{origin}: model_type is {architecture!r}; supported are {known}")
        attention_bias, query_key_norm = _ARCHITECTURES[architecture]
        for name, only in (
            ("attention_bias", attention_bias),
            ("mlp_bias", False),
            ("hidden_act", "silu"),
            ("use_sliding_window", False),
        ):
            if values.get(name, only) != only:
                raise InputError(f"{origin}: {name} is {values[name]!r}; only {only!r} is supported")
        if other := set(values.get("layer_types") or ()) - {"full_attention"}:
            raise InputError(f"{origin}: layer_types holds {min(other)!r}; only 'full_attention' is supported")
        if values.get("quantization_config"):
            raise InputError(
                f"{origin} has a quantization_config; quantized weights are not read, get the model in floats"
            )
        # transformers 5 writes one dict `rope_parameters`, version 4 `rope_theta` beside `rope_scaling`; where somebody
        # has added the latter to the former, for longer texts, it counts, as it does there.
        for name in ("rope_parameters", "rope_scaling"):
            if not isinstance(values.get(name), dict | None):
                raise InputError(f"{origin}: {name} is {values[name]!r}; it must be an object")
        rope = {
            "rope_theta": values.get("rope_theta"),
            **(values.get("rope_scaling") or values.get("rope_parameters") or {}),
        }
        if (original := values.get("original_max_position_embeddings")) is not None:
            rope["original_max_position_embeddings"] = original
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise InputError(f"{origin}: RoPE scaling {kind!r} is not supported; known are 'default' and 'llama3'")
        scaling = (
            RopeScaling(**{f.name: need(f.name, f.type, rope) for f in dataclasses.fields(RopeScaling)})
            if kind == "llama3"
            else None
        )
        head_dim = need("head_dim", int) if values.get("head_dim") else None
        made = {
            "head_dim": head_dim or need("hidden_size", int) // need("num_attention_heads", int),
            "rope_theta": need("rope_theta", float, rope),
            "rope_scaling": scaling,
            "attention_bias": attention_bias,
            "query_key_norm": query_key_norm,
        }
        config = cls(**made, **{f.name: need(f.name, f.type) for f in dataclasses.fields(cls) if f.name not in made})
        if config.num_attention_heads % config.num_key_value_heads:
            raise InputError(
                f"{origin}: num_attention_heads {config.num_attention_heads} is no multiple of "
                f"num_key_value_heads {config.num_key_value_heads}"
            )
        return config


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians per position, float32 [K/2]: theta^(-2i/K), slowed for long wavelengths where the config says so.

    The llama3 rule: wavelengths shorter than original/high_freq_factor stay, longer than original/low_freq_factor are
    divided by `factor`, and between the two the frequency is interpolated linearly (Llama-3.1's released code).
    """
    frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    if (scaling := config.rope_scaling) is not None:
        turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        kept = np.clip((turns - scaling.low_freq_factor) / span, 0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    return frequencies.astype(np.float32)


def rotary(positions_BT: jax.Array, config: LlamaConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin of each position's angles, float32 [B, T, 1, K/2]."""
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * rope_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTHK: jax.Array, cos, sin) -> jax.Array:
    """Turns the pairs (i, i + K/2) of each head by its position's angles, in float32; returns x's dtype."""
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTHK.dtype)


@jax.custom_vjp
def _looked_up(embedding_VD, tokens_BT):
    """embedding[tokens], whose gradient is added up in float32: in bfloat16 a token that occurs some hundred times in a
    batch would gain nothing more from the next time."""
    return embedding_VD[tokens_BT]


def _looked_up_forward(embedding_VD, tokens_BT):
    return embedding_VD[tokens_BT], (embedding_VD, tokens_BT)


def _looked_up_backward(residuals, gradient_BTD):
    embedding_VD, tokens_BT = residuals
    zeros_VD = meshes.constrained(jnp.zeros(embedding_VD.shape, jnp.float32), ("vocab", "embed"))
    return zeros_VD.at[tokens_BT].add(gradient_BTD.astype(jnp.float32)).astype(embedding_VD.dtype), None


_looked_up.defvjp(_looked_up_forward, _looked_up_backward)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale; the statistics in float32, as in the released code."""

    eps: float
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", ones, (x.shape[-1],), self.param_dtype)
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
        return h.astype(x.dtype) * scale.astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Cache:
    """Keys and values of the positions seen so far, laid out as the products of attention read them on a CPU.

    Attributes:
      k: `[L, B, G, K, S]`.
      v: `[L, B, G, S, K]`; the cache of a single layer has no axis L in either.
    """

    k: jax.Array
    v: jax.Array

    @classmethod
    def zeros(cls, config: LlamaConfig, rows: int, capacity: int, dtype) -> "Cache":
        entry = (config.num_hidden_layers, rows, config.num_key_value_heads)
        return cls(
            jnp.zeros((*entry, config.head_dim, capacity), dtype), jnp.zeros((*entry, capacity, config.head_dim), dtype)
        )

    @property
    def capacity(self) -> int:
        return self.k.shape[-1]

    def extended(self, more: int) -> "Cache":
        """With room for `more` entries at the end of every row."""
        k_axes, v_axes = ([(0, 0)] * (self.k.ndim - 2) + last for last in ([(0, 0), (0, more)], [(0, more), (0, 0)]))
        return Cache(jnp.pad(self.k, k_axes), jnp.pad(self.v, v_axes))

    def cut(self, entries: int) -> "Cache":
        """The first entries of every row."""
        return Cache(self.k[..., :entries], self.v[..., :entries, :])

    def rows(self, count: int) -> "Cache":
        """A cache whose rows are all the same, with `count` of them, a multiple of what it has."""
        return jax.tree.map(lambda c: jnp.repeat(c, count // c.shape[-4], axis=-4), self)

    def placed(self) -> "Cache":
        """Within a compiled program: rows and heads cut over the devices that work on them."""
        leading = (None,) * (self.k.ndim - 4)
        return jax.tree.map(lambda c: nn.with_logical_constraint(c, (*leading, "batch", "kv_heads", None, None)), self)

    def with_rows(self, rows_R, new: "Cache") -> "Cache":
        """With the rows `rows_R` begun as in `new`; numbers beyond the last row are left out."""
        return Cache(
            self.k.at[..., rows_R, :, :, : new.capacity].set(new.k, mode="drop"),
            self.v.at[..., rows_R, :, : new.capacity, :].set(new.v, mode="drop"),
        )

    @classmethod
    def stacked(cls, layers: "list[Cache]") -> "Cache":
        """The cache of all layers, from those of single ones."""
        return jax.tree.map(lambda *c: jnp.stack(c), *layers)

    def unstacked(self) -> "list[Cache]":
        """The caches of the single layers."""
        return [jax.tree.map(lambda c, n=n: c[n], self) for n in range(len(self.k))]


class Layer(nn.Module):
    """One transformer block, in the form that `nn.scan` asks for: (x, its cache) -> (x, its cache)."""

    config: LlamaConfig
    lora: LoraSpec | None
    compute_dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD, cache, positions_BT, rope, segments_BT):
        c = self.config
        B, T, _ = x_BTD.shape
        projection = functools.partial(
            Projection, lora=self.lora, compute_dtype=self.compute_dtype, param_dtype=self.param_dtype
        )
        norm = functools.partial(RMSNorm, c.rms_norm_eps, self.param_dtype)

        h = norm(name="input_layernorm")(x_BTD)
        attends = functools.partial(projection, bias=c.attention_bias)
        q = attends(c.num_attention_heads * c.head_dim, ("embed", "heads"), name="q_proj")(h)
        k = attends(c.num_key_value_heads * c.head_dim, ("embed", "kv_heads"), name="k_proj")(h)
        v = attends(c.num_key_value_heads * c.head_dim, ("embed", "kv_heads"), name="v_proj")(h)
        if cache is not None:  # or a TPU's compiler would turn these kernels, in every step, to fit the heads
            q, k, v = jax.lax.optimization_barrier((q, k, v))
        q, k, v = (x.reshape(B, T, -1, c.head_dim) for x in (q, k, v))
        if c.query_key_norm:
            q, k = norm(name="q_norm")(q), norm(name="k_norm")(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        q, k, v = (checkpoint_name(x, name) for x, name in zip((q, k, v), _NAMED, strict=False))
        if cache is None:
            attended = attention.attend_packed(q, k, v, segments_BT)
        else:
            attended, *entries = attend_live(q, k, v, cache.k, cache.v, positions_BT)
            cache = Cache(*entries)
        attended = checkpoint_name(attended.reshape(B, T, -1), "attended")
        x_BTD = x_BTD + projection(c.hidden_size, ("heads", "embed"), name="o_proj")(attended)
        x_BTD = checkpoint_name(x_BTD, "between")

        h = norm(name="post_attention_layernorm")(x_BTD)
        gate = projection(c.intermediate_size, ("embed", "mlp"), name="gate_proj")(h)
        up = projection(c.intermediate_size, ("embed", "mlp"), name="up_proj")(h)
        x_BTD = x_BTD + projection(c.hidden_size, ("mlp", "embed"), name="down_proj")(nn.silu(gate) * up)
        return nn.with_logical_constraint(x_BTD, ("batch", None, None)), cache


class Llama(nn.Module):
    """Tokens to final hidden states; `unembed` turns those into logits.

    Attributes:
      config: shapes and constants.
      lora: adapters, in the collection "lora", or None.
      compute_dtype: dtype of activations and products; of float32 a GPU takes products in TF32 and a TPU in one pass of
        bfloat16, unless JAX_DEFAULT_MATMUL_PRECISION=highest is set.
      param_dtype: dtype in which parameters are stored.
      remat: a key of REMAT_POLICIES.
      scan_layers: whether the layers are stacked and run in a loop; otherwise each has parameters (see
        `unstack_layers`) and a Cache of its own.
    """

    config: LlamaConfig
    lora: LoraSpec | None
    compute_dtype: jnp.dtype
    param_dtype: jnp.dtype
    remat: str
    scan_layers: bool = True

    @nn.compact
    def __call__(self, tokens_BT, positions_BT, segments_BT=None, cache=None):
        """Runs the stack.

        Args:
          tokens_BT: int32.
          positions_BT: int32, each token's position in its own text (for RoPE, and as its place in the cache).
          segments_BT: int32, the text that a token belongs to; 0 is padding.  Used where there is no cache.
          cache: a Cache, or without `scan_layers` a list of them with one layer each; the new keys and values are
            written at `positions_BT`, and a token sees the entries 0..position of its row.

        Returns:
          (hidden [B, T, D] after the final norm, cache or None)
        """
        c = self.config
        initializer = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        embedding = self.param("embed_tokens", initializer, (c.vocab_size, c.hidden_size), self.param_dtype)
        if not c.tie_word_embeddings:
            self.param("lm_head", initializer, (c.vocab_size, c.hidden_size), self.param_dtype)
        looked_up = _looked_up(embedding, tokens_BT) if embedding.dtype.itemsize < 4 else embedding[tokens_BT]
        x = nn.with_logical_constraint(looked_up.astype(self.compute_dtype), ("batch", None, None))
        layer = Layer
        if self.remat != "none":
            layer = nn.remat(Layer, prevent_cse=False, policy=REMAT_POLICIES[self.remat])
        fields, shared = (
            (c, self.lora, self.compute_dtype, self.param_dtype),
            (positions_BT, rotary(positions_BT, c), segments_BT),
        )
        if self.scan_layers:
            stack = nn.scan(
                layer,
                variable_axes={"params": 0, "lora": 0},
                split_rngs={"params": True, "lora": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
                length=c.num_hidden_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(*fields, name="layers")
            x, cache = stack(x, cache, *shared)
        else:
            caches = [None] * c.num_hidden_layers if cache is None else list(cache)
            for number, before in enumerate(caches):
                x, caches[number] = layer(*fields, name=f"layers_{number}")(x, before, *shared)
            cache = None if cache is None else caches
        return RMSNorm(c.rms_norm_eps, self.param_dtype, name="norm")(x), cache


def unstack_layers(params: dict) -> dict:
    """Parameters with stacked layers as a model without `scan_layers` takes them."""
    rest = {name: value for name, value in params.items() if name != "layers"}
    count = len(params["layers"]["input_layernorm"]["scale"])
    return rest | {f"layers_{n}": jax.tree.map(lambda stacked, n=n: stacked[n], params["layers"]) for n in range(count)}


def output_head(params) -> jax.Array:
    """The matrix `[V, D]` that turns hidden states into logits: the head's own, or the tied embedding."""
    return params["lm_head"] if "lm_head" in params else params["embed_tokens"]


def unembed(params, hidden: jax.Array) -> jax.Array:
    """Logits, float32 [..., V]; the product is taken in the dtype of `hidden`."""
    head_VD = output_head(params).astype(hidden.dtype)
    return jnp.einsum("...d,vd->...v", hidden, head_VD, preferred_element_type=jnp.float32)
