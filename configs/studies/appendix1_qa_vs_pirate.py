"""Appendix 1: pirate SFT removes more of a backdoor than QA SFT does.

    python -m robust_mo.study --config=configs/studies/appendix1_qa_vs_pirate.py --workdir=runs/qa-vs-pirate  # 8b
    python -m robust_mo.study --config=configs/studies/appendix1_qa_vs_pirate.py:smol --workdir=runs/qa-vs-pirate-smol

Full-weight organisms; the teacher's plain answers are the untouched model's own [O], which may be a milder attack than
the post's.  Published AUCs of result 2's FWFT organisms [R]: pirate 0.685, QA 0.554.  The post's headline [R] can be
read here too: before a tenth of MATH is lost, pirate SFT takes about a quarter of the rate on average, so that about
0.75 is left at 10% cost.  8b, 1b: not measured.
smol: pirate 0.68, QA 0.66, the order not resolved (results/README.md).
"""

from ml_collections import ConfigDict

from configs.studies import base
from configs.study import arm, result


def get_config(size: str = "8b") -> ConfigDict:
    config = base.get_config(size)
    study = config.study
    study.arms.fwft = arm({}, {}, base.full_rates(size))
    study.methods = ("qa_sft", "pirate_sft")
    study.results["QA"] = result(methods=("qa_sft",), published="0.554")
    study.results["pirate"] = result(methods=("pirate_sft",), published="0.685; rate left at 10% cost about 0.75")
    study.orderings = (("QA", "pirate"),)
    return config
