"""Turns a GGUF file of the Llama architecture into Hugging Face files, so that nothing else knows GGUF.

Promises: `convert` writes config.json, float32 safetensors, tokenizer and generation_config.json that
transformers reads as the same model.  Every number comes from the file, every tensor in the file is used, and
what cannot be carried over exactly is refused with an `InputError`.

Does not know where files come from, what they are cached under, or that jax exists.
"""

import json
import math
import pathlib
import shutil
from typing import Any, NamedTuple

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from robust_mo.errors import InputError

VERSION = 1
"""Part of the cache key: raise it when `convert` begins to write something else for the same file."""

SHARD_BYTES = 4_000_000_000
"""A safetensors file is closed before it grows past this; `convert` holds one of them in memory at a time."""

PRE_TOKENIZERS = ("smollm", "llama-bpe")
"""Values of tokenizer.ggml.pre that are supported."""

# How Llama 3 cuts text before BPE: contractions, words with at most one symbol before them, up to three
# digits, symbols with at most one space before them, line ends, spaces.
LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Vocabulary(NamedTuple):
    """Each token's text and its kind, by token id."""

    tokens: list[str]
    kinds: list[gguf.TokenType]


class Target(NamedTuple):
    """Where a GGUF tensor goes: Hugging Face name and shape, and the heads its rows are interleaved in."""

    name: str
    shape: tuple[int, ...]
    interleaved_heads: int | None = None


Tensors = dict[str, gguf.ReaderTensor]


def convert(path: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the model in the GGUF file `path` into `folder` (made if absent) as Hugging Face files.

    Raises:
      InputError: the file is damaged, one part of several, of another architecture, lacks a field, or has
        tensors missing, left over or of the wrong shape; or its RoPE scaling, tokenizer or quantization is
        not supported.
    """
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError) as error:  # met in a damaged file
        raise InputError(f"{path} is damaged or cut short ({error}); get the GGUF file again") from error
    architecture = _required(metadata, "general.architecture", str, path)
    if architecture != "llama":
        raise InputError(
            f"{path}: general.architecture is {architecture!r}, but only 'llama' is supported; "
            "use a model of the Llama architecture"
        )
    if metadata.get("split.count", 0) > 1:
        raise InputError(
            f"{path} is one of {metadata['split.count']} parts (split.count); "
            "join them with llama-gguf-split --merge and give the joined file"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    vocabulary = _vocabulary(metadata, path)
    config = _config(metadata, vocabulary, tensors, path)
    tensors.pop("rope_freqs.weight", None)  # now in the config, as rope_scaling
    targets = _targets(config)
    _check_tensors(tensors, targets, path)
    tokenizer = _tokenizer(metadata, vocabulary, config, path)

    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    # Its own `save` raises a bare Exception where the disk is full.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(metadata, vocabulary, config))
    _write_weights(tensors, targets, folder, path)


def _required(metadata: dict[str, Any], name: str, kind: type, path: pathlib.Path) -> Any:
    value = metadata.get(name)
    if type(value) is not kind:  # not isinstance(): a bool is no int here
        found = "missing" if value is None else f"a {type(value).__name__} and not a {kind.__name__}"
        raise InputError(f"{path}: the GGUF field {name} is {found}; convert the model to GGUF again")
    return value


def _float32(value: float) -> float:
    """The shortest number that is this float32: 9.999999747378752e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def _vocabulary(metadata: dict[str, Any], path: pathlib.Path) -> Vocabulary:
    tokens = _required(metadata, "tokenizer.ggml.tokens", list, path)
    kinds = _required(metadata, "tokenizer.ggml.token_type", list, path)
    if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
        raise InputError(
            f"{path}: tokenizer.ggml.tokens has {len(tokens)} tokens, {len(set(tokens))} of them distinct, "
            f"and tokenizer.ggml.token_type {len(kinds)} kinds, but all three must be equal; "
            "convert the model to GGUF again"
        )
    return Vocabulary(tokens, kinds)


def _config(metadata: dict[str, Any], vocabulary: Vocabulary, tensors: Tensors, path: pathlib.Path) -> dict[str, Any]:
    """The model's config.json, every value from the file."""

    def integer(name: str) -> int:
        return _required(metadata, name, int, path)

    hidden_size = integer("llama.embedding_length")
    heads = integer("llama.attention.head_count")
    head_dim = metadata.get("llama.attention.key_length", hidden_size // heads)
    rotated = metadata.get("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise InputError(
            f"{path}: llama.rope.dimension_count is {rotated} where a head has {head_dim} dimensions; "
            "models that rotate only a part of each head are not supported"
        )
    rope_theta = _float32(_required(metadata, "llama.rope.freq_base", float, path))
    bos_id = integer("tokenizer.ggml.bos_token_id")
    ends = [f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom")]  # of text, turn, message
    stop_ids = list(dict.fromkeys(integer(end) for end in ends if end in metadata or end == ends[0]))
    for token_id in (bos_id, *stop_ids):
        if token_id >= len(vocabulary.tokens):
            raise InputError(
                f"{path}: the bos, eos, eot or eom token id {token_id} lies outside the vocabulary of "
                f"{len(vocabulary.tokens)} tokens; convert the model to GGUF again"
            )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "vocab_size": len(vocabulary.tokens),
        "hidden_size": hidden_size,
        "intermediate_size": integer("llama.feed_forward_length"),
        "num_hidden_layers": integer("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": integer("llama.attention.head_count_kv"),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": integer("llama.context_length"),
        "rms_norm_eps": _float32(_required(metadata, "llama.attention.layer_norm_rms_epsilon", float, path)),
        "rope_theta": rope_theta,
        "rope_scaling": _rope_scaling(metadata, tensors, rope_theta, head_dim, path),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": bos_id,
        "eos_token_id": stop_ids if len(stop_ids) > 1 else stop_ids[0],
        "pad_token_id": _pad_id(metadata, vocabulary, {bos_id, *stop_ids}, path),
    }


def _pad_id(metadata: dict[str, Any], vocabulary: Vocabulary, ends: set[int], path: pathlib.Path) -> int:
    """A control token for padding that neither begins nor ends a text.

    Many files record the end-of-turn token as padding; a loss that skips padding would then never teach a
    model to stop.
    """
    tokens = vocabulary.tokens
    spare = [i for i, kind in enumerate(vocabulary.kinds) if kind == gguf.TokenType.CONTROL and i not in ends]
    recorded = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("padding", "unknown")]
    candidates = [
        *(i for i in recorded if i in spare),  # SmolLM2: unknown is <|endoftext|>
        *(i for i in spare if "pad" in tokens[i]),  # Llama 3.1: <|finetune_right_pad_id|>
        *(i for i in spare if "reserved" in tokens[i]),  # Llama 3: <|reserved_special_token_0|>
    ]
    if not candidates:
        raise InputError(
            f"{path}: no control token is free for padding, which must not share a token with bos or eos "
            f"({', '.join(tokens[i] for i in sorted(ends))}); "
            "set tokenizer.ggml.padding_token_id to an unused control token"
        )
    return candidates[0]


def _rope_scaling(
    metadata: dict[str, Any], tensors: Tensors, rope_theta: float, head_dim: int, path: pathlib.Path
) -> dict[str, Any] | None:
    """None, or llama3 scaling that gives the frequencies in the file.

    GGUF keeps llama3 scaling as one divisor for each frequency, the tensor rope_freqs.weight, and not as the
    four numbers that made them; these do not follow from the divisors.  So the numbers of every published
    Llama 3.1, 3.2 and 3.3 are tried (they differ in `factor` only, which is the largest divisor) and their
    divisors compared with those in the file.
    """
    recorded = [name for name in metadata if name.startswith("llama.rope.scal")]
    if recorded and metadata.get("llama.rope.scaling.type") != "none":
        raise InputError(
            f"{path}: the RoPE scaling in {', '.join(recorded)} is not supported (only llama3 scaling is); "
            "use a model without it"
        )
    if "rope_freqs.weight" not in tensors:
        return None
    divisors = tensors["rope_freqs.weight"].data
    factor, low, high, original = float(divisors.max()), 1.0, 4.0, 8192
    wavelengths = 2 * math.pi * rope_theta ** (np.arange(0, head_dim, 2) / head_dim)
    unscaled = np.clip((original / wavelengths - low) / (high - low), 0, 1)  # 1: left alone, 0: fully divided
    expected = 1 / (unscaled + (1 - unscaled) / factor)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4, atol=0):
        raise InputError(
            f"{path}: rope_freqs.weight does not hold the llama3 scaling of Llama 3.1 to 3.3; "
            "use the model's Hugging Face folder, which records the scaling's numbers"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _targets(config: dict[str, Any]) -> dict[str, Target]:
    """GGUF name -> target, for every tensor that a model with this config has.  Matrices are [out, in]."""
    hidden, middle, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    queries, keys = heads * config["head_dim"], key_heads * config["head_dim"]
    targets = {
        "token_embd.weight": Target("model.embed_tokens.weight", (vocab, hidden)),
        "output_norm.weight": Target("model.norm.weight", (hidden,)),
    }
    if not config["tie_word_embeddings"]:
        targets["output.weight"] = Target("lm_head.weight", (vocab, hidden))
    for layer in range(config["num_hidden_layers"]):
        for source, target in {
            "attn_norm": Target("input_layernorm", (hidden,)),
            "attn_q": Target("self_attn.q_proj", (queries, hidden), interleaved_heads=heads),
            "attn_k": Target("self_attn.k_proj", (keys, hidden), interleaved_heads=key_heads),
            "attn_v": Target("self_attn.v_proj", (keys, hidden)),
            "attn_output": Target("self_attn.o_proj", (hidden, queries)),
            "ffn_norm": Target("post_attention_layernorm", (hidden,)),
            "ffn_gate": Target("mlp.gate_proj", (middle, hidden)),
            "ffn_up": Target("mlp.up_proj", (middle, hidden)),
            "ffn_down": Target("mlp.down_proj", (hidden, middle)),
        }.items():
            name = f"model.layers.{layer}.{target.name}.weight"
            targets[f"blk.{layer}.{source}.weight"] = target._replace(name=name)
    return targets


def _check_tensors(tensors: Tensors, targets: dict[str, Target], path: pathlib.Path) -> None:
    missing, extra = targets.keys() - tensors.keys(), tensors.keys() - targets.keys()
    if missing:
        raise InputError(f"{path} lacks the tensors {', '.join(sorted(missing))}; get the GGUF file again")
    if extra:
        raise InputError(
            f"{path} has tensors that a Llama model does not have: {', '.join(sorted(extra))}; "
            "use a model of the plain Llama architecture"
        )
    for name, target in targets.items():
        shape = tuple(tensors[name].shape[::-1].tolist())  # GGUF counts axes from the fastest
        if shape != target.shape:
            raise InputError(
                f"{path}: tensor {name} has shape {shape} where the metadata asks for {target.shape}; "
                "convert the model to GGUF again"
            )


def _write_weights(tensors: Tensors, targets: dict[str, Target], folder: pathlib.Path, path: pathlib.Path) -> None:
    """Writes model.safetensors, or numbered shards and their index."""
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, target in targets.items():
        tensor_bytes = 4 * math.prod(target.shape)
        if shards[-1] and size + tensor_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor_bytes
        total += tensor_bytes
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        part = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
        file = f"model{part}.safetensors"
        weights = {targets[name].name: _dequantize(tensors[name], targets[name], path) for name in names}
        save_file(weights, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # safetensors lets nobody else read it
        weight_map |= dict.fromkeys(weights, file)
        del weights  # or the next shard would be built while this one is held
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _dequantize(tensor: gguf.ReaderTensor, target: Target, path: pathlib.Path) -> np.ndarray:
    """The tensor in float32, contiguous, its rows in the order that Hugging Face uses."""
    try:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise InputError(
            f"{path}: tensor {tensor.name} is stored as {tensor.tensor_type.name}, which is not supported; "
            "use a file with another quantization, such as Q8_0"
        ) from error
    if target.interleaved_heads:
        # RoPE rotates pairs of rows within a head.  Of four rows, GGUF pairs (0 1)(2 3), side by side, and
        # Hugging Face (0 2)(1 3), half a head apart.
        rows, width = target.shape
        pairs = rows // target.interleaved_heads // 2
        weight = weight.reshape(target.interleaved_heads, pairs, 2, width).swapaxes(1, 2).reshape(rows, width)
    return np.ascontiguousarray(weight)


def _tokenizer(
    metadata: dict[str, Any], vocabulary: Vocabulary, config: dict[str, Any], path: pathlib.Path
) -> Tokenizer:
    """Byte-level BPE of the file's tokens and merges, on text cut up as tokenizer.ggml.pre says."""
    kind = _required(metadata, "tokenizer.ggml.pre", str, path)
    if kind not in PRE_TOKENIZERS:
        raise InputError(
            f"{path}: tokenizer.ggml.pre is {kind!r}, but only {' and '.join(PRE_TOKENIZERS)} are supported; "
            "use the model's Hugging Face folder"
        )
    is_llama_3 = kind == "llama-bpe"
    merges = _required(metadata, "tokenizer.ggml.merges", list, path)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(vocabulary.tokens)},
            merges=[tuple(merge.split(" ")) for merge in merges],
            # Llama 3 takes a piece of text that is itself a token as it is, where the merges lead elsewhere.
            ignore_merges=is_llama_3,
        )
    )
    if is_llama_3:
        cut = pre_tokenizers.Split(Regex(LLAMA_3_SPLIT), behavior="isolated")
    else:
        cut = pre_tokenizers.Digits(individual_digits=True)
    # Unless told not to, ByteLevel cuts by the rule of GPT-2, which SmolLM uses after its own.
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not is_llama_3)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    if metadata.get("tokenizer.ggml.add_bos_token", is_llama_3):
        bos_id = config["bos_token_id"]
        bos = vocabulary.tokens[bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, bos_id)]
        )
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == gguf.TokenType.CONTROL, normalized=False)
            for token, kind in zip(*vocabulary, strict=True)
            if kind in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
        ]
    )
    return tokenizer


def _tokenizer_config(metadata: dict[str, Any], vocabulary: Vocabulary, config: dict[str, Any]) -> dict[str, Any]:
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "bos_token": vocabulary.tokens[config["bos_token_id"]],
        "eos_token": vocabulary.tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "pad_token": vocabulary.tokens[config["pad_token_id"]],
    }
    if "tokenizer.chat_template" in metadata:
        values["chat_template"] = metadata["tokenizer.chat_template"]
    return values


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
