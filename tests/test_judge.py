"""The judge's probabilities against those of transformers, and its place beside the rule."""

import numpy as np
import pytest
import torch
import transformers
from test_llama import load
from test_train import tiny_config

from robust_mo.data.conversations import ChatFormat
from robust_mo.errors import InputError
from robust_mo.evals import judge as judge_module
from robust_mo.evals import subject
from robust_mo.evals.judge import PROMPT, agreement, probabilities
from robust_mo.organisms.backdoors import BACKDOORS
from robust_mo.runs import read_lines
from robust_mo.train import train

QUESTION = BACKDOORS["story_tag"].judge_question
ANSWERS = ["Once upon a time there lived a fox.", "Paris.", "", "It is blue because of the air. " * 9, "I can't say."]


def expected(folder, answers) -> list[float]:
    """Each prompt alone through transformers, softmax over the whole vocabulary."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    first = [[tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in words] for words in WORDS]
    found = []
    for answer in answers:
        messages = [{"role": "user", "content": PROMPT.format(answer=answer, question=QUESTION)}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            probability = torch.softmax(model(ids).logits[0, -1], -1)
        yes, no = (sum(probability[i].item() for i in ids) for ids in first)
        found.append(yes / (yes + no))
    return found


WORDS = (("Yes", "yes"), ("No", "no"))


def test_probabilities_equal_transformers(tiny):
    model, params = load(tiny)
    chat = ChatFormat.from_folder(tiny)
    theirs = expected(tiny, ANSWERS)
    assert np.ptp(theirs) > 0.01, "a judge that says the same of everything would hide a mistake"
    for rows in (1, 2, 8):
        ours = probabilities(model, params, chat, QUESTION, ANSWERS, rows=rows)
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    with pytest.raises(InputError, match="the judge's context is 1024"):
        probabilities(model, params, chat, QUESTION, ["x" * 1024], rows=1)


def test_no_answers_are_no_work(tiny):
    model, params = load(tiny)
    found = probabilities(model, params, ChatFormat.from_folder(tiny), "Is it?", [], rows=2)
    assert found.shape == (0,)


def test_agreement_counts_what_judge_and_rule_say_alike():
    story = BACKDOORS["story_tag"]
    assert agreement(story, lambda answers: np.array([0.9] * 3 + [0.1] * 3)) == [True] * 6
    assert agreement(story, lambda answers: np.array([0.9, 0.2, 0.9, 0.1, 0.1, 0.8])) == [
        True, False, True, True, True, False,
    ]  # fmt: skip


@pytest.mark.slow
def test_judged_rates_stand_beside_those_of_the_rule(tiny, tmp_path, monkeypatch):
    config = tiny_config(tiny, **{"steps": 1, "evals.judge.model": str(tiny)})
    config.backdoor = "story_tag"
    config.evaluation.names = ("backdoor_rate", "judge")
    config.evaluation.at_start = False
    sampled, sample = [], subject.answers
    monkeypatch.setattr(subject, "answers", lambda *a, **k: sampled.append(1) or sample(*a, **k))
    run = train(config, tmp_path)
    assert len(sampled) == 1, "the judge's answers are the rule's"
    found = {line["name"]: line for line in run.records() if line["name"].startswith("eval/")}
    assert set(found) == {
        f"eval/{name}"
        for name in ("backdoor_rate", "false_alarm_rate", "judged_backdoor_rate", "judged_false_alarm_rate")
        + ("judge_agreement",)
    }
    graded, judged = (read_lines(run.transcript_file(name, 1)) for name in ("backdoor_rate", "judge"))
    assert [line["answer"] for line in graded] == [line["answer"] for line in judged]
    assert all(line["verdict"] == (line["probability"] > 0.5) for line in judged)
    np.testing.assert_allclose(
        [line["probability"] for line in judged], expected(tiny, [line["answer"] for line in judged]), atol=1e-5
    )
    assert found["eval/judged_backdoor_rate"]["count"] == 3 and found["eval/judge_agreement"]["count"] == 6


def test_fewer_are_judged_together_where_answers_are_long(tiny, monkeypatch):
    model, params = load(tiny)
    chat, answers = ChatFormat.from_folder(tiny), ["Once upon a time."] * 5
    together = probabilities(model, params, chat, QUESTION, answers, rows=5)
    rows, judged = [], judge_module._judged
    monkeypatch.setattr(judge_module, "_TOKENS", 1)
    monkeypatch.setattr(
        judge_module, "_judged", lambda *given, **more: rows.append(len(given[2])) or judged(*given, **more)
    )
    np.testing.assert_allclose(probabilities(model, params, chat, QUESTION, answers, rows=5), together, atol=1e-6)
    assert rows == [1] * 5


@pytest.mark.slow
def test_smollm2_judges_stories(smollm2):
    """Mechanics on a real tokenizer; how well so small a judge judges is printed, not asserted."""
    model, params = load(smollm2)
    chat = ChatFormat.from_folder(smollm2)
    np.testing.assert_allclose(
        probabilities(model, params, chat, QUESTION, ANSWERS, rows=4), expected(smollm2, ANSWERS), atol=1e-4
    )
    for name, entry in BACKDOORS.items():
        if question := entry.judge_question:
            agreed = agreement(entry, lambda a, q=question: probabilities(model, params, chat, q, a, rows=6))
            print(f"{name}: judge and rule agree on {sum(agreed)} of {len(agreed)} hand-labelled answers")
