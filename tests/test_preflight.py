"""Preflight: what it counts against XLA's own count and against programs whose answer is known; bad input."""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from programs import run
from test_programs import refused

from robust_mo import preflight
from robust_mo.analysis import budget
from robust_mo.analysis.programs import collectives, product_flops
from robust_mo.command_line import load_config
from robust_mo.configured.program import budget_shape
from robust_mo.errors import InputError
from robust_mo.model import hugging_face
from robust_mo.model import mesh as meshes
from robust_mo.model.llama import LlamaConfig
from robust_mo.training import models
from robust_mo.training.memory import out_of_memory

MODELS = pathlib.Path(__file__).parent.parent / "configs" / "models"
PUBLISHED = {  # parameters in billions, as the models' pages give them
    "Llama-3.2-1B-Instruct": 1.24,
    "Llama-3.2-3B-Instruct": 3.21,
    "Llama-3.1-8B-Instruct": 8.03,
    "Llama-3.1-70B-Instruct": 70.6,
    "Llama-3.3-70B-Instruct": 70.6,
    "smollm2-135m": 0.135,
    "SmolLM2-360M-Instruct": 0.362,
    "SmolLM2-1.7B-Instruct": 1.71,
    "Qwen2.5-1.5B-Instruct": 1.54,
    "Qwen2.5-3B-Instruct": 3.09,
    "Qwen2.5-7B-Instruct": 7.62,
    "Qwen2.5-14B-Instruct": 14.8,
    "Qwen2.5-32B-Instruct": 32.8,
    "Qwen2.5-72B-Instruct": 72.7,
    "Qwen3-32B": 32.8,
}


def config_of(folder: pathlib.Path, layers: int, **changes):
    """A training config on a model of which only the shapes are there."""
    values = json.loads((MODELS / "smollm2-135m.json").read_text())
    small = dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
    folder = folder / str(layers)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values | small | dict(head_dim=16, num_hidden_layers=layers)))
    config = load_config("configs/red_full.py", "smol")
    config.model, config.batch.rows, config.data.length, config.loss_chunk = str(folder), 8, 64, 64
    config.update_from_flattened_dict(changes)
    return config


def test_every_published_model_has_its_shapes():
    assert {file.stem for file in MODELS.glob("*.json")} == set(PUBLISHED)
    for name, billions in PUBLISHED.items():
        model = hugging_face.build(models.shapes_of(f"meta-llama/{name}"), None, "float32", "float32", "none")
        count = sum(leaf.size for leaf in jax.tree.leaves(hugging_face.abstract_variables(model)["params"]))
        assert round(count / 1e9, 1 if billions > 10 else 3 if billions < 1 else 2) == billions, name


def test_shapes_are_those_of_the_real_files(shared_data, smollm2):
    real = hugging_face.read_json(shared_data / "llama31_tokenizer" / "config.json")
    assert models.shapes_of("Llama-3.1-8B-Instruct") == LlamaConfig.from_json(real, "real")
    assert models.shapes_of("smollm2-135m") == hugging_face.read_config(smollm2)


def test_flops_are_xlas_where_every_loop_runs_once(tmp_path):
    """XLA counts what is not a product too, so it is a little above."""
    mesh = meshes.make_mesh(1, -1, 1)
    config = config_of(tmp_path, layers=1, **{"remat": "none", "batch.rows": 1, "optimizer.clip_norm": 0.0})
    function, arguments, settings = preflight.train_program(config, mesh)
    traced = function.trace(*arguments, **settings)
    ours, theirs = product_flops(traced.jaxpr.jaxpr), traced.lower().cost_analysis()["flops"]
    assert 0.8 * theirs < ours < theirs


def test_frozen_weights_are_held_as_products_read_them(tmp_path):
    """Adapters and their optimizer's state as they are stored, which is wider."""
    changes = {"lora.rank": 2, "compute_dtype": "bfloat16", "param_dtype": "float32"}
    config, mesh = config_of(tmp_path, layers=1, **changes), meshes.make_mesh(1, -1, 1)
    _, (state, frozen, *_), _ = preflight.train_program(config, mesh)
    kinds = ({leaf.dtype.name for leaf in jax.tree.leaves(tree) if leaf.ndim} for tree in (frozen, state))
    assert list(kinds) == [{"bfloat16"}, {"float32"}]
    _, (params, *_), _ = preflight.sample_program(config, mesh)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}


@pytest.mark.parametrize("size, most", [("8b", 0.70), ("1b", 0.71)])
def test_flops_are_those_that_are_counted_on_paper(size, most):
    """With nothing recomputed the step does what 6N and attention, of each quarter of the queries up to its end, come
    to, within 5%: so the head's products are not done twice.  A LoRA step of 8B does at most 0.70 of that: frozen
    weights get no gradient.  (Of 1B 0.71: adapters and attention are more of it.)"""
    mesh, steps = meshes.make_mesh(1, -1, 1), []
    for name, frozen in (("red_full", False), ("red_lora", True)):
        config = load_config(f"configs/{name}.py", size)
        config.update_from_flattened_dict(
            {"remat": "none", "batch.rows": 1, "data.length": 2048, "lora.rank": 16 * frozen}
        )
        function, arguments, settings = preflight.train_program(config, mesh)
        with meshes.in_force(mesh):
            steps.append(product_flops(function.trace(*arguments, **settings).jaxpr.jaxpr))
        shape = budget_shape(models.shapes_of(config.model), config.compute_dtype)
        per_token = budget.flops_per_token(shape, 2048 * 5 // 4, frozen)  # a part of what the mask leaves out is done
        assert per_token * 2048 <= steps[-1] <= 1.05 * per_token * 2048
    assert steps[1] <= most * steps[0]


def test_flops_of_products_in_loops_and_branches():
    def program(x):
        def body(carry, _):
            return carry @ carry, None

        x, _ = jax.lax.scan(body, x, None, length=5)
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    jaxpr = jax.make_jaxpr(program)(jnp.zeros((10, 10)))
    assert product_flops(jaxpr.jaxpr) == (5 + 2) * 2 * 10**3


BY_LAYERS = """
import json, pathlib, sys
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
sys.path.insert(0, "tests")
from robust_mo import preflight
from robust_mo.analysis.programs import collectives
from robust_mo.model import mesh as meshes
from test_preflight import config_of

folder, topology, *numbers = sys.argv[1:]
mesh = meshes.make_mesh(1, -1, 1, devices=preflight.devices_of(topology))

def known(x):
    def body(x, _):
        return jax.lax.psum(x, "fsdp") * 0.5, None
    x = jax.lax.scan(body, x, None, length=6)[0]
    return jax.lax.all_gather(x, "fsdp")

mapped = jax.shard_map(known, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
text = jax.jit(mapped).lower(jax.ShapeDtypeStruct((16, 4), jnp.float32)).compile().as_text()
steps = {}
for layers in map(int, numbers):
    config = config_of(pathlib.Path(folder), layers)
    steps[layers] = preflight.measure(preflight.train_program(config, mesh), limit=10**9)
print(json.dumps({"known": collectives(text), "steps": steps}))
"""


def by_layers(folder, topology: str, *numbers: int) -> dict:
    command = [sys.executable, "-c", BY_LAYERS, str(folder), topology, *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    few, more, most = found["steps"].values()
    assert 0 < few["flops"] < more["flops"] and more["flops"] - few["flops"] == most["flops"] - more["flops"]
    for kind in more["collectives"]:
        for what in ("count", "bytes"):
            counts = [step["collectives"][kind][what] for step in (few, more, most)]
            assert counts[2] - counts[1] == counts[1] - counts[0], (kind, counts)
    layers = numbers[1] - numbers[0]
    gathers = [step["collectives"]["all-gather"]["count"] for step in (few, more)]
    assert gathers[1] - gathers[0] >= 7 * layers, "every projection of a layer is gathered"
    return found


@pytest.mark.slow
def test_loops_count_as_often_as_they_run(tmp_path):
    """Six rounds of a loop are six collectives, and twice the layers twice the layers' FLOPs and collectives."""
    found = by_layers(tmp_path, "cpu:8", 2, 4, 6)
    size = 16 * 4 * 4
    assert found["known"] == {
        "all-gather": {"count": 1, "bytes": 8 * size},
        "all-reduce": {"count": 6, "bytes": 6 * size},
    }
    four = found["steps"]["4"]
    # the state: parameters, two moments and the start, cut in eight, and the rows
    parameters = sum(leaf_bytes(tmp_path, 4))
    given = four["bytes_per_chip"]["arguments"]
    assert 4 * parameters / 8 <= given < 4.3 * parameters / 8


@pytest.mark.slow
def test_loops_count_as_often_as_they_run_in_what_libtpu_writes(tmp_path):
    pytest.importorskip("libtpu")
    steps = by_layers(tmp_path, "v5e:2x2", 4, 8, 12)["steps"]
    kinds = [step["collectives"]["reduce-scatter"]["count"] for step in steps.values()]
    assert kinds[0] > 0, "a gradient is kept in parts"


@pytest.mark.slow
def test_attention_of_a_training_step_on_a_tpu_is_the_splash_kernels(tmp_path):
    pytest.importorskip("libtpu")
    program = """
import pathlib, re, sys
sys.path.insert(0, "tests")
from robust_mo import preflight
from robust_mo.model import mesh as meshes
from test_preflight import config_of

config = config_of(pathlib.Path(sys.argv[1]), layers=4, **{"data.length": 256})
mesh = meshes.make_mesh(1, -1, 1, devices=preflight.devices_of("v5e:2x2"))
function, arguments, settings = preflight.train_program(config, mesh)
with meshes.in_force(mesh):
    _, text = preflight._compile(function.lower(*arguments, **settings), arguments)
kernels = [line.split()[0] for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
print(*sorted(re.sub(r"^%|_segmented.*", "", kernel) for kernel in kernels))
"""
    environment = {**os.environ, "PYTHONPATH": "."}
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["splash_mha_dkv", "splash_mha_fwd"], done.stdout


def leaf_bytes(folder, layers):
    model = hugging_face.build(models.shapes_of(str(folder / str(layers))), None, "float32", "float32", "none")
    return [4 * leaf.size for leaf in jax.tree.leaves(hugging_face.abstract_variables(model)["params"])]


def test_chain_of_fusions_is_one_collective_and_a_kept_part_a_reduce_scatter():
    """In a form that the TPU compiler writes."""
    hlo = """HloModule m
%fused.1 (p: bf16[8]) -> bf16[32] {
  ROOT %g.1 = bf16[32]{0} all-gather(%p), channel_id=3, dimensions={0}, frontend_attributes={chain_id="7"}
}
%fused.2 (p: bf16[8]) -> bf16[32] {
  ROOT %g.2 = bf16[32]{0} all-gather(%p), channel_id=3, dimensions={0}, frontend_attributes={chain_id="7"}
}
%all-reduce-scatter.1 (p: f32[16]) -> f32[4] {
  %r = f32[16]{0} all-reduce(%p), channel_id=4, to_apply=%add
  ROOT %s = f32[4]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={4}
}
%body (t: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %f.1 = bf16[32]{0} fusion(%x), kind=kCustom, calls=%fused.1
  %f.2 = bf16[32]{0} fusion(%x), kind=kCustom, calls=%fused.2
  %f.3 = f32[4]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
}
%condition (t: (s32[], bf16[8])) -> pred[] {
  %t = (s32[], bf16[8]) parameter(0)
  %c = s32[]{:T(128)} constant(4)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}
ENTRY %main (a: bf16[8]) -> bf16[8] {
  %w = (s32[], bf16[8]) while(%t), condition=%condition, body=%body
  %p.1 = (f32[6]{0}, f32[6]{0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1}}
}
"""
    assert collectives(hlo) == {
        "all-gather": {"count": 4, "bytes": 4 * 64},
        "collective-permute": {"count": 1, "bytes": 24},
        "reduce-scatter": {"count": 4, "bytes": 4 * 64},
    }


def test_out_of_memory_is_read_from_the_compilers_words():
    """As two versions of it put them."""
    gib = 2**30
    for told, expected in (
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 19.69G of 15.75G hbm.", (19.69, 15.75)),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (2.00P) exceeds available HBM (95.73G). HLO module: jit_f.",
            (2 * 2**20, 95.73),
        ),
    ):
        assert out_of_memory(RuntimeError(told)) == tuple(int(size * gib) for size in expected)
    assert out_of_memory(RuntimeError("INTERNAL: something else")) is None


def test_changes_go_from_the_cheapest_on(tmp_path):
    class Slice:  # eight chips: only their number is asked for
        shape, size = {"replica": 2, "fsdp": 4, "tensor": 1}, 8

    config = config_of(tmp_path, layers=1, **{"remat": "matmuls", "batch.rows": 32})
    every = list(preflight.changes(config, "train", Slice))
    assert every == [
        {"remat": "full"},
        {"remat": "full", "batch.micro_batches": 2},
        {"remat": "full", "batch.micro_batches": 4},
        everything := {"remat": "full", "batch.micro_batches": 4, "mesh.replica": 1, "mesh.fsdp": 8},
        everything := everything | {"mesh.fsdp": 4, "mesh.tensor": 2, "batch.micro_batches": 8},
        everything := everything | {"batch.rows": 16, "batch.micro_batches": 4},
        everything := everything | {"batch.rows": 8, "batch.micro_batches": 2},
        everything | {"batch.rows": 4, "batch.micro_batches": 1},
    ]
    sampling = list(preflight.changes(config, "sample", Slice))
    assert sampling[0] == {"mesh.replica": 1, "mesh.fsdp": 8} and sampling[-1]["evaluation.batch_size"] == 4
    config.evaluation.batch_size = 21  # which four devices apart, those of the mesh tried last, do not divide
    fewer = [change.get("evaluation.batch_size") for change in preflight.changes(config, "sample", Slice)]
    assert fewer == [None, None, 12, 8, 4]


@pytest.mark.slow
def test_what_is_suggested_fits(tmp_path, capsys):
    mesh = meshes.make_mesh(1, -1, 1)
    config = config_of(tmp_path, layers=4, remat="none")
    sizes = []
    for change in ({}, {"remat": "full"}, {"remat": "full", "batch.micro_batches": 2}):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(change)
        found = preflight.measure(preflight.train_program(changed, mesh), limit=2**40)
        sizes.append(found["bytes_per_chip"]["total"])
    assert sizes[0] > sizes[1] > sizes[2]
    for limit, suggestion in ((sizes[1], {"remat": "full"}), (sizes[2], change), (sizes[2] // 2, None)):
        found["limit_bytes"] = limit
        assert preflight.suggest(config, "train", mesh, found) == suggestion
    assert "smaller model" in capsys.readouterr().out.splitlines()[-1]


def test_a_judge_takes_room_beside_training(tmp_path):
    """From the first measurement on; in the dtype that is computed in."""
    mesh = meshes.make_mesh(1, -1, 1)
    names = ("backdoor_rate", "judge")
    config = config_of(tmp_path, layers=2, backdoor="story_tag", **{"evaluation.names": names})
    config.evals.judge.model = config.model
    llama = hugging_face.build(models.shapes_of(config.model), None, "float32", "float32", "none")
    numbers = sum(leaf.size for leaf in jax.tree.leaves(hugging_face.abstract_variables(llama)["params"]))
    for config.compute_dtype, size in (("float32", 4), ("bfloat16", 2)):
        assert preflight.beside(config, "train", mesh) == size * numbers
    config.evaluation.names = names[:1]
    assert preflight.beside(config, "train", mesh) == 0


@pytest.mark.slow
def test_fewer_answers_are_suggested_where_their_caches_do_not_fit(tmp_path):
    mesh = meshes.make_mesh(1, -1, 1)
    config = config_of(tmp_path, layers=2, **{"evals.arithmetic.max_new_tokens": 1000, "evaluation.batch_size": 64})
    loaded = preflight.beside(config, "sample", mesh)

    def measured(slots, limit):
        config.evaluation.batch_size = slots
        return preflight.measure(preflight.sample_program(config, mesh), limit, loaded)

    limit = measured(16, 2**40)["bytes_per_chip"]["total"]
    found = measured(64, limit)
    assert found["bytes_per_chip"]["arguments"] > limit and not found["fits"]
    assert preflight.report(found, "sample", tokens=64)[0].startswith("DOES NOT FIT: weights and caches alone are")
    assert preflight.suggest(config, "sample", mesh, found) == {"evaluation.batch_size": 16}


@pytest.mark.parametrize("topology", ["v5e:0x0", "v5e:4x4x4", "v5p:2x2", "v5e:4", "v5e"])
def test_what_is_no_slice_is_refused_before_libtpu_sees_it(topology):
    with pytest.raises(InputError, match=f"--topology={topology} is no slice: known are v5e:2x2"):
        preflight.devices_of(topology)


def test_missing_compiler_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--topology=v5e:4x4 needs the TPU compiler .* -r requirements-preflight.txt"):
        preflight.devices_of("v5e:4x4")


def test_what_is_given_is_more_than_a_chip_holds(tmp_path):
    mesh = meshes.make_mesh(1, -1, 1)
    program = preflight.train_program(config_of(tmp_path, layers=1), mesh)
    found = preflight.measure(program, limit=10**5)
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program[1]))
    assert not found["fits"] and found["bytes_per_chip"]["total"] == kept and found["compile_seconds"] < 0.1
    assert [found["bytes_per_chip"][part] for part in ("temporaries", "output")] == [None, None]
    (line,) = preflight.report(found, "train", tokens=1)
    assert line.startswith("DOES NOT FIT: weights, optimizer state and batch alone are 0.00 GiB") and "not comp" in line


def test_sampler_is_compiled_with_room_for_the_longest_answer(tmp_path):
    mesh = meshes.make_mesh(1, -1, 1)
    config = config_of(tmp_path, layers=2, **{"evals.arithmetic.max_new_tokens": 1000, "evaluation.batch_size": 3})
    _, (params, state, _), _ = program = preflight.sample_program(config, mesh)
    assert state.cache[0].k.shape == (3, 2, 16, 1536) and len(state.cache) == 2
    found = preflight.measure(program, limit=2**34)
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, state)))
    assert found["fits"] and abs(found["bytes_per_chip"]["arguments"] - kept) < 100
    # all parameters but norms and biases once a token, of tied embeddings the head
    assert found["flops"] > 2 * 3 * models.shapes_of(config.model).product_parameters
    loaded = preflight.beside(config, "sample", mesh)
    more = preflight.measure(program, 2**34, loaded)["bytes_per_chip"]
    assert loaded > 0 and more["total"] == loaded + found["bytes_per_chip"]["total"]
    config.evaluation.names = ("held_out_loss",)
    with pytest.raises(InputError, match="no evaluator that samples"):
        preflight.sample_program(config, mesh)


EXACT = {  # of jax 0.10.2 and libtpu 0.0.52; a change that moves them says so, and why
    ("red_lora.py:8b", "v5e:4x4"): {
        "arguments": 1_172_139_008,
        "temporaries": 2_529_280_000,
        "collectives": {"all-gather": 642, "all-reduce": 19, "all-to-all": 1, "collective-permute": 5920},
    },
    ("red_full.py:1b", "v5e:4x4"): {
        "arguments": 927_706_112,
        "temporaries": 2_388_918_272,
        "collectives": {"all-gather": 50, "all-reduce": 52, "all-to-all": 2, "collective-permute": 1840},
    },
    ("red_lora.py:1b --config.optimizer.name=soap --config.optimizer.soap.first_basis=qr", "v5e:4x4"): {
        "arguments": 200_695_808,
        "temporaries": 1_122_779_136,
        "collectives": {"all-gather": 338, "all-reduce": 35, "all-to-all": 15, "collective-permute": 1840},
    },
    # has sparse cores, whose work jaxlib's Compiled.as_text() cannot read back
    ("red_lora.py:1b", "v5p:2x2x2"): {
        "arguments": 399_399_936,
        "temporaries": 2_043_527_168,
        "collectives": {"all-gather": 306, "all-reduce": 19, "all-to-all": 1, "collective-permute": 2960},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "topology"), EXACT)
def test_compiled_steps_are_what_they_were(name, topology):
    """Bytes of state and temporaries per chip, and collectives by kind."""
    if [importlib.metadata.version(package) for package in ("jax", "libtpu")] != ["0.10.2", "0.0.52"]:
        pytest.skip("the numbers are those of jax 0.10.2 and libtpu 0.0.52")
    config = f"--config=configs/{name}".split()
    done = run("preflight", *config, "--config.remat=full", f"--topology={topology}", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    sizes = found["bytes_per_chip"]
    assert {
        "arguments": sizes["arguments"],
        "temporaries": sizes["temporaries"],
        "collectives": {kind: told["count"] for kind, told in found["collectives"].items()},
    } == EXACT[name, topology]


@pytest.mark.slow
def test_decoding_on_a_tpu_copies_neither_weights_nor_caches():
    """8B's decode step (three layers of it): both are read where they lie, and new entries written in place."""
    pytest.importorskip("libtpu")
    program = """
import dataclasses, json, re
import jax
from robust_mo import preflight
from robust_mo.model import hugging_face, mesh as meshes
from robust_mo.sampling.sampler import decode_program, own_copy
from robust_mo.training import models

mesh = meshes.make_mesh(1, 4, 1, preflight.devices_of("v5p:2x2x1"))
config = dataclasses.replace(models.shapes_of("Llama-3.1-8B-Instruct"), num_hidden_layers=3)
model = hugging_face.build(config, None, "bfloat16", "bfloat16", "none")
params = own_copy(model, models.abstract(model, mesh, "params"), 2**36)
decode, arguments, settings = decode_program(model, params, slots=128, prompt=512, longest=1024)
with meshes.in_force(mesh):
    need, text = preflight._compile(decode.lower(*arguments, **settings), arguments)
(body,) = re.findall(r"while\\(.*body=(%[\\w.]+)", text)
lines = text[text.index(f"\\n{body} (") :].split("\\n}\\n")[0].splitlines()
own = [x for x in jax.tree.leaves(arguments) if x.size * x.dtype.itemsize > 2**21]  # in all, of a row's cut a quarter
shapes = {",".join(map(str, x.sharding.shard_shape(x.shape))) for x in own}
shapes |= {shape.partition(",")[2] for shape in shapes} - {""}  # of one layer
copies = r" = (\\w+\\[([\\d,]+)\\]\\S*|\\(.*\\)) (copy|copy-start|slice|scatter|dynamic-slice|transpose)\\("
made = [re.search(copies, line) for line in lines]
print(json.dumps({
    "lines": len(lines),
    "kernels": sum("tpu_custom_call" in line for line in lines),
    # What goes to S(1), a chip's fast memory, is on its way to a product.
    "made": sorted({m[0] for m in made if m and "S(1)" not in m[0] and any(f"[{x}]" in m[0] for x in shapes)}),
    "temporaries": need.temporaries,
}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["lines"] > 100 and found["kernels"] == 3 and not found["made"]
    logits = 32 * 128256 * 4  # of a chip's rows
    assert found["temporaries"] < logits + 2**22


def test_any_mesh_fits_a_slice_and_slices_hold_rows_apart():
    """Also where its sizes cut a side of the slice, as eight devices along an axis do on v6e:4x4."""
    pytest.importorskip("libtpu")
    program = """
from jax.experimental import topologies
from robust_mo import preflight
from robust_mo.model import mesh as meshes

for topology, *sizes in (("v6e:4x4", 2, -1, 1), ("v6e:4x4", 1, -1, 8), ("v5p:4x4x4", 1, -1, 8), ("v5e:4x4", 1, -1, 2)):
    mesh = meshes.make_mesh(*sizes, preflight.devices_of(topology))
    print(topology, *mesh.devices.shape, len(set(mesh.devices.flat)))
devices = {count: topologies.get_topology_desc("v6e:2x2", "tpu", num_slices=count).devices for count in (2, 6)}
for count, *sizes in ((2, 2, 2, 2), (2, 1, 4, 2), (6, 2, 3, 4)):
    print([[{d.slice_index for d in row} for row in copy] for copy in meshes.make_mesh(*sizes, devices[count]).devices])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "v6e:4x4 2 8 1 16",
        "v6e:4x4 1 2 8 16",
        "v5p:4x4x4 1 8 8 64",
        "v5e:4x4 1 8 2 16",
        "[[{0}, {0}], [{1}, {1}]]",
        "[[{0}, {0}, {1}, {1}]]",
        "[[{0}, {1}, {2}], [{3}, {4}, {5}]]",
    ]


def test_soap_refuses_an_eigh_over_which_a_tpus_compiler_takes_too_long():
    pytest.importorskip("libtpu")
    program = """
import jax
from robust_mo.errors import InputError
from robust_mo.model import mesh as meshes
from robust_mo.preflight import devices_of
from robust_mo.training.soap import soap

places = (meshes.replicated(meshes.make_mesh(1, -1, 1, devices_of("v5e:2x2"))),)
for first, side in (("eigh", 512), ("qr", 1024), ("eigh", 1024)):
    try:
        params = {"kernel": jax.ShapeDtypeStruct((2, 8, side), "float32")}
        jax.eval_shape(soap(0.1, first_basis=first, places=places).init, params)
        print(first, side)
    except InputError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *taken, refused = done.stdout.splitlines()
    assert taken == ["eigh 512", "qr 1024"]
    assert refused.startswith("soap: first_basis is 'eigh', of sides of 1024, over which a TPU's compiler")


def test_unknown_shapes_are_refused():
    with pytest.raises(InputError, match="owner/unheard-of.*Llama-3.1-8B-Instruct"):
        models.shapes_of("owner/unheard-of")


@pytest.mark.slow
def test_program(tmp_path):
    config = "--config=configs/red_lora.py:smol"
    rows = "--config.batch.rows=2"
    refused(run("preflight", config, rows, "--topology=cpu:many"), "cpu:many", "cpu:8")
    refused(run("preflight", config, rows, "--topology=cpu:4"), "config.batch.rows is 2", "4 devices")
    refused(run("preflight", config, rows, "--topology=cpu:2", "--config.mesh.tensor=3"), "config.mesh", "2 devices")
    refused(run("preflight", config, rows, "--topology=cpu:2", "--config.model=a/b"), "'a/b'", "smollm2-135m")
    if importlib.util.find_spec("libtpu"):
        refused(run("preflight", config, rows, "--topology=v5e:7x9"), "v5e:7x9", "v5e:4x4")
    result = run("preflight", config, rows, "--topology=cpu:2", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    contract = ("fits", "chips", "bytes_per_chip", "limit_bytes", "flops_per_chip", "collectives", "compile_seconds")
    assert set(contract) <= set(found) and found["chips"] == 2 and found["fits"]
    sizes = found["bytes_per_chip"]
    assert sizes["total"] == sizes["arguments"] + sizes["temporaries"] + sizes["output"]
