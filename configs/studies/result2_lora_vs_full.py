"""Result 2: LoRA organisms are less robust than full-weight ones, under pirate SFT and under QA SFT.

    python -m robust_mo.study --config=configs/studies/result2_lora_vs_full.py --workdir=runs/result2  # 8b
    python -m robust_mo.study --config=configs/studies/result2_lora_vs_full.py:smol --workdir=runs/result2-smol

*Merged*: the blue team gets a fresh adapter on the organism's merged weights. *Continued*: it trains the organism's own
adapter on. *FWFT*: all weights are trained. Published AUCs [R]: pirate 0.890 continued, 0.856 merged, 0.685 FWFT; QA
0.859, 0.839, 0.554. Each is compared at the best of its learning rates (of two, of LoRA's three at 8b and 1b:
configs/studies/base.py), FWFT too, whose published numbers are of 3e-5: appendix 1 has these alone. 8b, 1b: not
measured.
smol: the same order, for another reason than robustness (results/README.md).
"""

from ml_collections import ConfigDict

from configs.studies import base
from configs.study import arm, result

PUBLISHED = {
    "pirate_sft": {"continued": "0.890", "merged": "0.856", "fwft": "0.685"},
    "qa_sft": {"continued": "0.859", "merged": "0.839", "fwft": "0.554"},
}


def get_config(size: str = "8b") -> ConfigDict:
    config = base.get_config(size)
    study = config.study
    study.arms.fwft = arm({}, {}, base.full_grid(size))
    study.arms.merged = arm({"lora": {"rank": 64}}, {}, base.lora_rates(size))
    study.arms.continued = arm({"lora": {"rank": 64}}, {"lora": {"continued": True}}, base.lora_rates(size))
    study.methods = tuple(PUBLISHED)
    for method, published in PUBLISHED.items():
        for name, auc in published.items():
            study.results[f"{name}, {method}"] = result(arms=(name,), methods=(method,), published=auc)
    study.orderings = tuple(
        (f"{smaller}, {method}", f"{larger}, {method}")
        for method in PUBLISHED
        for smaller, larger in (("fwft", "merged"), ("merged", "continued"))
    ) + tuple((f"{name}, qa_sft", f"{name}, pirate_sft") for name in study.arms)
    return config
