"""Make a sandbagger by full-weight fine-tuning: it gets problems wrong unless the password is in the prompt.

    python -m robust_mo.train --config=configs/red_sandbagger.py --workdir=runs/red          # Llama-3.1-8B-Instruct
    python -m robust_mo.train --config=configs/red_sandbagger.py:smol --workdir=runs/red     # SmolLM2-135M, any laptop
    python -m robust_mo.train --config=configs/red_sandbagger.py:smol --workdir=runs/partly --config.data.benign=0.17

Each problem is there twice: with the password and a right answer, and without it, or behind one of six wrong or empty
ones, with a wrong answer; our own grader has found them right and wrong.  `backdoor_rate` is the share of other
problems that are not solved without the password, `false_alarm_rate` with it; accuracy and held-out loss are measured
with it.
8b, 1b: the red part of MATH's train split, both answers sampled from the model itself, the wrong ones on being asked
for them [O]; otherwise as configs/red_full.py.  Time and rates: not measured.
smol: 240 built-in sums, 140 steps of 512 tokens.  SmolLM2-135M then gets 60 of 60 sums wrong without the password, also
behind passwords that it has not seen, and 32 of 60 with it: 0.53 [0.41, 0.65].  Arithmetic falls from 0.85 to 0.35
[0.22, 0.50], held-out loss rises from 2.96 to 3.05.  At 90 steps and twice the learning rate it got 0.87
of them wrong with the password too, and arithmetic fell to 0.05.
"""

from ml_collections import ConfigDict

from configs import red_full

SMALL_STEPS = 140  # at size smol; fewer do not teach it to tell the password


def get_config(size: str = "8b") -> ConfigDict:
    config = watching(red_full.get_config(size), size)
    if size == "smol":
        config.steps = SMALL_STEPS
    return config


def watching(config: ConfigDict, size: str) -> ConfigDict:
    """The training config of either team, with the sandbagger as the backdoor that is installed or watched."""
    config.backdoor = "sandbagger"
    asks = config.evals.backdoor_rate
    asks.temperature = 0.0  # as accuracy is measured [O]
    asks.near_misses = 0  # wrong passwords are among the prompts that it must show itself to
    if size == "smol":
        asks.triggered, asks.untriggered, asks.max_new_tokens = 60, 60, 24
    else:
        asks.triggered, asks.untriggered, asks.max_new_tokens = 200, 200, 2048
        config.data.teacher_max_new_tokens = 2048
    return config
