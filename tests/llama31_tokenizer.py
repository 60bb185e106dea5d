"""The Llama 3.1 tokenizer rebuilt from two wheels of PyPI, for tests where the data folder is absent.

The wheel llama-models has Meta's tokenizer.model (the bytes of each token, in order of rank), from which the
published tokenizer.json follows byte for byte; the wheel trl has the chat template.  They are fetched and not
kept here because of the Llama licence.
"""

import base64
import hashlib
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import pytest

WHEELS = ("llama-models==0.3.0", "trl==1.16.0")
SHA256 = "79e3e522635f3171300913bb421464a87de6222182a0570b9b2ccba2a964b2b4"  # of the published tokenizer.json
FIRST_SPECIAL = 128_000
NAMED = (
    *("begin_of_text", "end_of_text", None, None, "finetune_right_pad_id", None, "start_header_id"),
    *("end_header_id", "eom_id", "eot_id", "python_tag"),
)
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def build(folder: pathlib.Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json; skips without a network."""
    with tempfile.TemporaryDirectory() as wheels:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels, *WHEELS]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip(f"pip cannot download {' and '.join(WHEELS)}")
        (llama,), (trl,) = pathlib.Path(wheels).glob("llama_models*"), pathlib.Path(wheels).glob("trl*")
        ranks = zipfile.ZipFile(llama).read("llama_models/llama3/tokenizer.model").decode()
        template = zipfile.ZipFile(trl).read("trl/chat_templates/llama3_1.jinja").decode()
    text = tokenizer_json([base64.b64decode(line.split()[0]) for line in ranks.splitlines()])
    assert hashlib.sha256(text.encode()).hexdigest() == SHA256
    (folder / "tokenizer.json").write_text(text, encoding="utf-8", newline="\n")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [128001, 128008, 128009]}))


def tokenizer_json(tokens: list[bytes]) -> str:
    """tokenizer.json of the ordinary `tokens`, given in order of rank, and Llama 3.1's 256 special ones."""
    # GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from 256 on.
    letter = {byte: chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}
    hidden = [byte for byte in range(256) if byte not in letter]
    letter |= {byte: chr(256 + place) for place, byte in enumerate(hidden)}
    rank = {token: number for number, token in enumerate(tokens)}
    vocabulary = {"".join(map(letter.get, token)): number for token, number in rank.items()}
    words, merges = list(vocabulary), []
    for token in tokens:  # every pair of tokens that makes a token, the pair of the lowest ranks first
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = sorted((rank[left], rank[right]) for left, right in halves if left in rank and right in rank)
        merges += [f"{words[left]} {words[right]}" for left, right in pairs]

    number = itertools.count()
    names = [*NAMED, *[None] * (256 - len(NAMED))]
    special = [f"<|{name or f'reserved_special_token_{next(number)}'}|>" for name in names]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    splits = [
        {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False},
        {**byte_level, "add_prefix_space": False, "use_regex": False},
    ]

    def begins(sequence: str, type_id: int) -> list[dict]:
        return [
            {"SpecialToken": {"id": special[0], "type_id": type_id}},
            {"Sequence": {"id": sequence, "type_id": type_id}},
        ]

    begin = {
        "type": "TemplateProcessing",
        "single": begins("A", 0),
        "pair": begins("A", 0) + begins("B", 1),
        "special_tokens": {special[0]: {"id": special[0], "ids": [FIRST_SPECIAL], "tokens": [special[0]]}},
    }
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": FIRST_SPECIAL + i, "content": s, **flags} for i, s in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
        "post_processor": {"type": "Sequence", "processors": [{**byte_level, "trim_offsets": False}, begin]},
        "decoder": byte_level,
        "model": {**model, "vocab": vocabulary, "merges": merges},
    }
    return json.dumps(content, indent=2, ensure_ascii=False)
