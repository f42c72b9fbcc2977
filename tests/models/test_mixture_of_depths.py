"""Mixture-of-depths: against the layer run on all tokens, its threshold, its cache, and what it saves."""

import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from models.checkpoint import load, save_model, stored_dtype
from models.config import ModelConfig
from models.errors import UserError
from models.io import TensorFiles
from models.mixture_of_depths import reference_mixture
from models.transformer import Transformer

ROUTED = {"kind": "mixture_of_depths", "capacity": 0.5}


def build(depths=(None, ROUTED), dtype=torch.float32, **changes):
    torch.manual_seed(0)
    values = {
        "vocab_size": 40,
        "width": 16,
        "depth": 2,
        "context": 64,
        "depths": depths,
        "attention": {"kind": "full", "heads": 4, "kv_heads": 2},
        "feedforward": {"kind": "swiglu", "width": 24},
    }
    model = Transformer(ModelConfig.from_dict(values | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.to(dtype)


def settled(model, tokens, **arguments):
    """The model with thresholds at their targets for these tokens."""
    model.train()
    for _ in range(len(model.blocks) + 1):  # what a layer reads changes with the choices of those before it
        with torch.no_grad():
            model(tokens, **arguments)
            for block in model.blocks:
                if block.depth is not None:
                    block.depth.threshold.copy_(block.depth.target)
    return model.eval()


def random_tokens(*shape):
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(1))


def kept_share(model, tokens):
    with torch.no_grad():
        model(tokens)
    return float(model.blocks[-1].depth.kept.sum() / tokens.numel())


POST = {"kind": "rms", "position": "post"}
DOCUMENTS = torch.tensor([[0] * 9 + [1] * 31, [-1] * 5 + [0] * 20 + [3] * 15])


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one document", "documents"])
@pytest.mark.parametrize("change", [{}, {"position": "learned"}, {"order": "parallel"}, {"norm": POST}], ids=str)
def test_the_shortened_layer_equals_one_that_runs_on_all_tokens(direction, documents, change):
    model = build(dtype=torch.float64, direction=direction, **change)
    tokens = random_tokens(2, 40)
    settled(model, tokens, documents=documents)
    block = model.blocks[1]
    _, context = model.embed(tokens, documents=documents)
    x = model(tokens, documents=documents, taps=["blocks.0"]).taps["blocks.0"].detach().requires_grad_()
    y, theirs = block(x, context).y, reference_mixture(block.depth, x, context, block.run)
    torch.testing.assert_close(y, theirs)
    assert 0.4 < block.depth.kept.sum() / (80 if documents is None else 75) < 0.6
    upstream, learned = torch.randn_like(y), [x, *block.parameters()]
    gradients = [torch.autograd.grad(out, learned, upstream) for out in (y, theirs)]
    for mine, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, reference)


def test_attention_and_feedforward_run_on_the_chosen_tokens_alone():
    model, tokens = build(depths=[{**ROUTED, "capacity": 0.25}], context=600), random_tokens(2, 512)
    settled(model, tokens)
    seen = []
    for name in ("attention", "feedforward"):
        module = getattr(model.blocks[1], name)
        module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[1]))
    with torch.no_grad():
        model(tokens)
    assert len(seen) == 2
    assert all(128 <= places <= 256 for places in seen)  # of 512, with a quarter chosen in both rows on average


def test_flops_are_those_of_the_share_that_takes_part():
    model = build(depths=[{**ROUTED, "capacity": 2 / 3}], width=48, context=64)
    tokens = random_tokens(1, 24)
    settled(model, tokens)
    assert [int(block.depth.kept.sum()) for block in model.blocks] == [16, 16]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        model(tokens)
    assert forward.get_total_flops() == 24 * model.flops_per_token(24)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        model(tokens).logits.sum().backward()
    assert backward.get_total_flops() == 24 * model.training_flops_per_token(24)
    assert model.flops_per_token(24) < build(depths=[None], width=48, context=64).flops_per_token(24)


def test_the_threshold_finds_the_wanted_share():
    model = build(depths=[None, {**ROUTED, "capacity": 0.25}]).train()
    for seed in range(80):
        model(torch.randint(40, (4, 32), generator=torch.Generator().manual_seed(seed)))
    assert kept_share(model.eval(), random_tokens(16, 32)) == pytest.approx(0.25, abs=0.05)


def test_padding_does_not_count_for_the_threshold():
    model, tokens = build().train(), random_tokens(2, 8)
    documents = torch.tensor([[0] * 8, [0, 0] + [-1] * 6])
    model(tokens, documents=documents)
    router = model.blocks[1].depth
    x = model.eval()(tokens, documents=documents, taps=["blocks.0"]).taps["blocks.0"]
    expected = router.logits(x)[documents == 0].quantile(0.5)
    torch.testing.assert_close(router.target[0], expected.detach())


def test_recomputed_activations_choose_the_same_tokens_and_move_the_threshold_once():
    def train(recompute):
        model, thresholds, gradients = build(depths=[ROUTED]).train(), [], []
        for block in model.blocks:
            if recompute:
                whole = block.forward
                block.forward = lambda *given, whole=whole: checkpoint(whole, *given, use_reentrant=False)
        for seed in range(4):
            tokens = torch.randint(40, (2, 24), generator=torch.Generator().manual_seed(seed))
            loss = model(tokens, targets=tokens.roll(-1, 1)).loss
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
            thresholds.append([block.depth.threshold.clone() for block in model.blocks])
        return thresholds, gradients

    plain, again = train(False), train(True)
    assert plain[0] == again[0]
    assert len(set(map(str, plain[0]))) == 4
    for mine, theirs in zip(plain[1], again[1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_a_run_goes_on_as_if_it_had_never_stopped():
    tokens = [random_tokens(2, 24).roll(i, 1) for i in range(6)]
    whole, first = build().train(), build().train()
    for batch in tokens:
        whole(batch)
    for batch in tokens[:3]:
        first(batch)
    second = build().train()
    second.load_state_dict(first.state_dict())
    for batch in tokens[3:]:
        second(batch)
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in second.state_dict().items())
    assert whole.blocks[1].depth.threshold != 0


def test_all_processes_move_to_the_mean_of_their_targets(monkeypatch):
    model = build().train()
    model(random_tokens(2, 24))
    router = model.blocks[1].depth
    own = router.target.clone()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(0.5))  # the other one's
    router.target.fill_(7.0)  # as DDP does with buffers, which it makes those of the first process
    router.advance()
    torch.testing.assert_close(router.threshold, router.spec.rate * (own + 0.5) / 2)


def test_evaluation_moves_nothing():
    model = build()
    before = copy.deepcopy(model.state_dict())
    model(random_tokens(2, 24))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("chunks", [[1] * 30, [13, 1, 1, 9, 1, 5]], ids=str)
def test_cached_decoding_chooses_the_same_tokens(chunks):
    model, tokens = build(depths=[None, {**ROUTED, "capacity": 0.3}]), random_tokens(3, 30)
    documents = torch.zeros_like(tokens)
    documents[2, :6] = -1
    settled(model, tokens, documents=documents)
    cache, runs, kept = model.new_cache(3, 30), [], []
    model.blocks[1].attention.register_forward_pre_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        pieces = []
        for piece, numbers in zip(tokens.split(chunks, 1), documents.split(chunks, 1), strict=True):
            pieces.append(model(piece, cache=cache, documents=numbers).logits)
            kept.append(model.blocks[1].depth.kept.shape[1])
        whole = model(tokens, documents=documents).logits
    torch.testing.assert_close(torch.cat(pieces, 1)[documents == 0], whole[documents == 0], atol=2e-5, rtol=2e-5)
    assert len(runs) == sum(places > 0 for places in kept) + 1
    if len(chunks) == 30:
        assert 0 in kept  # no row chose its token: the layer is left out
    assert cache.blocks[1]["depth"].documents.shape == (3, sum(kept))
    assert cache.blocks[1]["attention"].length == sum(kept) < 30
    assert sum(layer.bytes() for layer in cache.layers) == 3 * model.cache_bytes(30)


def test_a_model_in_bf16_keeps_its_thresholds_in_fp32(tmp_path):
    model, value = build(), 1.0 + 2.0**-12  # which bf16 rounds away
    router = model.blocks[1].depth
    router.threshold.fill_(value)
    assert model.to(torch.bfloat16).blocks[1].depth.threshold.item() == value
    assert router.weight.dtype == torch.bfloat16
    router.target.fill_(1.0 + 2.0**-10)
    router.advance()
    assert value < router.threshold.item() < 1.0 + 2.0**-10
    router.threshold.fill_(value)
    save_model(model.float(), tmp_path, torch.bfloat16)
    for dtype in (None, torch.bfloat16):
        loaded = load(tmp_path, dtype=dtype)
        assert loaded.blocks[1].depth.threshold.item() == value
        assert loaded.blocks[1].depth.weight.dtype == torch.bfloat16
    assert stored_dtype(TensorFiles(tmp_path), model.config) == torch.bfloat16
    assert model.double().blocks[1].depth.threshold.dtype == torch.float64


def test_thresholds_that_were_saved_in_bf16_come_back_in_fp32():
    state = {name: tensor.to(torch.bfloat16) for name, tensor in build().state_dict().items()}
    for assign in (False, True):
        model = build()
        model.load_state_dict(state, assign=assign)
        assert model.blocks[1].depth.target.dtype == torch.float32


def test_a_choice_depends_on_the_past_alone():
    model, tokens = build(depths=[ROUTED]), random_tokens(1, 48)
    settled(model, tokens)
    chosen = {}
    for length in (20, 48):
        with torch.no_grad():
            states = model(tokens[:, :length], taps=["blocks.0"]).taps["blocks.0"]
        chosen[length] = model.blocks[1].depth.logits(states) > model.blocks[1].depth.threshold
    assert torch.equal(chosen[48][:, :20], chosen[20])
    assert 0 < chosen[48].sum() < 48


def test_a_copy_of_a_compiled_model_runs_its_own_weights():
    model, tokens = build(), random_tokens(2, 8)
    torch.compiler.reset()
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[1].feedforward.down.weight.zero_()
        other.blocks[1].attention.o.weight.zero_()
        x, context = other.embed(tokens)
        torch.testing.assert_close(other.blocks[1](x, context).y, x)
        assert not torch.equal(model.blocks[1](x, context).y, x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": {"kind": "window", "heads": 4, "window": 4}}, "works with attention full"),
        ({"position": "alibi"}, "positions count those in between"),
        ({"position": "t5"}, "positions count those in between"),
        ({"depths": {**ROUTED, "capacity": 1.0}}, "capacity must be above 0 and below 1"),
        ({"depths": {**ROUTED, "rate": 0}}, "rate must be above 0"),
        ({"depths": [ROUTED, None, None]}, "does not tile the 2"),
        ({"depths": "mixture_of_depth"}, "did you mean 'mixture_of_depths'"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        build(**({"depths": [ROUTED]} | change))
