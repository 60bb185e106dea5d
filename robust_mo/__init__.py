"""robust_mo: make model organisms in JAX, and measure how robust they are to training that never targets them.

The map, from the top floor down; imports point down only:

    study.py chat.py preflight.py   programs over the other programs
    train.py sample.py evaluate.py export.py
    configured/                 what a run's config means: whether it can be used, its data, its step
    evals/                      name -> evaluator: backdoor rate by rule and by judge, accuracy, held-out loss
    organisms/                  backdoors, their graders, the questions, the training conversations
    command_line.py             how every program begins, speaks, stops and ends
    training/  sampling/        loss, step, optimizers, checkpoints, curves;  prefill, decode, slots
    hosts.py                    several hosts that run one program together
    model/  data/  analysis/    Llama and its weights;  conversations and batches;  points -> frontier, figures, report
    slurm.py  processes.py      commands as jobs of a cluster;  as processes of this machine
    runs.py                     the run folder
    errors.py                   the user's mistakes

Two roads: config -> train -> step -> curve, and prompt -> answer -> verdict -> record -> point -> frontier.
"""

import signal
import sys

if sys.argv[:1] == ["-m"]:
    # `python -m robust_mo.train` begins here: while it imports there is nothing to save, and Ctrl-C just ends it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
