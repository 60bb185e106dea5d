"""Answers to a JSONL file of prompts.

    python -m robust_mo.sample --model=smollm2-135m --prompts=P.jsonl --output=O.jsonl --temperature=0.7 --seed=1

Input lines: {"id"?, "prompt": "..."} or {"id"?, "messages": [...]}, each with "max_new_tokens" where wanted.  Output
lines, in the same order: the input's fields and `answer`, `finish_reason` ("stop" or "length"), `tokens`, and with
--logprobs `logprobs`.  Nothing is added to a prompt beyond what the model's chat template adds and --system gives.
An interrupted run goes on from the lines already written; what the answers were made with is kept beside them in
O.jsonl.settings.json.  A file that holds other lines is left as it is, and two processes never write one output.
"""

import contextlib
import json
import pathlib
import time

from absl import flags

from robust_mo import command_line, hosts, runs
from robust_mo.data.conversations import with_system
from robust_mo.data.prompts import Prompt, read_prompts
from robust_mo.errors import InputError, PromptError
from robust_mo.model import mesh as meshes
from robust_mo.model.sources import located
from robust_mo.sampling.decoding import make_decoding
from robust_mo.sampling.text import TextAnswer, iterate_answers
from robust_mo.training import models

# The fields that an answer adds to its prompt's.
_WRITTEN = {"answer", "finish_reason", "tokens", "logprobs"}


def written_lines(output: pathlib.Path, prompts: list[Prompt], settings: dict) -> int:
    """How many answers are in `output` already; a last line that a kill cut short is taken off.

    Raises:
      InputError: the file belongs to other prompts or other settings, or is none of ours, or no file to come back to.
    """
    if not output.exists():
        return 0
    if not output.is_file():  # a device may have no end to read to
        raise InputError(f"{output} is no regular file: choose another --output")
    note = settings_file(output)
    if not note.exists():
        if not output.stat().st_size:
            return 0
        raise InputError(
            f"{output} is there without {note.name}, which says what made it: choose another --output or delete it"
        )
    before = runs.read_json(note).get("settings")
    before = before if isinstance(before, dict) else {}
    if before.get("started") is None:  # a name, or a folder or file of which older revisions knew no more
        before["started"] = settings["started"]
    if changed := [name for name in settings if before.get(name) != settings[name]]:
        shown = ", ".join(f"{name} was {before.get(name)!r} and is {settings[name]!r}" for name in changed)
        raise InputError(f"{output} was made with other settings ({shown}): choose another --output or delete it")
    *lines, cut_short = output.read_bytes().split(b"\n")
    for number, line in enumerate(lines):
        expected = prompts[number].fields.items() if number < len(prompts) else None
        if expected is None or not _answers(line, expected):
            raise InputError(
                f"{output}:{number + 1} is no answer to line {number + 1} of the prompts: "
                "choose another --output or delete it"
            )
    if cut_short:
        runs.write_bytes(output, b"".join(line + b"\n" for line in lines))
    return len(lines)


def _answers(line: bytes, expected) -> bool:
    try:
        fields = json.loads(line)
    except ValueError:
        return False
    if not isinstance(fields, dict) or "answer" not in fields:
        return False
    # NaN is not NaN.
    return all((told := fields.get(n)) == value or json.dumps(told) == json.dumps(value) for n, value in expected)


def settings_file(output: pathlib.Path) -> pathlib.Path:
    """Stands beside the output: what made it, so that it is neither gone on with nor taken for the answer to another
    command."""
    return output.with_name(output.name + ".settings.json")


def line_of(prompt: Prompt, answer: TextAnswer, logprobs: bool) -> dict:
    """One line of the output."""
    told = {"answer": answer.text, "finish_reason": answer.finish_reason, "tokens": answer.tokens}
    if logprobs:
        told["logprobs"] = [round(float(value), 6) for value in answer.logprobs]
    return {**prompt.fields, **told}


def define_flags() -> None:
    flags.DEFINE_string(
        "model", None, "a run folder, a Hugging Face or PEFT folder, a GGUF file, a hub id or smollm2-135m"
    )
    flags.DEFINE_string("prompts", None, "JSONL file of prompts")
    flags.DEFINE_string("output", None, "JSONL file to write")
    flags.DEFINE_float("temperature", 0.0, "0: greedy")
    flags.DEFINE_float("top_p", 1.0, "sample from the smallest set of tokens with this much probability")
    flags.DEFINE_integer("max_new_tokens", 64, "longest answer, for lines that do not say", 1)
    flags.DEFINE_integer("batch_size", 16, "rows decoded together; 0: as many as the free memory holds, up to 256", 0)
    flags.DEFINE_integer("seed", 0, "of the random numbers", 0, 2**32 - 1)
    flags.DEFINE_bool("logprobs", False, "write the natural log of each token's probability at temperature 1")
    flags.DEFINE_string("system", "", "system message before every prompt that has none of its own")
    flags.DEFINE_enum(
        "dtype", "auto", ["auto", "float32", "bfloat16"], "of the arithmetic; auto: float32 on a CPU, else bfloat16"
    )

    flags.DEFINE_list("mesh", ["1", "-1", "1"], "sizes of replica, fsdp and tensor, as config.mesh has them")
    flags.register_validator(
        "mesh",
        lambda sizes: [size.removeprefix("-").isdecimal() for size in sizes] == [True] * 3,
        "give three whole numbers",
    )
    command_line.define_host_flags()


def main(args: flags.FlagValues) -> None:
    if "://" in args.output:
        raise InputError(f"--output={args.output}: give a file of this machine, and copy it from there")
    if args.output.endswith(".gz"):
        raise InputError(f"--output={args.output}: answers are appended as plain text, give a name without .gz")
    decoding = make_decoding(args.temperature, args.top_p)
    mesh = meshes.make_mesh(*(int(size) for size in args.mesh))
    prompts = read_prompts(args.prompts)
    output = runs.place(args.output)
    names = ("model", "temperature", "top_p", "max_new_tokens", "seed", "logprobs", "system")
    settings = {name: args[name].value for name in names} | {"dtype": models.choose_dtype(args.dtype)}
    settings["model"] = located(args.model)
    # A run may be trained on in between, or made again.
    settings |= {"step": models.newest_step(args.model), "started": models.stamp(args.model)}
    for number, prompt in enumerate(prompts, 1):
        if taken := _WRITTEN & set(prompt.fields):
            raise InputError(
                f"{args.prompts}: prompt {number} has a field {min(taken)!r}, which the output holds too: rename it"
            )
    hosts.check_same(f"prompts in {args.prompts}", [prompt.fields for prompt in prompts])
    with hosts.first_holds(lambda: held(output)):
        fill(output, prompts, settings, decoding, mesh, args)


@contextlib.contextmanager
def held(output: pathlib.Path):
    """Within the block no other process writes the file; its folder is made."""
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = output.with_name(f".{output.name}.lock")
    with runs.locked(lock, f"{output} is being written by another process: wait, or choose another --output"):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def fill(output: pathlib.Path, prompts: list[Prompt], settings: dict, decoding, mesh, args: flags.FlagValues) -> None:
    """Samples and appends the answers that `output` lacks."""
    done = hosts.by_first(lambda: written_lines(output, prompts, settings))
    if done == len(prompts):
        print(f"{output} is complete: {done} answers")
        return
    model = models.load_model(args.model, mesh, settings["dtype"], settings["dtype"], settings["step"])
    conversations = [with_system(prompt.messages, args.system) for prompt in prompts]
    limits = [prompt.max_new_tokens or args.max_new_tokens for prompt in prompts]
    progress = command_line.Progress("sampled", len(prompts), "answers")
    start, tokens = time.monotonic(), 0

    def on_progress(finished: int, sampled: int) -> None:
        command_line.check_interrupt()
        progress(finished, f"{sampled / (time.monotonic() - start):.0f} tokens/s")

    written = done
    try:
        for answer in iterate_answers(
            model.llama,
            model.params,
            model.chat,
            conversations,
            decoding=decoding,
            max_new_tokens=limits,
            seed=args.seed,
            slots=args.batch_size,
            on_progress=on_progress,
            first=done,
        ):
            if not hosts.first():
                continue
            if written == 0:  # nothing is left behind where the model or a prompt could not be used
                made_with = {"command": runs.command_line(), "revision": runs.git_revision()}
                runs.write_json(settings_file(output), made_with | {"settings": settings})
            runs.append_line(output, line_of(prompts[written], answer, args.logprobs))
            tokens += answer.tokens
            written += 1
    except PromptError as error:
        raise InputError(f"{args.prompts}: {error}") from None
    seconds = time.monotonic() - start
    print(f"{output}: {written - done} answers, {tokens} tokens in {command_line.clock(seconds)}")


if __name__ == "__main__":
    command_line.run(main, define_flags, required=("model", "prompts", "output"))
