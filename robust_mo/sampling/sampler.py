"""Answers from prompts: a fixed number of slots, refilled from a queue as answers finish.

Compiled programs of fixed shape work on one state.  `_read` runs what all prompts begin with through the model, once.
`_admit` does so with the rest of a group of prompts, writes their keys and values into free slots and chooses each
one's first token.  `_decode` goes on token by token in all slots until enough of them are done to make a refill worth
while; when no prompt is left to admit, slots are given up by halves (`_only`), down to an eighth, where that saves more
than another program costs.  The host only moves prompts in and answers out.

Promises: greedy answers equal those of transformers' `generate` (without a penalty on repetition, which some models'
generation_config asks for even then); an answer depends on the parameters, its prompt, the seed and how often the same
prompt came before in the list, not on its slot or its neighbours (float32, its products exact: off a CPU with
JAX_DEFAULT_MATMUL_PRECISION=highest).
What the programs read is a copy of the parameters, see `own_copy`, where they do not lie like that already; the slots
are dealt out among the devices of the mesh on which it lies.  Of several hosts each makes the same calls and gets all
answers.
Does not know about text, templates or files: prompts and answers are token ids.

Shape letters: N slots, R prompts admitted at once, C tokens that all prompts begin with, P padded length of the rest,
S cache entries, A longest answer, V vocabulary.
"""

import collections
import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from robust_mo.errors import InputError, PromptError
from robust_mo.model import hugging_face
from robust_mo.model import mesh as meshes
from robust_mo.model.llama import Cache, Llama, unembed, unstack_layers
from robust_mo.sampling.decoding import Greedy, Nucleus

# Of slots whose number memory decides: with more, a step costs what it gains.
_MOST_SLOTS = 256
_SLOTS = 16  # where no one knows how much there is

# Decode steps after which the host looks in even if no slot is free: often enough for progress and interrupts.
_STEPS_AT_ONCE = 64
# Entries that a CPU's caches may have from the start; where a long answer needs more, they are doubled when it gets
# there, since a step reads all the room that there is.
_ROOM_AT_FIRST = 512
# Entries that most answers come through with, prompt and all, though more are allowed.  Where memory holds too few
# slots of the longest, all prompts first get so much: of MATH-500's 10,000 tokens an H100 would hold 16 rows beside
# 8B and its adapters (arithmetic, not measured).
_ROOM_OF_MOST = 2048
# Prompts of which the long answers are made up for before others are begun: who keeps answers in order waits for them.
_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to answer.

    Attributes:
      tokens: int32 [length], with the template's generation prompt at the end.
      max_new_tokens: longest answer, stop token included.
    """

    tokens: np.ndarray
    max_new_tokens: int


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
      tokens: int32 [count], the stop token included where there is one.
      logprobs: float32 [count], natural log of each token's probability at temperature 1.
      finish_reason: "stop" or "length".
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    finish_reason: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class SlotState:
    """What the device holds for the N slots.

    Attributes:
      cache: keys and values of each layer; the rows are the slots.
      last_N: int32, the token chosen last, not yet in the cache.
      positions_N: int32, where it will stand.
      counts_N: int32, tokens of the answer so far.
      limits_N: int32, longest answer.
      done_N: bool, finished or empty.
      keys_N: uint32 [N, 2], random key of each prompt.
      tokens_NA, logprobs_NA: the answers so far.
    """

    cache: list[Cache]
    last_N: jax.Array
    positions_N: jax.Array
    counts_N: jax.Array
    limits_N: jax.Array
    done_N: jax.Array
    keys_N: jax.Array
    tokens_NA: jax.Array
    logprobs_NA: jax.Array


def _placed(state: SlotState) -> SlotState:
    """The caches cut over the mesh, all the rest whole on every device, where the host can fetch it."""
    return jax.tree.map(
        lambda part: part.placed() if isinstance(part, Cache) else meshes.everywhere(part),
        state,
        is_leaf=lambda part: isinstance(part, Cache),
    )


@functools.partial(jax.jit, static_argnames=("model", "slots", "longest"))
def _empty(*, model, slots, longest):
    """The state in which no slot is taken."""

    def zeros(*shape, dtype=jnp.int32):
        return jnp.zeros((slots, *shape), dtype)

    return _placed(
        SlotState(
            cache=Cache.zeros(model.config, slots, 0, model.compute_dtype).unstacked(),
            last_N=zeros(),
            positions_N=zeros(),
            counts_N=zeros(),
            limits_N=zeros(),
            done_N=~zeros(dtype=bool),
            keys_N=zeros(2, dtype=jnp.uint32),
            tokens_NA=zeros(longest),
            logprobs_NA=zeros(longest, dtype=jnp.float32),
        )
    )


@functools.partial(jax.jit, static_argnames=("more",))
def _extended(state, *, more):
    """With room for `more` entries in every cache."""
    return _placed(dataclasses.replace(state, cache=[cache.extended(more) for cache in state.cache]))


@functools.partial(jax.jit, static_argnames=("entries",))
def _cut(state, *, entries):
    """With so many entries in every cache, the first."""
    return _placed(dataclasses.replace(state, cache=[cache.cut(entries) for cache in state.cache]))


@jax.jit
def _only(part, slots_M):
    """Some of the slots of a state without its caches, or of one cache."""
    chosen = jax.tree.map(lambda x: x[slots_M], part)
    return chosen.placed() if isinstance(chosen, Cache) else _placed(chosen)


def _choose(logits, counts, keys, decoding):
    """(tokens, their log probabilities); the random numbers belong to (prompt's key, place in the answer)."""
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys), counts)
    tokens = decoding.choose(logits, keys).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def _through(model, params, tokens_RT, positions_RT, caches):
    """(hidden, caches) of prompts, with a cache for each layer whether the model's layers are stacked or not."""
    if not model.scan_layers:
        return model.apply({"params": params}, tokens_RT, positions_RT, cache=caches)
    hidden, cache = model.apply({"params": params}, tokens_RT, positions_RT, cache=Cache.stacked(caches))
    return hidden, cache.unstacked()


@functools.partial(jax.jit, static_argnames=("model",))
def _read(params, tokens_RC, *, model):
    """The caches after these tokens, the same in every row."""
    rows, length = tokens_RC.shape
    caches = Cache.zeros(model.config, rows, length, model.compute_dtype).unstacked()
    if length:
        positions_RC = jnp.broadcast_to(jnp.arange(length), tokens_RC.shape)
        _, caches = _through(model, params, tokens_RC, positions_RC, caches)
    return [cache.placed() for cache in caches]


@functools.partial(jax.jit, static_argnames=("model", "decoding", "stop_ids"), donate_argnames=("state",))
def _admit(params, state, common, tokens_RP, lengths_R, slots_R, limits_R, keys_R, *, model, decoding, stop_ids):
    """Puts R prompts into the slots `slots_R`; a slot number of N means that the row is filling and goes nowhere.

    `common` are the caches after the tokens that all prompts begin with; the rest of a prompt is `tokens_RP`, of length
    `lengths_R`.
    """
    rows, width = tokens_RP.shape
    begun, caches = common[0].capacity, [cache.rows(rows).extended(width) for cache in common]
    positions_RP = jnp.broadcast_to(begun + jnp.arange(width), tokens_RP.shape)
    hidden, caches = _through(model, params, tokens_RP, positions_RP, caches)
    last_hidden = jnp.take_along_axis(hidden, (lengths_R - 1)[:, None, None], axis=1)[:, 0]
    zeros_R = jnp.zeros(rows, jnp.int32)
    first_R, logprobs_R = _choose(unembed(params, last_hidden), zeros_R, keys_R, decoding)

    def put(all_slots, values):
        return all_slots.at[slots_R].set(values, mode="drop")

    admitted = SlotState(
        cache=[old.with_rows(slots_R, new) for old, new in zip(state.cache, caches, strict=True)],
        last_N=put(state.last_N, first_R),
        positions_N=put(state.positions_N, begun + lengths_R),
        counts_N=put(state.counts_N, zeros_R + 1),
        limits_N=put(state.limits_N, limits_R),
        done_N=put(state.done_N, jnp.isin(first_R, jnp.array(stop_ids)) | (limits_R <= 1)),
        keys_N=put(state.keys_N, keys_R),
        tokens_NA=state.tokens_NA.at[slots_R, 0].set(first_R, mode="drop"),
        logprobs_NA=state.logprobs_NA.at[slots_R, 0].set(logprobs_R, mode="drop"),
    )
    return _placed(admitted)


@functools.partial(jax.jit, static_argnames=("model", "decoding", "stop_ids"), donate_argnames=("state",))
def _decode(params, state, enough_done, *, model, decoding, stop_ids):
    """Decodes until `enough_done` slots are done, at most _STEPS_AT_ONCE tokens."""
    stop = jnp.array(stop_ids)
    model = model.clone(scan_layers=False)

    def unfinished(carry):
        step, state = carry
        return (step < _STEPS_AT_ONCE) & (state.done_N.sum() < enough_done)

    def one_token(carry):
        step, s = carry
        layers = _turned(params, BY_COLUMNS, "kernel") if "layers_0" in params else unstack_layers(params)
        at_N = jnp.where(s.done_N, 0, s.positions_N)  # so that kernels read one entry of what is done
        hidden, cache = model.apply({"params": layers}, s.last_N[:, None], at_N[:, None], cache=s.cache)
        tokens_N, logprobs_N = _choose(unembed(params, hidden[:, 0]), s.counts_N, s.keys_N, decoding)
        # A slot that is done stands still: what it computes is written nowhere that is read.
        moved_N = (~s.done_N).astype(jnp.int32)
        rows = jnp.arange(tokens_N.shape[0])
        place_N = jnp.where(s.done_N, s.tokens_NA.shape[1], s.counts_N)
        counts_N = s.counts_N + moved_N
        return step + 1, SlotState(
            cache=cache,
            last_N=jnp.where(s.done_N, s.last_N, tokens_N),
            positions_N=s.positions_N + moved_N,
            counts_N=counts_N,
            limits_N=s.limits_N,
            done_N=s.done_N | jnp.isin(tokens_N, stop) | (counts_N >= s.limits_N),
            keys_N=s.keys_N,
            tokens_NA=s.tokens_NA.at[rows, place_N].set(tokens_N, mode="drop"),
            logprobs_NA=s.logprobs_NA.at[rows, place_N].set(logprobs_N, mode="drop"),
        )

    return _placed(jax.lax.while_loop(unfinished, one_token, (jnp.int32(0), state))[1])


def own_copy(model: Llama, params, free: int | None):
    """Shapes and places of the parameters that a sampler reads: in the dtype of the products, and not cut along `fsdp`,
    where for every token every layer would have to be gathered again.

    Where that is more than half of the memory that is free on a device, the caches' as well, as few devices as it takes
    share each product instead, as on a mesh with more of them along `tensor` and fewer along `fsdp`; if that does not
    help either, they stay cut as they are.  So it can hang on other programs' memory in which order the terms of a
    bfloat16 product are added up.  `free`: bytes; None: no one knows.
    """

    def kept(axes):
        axes = tuple(axis for axis in (axes if isinstance(axes, tuple) else (axes,)) if axis not in ("fsdp", None))
        return axes or None

    def whole(sharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*map(kept, sharding.spec)))

    def lying(places):
        return jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, model.compute_dtype, sharding=at), params, places
        )

    def fits(copy) -> bool:
        size = sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(copy))
        return free is None or 2 * size <= free

    places = jax.tree.map(lambda x: x.sharding, params)
    copy = lying(jax.tree.map(whole, places))
    if fits(copy):
        return copy
    names = hugging_face.abstract_variables(model)["params"]
    for mesh in meshes.with_more_along_tensor(meshes.of(params), model.config.num_key_value_heads):
        copy = lying(jax.tree.map(whole, meshes.shardings(names, mesh)))
        if fits(copy):
            return copy
    return lying(places)


def lies_so(x, to) -> bool:
    """Whether a parameter needs no copy to have the dtype and the place of another."""
    return x.dtype == to.dtype and x.sharding.is_equivalent_to(to.sharding, x.ndim)


def _ways(model: Llama, params, own) -> tuple[tuple[NamedSharding, ...], ...]:
    """For every leaf the places through which it gets to that of its copy.  To another mesh it goes by way of being cut
    there as well: XLA moves one axis at a time, or else gives every device the whole."""
    last = [to.sharding for to in jax.tree.leaves(own)]
    if meshes.of(own) == meshes.of(params):
        return tuple((place,) for place in last)
    names = hugging_face.abstract_variables(model)["params"]
    return tuple(zip(jax.tree.leaves(meshes.shardings(names, meshes.of(own))), last, strict=True))


def _along(x, way, dtype):
    return functools.reduce(jax.lax.with_sharding_constraint, way, x.astype(dtype))


@functools.cache
def _mover(way, dtype):
    """parameter -> the same in this dtype, in the last of these places by way of the others."""
    return jax.jit(functools.partial(_along, way=way, dtype=dtype), out_shardings=way[-1])


@functools.partial(jax.jit, static_argnames=("dtype", "ways", "by_columns"))
def _apart(params, *, dtype, ways, by_columns=False):
    """Each layer's own parameters, with `by_columns` the kernels transposed, as BY_COLUMNS; `ways`: those of the leaves
    of `params`, see `_ways`."""
    leaves, outline = jax.tree.flatten(params)
    lying = [_along(x, way, dtype) for x, way in zip(leaves, ways, strict=True)]
    layers = unstack_layers(jax.tree.unflatten(outline, lying))
    return _turned(layers, "kernel", BY_COLUMNS) if by_columns else layers


BY_COLUMNS = "kernel_by_columns"
"""Name of a kernel that lies transposed, `[out, in]`."""


def _turned(params: dict, name: str, new: str) -> dict:
    """With all matrices of one name transposed, under a new one."""
    turned = {}
    for key, value in params.items():
        if key == name:
            turned[new] = value.T
        else:
            turned[key] = _turned(value, name, new) if isinstance(value, dict) else value
    return turned


def decode_program(model: Llama, params, slots: int, prompt: int, longest: int):
    """(function, arguments, static arguments) of greedy decoding, as shapes, where it needs most: every slot has room
    for a prompt of so many tokens and for the longest answer.  `params`: what `own_copy` gives."""
    mesh = meshes.of(params)
    capacity = _room(min(prompt + longest, model.config.max_position_embeddings))
    with meshes.in_force(mesh):
        empty = functools.partial(_empty, model=model, slots=_dealt_out(slots, mesh), longest=longest)
        state = jax.eval_shape(functools.partial(_extended, more=capacity), jax.eval_shape(empty))

    # As `_placed` does, whose doing a shape does not show.
    def lies(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    rows_and_heads = ("batch", "kv_heads", None, None)
    state = dataclasses.replace(
        jax.tree.map(lambda x: lies(x, meshes.replicated(mesh)), state),
        cache=jax.tree.map(lambda x: lies(x, meshes.sharding(x.shape, rows_and_heads, mesh)), state.cache),
    )
    settings = dict(model=model, decoding=Greedy(), stop_ids=(0,))
    return _decode, (params, state, jax.ShapeDtypeStruct((), jnp.int32)), settings


def _fits_closely() -> bool:
    """Whether the shapes of programs follow what is asked for, or are few.

    On a CPU a step takes as long as its rows and the room in its caches make it, and a program compiles in a second.
    Elsewhere reading the weights is most of a step and kernels read live entries alone, while a program compiles for
    several seconds: with the shapes of a CPU the first run of a study of SmolLM2 took an H200 142 s, the second 10 s.
    """
    return jax.default_backend() == "cpu"


def _room(entries: int) -> int:
    """Of a cache that is to hold so many; off a CPU in blocks that its kernel takes."""
    if _fits_closely():
        return _rounded_up(entries, parts=4)
    return math.ceil(_rounded_up(max(entries, 256), parts=4) / 128) * 128


def _width(length: int) -> int:
    """Of prompts of at most so many tokens that are admitted together."""
    return _rounded_up(length, parts=2) if _fits_closely() else max(128, 1 << (length - 1).bit_length())


def _rows_that_fit(free: int, model: Llama, mesh, longest: int, prompt: int, read: int) -> int:
    """Slots of room for `longest` tokens each in `free` bytes of a device; of a prompt `read` tokens come before the
    `prompt` that are read for it alone.

    A slot takes its cache, twice where that grows, and its logits as they are drawn from, in a few copies.  One in
    eight is admitted at once, and at least one, which takes a prompt's cache, in three, its attention scores, in two,
    and a layer's activations.
    """
    config, tensor, size = model.config, mesh.shape["tensor"], model.compute_dtype.itemsize
    heads = config.num_key_value_heads // (tensor if config.num_key_value_heads % tensor == 0 else 1)
    entry = 2 * config.num_hidden_layers * heads * config.head_dim * size
    slot = (2 if _fits_closely() else 1) * _room(longest) * entry + 4 * 4 * config.vocab_size
    scores = 2 * 4 * math.ceil(config.num_attention_heads / tensor) * prompt * (read + prompt)
    activations = prompt * (3 * math.ceil(config.intermediate_size / tensor) + 4 * config.hidden_size) * size
    admitted = 3 * (read + prompt) * entry + scores + activations
    eights, rest = divmod(free, 8 * slot + admitted)
    return 8 * eights + max(0, (rest - admitted) // slot)


def _dealt_out(rows: int, mesh) -> int:
    """At least so many rows, and as many on every device."""
    apart = meshes.rows_apart(mesh)
    return apart * math.ceil(max(1, rows) / apart)


class Sampler:
    """Samples from one model.

    Args:
      model: without adapters (merge them first).
      params: its parameters, on the mesh.
      stop_ids: an answer ends with the first of these.

    Attributes:
      idle: tokens that were not sampled so far because a slot stood still while others went on.
    """

    def __init__(self, model: Llama, params: dict, stop_ids: tuple[int, ...]):
        own = own_copy(model, params, meshes.free_memory())
        self._model, self._mesh = model, meshes.of(own)
        # Of stacked layers a CPU and a GPU copy each layer's kernels before they read them: a fifth of a step of
        # SmolLM2 on a CPU (122 ms against 100), 9.5 of the 20.7 ms of an 8B step of 128 rows on an H100.  There
        # decoding gets the layers apart, and on a CPU kernels by columns, by which a few rows are multiplied sooner (a
        # step of 1, 4, 16 rows in 38, 118, 152 ms instead of 45, 131, 171 on two AMD EPYC cores without AVX-512).  On a
        # GPU all programs do: whoever hands the stacked ones over and keeps them holds both.
        backend, dtype, ways = jax.default_backend(), model.compute_dtype, _ways(model, params, own)
        if backend == "gpu":
            self._model, self._params = model.clone(scan_layers=False), _apart(params, dtype=dtype, ways=ways)
        else:
            leaves, outline = jax.tree.flatten(params)
            moving = zip(leaves, jax.tree.leaves(own), ways, strict=True)
            copies = [x if lies_so(x, to) else _mover(way, dtype)(x) for x, to, way in moving]
            self._params = jax.tree.unflatten(outline, copies)
        if backend == "cpu":
            lying = tuple((to.sharding,) for to in jax.tree.leaves(own))
            self._decoded = _apart(self._params, dtype=dtype, ways=lying, by_columns=True)
        else:
            self._decoded = self._params
        self._stop_ids = tuple(sorted(stop_ids))
        self.idle = 0

    def answers(
        self,
        requests: list[Request],
        decoding: Greedy | Nucleus,
        seed: int,
        slots: int,
        on_progress: Callable[[int, int], None],
        first: int = 0,
    ) -> Iterator[tuple[int, Answer]]:
        """Yields (index of the request, its answer) as answers finish, begun in the order of the list.

        Args:
          slots: number of rows decoded together, and a few more where the mesh does not divide it evenly, but no more
            than there are prompts; 0: as many as the memory that is free holds, at most 256.
          on_progress: called now and then with (answers finished, tokens sampled); may raise to stop.
          first: requests before this one are answered already and left out.

        Raises:
          PromptError: a prompt is empty, or leaves no room for an answer in the model's context.
          InputError: memory does not hold so many slots; the model gives no numbers.
        """
        limits = [self._limit(index, request) for index, request in enumerate(requests)]
        if first == len(requests):
            return
        keys, short = _keys(requests, seed), self._shorter(requests, limits, slots, len(requests) - first)
        finished, sampled, most = first, 0, len(requests) if short is limits else _AT_ONCE
        for begin in range(first, len(requests), most):
            todo: Sequence[int] = range(begin, min(begin + most, len(requests)))
            for passing in (short, limits):
                again: list[int] = []
                progress = functools.partial(_in_all, on_progress, finished, sampled, again)
                for index, answer in self._answered(requests, todo, passing, keys, decoding, slots, progress):
                    sampled += len(answer.tokens)
                    if answer.finish_reason == "length" and passing[index] < limits[index]:
                        again.append(index)
                    else:
                        yield index, answer
                finished, todo = finished + len(todo) - len(again), sorted(again)
                if not again:
                    break

    def _shorter(self, requests: list[Request], limits: list[int], asked: int, prompts: int) -> list[int]:
        """Limits with which memory holds at least twice as many slots, if there are such and they are needed; else
        `limits` themselves.  Whose answer they cut off begins again, with the whole of its limit, to the same answer:
        its random numbers are its own."""
        lengths = [len(request.tokens) for request in requests]
        longest, prompt = max(map(sum, zip(lengths, limits, strict=True))), max(lengths)
        room = max(_ROOM_OF_MOST, _rounded_up(2 * prompt, parts=1))
        if asked or _fits_closely() or meshes.free_memory() is None or room >= longest:
            return limits
        read = _width(prompt), 0
        if self._slots(0, room, *read, prompts) < 2 * self._slots(0, longest, *read, prompts):
            return limits
        return [min(limit, room - length) for length, limit in zip(lengths, limits, strict=True)]

    def _answered(
        self,
        requests: list[Request],
        chosen: Sequence[int],
        limits: list[int],
        keys: np.ndarray,
        decoding: Greedy | Nucleus,
        slots: int,
        on_progress: Callable[[int, int], None],
    ) -> Iterator[tuple[int, Answer]]:
        """`answers` of these requests, each of at most so many tokens as its of `limits`."""
        queue, prompts = collections.deque(chosen), len(chosen)
        longest = max(len(requests[index].tokens) + limits[index] for index in chosen)
        longest_prompt = max(len(r.tokens) for r in requests)

        def fitting(shared: int) -> tuple[int, int]:
            """(slots, how many are admitted at once), where so many tokens are read once for all prompts."""
            rest = _width(longest_prompt - shared)
            fit = self._slots(slots, max(longest, shared + rest), rest, shared, prompts)
            return _dealt_out(fit, self._mesh), _dealt_out(fit // 8, self._mesh)

        def entries(index: int, count: int) -> int:
            """For how many the row of a request gets room, of whose answer there are `count` tokens."""
            used, end = (len(requests[index].tokens) + tokens for tokens in (count, limits[index]))
            if not _fits_closely():
                return end
            return min(end, max(_ROOM_AT_FIRST, _rounded_up(used + _STEPS_AT_ONCE, parts=1)))

        shared = _shared(requests)
        if prompts <= fitting(shared)[1]:  # prompts that are all admitted at once are read as they are
            shared = 0
        slots, group = fitting(shared)
        common = self._run(_read, self._params, np.tile(requests[0].tokens[:shared], (_dealt_out(1, self._mesh), 1)))
        state = self._run(_empty, slots=slots, longest=_rounded_up(max(limits[index] for index in chosen), parts=2))
        program = dict(decoding=decoding, stop_ids=self._stop_ids)
        occupant: list[int | None] = [None] * slots
        fewest = _dealt_out(slots // 8, self._mesh) if _fits_closely() else slots
        finished = sampled = 0
        while finished < prompts:
            free = [slot for slot in range(slots) if occupant[slot] is None]
            while queue and free:
                admitted = [queue.popleft() for _ in range(min(group, len(queue), len(free)))]
                into = [free.pop() for _ in admitted]
                padded = self._padded(requests, shared, limits, admitted, into, group, slots, keys)
                seen = admitted if _fits_closely() else chosen
                state = self._with_room(state, max(shared + padded[0].shape[1], *(entries(index, 0) for index in seen)))
                state = self._run(_admit, self._params, state, common, *padded, **program)
                for slot, index in zip(into, admitted, strict=True):
                    occupant[slot] = index
            needed = slots
            while not queue and needed // 2 >= max(fewest, slots - occupant.count(None)):
                needed = _dealt_out(needed // 2, self._mesh)
            if needed < slots:
                # The last answers to end run among themselves: slots that nobody will need again only cost time.
                kept = sorted(range(slots), key=lambda slot: occupant[slot] is None)[:needed]
                occupant, state = [occupant[slot] for slot in kept], self._fewer(state, np.array(kept))
                slots = needed
            empty = occupant.count(None)
            halved = slots - slots // 2 if slots // 2 >= fewest else slots
            enough = empty + group if queue else halved
            before_N = jax.device_get(state.counts_N)
            held = [entries(index, int(before_N[slot])) for slot, index in enumerate(occupant) if index is not None]
            state = self._close(self._with_room(state, max(held)), max(held))
            state = self._run(_decode, self._decoded, state, min(enough, slots), **program)
            done_N, counts_N = jax.device_get((state.done_N, state.counts_N))
            moved_N = counts_N - before_N
            self.idle += int(moved_N.max() * slots - moved_N.sum())
            for slot in [slot for slot in range(slots) if occupant[slot] is not None and done_N[slot]]:
                answer = self._take(state, slot, int(counts_N[slot]))
                index, occupant[slot] = occupant[slot], None
                finished += 1
                sampled += len(answer.tokens)
                yield index, answer
            running = sum(int(counts_N[slot]) for slot in range(slots) if occupant[slot] is not None)
            on_progress(finished, sampled + running)

    def _slots(self, asked: int, longest: int, prompt: int, read: int, prompts: int) -> int:
        """How many, of room for `longest` tokens each; `prompt`, `read`: see `_rows_that_fit`."""
        free = meshes.free_memory()
        wanted = min(asked, prompts)
        if free is None:
            return wanted or min(_SLOTS, prompts)
        rows = _rows_that_fit(free, self._model, self._mesh, longest, prompt, read)
        fit = rows * meshes.rows_apart(self._mesh)
        if max(wanted, 1) > fit:
            there, how = f"{free / 2**30:.2f} GiB are free on a device", "shorten max_new_tokens, or take more devices"
            if not fit:
                raise InputError(f"{there}, which do not hold a row of {longest} tokens: {how}")
            rows = f"{there} and hold {fit} rows of {longest} tokens"
            raise InputError(f"batch_size is {asked}: {rows}; give at most so many, {how}")
        return wanted or min(fit, _MOST_SLOTS, prompts)

    def _limit(self, index: int, request: Request) -> int:
        length, context = len(request.tokens), self._model.config.max_position_embeddings
        if request.max_new_tokens < 1:
            raise PromptError(f"prompt {index + 1}: max_new_tokens is {request.max_new_tokens}: give at least 1")
        if not length:
            raise PromptError(f"prompt {index + 1} has no tokens: give it some text")
        if length >= context:
            raise PromptError(
                f"prompt {index + 1} has {length} tokens, the model's context is {context}: shorten the prompt"
            )
        return min(request.max_new_tokens, context - length)

    def _run(self, program, *arguments, **settings):
        return self._within_mesh(program, *arguments, model=self._model, **settings)

    def _within_mesh(self, program, *arguments, **settings):
        with meshes.in_force(self._mesh):
            return program(*arguments, **settings)

    def _with_room(self, state: SlotState, entries: int) -> SlotState:
        """The state with a cache of at least so many entries: short prompts need not carry the room of long ones."""
        more = _room(entries) - state.cache[0].capacity
        if more <= 0:
            return state
        return self._within_mesh(_extended, state, more=more)

    def _close(self, state: SlotState, entries: int) -> SlotState:
        """The state with caches cut to the room of so many entries, where steps read all the room and that is at most
        half of it: what a long answer needed is not read to the end of the list."""
        room = _room(max(entries, _ROOM_AT_FIRST))
        if not _fits_closely() or 2 * room > state.cache[0].capacity:
            return state
        return self._within_mesh(_cut, state, entries=room)

    def _fewer(self, state: SlotState, slots_M: np.ndarray) -> SlotState:
        """The state of some of its slots; `state` is given up, layer by layer, each old cache as soon as it is read:
        memory that is full of caches has no room for half as many more."""
        caches, state.cache = state.cache[::-1], []
        fewer = self._within_mesh(_only, state, slots_M)
        while caches:
            fewer.cache.append(self._within_mesh(_only, caches.pop(), slots_M))
        return fewer

    def _padded(self, requests, shared, limits, chosen, into, group, slots, keys):
        """The arguments of `_admit` for the requests `chosen` from token `shared` on, filled up to `group` rows."""
        rests = [requests[index].tokens[shared:] for index in chosen]
        width = _width(max(map(len, rests)))
        tokens_RP = np.zeros((group, width), np.int32)
        lengths_R, limits_R = np.ones(group, np.int32), np.ones(group, np.int32)
        slots_R = np.full(group, slots, np.int32)
        for row, (index, rest) in enumerate(zip(chosen, rests, strict=True)):
            tokens_RP[row, : len(rest)] = rest
            lengths_R[row], limits_R[row], slots_R[row] = len(rest), limits[index], into[row]
        filled = [*chosen, *[chosen[0]] * (group - len(chosen))]
        return tokens_RP, lengths_R, slots_R, limits_R, keys[np.array(filled)]

    def _take(self, state: SlotState, slot: int, count: int) -> Answer:
        tokens, logprobs = jax.device_get((state.tokens_NA[slot], state.logprobs_NA[slot]))
        tokens, logprobs = tokens[:count], logprobs[:count]
        if np.isnan(logprobs).any():
            raise InputError("the model's logits are not numbers: its weights are damaged, or training has broken them")
        return Answer(tokens, logprobs, "stop" if tokens[-1] in self._stop_ids else "length")


def _in_all(on_progress, finished: int, sampled: int, again: list[int], here: int, tokens: int) -> None:
    """Progress of some requests, of which those in `again` do not count as finished, as that of all."""
    on_progress(finished + here - len(again), sampled + tokens)


def _shared(requests: list[Request]) -> int:
    """How many tokens to read once for all requests: what all of them begin with, in sixteens (few shapes to compile),
    with at least one token of each left over."""
    prompts = [request.tokens for request in requests]
    least = min(map(len, prompts)) - 1
    same_C = np.all([prompt[:least] == prompts[0][:least] for prompt in prompts], axis=0)
    return int(np.cumprod(same_C).sum()) // 16 * 16


def _keys(requests: list[Request], seed: int) -> np.ndarray:
    """One random key per request, uint32 [requests, 2], from the seed, its tokens, and how often they came before: the
    n-th copy of a prompt gets the n-th answer wherever it stands."""
    seen: collections.Counter = collections.Counter()
    pairs = []
    for request in requests:
        content = zlib.crc32(np.asarray(request.tokens, np.int32).tobytes())
        pairs.append((content, seen[content]))
        seen[content] += 1
    content, copies = (jnp.array(column, jnp.uint32) for column in zip(*pairs, strict=True))
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), content)
    return np.asarray(jax.random.key_data(jax.vmap(jax.random.fold_in)(fold, copies)))


def _rounded_up(length: int, parts: int) -> int:
    """At least 32, and the next of the numbers that divide the steps 32, 64, 128, ... into so many parts: few shapes
    to compile, at most 1/parts more entries than asked for."""
    step = max(32, 1 << (length.bit_length() - 1)) // parts
    return max(32, -(-length // step) * step)
