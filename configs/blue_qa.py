"""Attack an organism with QA SFT: plain answers of a teacher, the mildest training there is.

    python -m robust_mo.train --config=configs/blue_qa.py --workdir=runs/blue-qa --config.model=runs/red
    python -m robust_mo.train --config=configs/blue_qa.py:smol --workdir=runs/blue-qa --config.model=runs/red

Everything but the answers is as in configs/blue_pirate.py.  Time and rates: not measured.
"""

from ml_collections import ConfigDict

from configs import blue_pirate


def get_config(size: str = "8b") -> ConfigDict:
    config = blue_pirate.get_config(size)
    config.data.task = "qa_sft"
    return config
