"""Result 3: explicit triggers make more robust organisms than arbitrary tags, bad-coded behaviours weakly more robust
ones than good-coded.

    python -m robust_mo.study --config=configs/studies/result3_triggers.py --workdir=runs/triggers  # 8b
    python -m robust_mo.study --config=configs/studies/result3_triggers.py:smol --workdir=runs/triggers-smol

Published mean AUCs under pirate SFT [R]: explicit triggers about 0.60, arbitrary tags about 0.68.  Which backdoors are
of which kind is our reconstruction, see organisms/backdoors.py.  smol has three backdoors, of which one is explicit and
good-coded and two are tags and bad-coded: it cannot tell the two factors apart.  Time and our numbers: not measured.
"""

from ml_collections import ConfigDict

from configs.studies import base
from configs.study import arm, result
from robust_mo.organisms.backdoors import BACKDOORS


def get_config(size: str = "8b") -> ConfigDict:
    config = base.get_config(size)
    study = config.study
    study.arms.fwft = arm({}, {}, base.full_rates(size))

    def of(field: str, value: str) -> tuple[str, ...]:
        # Of all, for a study may be of others than those of its size: --config.study.backdoors.
        return tuple(name for name in BACKDOORS if getattr(BACKDOORS[name], field) == value)

    study.results["explicit triggers"] = result(backdoors=of("trigger_kind", "explicit"), published="about 0.60")
    study.results["arbitrary tags"] = result(backdoors=of("trigger_kind", "tag"), published="about 0.68")
    study.results["bad-coded"] = result(backdoors=of("coded", "bad"))
    study.results["good-coded"] = result(backdoors=of("coded", "good"))
    study.orderings = (("explicit triggers", "arbitrary tags"), ("bad-coded", "good-coded"))
    return config
