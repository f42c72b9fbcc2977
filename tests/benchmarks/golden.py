"""Golden figures: losses, logits, statistics and packed tensors of fixed inputs, to compare two commits on one machine.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.golden --out before.json      # at one commit
    OMP_NUM_THREADS=1 python -m tests.benchmarks.golden --compare before.json  # at another; status 1 where one differs

Everything is fp64 on the CPU, so a figure that changes says that the arithmetic has changed, and not only its rounding.
The bits belong to one machine and one version of torch.
"""

import argparse
import hashlib
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from torch import Tensor

from models import checkpoint
from models.config import ModelConfig
from models.generation import generate
from models.transformer import Transformer
from recipes.cli import main as espalier

RECIPES = Path(__file__).parents[2] / "recipes/pretrain"
TRAINED = ("quickstart", "moe-quickstart", "selective", "window", "hybrid", "early-exit", "mixture-of-depths")
VOCABULARY, LENGTH, ROWS, STEPS = 264, 64, 4, 20
SMALL = {
    "vocab_size": VOCABULARY,
    "width": 64,
    "depth": 2,
    "context": LENGTH,
    "attention": {"kind": "full", "heads": 4, "kv_heads": 2},
    "feedforward": {"kind": "swiglu", "width": 160},
}
METHODS = {
    "gptq": "--bits 4 --group_size 32",
    "awq": "--bits 4 --group_size 32",
    "squeezellm": "--bits 4",
    "product": "",
}


def batches(count: int, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """Seeded random tokens (B, T) with documents and targets: two documents a row, the last row padded at its end."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        tokens = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)  # (B, T + 1)
        documents = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
        documents[:, LENGTH // 3 :] = 1
        targets = tokens[:, 1:].clone()
        targets[:, LENGTH // 3 - 1] = -100
        documents[-1, -8:], targets[-1, -9:] = -1, -100
        yield {"tokens": tokens[:, :-1], "documents": documents, "targets": targets}


def build(architecture: dict, seed: int = 0) -> Transformer:
    """The model in fp64 with seeded weights."""
    torch.manual_seed(seed)
    return Transformer(ModelConfig.from_dict(architecture)).double()


def train(model: Transformer) -> list[float]:
    """Losses of `STEPS` steps of AdamW, the mechanisms' losses added."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for batch in batches(STEPS):
        output = model(**batch)
        loss = output.loss + sum(output.losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step()
        losses.append(loss.item())
    return losses


def digest(*tensors: Tensor) -> str:
    """SHA-256 over the bytes of the tensors."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def trained_figures() -> dict[str, object]:
    """Losses of every recipe's architecture, and what the trained model makes of a batch and of a prompt."""
    figures: dict[str, object] = {}
    architectures = {
        name: yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["model"]["architecture"] for name in TRAINED
    }
    architectures["reversible"] = architectures["quickstart"] | {"residual": "reversible"}
    for name, architecture in architectures.items():
        model = build({**architecture, "vocab_size": VOCABULARY, "context": LENGTH})
        figures[f"{name}: losses"] = train(model)
        batch = next(batches(1, seed=1))
        model.eval()
        with torch.no_grad():
            figures[f"{name}: logits"] = digest(model(batch["tokens"], documents=batch["documents"]).logits)
            figures[f"{name}: cached logits"] = digest(*cached_logits(model, batch["tokens"][:, :24]))
        figures[f"{name}: generated"] = generate(model, batch["tokens"][:2, :9].tolist(), max_new_tokens=24)
    return figures


def cached_logits(model: Transformer, tokens: Tensor) -> Iterator[Tensor]:
    """Logits (B, T, V) of tokens (B, 24) that are read through the cache: 16 at once, then one by one."""
    cache = model.new_cache(*tokens.shape)
    for chunk in tokens.split([16, *[1] * (tokens.shape[1] - 16)], dim=1):
        yield model(chunk, cache=cache).logits


def compressed_figures() -> dict[str, object]:
    """The tensors that each method of quantization stores for one small model that was trained for a moment."""
    figures: dict[str, object] = {}
    model = build(SMALL)
    train(model)
    with tempfile.TemporaryDirectory() as place:
        parent, text = Path(place, "parent"), Path(place, "text.txt")
        write_model(model, parent, text)
        for method, options in METHODS.items():
            out = Path(place, method)
            common = f"--data {text} --samples 16 --sequence_length 32 --speed_rounds 1 --device cpu"
            status = espalier(f"quantize {parent} --out {out} --method {method} {options} {common}".split())
            if status:
                raise SystemExit(f"quantize --method {method} ended with status {status}")
            stored = checkpoint.TensorFiles(out)
            for name in sorted(stored):
                figures[f"{method}: {name}"] = digest(stored[name])
    return figures


def write_model(model: Transformer, place: Path, text: Path) -> None:
    """A model folder with a tokenizer of `VOCABULARY` tokens, and a text for calibration and evaluation."""
    from app.data.tokenizer import train_tokenizer

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh ", k=draw.randint(2, 9))) for _ in range(200)]
    documents = [" ".join(draw.choices(words, k=40)) for _ in range(400)]
    text.write_text("\n\n".join(documents), encoding="utf-8")
    tokenizer = train_tokenizer(iter(["ab"]), VOCABULARY)  # a byte-level alphabet, whatever the text
    with checkpoint.writing(place) as target:
        checkpoint.save_model(model, target)
        tokenizer.save(target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file to write the figures to")
    parser.add_argument("--compare", type=Path, help="file to compare the figures with")
    chosen = parser.parse_args()
    figures = trained_figures() | compressed_figures()
    if chosen.out:
        chosen.out.write_text(json.dumps(figures, indent=1) + "\n")
    if not chosen.compare:
        return 0
    before = json.loads(chosen.compare.read_text())
    different = sorted(name for name in {*before, *figures} if before.get(name) != figures.get(name))
    print(f"{len(before) - len(different)} of {len(before)} figures equal to the bit", *different, sep="\n  ")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
