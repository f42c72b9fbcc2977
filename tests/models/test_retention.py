"""Retention: its three forms, the authors' code, its decays and its memory."""

from types import SimpleNamespace

import pytest
import torch

from models.attention.protocol import ForwardInputs
from models.attention.retention import GatedRetention, Powers, Range, Retention, chunkwise, parallel, recurrent
from models.cache import beginnings
from models.config import ModelConfig
from models.errors import UserError
from models.positions import Positional
from models.specs import LayerContext
from models.transformer import Transformer
from tests.benchmarks.bench_attention_peers import import_retnet


def build(position="rope", depth=2, **attention):
    torch.manual_seed(0)
    spec = {"kind": "retention", "heads": 4, **attention}
    config = {"vocab_size": 40, "width": 16, "depth": depth, "context": 64, "position": position, "attention": spec}
    return Transformer(ModelConfig.from_dict(config | {"feedforward": {"kind": "swiglu", "width": 24}})).eval()


def heads(tokens, decay, dtype=torch.float64, size=1.0):
    """Queries and keys (2, 4, T, 6), values (2, 4, T, 10), and rates."""
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (size * torch.randn(2, 4, tokens, n, generator=generator, dtype=dtype) for n in (6, 6, 10))
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), decay.rates(4, q.device, dtype)]


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 8, 64])
@pytest.mark.parametrize("tokens", [1, 5, 8, 13, 30])
@pytest.mark.parametrize("decay", [Powers(), Range(0.9, 0.01)], ids=["powers", "range"])
def test_the_three_forms_are_the_same(decay, tokens, chunk, continued, documents):
    inputs = heads(tokens, decay)
    generator = torch.Generator().manual_seed(chunk)
    memory = torch.randn(2, 4, 6, 10, generator=generator, dtype=torch.float64) if continued else None
    begins = torch.rand(2, tokens, generator=generator) < 0.2 if documents else None
    found = [
        parallel(*inputs, memory, begins),
        recurrent(*inputs, memory, begins),
        chunkwise(*inputs, memory, begins, chunk),
    ]
    upstream = torch.randn(2, 4, tokens, 10, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad(y, inputs[:3], upstream, retain_graph=True) for y, _ in found]
    for other, theirs in zip(found[1:], gradients[1:], strict=True):
        torch.testing.assert_close(other, found[0], atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(theirs, gradients[0], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("form", [parallel, recurrent, chunkwise])
def test_autocast_rounds_no_product_of_exact_factors(form):
    inputs, memory = heads(70, Powers(), torch.float32), torch.ones(2, 4, 6, 10)
    expected = form(*inputs, memory)
    with torch.autocast("cpu", torch.bfloat16):
        found = form(*inputs, memory)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_one_head_by_hand():
    q, k, v = (
        torch.tensor(values, dtype=torch.float64).view(1, 1, 3, 1) for values in ([1, 2, 3], [1, 1, 2], [4, 2, 1])
    )
    y, _ = parallel(q, k, v, torch.tensor([0.25], dtype=torch.float64))  # it keeps 3/4
    assert y.flatten().tolist() == [4, 2 * (3 + 2), 3 * (0.75 * (3 + 2) + 2)]


def test_decays_are_those_of_the_paper():
    kept = 1 - Powers().rates(8, torch.device("cpu"), torch.float64)
    torch.testing.assert_close(kept, 1 - 2 ** (-5 - torch.arange(8, dtype=torch.float64)))
    kept = 1 - Range().rates(8, torch.device("cpu"), torch.float64)
    ends = torch.tensor([1 / 32, 1 / 512], dtype=torch.float64).log().tolist()
    torch.testing.assert_close(kept, 1 - torch.linspace(*ends, 8, dtype=torch.float64).exp())


@pytest.mark.parametrize("form", ["parallel", "chunkwise", "recurrent"])
def test_it_is_the_retention_of_torchscale(form):
    pytest.importorskip("torchscale", reason="pip install --no-deps torchscale==0.3.0")
    retnet = import_retnet()
    width, count, tokens, chunk, tiny = 32, 4, 24, 8, 1e-30
    torch.manual_seed(0)
    arguments = SimpleNamespace(multiway=False, layernorm_eps=tiny, decoder_embed_dim=width,
                                decoder_retention_heads=count, recurrent_chunk_size=chunk)  # fmt: skip
    theirs = retnet.MultiScaleRetention(arguments, width, 2 * width, count)
    mine = GatedRetention(Retention(count, eps=tiny, chunk=chunk).resolve(width), LayerContext(width))
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "gate": "g_proj", "o": "out_proj"}
    with torch.no_grad():
        for ours, other in names.items():
            getattr(mine, ours).weight.copy_(getattr(theirs, other).weight)
    relative, x = retnet.RetNetRelPos(arguments), torch.randn(2, tokens, width)
    (sin, cos), _ = relative(tokens)
    cos, sin = cos[None, None, :, ::2], sin[None, None, :, ::2]  # (1, 1, T, d / 2)
    cache = mine.new_cache(2, tokens, x.device, x.dtype) if form == "recurrent" else None
    steps = [slice(t, t + 1) for t in range(tokens)] if form == "recurrent" else [slice(None)]
    state = {}
    with torch.no_grad():
        for step in steps:
            table = Positional(cos=cos[:, :, step], sin=sin[:, :, step], interleaved=True)
            y = mine(x[:, step], ForwardInputs((table,), None, causal=True, past=step.start or 0), cache)
            if form == "recurrent":
                expected = theirs(x[:, step], relative(step.stop, activate_recurrent=True), incremental_state=state)
            else:
                chunked = form == "chunkwise"
                angles = relative(tokens, chunkwise_recurrent=chunked)
                expected = theirs(x, angles, chunkwise_recurrent=chunked)
            torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


def test_a_chunk_changes_the_speed_and_not_the_result():
    model, tokens = build().double(), torch.randint(40, (2, 30))
    expected = model(tokens).logits
    for chunk in (1, 7, 8):
        for block in model.blocks:
            block.attention.chunk = chunk
        torch.testing.assert_close(model(tokens).logits, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("changed", [5, 15, 16, 17, 40])
def test_nothing_leaks_back_over_the_border_of_a_chunk(changed):
    model, tokens = build(chunk=16), torch.randint(40, (2, 50))
    before = model(tokens).logits
    tokens[:, changed] = (tokens[:, changed] + 1) % 40
    after = model(tokens).logits
    assert torch.equal(after[:, :changed], before[:, :changed])  # to the bit
    assert not torch.equal(after[:, -1], before[:, -1])


def test_the_memory_stays_in_range_however_long_the_text_is():
    q, k, v, rate = heads(4000, Powers(), torch.float32)
    with torch.no_grad():
        k, v = k.abs(), v.abs()  # nothing cancels: the sum of all k^T v would grow to 1 / rate times their mean
        _, memory = chunkwise(q, k, v, rate, torch.zeros(2, 4, 6, 10))
        assert memory.max() < 2 * (k.mean() * v.mean())
        assert memory.max() <= (k.amax(2)[..., :, None] * v.amax(2)[..., None, :]).max()


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_bf16_is_near_fp32_at_any_scale(size):
    q, k, v, rate = heads(200, Powers(), torch.float32, size)
    with torch.no_grad():
        exact, _ = chunkwise(q, k, v, rate)
        rough, _ = chunkwise(q.bfloat16(), k.bfloat16(), v.bfloat16(), rate)
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() < 0.02 * exact.norm()


def test_the_cache_has_one_size_and_is_kept_in_fp32():
    model = build().bfloat16()
    cache = model.new_cache(2, 50)
    assert {layer.state.dtype for layer in cache.layers} == {torch.float32}
    held = sum(layer.bytes() for layer in cache.layers)
    with torch.no_grad():
        for piece in torch.randint(40, (2, 50)).split([9, 1, 1, 39], dim=1):
            model(piece, cache=cache)
    assert sum(layer.bytes() for layer in cache.layers) == held == 2 * 2 * 4 * (4 * 4 * 8)


def test_a_decode_step_makes_no_more_numbers_far_on_than_at_the_beginning():
    from torch.profiler import ProfilerActivity, profile

    model, cache = build(), build().new_cache(1, 3000)
    sizes = []
    with torch.no_grad():
        for piece in (torch.randint(40, (1, 8)), torch.randint(40, (1, 2900))):
            model(piece, cache=cache)
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
                model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
            sizes.append(sum(max(0, event.self_cpu_memory_usage) for event in found.events()))
    assert sizes[0] == sizes[1]


def test_a_document_begins_where_the_number_changes():
    documents = torch.tensor([[-1, -1, 0, 0, 1]])
    assert beginnings(None, 3) is None
    assert beginnings(documents, 0).tolist() == [[False, False, True, False, True]]
    assert beginnings(documents, 2).tolist() == [[True, False, True]]
    assert beginnings(documents, 4).tolist() == [[True]]


def test_maps_are_drawn_as_in_the_paper():
    torch.manual_seed(0)
    module = GatedRetention(Retention(8).resolve(256), LayerContext(256))
    for name, outputs in {"q": 256, "k": 256, "v": 512, "gate": 512}.items():
        wanted = 2**-2.5 * (2 / (256 + outputs)) ** 0.5
        assert abs(float(getattr(module, name).weight.detach().std()) / wanted - 1) < 0.01


def test_what_it_refuses():
    with pytest.raises(UserError, match="chunk of retention must be at least 1"):
        build(chunk=0)
    with pytest.raises(UserError, match="eps must be positive"):
        build(eps=0.0)
    with pytest.raises(UserError, match="last must be between 0 and 1"):
        build(decay={"kind": "range", "last": 1.0})
    with pytest.raises(UserError, match="16 is not a multiple of 3 heads"):
        build(heads=3)
    with pytest.raises(UserError, match="'alibi' acts on scores"):
        build(position="alibi")
