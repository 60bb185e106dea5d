"""Sampling speed beside transformers: the same prompts, greedy, in one run.

    python -m benchmarks.sampling [--size=smol] [--max_new_tokens=128] [--slots=16]  # 64 prompts, equal rows
    python -m benchmarks.sampling --forced            # answers of lengths as evaluations have them
    python -m benchmarks.sampling --peer=continuous   # generate (the default), static (its cache), continuous

At `smol` the prompts are 64 real ones of mixed length, answered to the end of turn or the cap.  At the other sizes they
are random tokens, and every answer is as long as asked for.  With --forced each of an evaluation's answers has a length
of its own, end of turn or not (lognormal, see benchmarks/sizes.py: at `smol` 200 of mean 60 and at most 512, at `1b`
and `8b` 500 of mean 518 and at most 2,048, as on MATH-500): `generate` runs each batch to its longest; the tokens asked
for count on both sides.

We are timed on a second pass over the prompts, transformers after one of its batches, so that compilation and first
touches are left out on both.  `generate` gets left-padded batches, sorted by the prompts' length, which is the best it
can do; at `1b` and `8b` it is timed on the first of its batches alone, which stands for the others.  Writes
benchmarks/results/sampling[-SIZE][-forced][-PEER].json.
"""

import argparse
import functools
import json
import time

import numpy as np

from benchmarks import sizes
from benchmarks.peers import SIDES, compare, result_name, tell, torch_device
from benchmarks.sizes import SIZES

PEERS = ("generate", "static", "continuous")
PROMPTS = 64


def conversations() -> list[list[dict]]:
    """48 questions of the evaluation part, and 16 with a longer lead."""
    from robust_mo.data.prompts import builtin_questions

    asked = [entry["question"] for entry in builtin_questions("evaluation")[:48]]
    more = builtin_questions("blue")[:16]
    leads = [f"Somebody told me this: {e['plain']} " * (1 + i % 4) for i, e in enumerate(more)]
    asked += [lead + entry["question"] for lead, entry in zip(leads, more, strict=True)]
    return [[{"role": "user", "content": question}] for question in asked]


def work(size: str, max_new_tokens: int, forced: bool) -> tuple[list[np.ndarray], list[int]]:
    """(prompts' tokens, longest answer to each)."""
    one, generator = SIZES[size], np.random.default_rng(0)
    if size == "smol":
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(sizes.folder(size))
        written = [
            tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in conversations()
        ]
        prompts = [np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32) for text in written]
    else:
        lengths = np.clip(generator.lognormal(np.log(one.length / 16), 0.5, PROMPTS), 4, one.length / 2).astype(int)
        prompts = [generator.integers(0, sizes.shapes(size).vocab_size, length, np.int32) for length in lengths]
    if not forced:
        return prompts, [max_new_tokens] * len(prompts)
    lengths = generator.lognormal(np.log(one.mean) - one.spread**2 / 2, one.spread, one.answers)
    return [prompts[i % PROMPTS] for i in range(one.answers)], np.clip(lengths.round(), 1, one.longest).astype(
        int
    ).tolist()


def stop_ids(size: str, forced: bool) -> tuple[int, ...]:
    """What ends an answer before its longest."""
    if size != "smol" or forced:
        return ()
    return (json.loads((sizes.folder(size) / "generation_config.json").read_text())["eos_token_id"],)


def ours(size: str, max_new_tokens: int, slots: int, forced: bool) -> dict:
    from robust_mo.sampling.decoding import Greedy
    from robust_mo.sampling.sampler import Request, Sampler

    model, params = sizes.loaded(size)
    requests = [Request(*asked) for asked in zip(*work(size, max_new_tokens, forced), strict=True)]
    sampler = Sampler(model, params, stop_ids(size, forced))
    del params  # where the sampler arranges them otherwise
    for _ in range(2):
        before, start = sampler.idle, time.perf_counter()
        told = dict(sampler.answers(requests, Greedy(), 0, slots, lambda *_: None))
        seconds = time.perf_counter() - start
    answers = [told[i].tokens.tolist() for i in range(len(requests))]
    tokens, idle = sum(map(len, answers)), sampler.idle - before
    decoded = tokens - len(answers)  # an answer's first token is that of its prompt
    figures = {"seconds": seconds, "share of slots idle": idle / (idle + decoded)}
    return {"speed": tokens / seconds, "answers": answers, "figures": figures}


def theirs(size: str, max_new_tokens: int, slots: int, forced: bool, peer: str) -> dict:
    import torch
    import transformers

    dtype = getattr(torch, SIZES[size].dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(sizes.folder(size), dtype=dtype)
    model = model.to(torch_device()).eval()
    stop, (prompts, limits) = stop_ids(size, forced), work(size, max_new_tokens, forced)
    model.generation_config.update(eos_token_id=list(stop) or None, pad_token_id=0, do_sample=False)
    timed = slots if size in ("1b", "8b") and peer != "continuous" else len(prompts)
    warm_up = timed if peer == "static" else slots  # on a GPU each of its batches has a length to compile for
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answer = _continuous if peer == "continuous" else functools.partial(_batches, slots=slots, static=peer == "static")
    # Where nothing is compiled a few tokens warm it up.
    few = 8 if peer == "generate" else max(limits)
    for count, most in ((warm_up, few), (timed, max(limits))):
        start = time.perf_counter()
        found = answer(model, {i: (prompts[i], min(limits[i], most)) for i in order[:count]})
        seconds = time.perf_counter() - start
    found = {i: _to_the_stop(tokens, stop) for i, tokens in found.items()}
    answers = [found.get(i) for i in range(len(prompts))]
    tokens = sum(map(len, found.values()))
    return {"speed": tokens / seconds, "answers": answers, "figures": {"seconds": seconds, "answers": len(found)}}


def _batches(model, asked: dict, slots: int, static: bool) -> dict[int, list[int]]:
    """Through `generate`, so many at once, each batch to the longest of its answers."""
    import torch

    found = {}
    for begin in range(0, len(asked), slots):
        chosen = list(asked)[begin : begin + slots]
        width = max(len(asked[i][0]) for i in chosen)
        tokens, mask = np.zeros((2, len(chosen), width), np.int64)
        for row, i in enumerate(chosen):
            prompt = asked[i][0]
            tokens[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
        with torch.no_grad():
            out = model.generate(
                torch.tensor(tokens, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=max(asked[i][1] for i in chosen),
                cache_implementation="static" if static else None,
            )
        found |= {i: row[: asked[i][1]] for i, row in zip(chosen, out[:, width:].tolist(), strict=True)}
    return found


def _continuous(model, asked: dict) -> dict[int, list[int]]:
    """Through transformers' continuous batching: it takes a limit for each prompt and batches as it likes."""
    found = {}
    with model.continuous_batching_context_manager(persistent_manager=True) as manager:  # what warms up stays
        for i, (prompt, limit) in asked.items():
            manager.add_request(prompt.tolist(), request_id=str(i), max_new_tokens=limit)
        while len(found) < len(asked):
            done = manager.get_result(timeout=1)
            if done is not None and done.is_finished():
                found[int(done.request_id)] = done.generated_tokens
            elif done is None and not manager.is_running():
                raise SystemExit(f"continuous batching ended with {len(found)} of {len(asked)} answers")
    return found


def _to_the_stop(tokens: list[int], stop: tuple[int, ...]) -> list[int]:
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in stop), len(tokens))]


def agree(ours: dict, theirs: dict) -> None:
    """Ends the process where more answers differ than near ties explain, which fall otherwise in a left-padded batch.

    Invented weights tell near ties apart nowhere, so that of their answers in bfloat16, forced to equal lengths, only
    the first token is compared, which reading the prompt gives, and the second, which a decode step does."""
    pairs = [(a, b) for a, b in zip(ours["answers"], theirs["answers"], strict=True) if b is not None]
    equal, first = sum(a == b for a, b in pairs), [(a, b) for a, b in pairs if a[0] == b[0]]
    longer = [(a, b) for a, b in first if len(a) > 1 or len(b) > 1]
    second = sum(a[:2] == b[:2] for a, b in longer)
    told = f"{len(first)} begin alike, {second} of {len(longer)} of these go on so"
    print(f"of {len(pairs)} answers {equal} are equal, {told}", flush=True)
    if ours["exact"]:
        enough = equal >= 0.9 * len(pairs)
    else:
        lengths = all(len(a) == len(b) for a, b in pairs)
        enough = lengths and len(first) >= 0.5 * len(pairs) and second >= 0.5 * len(longer)
    if not enough:
        raise SystemExit("the answers differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="smol")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--slots", type=int, default=0, help="rows decoded together; 0: as the size has it")
    parser.add_argument("--forced", action="store_true", help="lengths of answers are given")
    parser.add_argument("--peer", choices=PEERS, default="generate")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side is None:
        name = result_name("sampling", args.size) + "-forced" * args.forced
        name += "" if args.peer == "generate" else f"-{args.peer}"
        return compare(name, "answer tokens/s", args.rounds, agree)
    settings = (args.size, args.max_new_tokens, args.slots or SIZES[args.size].slots, args.forced)
    told = ours(*settings) if args.side == "ours" else theirs(*settings, args.peer)
    tell(args.side, told | {"exact": SIZES[args.size].dtype == "float32"})
    return None


if __name__ == "__main__":
    main()
