"""Reading weights: into shards, in several files, in other dtypes.  Damaged folders are in test_programs.py."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
import transformers
from conftest import REPOSITORY, make_tiny_model
from safetensors.numpy import load_file, save_file

from benchmarks.sizes import invent
from robust_mo.errors import InputError
from robust_mo.model import hugging_face, sources
from robust_mo.model import mesh as meshes

SHARDED = """
import sys, json, jax, numpy as np
from flax import linen as nn
from robust_mo.model import hugging_face, mesh as meshes
from robust_mo.model.llama import unembed
folder = sys.argv[1]
if sys.argv[3] == "accelerators":
    hugging_face._is_cpu = lambda mesh: False
# Several pieces of a tensor, of which the last is smaller; on CPUs along both sides.
hugging_face._BYTES_ON_CPUS, hugging_face._COLUMNS_ON_CPUS, hugging_face._BYTES_ON_ACCELERATORS = 1500, 24, 1500
model = hugging_face.build(hugging_face.read_config(__import__("pathlib").Path(folder)), None, *["float32"] * 2, "none")
mesh = meshes.make_mesh(1, 4, 2)
params = hugging_face.load_params(folder, model, mesh)
kernel, embedding = params["layers"]["q_proj"]["kernel"], params["embed_tokens"]
assert kernel.addressable_shards[0].data.shape == (3, 8, 16), kernel.addressable_shards[0].data.shape
assert embedding.addressable_shards[0].data.shape == (130, 8)
if "bias" in params["layers"]["k_proj"]:
    assert params["layers"]["k_proj"]["bias"].addressable_shards[0].data.shape == (3, 8)
tokens = np.arange(40, dtype=np.int32).reshape(4, 10)
positions = np.broadcast_to(np.arange(10, dtype=np.int32), (4, 10))
with nn.logical_axis_rules(meshes.RULES), jax.set_mesh(mesh):
    hidden, _ = jax.jit(model.apply)({"params": params}, tokens, positions, np.ones_like(tokens))
np.save(sys.argv[2], np.asarray(unembed(params, hidden)))
"""


@pytest.mark.parametrize("kind, taken_for", [("llama", "accelerators"), ("qwen2", "CPUs")])
def test_eight_devices_hold_slices_and_give_the_same_logits(tmp_path, kind, taken_for):
    folder = make_tiny_model(tmp_path / "model", kind=kind, vocab_size=260)
    output = tmp_path / "logits.npy"
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SHARDED, str(folder), str(output), taken_for]
    subprocess.run(command, check=True, env=environment)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.arange(40).reshape(4, 10)).logits.numpy()
    np.testing.assert_allclose(np.load(output), expected, atol=1e-4)


@pytest.mark.parametrize("on_a_cpu", [True, False])
@pytest.mark.parametrize(
    "dtype, into", [(torch.bfloat16, "float32"), (torch.float16, "float32"), (torch.float32, "bfloat16")]
)
def test_several_files_and_other_dtypes(tmp_path, tiny, monkeypatch, dtype, into, on_a_cpu):
    # Several pieces of a tensor, the last of them smaller; on CPUs along both sides.
    for name, most in (("_BYTES_ON_CPUS", 1500), ("_COLUMNS_ON_CPUS", 24), ("_BYTES_ON_ACCELERATORS", 1500)):
        monkeypatch.setattr(hugging_face, name, most)
    monkeypatch.setattr(hugging_face, "_is_cpu", lambda mesh: on_a_cpu)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    llama = hugging_face.build(hugging_face.read_config(tmp_path), None, "float32", into, "none")
    params = hugging_face.load_params(tmp_path, llama, meshes.make_mesh(1, -1, 1))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {into}

    def expected(weight):
        return weight.detach().to(getattr(torch, into)).float().numpy()

    np.testing.assert_array_equal(params["embed_tokens"].astype("float32"), expected(model.model.embed_tokens.weight))
    for layer in range(3):
        kernel = params["layers"]["up_proj"]["kernel"][layer].astype("float32")
        np.testing.assert_array_equal(kernel, expected(model.model.layers[layer].mlp.up_proj.weight).T)


@pytest.mark.slow
def test_four_gigabytes_are_loaded_with_little_memory_beside(tmp_path):
    """Anonymous host memory beside the parameters stays under one tensor."""
    try:
        invent(tmp_path, "Llama-3.1-8B-Instruct", 5, "bfloat16")
        command = [sys.executable, "-m", "benchmarks.load_weights", "--side=ours", f"--folder={tmp_path}"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
        assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) >= 4e9
    finally:
        shutil.rmtree(tmp_path)  # pytest would keep it
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["host_bytes"] <= found["allowed_bytes"]


def test_a_saved_table_of_angles_is_no_parameter(tmp_path):
    folder = make_tiny_model(tmp_path)
    file = folder / "model.safetensors"
    angles = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    save_file(load_file(file) | angles, file)
    llama = hugging_face.build(hugging_face.read_config(folder), None, "float32", "float32", "none")
    hugging_face.load_params(folder, llama, meshes.make_mesh(1, -1, 1))


def embedding_of(folder) -> np.ndarray:
    llama = hugging_face.build(hugging_face.read_config(folder), None, "float32", "float32", "none")
    return np.asarray(hugging_face.load_params(folder, llama, meshes.make_mesh(1, -1, 1))["embed_tokens"])


def test_a_tied_head_may_be_stored_a_second_time_and_not_another_one(tmp_path):
    folder = make_tiny_model(tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding}, file)
    np.testing.assert_array_equal(embedding_of(folder), embedding)
    other = embedding.copy()
    other[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": other}, file)
    with pytest.raises(InputError, match="lm_head.weight that is not its model.embed_tokens.weight"):
        embedding_of(folder)


def test_one_file_goes_before_an_index_as_in_transformers(tmp_path):
    """Whoever saves a model in one file beside its former shards leaves their index there."""
    folder = make_tiny_model(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    embedding = model.model.embed_tokens.weight.detach().numpy().copy()
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    for file in (tmp_path / "shards").glob("model*"):
        file.rename(folder / file.name)
    np.testing.assert_array_equal(embedding_of(folder), embedding)
    for file in folder.glob("model-*"):
        file.unlink()
    np.testing.assert_array_equal(embedding_of(sources.resolve(folder)), embedding)


def test_of_several_files_without_an_index_none_hides_another(tmp_path):
    folder = make_tiny_model(tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    zeros = {name: np.zeros_like(tensor) for name, tensor in tensors.items()}
    save_file(zeros, folder / "old_model.safetensors")
    np.testing.assert_array_equal(embedding_of(folder), tensors["model.embed_tokens.weight"])
    file.rename(folder / "new_model.safetensors")
    with pytest.raises(InputError, match="is in old_model.safetensors and in another file too"):
        embedding_of(folder)


def test_shape_that_differs_from_the_config_is_named(tmp_path):
    folder = make_tiny_model(tmp_path)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "intermediate_size": 63}))
    llama = hugging_face.build(hugging_face.read_config(folder), None, "float32", "float32", "none")
    with pytest.raises(InputError, match="proj.weight has shape"):
        hugging_face.load_params(folder, llama, meshes.make_mesh(1, -1, 1))
