"""What a teacher answers, kept by all that it depends on, so that the same answers are never sampled twice.

Promises: an answer is found again by a digest of the teacher's parameters and shapes, the prompt's tokens (and so the
template and system prompt), decoding, length limit and seed, wherever the teacher lies and whatever it is called, and
whatever else was asked; what an interrupt broke off goes on where it stopped; of several processes that ask the same
teacher under the same system prompt, one samples and the others wait.  They lie in `answers/` of the cache folder and
may be deleted.
Does not know what the answers are for.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
import numpy as np

from robust_mo import hosts, runs
from robust_mo.data.conversations import Message
from robust_mo.errors import InUse
from robust_mo.model.sources import cache_folder
from robust_mo.sampling.decoding import make_decoding
from robust_mo.sampling.text import iterate_answers
from robust_mo.training.models import LoadedModel, Unread


def teacher_answers(
    model: LoadedModel | Unread,
    conversations: list[list[Message]],
    *,
    known_as: Hashable,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    slots: int,
    on_progress: Callable[[int, int], None],
) -> list[str | None]:
    """The answers, in the order of the conversations; None for those that are empty, or reached
    `max_new_tokens` and were cut off.

    Args:
      model: its parameters are looked at only where the process has not seen them yet, or answers are missing.
      known_as: what tells its parameters from all others that this process sees; None for nothing.
      slots, on_progress: see sampling/sampler.py.

    Raises:
      InputError: a conversation does not fit the model.
    """
    hosts.check_same("questions for the teacher", conversations)
    keys = _keys([model.chat.prompt(messages) for messages in conversations])
    depends_on = {
        "parameters": _fingerprint_of(model, known_as),
        "config": dataclasses.asdict(model.llama.config),
        "dtype": str(jnp.dtype(model.llama.compute_dtype)),
        "system": sorted({m["content"] for messages in conversations for m in messages if m["role"] == "system"}),
        "stop": sorted(model.chat.stop_ids),
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    file = cache_folder() / "answers" / f"{digest[:32]}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with _turn(file, lambda: on_progress(0, 0)):
        told = {line["prompt"]: line for line in hosts.by_first(lambda: runs.read_lines(file))}
        for key in keys:
            digest, _, turn = key.rpartition("-")
            if turn != "0" and f"{digest}-{int(turn) - 1}" not in told:  # the turns of what is there must have no gap
                told.pop(key, None)
        done, missing = ([i for i, key in enumerate(keys) if (key in told) == there] for there in (True, False))
        if missing:
            sampled = iterate_answers(
                model.llama,
                model.params,
                model.chat,
                [conversations[i] for i in done + missing],  # those before count as copies of what comes again
                decoding=make_decoding(temperature, 1.0),
                max_new_tokens=max_new_tokens,
                seed=seed,
                slots=slots,
                on_progress=on_progress,
                first=len(done),
            )
            for i, answer in zip(missing, sampled, strict=True):
                told[keys[i]] = {
                    **{"prompt": keys[i], "answer": answer.text},
                    **{"finish_reason": answer.finish_reason, "tokens": answer.tokens},
                }
                if hosts.first():
                    runs.append_line(file, told[keys[i]])
        if hosts.first():
            with contextlib.suppress(OSError):
                file.with_suffix(".lock").unlink()
    lines = (told[key] for key in keys)
    return [line["answer"] if line["finish_reason"] == "stop" and line["answer"].strip() else None for line in lines]


def _keys(prompts: list[np.ndarray]) -> list[str]:
    """A name for each prompt: a digest of its tokens, and how often they came before."""
    seen = collections.Counter()
    keys = []
    for tokens in prompts:
        digest = hashlib.sha256(tokens.astype(np.int32).tobytes()).hexdigest()[:32]
        keys.append(f"{digest}-{seen[digest]}")
        seen[digest] += 1
    return keys


@contextlib.contextmanager
def _turn(file: pathlib.Path, on_wait: Callable[[], None]):
    """Within the block no other process samples into the file; before it, `on_wait` is called every second."""
    with contextlib.ExitStack() as held:

        def entered() -> bool:
            try:
                held.enter_context(runs.locked(file.with_suffix(".lock"), ""))
            except InUse:
                return False
            return True

        waiting = False
        while not hosts.by_first(entered):
            if not waiting:
                print(f"another process is asking the same teacher, into {file}: waiting for it", flush=True)
            waiting = True
            on_wait()
            time.sleep(1)
        yield


_fingerprints: dict[Hashable, str] = {}


def _fingerprint_of(model: LoadedModel | Unread, known_as: Hashable) -> str:
    which = known_as, model.llama.compute_dtype
    if known_as is None or which not in _fingerprints:
        _fingerprints[which] = fingerprint(model.params, model.llama.compute_dtype)
    return _fingerprints[which]


def fingerprint(params, dtype) -> str:
    """Digest of the parameters' names, shapes and bits as numbers of `dtype`, summed up where they lie: hexadecimal.

    Two sums of 32 bits a parameter, each bit pattern weighted by its place, tell apart what training tells apart; they
    are no protection against somebody who looks for two models with the same sums.
    """
    shapes = jax.tree.map(lambda leaf: [list(leaf.shape), str(dtype)], params)
    sums = jax.tree.map(np.ndarray.tolist, jax.device_get(_sums(params, jnp.dtype(dtype))))
    return hashlib.sha256(json.dumps([shapes, sums], sort_keys=True).encode()).hexdigest()


@functools.partial(jax.jit, static_argnames="dtype")
def _sums(params, dtype):
    def of(leaf):
        leaf = leaf.astype(dtype)
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
        place, stride = jnp.uint32(0), 1
        for axis in reversed(range(leaf.ndim)):
            place = place + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride % 2**32)
            stride *= leaf.shape[axis]
        mixed = (place ^ (place >> 15)) * jnp.uint32(2654435761)  # Knuth's multiplier spreads neighbours apart
        return jnp.stack([jnp.sum(bits * (2 * place + 1)), jnp.sum((bits ^ mixed) * (mixed | 1))])

    return jax.tree.map(of, params)
