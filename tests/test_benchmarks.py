"""The benchmarks can be run, and their sides do the same work.  How fast they are is no test's matter."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import REPOSITORY

from benchmarks import logits, optimizer_step, peers, preflight_table, sampling, table, training


def told(lora, losses, norms, _) -> dict:
    """What a side of the training benchmark says of its work."""
    norm_tolerance = training.ADAPTERS_NORM_TOLERANCE if lora else training.NORM_TOLERANCES["float32"]
    allowed = {"tolerance": training.TOLERANCES["float32"], "norm_tolerance": norm_tolerance}
    return {"losses": losses, "norms": norms, "tokens": 0, **allowed}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_training(lora):
    batch = {name: values[:2] for name, values in training.make_batches("smol", "ours", packed=False)[0].items()}
    ours, theirs = (told(lora, *side("smol", [batch] * 2, lora, 1e-5)) for side in (training.ours, training.theirs))
    training.agree(ours, theirs)
    with pytest.raises(SystemExit, match="norms differ"):
        training.agree(ours | {"norms": [1.5 * norm for norm in ours["norms"]]}, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_training_on_invented_weights_with_rows_in_parts_and_layers_computed_again(lora):
    batches = training.make_batches("tiny", "ours", packed=False)[:4]  # of few tokens, then of all
    ours = told(lora, *training.ours("tiny", batches, lora, 1e-5))
    training.agree(ours, told(lora, *training.theirs("tiny", batches, lora, 1e-5, checkpointing=True)))
    assert ours["losses"][1] < ours["losses"][0] and ours["losses"][3] < ours["losses"][2]


@pytest.mark.slow
def test_packed_and_padded_batches_hold_the_same_conversations():
    ours, theirs = (training.make_batches("smol", side, True)[training.WARM_UP :] for side in ("ours", "theirs"))
    for name in ("tokens", "targets"):
        one, other = (np.concatenate([b[name][b["segments"] > 0] for b in batches]) for batches in (ours, theirs))
        np.testing.assert_array_equal(np.sort(one), np.sort(other))
    assert sum(b["loss_mask"].sum() for b in ours) == sum(b["loss_mask"].sum() for b in theirs)
    positions = sum(b["tokens"].size for b in theirs)
    assert all(b["segments"].any(0).all() for b in theirs)  # no wider than the longest
    assert sum((b["segments"] > 0).sum() for b in theirs) < 0.7 * positions


@pytest.mark.slow
def test_logits():
    texts = logits.conversations(2)
    ours, theirs = logits.ours(texts, "F64_F64_F64"), logits.theirs(texts, "float64")
    apart = logits.distance(ours, theirs)
    assert 0 < apart["root mean square"] < apart["largest"] < 1e-4 and apart["logits beyond 1e-4"] == 0
    theirs[1][3, 5:7] += 1
    assert logits.distance(ours, theirs)["logits beyond 1e-4"] == 2
    assert logits.distance(ours, theirs)["positions beyond 1e-4"] == 1


def test_a_machine_is_named_whatever_it_tells_of_itself(monkeypatch):
    assert "cores" in peers.device("cpu")
    monkeypatch.setattr(peers.pathlib.Path, "exists", lambda _: False)  # as on macOS
    assert peers.device("cpu").endswith("cores")


def test_sides_on_different_devices_or_with_different_answers_are_not_compared():
    with pytest.raises(SystemExit, match="ours on cpu, theirs on gpu"):
        peers.on_one_platform({"ours": {"platform": "cpu"}, "theirs": {"platform": "gpu"}})
    one = {"answers": [[i, 1, 2] for i in range(10)], "exact": False}
    sampling.agree(one, {"answers": [[i, 1, 9] for i in range(10)]})
    for other in ([[i, 9, 2] for i in range(10)], [[9 + i, 1, 2] for i in range(10)], [[i, 1] for i in range(10)]):
        with pytest.raises(SystemExit, match="the answers differ"):
            sampling.agree(one, {"answers": other})


@pytest.mark.slow
@pytest.mark.parametrize("forced", [False, True], ids=["to the end of turn", "forced"])
def test_sampling(forced, monkeypatch):
    everything = sampling.work("smol", 4, forced)
    few = tuple([part[index] for index in (0, 20, 50, 60)] for part in everything)
    few = (few[0], [min(limit, 6) for limit in few[1]])
    monkeypatch.setattr(sampling, "work", lambda *_: few)
    ours, theirs = sampling.ours("smol", 4, 2, forced), sampling.theirs("smol", 4, 2, forced, "generate")
    sampling.agree(ours | {"exact": True}, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("peer", sampling.PEERS)
def test_sampling_on_invented_weights_beside_every_peer(peer):
    ours, theirs = sampling.ours("tiny", 0, 4, True), sampling.theirs("tiny", 0, 4, True, peer)
    assert [len(answer) for answer in ours["answers"]] == sampling.work("tiny", 0, True)[1]
    sampling.agree(ours | {"exact": True}, theirs)


@pytest.mark.slow
def test_optimizer_step(tmp_path, monkeypatch):
    few = "--size=tiny --rows=1 --length=8 --steps=4 --rounds=1 --compilations=1 --only soap lion per_tensor"
    monkeypatch.setattr(sys, "argv", ["optimizer_step", *few.split()])
    monkeypatch.setattr(peers, "RESULTS", tmp_path)
    monkeypatch.setattr(os, "environ", {**os.environ})  # which a benchmark changes for itself
    cached = jax.config.jax_enable_compilation_cache
    try:
        optimizer_step.main()
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    kept = json.loads((tmp_path / "optimizer_step-tiny.json").read_text())
    assert set(kept["seconds"]) == {"adamw", "soap, all at once", "soap, staggered", "lion", "per_tensor"}
    assert table.added(kept["seconds"]) > 0 and table.largest_step_of_soap(kept) >= 1


def test_readme_shows_the_results_that_are_kept():
    readme = (REPOSITORY / "README.md").read_text()
    assert table.table() in readme
    cells = json.loads(preflight_table.RESULTS.read_text())["cells"]
    assert preflight_table.table(cells) in readme
    lora, lora_soap, full, adafactor = (
        cells[name]["bytes_per_chip"]["total"] / 2**30 for name in preflight_table.BESIDE
    )
    told = f"{lora:.2f} GiB of 15.75 with AdamW, {lora_soap:.2f} with SOAP", f"{full:.1f} GiB", f"{adafactor:.1f} GiB"
    assert all(words in " ".join(readme.split()) for words in told), told


@pytest.mark.parametrize(
    "name, least",
    [
        ("training", 0.95),
        ("training-lora", 0.95),
        ("training-packed", 2.0),
        ("training-own", 1.25),
        ("sampling", 1.25),
        ("sampling-forced", 2.5),
    ],
)
def test_results_on_cpus_that_are_kept_meet_their_targets(name, least):
    kept = json.loads((table.RESULTS / f"{name}.json").read_text())
    assert "cores" in kept["device"] and " x " not in kept["device"]
    assert kept["ratio"] >= least and all(len(rounds) >= 3 for rounds in kept["rounds"].values())
    assert not name.startswith("sampling") or kept["figures"]["ours"]["share of slots idle"] <= 0.1


@pytest.mark.parametrize("name, more", [("optimizer_step", 0.15), ("optimizer_step-lora", 0.02)])
def test_what_soap_adds_in_the_results_that_are_kept_is_within_its_bounds(name, more):
    kept = json.loads((table.RESULTS / f"{name}.json").read_text())
    adamw, soap = (kept["seconds"][optimizer]["compiling"]["median"] for optimizer in ("adamw", "soap, staggered"))
    assert table.added(kept["seconds"]) <= more
    assert table.largest_step_of_soap(kept) <= 1.3 and soap <= 1.3 * adamw


def test_benchmarks_for_a_bare_accelerator_machine_import_nothing_beyond_what_is_there():
    absent = ("grain", "datasets", "gguf", "tensorboard", "ml_collections", "math_verify", "matplotlib")
    program = f"""
import sys
for name in {absent!r}:
    sys.modules[name] = None
from benchmarks import decode_step, gpu, load_weights, optimizer_step, sampling, sizes, start, training
sizes.folder("tiny")
batch = training.make_batches("tiny", "ours", packed=False)[:2]
losses, *_ = training.ours("tiny", batch, True, 1e-5)
print(losses[0], len(sampling.work("tiny", 4, True)[0]))
decode_step.keep = lambda name, found, platform: print(found["rows"][2]["tokens/s"])
sys.argv[1:] = "--size=tiny --rows 2 --prompt 8 --steps 2".split()
decode_step.main()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 9 < json.loads(done.stdout.split()[0]) < 13
