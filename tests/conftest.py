"""Fixtures shared by the tests: where real data and real models come from."""

import os
import pathlib
import time

import pytest

from robust_mo.model import sources

# As the programs do by themselves, and also for the small ones that tests compile over and over.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(sources.cache_folder() / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
# What to change in a tiny model of each kind: the size of a head is Qwen3's own, here other than hidden_size / heads.
QWEN = {"qwen2": {}, "qwen3": {"head_dim": 16}}


# A file is one worker's: the longest begin, SLURM's not beside other hosts'; what slow machines can do without ends.
_PLACES = {"test_slurm.py": -4, "test_study.py": -3, "test_train.py": -2, "test_hosts.py": -1, "test_benchmarks.py": 1}


def pytest_addoption(parser):
    parser.addoption("--until", type=float, metavar="SECONDS", help="from this time on (date +%%s) tests are skipped")


def pytest_collection_modifyitems(items):
    longest = "test_study_killed_at_random_moments_ends_like_an_unbroken_one"  # over 17 minutes on slow cores
    items.sort(key=lambda item: (_PLACES.get(item.path.name, 0), item.name != longest))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if (until := item.config.getoption("until")) and time.time() > until:
        pytest.skip("no time was left")


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Folder with real evaluation data that cannot be redistributed; tests that need it skip where it is absent."""
    folder = pathlib.Path(os.environ.get("ROBUST_MO_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs the data folder {folder} (set ROBUST_MO_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> pathlib.Path:
    """Folder of SmolLM2-135M-Instruct's files; the first time it is downloaded (93 MB) and converted."""
    return sources.resolve("smollm2-135m")


def make_tiny_model(folder: pathlib.Path, seed: int = 0, kind: str = "llama", **changes) -> pathlib.Path:
    """A random model by transformers, with a byte-level tokenizer and a ChatML template; nothing is downloaded.

    `kind` is its model_type; `changes` are fields of its config.
    """
    import torch
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|pad|>", "<|start|>", "<|end|>")])
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", chat_template=template
    ).save_pretrained(folder)

    torch.manual_seed(seed)
    settings = dict(
        vocab_size=len(alphabet) + 3,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        eos_token_id=len(alphabet) + 2,
        pad_token_id=len(alphabet),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **{**settings, **changes}), dtype=torch.float32
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(2)  # far enough from zero that a wrong formula shows in the logits
            if "bias" in name or "q_norm" in name or "k_norm" in name:  # which begin as zeros and ones
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> pathlib.Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def compiled():
    """Names of the programs that are compiled while the test runs, such as "jit(_decode)"."""
    import jax

    names = []

    def listen(event, _, **told):
        if event.endswith("backend_compile_duration"):
            names.append(told["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)
