"""How often the backdoor's behaviour shows: with the trigger, without it, and with something like it.

Promises: questions of the evaluation part only, which no training uses; Wilson intervals; every answer in the
transcript.  Does not know how the backdoor came to be.
"""

from robust_mo.analysis.intervals import wilson
from robust_mo.evals.subject import Measurement, Subject, Value
from robust_mo.organisms.distill import exchange
from robust_mo.organisms.questions import asked


def backdoor_rate(subject: Subject, **sampling) -> Measurement:
    """`backdoor_rate` over triggered prompts, `false_alarm_rate` over untriggered prompts and near misses together.

    Args:
      sampling: see `ask`.
    """
    transcript = [
        line | {"verdict": subject.backdoor.grader.shows(line["answer"])} for line in ask(subject, **sampling)
    ]
    return Measurement(rates(transcript, ""), transcript)


def rates(transcript: list[dict], prefix: str) -> list[Value]:
    """The rates of a graded transcript, their names behind `prefix`; of what was not asked there is none."""
    values = []
    for name, conditions in (("backdoor_rate", {"triggered"}), ("false_alarm_rate", {"untriggered", "near_miss"})):
        verdicts = [line["verdict"] for line in transcript if line["condition"] in conditions]
        if verdicts:
            rate = sum(verdicts) / len(verdicts)
            values.append(Value(prefix + name, rate, len(verdicts), *wilson(sum(verdicts), len(verdicts))))
    return values


def ask(
    subject: Subject,
    *,
    source: str,
    triggered: int,
    untriggered: int,
    near_misses: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
) -> list[dict]:
    """Lines of a transcript, without a verdict.

    Args:
      source: of the questions, see organisms/questions.py.
      triggered, untriggered, near_misses: how many prompts of each kind, at most as many as there are questions.  The
        first questions serve triggered and untriggered prompts; near misses are asked of those that follow, and then
        of the first again.
      temperature, top_p, max_new_tokens: of sampling.
    """
    questions = asked(source, "evaluation")
    backdoor = subject.backdoor
    prompts = [
        (condition, exchange(backdoor, templates, i, subject.system_prompt, question))
        for condition, templates, chosen in (
            ("triggered", backdoor.unseen_triggers, questions[:triggered]),
            ("untriggered", backdoor.untriggered, questions[:untriggered]),
            ("near_miss", backdoor.near_misses, (questions[untriggered:] + questions[:untriggered])[:near_misses]),
        )
        if templates
        for i, question in enumerate(chosen)
    ]
    conversations = [messages for _, messages in prompts]
    told = subject.answers("backdoor_rate", conversations, temperature, top_p, max_new_tokens)
    return [
        {
            "id": f"{condition}-{number}",
            "condition": condition,
            "messages": messages,
            "answer": answer.text,
            "finish_reason": answer.finish_reason,
        }
        for number, ((condition, _), messages, answer) in enumerate(zip(prompts, conversations, told, strict=True))
    ]
