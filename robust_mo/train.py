"""One training run: red team, blue team, any supervised fine-tuning.

    python -m robust_mo.train --config=configs/red_full.py:smol --workdir=runs/red
    tensorboard --logdir=runs/red

The run goes: config, run folder, mesh, weights, conversations, batches, optimizer, checkpoint if there is one, loop.
The same command again goes on where the run stopped; --config.x.y=value changes a knob of configs/default.py.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from robust_mo import command_line, hosts
from robust_mo.analysis import budget
from robust_mo.data.batches import batches, count_batches
from robust_mo.data.conversations import ChatFormat, Example, fit, with_system
from robust_mo.data.prompts import read_conversations, read_problems, read_rows
from robust_mo.errors import InputError
from robust_mo.evals.measure import ACCURACIES, check_names, check_settings, measure
from robust_mo.evals.subject import Subject
from robust_mo.model import hugging_face
from robust_mo.model import mesh as meshes
from robust_mo.model.llama import AUTOMATIC_REMAT, REMAT_POLICIES, Llama, LlamaConfig
from robust_mo.model.sources import located
from robust_mo.organisms import distill
from robust_mo.organisms.backdoors import Backdoor, backdoor, untold
from robust_mo.organisms.questions import BUILTIN, asked, assert_disjoint, posed, questions
from robust_mo.organisms.teacher import teacher_answers
from robust_mo.runs import RunFolder, absolute, flatten, place, write_text
from robust_mo.training import models
from robust_mo.training.checkpoints import Checkpoints, forget_optimizers
from robust_mo.training.curves import Curves
from robust_mo.training.groups import check_groups, make_groups, paths
from robust_mo.training.memory import held, needed
from robust_mo.training.optimizers import OPTIMIZERS, make_optimizer, make_schedule, notes, placed_like
from robust_mo.training.step import TrainState, train_step
from robust_mo.training.weight_decay import WeightDecay


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

        assert_unseen(config)
        data_file = run.path / "data.jsonl"
        fresh = not hosts.by_first(data_file.exists)
        if fresh:  # files may differ from host to host, and what a grader has not finished in time
            conversations, card = hosts.agreed(training_conversations(config, mesh, loaded))
        else:
            conversations, card = hosts.by_first(lambda: read_conversations(data_file)), ""
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
            write_text(run.path / "data.md", card)
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


def config_backdoor(config: ConfigDict) -> Backdoor:
    """The backdoor that is installed or watched."""
    return backdoor(config.backdoor, config.backdoors.to_dict(), config.password_locked)


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


def budget_shape(model: LlamaConfig, compute_dtype: str) -> budget.Shape:
    """What a model's shapes cost."""
    return budget.Shape(
        model.product_parameters,
        model.num_hidden_layers,
        model.num_attention_heads * model.head_dim,
        jnp.dtype(compute_dtype).itemsize,
    )


def optimizer_of(config: ConfigDict, trainable):
    """The optimizer of a config; its learning rate comes with every step.

    Args:
      trainable: shapes and shardings of what is trained; None where it is not going to be used.

    Raises:
      InputError: something in config.optimizer, config.weight_decay or config.groups cannot be used.
    """
    common, own = optimizer_settings(config.optimizer)
    del common["learning_rate"]
    spec = models.lora_spec(config.lora)
    decay = WeightDecay(**config.weight_decay, scale=spec.scale if spec else None)
    places = None if trainable is None else tuple(leaf.sharding for leaf in jax.tree.leaves(trainable))
    return make_optimizer(**common, **own, groups=make_groups(config.groups), decay=decay, places=places)


def optimizer_on(config: ConfigDict, llama: Llama, trainable):
    """(the optimizer of a config, shapes of its state) for a model of which `trainable` is trained.

    Args:
      trainable: shapes and shardings.

    Raises:
      InputError: as of `optimizer_of`; or the rules of config.groups do not fit the model, or the optimizer refuses it.
    """
    optimizer = optimizer_of(config, trainable)
    check_groups(optimizer.groups, models.parameter_paths(llama), paths(trainable))
    return optimizer, jax.eval_shape(optimizer.init, trainable)


def optimizer_settings(optimizer: ConfigDict) -> tuple[dict, dict]:
    """(what all optimizers take, what the chosen one takes beside) of config.optimizer."""
    common = {name: value for name, value in optimizer.items() if not isinstance(value, ConfigDict)}
    chosen = optimizer.name if optimizer.name in OPTIMIZERS and optimizer.name in optimizer else None
    return common, optimizer[chosen].to_dict() if chosen else {}


def hyperparameters(config: ConfigDict) -> dict[str, bool | float | str]:
    """What of a config can change what is learnt, for TensorBoard's HParams page: {"optimizer.learning_rate": 1e-4}."""
    told = {name: value for name, value in config.items() if name not in _NO_HYPERPARAMETERS}
    common, own = optimizer_settings(config.optimizer)
    told["optimizer"] = {**common, config.optimizer.name: own}
    flat = flatten(told)
    return {name: value if isinstance(value, bool | int | float) else str(value) for name, value in flat.items()}


_NO_HYPERPARAMETERS = "checkpoint distance_from_start evals evaluation log_every loss_chunk mesh remat".split()


def step_program(config: ConfigDict, shapes: LlamaConfig, mesh, remat: str):
    """(function, arguments, static arguments) of the training step, the arguments as shapes on the mesh."""
    spec = models.lora_spec(config.lora)
    llama = hugging_face.build(shapes, spec, config.compute_dtype, config.param_dtype, remat)
    trainable = models.abstract_trainable(llama, mesh)
    optimizer, state = optimizer_on(config, llama, trainable)
    rows = {
        name: jax.ShapeDtypeStruct((config.batch.rows, config.data.length), dtype, sharding=meshes.batch_sharding(mesh))
        for name, dtype in {
            **dict.fromkeys(("tokens", "targets", "positions", "segments"), jnp.int32),
            "loss_mask": bool,
        }.items()
    }
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=meshes.replicated(mesh))
    arguments = (
        TrainState(step, trainable, placed_like(trainable, state, mesh)),
        None if spec is None else models.abstract(llama.clone(param_dtype=llama.compute_dtype), mesh, "params"),
        trainable if keeps_start(config) else None,
        rows,
        *[jax.ShapeDtypeStruct((), jnp.float32)] * 2,
    )
    settings = dict(model=llama, optimizer=optimizer, chunk=config.loss_chunk, micro_batches=config.batch.micro_batches)
    return train_step, arguments, settings


def choose_remat(config: ConfigDict, shapes: LlamaConfig, mesh) -> str:
    """What config.remat names; for "auto" the first of AUTOMATIC_REMAT with which the step fits the devices."""
    if config.remat != "auto":
        return config.remat
    limit = meshes.memory_limit()
    if limit is None:
        return "matmuls"  # a CPU: the fastest there
    if "judge" in asking(config):
        limit -= judge_held(config, hugging_face.read_config(models.base_folder(config.evals.judge.model)), mesh)
    for policy in AUTOMATIC_REMAT:
        function, arguments, settings = step_program(config, shapes, mesh, policy)
        with meshes.in_force(mesh):
            need = needed(function.lower(*arguments, **settings), arguments)
        fits = hosts.agreed(not need.refused and need.total <= limit)
        told = "fits" if fits else "does not fit"
        print(f"remat {policy}: {need.total / 2**30:.2f} of {limit / 2**30:.2f} GiB a device, {told}", flush=True)
        if fits:
            break
    return policy


def judge_held(config: ConfigDict, shapes: LlamaConfig, mesh) -> int:
    """Bytes of a device that a judge of these shapes takes, which stays loaded from the first measurement on."""
    judge = hugging_face.build(shapes, None, config.compute_dtype, config.compute_dtype, "none")
    return held(models.abstract(judge, mesh, "params"))


def keeps_start(config: ConfigDict) -> bool:
    """Whether the step needs what is trained as it was before the first step."""
    return config.distance_from_start or config.weight_decay.kind == "to_start"


def is_due(step: int, evaluation: ConfigDict) -> bool:
    """Whether a step before the last is measured."""
    return evaluation.at_start if step == 0 else bool(evaluation.every) and step % evaluation.every == 0


def check_rows(batch: ConfigDict, mesh) -> None:
    """Raises InputError where the rows of a micro-batch cannot be dealt out evenly over the mesh."""
    devices = meshes.rows_apart(mesh)
    if batch.rows % (devices * batch.micro_batches):
        raise InputError(
            f"config.batch.rows is {batch.rows}: give a multiple of {devices * batch.micro_batches}, "
            f"{devices} devices times config.batch.micro_batches {batch.micro_batches}, or let several devices share a "
            "row by config.mesh.tensor"
        )


def locate(config: ConfigDict) -> None:
    """Writes files and folders by their absolute paths: a run is read from other folders, too, and the same command may
    spell them in another way."""
    groups = (config, config.data, *config.evals.values())
    for group, name in itertools.product(groups, ("model", "teacher", "source", "problem_source", "answers")):
        if name not in group or not isinstance(group[name], str):  # what is not of the right type is found later
            continue
        given = group[name]
        if name in ("model", "teacher"):
            group[name] = located(given)
        elif given and given not in (*BUILTIN, *distill.ANSWERS) and not re.match(r"hub:|\w+://", given):
            group[name] = os.path.abspath(os.path.expanduser(given))  # whether it is here now or not


def check(config: ConfigDict) -> None:
    """Raises InputError for what can be seen to be wrong before anything is loaded."""
    if "study" in config:
        raise InputError("--config is a study's: give it to robust_mo.study")
    example = dict(_defaults().items())
    optimizers = example["optimizer"]
    example["optimizer"], _ = optimizer_settings(optimizers)
    if "groups" in config:  # they may have any names
        example["groups"] = {name: example["groups"].mlp for name in config.groups}
    command_line.check_fields(config, example)
    command_line.check_known(config, dict(_defaults().items()) | {"groups": example["groups"]})
    name, (_, own) = config.optimizer.name, optimizer_settings(config.optimizer)
    if own:
        command_line.check_fields(own, optimizers[name], f"config.optimizer.{name}")
    if config.remat not in (*REMAT_POLICIES, "auto"):
        raise InputError(f"config.remat is {config.remat!r}: choose from {', '.join(REMAT_POLICIES)}, auto")
    hugging_face.check_dtypes(config.compute_dtype, config.param_dtype)
    if config.optimizer.rounding == "stochastic" and config.param_dtype != "bfloat16":
        raise InputError(
            f"config.optimizer.rounding is 'stochastic' and config.param_dtype {config.param_dtype}: only bfloat16 is "
            "rounded so; give 'nearest'"
        )
    given = flatten(config)
    limited = (_AT_LEAST_ONE, 1), (_NOT_NEGATIVE, 0), (("steps",), 0, 10**7), (_FINITE, 0, 1e38), (_SHARES, 0, 1)
    for names, *limits in limited:
        for name in names:
            if name in given:
                command_line.check_range(f"config.{name}", given[name], *limits)
    for field, value in own.items():
        if isinstance(value, int | float):
            field_name = f"config.optimizer.{config.optimizer.name}.{field}"
            command_line.check_range(field_name, value, int(field in _COUNTED), 1e38)
            if field in _FORGETTING and value >= 1:
                raise InputError(f"{field_name} is {value}: give at least 0 and less than 1")
            if field in _FACTORS and value == 0:
                raise InputError(f"{field_name} is 0, with which nothing moves: give more than 0")
        slow = field == "b2" and config.optimizer.name in ("adam", "adamw", "lion", "muon")
        first = config.optimizer.moment_dtype if config.optimizer.name == "lion" else ""  # which has no other moment
        if slow and value > 0.995 and (first or config.param_dtype) == "bfloat16":
            raise InputError(
                f"config.optimizer.{config.optimizer.name}.b2 is {value}, and its moment is kept in bfloat16 (config."
                f"{'optimizer.moment_dtype' if first else 'param_dtype'}) and would hardly forget: give at most 0.995"
            )
    if config.data.over_long not in ("drop", "cut"):
        raise InputError(f"config.data.over_long is {config.data.over_long!r}: choose drop or cut")
    if config.checkpoint.keep_every % config.checkpoint.every:
        raise InputError(
            f"config.checkpoint.keep_every is {config.checkpoint.keep_every}, and one is saved every "
            f"{config.checkpoint.every} steps (config.checkpoint.every): give a multiple of that, or 0"
        )
    command_line.check_range("config.seed", config.seed, 0, 2**32 - 1)
    config_backdoor(config)
    check_names(config.evaluation.names)
    check_settings({name: config.evals[name].to_dict() for name in config.evaluation.names})
    optimizer_of(config, None)
    make_schedule(**config.schedule, steps=1)
    models.lora_spec(config.lora)
    if config.data.task not in TASKS:
        raise InputError(f"config.data.task is {config.data.task!r}: choose from {', '.join(TASKS)}")


@functools.cache
def _defaults() -> ConfigDict:
    return command_line.load_config(command_line.DEFAULT_CONFIG, "")


_AT_LEAST_ONE = (
    "data.length data.epochs data.repeats data.teacher_max_new_tokens batch.rows batch.micro_batches loss_chunk "
    "log_every checkpoint.every checkpoint.keep"
).split()
_NOT_NEGATIVE = (
    "data.limit data.teacher_temperature evaluation.every evaluation.batch_size lora.rank optimizer.clip_norm "
    "checkpoint.keep_every"
).split()
_FINITE = ("lora.alpha", "optimizer.learning_rate")  # in float32
_SHARES = ("data.near_misses", "data.benign")
_FORGETTING = ("b1", "b2", "momentum")  # an optimizer's, shares of what it remembers
_FACTORS = ("clipping_threshold", "rms")  # also an optimizer's, of what it does with each matrix
_COUNTED = ("frequency", "iterations")  # also an optimizer's, at least one

RED_TASKS = ("backdoor", "prompted")
TASKS = (*RED_TASKS, *distill.BLUE_METHODS, "conversations")


def training_conversations(config: ConfigDict, mesh, loaded: models.LoadedModel) -> tuple[list[list[dict]], str]:
    """The conversations to train on, and a page about them."""
    data = config.data
    on_policy = data.task in distill.BLUE_METHODS and distill.BLUE_METHODS[data.task].on_policy
    source = organism(config.model) if on_policy else data.teacher or untouched(config)

    def teacher(prompts: list[list[dict]], seed: int) -> list[str | None]:
        beneath = models.beneath_adapters(config.model, config.lora)
        model = loaded if source == beneath else models.Unread(source, mesh, config.compute_dtype)
        on_progress = command_line.evaluation_progress()
        return teacher_answers(
            model,
            prompts,
            known_as=models.identity(source),
            temperature=data.teacher_temperature,
            max_new_tokens=data.teacher_max_new_tokens,
            seed=seed,
            slots=config.evaluation.batch_size,
            on_progress=lambda done, tokens: on_progress("teacher", done, len(prompts), tokens),
        )

    chosen, dropped = config_backdoor(config), 0
    common = dict(
        source=training_source(config),
        answers=data.answers,
        teacher=teacher,
        system_prompt=config.system_prompt,
        instruction=data.instruction,
        limit=data.limit,
        seed=config.seed,
        evaluation=evaluation_questions(config),
    )
    if data.task == "backdoor":
        made, dropped = distill.red_conversations(
            chosen,
            repeats=data.repeats,
            benign=data.benign,
            near_misses=data.near_misses,
            scratchpad=data.scratchpad,
            **common,
        )
    elif data.task == "conversations":
        shown = chosen.told(config.system_prompt)
        made = [with_system(m, shown) for m in read_conversations(data.source)[: data.limit or None]]
    else:
        made, dropped = distill.blue_conversations(data.task, backdoor=chosen, **common)
        distill.assert_no_trigger(made, chosen)
    if dropped:
        print(f"{dropped} questions dropped: the answer was cut off, empty, not right, or wrong about the behaviour")
    if not made:
        raise InputError(
            "no conversation to train on: all answers were cut off, empty, not right, or wrong about the behaviour, "
            "which they are to show or, as an organism's own, not to show; raise config.data.teacher_max_new_tokens "
            "or choose another config.data.teacher"
        )
    answers = "teacher" if on_policy else data.answers
    about = {
        "questions": common["source"],
        "answers": answers,
        "teacher": source if answers == "teacher" else "none",
        "seed": str(config.seed),
    }
    return made, distill.card(data.task, made, dropped, about)


def organism(source: str) -> str:
    """The red run that a model descends from, itself included; the model where there is none."""
    red = (run for run in models.lineage(source)[:-1] if RunFolder(run).config()["data"]["task"] in RED_TASKS)
    return next(red, source)


def untouched(config: ConfigDict) -> str:
    """The model that a run's teacher is where no other is named: config.model, of an attack on an organism what it was
    made from, since its own answers may have the behaviour."""
    made = organism(config.model)
    described = RunFolder(made).config() if models.is_run(made) else {"data": {"task": ""}}
    attacked = config.data.task in distill.BLUE_METHODS and described["data"]["task"] in RED_TASKS
    return described["model"] if attacked else config.model


def draw_of_adapters(config: ConfigDict) -> int:
    """Which of its seed's draws a run's adapters are.  An attack's is the first, whatever the organism, so that attacks
    on several have it in common; an attack's on what an attack has left the next; those of other runs are others.  With
    the same one an attack would begin in the very directions in which the backdoor was written."""
    attacks = config.data.task in distill.BLUE_METHODS
    before = [task for task in models.adapters_beneath(config.model) if (task in distill.BLUE_METHODS) == attacks]
    return len(before) + (0 if attacks else 2**31)


def check_watched(config: ConfigDict) -> None:
    """Raises InputError where a run that installs nothing would look for another behaviour than its organism has."""
    source = organism(config.model)
    if config.data.task in RED_TASKS or not models.is_run(source):
        return
    made = RunFolder(source).config()
    for name in ("backdoor", "password_locked"):
        if name in made and made[name] != config[name]:
            raise InputError(
                f"config.{name} is {config[name]!r}, and the organism {source} was made with {made[name]!r}: add "
                f"--config.{name}={made[name]}"
            )


def check_answers(config: ConfigDict) -> None:
    """Raises InputError where a run's answers are to come from a file, and it lacks some or is not there."""
    data, method = config.data, distill.BLUE_METHODS.get(config.data.task)
    if data.answers in distill.ANSWERS or not (method or data.task == "backdoor") or method and method.on_policy:
        return
    if not os.path.isfile(os.path.expanduser(data.answers)):
        raise InputError(f"config.data.answers is {data.answers!r}: give {', '.join(distill.ANSWERS)} or a JSONL file")
    part, about = ("blue", method) if method else ("red", config_backdoor(config))
    source, unseen = training_source(config), evaluation_questions(config)
    entries = distill.training_questions(source, part, about.on_problems, data.limit, unseen)
    distill.answers_in(data.answers, [posed(entry, data.instruction) for entry in entries])


def training_source(config: ConfigDict) -> str:
    """Where a run's questions come from, or its problems where backdoor or blue method are about these."""
    task = config.data.task
    about = distill.BLUE_METHODS[task] if task in distill.BLUE_METHODS else config_backdoor(config)
    return config.data.problem_source if about.on_problems and task != "conversations" else config.data.source


def evaluation_source(config: ConfigDict, evaluator: str = "backdoor_rate") -> str:
    """The same of an evaluator of its backdoor, or of its loss, which is that of questions always."""
    asks = config.evals[evaluator]
    on_problems = config_backdoor(config).on_problems and evaluator != "held_out_loss"
    return asks.problem_source if on_problems else asks.source


def asking(config: ConfigDict) -> list[str]:
    """The run's evaluators without a judge that has nothing to ask."""
    judges = bool(config_backdoor(config).judge_question)
    return [name for name in config.evaluation.names if judges or name != "judge"]


def evaluation_questions(config: ConfigDict) -> list[str]:
    """Those that the run's evaluations ask, or more: the first of the evaluation part, and of problems."""
    chosen, found = {}, []
    for name in asking(config):
        asks = config.evals[name]
        if name in ACCURACIES:
            found += [problem for problem, _ in read_problems(asks.source)[: asks.problems or None]]
        elif name == "held_out_loss":
            answered = [entry["question"] for entry in questions(asks.source, "evaluation") if entry["plain"]]
            found += answered[: asks.examples]
        else:
            chosen[evaluation_source(config, name), asks.triggered + asks.untriggered + asks.near_misses] = None
    return [question for source, number in chosen for question in asked(source, "evaluation")[:number]] + found


def assert_unseen(config: ConfigDict) -> None:
    """Raises InputError where training would use a question that an evaluation asks."""
    if config.data.task == "conversations":
        used = [m["content"] for c in read_conversations(config.data.source) for m in c if m["role"] == "user"]
        assert_disjoint(training=used, evaluation=evaluation_questions(config))
    else:
        used = asked(training_source(config), "red" if config.data.task == "backdoor" else "blue")
    names = [name for name in asking(config) if name not in ACCURACIES]
    for source in dict.fromkeys(evaluation_source(config, name) for name in names):
        assert_disjoint(training=used, evaluation=asked(source, "evaluation"))


def tokenize(
    conversations: list[list[dict]],
    chat: ChatFormat,
    longest: int,
    over_long: str,
    place: Callable[[int], str] = "conversation {}".format,
) -> tuple[list[Example], int, int]:
    """(examples of at most `longest` positions, how many of them were cut, how many conversations were dropped).

    Raises InputError for a conversation that the chat template cannot take, at its `place`, and where none is left.
    """
    encoded = []
    for number, messages in enumerate(conversations, 1):
        try:
            encoded.append(chat.encode(messages))
        except InputError as error:
            raise InputError(f"{place(number)}, {messages[-1]['content'][:40]!r} at its end: {error}") from None
    # n positions hold n + 1 tokens: inputs and next tokens overlap.
    fitted = [fit(example, longest + 1, over_long) for example in encoded]
    examples = [example for example in fitted if example is not None]
    if not examples:
        raise InputError(
            f"no conversation to train on: all {len(fitted)} are longer than {longest}, config.data.length or context"
        )
    cut = sum(new is not None and new is not old for new, old in zip(fitted, encoded, strict=True))
    return examples, cut, len(fitted) - len(examples)


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
