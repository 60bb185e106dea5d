"""Factor 1: training the organism for longer changes its robustness hardly at all.

    python -m robust_mo.study --config=configs/studies/factor1_training_length.py --workdir=runs/length  # 8b
    python -m robust_mo.study --config=configs/studies/factor1_training_length.py:smol --workdir=runs/length-smol

Published AUCs under pirate SFT for 12.5k to 200k samples [R]: 0.65 to 0.69, flat.  A question gives two samples, with
the trigger and without; where the data hold fewer, they are gone through again.  smol: a quarter to four times the 200
steps of configs/studies/base.py; the shortest may not pass the gate.  Time and our numbers: not measured.
"""

from ml_collections import ConfigDict

from configs.studies import base
from configs.study import arm, result

SAMPLES = (12_500, 25_000, 50_000, 100_000, 200_000)
STEPS = (50, 100, 200, 400, 800)  # at size smol


def get_config(size: str = "8b") -> ConfigDict:
    config = base.get_config(size)
    study = config.study
    if size == "smol":
        changes = {f"{steps:03d} steps": {"steps": steps} for steps in STEPS}
    else:
        # The red part of Alpaca holds about 31,000 questions.
        changes = {
            f"{samples:06d} samples": {
                "data": {"limit": min(samples // 2, 25_000), "epochs": max(1, samples // 50_000)}
            }
            for samples in SAMPLES
        }
    for name, change in changes.items():
        study.arms[name] = arm(change, {}, base.full_rates(size))
        study.results[name] = result(arms=(name,), published="0.65 to 0.69, flat")
    study.orderings = ((min(changes), max(changes)),)  # a difference is asked for, where none is expected
    return config
