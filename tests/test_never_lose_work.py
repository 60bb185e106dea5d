"""Training that is killed at random moments ends as if nothing had happened."""

import random
import time

import jax
import numpy as np
import programs
import pytest
from conftest import make_tiny_model

from configs import default
from robust_mo.model import mesh as meshes
from robust_mo.runs import RunFolder
from robust_mo.train import train
from robust_mo.training.models import load_model

KILLS = 30


def run_config(model, **changes):
    config = default.get_config()
    config.model, config.steps = str(model), 150
    config.data.limit, config.data.repeats, config.data.length = 2, 2, 256
    config.batch.rows, config.loss_chunk = 1, 256
    config.evaluation.names = ()
    config.update_from_flattened_dict(changes)
    return config


def weights(run: RunFolder) -> dict:
    return jax.device_get(load_model(str(run.path), meshes.make_mesh(1, -1, 1), "float32", "float32").params)


def steps_of(run: RunFolder) -> list[int]:
    file = run.path / "records.jsonl"
    return [r["step"] for r in run.records() if r["name"] == "train/loss"] if file.exists() else []


def train_with_cache(folder, config, workdir):
    """With compiled programs of its own: who is killed may leave half of one."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    train(config, workdir)


@pytest.mark.slow
def test_killed_at_random_moments_ends_with_the_same_bits(tmp_path):
    """kill -9, most often while a checkpoint is being written, since every step has one."""
    model = make_tiny_model(tmp_path / "model", num_hidden_layers=1)

    def start(folder, **changes):
        given = tmp_path / "compiled", run_config(model, **changes), tmp_path / folder
        process = programs.forked.Process(target=train_with_cache, args=given)
        process.start()
        return process

    whole = start("whole", **{"checkpoint.every": 1000})
    whole.join()
    assert whole.exitcode == 0

    run, moments, reached = RunFolder(tmp_path / "killed"), random.Random(0), []
    for number in range(KILLS):
        process, before = start("killed", **{"checkpoint.every": 1}), len(steps_of(run))
        if number % 5:  # the others are killed wherever their start has come to
            while len(steps_of(run)) == before and process.is_alive():
                time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.4 if number % 5 else 2))
        process.kill()
        process.join()
        assert process.exitcode == -9, "the run ended before it could be killed"
        reached.append(max(steps_of(run), default=0))
    assert len(set(reached)) > KILLS / 2, reached
    last = start("killed", **{"checkpoint.every": 1})
    last.join()
    assert last.exitcode == 0 and run.finished()

    losses = [
        [(r["step"], r["value"]) for r in folder.records() if r["name"] == "train/loss"]
        for folder in (run, RunFolder(tmp_path / "whole"))
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 150
    jax.tree.map(np.testing.assert_array_equal, weights(run), weights(RunFolder(tmp_path / "whole")))
    assert {folder.name for folder in run.checkpoints.iterdir() if folder.is_dir()} == {"149", "150"}
