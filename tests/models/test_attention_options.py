"""Soft-cap, sink, scale and query/key norm against `transformers`' Gemma 2, gpt-oss and Qwen 3."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from models.attention.full import Full
from models.attention.kernels.sdpa import AttentionMask, ScoreMod, attend, reference_attention
from models.attention.options import QK_NORMS
from models.errors import UserError

HEADS, GROUPS, TOKENS, WIDTH = 4, 2, 7, 8
CAUSAL = AttentionMask(mask=None, causal=True)


def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, count, TOKENS, WIDTH, generator=generator) for count in (HEADS, GROUPS, GROUPS)]


def additive_mask():
    return torch.full((1, 1, TOKENS, TOKENS), float("-inf")).triu(1)


def theirs(function, sinks=None, **options):
    module = SimpleNamespace(num_key_value_groups=HEADS // GROUPS, training=False, sinks=sinks, head_dim=WIDTH)
    options = {"scaling": WIDTH**-0.5, "dropout": 0.0, **options}
    y, _ = function(module, *inputs(), additive_mask(), **options)  # (B, T, H, d)
    return y.transpose(1, 2)


def test_softcap_is_that_of_gemma_2():
    torch.testing.assert_close(attend(*inputs(), CAUSAL, ScoreMod(softcap=1.5)), theirs(gemma2, softcap=1.5))


def test_sink_is_that_of_gpt_oss():
    sinks = torch.tensor([0.0, 1.0, -2.0, 3.0])
    torch.testing.assert_close(attend(*inputs(), CAUSAL, ScoreMod(sink=sinks)), theirs(gpt_oss, sinks))


@pytest.mark.parametrize("scale", [None, 1.0, 0.3])
@pytest.mark.parametrize("positioned", [False, True])
@pytest.mark.parametrize(
    "visible",
    [
        CAUSAL,
        AttentionMask(None, causal=False),
        AttentionMask(torch.rand(2, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(3)).gt(0.5).logical_or(
            torch.eye(TOKENS, dtype=torch.bool)), causal=False),
    ],
    ids=["causal", "everything", "mask"],
)  # fmt: skip
def test_the_kernel_equals_the_reference(visible, positioned, scale):
    position = torch.randn(HEADS, TOKENS, TOKENS, generator=torch.Generator().manual_seed(1)) if positioned else None
    scoring = ScoreMod(scale=scale, position=position)
    torch.testing.assert_close(attend(*inputs(), visible, scoring), reference_attention(*inputs(), visible, scoring))


def test_qk_norm_is_that_of_qwen_3():
    x = torch.randn(2, HEADS, TOKENS, WIDTH)
    mine, their = QK_NORMS.parse("rms", "qk_norm").build(WIDTH), Qwen3RMSNorm(WIDTH, eps=1e-6)
    with torch.no_grad():
        mine.weight.copy_(torch.randn(WIDTH))
        their.weight.copy_(mine.weight)
    torch.testing.assert_close(mine(x), their(x))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"scale": -1.0}, "scale must be positive"),
        ({"sink": "learnt"}, "unknown sink 'learnt'.*learned"),
    ],
)
def test_wrong_options_are_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        Full(heads=2, **options)
