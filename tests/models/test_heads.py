"""Heads and inputs by registry: the classifier, and an input of numbers that is registered here alone."""

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from models.checkpoint import load, save_model
from models.config import ModelConfig
from models.errors import UserError
from models.linear import Linear
from models.specs import INPUTS, InputSpec
from models.transformer import Transformer


@dataclass(frozen=True)
class Series(InputSpec):
    channels: int

    def build(self, width, vocab_size):
        return Linear(self.channels, width, bias=True, std=0.5)


@pytest.fixture(scope="module", autouse=True)
def registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(INPUTS, "_specs", dict(INPUTS._specs))
        INPUTS.register("toy_series")(Series)
        yield


def build(**options):
    torch.manual_seed(0)
    base = {"vocab_size": 40, "width": 16, "depth": 2, "context": 24, "direction": "bidirectional"}
    sublayers = {"attention": {"kind": "full", "heads": 4}, "feedforward": {"kind": "swiglu", "width": 24}}
    return Transformer(ModelConfig.from_dict({**base, **sublayers, **options})).eval()


CLASSIFIER = {"kind": "classifier", "classes": 3, "pool": "mean", "transform": None}


@pytest.mark.parametrize("pool", ["mean", "first", "last"])
def test_a_pooled_head_gives_each_document_what_it_gets_alone(pool):
    model, tokens = build(head=CLASSIFIER | {"pool": pool}), torch.randint(40, (2, 9))
    documents = torch.tensor([[0] * 4 + [1] * 5, [2] * 6 + [-1] * 3])
    with torch.no_grad():
        found = model(tokens, documents=documents).logits
        assert found.shape == (2, 9, 3)
        for row, part in ((0, slice(4)), (0, slice(4, 9)), (1, slice(6))):
            alone = model(tokens[row : row + 1, part])
            torch.testing.assert_close(found[row : row + 1, part], alone.logits)
            assert torch.equal(alone.logits, alone.logits[:, :1].expand_as(alone.logits))
            x = model.finish(model.run(*model.embed(tokens[row : row + 1, part])).x)
            pooled = {"mean": x.mean(1), "first": x[:, 0], "last": x[:, -1]}[pool]
            torch.testing.assert_close(alone.logits[:, 0], model.project(pooled))


def test_the_loss_of_a_classifier_is_that_of_its_logits():
    model, tokens = build(head=CLASSIFIER).train(), torch.randint(40, (2, 9))
    targets = torch.full((2, 9), -100)
    targets[0, 8], targets[1, 8] = 2, 0
    nn.init.normal_(model.head.bias)
    expected = nn.functional.cross_entropy(model(tokens).logits[:, 8], torch.tensor([2, 0]))
    loss = model(tokens, targets=targets).loss
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(x, list(model.parameters())) for x in (loss, expected))
    torch.testing.assert_close(ours, theirs)
    assert model.flops_per_token(9) < build(head="untied").flops_per_token(9)


HEAD = {"kind": "tied", "bias": True, "transform": {"activation": "gelu", "norm": "layer"}}


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_transform_stands_between_the_last_norm_and_the_matrix(kind):
    model, tokens = build(head=HEAD | {"kind": kind}), torch.randint(40, (2, 9))
    bias = (model.head or model.head_bias).bias
    nn.init.normal_(bias)
    matrix = (model.head or model.embedding).weight
    x = model.finish(model.run(*model.embed(tokens)).x)
    dense, norm = model.head_transform.dense, model.head_transform.norm
    expected = norm(nn.functional.gelu(x @ dense.weight.T + dense.bias)) @ matrix.T + bias
    torch.testing.assert_close(model(tokens).logits, expected)
    loss = nn.functional.cross_entropy(expected.flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(model(tokens, targets=tokens).loss, loss)
    assert model.output_matrix is None
    plain = build(head=kind)
    assert model.flops_per_token(9) == plain.flops_per_token(9) + 2 * 16 * 16
    assert model.count_parameters()["total"] == plain.count_parameters()["total"] + 16 * 16 + 3 * 16 + 40


def test_dropout_of_a_transform_is_of_training_alone():
    model, tokens = build(head=HEAD | {"transform": {"dropout": 0.5}}), torch.randint(40, (2, 9))
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    assert not torch.equal(model.train()(tokens).logits, model(tokens).logits)


def test_the_norm_of_the_embeddings_reads_all_that_was_added_to_them():
    tokens = torch.tensor([[7, 3, 5, 3, 6, 3, 8]])  # 3 ends a text
    model = build(
        position="learned", input={"norm": "layer", "segments": {"count": 3, "separator": 3}, "kind": "tokens"}
    )
    documents = torch.tensor([[0, 0, 0, 0, 0, 1, 1]])
    assert model.segments.numbers(tokens, None).tolist() == [[0, 0, 1, 1, 2, 2, 2]]
    assert model.segments.numbers(tokens, documents).tolist() == [[0, 0, 1, 1, 2, 0, 1]]
    x, _ = model.embed(tokens)
    added = model.positions[0].table.weight[:7] + model.segments.weight[[0, 0, 1, 1, 2, 2, 2]]
    torch.testing.assert_close(x, model.embedding_norm(model.embedding(tokens) + added))


def test_an_input_of_numbers_goes_through_the_same_blocks():
    model = build(head=CLASSIFIER, input={"kind": "toy_series", "channels": 5})
    x = torch.randn(2, 9, 5)
    y = model(x).logits
    assert y.shape == (2, 9, 3)
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
        build(head="classifier")
    with pytest.raises(UserError, match=r"head\.transform: unknown activation 'tan' \(did you mean 'tanh'"):
        build(head=HEAD | {"transform": {"activation": "tan"}})
    with pytest.raises(UserError, match="dropout must be at least 0 and below 1"):
        build(head=HEAD | {"transform": {"dropout": 1.0}})
    with pytest.raises(UserError, match="segments are those of an encoder, and this model is causal"):
        build(direction="causal", input={"kind": "tokens", "segments": {}})
    with pytest.raises(UserError, match=r"a separator below vocab_size \(40\), got 2 and 40"):
        build(input={"kind": "tokens", "segments": {"separator": 40}})
    with pytest.raises(UserError, match="at least 2"):
        build(head=CLASSIFIER | {"classes": 1})


def test_the_module_tree_is_that_of_before():
    names = [name for name in build(head="untied").state_dict() if not name.startswith("blocks.")]
    assert names == ["embedding.weight", "norm.weight", "head.weight"]
    assert isinstance(build(head="untied").embedding, nn.Embedding)
