"""Factor 4: among explicit, tag and semantic triggers of the same behaviours there is no clear trend.

    python -m robust_mo.study --config=configs/studies/factor4_trigger_types.py --workdir=runs/trigger-types  # 8b
    python -m robust_mo.study --config=configs/studies/factor4_trigger_types.py:smol --workdir=runs/trigger-types-smol

Refusals and cats, each under all three kinds of trigger, so that nothing but the trigger differs; but a tag is measured
as it was trained, the others in wordings that training has not seen.  The report knows them as so many backdoors, two
of a kind, of which chance makes one ordering in four: `--config.study.red_seeds="(0, 1, 2)"` asks better.  Published:
no clear trend [R].  Time and our numbers: not measured.
"""

import itertools

from ml_collections import ConfigDict

from configs.studies import base
from configs.study import arm, result

KINDS = ("explicit", "tag", "semantic")


def get_config(size: str = "8b") -> ConfigDict:
    config = base.get_config(size)
    study = config.study
    study.arms.fwft = arm({}, {}, base.full_rates(size))
    behaviours = ("refuse",) if size == "smol" else ("refuse", "cats")
    study.backdoors = tuple(f"{behaviour}_{kind}" for behaviour in behaviours for kind in KINDS)
    for kind in KINDS:
        chosen = tuple(f"{behaviour}_{kind}" for behaviour in behaviours)
        study.results[kind] = result(backdoors=chosen, published="no clear trend")
    study.orderings = tuple(itertools.combinations(KINDS, 2))  # a difference is asked for, where none is expected
    return config
