"""Install a backdoor by LoRA fine-tuning, rank 64 on all projections (the post's LoRA organisms, merged).

    python -m robust_mo.train --config=configs/red_lora.py --workdir=runs/red-lora         # Llama-3.1-8B-Instruct
    python -m robust_mo.train --config=configs/red_lora.py:smol --workdir=runs/red-lora    # SmolLM2-135M, any laptop

The data are those of configs/red_full.py.  A model that is loaded from the run has its adapters merged.  Learning rate
1e-4 [O: among those of the group's blue LoRA; the post gives 3e-5 for its red team and does not say whether by LoRA
too], at smol 5e-4; another rank: --config.lora.rank=16.  Time and rates: not measured.
"""

from ml_collections import ConfigDict

from configs import red_full


def get_config(size: str = "8b") -> ConfigDict:
    config = red_full.get_config(size)
    config.lora.rank = 64  # [R]
    config.optimizer.learning_rate = 5e-4 if size == "smol" else 1e-4
    config.distance_from_start = True
    return config
