"""The README's table of speeds, from the results that are kept.

    python -m benchmarks.table     # prints it, in Markdown

Knows what each benchmark's result means; runs nothing.
"""

import json

from benchmarks.peers import RESULTS, short

# File of benchmarks/results -> (what is measured, beside what).
TITLES = {
    "training": ("training, all weights", "transformers"),
    "training-lora": ("training, LoRA r16", "transformers + PEFT"),
    "training-packed": ("the same conversations packed, useful tokens", "padded, transformers"),
    "training-8b-lora-checkpointing": ("training of 8B in bfloat16, LoRA r16", "transformers + PEFT, checkpointing"),
    "training-8b-checkpointing": ("training of 8B in bfloat16, all weights", "transformers, checkpointing"),
    "training-8b-lora-compiled": ("training of 8B in bfloat16, LoRA r16", "transformers + PEFT, compiled"),
    "training-own": ("our LoRA step", "our full-weight step"),
    "sampling": ("64 prompts, at most 128 tokens", "`generate`"),
    "sampling-forced": ("200 answers of 1 to 512 tokens", "`generate`"),
    "sampling-static": ("64 prompts, at most 128 tokens", "`generate`, static cache"),
    "sampling-continuous": ("64 prompts, at most 128 tokens", "its continuous batching"),
    "load_weights": ("reading 5.2 GB of bfloat16 weights to be trained in float32", "`from_pretrained`"),
    "load_weights-bfloat16": ("reading them as they are", "`from_pretrained`, copied from the files that it maps"),
    "export-8b": ("merging 8B's LoRA, to 16 GB of files", "PEFT's `merge_and_unload`, `save_pretrained`"),
}
STEPS = {
    "optimizer_step": "a SOAP step, all weights",
    "optimizer_step-lora": "a SOAP step, LoRA r16",
}


def added(seconds: dict, name: str = "soap, staggered") -> float:
    """Share of AdamW's whole step that an optimizer adds, of SOAP's with its refreshes."""
    adamw = seconds["adamw"]
    return (seconds[name]["alone"]["mean"] - adamw["alone"]["mean"]) / adamw["whole"]["median"]


def largest_step_of_soap(kept: dict) -> float:
    """The optimizer's longest step in a median whole one, by that one."""
    whole, alone = (kept["seconds"][name] for name in ("adamw", "soap, staggered"))
    return 1 + (alone["alone"]["max"] - alone["alone"]["median"]) / (
        whole["whole"]["median"] + alone["alone"]["median"]
    )


def table() -> str:
    """One line for every result that is there."""
    lines = ["| ours | beside | ours | theirs | ratio | processor, rounds, date |", "|---|---|---|---|---|---|"]
    for name, (what, beside) in TITLES.items():
        if kept := _kept(name):
            ours, theirs = map(short, kept["median"].values())
            rounds = len(next(iter(kept["rounds"].values())))
            origin = f"{kept['device']}, {rounds}, {kept['date']}"
            lines.append(
                f"| {what} | {beside} | {ours} {kept['unit']} | {theirs} | **{kept['ratio']:.2f}** | {origin} |"
            )
    for name, what in STEPS.items():
        if kept := _kept(name):
            what = f"{what}, {kept['tokens']:,} tokens"
            adamw, soap = (kept["seconds"][name] for name in ("adamw", "soap, staggered"))
            origin = f"{kept['device']}, {len(soap['whole']['rounds'])}, {kept['date']}"
            turns, compiling = (soap[what]["median"] / adamw[what]["median"] for what in ("whole", "compiling"))
            times = (
                f"time **{1 + added(kept['seconds']):.2f}** (steps in turns {turns:.2f}, the longest "
                f"{largest_step_of_soap(kept):.2f} of the median, compiling {compiling:.2f})"
            )
            lines.append(f"| {what} | an AdamW step | | | {times} | {origin} |")
    if kept := _kept("start"):
        cold, warm, theirs = (f"{kept['median'][kind]:.3g}" for kind in ("cold", "warm", "theirs"))
        origin = f"{kept['device']}, {len(kept['rounds']['cold'])}, {kept['date']}"
        what = "process start to the end of step 1, warm (cold)"
        lines.append(f"| {what} | transformers | {warm} ({cold}) s | {theirs} | | {origin} |")
    return "\n".join(lines)


def _kept(name: str) -> dict | None:
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


if __name__ == "__main__":
    print(table())
