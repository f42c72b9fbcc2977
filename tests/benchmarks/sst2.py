"""SST-2: fine-tuned after masked-language-model pretraining on the same sentences, against from scratch, three seeds.

    python -m tests.benchmarks.sst2 FOLDER [--seeds 3] [--out runs/sst2]

FOLDER holds train.tsv, dev.tsv and test.tsv: a sentence, a tab, 0 or 1, no header row. Both arms are the encoder of
recipes/classify/scratch.yaml with its optimizer and a tokenizer of the training sentences, and each keeps the weights
of its best validation. The pretrained arm reads the sentences of train.tsv, without their labels, for `--pretraining`
steps before. Accuracy on test.tsv; the interval of the difference is a bootstrap over its sentences, each with the mean
over the seeds. A folder that is there is not trained again.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import yaml

from app.data.columns import read_document
from app.loading import load_model
from models.errors import UserError
from recipes import cli
from tests.benchmarks.timing import say

RECIPES = Path(__file__).parents[2] / "recipes"
COLUMNS = ("--data.text", "1", "--data.label", "2")
LENGTH = 64


def run(*argv: object) -> None:
    """One command. Raises UserError where it fails."""
    if status := cli.main([str(one) for one in argv]):
        raise UserError(f"{' '.join(map(str, argv))} ended with status {status}")


def sentences(folder: Path, out: Path) -> Path:
    """The training sentences as JSON lines, each a document."""
    out.mkdir(parents=True, exist_ok=True)
    rows = (line.rpartition("\t")[0] for line in (folder / "train.tsv").read_text(encoding="utf-8").splitlines())
    (out / "sentences.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return out / "sentences.jsonl"


def pretrained(folder: Path, out: Path, seed: int, steps: int) -> Path:
    """The encoder of the seed after masked-language-model pretraining; trained where it is not there."""
    place = out / f"pretrained-{seed}"
    if not place.exists():
        scratch = yaml.safe_load((RECIPES / "classify/scratch.yaml").read_text())["model"]
        architecture = {**scratch["architecture"], "head": "tied"}
        model = {**scratch, "task": "masked_lm", "architecture": architecture}
        model["schedule"] = {"class_path": "Cosine", "init_args": {"warmup_steps": 100}}
        data = {"source": str(sentences(folder, out)), "sequence_length": LENGTH, "batch_size": 32, "vocab_size": 4096}
        trainer = {"max_steps": steps, "val_check_interval": 200, "check_val_every_n_epoch": None}
        recipe = {"seed_everything": seed, "model": model, "data": data, "trainer": trainer}
        (out / f"pretrained-{seed}.yaml").write_text(yaml.safe_dump(recipe))
        run("fit", "-c", out / f"pretrained-{seed}.yaml", "--out", place)
    return place


def classifier(folder: Path, out: Path, seed: int, steps: int, pretraining: int | None) -> Path:
    """The classifier of the seed after so many steps: from scratch, or after pretraining."""
    place = out / f"{'scratch' if pretraining is None else 'finetuned'}-{seed}"
    if not place.exists():
        how = ["-c", RECIPES / "classify/scratch.yaml", "--seed_everything", seed, "--data.seed", seed]
        how += ["--data", folder / "train.tsv", "--data.validation", folder / "dev.tsv", *COLUMNS]
        how += ["--data.sequence_length", LENGTH, "--trainer.max_steps", steps]
        if pretraining is not None:
            start = pretrained(folder, out, seed, pretraining)
            how += ["--model.from", start, "--data.tokenizer", start]
        run("fit", *how, "--out", place)
    return place


def correct(place: Path, test: Path) -> np.ndarray:
    """Whether each sentence of `test` gets its label, 0 or 1: (N,)."""
    loaded = load_model(place)
    corpus = loaded.task.corpus(str(test))
    labels = [read_document(document.text)[1] for document in corpus.documents("all")]
    blocks = loaded.task.blocks(corpus, loaded.tokenizer, "all", LENGTH, None, 0)
    with torch.inference_mode():
        found = [row for batch in blocks.batches(64) for row in loaded.task.predicted_rows(loaded.model, batch)]
    return np.array([row["label"] == label for row, label in zip(found, labels, strict=True)], dtype=float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000, help="steps of training on the labels")
    parser.add_argument("--pretraining", type=int, default=2000, help="steps of masked-language-model pretraining")
    parser.add_argument("--out", type=Path, default=Path("runs/sst2"))
    given = parser.parse_args()
    arms = {"from scratch": None, "after pretraining": given.pretraining}
    found = {}
    for name, pretraining in arms.items():
        seeds = range(1, given.seeds + 1)
        places = [classifier(given.folder, given.out, seed, given.steps, pretraining) for seed in seeds]
        found[name] = np.stack([correct(place, given.folder / "test.tsv") for place in places])  # (seeds, N)
        say(f"{name}: accuracy {', '.join(f'{one:.4f}' for one in found[name].mean(1))}")
    first, second = (found[name].mean(0) for name in arms)  # (N,)
    draw = np.random.default_rng(0).integers(len(first), size=(10000, len(first)))
    low, high = np.quantile((second - first)[draw].mean(1), (0.025, 0.975))
    say(f"difference {second.mean() - first.mean():+.4f} [{low:+.4f}, {high:+.4f}]")


if __name__ == "__main__":
    main()
