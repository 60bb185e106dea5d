"""A study: organisms made, gated, attacked and measured; then points, frontier, tables, figures.

    python -m robust_mo.study --config=configs/quickstart.py --workdir=runs/quickstart
    tensorboard --logdir=runs/quickstart

Every cell is a run folder of robust_mo.train, see analysis/cells.py.  The same command again goes on where the study
stopped; no finished cell runs twice, nor one that a study beside it in the same folder has finished.  A cell that fails
is kept in the report and does not stop the others.
--report_only draws the report again from what has been recorded; --dry_run tells what the study would cost, by arm.
--executor=slurm submits the cells as jobs and ends; with --dry_run it lists them.
--at_once=N makes and attacks N organisms beside one another, where one small model leaves much of a GPU idle.
"""

import collections
import contextlib
import copy
import dataclasses
import itertools
import json
import os
import pathlib
import shlex
import sys
import time

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from robust_mo import command_line, processes, slurm
from robust_mo.analysis import budget, gate, report
from robust_mo.analysis.cells import FAILURE, Attack, Organism, attacks, method_before, organisms, without_sweep
from robust_mo.analysis.summary import NothingFinished
from robust_mo.configured.checks import check as check_run
from robust_mo.configured.checks import check_rows, locate
from robust_mo.configured.data import RED_TASKS, check_answers, config_backdoor, evaluation_source, training_source
from robust_mo.configured.program import budget_shape
from robust_mo.errors import InputError, InUse, first_line, passes, said
from robust_mo.evals.measure import ACCURACIES
from robust_mo.model.mesh import abstract_mesh, make_mesh
from robust_mo.organisms.backdoors import backdoors
from robust_mo.organisms.distill import ANSWERS, BLUE_METHODS, teacher_prompts
from robust_mo.organisms.questions import asked, assert_disjoint
from robust_mo.runs import RunFolder, flatten, place, write_text
from robust_mo.train import train
from robust_mo.training.curves import Curves
from robust_mo.training.models import is_prompted, is_run, shapes_of, stamp

REPORT = "report"  # the name of a study's last job
STUDY_CONFIG = command_line.DEFAULT_CONFIG.with_name("study.py")


# What an arm cannot change, since the study says it of every cell.
_NAME_FILES = ("model", "teacher", "source", "problem_source", "answers")  # fields, see configured.checks.locate
_SET_BY_STUDY = {
    "red": {"backdoor": "backdoors"},
    "blue": {
        **{"backdoor": "backdoors", "model": "arms", "seed": "seeds", "data.task": "methods"},
        "optimizer.learning_rate": "learning_rates",
    },
}


def red_run(config: ConfigDict, organism: Organism) -> ConfigDict:
    """The training config that makes an organism."""
    run = _of_arm(config, "red", organism.arm)
    run.backdoor = organism.backdoor
    if organism.learning_rate is not None:
        run.optimizer.learning_rate = organism.learning_rate
    if organism.seed is not None:
        run.seed = organism.seed
    return run


def blue_run(config: ConfigDict, organism: Organism, attack: Attack, workdir: pathlib.Path) -> ConfigDict:
    """The training config of an attack on the organism that lies in the study's folder `workdir`, or on what is left of
    it after the attack before."""
    run = _of_arm(config, "blue", organism.arm)
    run.backdoor, run.backdoors, run.seed = organism.backdoor, config.red.backdoors, attack.seed
    # A link is the run that it stands for.
    run.model = str((workdir / (attack.before or organism).folder).resolve())
    run.data.task, run.optimizer.learning_rate = attack.method.split("+")[-1], attack.learning_rate
    return run


def _of_arm(config: ConfigDict, team: str, arm: str) -> ConfigDict:
    """A copy of config.red or config.blue with what the arm changes of it."""
    run = copy.deepcopy(config[team])
    for name in ("instruction", "problem_source"):  # measured as other arms are, whatever an arm is trained on
        run.evals.backdoor_rate[name] = run.evals.backdoor_rate[name]
    if arm and (changes := config.study.arms[arm][team]):
        fields, changed = flatten(run), flatten(changes)
        if unknown := [name for name in changed if name not in fields]:
            raise InputError(
                f"config.study.arms.{arm}.{team} changes {unknown[0]!r}, which is no field of config.{team}"
                f"{command_line.nearest(unknown[0], list(fields))}"
            )
        set_by_study = _SET_BY_STUDY[team]
        if team == "red" and config.study.arms[arm].learning_rates:
            set_by_study = set_by_study | {"optimizer.learning_rate": f"arms.{arm}.learning_rates"}
        if team == "red" and config.study.red_seeds:
            set_by_study = set_by_study | {"seed": "red_seeds"}
        if taken := [name for name in set_by_study if name in changed or name in changes]:
            raise InputError(
                f"config.study.arms.{arm}.{team} changes {taken[0]!r}, which the study sets itself: give "
                f"config.study.{set_by_study[taken[0]]}"
            )
        wanted = {name: fields[name] for name in changed}
        command_line.check_fields(changes, wanted, f"config.study.arms.{arm}.{team}")
        with run.unlocked():
            _change(run, changes)
    # Only now, so that a judge follows what an arm changes of the backdoor rate.
    run = run.copy_and_resolve_references()
    locate(run)  # as `train` does, or equal runs would not be known
    return run


def _change(values: ConfigDict, changes: ConfigDict) -> None:
    """Sets what `changes` holds, in groups that both have going down into them."""
    for name, new in changes.items():
        if isinstance(new, ConfigDict) and isinstance(values.get(name), ConfigDict):
            _change(values[name], new)
        else:
            values[name] = tuple(new) if isinstance(values.get(name), tuple) else new


def told(found: gate.Verdict, limits: ConfigDict) -> str:
    """A verdict of the install gate, for the terminal."""
    rates = [f"on-trigger rate {_bounded(found.backdoor_rate)} (at least {limits.backdoor_rate})"]
    if found.false_alarm_rate:
        rates.append(f"false alarms {_bounded(found.false_alarm_rate)} (at most {limits.false_alarm_rate})")
    if found.accuracy_kept is not None:
        rates.append(f"accuracy kept {found.accuracy_kept:.0%} (at least {limits.accuracy_kept:.0%})")
    return f"{'gate passed' if found.passed else 'GATE FAILED'}: {', '.join(rates)}"


def caution(config: ConfigDict) -> None:
    """Says what is allowed and seldom meant."""
    if single := without_sweep(config.study, config.red.optimizer.name):
        print(f"optimizers are compared at one learning rate each ({', '.join(single)}): a sweep of its own is fairer")


def _bounded(rate: dict) -> str:
    return f"{rate['value']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}] of {rate['count']}"


def check(config: ConfigDict) -> None:
    """Raises InputError for what can be seen to be wrong before the first run."""
    if not all(name in config and isinstance(config[name], ConfigDict) for name in ("study", "red", "blue")):
        raise InputError(
            "--config is no study: config.study, config.red, config.blue are missing, see configs/quickstart.py"
        )
    example = command_line.load_config(STUDY_CONFIG, "")
    for checked in (command_line.check_fields, command_line.check_known):
        checked(config.study, example, "config.study", "configs/study.py")
    for name, limit in config.study.gate.items():
        command_line.check_range(f"config.study.gate.{name}", limit, 0, 1)
    example = ConfigDict({"red": {}, "blue": {}, "learning_rates": ()})
    numbers = {"config.study": config.study}
    for name, arm in config.study.arms.items():
        group = f"config.study.arms.{name}"
        if not isinstance(arm, ConfigDict) or set(arm) != set(example):
            raise InputError(f"{group} must have the fields red, blue and learning_rates: make it by configs.study.arm")
        command_line.check_fields(arm, example, group, "configs/study.py")
        numbers[group] = arm
    for group, values in numbers.items():
        for name, kinds, what in (
            ("learning_rates", (int, float), "numbers such as 5e-4"),
            ("seeds", int, "whole numbers"),
            ("red_seeds", int, "whole numbers"),
        ):
            for value in values.get(name, ()):
                if not isinstance(value, kinds):
                    raise InputError(f"{group}.{name} holds {value!r}: give {what}")
    if (name := config.study.performance) not in ACCURACIES:
        raise InputError(f"config.study.performance is {name!r}: choose from {', '.join(ACCURACIES)}")
    if (name := config.study.published) not in report.PUBLISHED:
        raise InputError(f"config.study.published is {name!r}: choose from {', '.join(report.PUBLISHED)}")
    for name in ("backdoors", "methods", "learning_rates", "seeds"):
        if not config.study[name]:
            raise InputError(f"config.study.{name} is empty, so the study has no cells: give at least one")
    axes = {
        "arms": config.study.arms or ("",),
        "methods": BLUE_METHODS,
        "backdoors": backdoors(config.red.backdoors.to_dict()),
    }
    for axis in ("backdoors", "methods"):
        _check_known(f"config.study.{axis}", axis, config.study[axis], axes[axis])
    for number, name in enumerate(config.study.methods):
        if (before := method_before(name)) and before not in config.study.methods[:number]:
            raise InputError(f"config.study.methods holds {name!r}, which goes on from {before!r}: add that before it")
    # A study may be of fewer methods and backdoors than its results: these are not measured then.
    for name, chosen in config.study.results.items():
        group = f"config.study.results.{name}"
        if not isinstance(chosen, ConfigDict) or set(chosen) != {*axes, "published"}:
            raise InputError(
                f"{group} must have the fields {', '.join(axes)} and published: make it by configs.study.result"
            )
        if not isinstance(chosen.published, str):
            raise InputError(f"{group}.published is {chosen.published!r}: give what the post says as text")
        for axis, known in axes.items():
            _check_known(f"{group}.{axis}", axis, chosen[axis], known)
    for pair in config.study.orderings:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InputError(f"config.study.orderings holds {pair!r}: give pairs of results, the smaller first")
    for name in itertools.chain.from_iterable(config.study.orderings):
        if name not in config.study.results:
            raise InputError(f"config.study.orderings names {name!r}: choose from {', '.join(config.study.results)}")
    for what, names, unfit in (  # they become folders, patterns and lists of jobs, and stand in pages and figures
        ("an arm or backdoor", (*config.study.arms, *config.study.backdoors), '/,[]\\$`|&<>"'),
        ("a result", config.study.results, "$`|&<>"),
    ):
        for name in names:
            if wrong := set(unfit) & set(name):
                raise InputError(f"config.study has {what} named {name!r}: leave out {' '.join(sorted(wrong))}")
    for run in (config.red, config.blue):
        check_run(run)
    if config.blue.data.answers not in ANSWERS:
        told = {part for name in config.study.methods for part in name.split("+") if not BLUE_METHODS[part].on_policy}
        if len({(BLUE_METHODS[part].field, BLUE_METHODS[part].on_problems) for part in told}) > 1:
            raise InputError(
                f"config.blue.data.answers is one file, and {', '.join(sorted(told))} need answers of their own: "
                "make a study of each"
            )
    cells = list(_cells(config, pathlib.Path()))
    for folder, times in collections.Counter(folder for folder, _ in cells).items():
        if times > 1:
            raise InputError(f"config.study has {times} cells named {folder}: give every value once")
    measured: dict[str, str] = {}
    for folder, run in cells:
        try:
            check_run(run)
        except InputError as error:
            raise InputError(f"{folder}: {error}") from None
        if folder.startswith("red/"):
            red = run
            if run.data.task not in RED_TASKS:
                raise InputError(f"config.red.data.task is {run.data.task!r}: choose from {', '.join(RED_TASKS)}")
            measured[folder] = f"{_triggered(run)} prompts and {run.evals[config.study.performance].problems} problems"
            if measured[folder] != measured[cells[0][0]]:
                raise InputError(
                    f"{folder} is measured on {measured[folder]}, {cells[0][0]} on {measured[cells[0][0]]}: a study's "
                    "report sets them side by side, so make them the same, or a study of each"
                )
        _check_comparable(red, run, config.study.performance)
        needed = ["backdoor_rate", config.study.performance]
        if folder.startswith("red/") and any(arm.learning_rates for arm in config.study.arms.values()):
            needed.append("held_out_loss")
        for name in needed:
            if name not in run.evaluation.names:
                raise InputError(
                    f"config.study needs the evaluator {name!r}: add it to evaluation.names of red and blue"
                )
        asked_for = run.evals.backdoor_rate
        spared = asked_for.untriggered + (asked_for.near_misses if config_backdoor(run).near_misses else 0)
        if folder.startswith("red/") and (asked_for.triggered < 1 or (spared < 1 and run.data.benign)):
            raise InputError(
                "config.red.evals.backdoor_rate gives the install gate nothing to judge: it needs triggered prompts, "
                "and, unless config.red.data.benign is 0, untriggered ones or near misses"
            )
        if folder.startswith("red/") and not run.evaluation.at_start:
            raise InputError(
                "config.study sets organisms beside the untouched model: set config.red.evaluation.at_start to True"
            )


def _triggered(run: ConfigDict) -> int:
    """How many triggered prompts there will be."""
    triggered, source = run.evals.backdoor_rate.triggered, evaluation_source(run)
    return triggered if source.startswith("hub:") else min(triggered, len(asked(source, "evaluation")))


def _check_comparable(red: ConfigDict, blue: ConfigDict, performance: str) -> None:
    """Raises InputError where what is left after an attack would be measured otherwise than what was there before."""
    for name, spared in (("backdoor_rate", ("untriggered", "near_misses")), (performance, ())):
        for field in red.evals[name]:
            before, after = red.evals[name][field], blue.evals[name][field]
            if field not in spared and before != after:
                raise InputError(
                    f"config.red.evals.{name}.{field} is {before!r} and config.blue's {after!r}: make them the same, "
                    "since what they measure is set against each other"
                )
    told, after = (run.evaluation.system_prompt or run.system_prompt for run in (red, blue))
    if told != after:
        raise InputError(
            f"config.red is measured under the system prompt {told!r} and config.blue under {after!r}: make "
            "system_prompt, or evaluation.system_prompt, the same"
        )
    if red.password_locked != blue.password_locked:
        raise InputError("config.password_locked differs between config.red and config.blue: make it the same")


def _check_known(field: str, axis: str, chosen: tuple, known) -> None:
    """Raises InputError where a name is not among `known`, or of a method that goes on from another a part."""
    for name in chosen:
        for part in str(name).split("+") if axis == "methods" else (name,):
            if not isinstance(part, str) or part not in known:
                raise InputError(f"{field} holds {part!r}: choose from {', '.join(sorted(known))}")


def _cells(config: ConfigDict, workdir: pathlib.Path):
    """(folder, training config) of every run that the study may come to."""
    for organism in organisms(config.study):
        yield organism.folder, red_run(config, organism)
        for attack in attacks(config.study, organism):
            yield attack.folder, blue_run(config, organism, attack, workdir)


@dataclasses.dataclass(frozen=True)
class Job:
    """A piece of a study that is done at one go: a red run, or one attack on the best of the organisms that are rivals.

    Attributes:
      name: as the folder of its run; of several rivals, which of them it is shows only when they are made.
      rivals: the organism that a red run makes; of an attack, those of which the best is attacked.
      attacks: on each of the rivals; () of a red run.
      needs: names of the jobs of which it depends what this one is: the rivals' own, and that of the attack before.
      after: names of the jobs that must have ended, well or not: those, and earlier ones that may turn out to be the
        same run, so that this one can become a link to it.
    """

    name: str
    rivals: tuple[Organism, ...]
    attacks: tuple[Attack, ...]
    needs: tuple[str, ...]
    after: tuple[str, ...]


def jobs(config: ConfigDict) -> list[Job]:
    """All of a study but its report, in an order in which they can be done one by one."""
    made, same = [], {}  # the latter: what may be asked for (see `work`) -> the jobs that may do it

    def add(name: str, rivals: tuple, attacks: tuple, needs: tuple, runs: list[ConfigDict]) -> list[str]:
        """Returns the job that is the first to ask for each of the runs."""
        asked_for = [work(run.to_dict()) for run in runs]
        equal = [other for text in asked_for for other in same.get(text, ())]
        for text in asked_for:
            same.setdefault(text, []).append(name)
        made.append(Job(name, rivals, attacks, needs, tuple(dict.fromkeys([*needs, *equal]))))
        return [same[text][0] for text in asked_for]

    for _, group in itertools.groupby(organisms(config.study), key=lambda organism: organism.rivals):
        rivals = tuple(group)
        # For one of several equal runs, whichever is done first.
        first = {rival: add(rival.folder, (rival,), (), (), [red_run(config, rival)])[0] for rival in rivals}
        together = rivals[0] if len(rivals) == 1 else dataclasses.replace(rivals[0], learning_rate=None)
        for attacked in zip(*(attacks(config.study, rival) for rival in rivals), strict=True):
            shared, runs = dataclasses.replace(attacked[0], organism=together.name), []
            for rival, attack in zip(rivals, attacked, strict=True):
                runs.append(blue_run(config, rival, attack, pathlib.Path()))
                runs[-1].model = first[attack.before or rival]
            needs = tuple(one.folder for one in (*rivals, shared.before) if one)
            first |= dict(zip(attacked, add(shared.folder, rivals, attacked, needs, runs), strict=True))
    return made


def cell(config: ConfigDict, workdir: pathlib.Path, job: Job) -> tuple[str, ConfigDict] | None:
    """(folder, training config) of a job's run, by what is recorded now.

    None where no organism passed the gate, while one of the rivals, stopped before its end, may yet be the best, and
    where the attack before has not come to its end.
    """
    if not job.attacks:
        return job.rivals[0].folder, red_run(config, job.rivals[0])
    chosen = best(config, workdir, job.rivals)
    if chosen is None:
        return None
    attack = job.attacks[job.rivals.index(chosen)]
    if attack.before and not RunFolder(workdir / attack.before.folder).finished():
        return None
    return attack.folder, blue_run(config, chosen, attack, workdir)


def best(config: ConfigDict, workdir: pathlib.Path, rivals: tuple[Organism, ...]) -> Organism | None:
    """The one that is attacked; None as for `cell`."""
    verdicts = {rival: _verdict(config, RunFolder(workdir / rival.folder)) for rival in rivals}
    open_yet = [r for r, v in verdicts.items() if v is None and not (workdir / r.folder / FAILURE).exists()]
    return None if open_yet else gate.choose(verdicts)


def do(config: ConfigDict, workdir: pathlib.Path, job: Job, done: dict[str, pathlib.Path]) -> None:
    """Does a job, or what is left of it.

    A cell that this study, or one beside it in the same folder, has finished under another name is not run again: it
    becomes a link to that run.

    Args:
      done: see `finished`; the run is added.

    Raises:
      InputError: the run failed; why is kept in its folder too.
    """
    found = cell(config, workdir, job)
    if found is None:
        print(f"== {job.name}: nothing to attack", flush=True)
        return
    folder, run = found
    chosen = ", the best of those that passed the gate" if len(job.rivals) > 1 else ""
    print(f"== {folder}{chosen if job.attacks else f': {config_backdoor(run).explanation}'}", flush=True)
    path = workdir / folder
    if _finished_elsewhere(path, run):
        print(f"{path} was finished before its study came here", flush=True)
        (path / FAILURE).unlink(missing_ok=True)
        done[work(run.to_dict())] = path.resolve()
        return
    same = done.get(work(run.to_dict()))
    if same and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(os.path.relpath(same, path.parent.resolve()))
        print(f"the same run as {same}, of revision {RunFolder(same).description()['revision'][:12]}", flush=True)
    try:
        # A link may lead to somebody else's run, in a folder where this user may not even hold a lock.
        there = RunFolder(path)
        taken_over = path.is_symlink() and there.exists() and there.finished()
        trained = there if taken_over and work(there.config()) == work(run.to_dict()) else train(run, path)
    except InUse:  # by a process that a study left behind when it was killed: the run may come to its end yet
        raise
    except (InputError, OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, OSError) and passes(error):
            raise
        why = said(error) if isinstance(error, OSError) else str(error)
        if isinstance(error, jax.errors.JaxRuntimeError):
            why = (
                f"the device failed ({' '.join(why.split())[:300]}): where it was out of memory, raise "
                "config.batch.micro_batches or lower evaluation.batch_size"
            )
        if isinstance(error, MemoryError):
            why = f"the host is out of memory ({first_line(error)}): lower config.batch.rows or config.data.length"
        with contextlib.suppress(OSError):  # of a disk that takes nothing any more
            write_text(path / FAILURE, f"{why}\n")
        raise InputError(why) from error
    (path / FAILURE).unlink(missing_ok=True)
    done[work(run.to_dict())] = path.resolve()
    if not job.attacks:
        print(told(_verdict(config, trained), config.study.gate), flush=True)


def _verdict(config: ConfigDict, run: RunFolder) -> gate.Verdict | None:
    return gate.verdict(run, config.study.gate, config.study.performance)


def finished(workdir: pathlib.Path) -> dict[str, pathlib.Path]:
    """The finished runs of a study and of those beside it in the same folder, by their `work`, that would be the same
    again and that others can go on from: without those whose checkpoints are gone or whose files have changed since."""
    files = (workdir.parent.glob(f"*/{cells}/config.json") for cells in ("red/*", "blue/*/*"))
    found = {}
    for run in (RunFolder(file.parent.resolve()) for file in sorted(itertools.chain(*files))):
        with contextlib.suppress(InputError):  # of a damaged run, which its own study will name
            kept = run.finished() and (is_prompted(str(run.path)) or any(run.checkpoints.glob("[0-9]*")))
            if kept and not _files_changed(run):
                found[work(run.config())] = run.path
    return found


def _files_changed(run: RunFolder) -> bool:
    """Whether a file that the run's config names, or one of a folder, is younger than the run."""
    begun = (run.path / "config.json").stat().st_mtime
    for name, value in flatten(run.config()).items():
        if name.rsplit(".", 1)[-1] not in _NAME_FILES or not str(value).startswith("/"):
            continue
        path = pathlib.Path(value)
        with contextlib.suppress(OSError):  # of what this user may not see
            of_a_run = [path / "config.json"] if is_run(value) else None  # what it has measured since is no matter
            files = of_a_run or (path.iterdir() if path.is_dir() else [path])
            if any(file.stat().st_mtime > begun for file in files if file.is_file()):
                return True
    return False


def _finished_elsewhere(path: pathlib.Path, run: ConfigDict) -> bool:
    """Whether the cell's run is finished, and of another config only since the study lay in another folder then."""
    folder = RunFolder(path)
    if not folder.exists() or not folder.finished():
        return False
    kept, now = folder.config(), run.to_dict()
    begun_from = folder.description().get("model_started")
    same_model = begun_from is not None and begun_from == stamp(now["model"])
    return same_model and work(kept) != work(now) == work({**kept, "model": now["model"]})


def work(config: dict) -> str:
    """What a training config asks for, as text: equal texts, the same run, wherever it is done."""
    asked_for = {name: value for name, value in config.items() if name != "mesh"}
    return json.dumps(asked_for, sort_keys=True)


@contextlib.contextmanager
def claimed(config: ConfigDict, workdir: pathlib.Path):
    """The study's folder, made if need be, with its lock held; `None` where nothing is left to do in it."""
    for organism in organisms(config.study):
        for run in (organism, *attacks(config.study, organism)):
            path = workdir / run.folder
            if path.is_symlink() and not path.exists():
                raise InputError(
                    f"{path} stands for the run {os.readlink(path)}, which is gone: bring it back or take another "
                    "--workdir"
                )
    folder = RunFolder(workdir)
    with folder.claim("study", config.to_dict(), config.red.seed):
        if folder.finished() and set(left(config, workdir)) == {REPORT}:  # a cell may have been taken away since
            yield None
            return
        assert_apart(config)
        yield folder


def study(config: ConfigDict, workdir: pathlib.Path, at_once: int = 1) -> None:
    """Does every job that is not done, then draws the report.

    Args:
      at_once: with more than 1, so many processes do them.

    Raises:
      InputError: cells failed; the others are done and the report is drawn.
    """
    check(config)
    caution(config)
    with claimed(config, workdir) as folder:
        if folder:
            if at_once > 1:
                side_by_side(config, workdir, at_once)
            else:
                do_all(config, workdir, jobs(config))
            conclude(config, workdir, folder)
    show(workdir)


def do_all(config: ConfigDict, workdir: pathlib.Path, some: list[Job]) -> list[InputError]:
    """Does these jobs; returns why some of them failed.

    Raises:
      InputError: a run of the study, of these jobs or not, cannot be dealt out over the devices that are here, or
        lacks a file of answers.
    """
    checked = set()
    for folder, run in _cells(config, workdir):
        try:
            check_rows(run.batch, make_mesh(**run.mesh))
            which = run.backdoor, run.data.to_json()  # many cells ask the same of a file
            if which not in checked and not (workdir / folder / "data.jsonl").exists():  # which is read, once made
                check_answers(run)
                checked.add(which)
        except InputError as error:
            raise InputError(f"{folder}: {error}") from None
    done, failures = finished(workdir), []
    for job in some:
        try:
            do(config, workdir, job, done)
        except InputError as error:
            # Without what led to it, which holds the cell's weights.
            failures.append(InputError(str(error)))
            print(f"FAILED: {error}", flush=True)
    return failures


def side_by_side(config: ConfigDict, workdir: pathlib.Path, at_once: int) -> None:
    """Does what is left in so many processes: one makes an organism, at all of its learning rates, and attacks it."""
    undone = left(config, workdir)
    parts: dict[str, list[Job]] = {}  # by the organism, whichever learning rate turns out to be its best
    for job in jobs(config):
        if job.name in undone:
            parts.setdefault(dataclasses.replace(job.rivals[0], learning_rate=None).name, []).append(job)
    part_of = {job.name: part for part, together in parts.items() for job in together}
    commands = {}
    for part, together in parts.items():
        names = ",".join(job.name for job in together)
        after = {part_of[name] for job in together for name in undone[job.name]} - {part}
        commands[part] = [sys.executable, "-m", "robust_mo.study", *sys.argv[1:], f"--job={names}"], tuple(after)
    printed, ended, start = workdir / "jobs", [], time.monotonic()

    def on_change(name: str, status: int | None) -> None:
        if status is None:
            print(f"== {name} and its attacks: {printed / name}.txt says how far they are", flush=True)
            return
        ended.append(name)
        seconds = time.monotonic() - start
        to_come = command_line.clock(seconds / len(ended) * (len(commands) - len(ended)))
        told = "done" if status == 0 else f"ended with status {status}"
        print(f"{name} {told}, {len(ended)} of {len(commands)}, {to_come} left", flush=True)

    processes.run(commands, at_once, printed, command_line.check_interrupt, on_change)


def conclude(config: ConfigDict, workdir: pathlib.Path, folder: RunFolder) -> None:
    """Draws the report, and notes that the study is finished if it is.

    Raises:
      InputError: it is not.
    """
    failures = {}
    for job in jobs(config):
        found = cell(config, workdir, job)
        if found and not RunFolder(workdir / found[0]).finished():
            why = workdir / found[0] / FAILURE
            failures[found[0]] = why.read_text(encoding="utf-8").strip() if why.is_file() else "stopped before its end"
    draw(workdir, failures)
    if failures:
        show(workdir)
        first, why = next(iter(failures.items()))
        raise InputError(
            f"{len(failures)} runs of the study failed, the first is {first}: {why}; the others are done, "
            "and the same command tries these again"
        )
    folder.finish(0)


def assert_apart(config: ConfigDict) -> None:
    """Raises InputError where two of red team, blue team and evaluation use the same question."""
    sources: dict[str, set[str]] = {"red": set(), "blue": set(), "evaluation": set()}
    for folder, run in _cells(config, pathlib.Path()):
        sources[folder.partition("/")[0]].add(training_source(run))
        sources["evaluation"].add(evaluation_source(run))
    assert_disjoint(
        **{part: [text for source in sorted(of) for text in asked(source, part)] for part, of in sources.items()}
    )


def do_named(config: ConfigDict, workdir: pathlib.Path, names: list[str]) -> None:
    """Does some jobs of a study that has been begun: cells, or its report.

    Raises:
      InputError: there is no such job or no such study, or one of the jobs failed, after the others were done.
    """
    known = {job.name: job for job in jobs(config)}
    for name in names:
        if name not in (*known, REPORT):
            raise InputError(f"--job={name} is none of this study's; --dry_run --executor=slurm lists them")
    if not RunFolder(workdir).exists():
        raise InputError(f"--workdir={workdir} holds no study that a --job could be of: give --executor=slurm first")
    RunFolder(workdir).check_same("study", config.to_dict())
    if failures := do_all(config, workdir, [known[name] for name in names if name in known]):
        raise failures[0]
    if REPORT in names:
        with claimed(config, workdir) as folder:
            if folder:
                conclude(config, workdir, folder)
        show(workdir)


def left(config: ConfigDict, workdir: pathlib.Path) -> dict[str, tuple[str, ...]]:
    """Names of the jobs that are not done, the report last -> those of them that must have ended before."""
    names: dict[str, tuple[str, ...]] = {}
    for job in jobs(config):
        found = cell(config, workdir, job)
        undone = found and not RunFolder(workdir / found[0]).finished()
        # While a rival may yet be made, which one is attacked may change.
        if undone or any(name in names for name in job.needs):
            names[job.name] = tuple(name for name in job.after if name in names)
    return names | {REPORT: tuple(names)}


def submit(config: ConfigDict, workdir: pathlib.Path, settings: dict) -> None:
    """Hands what is left of a study to SLURM; the jobs are this command again, each with its --job."""
    check(config)
    caution(config)
    with claimed(config, workdir) as folder:
        if folder:
            command = [sys.executable, "-m", "robust_mo.study", *sys.argv[1:]]
            queue = slurm.Queue(workdir / "jobs", settings)
            for name, after in left(config, workdir).items():
                number = queue.submit(f"{name} of {workdir}", [*command, f"--job={name}"], after, name)
                print(f"{number}  {_told_job(name, after)}", flush=True)
            print(
                f"\nsqueue shows them, {workdir / 'jobs'} holds what they print; the same command submits what is left"
            )
            return
    show(workdir)


def _told_job(name: str, after: tuple[str, ...]) -> str:
    before = f"{len(after)} jobs above" if name == REPORT else ", ".join(after)
    return f"{name}  after {before}" if after else name


def draw(workdir: pathlib.Path, failures: dict[str, str]) -> None:
    """The report, and its figures as TensorBoard images.  Where no run has a result, raises why the first has none."""
    try:
        report.write_report(workdir)
    except NothingFinished as error:
        raise InputError(next(iter(failures.values()), str(error))) from None
    curves = Curves(workdir, None)
    for figure in sorted((workdir / "figures").glob("*.png")):
        curves.image(0, f"figures/{figure.stem}", figure.read_bytes())
    curves.text(0, "report", (workdir / "report.md").read_text(encoding="utf-8"))
    curves.close()


def show(workdir: pathlib.Path) -> None:
    """Prints of the report the cautions at its top, the first section and the gates, and where to see the rest."""
    opening, first, *rest = (workdir / "report.md").read_text(encoding="utf-8").split("\n## ")
    gates = (section for section in rest if section.startswith("Gates"))
    print("\n\n".join(part.strip() for part in (opening.partition("\n")[2], first, *gates) if part.strip()), "\n")
    # By its path, since the environment need not be active.
    tensorboard = pathlib.Path(sys.executable).with_name("tensorboard")
    print(f"report:  {workdir / 'report.html'}\nfigures: {workdir / 'figures'}")
    print(f"curves:  {shlex.join([str(tensorboard), f'--logdir={workdir}'])}")


def plan(config: ConfigDict, workdir: pathlib.Path, hardware: str) -> None:
    """Prints every cell, by arm, which are one run, and what they will cost at most; nothing is loaded or fetched."""
    name, _, count = hardware.partition(":")
    if name not in budget.CHIPS or not (count or "1").isdecimal() or int(count or 1) < 1:
        raise InputError(f"--hardware={hardware}: give one of {', '.join(budget.CHIPS)}, with a number as in h100:8")
    chip, rows, everything = budget.CHIPS[name], [], budget.Work()
    done = {asked_for: os.path.relpath(path, workdir.resolve()) for asked_for, path in finished(workdir).items()}
    first: dict[str, str] = {}
    refused: dict[str, str] = {}  # why, and the first cell that would be
    told: dict[tuple, int] = {}  # how many questions teachers have been asked, which they are asked once

    def stands_for(folder: str, run: ConfigDict) -> tuple[str, bool]:
        """(the cell whose run this one is, whether it has still to run); prints the cell."""
        asked_for = work(run.to_dict())
        new = asked_for not in done and asked_for not in first
        same = done.get(asked_for) or first.setdefault(asked_for, folder)
        try:
            check_rows(run.batch, abstract_mesh(**run.mesh, devices=int(count or 1)))
        except InputError as error:
            refused.setdefault(str(error), folder)
        note = "" if new else "  finished" if same == folder else f"  the same run as {same}"
        print(f"  {folder}{note}")
        return same, new

    for arm in list(config.study.arms) or [""]:
        print(f"{arm or 'the one arm'}:")
        red, blue, counts = budget.Work(), budget.Work(), [0, 0]
        made = [organism for organism in organisms(config.study) if organism.arm == arm]
        for _, group in itertools.groupby(made, key=lambda organism: organism.rivals):
            rivals, stand_for = tuple(group), {}
            for organism in rivals:
                run = red_run(config, organism)
                stand_for[organism], new = stands_for(organism.folder, run)
                if new:
                    red += _cost(run, run, "red", chip, told)
                    counts[0] += 1
            attacked = best(config, workdir, rivals)
            if attacked is None and all(_verdict(config, RunFolder(workdir / r.folder)) for r in rivals):
                continue  # none passed
            attacked = attacked or rivals[-1]  # the best, whichever it will be
            for attack in attacks(config.study, attacked):
                attacking = blue_run(config, attacked, attack, workdir)
                attacking.model = str((workdir / stand_for[attack.before or attacked]).resolve())
                stand_for[attack], new = stands_for(attack.folder, attacking)
                if new:
                    blue += _cost(attacking, run, "blue", chip, told, organism=attacked.folder)
                    counts[1] += 1
        for team, number, cost in (("red", counts[0], red), ("blue", counts[1], blue)):
            rows.append((arm or "the one arm", team, number, cost))
            everything += cost
    rows.append(("all", "", sum(number for _, _, number, _ in rows), everything))
    titles = f"{'trained, Mtok':>14} {'sampled, Mtok':>14} {'PFLOP':>12} {'hours':>9} {'kept, GB':>9}"
    print(f"\n{'arm':24} {'team':5} {'runs':>5} {titles}")
    for arm, team, number, cost in rows:
        figures = f"{cost.trained / 1e6:14.2f} {cost.sampled / 1e6:14.2f} {cost.flops / 1e15:12.1f}"
        print(f"{arm:24} {team:5} {number:5} {figures} {cost.hours / int(count or 1):9.1f} {cost.kept / 1e9:9.0f}")
    print(
        f"\nAt most, for what is not finished, if every organism passes its gate, on {hardware}: "
        f"{budget.TRAINING_SHARE:.0%} of the peak in training, {budget.DECODING_SHARE:.0%} of the bandwidth in "
        f"decoding, {budget.TOKENS_PER_CONVERSATION} tokens in a conversation; compiling and loading left out."
    )
    for error, folder in refused.items():
        print(f"\nOn {hardware} it would be refused as it is. {folder}, the first: {error}")


def _cost(
    run: ConfigDict, red: ConfigDict, part: str, chip: budget.Chip, told: dict[tuple, int], organism: str = ""
) -> budget.Work:
    """Of a run of the study whose organism, of this folder, the training config `red` makes; what a teacher answers is
    added to `told` and costs nothing where it is there."""
    shape, data = budget_shape(shapes_of(red.model), run.compute_dtype), run.data
    source = training_source(run)
    hub = source.startswith("hub:")
    questions = budget.hub_questions(source, part) if hub else len(asked(source, part))
    work = budget.of_run(run.to_dict(), shape, questions, chip)
    own = data.task in BLUE_METHODS and BLUE_METHODS[data.task].on_policy
    teacher = organism if own else data.teacher or red.model
    asks = teacher_prompts(data.task, config_backdoor(run), data.answers, data.scratchpad, run.system_prompt)
    for prompt in asks:
        about = data.instruction, data.teacher_temperature, data.teacher_max_new_tokens, run.seed
        asked_for, number = (teacher, prompt, source, part, *about), min(questions, data.limit or questions)
        if (more := number - told.get(asked_for, 0)) > 0:
            told[asked_for] = number
            of_teacher = shape if own else budget_shape(shapes_of(teacher), run.compute_dtype)
            work += budget.answers(run.to_dict(), of_teacher, more, chip)
    return work


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "config file of a study")
    flags.DEFINE_string("workdir", None, "folder of the study, made if need be")
    flags.DEFINE_bool("dry_run", False, "only list the cells, by arm, and what they would cost")
    flags.DEFINE_string("hardware", "h100", f"of --dry_run: {', '.join(budget.CHIPS)}, and how many, as in h100:8")
    flags.DEFINE_bool("report_only", False, "only draw the report again")
    flags.DEFINE_enum("executor", "local", ["local", "slurm"], "slurm: every cell, and the report, is a job of SLURM")
    flags.DEFINE_integer(
        "at_once", 1, "local: organisms made and attacked beside one another, each in a process", lower_bound=1
    )
    flags.DEFINE_list("job", [], "of a study that was begun, do only these of its jobs")
    flags.DEFINE_string("slurm_partition", None, "of the jobs; default: the cluster's. SBATCH_ACCOUNT etc. count too")
    flags.DEFINE_integer("slurm_gpus", None, "of a job; default: none are asked for", lower_bound=1)
    flags.DEFINE_integer("slurm_cpus", 8, "of a job", lower_bound=1)
    flags.DEFINE_integer(
        "slurm_minutes", 24 * 60, "of a job at one go; longer ones save and queue again", lower_bound=5
    )


def main(args: flags.FlagValues) -> None:
    if "://" in args.workdir:
        raise InputError(f"--workdir={args.workdir}: a study needs a folder of this machine; mount the bucket")
    config, workdir = args.config, place(args.workdir).absolute()
    if args.report_only:
        draw(workdir, {})
        show(workdir)
        recorded, given = map(flatten, (RunFolder(workdir).config(), json.loads(config.to_json())))
        if other := [name for name, value in given.items() if name in recorded and recorded[name] != value]:
            print(
                f"note:    drawn from the study's own config; --config differs in {', '.join(other[:3])}"
                f"{f' and {len(other) - 3} more' * (len(other) > 3)}, which changes nothing here"
            )
    elif args.at_once > 1 and args.executor != "local":
        raise InputError(f"--at_once={args.at_once} is for this machine: SLURM decides what runs beside what")
    elif args.dry_run:
        check(config)
        caution(config)
        if args.executor == "slurm":
            for name, after in left(config, workdir).items():
                print(_told_job(name, after))
        else:
            plan(config, workdir, args.hardware)
    elif args.job:
        do_named(config, workdir, args.job)
    elif args.executor == "slurm":
        submit(
            config, workdir, {name: args[f"slurm_{name}"].value for name in ("partition", "gpus", "cpus", "minutes")}
        )
    else:
        study(config, workdir, args.at_once)


if __name__ == "__main__":
    command_line.run(main, define_flags, required=("config", "workdir"))
