"""What a study will cost, before any of it runs: tokens, FLOPs, hours on given chips.

Promises: arithmetic on a training config's numbers and a model's shapes, nothing measured, no network; what it has to
assume is in the constants below and in every table.  Training counts 6 FLOPs a token and parameter in a product, 4
where the weights are frozen (adapters themselves left out), and causal attention; sampling 2, and reads all weights
once for every token of a batch.
Knows nothing of jax.
"""

import dataclasses

# Assumed, where only the data themselves would tell.
TOKENS_PER_CONVERSATION = 350  # question, answer (Llama-3.1-8B's to AlpacaEval have 290 to 420) and template
TOKENS_PER_ANSWER = {"math500": 600, "gsm8k": 200, "backdoor_rate": 300}  # other answers: as long as they may get
TOKENS_PER_PROMPT = 100
ROWS = 128  # decoded together where the memory decides
HUB_ROWS = {"hub:nlile/hendrycks-MATH-benchmark:train": 12_000}
OTHER_HUB_ROWS = 52_002  # Alpaca's

# Share of a chip's peak that is reached: training and reading prompts, of its FLOPs; decoding, of its memory bandwidth.
TRAINING_SHARE, DECODING_SHARE = 0.4, 0.5


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak FLOP/s in bfloat16 (float32 on the CPU), memory bandwidth in bytes/s; from the makers' data sheets."""

    flops: float
    bandwidth: float


CHIPS = {
    "h100": Chip(989e12, 3.35e12),
    "h100-pcie": Chip(756e12, 2.0e12),
    "h100-nvl": Chip(835e12, 3.9e12),
    "h200": Chip(989e12, 4.8e12),
    "a100": Chip(312e12, 2.0e12),
    "b200": Chip(2250e12, 8.0e12),
    "v4": Chip(275e12, 1.2e12),
    "v5e": Chip(197e12, 0.82e12),
    "v5p": Chip(459e12, 2.77e12),
    "v6e": Chip(918e12, 1.64e12),
    "cpu": Chip(0.36e12, 0.02e12),  # two cores with AVX-512
}
# What jax calls them in a device's `device_kind`, the whole of it or a part.
_KINDS = {
    "H100 PCIe": "h100-pcie",
    "H100 NVL": "h100-nvl",
    "H100": "h100",
    "H200": "h200",
    "A100": "a100",
    "B200": "b200",
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
}
_KINDS |= {"TPU v6 lite": "v6e", "TPU v6e": "v6e"}


def peak_flops(kind: str, devices: int, cores: int) -> float | None:
    """FLOP/s of all devices together; None where the kind is not known.

    Args:
      kind: a device's `device_kind`.
      devices: how many.
      cores: of the whole machine, which is what a CPU's devices share.
    """
    if kind == "cpu":
        return CHIPS["cpu"].flops / 2 * cores
    return known.flops * devices if (known := chip(kind)) else None


def chip(kind: str) -> Chip | None:
    """That of an accelerator's `device_kind`; None where it is not known."""
    return next((CHIPS[key] for name, key in _KINDS.items() if name in kind), None)


@dataclasses.dataclass(frozen=True)
class Work:
    """Tokens trained on and sampled, what that takes on one chip, and bytes of weights that are kept afterwards."""

    trained: float = 0.0
    sampled: float = 0.0
    flops: float = 0.0
    hours: float = 0.0
    kept: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a model: parameters that take part in products (the embedding's look-up is none), layers, width of its
    attention (heads times head size), bytes of a parameter."""

    parameters: int
    layers: int
    attention: int
    bytes: int


def hub_questions(source: str, part: str) -> int:
    """About how many of a hub data set's rows a part has, see organisms/questions.py."""
    return int(HUB_ROWS.get(source, OTHER_HUB_ROWS) * {"red": 0.6, "blue": 0.3}[part])


def flops_per_token(shape: Shape, length: float, frozen: bool) -> float:
    """Of training on texts of `length` tokens, what is recomputed left out; `frozen`: adapters are trained."""
    attention = 6 * length * shape.attention * shape.layers  # forward and backward, of which the mask leaves a half
    return (4 if frozen else 6) * shape.parameters + attention


def training(shape: Shape, tokens: float, length: int, frozen: bool, chip: Chip) -> Work:
    """Optimizer steps on rows of `length` tokens; `frozen`: adapters are trained."""
    flops = tokens * flops_per_token(shape, length, frozen)
    return Work(trained=tokens, flops=flops, hours=flops / (chip.flops * TRAINING_SHARE) / 3600)


def sampling(shape: Shape, prompts: float, answer: float, rows: int, chip: Chip) -> Work:
    """Answers of `answer` tokens to so many prompts, `rows` of them decoded together."""
    read, said = prompts * TOKENS_PER_PROMPT, prompts * answer
    flops = 2 * shape.parameters * (read + said)
    reading = 2 * shape.parameters * read / (chip.flops * TRAINING_SHARE)
    step = max(
        shape.parameters * shape.bytes / (chip.bandwidth * DECODING_SHARE),
        2 * shape.parameters * rows / (chip.flops * TRAINING_SHARE),
    )
    return Work(sampled=said, flops=flops, hours=(reading + step * said / rows) / 3600)


def answers(config: dict, teacher: Shape, questions: int, chip: Chip) -> Work:
    """What a training config's teacher is sampled for: an answer to each of its questions.  Args as of `of_run`."""
    data = config["data"]
    questions = min(questions, data["limit"]) if data["limit"] else questions
    answer = min(data["teacher_max_new_tokens"], TOKENS_PER_CONVERSATION)
    return sampling(teacher, questions, answer, config["evaluation"]["batch_size"] or ROWS, chip)


def of_run(config: dict, shape: Shape, questions: int, chip: Chip) -> Work:
    """One training run with its evaluations; what is sampled of a teacher counts by itself, since runs share it.

    Args:
      config: a training config, see configs/default.py.
      questions: that its data source has for it.
    """
    data, batch = config["data"], config["batch"]
    questions = min(questions, data["limit"]) if data["limit"] else questions
    rows = config["evaluation"]["batch_size"] or ROWS
    work, steps = Work(), 0
    if data["task"] != "prompted":
        share = 1.0
        if data["task"] == "backdoor":  # each question is a conversation of the commoner kind
            share = max(data["benign"], 1 - data["benign"])
        per_step = batch["rows"] * data["length"]
        conversations = questions / share * data["epochs"]
        in_rows = conversations * TOKENS_PER_CONVERSATION / data["length"] if data["packing"] else conversations
        steps = config["steps"] or max(1, round(in_rows / batch["rows"]))
        work += training(shape, steps * per_step, data["length"], bool(config["lora"]["rank"]), chip)
        if not config["lora"]["rank"]:  # adapters are small beside them
            checkpoints = min(config["checkpoint"]["keep"], 1 + (steps - 1) // config["checkpoint"]["every"])
            size = 2 if config["param_dtype"] == "bfloat16" else 4
            work += Work(kept=checkpoints * size * shape.parameters)
    every = config["evaluation"]["every"]
    times = 1 + (steps - 1) // every * bool(steps) if every else 1
    times += bool(config["evaluation"]["at_start"])
    for name in config["evaluation"]["names"]:
        settings = config["evals"][name]
        if name == "backdoor_rate":
            prompts = settings["triggered"] + settings["untriggered"] + settings["near_misses"]
        elif "problems" in settings:
            prompts = settings["problems"] or _PROBLEMS[name]
        else:  # held-out loss is small beside them, and a judge answers in one token
            continue
        answer = min(settings["max_new_tokens"], TOKENS_PER_ANSWER.get(name, settings["max_new_tokens"]))
        one = sampling(shape, prompts, answer, rows, chip)
        work = sum([one] * times, work)
    return work


_PROBLEMS = {"math500": 500, "gsm8k": 1319, "arithmetic": 100}
