"""The valid inputs of every verb, made once: a tiny model, texts in every form, recipes, and what verbs write."""

import csv
import gzip
import json
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

QUICK = ["--data=text.txt", "--sequence_length=16", "--device=cpu", "--speed_rounds=0", "--evaluation_blocks=4"]
FIT: dict[str, Any] = {
    "seed_everything": 1,
    "ckpt_path": "last",
    "model": {
        "architecture": {
            "width": 32,
            "depth": 2,
            "position": "rope",
            "order": "attention_first",
            "norm": {"kind": "rms", "position": "pre"},
            "attention": {"kind": "full", "heads": 2, "kv_heads": 2},
            "feedforward": {"kind": "swiglu", "width": 32},
            "head": "tied",
            "dropout": 0.0,
        },
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.001, "weight_decay": 0.1}},
        "schedule": {"class_path": "WarmupStableDecay", "init_args": {"warmup_steps": 1, "decay": 0.4, "floor": 0.0}},
        "z_loss": 0.0,
        "compute_dtype": "float32",
        "compile": None,
    },
    "data": {
        "source": "text.txt",
        "sequence_length": 16,
        "batch_size": 2,
        "vocab_size": 300,
        "cross_documents": False,
        "workers": 0,
        "seed": 1,
    },
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 2,
        "accumulate_grad_batches": 1,
        "gradient_clip_val": 1.0,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 1,
        "limit_test_batches": 1,
        "limit_predict_batches": 1,
        "enable_progress_bar": False,
    },
    "checkpoint": {"every_n_steps": 2},
    "samples": {"prompts": ["A"], "max_new_tokens": 2},
}
RECIPES: dict[str, dict[str, Any]] = {
    "quantize.yaml": {"method": {"kind": "gptq", "act_order": True}, "bits": 4, "group_size": 8, "samples": 4,
                      "layers": {"*.down": {"bits": 8}}, "embedding_bits": 8},
    "awq.yaml": {"method": "awq", "bits": 3, "group_size": 8, "samples": 4, "skip": ["blocks.0.*"]},
    "prune.yaml": {"method": {"kind": "structured", "targets": "neurons", "ratio": 0.25, "round_to": 4}, "samples": 4},
    "wanda.yaml": {"method": {"kind": "wanda", "pattern": "2:4"}, "sparsity": 0.5, "samples": 4},
    "distill.yaml": {"student_layers": 1, "losses": "logit", "temperature": 2.0, "alpha": 0.5, "max_steps": 2,
                     "train_batch_size": 2, "learning_rate": 0.001, "warmup_steps": 1, "checkpoint_every": 10},
    "pipeline.yaml": {
        "common": {"data": "text.txt", "sequence_length": 16, "speed_rounds": 0, "evaluation_blocks": 4, "samples": 4},
        "stages": [
            {"stage": "prune", "name": "narrow", "method": "structured", "ratio": 0.25, "round_to": 4},
            {"stage": "quantize", "method": "rtn", "bits": 4, "group_size": 4},
        ],
    },
    "sweep.yaml": {"pretrain": "fit.yaml", "baseline": "base", "seeds": [1], "tokens": 32, "lengths": [16],
                   "axes": {"position": {"learned": {"position": "learned"}}}},
    "student.yaml": {"width": 16, "depth": 1, "attention": {"kind": "full", "heads": 2},
                     "feedforward": {"kind": "mlp", "width": 16}},
    "fit.yaml": FIT,
}  # fmt: skip


def make(work: Path) -> None:
    """Fill the working folder, which must be the current one; every verb is run once as it should be."""
    from recipes import cli

    from . import cases

    texts(work)
    for name, recipe in RECIPES.items():
        (work / name).write_text(yaml.safe_dump(recipe, sort_keys=False))

    def done(*argv: str) -> None:
        status = cli.main(list(argv))
        assert status == 0, argv

    done("fit", "-c", "fit.yaml", "--out", "model")
    done("quantize", "model", "--out", "quantized", "--method=rtn", "--bits=4", "--group_size=16", *QUICK)
    done("prune", "model", "--out", "pruned", "-c", "prune.yaml", *QUICK)
    done("export", "model", "--out", "hf")
    done("run", "pipeline.yaml", "--model", "model", "--out", "line", "--device=cpu")
    cases.in_this_process()
    done("sweep", "sweep.yaml", "--out", "grid")
    shutil.copy(max(Path("model.run").rglob("step-*.ckpt")), "x.ckpt")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path("model") / name, name)


def texts(work: Path) -> None:
    """One text of 80 paragraphs in every form that --data takes."""
    words = re.findall(r"\w+", "the quick brown fox jumps over a lazy dog while it rains in spring and nobody minds")
    paragraphs = [
        " ".join(words[(number * 7 + place * place) % len(words)] for place in range(40)) + "." for number in range(80)
    ]
    (work / "text.txt").write_text("\n\n".join(paragraphs) + "\n")
    (work / "packed.txt.gz").write_bytes(gzip.compress("\n\n".join(paragraphs).encode()))
    rows = [{"id": number, "text": text} for number, text in enumerate(paragraphs)]
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, delimiter in (("rows.csv", ","), ("rows.tsv", "\t")):
        with (work / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "text"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    (work / "texts").mkdir()
    for number in range(4):
        (work / "texts" / f"{number}.txt").write_text("\n\n".join(paragraphs[number * 20 :][:20]))
    import datasets

    datasets.disable_progress_bars()
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(work / "rows.parquet")
    table.save_to_disk(work / "saved")
