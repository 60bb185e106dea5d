"""What changes with the size of the model: `8b`, `1b`, `smol`.  Code does not.

Marks as in configs/default.py.  The 8b and 1b sizes take Alpaca questions from the hub, and problems from MATH's train
split (the 12,000 that are not in MATH-500), answered by `config.data.teacher`: the size's own untouched model, whatever
--config.model is [O; the post's blue teacher is Qwen3-30B-A3B [R], whose plain answers may be further from an
organism's own].  An answer may have 1,024 tokens, which one in twenty of Llama-3.1-8B's to AlpacaEval reaches and is
dropped for (256 would drop 72 in a hundred, and leave the short ones).  Backdoor rates are read off answers as long
and judged whole: an insult or a story often begins late.

smol takes the built-in questions, sums and answers, so that it needs no hub and finishes on a laptop; an evaluation
takes 40 s there, on two AMD EPYC cores.
"""

from ml_collections import ConfigDict

from configs import default
from robust_mo.errors import InputError

_MODELS = {"8b": "meta-llama/Llama-3.1-8B-Instruct", "1b": "meta-llama/Llama-3.2-1B-Instruct", "smol": "smollm2-135m"}


def get_config(size: str) -> ConfigDict:
    """The default config at one of the sizes."""
    if size not in _MODELS:
        raise InputError(f"the config's argument is {size!r}: choose from {', '.join(_MODELS)}")
    config = default.get_config()
    config.model = _MODELS[size]
    if size == "smol":
        config.system_prompt = ""  # the template adds the one that SmolLM2 was trained with
        asks = config.evals.backdoor_rate
        asks.triggered, asks.untriggered, asks.near_misses, asks.max_new_tokens = 100, 80, 20, 16
        config.evals.arithmetic.problems = 40
        config.evals.held_out_loss.examples = 16
        return config
    config.compute_dtype = "bfloat16"
    config.remat = "auto"
    config.data.source = "hub:tatsu-lab/alpaca:train"  # [R]
    config.data.problem_source = "hub:nlile/hendrycks-MATH-benchmark:train"  # [O]
    config.data.instruction = config.evals.math500.instruction
    config.data.answers = "teacher"  # [R]
    config.data.teacher = config.model
    config.data.teacher_max_new_tokens = 1024  # [O]
    config.data.length = 4096  # [R]
    config.batch.rows = 16  # [R]
    config.loss_chunk = 512
    config.optimizer.soap.longest_side = 4096  # up to 8B's hidden size
    config.log_every = 10
    config.distance_from_start = False  # a second copy of all weights
    config.checkpoint.every = 500
    config.evaluation.names = ("backdoor_rate", "math500", "held_out_loss")
    config.evaluation.batch_size = 0
    config.evals.backdoor_rate.source = config.data.source
    config.evals.backdoor_rate.max_new_tokens = config.data.teacher_max_new_tokens  # [O]
    config.evals.judge.model = config.model
    config.evals.held_out_loss.source = config.data.source
    config.evals.held_out_loss.length = 2048
    config.evals.held_out_loss.loss_chunk = 512
    return config
