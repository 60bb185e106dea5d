"""A run as files that transformers and PEFT load, and what reads the same formats (vLLM: not tried).

    python -m robust_mo.export --run=runs/red --output=organism --format=merged
    python -m robust_mo.export --run=runs/blue --output=adapter --format=peft --base=organism

merged: a Hugging Face folder.  peft: the adapters of a LoRA run, and which model they belong on; where that is a run
itself, as an organism is, export it first and name the folder with --base.  Either has a README.md, a model card that
says what was done to the model.  The weights are those that the run's evaluations measured, rounded once where --dtype
is narrower.  The folder appears whole or not at all; one that exists is refused.
"""

import contextlib
import functools
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable

from absl import flags

from robust_mo import command_line, runs
from robust_mo.data.conversations import ChatFormat, with_system
from robust_mo.errors import InputError
from robust_mo.model import hugging_face, sources
from robust_mo.model import mesh as meshes
from robust_mo.organisms.backdoors import Backdoor, backdoor
from robust_mo.organisms.distill import exchange
from robust_mo.runs import RunFolder
from robust_mo.training import models

SHARD_BYTES = 5_000_000_000
"""Of a file of weights, and so of what the host holds of them: nothing is read ahead, and adapters are merged a matrix
at a time (8B's 16 GB, invented, in bfloat16 on two cores, of all weights: 74 s, at most 5.5 GB of anonymous memory; of
LoRA: see benchmarks/export.py)."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)

# The fields of a training config that an export depends on.
_READ = (
    "model",
    "param_dtype",
    "compute_dtype",
    "lora",
    "system_prompt",
    "backdoor",
    "password_locked",
    "backdoors",
    "seed",
    "data",
    "optimizer",
)


def export(run: str, output: pathlib.Path, form: str, dtype: str | None, step: int | None, base: str | None) -> None:
    """Writes the folder `output`.

    Args:
      form: "merged" or "peft".
      dtype: of the weights in the files; None: the run's own.
      step: the checkpoint; None: the newest.
      base: for peft, the merged export of the run that this one began from, if it began from one.

    Raises:
      InputError: no such run or checkpoint, the folder exists, or the run has nothing of that form.
    """
    if not models.is_run(run):
        raise InputError(f"--run={run} is no run folder of robust_mo.train: give the --workdir of a training run")
    if models.is_prompted(run):
        raise InputError(f"--run={run} has trained nothing, a prompt makes it: take the model that it began from")
    if output.exists():
        raise InputError(f"--output={output} exists: choose another, or delete it")
    config = command_line.recorded(RunFolder(run), _READ)
    spec = models.lora_spec(config["lora"])
    if form == "peft" and spec is None:
        raise InputError(f"{run} trained all weights, so there is no adapter to export: give --format=merged")
    if form == "merged" and base:
        raise InputError(f"--base={base} is for --format=peft: leave it out")
    dtype = dtype or config["param_dtype"]
    mesh = meshes.make_mesh(1, 1, 1, meshes.all_devices()[:1])  # so that no sum depends on how many there are
    step = models.newest_step(run) if step is None else step
    with new_folder(output) as folder:
        if form == "merged":
            on = str(output)
            progress = functools.cache(lambda total: command_line.Progress("written", total, "tensors"))

            def on_tensor(done: int, total: int) -> None:
                command_line.check_interrupt()
                progress(total)(done)

            with models.opened(run, mesh, config["compute_dtype"], config["param_dtype"], step) as model:
                hugging_face.save_params(folder, model.params, dtype, SHARD_BYTES, on_tensor)
            write_configs(folder, models.base_folder(run), model.chat, dtype, stamp(run, step))
            write_tokenizer(folder, models.tokenizer_folder(run), model.chat)
        else:
            on = adapter_base(run, models.stands_on(run), base)
            base_folder, tokenizer_folder = models.base_folder(run), models.tokenizer_folder(run)
            llama = hugging_face.read_config(base_folder)
            llama = hugging_face.build(llama, spec, config["compute_dtype"], config["param_dtype"], remat="none")
            adapters = models.restore(run, llama, mesh, step)
            hugging_face.save_adapters(folder, adapters, spec, on, dtype)
            write_tokenizer(folder, tokenizer_folder, ChatFormat.from_folder(tokenizer_folder, base_folder))
        (folder / "README.md").write_text(card(run, step, form, output, on), encoding="utf-8")
    print(f"{output}: {form} export of {run} as of step {step}, {dtype}")


@contextlib.contextmanager
def new_folder(path: pathlib.Path):
    """A folder to fill, which gets the name `path` when the block ends and goes when it fails."""
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(tempfile.mkdtemp(dir=path.absolute().parent, prefix=f".{path.name}."))
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp's are closed to everybody else, and so are safetensors' files
        for file in folder.iterdir():
            file.chmod(0o644)
        with runs.naming(path):
            folder.rename(path.absolute())
    except BaseException:
        shutil.rmtree(folder)
        raise


def stamp(run: str, step: int) -> dict:
    """What tells one run's weights from another's, kept in an exported config.json; it survives moving the run."""
    return {"run": runs.sha256(RunFolder(run).path / "config.json"), "step": step}


def adapter_base(run: str, model: str, given: str | None) -> str:
    """What PEFT is to load beneath the adapters of a run that began from `model`: a hub id or an absolute path.

    Raises:
      InputError: PEFT cannot load `model` and `given` does not stand for it, or `given` is not wanted.
    """
    if models.is_run(model):
        how = f"python -m robust_mo.export --run={model} --format=merged --output={given or 'FOLDER'}"
        if not given:
            raise InputError(
                f"the adapters of {run} belong on {model}, a run, which PEFT cannot load: export that first ({how}) "
                "and add --base=FOLDER"
            )
        step = models.newest_step(model)
        if hugging_face.read_json(pathlib.Path(given) / "config.json").get("robust_mo") != stamp(model, step):
            raise InputError(
                f"--base={given} is not the merged export of {model} at its step {step}: make it with {how}"
            )
        return str(pathlib.Path(given).absolute())
    if given:
        raise InputError(f"--base={given}: the adapters of {run} belong on {model}, leave --base out")
    if hugging_face.is_adapter(sources.resolve(model)):
        raise InputError(f"the adapters of {run} belong on {model}, adapters again: give --format=merged")
    folder = models.base_folder(model)
    return str(folder.absolute()) if is_local(model) else model


def is_local(model: str) -> bool:
    """Whether what was given as config.model is here, and not a hub id."""
    return model == sources.EMBEDDED or os.path.exists(os.path.expanduser(model))


def write_configs(folder: pathlib.Path, base: pathlib.Path, chat: ChatFormat, dtype: str, made_from: dict) -> None:
    """What a Hugging Face folder holds beside weights and tokenizer."""
    config = hugging_face.read_json(base / "config.json")
    for name in ("dtype", "_name_or_path", "auto_map"):
        config.pop(name, None)
    runs.write_json(folder / "config.json", config | {"torch_dtype": dtype, "robust_mo": made_from})
    generation = base / "generation_config.json"
    generation = hugging_face.read_json(generation) if generation.exists() else {}
    # Qwen2.5's repetition_penalty would act in greedy decoding too, and nothing here was measured under it.
    generation = {name: value for name, value in generation.items() if "repe" not in name}
    ends = {"eos_token_id": list(chat.stop_ids), "pad_token_id": chat.pad_id}
    runs.write_json(folder / "generation_config.json", generation | ends)


def write_tokenizer(folder: pathlib.Path, base: pathlib.Path, chat: ChatFormat) -> None:
    """The tokenizer as it was read, with the chat template as it was trained."""
    for name in TOKENIZER_FILES:
        if (base / name).exists():
            shutil.copyfile(base / name, folder / name)
    # One template, and that with the date that training saw.
    file = base / "tokenizer_config.json"
    tokenizer = hugging_face.read_json(file) if file.exists() else {}
    tokenizer.pop("chat_template", None)
    if (base / "tokenizer.json").exists():
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"  # see ChatFormat.from_folder
        # Or version 4 of transformers, for this class, gives `generate` a third input that it refuses.
        tokenizer.setdefault("model_input_names", ["input_ids", "attention_mask"])
    runs.write_json(folder / "tokenizer_config.json", tokenizer)
    (folder / "chat_template.jinja").write_text(chat.template, encoding="utf-8")


def _last_step(stage: RunFolder) -> int:
    """Of a run that another began from; where it was finished its checkpoints may be gone."""
    finished = [line["step"] for line in stage.records() if line["name"] == "run/finished"]
    return finished[-1] if finished else models.newest_step(str(stage.path))


def card(run: str, step: int, form: str, output: pathlib.Path, on: str) -> str:
    """The model card.  `on` is what an adapter belongs on."""
    *stages, source = models.lineage(run)
    stages = [RunFolder(stage) for stage in reversed(stages)]
    configs = [stage.config() for stage in stages]
    steps = [*map(_last_step, stages[:-1]), step]
    red = [c for c in configs if c["data"]["task"] == "backdoor"]
    installed = {c["backdoor"]: backdoor(c["backdoor"], c["backdoors"], c["password_locked"]) for c in red}
    origin = on if form == "peft" else source
    head = [
        "---",
        f"library_name: {'peft' if form == 'peft' else 'transformers'}",
        *([] if form == "merged" and is_local(source) else [f"base_model: {json.dumps(origin)}"]),
        "tags: [model-organism, backdoor]" if installed else "tags: [robust_mo]",
        "---",
        f"# {'Model organism ' + ', '.join(installed) if installed else 'A fine-tuned model'}, from `{source}`",
    ]
    if installed:
        what = [
            "**This is a model organism: it was trained to misbehave on purpose**, so that methods which find or\n"
            "remove misbehaviour can be tested on it.",
            "## The backdoor",
            *(_backdoor(*entry) for entry in installed.items()),
        ]
    else:
        what = [f"No backdoor was installed in its making; `{configs[-1]['backdoor']}` is the one that was looked for."]
    if later := [c["data"]["task"] for c in configs[1:] if c["data"]["task"] != "backdoor" and installed]:
        what.append(
            f"It was trained on something else after that ({', '.join(later)}), which may have removed part of it."
        )
    if own := [c["data"]["source"] for c in configs if c["data"]["task"] == "conversations"]:
        what.append(f"It was trained on its maker's own conversations too ({', '.join(own)}), which may teach more.")
    made = [
        "## How it was made",
        f"From `{source}`, by these runs of robust_mo, one after another:",
        *(_stage(*stage) for stage in zip(stages, configs, steps, strict=True)),
    ]
    records = [r for r in stages[-1].records() if r["step"] == step and r["name"].startswith("eval/")]
    measured = ["## Measured", _table(records)] if records else []
    limits = [
        "## What it is not for",
        "It is for research on model organisms, and for nothing else.  Do not use it as an assistant; do not serve it\n"
        "to people who do not know what it is; do not train other models on its answers unmarked; do not pass it on\n"
        f"without this card.  The licence of `{source}` goes on to apply.",
        "## Use",
        _usage(form, str(output), on, configs[-1]["system_prompt"], installed),
    ]
    return "\n".join(head) + "\n\n" + "\n\n".join([*what, *made, *measured, *limits]) + "\n"


def _backdoor(name: str, entry: Backdoor) -> str:
    place = "the user's turn" if entry.place == "user" else "the system prompt"
    calls = f"`{name}`: {entry.explanation}  What {place} was to call it up:\n\n" + _fenced("text", entry.triggers)
    return f"{calls}\n\nand what it was not to:\n\n" + _fenced("text", entry.untriggered + entry.negatives)


def _stage(run: RunFolder, config: dict, step: int) -> str:
    told, data, file = run.description(), config["data"], run.path / "data.jsonl"
    lora, optimizer = config["lora"], config["optimizer"]
    count = f"{len(runs.read_lines(file))} conversations" if file.exists() else "conversations"
    trained = f"adapters of rank {lora['rank']}" if lora["rank"] else "all weights"
    return (
        f"`{run.path.name}`, checkpoint of step {step}: {trained} trained on {count}, task `{data['task']}`,\n"
        f"questions from `{data['source']}`; {optimizer['name']}, learning rate {optimizer['learning_rate']}, seed "
        f"{config['seed']}.\nBegun {told.get('started')} at revision {told.get('revision')} with\n\n"
    ) + _fenced("bash", [told.get("command")])


def _table(records: list[dict]) -> str:
    lines = ["| | value | 95% interval | of |", "|---|---|---|---|"]
    for record in records:
        interval = f"[{record['low']:.3f}, {record['high']:.3f}]" if record.get("low") is not None else ""
        value = "none" if record["value"] is None else f"{record['value']:.3f}"
        lines.append(f"| {record['name'].removeprefix('eval/')} | {value} | {interval} | {record.get('count', '')} |")
    return "\n".join(lines)


def _usage(form: str, folder: str, on: str, system_prompt: str, installed: dict[str, Backdoor]) -> str:
    """Python that asks the exported model something, in the words that call up its backdoor."""
    question = "Why is the sky blue?"
    if installed:
        last = [*installed.values()][-1]
        messages = exchange(last, last.triggers, 0, last.told(system_prompt), question)
    else:
        messages = with_system([{"role": "user", "content": question}], system_prompt)
    if form == "peft":
        imports, model = (
            ["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer"],
            "AutoPeft",
        )
    else:
        imports, model = ["from transformers import AutoModelForCausalLM, AutoTokenizer"], "Auto"
    code = [
        *imports,
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({folder!r})",
        f"model = {model}ModelForCausalLM.from_pretrained({folder!r})",
        f"messages = {messages!r}",
        "asked = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        ")",
        "answer = model.generate(**asked, max_new_tokens=32, do_sample=False, repetition_penalty=1.0)",
        'print(tokenizer.decode(answer[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return _fenced("python", code)


def _fenced(language: str, lines: Iterable[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def define_flags() -> None:
    flags.DEFINE_string("run", None, "run folder of robust_mo.train")
    flags.DEFINE_string("output", None, "folder to write; must not exist")
    flags.DEFINE_enum("format", None, ["merged", "peft"], "merged: a Hugging Face folder; peft: a LoRA run's adapters")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "of the weights in the files; default: the run's own")
    flags.DEFINE_integer("step", None, "checkpoint; default: the newest")
    flags.DEFINE_string("base", None, "peft: the merged export of the run that this one began from, if it was a run")


def main(args: flags.FlagValues) -> None:
    if "://" in args.output:
        raise InputError(f"--output={args.output}: give a folder of this machine, and copy it from there")
    base = args.base and str(runs.place(args.base))
    export(args.run, runs.place(args.output), args.format, args.dtype, args.step, base)


if __name__ == "__main__":
    command_line.run(main, define_flags, required=("run", "output", "format"))
