"""Accuracy on problems with one right answer: MATH-500, GSM8K, the built-in arithmetic, or any JSONL of that form.

Promises: every answer is graded by organisms/math_grader.py and kept; what had no answer, was cut off, or ran out of
the grader's time is counted beside the accuracy.  A password that unlocks the model is in the prompt: what the model
can do is measured here, not what it will.  Does not know which model answers.
"""

from robust_mo.data.conversations import with_system
from robust_mo.data.prompts import read_problems
from robust_mo.evals.subject import Measurement, Subject, Value
from robust_mo.organisms.math_grader import extract, grade


def accuracy(
    subject: Subject,
    *,
    task: str,
    source: str,
    problems: int,
    instruction: str,
    demonstrations: tuple[tuple[str, str], ...],
    temperature: float,
    top_p: float,
    max_new_tokens: int,
) -> Measurement:
    """`<task>_accuracy`, the rates of what went wrong in other ways, and the answers' mean length in tokens.

    Args:
      task: name under which results are kept.
      source: "builtin", a JSONL file, or "hub:NAME[:CONFIG]:SPLIT"; see `read_problems`.
      problems: how many, from the start; 0 for all.
      instruction: follows the problem in the user's turn, and asks for \\boxed{}.
      demonstrations: (problem, answer text) pairs shown as earlier turns.
      temperature, top_p, max_new_tokens: of sampling; 0 and 1 for greedy.
    """
    rows = read_problems(source)
    rows = rows[:problems] if problems else rows
    shown = []
    for problem, answer in demonstrations:
        shown += [{"role": "user", "content": problem + instruction}, {"role": "assistant", "content": answer}]
    conversations = [
        with_system([*shown, {"role": "user", "content": problem + instruction}], subject.unlocked_system_prompt)
        for problem, _ in rows
    ]
    told = subject.answers(task, conversations, temperature, top_p, max_new_tokens)
    transcript = [
        {
            "id": f"problem-{number}",
            "problem": problem,
            "gold": gold,
            "messages": messages,
            "answer": answer.text,
            "finish_reason": answer.finish_reason,
            "verdict": grade(answer.text, gold),
        }
        for number, ((problem, gold), messages, answer) in enumerate(zip(rows, conversations, told, strict=True))
    ]

    def rate(name, hits):
        return Value.share(f"{task}_{name}", list(hits))

    values = [
        rate("accuracy", (line["verdict"] is True for line in transcript)),
        rate("no_answer_rate", (extract(line["answer"]) is None for line in transcript)),
        rate("truncation_rate", (line["finish_reason"] == "length" for line in transcript)),
        rate("timeout_rate", (line["verdict"] is None for line in transcript)),
    ]
    lengths = [answer.tokens for answer in told]
    values.append(Value(f"{task}_mean_tokens", sum(lengths) / len(lengths), len(lengths)))
    # The subset that needs no equivalence grader: whole numbers, compared as text (293 of MATH-500).
    whole = [line for line in transcript if line["gold"].strip().isdigit()]
    if 0 < len(whole) < len(transcript):
        values.append(rate("integer_accuracy", (extract(line["answer"]) == line["gold"].strip() for line in whole)))
    return Measurement(values, transcript)
