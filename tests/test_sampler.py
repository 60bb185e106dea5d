"""The sampler against transformers' `generate`, and against itself in other company."""

import collections
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import QWEN, REPOSITORY, make_tiny_model

from robust_mo.data.conversations import ChatFormat
from robust_mo.data.prompts import builtin_questions
from robust_mo.errors import InputError
from robust_mo.model import hugging_face
from robust_mo.model import mesh as meshes
from robust_mo.model.llama import unstack_layers
from robust_mo.sampling import sampler as sampling
from robust_mo.sampling.decoding import Greedy, Nucleus, make_decoding
from robust_mo.sampling.sampler import Request, Sampler, decode_program
from robust_mo.sampling.text import answers
from robust_mo.training import models


def load(folder):
    model = hugging_face.build(hugging_face.read_config(folder), None, "float32", "float32", "none")
    return model, hugging_face.load_params(folder, model, meshes.make_mesh(1, -1, 1))


def requests(limit=24, count=9):
    generator = np.random.default_rng(0)
    lengths = itertools.islice(itertools.cycle((5, 70, 12, 1, 33, 64, 65, 20, 9)), count)
    return [Request(generator.integers(0, 250, n).astype(np.int32), limit) for n in lengths]


def sample(sampler, asked, decoding, slots, seed=0, **more):
    return dict(sampler.answers(asked, decoding, seed, slots, lambda *_: None, **more))


@pytest.fixture(scope="module")
def sampler(tiny):
    model, params = load(tiny)
    return Sampler(model, params, stop_ids=(7, 258))


@pytest.mark.parametrize(
    "kind, stop_ids",
    [
        ("llama", (7, 258)),
        pytest.param("qwen2", (30, 157), marks=pytest.mark.slow),
        pytest.param("qwen3", (30, 157), marks=pytest.mark.slow),
    ],
)
def test_greedy_equals_generate(tmp_path, tiny, sampler, kind, stop_ids):
    if kind != "llama":
        tiny = make_tiny_model(tmp_path, kind=kind, tie_word_embeddings=False, **QWEN[kind])
        sampler = Sampler(*load(tiny), stop_ids=stop_ids)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    ours = sample(sampler, requests(), Greedy(), slots=4)
    stopped = 0
    for index, request in enumerate(requests()):
        expected = theirs.generate(
            torch.tensor(request.tokens[None], dtype=torch.long),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=list(stop_ids),
            pad_token_id=256,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = expected.sequences[0, len(request.tokens) :].numpy()
        np.testing.assert_array_equal(ours[index].tokens, tokens)
        logprobs = [
            torch.log_softmax(logits[0], -1)[t].item() for logits, t in zip(expected.logits, tokens, strict=True)
        ]
        np.testing.assert_allclose(ours[index].logprobs, logprobs, atol=1e-4)
        assert ours[index].finish_reason == ("stop" if tokens[-1] in stop_ids else "length")
        stopped += ours[index].finish_reason == "stop"
    assert 0 < stopped < len(ours), "the test needs both kinds of ending"


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_layers_lie_together_or_apart_as_the_device_likes(sampler, tiny, backend, monkeypatch):
    """What is arranged otherwise on other devices gives the same; their kernels have tests of their own."""
    asked = [dataclasses.replace(r, tokens=np.r_[np.arange(40, dtype=np.int32), r.tokens]) for r in requests(limit=6)]
    here = sample(sampler, asked, Greedy(), slots=8)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    there = sample(Sampler(*load(tiny), stop_ids=(7, 258)), asked, Greedy(), slots=8)
    for index, answer in here.items():
        np.testing.assert_array_equal(answer.tokens, there[index].tokens)


@pytest.mark.slow
@pytest.mark.parametrize("decoding", [Greedy(), Nucleus(0.9, 1.0), Nucleus(1.2, 0.8)], ids=str)
def test_answer_depends_on_neither_slot_nor_neighbours(sampler, decoding):
    asked = requests(count=31)
    together = sample(sampler, asked, decoding, slots=24)  # admitted in threes, the last group not full
    alone = sample(sampler, asked, decoding, slots=1)
    backwards = sample(sampler, asked[8::-1], decoding, slots=3)
    rest = sample(sampler, asked, decoding, slots=1, first=28)
    assert set(together) == set(range(31)) and set(rest) == set(range(28, 31))
    for index in together:
        others = [alone[index]]
        others += [backwards[8 - index]] if index < 9 else []
        others += [rest[index]] if index in rest else []
        for other in others:
            np.testing.assert_array_equal(together[index].tokens, other.tokens)
            np.testing.assert_allclose(together[index].logprobs, other.logprobs, atol=1e-4)


def test_seed_and_repetition_decide_the_draw(sampler):
    request = requests()[2]
    same = [request] * 3
    first, again = (sample(sampler, same, Nucleus(1.0, 1.0), slots=2) for _ in range(2))
    other = sample(sampler, same, Nucleus(1.0, 1.0), slots=2, seed=1)
    texts = [tuple(first[i].tokens) for i in range(3)]
    assert texts == [tuple(again[i].tokens) for i in range(3)]
    assert len({*texts, *(tuple(other[i].tokens) for i in range(3))}) == 6


def test_draws_follow_the_model_distribution(tiny, sampler):
    """The first token of 4,000 draws against the probabilities of transformers; the second is another draw, and not
    the same once more from probabilities that are nearly the same."""
    prompt = requests()[4].tokens
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = theirs(torch.tensor(prompt[None], dtype=torch.long)).logits[0, -1]
    temperature, top_p = 0.7, 0.9
    probabilities = torch.softmax(logits / temperature, -1).numpy().astype(float)
    order = np.argsort(-probabilities)
    kept = order[: int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1]
    nucleus = np.zeros_like(probabilities)
    nucleus[kept] = probabilities[kept] / probabilities[kept].sum()

    drawn = sample(sampler, [Request(prompt, 2)] * 4000, Nucleus(temperature, top_p), slots=64)
    counts = np.bincount([answer.tokens[0] for answer in drawn.values()], minlength=len(nucleus))
    assert counts[nucleus == 0].sum() == 0
    distance = 0.5 * np.abs(counts / 4000 - nucleus).sum()
    assert distance < 0.5 * np.sqrt(len(kept) / 4000) + 0.02
    pairs = [answer.tokens for answer in drawn.values() if len(answer.tokens) == 2]
    assert len(pairs) > 3000 and np.mean([first == second for first, second in pairs]) < 0.1


@pytest.mark.slow
def test_slots_hardly_stand_still(sampler, tiny):
    """Answers of forced lengths, a few of them long, and prompts of mixed length: at most a tenth of what the slots
    could sample is lost, to waiting for company and to the end, where ever fewer answers run."""
    endless = Sampler(*load(tiny), stop_ids=())
    lengths = np.clip(np.random.default_rng(1).lognormal(np.log(60) - 0.32, 0.8, 100), 1, 300).astype(int)
    asked = [Request(one.tokens, int(n)) for one, n in zip(requests(count=100), lengths, strict=True)]
    found = sample(endless, asked, Greedy(), slots=16)
    assert [len(found[index].tokens) for index in range(100)] == list(lengths)
    assert endless.idle <= 0.1 * (endless.idle + (lengths - 1).sum())  # first tokens are no step of decoding
    alone = sample(endless, asked[-3:], Greedy(), slots=1)
    for index in range(3):
        np.testing.assert_array_equal(found[97 + index].tokens, alone[index].tokens)


def test_off_a_cpu_prompts_and_answers_of_any_length_share_their_programs(tiny, compiled, monkeypatch):
    """Where a program takes long to compile; on a CPU shapes fit closely instead."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    sampler = Sampler(*load(tiny), stop_ids=(7, 258))
    for limit, count in ((24, 31), (30, 40), (9, 16)):  # more prompts than slots, and the last ones to end alone
        assert len(sample(sampler, requests(limit, count), Greedy(), slots=16)) == count
    assert [compiled.count(f"jit({name})") for name in ("_admit", "_decode", "_only")] == [1, 1, 0]


@pytest.mark.slow
def test_where_memory_is_short_long_answers_are_made_up_for_at_the_end(tiny, monkeypatch):
    """Two rows of the longest fit, and six of what most answers need: to the same answers, in fewer steps."""
    asked = [dataclasses.replace(r, max_new_tokens=700 if i % 5 == 0 else 30) for i, r in enumerate(requests(count=12))]
    sampler = Sampler(*load(tiny), stop_ids=())
    plain = sample(sampler, asked, Nucleus(0.9, 0.9), slots=4)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(sampling, "_ROOM_OF_MOST", 128)  # which the prompts make 256
    monkeypatch.setattr(sampling, "_AT_ONCE", 8)

    def rows(memory: int) -> int:
        return sampling._rows_that_fit(memory, sampler._model, sampler._mesh, 896, 128, 0)

    memory = next(memory for memory in range(0, 10**8, 1000) if rows(memory) == 2)
    monkeypatch.setattr(meshes, "free_memory", lambda: memory)
    passes, told, answered = [], [], Sampler._answered

    def listened(self, requests, chosen, limits, *rest):
        longest = max(len(requests[index].tokens) + limits[index] for index in chosen)
        passes.append((list(chosen), longest, self._slots(0, longest, 128, 0, 99)))
        return answered(self, requests, chosen, limits, *rest)

    monkeypatch.setattr(Sampler, "_answered", listened)
    found = dict(sampler.answers(asked, Nucleus(0.9, 0.9), 0, 0, lambda *now: told.append(now)))
    for index, answer in plain.items():
        np.testing.assert_array_equal(found[index].tokens, answer.tokens)
    assert passes == [
        ([0, 1, 2, 3, 4, 5, 6, 7], 256, 6),
        ([0, 5], 764, 2),
        ([8, 9, 10, 11], 256, 6),
        ([10], 770, 2),
    ]
    finished, sampled = zip(*told, strict=True)
    cut_off = sum(256 - len(asked[index].tokens) for index in (0, 5, 10))
    assert list(finished) == sorted(finished) and finished[-1] == len(found) == 12
    assert sampled[-1] == cut_off + sum(len(answer.tokens) for answer in found.values())


def test_on_a_cpu_a_cache_grows_with_its_answers_and_not_with_what_they_may_become(tiny, sampler, monkeypatch):
    rooms, extended = [], Sampler._with_room

    def with_room(self, state, entries):
        state = extended(self, state, entries)
        rooms.append(state.cache[0].capacity)
        return state

    monkeypatch.setattr(Sampler, "_with_room", with_room)
    stopping = [dataclasses.replace(request, max_new_tokens=900) for request in requests()]
    assert len(sample(sampler, stopping, Nucleus(1.0, 1.0), slots=4)) == len(stopping)
    assert max(rooms) == 512
    monkeypatch.setattr(sampling, "_ROOM_AT_FIRST", 64)
    asked, endless = requests(limit=300, count=6), Sampler(*load(tiny), stop_ids=())
    rooms.clear()
    growing = sample(endless, asked, Greedy(), slots=4)
    assert len(set(rooms)) > 2
    rooms.clear()
    short = [dataclasses.replace(asked[2], max_new_tokens=20)] * 80
    after = sample(endless, [*short[:3], asked[0], *short], Greedy(), slots=4)
    assert max(rooms) > 300 and rooms[-1] < max(rooms) / 2  # what the long answer needed is not read on and on
    np.testing.assert_array_equal(after[3].tokens, growing[0].tokens)
    for index in (0, 2, 10, 42):
        np.testing.assert_array_equal(after[index].tokens, growing[2].tokens[:20])
    monkeypatch.setattr(sampling, "_ROOM_AT_FIRST", 1024)
    for index, answer in sample(endless, asked, Greedy(), slots=4).items():
        np.testing.assert_array_equal(answer.tokens, growing[index].tokens)


@pytest.mark.parametrize("backend, step", [("cpu", 8), ("tpu", 128)])
def test_room_is_in_blocks_of_the_kernel(backend, step, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    for entries in range(1, 3000):
        room = sampling._room(entries)
        assert room % step == 0 and room >= entries


def test_what_runs_alone_at_the_end_is_compiled_for_no_other_number_of_slots(sampler, compiled):
    """The last of 17 prompts is admitted when 15 of 16 slots are done for good."""
    asked = [dataclasses.replace(requests()[2], max_new_tokens=11)] * 17
    assert len(sample(sampler, asked, Greedy(), slots=16)) == 17
    assert 1 <= compiled.count("jit(_decode)") <= 2 and compiled.count("jit(_only)") <= 2


def test_evaluation_compiles_a_few_programs_once(sampler, compiled):
    """However many prompts there are; and another evaluation of the same shapes compiles nothing."""
    programs = []
    for _ in range(2):
        for count in (40, 80):
            compiled.clear()
            sample(sampler, requests(limit=13, count=count), Nucleus(0.77, 1.0), slots=8)
            programs.append(sorted(compiled))
    # Prompts have five widths, caches two sizes, and half and a quarter of the slots a program each; the rest is keys,
    # which depend on the number of prompts, and jax's own, of which other tests may have compiled some.
    own = collections.Counter(name for name in itertools.chain(*programs) if name.startswith("jit(_"))
    most = dict(_admit=5, _decode=2, _only=2, _extended=2, _empty=1, _read=1, _threefry_fold_in=4, _threefry_seed=1)
    assert own["jit(_admit)"] and own <= collections.Counter({f"jit({name})": most[name] for name in most}), own
    assert programs[2:] == [[], []], programs


def test_decoding_copies_neither_weights_nor_caches(tiny):
    """In the compiled loop: they are read where they lie, and new entries written in place."""
    mesh = meshes.make_mesh(1, -1, 1)
    model = hugging_face.build(hugging_face.read_config(tiny), None, "float32", "float32", "none")
    params = models.abstract(model, mesh, "params")
    decode, (params, state, enough), settings = decode_program(model, params, slots=3, prompt=70, longest=50)
    params = jax.eval_shape(lambda p: sampling._turned(unstack_layers(p), "kernel", sampling.BY_COLUMNS), params)
    with meshes.in_force(mesh):
        text = decode.lower(params, state, enough, **settings).compile().as_text()
    (body,) = re.findall(r"while\(.*body=(%[\w.]+)", text)
    lines = text[text.index(f"\n{body} (") :].split("\n}\n")[0].splitlines()
    assert len(lines) > 50
    held = [leaf.shape for leaf in jax.tree.leaves((params, state.cache)) if leaf.ndim > 1]
    large = {",".join(map(str, shape)) for shape in (*held, *(shape[::-1] for shape in held))}
    moves = r"\w+\[([\d,]+)\]\S* (?:copy|transpose)\("
    copied = [line for line in lines if (m := re.search(moves, line)) and m[1] in large]
    assert not copied


def test_own_copy_is_rounded_to_the_dtype_of_products_and_says_the_same(tiny):
    """Half the stored weights' bytes, and not one bit of an answer: products would round them the same."""
    _, params = load(tiny)
    model = hugging_face.build(hugging_face.read_config(tiny), None, "bfloat16", "float32", "none")
    sampler = Sampler(model, params, stop_ids=(7, 258))
    leaves = [leaf for held in (sampler._params, sampler._decoded) for leaf in jax.tree.leaves(held)]
    assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"}
    ours = sample(sampler, requests(), Greedy(), slots=4)
    sampler._params, sampler._decoded = params, sampling._turned(unstack_layers(params), "kernel", sampling.BY_COLUMNS)
    for index, answer in sample(sampler, requests(), Greedy(), slots=4).items():
        np.testing.assert_array_equal(ours[index].tokens, answer.tokens)
        np.testing.assert_array_equal(ours[index].logprobs, answer.logprobs)


def test_nothing_is_copied_of_parameters_that_lie_as_products_read_them(tiny):
    model, params = load(tiny)
    sampler = Sampler(model, params, stop_ids=(7, 258))
    ours, given = ([x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)] for tree in (sampler._params, params))
    assert ours == given


EIGHT_DEVICES = """
import json, pathlib, sys
import jax
from robust_mo.analysis.programs import collectives
from robust_mo.model import hugging_face, mesh as meshes
from robust_mo.sampling import sampler
from robust_mo.sampling.sampler import decode_program, own_copy
from robust_mo.training import models
from robust_mo.training.memory import held

def gathered(program) -> int:
    return collectives(program.compile().as_text()).get("all-gather", {"bytes": 0})["bytes"]


mesh, found = meshes.make_mesh(1, -1, 1), []
model = hugging_face.build(hugging_face.read_config(pathlib.Path(sys.argv[1])), None, "float32", "float32", "none")
given = models.abstract(model, mesh, "params")
whole = held(own_copy(model, given, None))
for free in (None, 2 * whole, 2 * whole - 1, 8):
    params = own_copy(model, given, free)
    decode, arguments, settings = decode_program(model, params, slots=8, prompt=70, longest=50)
    with meshes.in_force(meshes.of(params)):
        decoding = gathered(decode.lower(*arguments, **settings))
    ways = sampler._ways(model, given, params)
    moving = sum(gathered(sampler._mover(way, x.dtype).lower(x)) for x, way in zip(jax.tree.leaves(given), ways))
    found.append((meshes.of(params).shape["tensor"], held(params), decoding, moving))
print(json.dumps(found))
"""


def test_decoding_gathers_no_weights_where_devices_can_hold_or_share_them(tiny):
    """For a token devices tell each other its rows' state.  Where not even two devices, as many as the tiny model has
    key heads, hold them together, they gather all of them beside it."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [sys.executable, "-c", EIGHT_DEVICES, str(tiny)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    alone, enough, (sharing, half, gathered_half, moved), (_, cut, gathered_cut, _) = json.loads(
        done.stdout.splitlines()[-1]
    )
    _, whole, gathered, _ = alone
    assert enough == alone and alone[0] == 1 and gathered < whole / 30
    assert sharing == 2 and half < 0.8 * whole and gathered_half < whole / 30
    assert moved < 1.1 * half  # on the way devices get what they are to hold; of the odd vocabulary in two steps
    assert cut < whole / 7 and gathered_cut > 0.99 * whole


def test_limits_are_kept(sampler, tiny):
    """The model's context is 1024."""
    asked = [Request(np.arange(length, dtype=np.int32) % 250, 50) for length in (5, 1020, 1023)]
    asked[0] = dataclasses.replace(asked[0], max_new_tokens=1)
    found = sample(Sampler(*load(tiny), stop_ids=()), asked, Greedy(), slots=2)
    assert [len(found[index].tokens) for index in range(3)] == [1, 4, 1]
    with pytest.raises(InputError, match="prompt 2 has no tokens"):
        sample(sampler, [asked[0], Request(np.zeros(0, np.int32), 5)], Greedy(), slots=2)
    with pytest.raises(InputError, match="prompt 2 has 1024 tokens"):
        sample(sampler, [asked[0], Request(np.zeros(1024, np.int32), 5)], Greedy(), slots=2)
    with pytest.raises(InputError, match="max_new_tokens"):
        sample(sampler, [Request(np.zeros(3, np.int32), 0)], Greedy(), slots=2)


def test_memory_decides_how_many_slots_there_are(sampler, monkeypatch):
    """A slot's two caches of 3 layers, 2 heads of 8 and 96 entries, kept twice, and four rows of logits; and of every
    eighth, the first of them too, three times the caches of a prompt of 96, two times its 4 heads' scores, and the
    layer's hidden states and products of 32 and 64 numbers."""
    caches = 2 * 3 * 2 * 8 * 96 * 4
    one, admitted = 2 * caches + 4 * 4 * 259, 3 * caches + 2 * 4 * 4 * 96**2 + 96 * (3 * 64 + 4 * 32) * 4
    for slots in (1, 5, 8, 9, 17):
        needed = slots * one + -(-slots // 8) * admitted
        for free, fit in ((needed, slots), (needed - 1, slots - 1)):
            monkeypatch.setattr(meshes, "free_memory", lambda free=free: free)
            assert fit == 0 or sampler._slots(0, 94, 96, 0, prompts=99) == fit
    monkeypatch.setattr(meshes, "free_memory", lambda: 5 * one + admitted + 100)
    assert len(sample(sampler, requests(), Greedy(), slots=5)) == 9
    assert sampler._slots(0, 94, 96, 0, prompts=9) == 5 and sampler._slots(0, 94, 96, 0, prompts=3) == 3
    with pytest.raises(InputError, match="batch_size is 60: .* hold 5 rows of 96 tokens"):
        sample(sampler, requests(), Greedy(), slots=60)
    assert len(sample(sampler, requests(), Greedy(), slots=60, first=4)) == 5  # no more than there are to answer
    monkeypatch.setattr(meshes, "free_memory", lambda: one + admitted - 1)
    with pytest.raises(
        InputError, match="^0.00 GiB are free on a device, which do not hold a row of .* tokens: shorten"
    ):
        sample(sampler, requests(), Greedy(), slots=0)


def test_smallest_nucleus_is_greedy(sampler):
    """1e-40 is 0 in float32."""
    wanted = sample(sampler, requests(), Greedy(), slots=3)
    found = sample(sampler, requests(), Nucleus(1.0, 1e-40), slots=3)
    for index, answer in wanted.items():
        np.testing.assert_array_equal(found[index].tokens, answer.tokens)


def test_weights_that_are_no_numbers_give_no_answers(tiny):
    model, params = load(tiny)
    params["norm"]["scale"] = params["norm"]["scale"].at[0].set(jnp.nan)
    with pytest.raises(InputError, match="logits are not numbers"):
        sample(Sampler(model, params, stop_ids=()), requests(), Greedy(), slots=3)


@pytest.mark.parametrize(
    "temperature, top_p", [(-1, 1), (1e-39, 1), (float("nan"), 1), (float("inf"), 1), (1, 0), (1, 1.5)]
)
def test_impossible_decoding_is_refused(temperature, top_p):
    with pytest.raises(InputError):
        make_decoding(temperature, top_p)


@pytest.mark.slow
def test_smollm2_greedy_text_equals_generate(smollm2):
    questions = builtin_questions("evaluation")[:12]
    conversations = [[{"role": "user", "content": row["question"]}] for row in questions]
    model, params = load(smollm2)
    chat = ChatFormat.from_folder(smollm2)
    ours = answers(
        model,
        params,
        chat,
        conversations,
        decoding=Greedy(),
        max_new_tokens=48,
        seed=0,
        slots=7,
        on_progress=lambda *_: None,
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    for conversation, answer in zip(conversations, ours, strict=True):
        ids = chat.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_tensors="pt")
        with torch.no_grad():
            out = theirs.generate(**ids, max_new_tokens=48, do_sample=False)
        new = out[0, ids["input_ids"].shape[1] :]
        assert answer.text == chat.tokenizer.decode(new, skip_special_tokens=True)
        assert answer.tokens == len(new)
