"""Single heads side by side against the book's numbers, `llms-from-scratch` and multi-head attention; and in depth."""

import pytest
import torch
from torch import nn

from models.attention.protocol import ForwardInputs
from models.attention.single_heads import SingleHeads
from models.config import ModelConfig
from models.errors import UserError
from models.positions import Positional
from models.specs import ATTENTIONS, LayerContext
from models.transformer import Transformer

INPUTS = torch.tensor(
    [[0.43, 0.15, 0.89], [0.55, 0.87, 0.66], [0.57, 0.85, 0.64],
     [0.22, 0.58, 0.33], [0.77, 0.25, 0.10], [0.05, 0.80, 0.55]]
)  # fmt: skip
# section 3.6.1 of the book
OUTPUTS = torch.tensor(
    [
        [-0.4519, 0.2216, 0.4772, 0.1063],
        [-0.5874, 0.0058, 0.5891, 0.3257],
        [-0.6300, -0.0632, 0.6202, 0.3860],
        [-0.5675, -0.0843, 0.5478, 0.3589],
        [-0.5526, -0.0981, 0.5321, 0.3428],
        [-0.5299, -0.1081, 0.5077, 0.3493],
    ]
)
PLAIN = ForwardInputs((Positional(),), mask=None, causal=True)


def stacked(width, heads, head_width, **options):
    return SingleHeads(heads=heads, head_width=head_width, **options).build(LayerContext(width))


def load(module, heads):
    """Give every head the maps that the modules `heads` have, by their names there."""
    with torch.no_grad():
        for head, maps in zip(module.heads, heads, strict=True):
            for mine, theirs in zip((head.q, head.k, head.v), maps, strict=True):
                mine.weight.copy_(theirs.weight)
                if theirs.bias is not None:
                    mine.bias.copy_(theirs.bias)
    return module


def test_the_numbers_of_the_book():
    torch.manual_seed(123)
    drawn = [[nn.Linear(3, 2, bias=False) for _ in range(3)] for _ in range(2)]  # query, key, value of each head
    y = load(stacked(3, 2, 2), drawn)(torch.stack([INPUTS, INPUTS]), PLAIN)
    torch.testing.assert_close(y, OUTPUTS.expand(2, -1, -1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_outputs_are_those_of_llms_from_scratch(bias):
    torch.manual_seed(0)
    book = pytest.importorskip("llms_from_scratch.ch03", reason="pip install --no-deps llms-from-scratch==1.0.19")
    theirs = book.MultiHeadAttentionWrapper(12, 4, 9, dropout=0.0, num_heads=3, qkv_bias=bias)
    mine = load(stacked(12, 3, 4, bias=bias), [(h.W_query, h.W_key, h.W_value) for h in theirs.heads])
    x = torch.randn(2, 9, 12)
    torch.testing.assert_close(mine(x, PLAIN), theirs(x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("position", ["rope", "alibi", "t5", "transformer_xl", {"kind": "shaw", "clip": 3}], ids=str)
def test_they_are_multi_head_attention_whose_output_map_is_the_identity(position):
    config = {"vocab_size": 40, "width": 12, "depth": 1, "position": position}
    config["feedforward"] = {"kind": "mlp", "width": 8}
    torch.manual_seed(0)
    single, full = (
        Transformer(ModelConfig.from_dict(config | {"attention": {"kind": kind, "heads": 3}}))
        for kind in ("single_heads", "full")
    )
    weights = single.state_dict()
    for name in ("q", "k", "v"):
        parts = [weights.pop(f"blocks.0.attention.heads.{head}.{name}.weight") for head in range(3)]
        weights[f"blocks.0.attention.{name}.weight"] = torch.cat(parts)
    weights["blocks.0.attention.o.weight"] = torch.eye(12)
    full.load_state_dict(weights)
    tokens = torch.randint(40, (2, 11))
    torch.testing.assert_close(single(tokens).logits, full(tokens).logits, atol=1e-6, rtol=1e-6)


def test_heads_that_do_not_fill_the_model_are_refused():
    for options in ({"heads": 5}, {"heads": 4, "head_width": 2}):
        with pytest.raises(UserError, match="together must be as wide as the model"):
            ATTENTIONS.parse({"kind": "single_heads", **options}, "attention").resolve(12)


DEPTH = {
    "attention alone": {"order": "ssss"},
    "attention and feed-forward": {"depth": 4, "feedforward": {"kind": "mlp", "width": 24}},
    "attention, then feed-forward": {"order": "ssssffff", "feedforward": {"kind": "mlp", "width": 24}},
}


@pytest.mark.parametrize("name", DEPTH)
def test_single_heads_stack_in_depth(name):
    config = {"vocab_size": 40, "width": 12, "depth": 4, "position": "rope", "attention": {"kind": "full", "heads": 1}}
    config |= {"feedforward": {"kind": "mlp", "width": 24}} | DEPTH[name]
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_dict(config))
    assert sum(block.attention is not None for block in model.blocks) == 4
    assert sum(block.feedforward is not None for block in model.blocks) == (0 if name == "attention alone" else 4)
    tokens = torch.randint(40, (2, 11))
    loss = model(tokens, targets=tokens).loss
    loss.backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
