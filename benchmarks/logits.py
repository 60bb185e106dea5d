"""How far SmolLM2's logits lie from torch's, in float32, on real conversations: rounding, counted.

    python -m benchmarks.logits [--conversations=40]

The built-in questions with their plain answers, in the model's chat template.  Ours are taken twice, as the model is
used and with every product summed exactly (JAX_DEFAULT_MATMUL_PRECISION=F64_F64_F64; weights, activations and logits
are float32 both times), beside transformers' in float32 and in float64.  Logits reach 44 here, where float32 itself
has steps of 4e-6.  Writes benchmarks/results/logits.json.
"""

import argparse
import json
import os

import numpy as np

from benchmarks import sizes
from benchmarks.peers import keep, settle

LIMIT = 1e-4
MULTIPLE = 64  # ours are padded to a multiple of it: few shapes to compile


def conversations(count: int) -> list[list[int]]:
    from robust_mo.data.conversations import ChatFormat
    from robust_mo.data.prompts import builtin_questions

    chat = ChatFormat.from_folder(sizes.folder("smol"))
    asked = [("user", "question"), ("assistant", "plain")]
    rows = builtin_questions("red")[:count]
    return [chat.encode([{"role": role, "content": row[field]} for role, field in asked]).tokens for row in rows]


def theirs(texts: list[list[int]], dtype: str) -> list[np.ndarray]:
    """Of each text float `[T, V]`."""
    import torch
    import transformers

    folder = sizes.folder("smol")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = model.to(getattr(torch, dtype))
    with torch.no_grad():
        return [model(torch.tensor(np.array([text], np.int64))).logits[0].numpy() for text in texts]


def ours(texts: list[list[int]], precision: str | None) -> list[np.ndarray]:
    """Of each text float32 `[T, V]`; `precision` of products, as jax names it, or None."""
    import jax

    from robust_mo.model import hugging_face
    from robust_mo.model import mesh as meshes
    from robust_mo.model.llama import unembed

    folder = sizes.folder("smol")
    model = hugging_face.build(hugging_face.read_config(folder), None, "float32", "float32", "none")
    params = hugging_face.load_params(folder, model, meshes.make_mesh(1, -1, 1))

    @jax.jit
    def logits(params, tokens, positions, segments):
        return unembed(params, model.apply({"params": params}, tokens, positions, segments)[0])

    found = []
    with jax.default_matmul_precision(precision):
        for text in texts:
            places = np.arange(-(-len(text) // MULTIPLE) * MULTIPLE, dtype=np.int32)
            tokens = np.pad(np.array(text, np.int32), (0, len(places) - len(text)))
            inputs = (tokens[None], places[None], (places < len(text))[None].astype(np.int32))
            found.append(np.asarray(logits(params, *inputs))[0, : len(text)])
    return found


def distance(some: list[np.ndarray], others: list[np.ndarray]) -> dict[str, float]:
    """The largest difference, its root mean square, and how many positions and logits differ by more than LIMIT."""
    apart = [np.abs(a - b) for a, b in zip(some, others, strict=True)]
    squares = sum(np.square(a, dtype=np.float64).sum() for a in apart)
    return {
        "largest": float(max(a.max() for a in apart)),
        "root mean square": float(np.sqrt(squares / sum(a.size for a in apart))),
        "positions beyond 1e-4": int(sum((a > LIMIT).any(-1).sum() for a in apart)),
        "logits beyond 1e-4": int(sum((a > LIMIT).sum() for a in apart)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=40)
    args = parser.parse_args()
    settle()
    os.environ["JAX_PLATFORMS"] = "cpu"  # where the peer's are taken
    texts = conversations(args.conversations)
    if not texts:
        parser.error("--conversations: give at least 1")
    logits = {
        "ours": ours(texts, None),
        "ours, exact sums": ours(texts, "F64_F64_F64"),
        "torch float32": theirs(texts, "float32"),
        "torch float64": theirs(texts, "float64"),
    }
    pairs = [("ours", "torch float32"), ("ours, exact sums", "torch float32")]
    pairs += [(name, "torch float64") for name in list(logits)[:3]]
    found = {f"{one} from {other}": distance(logits[one], logits[other]) for one, other in pairs}
    size = {"positions": sum(map(len, texts)), "logits": sum(x.size for x in logits["ours"])}
    print(json.dumps(size | {"largest logit": float(max(np.abs(x).max() for x in logits["ours"]))}))
    for name, figures in found.items():
        print(f"{name:42}", ", ".join(f"{what} {value:.3g}" for what, value in figures.items()), flush=True)
    keep("logits", {**size, "distance": found}, "cpu")


if __name__ == "__main__":
    main()
