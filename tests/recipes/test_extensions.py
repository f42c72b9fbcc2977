"""What a module outside of the packages registers is used from YAML and the command line; no other file is edited."""

import json
from dataclasses import dataclass, field

import pytest
import torch
import yaml
from safetensors.torch import load_file

import models
from app.evaluation.metrics import METRICS, Loss, Metric
from app.evaluation.report.overview import read_report
from app.tasks import TASKS
from app.tasks.tokens import TokenTask
from compress.distillation.losses.loss import LOSSES, DistillationLoss, StateLoss
from compress.pruning import METHODS as PRUNING_METHODS
from compress.quantization.quantizer import METHODS
from models.attention.protocol import Attention
from models.checkpoint import read_task
from models.families import FAMILIES
from models.families.llama import Llama
from models.linear import Linear
from models.registry import Several
from models.specs import ATTENTIONS, AttentionSpec
from tests.recipes.conftest import QUICK
from tests.toys import Column, Halves


@dataclass(frozen=True)
class Pairs(AttentionSpec):
    """Attention that gives every token itself times a learned matrix and a number."""

    scale: float = 1.0
    heads = head_width = 1

    def build(self, place):
        return PairsAttention(self.scale, place.width)

    def flops_per_token(self, width, length):
        return 2 * width * width

    def cache_elements(self, tokens):
        return 0


class PairsAttention(Attention):
    def __init__(self, scale, width):
        super().__init__()
        self.scale, self.o = scale, Linear(width, width, bias=False, std=0.02)

    def forward(self, x, context, cache=None):
        return self.scale * self.o(x)


@dataclass(frozen=True)
class Constant(DistillationLoss):
    """A number."""

    value: float = 2.0

    def build(self, student, teacher):
        return ConstantLoss(self.value)


class ConstantLoss(StateLoss):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, student, teacher, counted):
        return self.value * counted.float().mean()


@dataclass(frozen=True)
class Surprise(Metric):
    """The share of tokens with less than a probability."""

    label, better, quantity, quantity_unit = "surprise", "lower", "surprised", "share"
    below: float = 0.01

    def units(self, log, targets):
        return super().units(log, targets).neg().exp() < self.below


@dataclass(frozen=True)
class Copy(TokenTask):
    """Says every token again."""

    metrics: tuple = field(default=(Surprise(), Loss()), metadata={"registry": Several(METRICS)})

    generates, describes = True, "parrot"
    normalisation = "per token"

    def examples(self, blocks, tokenizer, *, training, seed=0):
        return Copied(blocks)


class Copied:
    """Blocks whose targets are their tokens."""

    bytes_per_token = None

    def __init__(self, blocks):
        self.blocks, self.tokens, self.fingerprint = blocks, blocks.tokens, f"copied {blocks.fingerprint}"
        self.sequence_length, self.corpus, self.split = blocks.sequence_length, blocks.corpus, blocks.split

    def __len__(self):
        return len(self.blocks)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {name: tensor[0] for name, tensor in self.batch([index]).items()}

    def __getitems__(self, indices):
        return self.batch(indices)

    def batch(self, indices):
        batch = self.blocks.batch(indices)
        return batch | {"targets": torch.where(batch["targets"] < 0, -100, batch["tokens"])}

    def batches(self, size):
        return (self.batch(range(i, min(i + size, len(self)))) for i in range(0, len(self), size))


class Toy(Llama):
    """Llama files under another name."""


ADDED = (
    (ATTENTIONS, "toy_attention", Pairs),
    (METHODS, "toy_method", Halves),
    (PRUNING_METHODS, "toy_criterion", Column),
    (LOSSES, "toy_loss", Constant),
    (METRICS, "surprise", Surprise),
    (TASKS, "toy_task", Copy),
)


@pytest.fixture(scope="module", autouse=True)
def registered():
    with pytest.MonkeyPatch.context() as patch:
        for registry, kind, cls in ADDED:
            patch.setattr(registry, "_specs", dict(registry._specs))
            registry.register(kind)(cls)
        patch.setitem(FAMILIES, "toy", Toy("llama"))
        yield


@pytest.fixture(scope="module")
def parrot(registered, tmp_path_factory):
    """A model of the toy attention, trained for the toy task."""
    from recipes import cli

    place = tmp_path_factory.mktemp("parrot")
    recipe = {
        "seed_everything": 1,
        "out": str(place / "parrot"),
        "model": {
            "task": {"kind": "toy_task", "metrics": [{"kind": "surprise", "below": 0.05}, "loss"]},
            "architecture": {
                "width": 32,
                "depth": 2,
                "position": "none",
                "attention": {"kind": "toy_attention", "scale": 0.5},
                "feedforward": {"kind": "swiglu", "width": 32},
            },
            "optimizer": {"class_path": "AdamW", "init_args": {"lr": 5.0e-3}},
        },
        "data": {"source": "synthetic", "sequence_length": 64, "batch_size": 16, "vocab_size": 320},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 30,
            "limit_val_batches": 1,
            "enable_progress_bar": False,
            "logger": False,
        },
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.main(["fit", "-c", str(place / "recipe.yaml")]) == 0
    return place / "parrot"


FEW = [*QUICK, "--evaluation_blocks", "8"]


def test_an_attention_a_task_and_a_metric(parrot, espalier, tmp_path):
    assert read_task(parrot)["metrics"] == [{"kind": "surprise", "below": 0.05}, {"kind": "loss", "per": "token"}]
    assert models.load(parrot).config.layers[1].attention == Pairs(0.5)
    assert "parameter parrot" in (parrot / "README.md").read_text()
    status, output = espalier("evaluate", parrot, *FEW, "--out", tmp_path / "figures.json")
    assert status == 0, output.err
    assert "surprise" in output.out
    quality = json.loads((tmp_path / "figures.json").read_text())["models"][str(parrot)]["quality"]
    assert quality["interval"]["surprise"][0] <= quality["surprise"] <= quality["interval"]["surprise"][1]
    assert "perplexity" not in quality


def test_a_quantizer_from_a_recipe(parrot, espalier, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: {kind: toy_method, step: 0.25}\n")
    status, output = espalier("quantize", parrot, "-c", recipe, "--out", tmp_path / "out", *FEW)
    assert status == 0, output.err
    weight = models.load(tmp_path / "out").blocks[0].feedforward.up.weight
    assert torch.equal(weight * 4, (weight * 4).round())
    report = read_report(tmp_path / "out")
    assert report["change"]["quality"]["surprise"] == pytest.approx(
        report["after"]["quality"]["surprise"] - report["before"]["quality"]["surprise"]
    )
    assert any("surprise" in sentence["text"] for sentence in report["verdict"])


def test_a_pruning_criterion(parrot, espalier, refused, tmp_path):
    how = ["--sparsity", "0.25", *FEW]
    status, output = espalier("prune", parrot, "--method", "toy_criterion", "--out", tmp_path / "out", *how)
    assert status == 0, output.err
    weight = models.load(tmp_path / "out").blocks[0].feedforward.up.weight
    assert not weight[:, :8].any()
    assert weight[:, 8:].all()
    refused("prune", parrot, "--method", "toy", "--out", tmp_path / "no", words=["unknown method 'toy'", "wanda"])


def test_a_distillation_loss(parrot, espalier, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("losses: [logit, {kind: toy_loss, value: 3.0}]\nweights: {toy_loss: 0.5}\n")
    status, output = espalier(
        "distill", "-c", recipe, "--teacher", parrot, "--out", tmp_path / "out", "--max_steps", 2, *FEW
    )
    assert status == 0, output.err
    assert read_task(tmp_path / "out") == read_task(parrot)
    assert read_report(tmp_path / "out")["recipe"]["losses"][1] == {"kind": "toy_loss", "value": 3.0}


def test_a_family_of_files(teacher, espalier, tmp_path):
    assert espalier("export", teacher, "--out", tmp_path / "hf", "--format", "transformers")[0] == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"model_type": "toy"}))
    status, output = espalier("import", tmp_path / "hf", "--out", tmp_path / "back")
    assert status == 0, output.err
    before, after = load_file(teacher / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
