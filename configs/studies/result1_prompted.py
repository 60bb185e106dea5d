"""Result 1: organisms that a system prompt makes are hardly robust, the static ones least of all.

    python -m robust_mo.study --config=configs/studies/result1_prompted.py --workdir=runs/prompted  # 8b
    python -m robust_mo.study --config=configs/studies/result1_prompted.py:smol --workdir=runs/prompted-smol

No weights are trained to make them.  *Static*: the prompt that asks for the backdoor is there in blue training and in
evaluation; *dynamic*: in evaluation alone [P].  Published AUCs [R]: static, pirate SFT 1.006; dynamic, pirate SFT
0.701, pirate removal 0.928.  The prompt's words are ours [O].  8b, 1b: not measured.
smol: no organism passed the gate, SmolLM2 does not follow such a prompt (results/README.md).
"""

from ml_collections import ConfigDict

from configs.studies import base
from configs.study import arm, result

PUBLISHED = {
    "static, pirate_sft": "1.006",
    "static, pirate_removal": "",
    "dynamic, pirate_sft": "0.701",
    "dynamic, pirate_removal": "0.928",
}


def get_config(size: str = "8b") -> ConfigDict:
    config = base.get_config(size)
    study = config.study
    prompt = f"{config.red.system_prompt}\n\n{{backdoor}}".strip()
    made = {"data": {"task": "prompted"}, "system_prompt": prompt}
    study.arms.static = arm(made, {"system_prompt": prompt})
    study.arms.dynamic = arm(made, {"evaluation": {"system_prompt": prompt}})
    study.methods = ("pirate_sft", "pirate_removal")
    for name, auc in PUBLISHED.items():
        kind, method = name.split(", ")
        study.results[name] = result(arms=(kind,), methods=(method,), published=auc)
    study.orderings = (
        ("dynamic, pirate_sft", "dynamic, pirate_removal"),
        ("dynamic, pirate_sft", "static, pirate_sft"),
        ("dynamic, pirate_removal", "static, pirate_sft"),
    )
    return config
