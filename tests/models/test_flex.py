"""FlexAttention beside the tiled and the blocked form; on CPU it has a forward alone, and no fused kernel."""

import pytest
import torch

from models.attention.kernels import flex
from models.attention.kernels.banded import Band
from models.attention.kernels.sdpa import AttentionMask, ScoreMod, reference_attention
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer

DOCUMENTS = torch.tensor([[0] * 70 + [1] * 90 + [-1] * 40, [0] * 5 + [1] * 195])  # (B, T), padding at the end


def build(**attention):
    values = {"vocab_size": 50, "width": 16, "depth": 2, "context": 256, "feedforward": {"kind": "swiglu", "width": 24}}
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_dict({**values, "attention": {"heads": 4, "kv_heads": 2, **attention}}))
    return model.eval()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("band", [None, Band(7, 0), Band(4, 4), Band(6, 0, 3)])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one document", "packed"])
@torch.no_grad()
def test_pairs_of_a_block_mask_are_those_of_the_pattern(monkeypatch, causal, band, documents):
    monkeypatch.setattr(flex, "DEVICES", ("cpu",))
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 200, 8) for heads in (4, 2, 2))
    masks = flex.block_masks([band, band], causal, documents, 200, torch.device("cpu"))
    y = flex.attend_flex(q, k, v, masks[band], 0.3)
    distance = torch.arange(200)[:, None] - torch.arange(200)
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    seen = (seen if band is None else seen & band.holds(distance))[None, None]
    if documents is not None:
        seen = seen & (documents[:, :, None] == documents[:, None, :])[:, None]
    expected = reference_attention(q, k, v, AttentionMask(seen, causal=False), ScoreMod(scale=0.3))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [{"kind": "full"}, {"kind": "window", "window": 9}], ids=lambda kind: kind["kind"])
@pytest.mark.parametrize("device", ["kernel", "without"])
@torch.no_grad()
def test_a_model_gives_the_same_with_and_without_the_kernel(monkeypatch, kind, device):
    if device == "kernel":
        monkeypatch.setattr(flex, "DEVICES", ("cpu",))
    model, plain = build(kernel="flex", **kind), build(**kind)
    tokens = torch.randint(0, 50, (2, 200), generator=torch.Generator().manual_seed(0))
    for documents in (None, DOCUMENTS):
        logits = model(tokens, documents=documents).logits
        torch.testing.assert_close(logits, plain(tokens, documents=documents).logits, atol=1e-5, rtol=1e-5)
    _, context = model.embed(tokens, documents=DOCUMENTS)
    assert len(context.block_masks) == (device == "kernel")  # one for both layers, or none
    assert context.mask is None  # and no mask of all pairs


@torch.no_grad()
def test_cached_tokens_go_without_block_masks(monkeypatch):
    monkeypatch.setattr(flex, "DEVICES", ("cpu",))
    model = build(kernel="flex", kind="full")
    tokens = torch.randint(0, 50, (2, 12))
    cache = model.new_cache(2, 12)
    parts = [model(part, cache=cache).logits for part in tokens.split([5, 4, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("attention", "sentence"),
    [
        ({"kind": "full", "softcap": 3.0}, "kernel flex has no softcap"),
        ({"kind": "full", "position": "alibi"}, "kernel flex adds nothing to the scores"),
        ({"kind": "top_k", "keep": 4}, "kernel flex is an option of full alone"),
    ],
)
def test_what_the_kernel_lacks_is_refused(attention, sentence):
    with pytest.raises(UserError, match=sentence):
        build(kernel="flex", **attention)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention trains on CUDA alone")
@pytest.mark.parametrize("kind", [{"kind": "full"}, {"kind": "window", "window": 9}], ids=lambda kind: kind["kind"])
def test_gradients_on_cuda_are_those_of_the_other_kernels(kind):
    model, plain = build(kernel="flex", **kind).cuda(), build(**kind).cuda()
    tokens, documents = torch.randint(0, 50, (2, 200), device="cuda"), DOCUMENTS.cuda()
    for one in (model, plain):
        one(tokens, targets=tokens, documents=documents).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-3, msg=name)
