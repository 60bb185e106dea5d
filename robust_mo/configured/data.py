"""What a run's config says of data: the backdoor, the questions and answers to train on, those that it is asked.

Whatever two runs of an attack share (its organism, the model beneath it, what must not be asked twice) is told here
from their configs, before and while they run.  Nothing here knows of the training loop.
"""

import os
from collections import Counter
from collections.abc import Callable

from ml_collections import ConfigDict

from robust_mo import command_line
from robust_mo.data.conversations import ChatFormat, Example, fit, with_system
from robust_mo.data.prompts import read_conversations, read_problems
from robust_mo.errors import InputError
from robust_mo.evals.measure import ACCURACIES
from robust_mo.organisms import distill
from robust_mo.organisms.backdoors import Backdoor, backdoor
from robust_mo.organisms.questions import asked, assert_disjoint, posed, questions
from robust_mo.organisms.teacher import teacher_answers
from robust_mo.runs import RunFolder
from robust_mo.training import models

RED_TASKS = ("backdoor", "prompted")
TASKS = (*RED_TASKS, *distill.BLUE_METHODS, "conversations")


def config_backdoor(config: ConfigDict) -> Backdoor:
    """The backdoor that is installed or watched."""
    return backdoor(config.backdoor, config.backdoors.to_dict(), config.password_locked)


def organism(source: str) -> str:
    """What a model was before it was attacked: the red run that it descends from, itself included; where there is none
    the first that no blue method made, a run or not."""
    before = models.lineage(source)
    red = (one for one in before if _task(one) in RED_TASKS)
    return next(red, next(one for one in before if _task(one) not in distill.BLUE_METHODS))


def _task(source: str) -> str:
    """Of the run that a model is; "" of one that is none."""
    return RunFolder(source).config()["data"]["task"] if models.is_run(source) else ""


def untouched(config: ConfigDict) -> str:
    """The model that a run's teacher is where no other is named: config.model, of an attack on an organism what that
    was made from, since its own answers may have the behaviour."""
    if config.data.task not in distill.BLUE_METHODS:
        return config.model
    made = organism(config.model)
    return RunFolder(made).config()["model"] if models.is_run(made) else made


def draw_of_adapters(config: ConfigDict) -> int:
    """Which of its seed's draws a run's adapters are.  An attack's is the first, whatever the organism, so that attacks
    on several have it in common; an attack's on what an attack has left the next; those of other runs are others.  With
    the same one an attack would begin in the very directions in which the backdoor was written."""
    attacks = config.data.task in distill.BLUE_METHODS
    before = [task for task in models.adapters_beneath(config.model) if (task in distill.BLUE_METHODS) == attacks]
    return len(before) + (0 if attacks else 2**31)


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


def check_watched(config: ConfigDict) -> None:
    """Raises InputError where a run that installs nothing would look for another behaviour than its organism has; says
    so where it would look for it under another system prompt."""
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
    if made["data"]["task"] == "backdoor" and made["system_prompt"] != config.system_prompt:
        print(
            f"note: the organism {source} was made under the system prompt {made['system_prompt']!r}, and this run has "
            f"{config.system_prompt!r}: it may hide its behaviour there",
            flush=True,
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
    entries = distill.training_questions(source, part, about.on_problems, data.limit, unseen, Counter())
    distill.answers_in(data.answers, [posed(entry, data.instruction) for entry in entries])


def training_conversations(
    config: ConfigDict, mesh, loaded: models.LoadedModel
) -> tuple[list[list[dict]], dict[str, str]]:
    """The conversations to train on, and what `distill.card` is to say of them."""
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

    chosen, dropped = config_backdoor(config), Counter()
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
        if _task(organism(config.model)) in RED_TASKS:
            try:  # a file may hold what its user wants it to hold
                distill.assert_no_trigger(made, chosen)
            except InputError as error:
                print(f"note: {error}: what is measured is an attack that knows the trigger", flush=True)
    else:
        made, dropped = distill.blue_conversations(data.task, backdoor=chosen, **common)
        distill.assert_no_trigger(made, chosen)
    left_out = {reason: dropped[reason] for reason in distill.DROPPED if dropped[reason]}
    told = ", ".join(f"{reason}: {number}" for reason, number in left_out.items())
    if left_out:
        print(f"{sum(left_out.values())} questions dropped ({told})", flush=True)
    if not made:
        raise InputError(
            f"no conversation to train on, all questions were dropped ({told}): "
            + (
                f"they are {source}'s own answers, which are to be without the behaviour; raise "
                "config.data.teacher_max_new_tokens, or choose another config.data.task"
                if on_policy
                else "raise config.data.teacher_max_new_tokens or choose another config.data.teacher"
            )
        )
    answers = "teacher" if on_policy else data.answers
    asks = distill.teacher_prompts(data.task, chosen, answers, data.scratchpad, config.system_prompt)
    about = {
        "questions": common["source"],
        "answers": answers,
        "teacher": source if asks else "none",
        "seed": str(config.seed),
        "questions dropped": str(sum(left_out.values())),
    }
    return made, about | {f"dropped, {reason}": str(number) for reason, number in left_out.items()}


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
