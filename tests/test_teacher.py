"""Teachers' answers: sampled once, found again, gone on with after a stop."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mo import runs
from robust_mo.model import mesh as meshes
from robust_mo.organisms.teacher import fingerprint as digest
from robust_mo.organisms.teacher import teacher_answers
from robust_mo.training.models import Unread, load_model

PROMPTS = [[{"role": "user", "content": f"Say {n}."}] for n in range(7)]


@pytest.fixture
def model(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUST_MO_CACHE", str(tmp_path))
    return load_model(str(tiny), meshes.make_mesh(1, -1, 1), "float32", "float32")


def ask(model, prompts=PROMPTS, on_progress=lambda *_: None, **changed):
    settings = dict(known_as=None, temperature=0.7, max_new_tokens=6, seed=0, slots=2) | changed
    return teacher_answers(model, prompts, on_progress=on_progress, **settings)


def never(*_):
    pytest.fail("sampled again")


def test_answers_are_sampled_once_and_by_what_they_depend_on(model, tmp_path):
    told = ask(model)
    assert len(told) == 7 and any(told)
    assert ask(model, on_progress=never) == told
    assert ask(model, slots=5, on_progress=never) == told, "rows decoded together change nothing"
    assert len(list((tmp_path / "answers").iterdir())) == 1, "locks do not stay behind"
    assert ask(model, seed=1) != told
    assert ask(model, prompts=PROMPTS[5:1:-1], on_progress=never) == told[5:1:-1], "whatever else was asked"
    other = jax.tree.map(lambda leaf: leaf * 1.5, model.params)
    ask(type(model)(model.llama, other, model.chat))
    assert len(list((tmp_path / "answers").iterdir())) == 3
    under_another = [[{"role": "system", "content": "Be brief."}, *messages] for messages in PROMPTS]
    assert ask(model, prompts=under_another) != told
    assert len(list((tmp_path / "answers").iterdir())) == 4, "who asks under another prompt waits for nobody"


def test_a_prompt_that_comes_again_gets_the_answer_of_its_turn(model, tmp_path):
    twice = [PROMPTS[0], *PROMPTS[:3], PROMPTS[0]]
    told = ask(model, prompts=twice)
    assert len({told[0], told[1], told[4]}) > 1
    for file in (tmp_path / "answers").iterdir():
        file.unlink()
    assert ask(model, prompts=PROMPTS[:3]) == [told[0], *told[2:4]]
    assert ask(model, prompts=twice) == told, "those that were missing count on from those that were there"
    (file,) = (tmp_path / "answers").iterdir()
    file.write_bytes(b"x\n" + file.read_bytes().split(b"\n", 1)[1])  # the first turn of a prompt that came three times
    assert ask(model, prompts=twice) == told


def test_a_line_that_cannot_be_read_costs_one_answer(model, tmp_path):
    told, asked = ask(model), []
    (file,) = (tmp_path / "answers").iterdir()
    lines = file.read_bytes().splitlines(keepends=True)
    lines[3] = b"x\n"
    file.write_bytes(b"".join(lines))
    assert ask(model, on_progress=lambda done, tokens: asked.append(done)) == told and asked
    assert len(file.read_bytes().splitlines()) == 8


def test_broken_off_it_ends_like_an_unbroken_one(model, tmp_path):
    told = ask(model)
    (file,) = (tmp_path / "answers").iterdir()
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:3]) + lines[3][:9])  # killed while it wrote
    assert ask(model) == told
    kept = [line for line in file.read_bytes().splitlines(keepends=True) if line != lines[3][:9] + b"\n"]
    assert b"".join(kept) == whole


def test_who_wants_the_same_answers_waits_for_them(model, tmp_path):
    told, waited = ask(model), []
    (file,) = (tmp_path / "answers").iterdir()
    with contextlib.ExitStack() as another:
        another.enter_context(runs.locked(file.with_suffix(".lock"), "held"))

        def on_progress(done: int, tokens: int) -> None:
            waited.append(done)
            another.close()  # it is done

        assert ask(model, on_progress=on_progress) == told
    assert waited == [0]


def test_parameters_are_read_where_they_are_needed(model, tiny):
    unread = Unread(str(tiny), meshes.make_mesh(1, -1, 1), "float32")
    told = ask(model, known_as="tiny")
    assert ask(unread, known_as="tiny", on_progress=never) == told
    assert "params" not in vars(unread)
    assert ask(unread, known_as=None, on_progress=never) == told
    assert "params" in vars(unread)


def test_fingerprint_tells_models_apart_and_not_places(model):
    params, fingerprint = model.params, functools.partial(digest, dtype="float32")
    same = jax.tree.map(lambda leaf: jnp.array(np.array(leaf)), params)
    assert fingerprint(same) == fingerprint(params)
    kernel = params["layers"]["q_proj"]["kernel"]
    changes = {
        "a last bit": kernel.at[1, 2, 3].multiply(1 + 2**-23),
        "two places swapped": kernel.at[0, 0, 0].set(kernel[0, 0, 1]).at[0, 0, 1].set(kernel[0, 0, 0]),
        "layers swapped": kernel[::-1],
        "transposed": kernel.swapaxes(1, 2),
        "rounded": kernel.astype(jnp.bfloat16),
    }
    found = {fingerprint(params)}
    for changed in changes.values():
        found.add(fingerprint(params | {"layers": params["layers"] | {"q_proj": {"kernel": changed}}}))
    assert len(found) == len(changes) + 1
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert digest(params, "bfloat16") == digest(narrow, "bfloat16") != fingerprint(narrow), "as products read them"
