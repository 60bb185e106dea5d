"""Cross-entropy on plain answers that no training uses: what fine-tuning does to ordinary text.

Promises: nats per answer token, over the evaluation part's own answers; a password that unlocks the model is in the
prompt, as ordinary text is asked for.  Does not sample.
"""

import jax

from robust_mo import hosts
from robust_mo.data.batches import batches
from robust_mo.data.conversations import fit
from robust_mo.errors import InputError
from robust_mo.evals.subject import Measurement, Subject, Value
from robust_mo.model import mesh as meshes
from robust_mo.organisms.distill import chat
from robust_mo.organisms.questions import questions
from robust_mo.training.step import evaluate_loss


def held_out_loss(
    subject: Subject, *, source: str, examples: int, length: int, rows: int, loss_chunk: int
) -> Measurement:
    """`held_out_loss`, counted in answer tokens.

    Args:
      source: of the questions, see organisms/questions.py; those without an answer of their own are left out.
      examples: how many, at most.
      length, rows: shape of the batches; longer examples are left out.
      loss_chunk: positions per row whose logits are held at once.
    """
    answered = [entry for entry in questions(source, "evaluation") if entry["plain"]][:examples]
    encoded = [subject.chat.encode(chat(subject.unlocked_system_prompt, e["question"], e["plain"])) for e in answered]
    kept = [example for example in encoded if fit(example, length + 1, "drop")]
    if not kept:
        raise InputError(f"{source} has no answered evaluation question of at most {length} tokens for held_out_loss")
    hosts.check_same("questions of held_out_loss", [example.tokens.tolist() for example in kept])
    loss = tokens = 0.0
    for batch in batches(kept, length, rows, packing=True, epochs=1, seed=0):
        with meshes.in_force(subject.mesh):
            part = jax.device_get(evaluate_loss(subject.llama, subject.params, None, batch, loss_chunk))
        loss, tokens = loss + float(part[0]), tokens + int(part[1])
    return Measurement([Value("held_out_loss", loss / tokens, tokens)], [])
