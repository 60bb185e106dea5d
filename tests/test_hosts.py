"""Two processes of four devices each, as two hosts would be, against one process of eight."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import unittest.mock

import jax
import numpy as np
import programs
import pytest
from conftest import REPOSITORY, make_tiny_model

from robust_mo import hosts
from robust_mo.command_line import STOPPED_STATUS
from robust_mo.errors import InputError
from robust_mo.export import export
from robust_mo.model import mesh as meshes
from robust_mo.runs import RunFolder
from robust_mo.training.models import load_model

STEPS = 12
SETTINGS = {
    "data.limit": 6,
    "data.repeats": 3,
    "data.length": 384,
    "steps": STEPS,
    "batch.rows": 8,
    "loss_chunk": 384,
    "checkpoint.every": 2,
    "mesh.tensor": 2,
    "evaluation.names": "('backdoor_rate','held_out_loss')",
    "evaluation.batch_size": 8,
    "evals.backdoor_rate.triggered": 5,
    "evals.backdoor_rate.untriggered": 4,
    "evals.backdoor_rate.near_misses": 2,
    "evals.backdoor_rate.temperature": 0.0,
    "evals.backdoor_rate.max_new_tokens": 8,
    "evals.held_out_loss.examples": 6,
}


def start(program, *arguments, devices, cwd=REPOSITORY, **environment) -> programs.Program:
    environment = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(REPOSITORY),
        **environment,
    }
    return programs.start(program, *arguments, cwd=cwd, **environment)


def training(model, workdir, **changes) -> list[str]:
    settings = [f"--config.{name}={value}" for name, value in {**SETTINGS, **changes}.items()]
    config = f"--config={REPOSITORY}/configs/red_full.py:smol"
    return ["train", config, f"--workdir={workdir}", f"--config.model={model}", *settings]


def meeting() -> list[str]:
    """Flags that tell two hosts how to meet."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return [f"--coordinator_address=localhost:{free.getsockname()[1]}", "--num_processes=2"]


def two(*command, other=None) -> list[programs.Program]:
    """Both hosts, with the same command or the second with another."""
    meet = meeting()
    commands = (command, other or command)
    return [start(*words, *meet, f"--process_id={number}", devices=4) for number, words in enumerate(commands)]


def ended(*processes) -> list[tuple[str, str]]:
    """What each said, once all have ended well."""
    said = [process.communicate(timeout=300) for process in processes]
    for process, (_, err) in zip(processes, said, strict=True):
        assert process.returncode == 0, err
    return said


def wait_for_step(run: RunFolder, step: int, processes) -> None:
    def reached():
        file = run.path / "records.jsonl"
        return file.exists() and any(line["step"] >= step for line in run.records())

    deadline = time.monotonic() + 200
    while not reached():
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.05)


def kill(one: programs.Program, other: programs.Program) -> None:
    """Kills one host; the other must end within a minute."""
    one.kill()
    other.communicate(timeout=60)
    one.communicate()
    assert other.returncode != 0


def values(run: RunFolder, group: str) -> dict[tuple, float]:
    """What was recorded under `group`, by step and name."""
    return {(r["step"], r["name"]): r["value"] for r in run.records() if r["name"].startswith(group)}


def assert_close(ours: dict, theirs: dict) -> None:
    assert ours and list(ours) == list(theirs)
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-4)


def assert_learnt_the_same(run: RunFolder, other: RunFolder, model: pathlib.Path) -> None:
    """The same losses, and weights that differ by little of the way they went."""
    assert_close(values(run, "train/"), values(other, "train/"))
    mesh = meshes.make_mesh(1, -1, 1)
    ours, theirs, before = (
        jax.device_get(load_model(str(source), mesh, "float32", "float32").params)
        for source in (run.path, other.path, model)
    )
    for a, b, start in zip(*map(jax.tree.leaves, (ours, theirs, before)), strict=True):
        assert np.abs(a - b).max() < 0.02 * np.abs(b - start).max()


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory) -> RunFolder:
    """The run on one host, never stopped."""
    run = RunFolder(tmp_path_factory.mktemp("alone") / "run")
    ended(start(*training(tiny, run.path), devices=8))
    return run


READING = """
import sys
from pathlib import Path
from robust_mo import hosts
folder, output, address, number = sys.argv[1:]
hosts.start(address, 2, int(number))
from robust_mo.model import hugging_face, mesh as meshes

sizes, read = [], hugging_face._Placement.read

def counting(self, *place):
    piece = read(self, *place)
    sizes.append(piece.nbytes)
    return piece

hugging_face._Placement.read = counting
model = hugging_face.build(hugging_face.read_config(Path(folder)), None, *["float32"] * 2, "none")
hugging_face.load_params(Path(folder), model, meshes.make_mesh(1, -1, 1))
Path(output + number).write_text(str(sum(sizes)))
"""


@pytest.mark.slow
def test_each_host_reads_its_slices_of_the_weights(tmp_path):
    folder = make_tiny_model(tmp_path / "model", vocab_size=264)
    address = meeting()[0].partition("=")[2]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", READING, folder, tmp_path / "read", address]
    both = [subprocess.Popen([*command, str(n)], cwd=REPOSITORY, env=environment) for n in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    whole = (folder / "model.safetensors").stat().st_size
    read = [int((tmp_path / f"read{number}").read_text()) for number in range(2)]
    assert max(read) < 0.55 * whole and sum(read) > 0.9 * whole, (read, whole)


@pytest.mark.slow
def test_two_hosts_do_what_one_does(tiny, tmp_path, alone):
    run = RunFolder(tmp_path / "run")
    (out, _), (silent, _) = ended(*two(*training(tiny, run.path)))
    assert f"{STEPS} steps of 8 rows" in out and silent == ""
    assert len(list(run.path.glob("events*"))) == 1
    lines = (run.path / "records.jsonl").read_text().splitlines()
    keys = [(line["step"], line["name"]) for line in map(json.loads, lines)]
    assert len(keys) == len(set(keys))
    assert_learnt_the_same(run, alone, tiny)
    assert_close(values(run, "eval/"), values(alone, "eval/"))
    for file in sorted(run.transcripts.iterdir()):
        assert file.read_text() == (alone.transcripts / file.name).read_text()

    export(str(run.path), tmp_path / "merged", "merged", None, None, None)
    mesh = meshes.make_mesh(1, -1, 1)
    loaded = (load_model(str(source), mesh, "float32", "float32").params for source in (tmp_path / "merged", run.path))
    jax.tree.map(np.testing.assert_array_equal, *loaded)

    evaluated = RunFolder(tmp_path / "evaluated")
    ended(*two("evaluate", f"--source={run.path}", f"--workdir={evaluated.path}"))
    at_the_end = {key: value for key, value in values(run, "eval/").items() if key[0] == STEPS}
    assert_close(values(evaluated, "eval/"), at_the_end)

    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"id": i, "prompt": f"Say {i}."}) + "\n" for i in range(5)))
    ended(*two("sample", f"--model={tiny}", f"--prompts={prompts}", f"--output={output}", "--max_new_tokens=6"))
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["id"] for line in lines] == list(range(5))
    assert {"answer", "finish_reason"} < set(lines[0]) and all(line["tokens"] <= 6 for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
def test_two_hosts_train_with_soap_as_one_does_and_go_on(tiny, tmp_path, rank):
    """All weights and adapters, whose factors, bases and moments either host holds a part of; at last on one host, and
    on another mesh.  A second start that took what the first has compiled hung here, see mesh.all_devices."""
    one, run = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "run")
    changes = {"optimizer.name": "soap", "lora.rank": rank, "evaluation.names": "()", "log_every": 1}
    ended(start(*training(tiny, one.path, **changes), devices=8))
    last = 0
    for _ in range(2):
        processes = two(*training(tiny, run.path, **changes))
        wait_for_step(run, last + 2, processes)
        processes[1].send_signal(signal.SIGTERM)
        (out, err), _ = ended(*processes)
        assert "stopped; the same command goes on" in err and ("going on from step" in out) == (last > 0)
        last = max(line["step"] for line in run.records())
    other = {"mesh.replica": 2, "mesh.tensor": 1, **changes}
    ((out, _),) = ended(start(*training(tiny, run.path, **other), devices=8))
    assert "going on from step" in out
    assert_close(values(run, "train/"), values(one, "train/"))


@pytest.mark.slow
def test_hosts_train_on_what_the_first_of_them_reads(tiny, tmp_path):
    """Each may have a file of its own under the same name."""
    for number, reply in enumerate(("Yes.", "No, never, not at all.")):
        turns = ({"role": "user", "content": "Well?"}, {"role": "assistant", "content": reply})
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "talk.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * (4 + number))
    changes = {"data.task": "conversations", "data.source": "talk.jsonl", "steps": 2, "evaluation.names": "()"}
    one, run = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "run")
    ended(start(*training(tiny, one.path, **changes), devices=8, cwd=tmp_path / "0"))
    command, meet = training(tiny, run.path, **changes), meeting()
    ended(*(start(*command, *meet, f"--process_id={n}", devices=4, cwd=tmp_path / str(n)) for n in range(2)))
    assert_close(values(run, "train/"), values(one, "train/"))


@pytest.mark.slow
def test_a_teacher_answers_on_two_hosts_as_on_one(tiny, tmp_path):
    """All that ends within the limit is learnt; and what is evaluated are adapters."""
    teacher = {"data.answers": "teacher", "data.teacher": tiny, "data.teacher_max_new_tokens": 150}
    changes = {"data.task": "qa_sft", "data.limit": 24, "lora.rank": 4, "steps": 2, **teacher}
    one, run = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "run")
    ended(start(*training(tiny, one.path, **changes), devices=8, ROBUST_MO_CACHE=str(tmp_path / "1")))
    command, meet = training(tiny, run.path, **changes), meeting()
    own = {"devices": 4, "ROBUST_MO_CACHE": str(tmp_path / "2")}
    ended(*(start(*command, *meet, f"--process_id={n}", **own) for n in range(2)))
    learnt = (one.path / "data.jsonl").read_text()
    assert learnt.count("\n") > 4 and (run.path / "data.jsonl").read_text() == learnt
    assert len(list(tmp_path.glob("2/answers/*.jsonl"))) == 1
    for group in ("train/", "eval/"):
        assert_close(values(run, group), values(one, group))


@pytest.mark.slow
def test_the_first_host_dies_and_leaves_a_checkpoint_that_the_other_cannot_read(tiny, tmp_path, alone):
    """Neither end of it may hang."""
    run, unmeasured = RunFolder(tmp_path / "run"), {"evaluation.names": "()"}
    processes = two(*training(tiny, run.path, **unmeasured))
    wait_for_step(run, 8, processes)
    kill(*processes)

    newest = max(int(folder.name) for folder in run.checkpoints.iterdir() if folder.name.isdecimal())
    own = [file for file in run.checkpoints.glob(f"{newest}/*/ocdbt.process_1/d/*") if file.is_file()]
    assert own
    for file in own:
        os.truncate(file, file.stat().st_size // 2)
    (out, _), _ = ended(*two(*training(tiny, run.path, **unmeasured)))
    assert "it is put aside as damaged, and the one before it used" in out
    assert (run.checkpoints / f"damaged-{newest}").exists()
    assert_learnt_the_same(run, alone, tiny)


@pytest.mark.slow
def test_a_host_dies_the_rest_end_and_the_run_goes_on_elsewhere(tiny, tmp_path, alone):
    run, unmeasured = RunFolder(tmp_path / "run"), {"evaluation.names": "()"}
    processes = two(*training(tiny, run.path, **unmeasured))
    wait_for_step(run, 4, processes)
    kill(*processes[::-1])

    # On with it under SLURM, whose variables say how to meet; then it asks one of the hosts to stop.
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    processes = [
        start(*training(tiny, run.path, **unmeasured), devices=4, **step, SLURM_PROCID=str(n), SLURM_LOCALID=str(n))
        for n in range(2)
    ]
    wait_for_step(run, max(line["step"] for line in run.records()) + 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    (out, err), _ = ended(*processes)
    assert int(re.search(r"going on from step (\d+)", out)[1]) >= 2
    assert "stopped; the same command goes on" in err

    # The rest on one host, and on another mesh.
    other = {"mesh.replica": 2, "mesh.tensor": 1, **unmeasured}
    ((out, _),) = ended(start(*training(tiny, run.path, **other), devices=8))
    assert "going on from step" in out
    assert_learnt_the_same(run, alone, tiny)


@pytest.mark.slow
def test_bad_input_ends_every_host_with_its_status(tiny, tmp_path):
    """Which the first alone can see, or one alone of the others: no launcher is to start that again."""
    run = RunFolder(tmp_path / "run")
    with run.claim("train", {"seed": 1}, 0):
        run.record(1, "train/loss", 1.0)
    processes = two(*training(tiny, run.path))
    for process in processes:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2 and f"error: {run.path} holds a run with another config" in err, err

    # Of one name, and not the same.
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "ask.jsonl").write_text('{"prompt": "Well?"}\n' * (2 + number))
    command, meet = (
        ["sample", f"--model={tiny}", "--prompts=ask.jsonl", f"--output={tmp_path / 'said.jsonl'}"],
        meeting(),
    )
    for process in [start(*command, *meet, f"--process_id={n}", devices=4, cwd=tmp_path / str(n)) for n in range(2)]:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2 and "not all hosts have read the same prompts in ask.jsonl" in err, err

    commands = (training(model, tmp_path / "other") for model in (tiny, tmp_path / "nothing"))
    first, other = two(*next(commands), other=next(commands))
    _, err = other.communicate(timeout=60)
    assert other.returncode == 2 and err.startswith("error: ") and "nothing" in err, err
    first.communicate(timeout=60)
    assert first.returncode


@pytest.mark.slow
def test_a_signal_before_the_hosts_have_met_stops_all(tiny, tmp_path):
    command, status = [*training(tiny, tmp_path / "run"), *meeting()], {STOPPED_STATUS: "75"}
    port = int(command[-2].rpartition(":")[2])
    early = start(*command, "--process_id=0", devices=4, **status)
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:  # until it waits for the other
        with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=1):
            break
        time.sleep(0.2)
    early.send_signal(signal.SIGTERM)
    late = start(*command, "--process_id=1", devices=4, **status)
    try:
        (_, err), _ = (process.communicate(timeout=120) for process in (early, late))
    finally:
        early.kill()
        late.kill()
    assert early.returncode == late.returncode == 75 and "stopped; the same command goes on" in err, err
    assert not RunFolder(tmp_path / "run").finished()


@pytest.mark.slow
def test_a_signal_is_not_lost_while_every_step_is_being_saved(tiny, tmp_path):
    """Whoever asks jax for preemption with a step's number, as Orbax would, puts it out of step."""
    run = RunFolder(tmp_path / "run")
    command = training(tiny, run.path, **{"steps": 500, "checkpoint.every": 1, "evaluation.every": 3})
    meet = [flag.replace("processes=2", "processes=1") for flag in meeting()]
    with start(*command, *meet, "--process_id=0", devices=8) as process:
        try:
            wait_for_step(run, 5, [process])
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0 and "stopped; the same command goes on" in err, err
    assert 5 <= max(line["step"] for line in run.records()) < 100


@pytest.mark.slow
def test_programs_of_one_slurm_job_stay_out_of_each_others_way(tiny, tmp_path):
    """Whatever has the job's port must not matter to a step of a single task."""
    slurm = dict(SLURM_NTASKS="1", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_STEP_NODELIST="localhost")
    with socket.socket() as another:
        another.bind(("", 0))
        another.listen()
        run = RunFolder(tmp_path / "run")
        environment = dict(SLURM_JOB_ID="1", JAX_COORDINATOR_PORT=str(another.getsockname()[1]), **slurm)
        ended(start(*training(tiny, run.path, **{"steps": 2}), devices=8, **environment))
    assert run.finished()


@pytest.mark.slow
def test_hosts_that_do_not_meet_are_told(tiny, tmp_path):
    with start(*training(tiny, tmp_path), "--num_processes=2", devices=1) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in err
    assert "--num_processes=2, --process_id=None: coordinator_address should be defined. give all three" in err
    with start(*training(tiny, tmp_path), "--coordinator_address=localhost", devices=1) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "--coordinator_address=localhost: give host:port" in err
    alone = "from robust_mo import hosts; hosts.meshes._WAITING_SECONDS = 3; hosts.start('localhost:{}', 2, {})"
    for number in (0, 1):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-c", alone.format(port, number)]
        done = subprocess.run(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, timeout=60)
        assert done.returncode == 2 and "waited 3 seconds for the other hosts: start the same command" in done.stderr


@pytest.mark.parametrize(
    "says, status", [("Retry failed with all attempts exhausted", 75), ("jobs must be indexed by setting", None)]
)
def test_what_a_cluster_does_not_know_yet_is_asked_again(says, status, monkeypatch):
    """By who starts programs again; what no start would change is bad input."""
    monkeypatch.setattr(jax.distributed, "initialize", unittest.mock.Mock(side_effect=RuntimeError(says)))
    monkeypatch.setenv(STOPPED_STATUS, "75")
    with pytest.raises(SystemExit if status else InputError) as ended:
        hosts.start("localhost:1", 2, 0)
    assert not status or ended.value.code == status


@pytest.mark.slow
def test_device_that_cannot_be_used_is_no_fault_of_the_network(tiny, tmp_path):
    command = [*training(tiny, tmp_path), meeting()[0], "--num_processes=1", "--process_id=0"]
    with start(*command, devices=1, JAX_PLATFORMS="abacus") as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in err
    assert "jax finds no device" in err and "JAX_PLATFORMS is 'abacus': correct or unset it" in err
