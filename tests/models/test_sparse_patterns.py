"""Strided and fixed sparse attention against dense masks written down pair by pair, their cost and their limits."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from models.attention.full import token_distance
from models.attention.kernels.sdpa import AttentionMask, reference_attention
from models.attention.segments import document_ends, document_starts
from models.cache import Kept
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer

STRIDED = [{"kind": "strided", "stride": stride} for stride in (1, 2, 3, 5, 40)]
FIXED = [{"kind": "fixed", "block": block, "summary": summary} for block, summary in [(1, 1), (3, 1), (4, 2), (5, 5)]]


def build(spec, position="rope", direction="causal", depth=1, **more):
    torch.manual_seed(0)
    attention = {"heads": 4, "kv_heads": 2, **spec, **more}
    config = {"vocab_size": 40, "width": 16, "depth": depth, "position": position, "direction": direction}
    config |= {"attention": attention, "feedforward": {"kind": "swiglu", "width": 24}}
    return Transformer(ModelConfig.from_dict(config)).eval()


def patterns(spec, i, j):
    """Whether token i of a document sees its token j, in the first and in the second half of the heads."""
    if j > i:
        return False, False
    if spec["kind"] == "strided":
        return i - j <= spec["stride"], (i - j) % spec["stride"] == 0
    block, summary = spec["block"], spec["summary"]
    return i // block == j // block, j % block >= block - summary or i == j


def dense_mask(spec, documents):
    """(B, 4, T, T) bool."""
    batch, tokens = documents.shape
    mask = torch.zeros(batch, 4, tokens, tokens, dtype=torch.bool)
    for b in range(batch):
        row = documents[b].tolist()
        for i in range(tokens):
            for j in range(tokens):
                if row[i] == row[j]:
                    first = row.index(row[i])
                    near, far = patterns(spec, i - first, j - first)
                    mask[b, :2, i, j], mask[b, 2:, i, j] = near, far
    return mask


def packed(tokens):
    return torch.stack([(torch.arange(tokens) + 2) // 7, torch.arange(tokens) // 11])


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("tokens", [1, 4, 9, 16, 75])
@pytest.mark.parametrize("spec", STRIDED + FIXED, ids=str)
def test_halves_equal_dense_masks(spec, tokens, documents):
    compare(build(spec), spec, tokens, documents)


@pytest.mark.parametrize("position", ["alibi", "t5"])
@pytest.mark.parametrize("sink", ["learned", "zero"])
@pytest.mark.parametrize("spec", [STRIDED[2], FIXED[2]], ids=str)
def test_options_of_the_scores_belong_to_their_heads(spec, sink, position):
    model = build(spec, position=position, sink=sink, softcap=2.0, scale=0.7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    for documents in (False, True):
        compare(model, spec, 14, documents)


def compare(model, spec, tokens, documents):
    attention = model.blocks[0].attention.double()
    q = torch.randn(2, 4, tokens, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 2, tokens, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    numbers = packed(tokens) if documents else None
    _, context = model.embed(torch.zeros(2, tokens, dtype=torch.int64), documents=numbers)
    kept = Kept(k, v, None)
    mask = dense_mask(spec, packed(tokens) if documents else torch.zeros(2, tokens))
    scoring = attention.scoring(q, k, token_distance(q, kept, context), context)
    theirs = reference_attention(q, k, v, AttentionMask(mask, causal=False), scoring)
    mine = attention.mix(q, kept, context)
    torch.testing.assert_close(mine, theirs)
    upstream = torch.randn_like(theirs)
    pairs = zip(*(torch.autograd.grad(y, (q, k, v), upstream) for y in (mine, theirs)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("spec", [STRIDED[2], FIXED[2]], ids=str)
def test_two_layers_connect_every_token_to_all_earlier_ones(spec):
    model, tokens = build(spec, depth=2), torch.randint(40, (1, 12))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    before = model(tokens).logits[0, -1]
    for t in range(12):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % 40
        assert not torch.equal(model(changed).logits[0, -1], before)


@pytest.mark.parametrize("length", [30, 31, 36])
@pytest.mark.parametrize("spec", STRIDED + FIXED, ids=str)
def test_a_decode_step_costs_what_is_counted(spec, length):
    """Behind a cache every step multiplies with the keys of its two patterns, and with no others."""
    model = build(spec)
    cache = model.new_cache(1, length)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.randint(40, (1, length - 1)), cache=cache)
        with FlopCounterMode(display=False) as step:
            model(torch.randint(40, (1, 1)), cache=cache)
    assert step.get_total_flops() == model.flops_per_token(length)


@pytest.mark.parametrize("spec", [{"kind": "strided", "stride": 64}, {"kind": "fixed", "block": 64}], ids=str)
def test_no_matrix_of_all_pairs_is_made(spec):
    model = build(spec)
    tokens = torch.zeros(1, 4096, dtype=torch.int64)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        model(tokens, documents=torch.zeros_like(tokens))
    assert max(event.self_cpu_memory_usage for event in found.events()) < 4096 * 4096 / 2  # half of a mask of all pairs


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"kind": "strided", "stride": 0}, "stride must be at least 1"),
        ({"kind": "fixed", "block": 0}, "block must be at least 1"),
        ({"kind": "fixed", "block": 4, "summary": 5}, "summary must be between 1 and the 4 tokens"),
        ({"kind": "strided", "stride": 4, "heads": 3, "kv_heads": 3, "head_width": 4}, "heads must be even, got 3"),
        ({"kind": "fixed", "block": 4, "kv_heads": 1}, "kv_heads must be even, got 1"),
        ({"kind": "strided", "stride": 4, "direction": "bidirectional"}, "cannot be bidirectional: its patterns"),
    ],
)
def test_what_makes_no_sense_is_refused(spec, sentence):
    with pytest.raises(UserError, match=sentence):
        build(spec, direction=spec.pop("direction", "causal"))


def test_documents_begin_and_end_where_the_number_changes():
    documents = torch.tensor([[-1, -1, 0, 0, 0, 5], [3, 3, 3, 3, 3, 3]])
    device = documents.device
    assert document_starts(documents, 6, device).tolist() == [[0, 0, 2, 2, 2, 5], [0] * 6]
    assert document_ends(documents, 6, device).tolist() == [[2, 2, 5, 5, 5, 6], [6] * 6]
    assert document_starts(None, 3, device).tolist() == [[0, 0, 0]]
    assert document_ends(None, 3, device).tolist() == [[3, 3, 3]]
