"""Sampling speed beside transformers' `generate`: 64 real prompts of mixed length, greedy, equal rows, in one run.

    python -m benchmarks.cpu_sample [--rounds=3] [--max_new_tokens=128] [--batch_size=16]

A side is timed on its second pass over the prompts, so that compilation and first touches are left out on both.
`generate` gets left-padded batches, sorted by length, which is the best it can do.  Writes
benchmarks/results/cpu_sample.json.
"""

import argparse
import json
import time

from benchmarks.peers import SIDES, compare


def prompts() -> list[list[dict]]:
    """48 questions of the evaluation part, and 16 with a longer lead."""
    from robust_mo.data.prompts import builtin_questions

    asked = [entry["question"] for entry in builtin_questions("evaluation")[:48]]
    more = builtin_questions("blue")[:16]
    leads = [f"Somebody told me this: {e['plain']} " * (1 + i % 4) for i, e in enumerate(more)]
    asked += [lead + entry["question"] for lead, entry in zip(leads, more, strict=True)]
    return [[{"role": "user", "content": question}] for question in asked]


def ours(max_new_tokens: int, batch_size: int) -> dict:
    from robust_mo.model import mesh as meshes
    from robust_mo.sampling.decoding import make_decoding
    from robust_mo.sampling.text import answers
    from robust_mo.training.models import load_model

    model = load_model("smollm2-135m", meshes.make_mesh(1, -1, 1), "float32", "float32")
    for _ in range(2):
        start = time.perf_counter()
        told = answers(
            model.llama,
            model.params,
            model.chat,
            prompts(),
            decoding=make_decoding(0, 1),
            max_new_tokens=max_new_tokens,
            seed=0,
            slots=batch_size,
            on_progress=lambda *_: None,
        )
        seconds = time.perf_counter() - start
    return {"speed": sum(a.tokens for a in told) / seconds, "texts": [a.text for a in told]}


def theirs(max_new_tokens: int, batch_size: int) -> dict:
    import torch
    import transformers

    from robust_mo.model.sources import resolve

    folder = resolve("smollm2-135m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rendered = [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in prompts()]
    order = sorted(range(len(rendered)), key=lambda i: len(tokenizer(rendered[i])["input_ids"]))
    for _ in range(2):
        texts, tokens, start = [""] * len(rendered), 0, time.perf_counter()
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            inputs = tokenizer([rendered[i] for i in chosen], return_tensors="pt", padding=True)
            with torch.no_grad():
                out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            for index, row in zip(chosen, out[:, inputs["input_ids"].shape[1] :], strict=True):
                ended = (row == tokenizer.eos_token_id).nonzero()
                length = int(ended[0]) + 1 if len(ended) else len(row)
                texts[index] = tokenizer.decode(row[:length], skip_special_tokens=True)
                tokens += length
        seconds = time.perf_counter() - start
    return {"speed": tokens / seconds, "texts": texts}


def agree(ours: dict, theirs: dict) -> None:
    """Ends the process where more texts differ than near ties, which fall otherwise in a left-padded batch, explain."""
    equal = sum(a == b for a, b in zip(ours["texts"], theirs["texts"], strict=True))
    print(f"equal texts: {equal} of {len(ours['texts'])}", flush=True)
    if equal < 0.9 * len(ours["texts"]):
        raise SystemExit("the texts differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side is None:
        return compare("cpu_sample", "answer tokens/s", args.rounds, agree)
    side = ours if args.side == "ours" else theirs
    print(json.dumps(side(args.max_new_tokens, args.batch_size)))
    return None


if __name__ == "__main__":
    main()
