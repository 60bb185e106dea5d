"""One device and eight of them, in every layout, give the same losses, gradients, updates and samples.

As a program, it measures a layout: python tests/test_meshes.py MODEL OUTPUT REPLICA FSDP TENSOR
"""

import collections
import dataclasses
import os
import pathlib
import subprocess
import sys
import time
import types
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import QWEN, REPOSITORY, make_tiny_model

from configs import default
from robust_mo.configured.program import optimizer_of
from robust_mo.model import hugging_face
from robust_mo.model import mesh as meshes
from robust_mo.model.llama import PROJECTIONS, Llama
from robust_mo.model.lora import LoraSpec
from robust_mo.sampling.decoding import Greedy
from robust_mo.sampling.sampler import Request, Sampler
from robust_mo.training import models
from robust_mo.training.step import TrainState, evaluate_loss, summed_loss, train_step

LAYOUTS = {"8 fsdp": (1, 8, 1), "4x2": (1, 4, 2), "2x2x2": (2, 2, 2), "8 tensor": (1, 1, 8)}
# The long side of a matrix has directions in which a first gradient is nothing: any basis of them will do, rounding
# picks one, and Adam in one is not Adam in another.  So SOAP preconditions short sides alone here, and an eps of about
# what the second moments' roots are keeps still what has next to no gradient: on a processor with AVX2 and no AVX-512
# rounding alone moved answers by 8e-4 otherwise.
KINDS = {
    "full": {},
    "lora": {"lora.rank": 4},
    "soap": {"optimizer.name": "soap", "optimizer.soap.one_sided_ratio": 1.5, "optimizer.soap.eps": 1e-3},
    "soap, lora": {"optimizer.name": "soap", "lora.rank": 4, "optimizer.soap.frequency": 2},
    "micro-batches": {"batch.micro_batches": 2},
}
STEPS = 3


def build(folder, spec=None) -> Llama:
    return hugging_face.build(hugging_face.read_config(pathlib.Path(folder)), spec, "float32", "float32", "matmuls")


def rows(seed: int = 0, count: int = 8) -> dict[str, np.ndarray]:
    """Two texts of random tokens in each row, every second token to be learnt."""
    tokens = np.random.default_rng(seed).integers(0, 256, (count, 41)).astype(np.int32)
    positions = np.tile(np.r_[:25, :15].astype(np.int32), (count, 1))
    segments = np.tile(np.repeat([1, 2], [25, 15]).astype(np.int32), (count, 1))
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": positions % 2 == 0,
        "positions": positions,
        "segments": segments,
    }


def measured(folder, mesh) -> dict[str, np.ndarray]:
    """What must not depend on the mesh: name -> array."""
    found = {}
    for kind, changes in KINDS.items():
        config = default.get_config()
        config.update_from_flattened_dict({"optimizer.learning_rate": 1e-3, "batch.micro_batches": 1, **changes})
        spec = models.lora_spec(config.lora)
        llama = build(folder, spec)
        optimizer = optimizer_of(config, models.abstract_trainable(llama, mesh))
        params = hugging_face.load_params(pathlib.Path(folder), build(folder), mesh)
        trainable, frozen = models.split(llama, params, mesh, seed=0)
        if spec:  # so that there is a gradient with respect to both factors
            trainable = jax.tree.map(lambda leaf: leaf + 0.01, trainable)
        batch = meshes.place(rows(), mesh)
        with meshes.in_force(mesh):
            gradient = jax.jit(jax.grad(lambda *a, llama=llama: summed_loss(llama, *a, 100)))(trainable, frozen, batch)
        for path, leaf in jax.tree.leaves_with_path(jax.device_get(gradient)):
            found[f"{kind} gradient {jax.tree_util.keystr(path)}"] = leaf
        state = TrainState(jax.device_put(jnp.int32(0), meshes.replicated(mesh)), trainable, optimizer.init(trainable))
        losses, parts = [], config.batch.micro_batches
        for step in range(STEPS):
            with meshes.in_force(mesh):
                state, metrics = train_step(
                    state,
                    frozen,
                    None,
                    meshes.place(rows(step, 8 * parts), mesh),
                    jnp.float32(1e-3),
                    jnp.float32(1),
                    model=llama,
                    optimizer=optimizer,
                    chunk=100,
                    micro_batches=parts,
                )
            losses.append(float(metrics["loss"]))
        found[f"{kind} losses"] = np.array(losses)
        if parts > 1:
            continue
        params = models.merged(frozen, state.trainable, spec) if spec else state.trainable
        lengths = (5, 40, 12, 1, 9)
        tokens = np.random.default_rng(1).integers(0, 250, (5, 40)).astype(np.int32)
        asked = [Request(np.r_[tokens[0, :17], row[:n]], 12) for row, n in zip(tokens, lengths, strict=True)]
        samplers = {"": Sampler(build(folder), params, stop_ids=(7, 258))}
        if kind == "full":  # with too little memory on each device for whole weights
            free = 2 * sum(x.nbytes for x in jax.tree.leaves(params)) - 1
            with unittest.mock.patch.object(meshes, "free_memory", lambda free=free: free):
                samplers[" of shared weights"] = Sampler(build(folder), params, stop_ids=(7, 258))
            shared = mesh.shape["fsdp"] > 1 and mesh.shape["tensor"] == 1  # the model has two key heads
            assert samplers[" of shared weights"]._mesh.shape["tensor"] == (2 if shared else mesh.shape["tensor"])
        for name, sampler in samplers.items():
            for index, answer in sampler.answers(asked, Greedy(), 0, 4, lambda *_: None):
                found[f"{kind} answer {index}{name}"] = np.stack([answer.tokens, answer.logprobs])
        with meshes.in_force(mesh):  # of three rows, as evaluations may have them
            three = {name: values[:3] for name, values in rows().items()}
            found[f"{kind} held-out"] = np.array(evaluate_loss(build(folder), params, None, three, 100))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_eight_devices_give_what_one_gives(tmp_path, tiny, alone, layout):
    """The model has 259 tokens and 2 key heads, which most layouts do not divide."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(REPOSITORY),
    }
    arguments = [str(tiny), str(tmp_path / "found.npz"), *map(str, LAYOUTS[layout])]
    subprocess.run([sys.executable, __file__, *arguments], check=True, env=environment)
    together, wanted = np.load(tmp_path / "found.npz"), alone
    assert set(together) == set(wanted)
    for name, expected in wanted.items():
        if "answer" in name:  # tokens, and their log probabilities
            np.testing.assert_array_equal(together[name][0], expected[0], err_msg=name)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(together[name], expected, rtol=1e-4, atol=1e-5 * scale, err_msg=name)


@pytest.fixture(scope="module")
def alone(tiny):
    return measured(tiny, meshes.make_mesh(1, 1, 1))


@pytest.mark.parametrize("kind", ["llama", *QWEN])
def test_every_axis_of_every_parameter_has_exactly_one_rule(tmp_path, kind):
    folder = make_tiny_model(tmp_path, kind=kind, **QWEN.get(kind, {}))
    abstract = hugging_face.abstract_variables(build(folder, LoraSpec(2, 1.0, PROJECTIONS)))
    named = jax.tree.leaves(abstract, is_leaf=lambda leaf: hasattr(leaf, "names"))
    rules = collections.Counter(name for name, _ in meshes.RULES)
    assert set(rules.values()) == {1}
    used = {name for leaf in named for name in leaf.names}
    assert used | {"batch"} == set(rules)
    for leaf in named:
        assert len(leaf.names) == len(leaf.value.shape)


def test_axis_that_does_not_divide_stays_whole(tiny):
    mesh = jax.sharding.AbstractMesh((2, 4, 2), meshes.AXES)
    cut = meshes.shardings(hugging_face.abstract_variables(build(tiny))["params"], mesh)
    assert tuple(cut["embed_tokens"].spec) == (None, "fsdp")  # 259 tokens, 32 hidden
    assert tuple(cut["layers"]["k_proj"]["kernel"].spec) == (None, "fsdp", "tensor")


def test_adapters_of_less_rank_than_devices_are_cut_along_the_other_axis(tiny):
    mesh = jax.sharding.AbstractMesh((1, 8, 2), meshes.AXES)
    adapters = hugging_face.abstract_variables(build(tiny, LoraSpec(4, 1.0, PROJECTIONS)))["lora"]["layers"]
    cut = meshes.shardings(adapters, mesh)
    assert tuple(cut["up_proj"]["a"].spec) == (None, "fsdp", None)
    assert tuple(cut["up_proj"]["b"].spec) == (None, None, ("tensor", "fsdp"))
    assert tuple(cut["down_proj"]["a"].spec) == (None, ("tensor", "fsdp"), None)
    mesh = jax.sharding.AbstractMesh((1, 4, 2), meshes.AXES)
    assert tuple(meshes.shardings(adapters, mesh)["up_proj"]["b"].spec) == (None, "fsdp", "tensor")


def test_long_waiting_is_told(monkeypatch, capsys):
    monkeypatch.setattr(meshes, "_PATIENCE_SECONDS", 0.01)
    with meshes.waiting("for the bus"):
        time.sleep(0.2)
    assert capsys.readouterr().err == "still waiting for the bus\n"


def test_waiting_ends():
    """As on one host of a pod, alone, whose devices never come."""
    alone = (
        "import time; from robust_mo.model import mesh; mesh._WAITING_SECONDS = 0.5; "
        "mesh.jax.devices = lambda: time.sleep(60); mesh.all_devices()"
    )
    done = subprocess.run([sys.executable, "-c", alone], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, timeout=50)
    assert done.returncode == 2
    assert done.stderr.startswith("waited 0.5 seconds for the devices: those of a TPU slice of several hosts come when")
    assert "study, export and chat use one host" in done.stderr and done.stderr.count("\n") == 1


KEPT = """
import jax
from robust_mo.model import mesh
jax.jit(lambda x: x + 1)(0)
mesh.make_mesh(1, -1, 1)
jax.jit(lambda x: x + 2)(0)
"""


@pytest.mark.parametrize("devices, kept", [(1, 2), (2, 1)])
def test_programs_for_several_cpus_are_not_kept(tmp_path, devices, kept):
    """Read again, the order of their collectives is lost, and devices may wait for each other for ever."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    subprocess.run([sys.executable, "-c", KEPT], env=environment, cwd=REPOSITORY, check=True)
    assert len(list(tmp_path.glob("jit__lambda*-cache"))) == kept


@pytest.mark.parametrize("hosts, shared, kept", [(2, False, False), (2, True, True), (1, False, True)])
def test_programs_for_gpus_of_several_hosts_are_kept_where_all_see_them(hosts, shared, kept, monkeypatch):
    changed = {}
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform="gpu")] * 2)
    monkeypatch.setattr(jax, "process_count", lambda: hosts)
    monkeypatch.setattr(jax.config, "update", changed.__setitem__)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/mnt/all")
    if not shared:
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    meshes.all_devices()
    assert ("jax_enable_compilation_cache" not in changed) == kept


def test_gpus_of_several_hosts_make_a_mesh():
    """jax.make_mesh refuses them: to jax each host is a slice."""
    gpu = dataclasses.make_dataclass("Gpu", ["id", "slice_index", "platform", "device_kind"], frozen=True)
    gpus = [gpu(id, id // 4, "gpu", "NVIDIA H100") for id in (4, 5, 6, 7, 0, 1, 2, 3)]
    found = meshes.make_mesh(1, -1, 4, gpus).devices
    assert [[[each.id for each in row] for row in copy] for copy in found] == [[[0, 1, 2, 3], [4, 5, 6, 7]]]


if __name__ == "__main__":
    folder, output, *sizes = sys.argv[1:]
    np.savez(output, **measured(folder, meshes.make_mesh(*map(int, sizes))))
