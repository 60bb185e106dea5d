"""Run folders in a bucket, against an emulator of Google's storage that speaks the same protocol as the real one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import jax
import numpy as np
import pytest
from conftest import REPOSITORY
from etils import epath
from programs import run as run_program
from test_programs import SMALL, refused

from robust_mo.errors import InputError
from robust_mo.export import export
from robust_mo.model import mesh as meshes
from robust_mo.runs import GrowingObject, RunFolder
from robust_mo.training.models import load_model

# The emulator leaves out one header that the real service sends with an object, and tensorstore asks for.
EMULATOR = """
import sys
from gcp_storage_emulator.handlers import objects

plain = objects.download

def download(request, response, storage, *rest, **more):
    plain(request, response, storage, *rest, **more)
    if response.status != 404:
        found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = found["generation"]

objects.download = download
from gcp_storage_emulator.server import create_server
create_server("localhost", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
"""


@pytest.fixture
def bucket(monkeypatch):
    """gs://bucket, of this test alone."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server = subprocess.Popen([sys.executable, "-c", EMULATOR, str(port)], **silent)
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):  # what epath's and tensorstore's readers obey
        monkeypatch.setenv(name, f"http://localhost:{port}")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)) == 0:
                break
        time.sleep(0.1)
    yield "gs://bucket"
    server.kill()
    server.wait()


def objects(prefix: str) -> list[str]:
    """The names in the bucket that begin so, as the emulator has them now: gcsfs remembers what it has listed."""
    address = f"{os.environ['STORAGE_EMULATOR_HOST']}/storage/v1/b/bucket/o?prefix={prefix}"
    with urllib.request.urlopen(address) as answer:
        return [each["name"] for each in json.load(answer).get("items", ())]


def saved() -> list[int]:
    """Steps of the checkpoints that are complete."""
    names = (re.fullmatch(r"runs/red/checkpoints/(\d+)/_CHECKPOINT_METADATA", name) for name in objects("runs/red/"))
    return sorted(int(match[1]) for match in names if match)


def parameters(folder: str, mesh):
    return load_model(folder, mesh, "float32", "float32").params


@pytest.mark.slow
def test_run_in_a_bucket_is_stopped_goes_on_and_ends_as_on_a_disk(tiny, tmp_path, bucket):
    small = [*SMALL[:3], "--config.evaluation.names=('held_out_loss',)", "--config.steps=8", "--config.log_every=2"]
    small += ["--config.evals.held_out_loss.examples=2", f"--config.model={tiny}", "--config.checkpoint.every=1"]

    def command(workdir):
        train = [sys.executable, "-m", "robust_mo.train", "--config=configs/red_full.py:smol"]
        return [*train, f"--workdir={workdir}", *small]

    workdir = f"{bucket}/runs/red"
    with subprocess.Popen(command(workdir), cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        while not (line := process.stdout.readline()).startswith("step 0:"):
            assert line, "ended before the first step"
        while len(saved()) < 2:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    assert process.returncode == 0
    newest = saved()[-1]
    damaged = objects(f"runs/red/checkpoints/{newest}/trainable/ocdbt.process_0/d/")
    for name in damaged:
        epath.Path(f"{bucket}/{name}").write_bytes(b"")
    again = subprocess.run(command(workdir), cwd=REPOSITORY, capture_output=True, text=True)
    assert again.returncode == 0 and "going on from step" in again.stdout, again.stderr
    assert "it is put aside as damaged, and the one before it used" in again.stdout
    assert damaged and objects(f"runs/red/checkpoints/damaged-{newest}/") and len(saved()) == 2
    assert not os.path.exists(REPOSITORY / "gs:")
    subprocess.run(command(tmp_path / "disk"), cwd=REPOSITORY, check=True, capture_output=True)

    mesh = meshes.make_mesh(1, -1, 1)
    ours, theirs = parameters(workdir, mesh), parameters(str(tmp_path / "disk"), mesh)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    export(workdir, tmp_path / "merged", "merged", None, None, None)
    jax.tree.map(np.testing.assert_array_equal, parameters(str(tmp_path / "merged"), mesh), theirs)
    there, here = RunFolder(workdir), RunFolder(tmp_path / "disk")
    assert there.finished() and not (there.path / "lock").exists()
    kept = [{(r["step"], r["name"]): r["value"] for r in folder.records()} for folder in (there, here)]
    assert {k: v for k, v in kept[0].items() if "speed" not in k[1]} == {
        k: v for k, v in kept[1].items() if "speed" not in k[1]
    }
    assert sum(file.stat().length for file in epath.Path(workdir).glob("events*")) > 1000


class Unreliable:
    """A file in a bucket that does not always answer."""

    def __init__(self):
        self.content, self.down, self.puts = b"", False, 0

    def write_bytes(self, data: bytes) -> None:
        if self.down:
            raise RuntimeError("429, Too Many Requests")
        self.content, self.puts = data, self.puts + 1


def test_what_a_bucket_does_not_take_is_put_there_later(capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    file = Unreliable()
    growing = GrowingObject(file, b"old ")
    growing.write(b"a")
    for _ in range(100):
        growing.write(b"b")
    assert file.content == b"old a" and file.puts == 1, "not for every line"
    file.down = True
    growing.put()
    assert "429, Too Many" in capsys.readouterr().err
    with pytest.raises(InputError, match="cannot be written: 429"):
        growing.close()
    file.down = False
    growing.close()
    growing.close()
    assert file.content == b"old a" + b"b" * 100 and file.puts == 2


@pytest.mark.slow
def test_buckets_that_cannot_be_used_are_named(tiny, bucket):
    command = ["train", "--config=configs/red_full.py:smol", f"--config.model={tiny}"]
    refused(run_program(*command, "--workdir=s3://bucket/run"), "s3://bucket/run", "mount it")
    refused(run_program(*command, "--workdir=gs://nowhere/run"), "gs://nowhere/run")
    study = run_program("study", "--config=configs/quickstart.py", f"--workdir={bucket}/study")
    refused(study, "gs://bucket/study", "mount the bucket")
