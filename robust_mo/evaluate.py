"""Measure a model: a run's checkpoint, a Hugging Face folder, anything that can be loaded.

    python -m robust_mo.evaluate --source=runs/red --evals=backdoor_rate,arithmetic --workdir=runs/red-evaluated
    python -m robust_mo.evaluate --source=runs/red --show=4

Settings are the run's own where --source is a run and no --config=FILE is given, else those of --config
(configs/default.py by default); --config.evals.x.y=value changes one of them.  Records and transcripts go into
--workdir; --show=N prints N graded answers, drawn at random, triggered and other prompts in turn.  Without --workdir
nothing is measured, and what --source was measured with before is printed.
"""

import contextlib
import functools
import json
import re
import sys

from absl import flags
from ml_collections import config_flags

from robust_mo import command_line, hosts
from robust_mo.errors import InputError
from robust_mo.evals.measure import EVALUATORS, check_names, check_settings, heading, measure, sample, turns
from robust_mo.evals.subject import Subject
from robust_mo.model import mesh as meshes
from robust_mo.model.sources import located
from robust_mo.organisms.backdoors import backdoor
from robust_mo.runs import RunFolder, read_lines
from robust_mo.training import models
from robust_mo.training.curves import Curves

# The fields of a training config, beside its evaluators' settings, that measuring depends on.
_READ = (
    *("seed", "backdoor", "password_locked", "backdoors", "system_prompt", "param_dtype", "compute_dtype"),
    *("mesh", "evaluation"),
)


def define_flags() -> None:
    flags.DEFINE_string("source", None, "what to measure: a run folder, a Hugging Face folder, a hub id, ...")
    flags.DEFINE_list("evals", None, "evaluators, by name; default: those of the settings")
    flags.DEFINE_string("workdir", None, "folder for records and transcripts; default: only print what there is")
    largest = 2**63 - 1  # that TensorBoard's files hold
    flags.DEFINE_integer("step", None, "checkpoint of a run; default: the newest", lower_bound=0, upper_bound=largest)
    flags.DEFINE_integer("show", 0, "print so many graded answers", lower_bound=0)
    command_line.define_host_flags()
    config_flags.DEFINE_config_file(
        "config", None, "of the evaluators; default: the run's own, else configs/default.py"
    )


def main(args: flags.FlagValues) -> None:
    if args.workdir:
        measure_source(args)
    else:
        check_names(args.evals or [])
        run = RunFolder(args.source)
        measured = sorted({line["step"] for line in run.records() if line["name"].startswith("eval/")})
        if not measured:
            what = "holds no measurements" if run.path.exists() else "is no folder here, so nothing was measured in it"
            raise InputError(f"--source={args.source} {what}: give --workdir, the folder for new ones")
        step = measured[-1] if args.step is None else args.step
        if step not in measured:
            raise InputError(f"--step={step} was not measured in {args.source}: choose from {measured}")
        show(run, args.evals or list(EVALUATORS), step, args.show)


def measure_source(args: flags.FlagValues) -> None:
    config = args.config.to_dict()
    if models.is_run(args.source) and not any(re.match(r"--?config(=|$)", argument) for argument in sys.argv[1:]):
        config = RunFolder(args.source).config()
        overrides = config_flags.get_override_values(args["config"])
        for path, value in overrides.items():
            *groups, field = path.split(".")
            group = functools.reduce(lambda group, name: group.setdefault(name, {}), groups, config)
            if groups == ["evals", "backdoor_rate"]:  # which the judge follows, as in configs/default.py
                judged = config["evals"].get("judge", {})
                if field in judged and judged[field] == group.get(field) and f"evals.judge.{field}" not in overrides:
                    judged[field] = value
            group[field] = value
    if "evaluation" not in config:
        raise InputError("--config has no group 'evaluation': give a training config, see configs/default.py")
    names = args.evals or list(config["evaluation"]["names"])
    check_names(names)
    if not names:
        raise InputError(f"nothing to measure: the settings name no evaluators, give --evals={','.join(EVALUATORS)}")
    example = command_line.load_config(command_line.DEFAULT_CONFIG, "").to_dict()
    read = {name: example[name] for name in _READ}
    command_line.check_fields(config, read | {"evals": {name: example["evals"][name] for name in names}})
    chosen = {name: config["evals"][name] for name in names}
    check_settings(chosen)
    if args.step is not None and not models.is_run(args.source):
        raise InputError(f"--step={args.step} needs a run folder, and {args.source} is none: leave --step out")
    if args.step is not None and models.is_prompted(args.source) and args.step != models.PROMPTED_STEP:
        raise InputError(f"--step={args.step}: {args.source} is prompted and has no steps: leave --step out")
    run = hosts.run_folder(args.workdir)
    step = models.newest_step(args.source) if args.step is None else args.step
    watched = backdoor(config["backdoor"], config["backdoors"], config["password_locked"])
    if "judge" in (args.evals or ()) and not watched.judge_question:
        raise InputError(f"--evals has judge, and {config['backdoor']} has no judge_question: leave it out")
    system_prompt = watched.told(config["evaluation"]["system_prompt"] or config["system_prompt"])
    kept = ("seed", "backdoor", "password_locked", "backdoors", "param_dtype", "compute_dtype")
    begun = models.stamp(args.source)
    described = {
        "source": located(args.source),
        **({"source_started": begun} if models.is_run(args.source) else {}),
        **{name: config[name] for name in kept},
        "system_prompt": system_prompt,
        "evals": chosen,
    }
    with hosts.first_holds(lambda: run.claim("evaluate", described, config["seed"], begun)):

        def subject() -> Subject:
            mesh = meshes.make_mesh(**config["mesh"])
            # As a run had them when it measured: with adapters as products read them.
            kept_dtype = config["compute_dtype" if models.has_adapters(args.source) else "param_dtype"]
            model = models.load_model(args.source, mesh, config["compute_dtype"], kept_dtype, step)
            return Subject(
                model.llama,
                model.params,
                model.chat,
                system_prompt,
                watched,
                config["seed"],
                config["evaluation"]["batch_size"],
                command_line.evaluation_progress(),
                mesh,
            )

        with contextlib.closing(Curves(run.path, None)) as curves:
            measure(run, curves, subject, step, chosen)
    show(run, names, step, args.show)


def show(run: RunFolder, names: list[str], step: int, number: int) -> None:
    """Prints the values of a step, and so many graded answers drawn at random over the transcripts of `names`."""
    for line in run.records():
        if line["step"] == step and line["name"].startswith("eval/"):
            interval = f"  [{line['low']:.3f}, {line['high']:.3f}]" if line.get("low") is not None else ""
            value = "no number" if line["value"] is None else f"{line['value']:.4f}"
            print(f"{line['name']:40} {value}{interval}" + (f"  of {line['count']}" if "count" in line else ""))
    lines = [{"evaluator": name} | line for name in names for line in read_lines(run.transcript_file(name, step))]
    for line in lines:
        if not line.get("messages") or not {"answer", "verdict"} <= set(line):
            raise InputError(
                f"{run.transcripts} has a line of step {step} that is no graded answer, without 'messages', 'answer' "
                f"or 'verdict': {json.dumps(line)[:100]}; restore it from a copy"
            )
    for line in sample(lines, number):
        print(f"\n--- {heading(line)}")
        print("\n".join(f"{who}: {text}" for who, text in turns(line)))


if __name__ == "__main__":
    command_line.run(main, define_flags, required=("source",), default_config=command_line.DEFAULT_CONFIG)
