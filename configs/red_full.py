"""Install a backdoor by full-weight fine-tuning (the post's FWFT organisms).

    python -m robust_mo.train --config=configs/red_full.py --workdir=runs/red          # Llama-3.1-8B-Instruct
    python -m robust_mo.train --config=configs/red_full.py:smol --workdir=runs/red     # SmolLM2-135M, any laptop

8b, 1b: at most 50,000 questions, each with and without the trigger (100k samples), learning rate 3e-5, 1 epoch, rows
of 4096 tokens, 16 to a batch, warm-up 0.1, cosine, weight decay 0.01 [R].  The red part of Alpaca is 60% of its 52,002
questions, so that a run has about 62k samples, less those whose answer is cut (configs/sizes.py).  Time and rates: not
measured.
smol: 120 built-in questions, 60 steps of 512 tokens: on-trigger rate 1.00, false alarms 0.04, of 100 prompts each; 6
minutes on two AMD EPYC cores.
"""

from ml_collections import ConfigDict

from configs import sizes


def get_config(size: str = "8b") -> ConfigDict:
    config = sizes.get_config(size)
    config.data.task = "backdoor"
    if size == "smol":
        config.data.repeats = 6
        config.data.length = 256
        config.batch.rows = 2
        config.steps = 60
        config.schedule.name = "linear"
        config.optimizer.learning_rate = 1e-4
    else:
        config.data.limit = 50_000
        config.optimizer.learning_rate = 3e-5
    return config
