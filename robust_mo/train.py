"""One training run: red team, blue team, any supervised fine-tuning.

    python -m robust_mo.train --config=configs/red_full.py:smol --workdir=runs/red
    tensorboard --logdir=runs/red

The run goes: config, run folder, mesh, weights, conversations, batches, optimizer, checkpoint if there is one, loop.
The same command again goes on where the run stopped; --config.x.y=value changes a knob of configs/default.py.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from robust_mo import command_line, hosts
from robust_mo.analysis import budget
from robust_mo.configured.checks import check, check_rows, hyperparameters, locate
from robust_mo.configured.data import (
    asking,
    assert_unseen,
    check_watched,
    config_backdoor,
    draw_of_adapters,
    tokenize,
    training_conversations,
)
from robust_mo.configured.program import budget_shape, choose_remat, keeps_start, optimizer_on
from robust_mo.data.batches import batches, count_batches
from robust_mo.data.prompts import read_conversations, read_rows
from robust_mo.errors import InputError
from robust_mo.evals.measure import measure
from robust_mo.evals.subject import Subject
from robust_mo.model import hugging_face
from robust_mo.model import mesh as meshes
from robust_mo.organisms.backdoors import untold
from robust_mo.organisms.distill import card
from robust_mo.runs import RunFolder, absolute, place, write_text
from robust_mo.training import models
from robust_mo.training.checkpoints import Checkpoints, forget_optimizers
from robust_mo.training.curves import Curves
from robust_mo.training.optimizers import make_schedule, notes
from robust_mo.training.step import TrainState, train_step


def train(config: ConfigDict, workdir: str) -> RunFolder:
    """Runs to the end, or to where an interrupt stops it with everything saved.

    Raises:
      InputError: something in the config cannot be used, or the loss is no longer a number.
      Interrupted: SIGINT or SIGTERM came; the run is saved.
    """
    check(config)
    config = config.copy_and_resolve_references()
    locate(config)
    if os.path.realpath(config.model) == os.path.realpath(workdir):
        raise InputError(f"config.model is {config.model!r}, the --workdir itself: give a new --workdir to train it on")
    if wrong := set("[]\\") & set(str(absolute(place(workdir)))):
        # Orbax takes them for a pattern, and does not find again what it has saved.
        raise InputError(f"--workdir={workdir} has {' '.join(sorted(wrong))} in its path: choose one without")
    run = hosts.run_folder(workdir)
    with hosts.first_holds(lambda: run.claim("train", config.to_dict(), config.seed, models.stamp(config.model))):
        if hosts.by_first(run.finished):
            forget_optimizers(run.checkpoints)  # where a kill came between the two
            print(f"{workdir} is complete", flush=True)
            return run

        mesh = meshes.make_mesh(**config.mesh)
        check_rows(config.batch, mesh)
        # Its newest checkpoint would be another when this run goes on.
        if models.is_run(config.model) and not hosts.by_first(RunFolder(config.model).finished):
            raise InputError(
                f"config.model is {config.model}, which has not been trained to its end: finish it first"
                + ("" if config.lora.continued else ", or train on what robust_mo.export makes of its checkpoint")
            )
        check_watched(config)
        source = models.beneath_adapters(config.model, config.lora)
        if "judge" in asking(config):
            try:  # or it would be found missing when all is trained
                models.base_folder(config.evals.judge.model)
            except InputError as error:
                raise InputError(f"config.evals.judge.model: {error}") from None
        spec = models.lora_spec(config.lora)
        # Of what is not trained only that is kept which products read.
        kept_dtype = config.compute_dtype if spec else config.param_dtype
        load = models.load_frozen if spec else models.load_model
        prompted = config.data.task == "prompted"  # and nothing trained
        shape = hugging_face.read_config(models.base_folder(source))
        remat = "none" if prompted else choose_remat(config, shape, mesh)
        llama = hugging_face.build(shape, spec, config.compute_dtype, config.param_dtype, remat)
        shapes = models.abstract_trainable(llama, mesh)
        optimizer, abstract_state = optimizer_on(config, llama, shapes)
        for text in notes(abstract_state):
            print(f"note: {text}", flush=True)
        loaded = load(source, mesh, config.compute_dtype, kept_dtype)

        if prompted:
            observe(config, run, loaded, mesh)
            return run

        data_file = run.path / "data.jsonl"
        fresh = not hosts.by_first(data_file.exists)
        if fresh:
            assert_unseen(config)
            # Files may differ from host to host, and what a grader has not finished in time.
            conversations, about = hosts.agreed(training_conversations(config, mesh, loaded))
        else:
            conversations, about = hosts.by_first(lambda: read_conversations(data_file)), {}
        # A row may be longer than the model's context, a conversation in it not.
        longest = min(config.data.length, llama.config.max_position_embeddings)

        def line(number: int) -> str:
            """Of a conversation, for the user: the line that it comes from, where there is one."""
            if not fresh:
                return f"{data_file}:{number}"
            own = list(read_rows(config.data.source)) if config.data.task == "conversations" else []
            return own[number - 1][0] if len(own) >= number else f"conversation {number}"

        examples, cut, dropped = tokenize(conversations, loaded.chat, longest, config.data.over_long, line)
        tokens = hashlib.sha256(b"".join(example.tokens.tobytes() for example in examples)).hexdigest()
        hosts.check_same("tokenizer", tokens)
        packing = dict(
            length=config.data.length,
            rows=config.batch.rows,
            packing=config.data.packing,
            epochs=config.data.epochs,
            seed=config.seed,
        )
        steps = config.steps or count_batches(examples, **packing)
        if config.steps:
            packing["epochs"] = None
        iterator = iter(batches(examples, **packing))

        peak, schedule = config.optimizer.learning_rate, make_schedule(**config.schedule, steps=steps)
        # Of all steps before the first: a device works off its queue in order, and one number would wait for a step.
        shares = np.asarray(jax.vmap(schedule)(jnp.arange(steps + 1)), np.float32)
        decays = config.weight_decay.kind != "none" and config.weight_decay.strength > 0
        idle = config.optimizer.name == "soap" and not decays  # its first gradient moves nothing
        if not shares[1 + idle :].any():
            told = f"{config.schedule.name} and {config.optimizer.name} leave no step of {steps} that moves anything"
            print(f"note: nothing is trained: {told}", flush=True)
        if fresh and hosts.first():  # now that they are of use: what lies here a run goes on with
            about |= {"conversations cut": str(cut), "conversations dropped as too long": str(dropped)}
            write_text(run.path / "data.md", card(config.data.task, conversations, about))
            lines = (json.dumps({"messages": messages}, ensure_ascii=False) for messages in conversations)
            write_text(data_file, "".join(line + "\n" for line in lines))
        trainable, frozen = models.split(llama, loaded.params, mesh, config.seed, draw_of_adapters(config))
        if config.lora.continued:
            trainable = models.restore(config.model, llama, mesh, None)
        start = jax.tree.map(jnp.copy, trainable) if keeps_start(config) else None
        state = meshes.spread(TrainState(jnp.int32(0), trainable, optimizer.init(trainable)), mesh)

        checkpoints = Checkpoints(run.checkpoints, config.checkpoint.keep, config.checkpoint.keep_every)
        if checkpoints.latest() is not None:
            # What the run began with goes before what it had come to arrives: there may be no room for both.
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            del state, trainable
            loaded = dataclasses.replace(loaded, params={})
            state, position = checkpoints.restore(shapes)
            iterator.set_state(position)
        first = int(state.step)
        curves = Curves(run.path, first)
        introduce(curves, config, run)
        count, size = checkpoints.at_most(state, steps)
        print(
            f"{workdir}: {len(examples)} conversations ({cut} cut, {dropped} dropped as too long), "
            f"{steps} steps of {config.batch.rows} rows x {config.data.length} tokens, "
            + (f"LoRA r{spec.rank}" if spec else "all weights")
            + (f", going on from step {first}" if first else "")
            + f", at most {count} checkpoints of {size / 2**30:.2g} GiB, {count * size / 2**30:.2g} in all",
            flush=True,
        )

        def evaluate(step: int, trainable) -> None:
            def params() -> dict:
                return trainable if spec is None else models.merged(frozen, trainable, spec)

            evaluated(config, run, curves, loaded, params, mesh, step)

        progress = command_line.Progress("step", steps, "steps")
        # A conversation attends to itself alone, however long its row.
        lengths = np.array([len(example.tokens) for example in examples])
        flops = budget.flops_per_token(
            budget_shape(llama.config, config.compute_dtype),
            (lengths**2).sum() / lengths.sum(),
            frozen=spec is not None,
        )
        watch = Watch(run, curves, lambda step: peak * shares[step], config.log_every, progress, flops)
        try:
            # A step that is saved and measured is saved first; what a stop left unmeasured, a resumed run makes up for.
            for step in itertools.count(first):
                if step == steps or (step > first and step % config.checkpoint.every == 0):
                    watch.flush()
                    checkpoints.save(state, iterator.get_state())
                    watch.restart_clock()
                if step == steps or is_due(step, config.evaluation):
                    watch.flush()
                    evaluate(step, state.trainable)
                    watch.restart_clock()
                if step == steps:
                    curves.finished()
                    break
                command_line.check_interrupt()
                batch = meshes.place(next(iterator), mesh)
                with meshes.in_force(mesh):
                    state, metrics = train_step(
                        state,
                        frozen,
                        start,
                        batch,
                        np.float32(peak),
                        shares[step + 1],
                        model=llama,
                        optimizer=optimizer,
                        chunk=config.loss_chunk,
                        micro_batches=config.batch.micro_batches,
                    )
                watch(step + 1, metrics)
        except command_line.Interrupted:
            watch.flush()
            checkpoints.save(state, iterator.get_state())
            raise
        finally:
            with contextlib.closing(curves):
                checkpoints.close()
        run.finish(steps)
        forget_optimizers(run.checkpoints)
    return run


def introduce(curves: Curves, config: ConfigDict, run: RunFolder) -> None:
    """What TensorBoard tells of a run beside its curves: the config, and a session on the HParams page."""
    curves.text(0, "config", "```\n" + json.dumps(config.to_dict(), indent=1) + "\n```")
    *around, own = absolute(run.path).parts[-4:]
    curves.hyperparameters(hyperparameters(config), f"{own} in {'/'.join(around)}")


def observe(config: ConfigDict, run: RunFolder, loaded: models.LoadedModel, mesh) -> None:
    """The whole run of a prompted organism, measured in place of a last step: nothing is trained, the prompt makes it.

    As step 0, if the config wants a measurement at the start, stands the untouched model, without the backdoor's words.
    """
    without = config.copy_and_resolve_references()
    without.system_prompt = untold(config.system_prompt)
    without.evaluation.system_prompt = ""
    with contextlib.closing(Curves(run.path, 0)) as curves:
        introduce(curves, config, run)
        if config.evaluation.at_start:
            evaluated(without, run, curves, loaded, lambda: loaded.params, mesh, 0)
        evaluated(config, run, curves, loaded, lambda: loaded.params, mesh, models.PROMPTED_STEP)
        curves.finished()
    run.finish(models.PROMPTED_STEP)


def evaluated(config: ConfigDict, run, curves, loaded, params: Callable[[], dict], mesh, step: int) -> None:
    """Measures a step with the evaluators that the config names; `params` is called if one is pending."""
    watched = config_backdoor(config)

    def subject() -> Subject:
        return Subject(
            loaded.llama,
            params(),
            loaded.chat,
            watched.told(config.evaluation.system_prompt or config.system_prompt),
            watched,
            config.seed,
            config.evaluation.batch_size,
            command_line.evaluation_progress(),
            mesh,
        )

    chosen = {name: config.evals[name].to_dict() for name in config.evaluation.names}
    if values := measure(run, curves, subject, step, chosen):
        print(f"step {step}: {headline(values)}", flush=True)


class Watch:
    """Fetches metrics one step late, so that the device never waits for the host; stops a run that has gone wrong."""

    def __init__(self, run, curves, learning_rate, every, progress, flops_per_token):
        self._run, self._curves, self._every, self._progress = run, curves, every, progress
        self._flops_per_token = flops_per_token
        self._peak_flops = budget.peak_flops(jax.devices()[0].device_kind, jax.device_count(), os.cpu_count())
        self._learning_rate = learning_rate  # of a step
        self._waiting = None
        self._seconds = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves what was done since the last step out of the next step's speed."""
        self._time = time.monotonic()

    def __call__(self, step: int, metrics) -> None:
        before, self._waiting = self._waiting, (step, metrics)
        if before:
            self._show(*before)

    def flush(self) -> None:
        """Waits for the newest metrics and shows them."""
        if self._waiting:
            self._show(*self._waiting)
        self._waiting = None
        self._run.put()

    def _show(self, step: int, metrics) -> None:
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.monotonic()
        seconds, self._time = now - self._time, now
        if self._seconds is None:
            # What came before a stop counts; a process's first step is mostly compiling, and does not.
            before = [r for r in self._run.records() if r["name"] == "speed/training_seconds" and r["step"] < step]
            self._seconds = before[-1]["value"] if before else 0.0
        else:
            self._seconds += seconds
        speed = metrics["tokens"] / seconds
        # The norms of parameters are those after the step, which nothing else tells of the last one.
        watched = [name for name in metrics if name in ("loss", "gradient_norm") or name.startswith("parameter_norm/")]
        if wrong := [f"{name} is {metrics[name]}" for name in watched if not np.isfinite(metrics[name])]:
            raise InputError(
                f"step {step}: {', '.join(wrong)}; the run stops: look at the data and at config.optimizer, and choose "
                "another --workdir"
            )
        if step % self._every == 0:
            # Of its health an optimizer says -1 where it has nothing to say yet.
            untold = {name for name, value in metrics.items() if name.startswith("optimizer/") and value < 0}
            shown = {n: value for n, value in metrics.items() if not n.endswith("tokens") and n not in untold}
            values = {name if "/" in name else f"train/{name}": value for name, value in shown.items()}
            values["train/learning_rate"] = float(self._learning_rate(step))
            values["speed/tokens_per_second"] = speed
            if self._peak_flops:  # of a device that is known
                values["speed/model_flops_utilization"] = speed * self._flops_per_token / self._peak_flops
            self._curves.scalars(step, values)
            self._run.record(step, "train/loss", metrics["loss"], count=metrics["loss_tokens"])
            self._run.record(step, "speed/training_seconds", self._seconds)
        self._progress(step, f"loss {metrics['loss']:.3f}  {speed:.0f} tokens/s")


def is_due(step: int, evaluation: ConfigDict) -> bool:
    """Whether a step before the last is measured."""
    return evaluation.at_start if step == 0 else bool(evaluation.every) and step % evaluation.every == 0


def headline(values: dict[str, float]) -> str:
    """The numbers of an evaluation that belong on the terminal."""
    names = [name for name in values if name.endswith(("backdoor_rate", "false_alarm_rate", "_accuracy", "_loss"))]
    return "  ".join(f"{name.removeprefix('eval/')} {values[name]:.3g}" for name in names)


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "config file, with :argument where it takes one")
    flags.DEFINE_string("workdir", None, "run folder, made if need be")
    command_line.define_host_flags()


def main(args: flags.FlagValues) -> None:
    train(args.config, args.workdir)


if __name__ == "__main__":
    command_line.run(main, define_flags, required=("config", "workdir"))
