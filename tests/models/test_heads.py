"""Heads and inputs by registry: a pooled head and an input of numbers, registered here alone."""

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from models.checkpoint import load, save_model
from models.config import ModelConfig
from models.errors import UserError
from models.linear import Linear
from models.specs import HEADS, INPUTS, HeadSpec, InputSpec
from models.transformer import Transformer


@dataclass(frozen=True)
class MeanClassifier(HeadSpec):
    classes: int

    def build(self, width, vocab_size):
        return Linear(width, self.classes, bias=True, std=0.02)

    def read(self, hidden, documents):
        real = torch.ones_like(hidden[..., :1]) if documents is None else (documents >= 0)[..., None]
        return (hidden * real).sum(1) / real.sum(1)

    def flops_per_token(self, width, vocab_size):
        return 0


@dataclass(frozen=True)
class Series(InputSpec):
    channels: int

    def build(self, width, vocab_size):
        return Linear(self.channels, width, bias=True, std=0.5)


@pytest.fixture(scope="module", autouse=True)
def registered():
    with pytest.MonkeyPatch.context() as patch:
        for registry, kind, cls in ((HEADS, "toy_mean_classifier", MeanClassifier), (INPUTS, "toy_series", Series)):
            patch.setattr(registry, "_specs", dict(registry._specs))
            registry.register(kind)(cls)
        yield


def build(**options):
    torch.manual_seed(0)
    base = {"vocab_size": 40, "width": 16, "depth": 2, "context": 24, "direction": "bidirectional"}
    sublayers = {"attention": {"kind": "full", "heads": 4}, "feedforward": {"kind": "swiglu", "width": 24}}
    return Transformer(ModelConfig.from_dict({**base, **sublayers, **options})).eval()


CLASSIFIER = {"kind": "toy_mean_classifier", "classes": 3}


def test_a_pooled_head_gives_one_output_a_row_whatever_its_padding():
    model, tokens = build(head=CLASSIFIER), torch.randint(40, (2, 9))
    documents = torch.tensor([[0] * 9, [0] * 6 + [-1] * 3])
    with torch.no_grad():
        found = model(tokens, documents=documents).logits
        assert found.shape == (2, 3)
        torch.testing.assert_close(found[1:], model(tokens[1:, :6]).logits)


def test_an_input_of_numbers_goes_through_the_same_blocks():
    model = build(head=CLASSIFIER, input={"kind": "toy_series", "channels": 5})
    x = torch.randn(2, 9, 5)
    y = model(x).logits
    assert y.shape == (2, 3)
    assert not torch.equal(model(x.flip(2)).logits, y)


def test_a_folder_names_head_and_input(tmp_path):
    model = build(head=CLASSIFIER, input={"kind": "toy_series", "channels": 5})
    save_model(model, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["architecture"]
    assert (written["head"], written["input"]) == (CLASSIFIER, {"kind": "toy_series", "channels": 5})
    x = torch.randn(2, 9, 5)
    assert torch.equal(load(tmp_path).eval()(x).logits, model(x).logits)


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_a_folder_from_before_names_its_head_by_a_word_and_no_input(tmp_path, head):
    model = build(head=head)
    save_model(model, tmp_path)
    config = tmp_path / "config.json"
    values = json.loads(config.read_text())
    values["architecture"]["head"] = head
    del values["architecture"]["input"]
    config.write_text(json.dumps(values))
    again, tokens = load(tmp_path).eval(), torch.randint(40, (2, 9))
    assert again.config == model.config
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_an_unknown_head_is_refused():
    with pytest.raises(UserError, match="unknown head 'shared'"):
        build(head="shared")
    with pytest.raises(UserError, match="'classes' is missing"):
        build(head="toy_mean_classifier")


def test_the_module_tree_is_that_of_before():
    names = [name for name in build(head="untied").state_dict() if not name.startswith("blocks.")]
    assert names == ["embedding.weight", "norm.weight", "head.weight"]
    assert isinstance(build(head="untied").embedding, nn.Embedding)
