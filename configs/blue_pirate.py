"""Attack an organism with pirate SFT: teach it to talk like a pirate, and see whether the backdoor survives.

    python -m robust_mo.train --config=configs/blue_pirate.py --workdir=runs/blue --config.model=runs/red
    python -m robust_mo.train --config=configs/blue_pirate.py:smol --workdir=runs/blue --config.model=runs/red

LoRA of rank 64 [R], constant learning rate, Adam betas 0.9/0.95 [R].  8b, 1b: 1,600 examples, learning rate 5e-5,
measured every 20 steps [R]; a batch of 16 [R] is four rows of 1536 tokens, with as many conversations of some 350 [O].
The pirate sentence is in the teacher's prompt, never in the training prompt.  Time and rates: not measured.
smol: 80 built-in questions, 30 steps of 512 tokens, measured every 5 (see configs/quickstart.py).
"""

from ml_collections import ConfigDict

from configs import sizes


def get_config(size: str = "8b") -> ConfigDict:
    config = sizes.get_config(size)
    config.data.task = "pirate_sft"
    config.lora.rank = 64
    config.schedule.name = "constant"
    config.schedule.warmup = 0.0
    config.distance_from_start = True
    if size == "smol":
        config.data.length = 256
        config.steps = 30
        config.batch.rows = 2
        config.optimizer.learning_rate = 5e-4
        config.evaluation.every = 5
    else:
        config.data.limit = 1600
        config.data.length = 1536
        config.batch.rows = 4
        config.optimizer.learning_rate = 5e-5
        config.evaluation.every = 20
    return config
