"""Early exits: their training loss, and decoding in which every layer still sees every token."""

import json

import pytest
import torch
import torch.nn.functional as F

from models.config import ModelConfig
from models.early_exit_decoding import EarlyExit
from models.errors import UserError
from models.generation import generate
from models.transformer import Transformer

VOCAB, DEPTH = 31, 5
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15], [3, 30, 2, 0, 1, 4, 4]]


def build(**changes):
    torch.manual_seed(1)
    values = {
        "vocab_size": VOCAB,
        "width": 32,
        "depth": DEPTH,
        "context": 64,
        "exits": {"layers": [2, 4], "weight": 0.3},
        "attention": {"kind": "full", "heads": 4, "kv_heads": 2},
        "feedforward": {"kind": "swiglu", "width": 48},
    }
    model = Transformer(ModelConfig.from_dict(values | changes)).eval()
    with torch.no_grad():  # as initialised the logits are nearly flat
        for parameter in model.parameters():
            parameter.mul_(8) if parameter.dim() == 2 else parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


VARIETY = {
    "rope": {},
    "learned": {"position": "learned"},
    "alibi": {"position": "alibi"},
    "window": {"attention": {"kind": "window", "heads": 4, "window": 3}},
    "retention": {"attention": {"kind": "retention", "heads": 4}},
    "post": {"norm": {"kind": "rms", "position": "post"}},
    "untied": {"head": "untied", "norm": "layer"},
}
various = pytest.mark.parametrize("changes", VARIETY.values(), ids=VARIETY)


def exit_logits(model, tokens, **arguments):
    """After how many layers -> the logits (B, T, V) there, in one forward of the whole model."""
    with torch.no_grad():
        output = model(tokens, taps=[f"blocks.{i}" for i in range(DEPTH)], **arguments)
        early = {end: model.project(model.exits(i, output.taps[f"blocks.{end - 1}"])) for i, end in enumerate((2, 4))}
    return early | {DEPTH: output.logits}


def middling(model):
    """A confidence that some tokens reach at the first exit, some at the second and some at none."""
    tops = {end: x.softmax(-1).amax(-1) for end, x in exit_logits(model, random_tokens(1, 60)).items()}
    return float(torch.cat([tops[2].flatten(), tops[4].flatten()]).quantile(0.6))


def random_tokens(*shape):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))


def test_training_adds_the_weighted_losses_of_the_exits():
    model, tokens = build().train(), random_tokens(2, 9)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    output = model(tokens, targets=targets)
    found = exit_logits(model, tokens)
    nll = {end: F.cross_entropy(x.flatten(0, 1), targets.flatten(), ignore_index=-100) for end, x in found.items()}
    torch.testing.assert_close(output.loss, nll[DEPTH])
    torch.testing.assert_close(output.losses["exits"], 0.3 * (2 * nll[2] + 4 * nll[4]) / 6)
    assert output.taps == {}
    assert list(model(tokens, targets=targets, taps=["blocks.1", "blocks.2"]).taps) == ["blocks.1", "blocks.2"]
    output.losses["exits"].backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert all(name == "norm.weight" or name.startswith("blocks.4.") for name in idle)
    assert model.exits.norms[0].weight.grad.any()


def test_the_exits_cost_a_head_each_in_training_alone():
    model, plain = build(), build(exits=None)
    assert model.flops_per_token(20) == plain.flops_per_token(20)
    head = 2 * 32 * VOCAB
    assert model.training_flops_per_token(20) == plain.training_flops_per_token(20) + 2 * 3 * head


def test_evaluation_is_that_of_the_last_layer_alone():
    model, tokens = build(), random_tokens(2, 9)
    assert model(tokens, targets=tokens).losses == {}
    plain = build(exits=None)
    plain.load_state_dict({name: x for name, x in model.state_dict().items() if not name.startswith("exits.")})
    assert torch.equal(plain(tokens).logits, model(tokens).logits)


@various
def test_a_confidence_that_is_never_reached_changes_nothing(changes):
    model = build(**changes)
    for sampling in ({}, {"temperature": 1.2, "top_k": 9}):
        used = []
        never = generate(model, PROMPTS, max_new_tokens=9, exit_confidence=1.1, layers_used=used, **sampling)
        assert never == generate(model, PROMPTS, max_new_tokens=9, **sampling)
        assert used == [DEPTH] * 9


@various
def test_every_step_has_the_logits_of_the_whole_model_where_it_left(changes):
    model = build(**changes)
    confidence = middling(model)
    tokens = random_tokens(2, 40)
    documents = torch.zeros_like(tokens)
    documents[1, :3] = -1
    early = EarlyExit(model, model.new_cache(2, 40), confidence)
    whole = exit_logits(model, tokens, documents=documents)
    ends = []
    with torch.no_grad():
        for chunk, numbers in zip(tokens.split([4] + [1] * 36, 1), documents.split([4] + [1] * 36, 1), strict=True):
            found = early.step(chunk, numbers if not ends else None)
            expected = whole[early.layers_used[-1]][:, 3 + len(ends)]
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
            ends.append(early.layers_used[-1])
    assert {2, DEPTH} <= set(ends)
    assert [2, DEPTH] in [ends[i : i + 2] for i in range(len(ends))]  # a deep one takes a waiting one along
    sure = {end: logits.softmax(-1).amax(-1)[:, 3:].amin(0) >= confidence for end, logits in whole.items()}
    assert ends == [2 if a else 4 if b else DEPTH for a, b in zip(sure[2], sure[4], strict=True)]


def test_greedy_tokens_are_the_likeliest_of_the_exit():
    model = build()
    used = []
    [continued] = generate(model, PROMPTS[:1], max_new_tokens=30, exit_confidence=middling(model), layers_used=used)
    whole = exit_logits(model, torch.tensor([PROMPTS[0] + continued]))
    first = len(PROMPTS[0]) - 1
    assert continued == [int(whole[end][0, first + i].argmax()) for i, end in enumerate(used)]
    assert len(used) == 30
    assert len(set(used)) > 1


def test_layers_run_only_when_a_token_gets_there():
    model = build()
    runs = [0] * DEPTH
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, number=number: runs.__setitem__(number, runs[number] + 1))
    used = []
    generate(model, PROMPTS, max_new_tokens=12, exit_confidence=1e-6, layers_used=used)
    assert used == [2] * 12
    assert runs == [12, 12, 0, 0, 0]


def test_prompts_that_have_ended_need_not_be_sure():
    model = build()
    early = EarlyExit(model, model.new_cache(2, 8), 0.9)
    logits = torch.tensor([[9.0, 0.0], [0.1, 0.0]])
    assert not early._sure(logits, None)
    assert not early._sure(logits, torch.tensor([False, True]))
    assert early._sure(logits, torch.tensor([True, False]))


def test_the_config_survives_the_round_trip():
    model = build()
    config = ModelConfig.from_dict(json.loads(json.dumps(model.config.to_dict())))
    assert config == model.config
    assert config.to_dict()["exits"] == {"layers": [2, 4], "weight": 0.3}
    with torch.device("meta"):
        other = Transformer(config)
    other.load_state_dict(model.state_dict(), strict=True, assign=True)


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        ({"layers": [2, 5]}, "an exit after layer 5 is none in a model of 5 layers"),
        ({"layers": []}, "at least one exit"),
        ({"layers": [0]}, "each after 1 layer or more"),
        ({"layers": [4, 2]}, "must rise"),
        ({"layers": [2], "weight": 0}, "weight must be positive"),
        ({"layers": [2], "wieght": 1}, "did you mean 'weight'"),
        ([2, 4], "expected exits such as"),
    ],
)
def test_wrong_exits_are_refused(exits, message):
    with pytest.raises(UserError, match=message):
        build(exits=exits)


def test_what_one_layer_hands_to_another_cannot_wait():
    with pytest.raises(UserError, match="from layer to layer"):
        build(attention={"kind": "selective", "heads": 4, "carry": 0.5})


def test_a_model_without_exits_cannot_be_left_early():
    with pytest.raises(UserError, match="this one has none"):
        generate(build(exits=None), PROMPTS, max_new_tokens=2, exit_confidence=0.9)
    with pytest.raises(UserError, match="must be above 0"):
        generate(build(), PROMPTS, max_new_tokens=2, exit_confidence=0.0)


def test_a_confidence_that_is_just_reached_is_enough():
    """Up to 1, which a probability reaches by rounding; above it none is sure."""
    model = build()
    logits = torch.tensor([[900.0, 0.0], [0.0, 900.0]])
    assert EarlyExit(model, model.new_cache(2, 8), 1.0)._sure(logits, None)
    assert not EarlyExit(model, model.new_cache(2, 8), 1.0 + 1e-6)._sure(logits, None)
    assert EarlyExit(model, model.new_cache(2, 8), 0.5)._sure(torch.zeros(1, 2), None)
