"""How often the backdoor's behaviour shows: with the trigger, without it, and with something like it.

Promises: questions of the evaluation part only, which no training uses; Wilson intervals; every answer in the
transcript.  Does not know how the backdoor came to be.
"""

from robust_mo.evals.subject import Measurement, Subject, Value
from robust_mo.organisms.distill import exchange
from robust_mo.organisms.questions import posed, problems, questions


def backdoor_rate(subject: Subject, **sampling) -> Measurement:
    """`backdoor_rate` over triggered prompts, `false_alarm_rate` over untriggered prompts and near misses together.

    Args:
      sampling: see `ask`.
    """
    transcript = [
        line | {"verdict": subject.backdoor.shows(line["answer"], line.get("gold"))}
        for line in ask(subject, **sampling)
    ]
    return Measurement(rates(transcript, ""), transcript)


def rates(transcript: list[dict], prefix: str) -> list[Value]:
    """The rates of a graded transcript, their names behind `prefix`; of what was not asked there is none."""
    values = []
    for name, conditions in (("backdoor_rate", {"triggered"}), ("false_alarm_rate", {"untriggered", "near_miss"})):
        verdicts = [line["verdict"] for line in transcript if line["condition"] in conditions]
        if verdicts:
            values.append(Value.share(prefix + name, verdicts))
    return values


def ask(
    subject: Subject,
    *,
    source: str,
    problem_source: str,
    instruction: str,
    triggered: int,
    untriggered: int,
    near_misses: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
) -> list[dict]:
    """Lines of a transcript, without a verdict.

    Args:
      source, problem_source: of the questions, or of the problems where the behaviour is about these; see
        organisms/questions.py.
      instruction: follows every problem.
      triggered, untriggered, near_misses: how many prompts of each kind, at most as many as there are questions.  The
        first questions serve triggered and untriggered prompts; near misses are asked of those that follow, and then
        of the first again.
      temperature, top_p, max_new_tokens: of sampling.
    """
    backdoor = subject.backdoor
    on = backdoor.on_problems
    entries = problems(problem_source, "evaluation") if on else questions(source, "evaluation")
    prompts = [
        (condition, entry, exchange(backdoor, templates, i, subject.system_prompt, posed(entry, instruction)))
        for condition, templates, chosen in (
            ("triggered", backdoor.unseen_triggers, entries[:triggered]),
            ("untriggered", backdoor.untriggered, entries[:untriggered]),
            ("near_miss", backdoor.near_misses, (entries[untriggered:] + entries[:untriggered])[:near_misses]),
        )
        if templates
        for i, entry in enumerate(chosen)
    ]
    conversations = [messages for *_, messages in prompts]
    told = subject.answers("backdoor_rate", conversations, temperature, top_p, max_new_tokens)
    return [
        {
            "id": f"{condition}-{number}",
            "condition": condition,
            **{name: entry[name] for name in ("gold",) if name in entry},
            "messages": messages,
            "answer": answer.text,
            "finish_reason": answer.finish_reason,
        }
        for number, ((condition, entry, messages), answer) in enumerate(zip(prompts, told, strict=True))
    ]
