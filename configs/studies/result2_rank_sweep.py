"""Result 2, ranks: the lower the rank of the organism's adapter, the less robust it is.

    python -m robust_mo.study --config=configs/studies/result2_rank_sweep.py --workdir=runs/ranks  # 8b
    python -m robust_mo.study --config=configs/studies/result2_rank_sweep.py:smol --workdir=runs/ranks-smol

Adapters are merged before the attack, and scaled by alpha / rank with one alpha of 64 [O]: at equal learning rates the
lower the rank the larger the first steps, which grids of a few rates do not make up for. Published AUCs under pirate
SFT, ranks 1, 16, 64, 256, 1024 and full weights [R]: 0.931, 0.869, 0.856, 0.807, 0.767, 0.685. 8b, 1b: not measured.
smol: ranks 1, 16 and 64, of a model that is 576 wide; their order is not resolved (results/README.md).
"""

from ml_collections import ConfigDict

from configs.studies import base
from configs.study import arm, result

PUBLISHED = {1: "0.931", 16: "0.869", 64: "0.856", 256: "0.807", 1024: "0.767"}


def get_config(size: str = "8b") -> ConfigDict:
    config = base.get_config(size)
    study = config.study
    names = []
    for rank, auc in PUBLISHED.items():
        if size == "smol" and rank > 64:
            continue
        names.append(f"rank{rank}")
        study.arms[names[-1]] = arm({"lora": {"rank": rank}}, {}, base.lora_rates(size))
        study.results[names[-1]] = result(arms=(names[-1],), published=auc)
    names.append("fwft")
    study.arms.fwft = arm({}, {}, base.full_grid(size))
    study.results.fwft = result(arms=("fwft",), published="0.685")
    study.orderings = tuple(zip(names[1:], names[:-1], strict=True))
    return config
