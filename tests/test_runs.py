"""The run folder."""

import errno
import fcntl
import json
import os
import pathlib
import subprocess
import sys

import gcsfs
import pytest

from robust_mo import runs
from robust_mo.errors import InputError, passes
from robust_mo.runs import RunFolder, append_line, read_lines

CONFIG = {"optimizer": {"learning_rate": 1e-4}, "model": "m", "mesh": {"fsdp": 8}}


def test_same_config_resumes_another_is_refused_with_both_values(tmp_path):
    run = RunFolder(tmp_path / "run")
    with run.claim("train", CONFIG, 0):
        run.record(3, "eval/x", 0.5, count=10, low=0.2, high=0.8)
    with run.claim("train", {**CONFIG, "mesh": {"fsdp": 4}}, 0):  # the same on other devices
        pass
    with pytest.raises(InputError, match="optimizer.learning_rate is 0.0001 there and 0.1 here"):
        with run.claim("train", {**CONFIG, "optimizer": {"learning_rate": 0.1}}, 0):
            pass
    with pytest.raises(InputError, match="robust_mo.train"):
        with run.claim("study", CONFIG, 0):
            pass
    (line,) = run.records()
    assert {name: line[name] for name in ("step", "name", "value", "count", "low", "high", "seed")} == {
        "step": 3,
        "name": "eval/x",
        "value": 0.5,
        "count": 10,
        "low": 0.2,
        "high": 0.8,
        "seed": 0,
    }
    assert len(line["revision"]) >= 7 and line["time"] > 1.7e9
    assert set(run.description()) >= {"program", "config", "command", "revision", "versions"}


def test_how_the_work_is_cut_may_change_and_is_told(tmp_path, capsys):
    config = {"red": {"batch": {"rows": 4, "micro_batches": 1}, "evaluation": {"batch_size": 64}}}
    run = RunFolder(tmp_path)
    with run.claim("study", config, 0):
        run.record(0, "a", 1)
    smaller = {"red": {"batch": {"rows": 4, "micro_batches": 4}, "evaluation": {"batch_size": 8}}}
    with run.claim("study", smaller, 0):
        assert "red.batch.micro_batches was 1 and is 4 from here on" in capsys.readouterr().out
    with pytest.raises(InputError, match="red.batch.rows is 4 there and 8 here"):
        with run.claim("study", {"red": {"batch": {"rows": 8, "micro_batches": 1}}}, 0):
            pass


def test_run_whose_start_was_made_again_is_refused(tmp_path):
    run = RunFolder(tmp_path)
    with run.claim("train", CONFIG, 0, model_started="monday"):
        run.record(0, "a", 1)
    with run.claim("train", CONFIG, 0, model_started="monday"):
        pass
    with pytest.raises(InputError, match=r"began from another m \(monday\) than lies there now \(tuesday\): bring"):
        with run.claim("train", CONFIG, 0, model_started="tuesday"):
            pass


def test_files_that_were_made_again_are_refused_and_missing_ones_are_not_this_ones_to_tell(tmp_path):
    run = RunFolder(tmp_path)
    with run.claim("evaluate", {"source": "m"}, 0, model_started="files a"):
        run.record(0, "a", 1)
    with run.claim("evaluate", {"source": "m"}, 0, model_started=None):
        pass
    with pytest.raises(InputError, match=r"began from another m \(files a\) than lies there now \(files b\)"):
        with run.claim("evaluate", {"source": "m"}, 0, model_started="files b"):
            pass


def test_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match="is, or lies in, a file: give a folder as --workdir"):
            with RunFolder(path).claim("train", CONFIG, 0):
                pass


def test_home_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder("~/runs/red").path == tmp_path / "runs" / "red"
    assert str(RunFolder("~nobody-of-that-name/red").path) == "~nobody-of-that-name/red", "as a shell leaves it"


def test_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(InputError, match="lock cannot be locked .*takes no locks.*choose another folder"):
        with RunFolder(tmp_path).claim("train", CONFIG, 0):
            pass


def test_folder_in_which_nothing_was_done_takes_another_config(tmp_path):
    run = RunFolder(tmp_path)
    for config in ({"model": "typo"}, CONFIG):
        with run.claim("train", config, 0):
            pass
    assert run.config() == CONFIG
    with run.claim("train", CONFIG, 0):
        run.record(0, "a", 1)
    with pytest.raises(InputError, match="another config"):
        with run.claim("train", {"model": "typo"}, 0):
            pass


@pytest.mark.parametrize(
    "file, text, says",
    [
        ("config.json", '{"program": "train"}', "config.json holds no run's 'config'"),
        ("records.jsonl", '{"step": 1, "name": "a", "value": 1}\n5\n', "records.jsonl:2 is not a JSON object"),
        ("records.jsonl", "[" * 99_999 + '\n{"step": 1}\n', "without 'step', 'name' or 'value'"),
        ("records.jsonl", '{"step": 1}\n', "without 'step', 'name' or 'value'"),
        ("records.jsonl", '{"step": 1, "name": "a", "value": "abc"}\n', "one of a wrong type: .*abc"),
        ("records.jsonl", '{"step": "3", "name": "a", "value": 1}\n', "one of a wrong type"),
        ("records.jsonl", '{"step": 3, "name": "a", "value": 1, "low": 0}\n', "one of a wrong type"),
    ],
)
def test_damaged_folder_is_named(tmp_path, file, text, says):
    run = RunFolder(tmp_path)
    with run.claim("train", CONFIG, 0):
        run.record(0, "a", 1)
    (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match=says):
        run.config(), run.records()


def test_folder_elsewhere_than_on_a_disk_or_in_a_bucket_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="s3://bucket/run is neither a folder nor gs://BUCKET/...: mount it"):
        RunFolder("s3://bucket/run")
    assert not any(tmp_path.iterdir())


def test_two_processes_never_write_one_folder(tmp_path):
    program = (
        "import sys; from robust_mo.runs import RunFolder\n"
        "with RunFolder(sys.argv[1]).claim('train', {}, 0): print('mine', flush=True); input()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(InputError, match="in use by another process"):
            with RunFolder(tmp_path).claim("train", {}, 0):
                pass
        other.communicate("\n")
    with RunFolder(tmp_path).claim("train", {}, 0):
        pass


def test_repeated_measurement_counts_once_and_torn_line_is_mended(tmp_path):
    run = RunFolder(tmp_path)
    with run.claim("train", {}, 0):
        run.record(2, "b", 1)
        run.record(1, "a", 1)
        run.record(2, "b", 3)
    file = tmp_path / "records.jsonl"
    file.write_text(file.read_text() + '{"step": 9, "na')
    assert [(line["step"], line["value"]) for line in run.records()] == [(1, 1.0), (2, 3.0)]
    append_line(file, {"step": 4, "name": "c", "value": 5})
    assert run.records()[-1]["value"] == 5
    assert len(read_lines(file)) == 4


def test_not_a_number_is_written_as_valid_json(tmp_path):
    run = RunFolder(tmp_path)
    with run.claim("train", {}, 0):
        run.record(1, "train/loss", float("nan"))
    text = (tmp_path / "records.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["value"] is None


def test_a_bucket_that_is_not_reached_is_told_as_what_passes(tmp_path, monkeypatch):
    def unreached(*_, **__):
        raise gcsfs.retry.HttpError({"code": 503, "message": "later"})

    for name in ("is_file", "read_text", "read_bytes", "iterdir"):
        monkeypatch.setattr(pathlib.Path, name, unreached)
    (tmp_path / "records.jsonl").touch()
    run = RunFolder(tmp_path)
    for ask in (run.exists, run.description, run.records, run._begun):
        with pytest.raises(OSError, match="not reached now, try again .later, 503") as error:
            ask()
        assert passes(error.value) and str(tmp_path) in error.value.filename


def test_transcripts_appear_whole(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    run.write_transcript("backdoor_rate", 15, [{"answer": "Ärr\n"}, {"answer": "b"}])
    (file,) = run.transcripts.iterdir()
    assert file.name == "backdoor_rate-000015.jsonl"
    assert [line["answer"] for line in read_lines(file)] == ["Ärr\n", "b"]

    def refuse(*_):
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="backdoor_rate-000016"):
        run.write_transcript("backdoor_rate", 16, [{}])
    assert [*run.transcripts.iterdir()] == [file], "no half file, no temporary one"


def test_revision_is_that_of_the_source_and_not_of_results(tmp_path, monkeypatch):
    for file in ("robust_mo/runs.py", "benchmarks/results/speed.json", "results/study/report.md"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("one")

    def git(*arguments):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def revision():
        monkeypatch.setattr(runs, "_REVISION", [])
        return runs.git_revision()

    monkeypatch.setattr(runs, "__file__", str(tmp_path / "robust_mo" / "runs.py"))
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    commit = git("rev-parse", "HEAD").strip()
    for file in ("benchmarks/results/speed.json", "results/study/report.md"):
        (tmp_path / file).write_text("two")
    assert revision() == commit
    (tmp_path / "robust_mo" / "runs.py").write_text("two")
    assert revision() == commit + "-modified"
