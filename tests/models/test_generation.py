"""Generation: cached against uncached, batched against alone, and every way of drawing a token."""

import inspect
import warnings

import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from models.config import ModelConfig
from models.errors import UserError
from models.generation import Sampling, generate, stream
from models.transformer import Transformer

VOCAB = 61
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15], [3, 60, 2, 0, 1, 4, 4]]


def build(**changes):
    torch.manual_seed(1)
    values = {
        "vocab_size": VOCAB,
        "width": 32,
        "depth": 2,
        "context": 64,
        "attention": {"kind": "full", "heads": 4, "kv_heads": 2},
        "feedforward": {"kind": "swiglu", "width": 48},
    }
    model = Transformer(ModelConfig.from_dict(values | changes)).eval()
    with torch.no_grad():  # as initialised the logits are nearly flat
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


@pytest.fixture(scope="module")
def model():
    return build()


def uncached(model, prompt, steps):
    """Greedy continuation by running the whole sequence anew for every token."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("position", ["rope", "learned", "none"])
def test_a_ragged_batch_equals_each_prompt_alone_without_a_cache(position):
    model = build(position=position)
    together = generate(model, PROMPTS, max_new_tokens=12)
    assert together == [uncached(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in together}) == len(PROMPTS)  # not all the same dull loop


def test_a_sampled_batch_equals_each_prompt_alone(model):
    arguments = {"max_new_tokens": 20, "temperature": 1.3, "top_k": 20, "top_p": 0.95}
    together = generate(model, PROMPTS, seed=7, **arguments)
    assert together == [generate(model, [prompt], seed=7 + i, **arguments)[0] for i, prompt in enumerate(PROMPTS)]
    assert together == generate(model, PROMPTS, seed=7, **arguments)
    assert together != generate(model, PROMPTS, seed=8, **arguments)


def test_the_global_generator_is_neither_used_nor_moved(model):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = generate(model, PROMPTS, max_new_tokens=5, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert generate(model, PROMPTS, max_new_tokens=5, temperature=1.0) == first


def test_the_same_prompt_twice_draws_differently(model):
    first, second = generate(model, [PROMPTS[0]] * 2, max_new_tokens=20, temperature=1.5)
    assert first != second


def test_stop_tokens_end_a_row_and_are_left_out(model):
    free = generate(model, PROMPTS, max_new_tokens=12)
    stop = free[0][4]
    stopped = generate(model, PROMPTS, max_new_tokens=12, stop_tokens={stop})
    for tokens, whole in zip(stopped, free, strict=True):
        assert tokens == (whole[: whole.index(stop)] if stop in whole else whole)
    assert len(stopped[0]) <= 4


def test_a_stopped_prompt_stays_silent_while_others_go_on():
    """Whatever is drawn for it afterwards: here every prompt meets the stop token at once, but one."""
    said = torch.tensor([[1, 2, 3, 4, 5], [9, 2, 9, 4, 5], [1, 9, 3, 4, 9]])  # tokens by prompt and step

    class Scripted(Sampling):
        step = 0

        def draw(self, logits, uniform):
            object.__setattr__(self, "step", self.step + 1)
            return said[:, self.step - 1]

    steps = list(stream(build(), PROMPTS[:3], max_new_tokens=5, sampling=Scripted(), stop_tokens={9}))
    assert steps == [[1, None, 1], [2, None, None], [3, None, None], [4, None, None], [5, None, None]]


def test_generation_ends_when_every_row_has_stopped(model):
    first = generate(model, PROMPTS, max_new_tokens=1)
    calls = []
    handle = model.norm.register_forward_hook(lambda *_: calls.append(1))
    try:
        assert generate(model, PROMPTS, max_new_tokens=9, stop_tokens={t for [t] in first}) == [[]] * len(PROMPTS)
    finally:
        handle.remove()
    assert len(calls) == 1


def test_streaming_yields_the_same_tokens_one_step_at_a_time(model):
    steps = stream(model, PROMPTS, max_new_tokens=6)
    assert inspect.isgenerator(steps)
    first = next(steps)
    assert not torch.is_inference_mode_enabled()
    columns = [first, *steps]
    assert [list(row) for row in zip(*columns, strict=True)] == generate(model, PROMPTS, max_new_tokens=6)


def test_a_model_in_training_comes_back_in_training():
    model = build(dropout=0.5).train()
    tokens = generate(model, PROMPTS, max_new_tokens=4)
    assert model.training
    assert model.blocks[0].training
    assert tokens == generate(model.eval(), PROMPTS, max_new_tokens=4)
    assert not model.training


def test_sampling_follows_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0]).expand(20_000, 5)
    uniform = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = Sampling(temperature=0.7).draw(logits, uniform)
    expected = (logits[0].double() / 0.7).softmax(-1)
    counted = torch.bincount(drawn, minlength=5) / 20_000
    assert (counted - expected).abs().max() < 4 * (0.25 / 20_000) ** 0.5  # four standard errors


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 3, None), (0.8, None, 0.6), (2.0, 9, 0.5), (1, 99, 1)]
)
def test_the_tokens_that_can_be_drawn_are_those_of_transformers(temperature, top_k, top_p):
    logits = 3 * torch.randn(1, 40, generator=torch.Generator().manual_seed(5))
    scores = TemperatureLogitsWarper(float(temperature))(None, logits)
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p is not None:
        scores = TopPLogitsWarper(float(top_p))(None, scores)
    expected = scores.softmax(-1)[0]
    uniform = torch.linspace(0, 1, 20_001, dtype=torch.float64)[:-1]
    drawn = Sampling(temperature, top_k, top_p).draw(logits.expand(20_000, 40), uniform)
    counted = torch.bincount(drawn, minlength=40) / 20_000
    assert torch.allclose(counted, expected, atol=1e-4)  # a comb of 20,000 teeth measures each probability to 1/20,000


@pytest.mark.parametrize(
    ("count", "top_p", "expected"), [(2, 0.5, 1), (4, 0.5, 2), (4, 0.75, 3), (4, 0.76, 4), (4, 1.0, 4)]
)
@pytest.mark.parametrize("top_k", [None, 4])
def test_the_nucleus_ends_where_it_reaches_p(count, top_p, expected, top_k):
    """Equal probabilities of 1/2 and 1/4, whose sums are exact."""
    uniform = torch.linspace(0, 1, 101, dtype=torch.float64)[:-1]
    logits = torch.zeros(100, 8).masked_fill(torch.arange(8) >= count, -torch.inf)
    assert len(Sampling(1.0, top_k, top_p).draw(logits, uniform).unique()) == expected


def test_the_last_draw_stays_inside_the_nucleus():
    logits = torch.tensor([[5.0, 4.0, -50.0, -60.0]])
    for top_k, top_p in ((None, 0.9), (2, None), (3, 0.99), (None, None)):
        token = Sampling(1.0, top_k, top_p).draw(logits, torch.tensor([1 - 2**-53], dtype=torch.float64))
        assert token.item() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1.0, "top_k": 0}, "top_k"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"prompts": []}, "no prompt"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1, 61]]}, "token 61, outside the vocabulary of 61"),
        ({"prompts": [[1, -2]]}, "token -2"),
    ],
)
def test_wrong_requests_are_refused(model, change, message):
    with pytest.raises(UserError, match=message):
        generate(**{"model": model, "prompts": PROMPTS, "max_new_tokens": 2} | change)


def test_rope_goes_beyond_the_context_with_a_warning(model):
    with pytest.warns(UserWarning, match="60 prompt tokens and 6 new ones exceed the model's context of 64"):
        assert len(generate(model, [[1] * 60], max_new_tokens=6)[0]) == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, [[1] * 60], max_new_tokens=4)


def test_learned_positions_end_with_the_context():
    model = build(position="learned")
    assert len(generate(model, [[1] * 60], max_new_tokens=4)[0]) == 4
    with pytest.raises(UserError, match="exceed the model's context of 64, where its learned positions end"):
        generate(model, [[1] * 60], max_new_tokens=5)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_not_finite_end_in_a_sentence_that_names_the_layer(temperature):
    model = build()
    with torch.no_grad():
        model.blocks[1].attention.o.weight[0, 0] = float("nan")
    for prompts in ([[5, 6]], PROMPTS):
        with pytest.raises(UserError, match=r"the output of blocks\.1\.attention\.o \(float32\) is not finite"):
            generate(model, prompts, max_new_tokens=2, temperature=temperature)


def test_a_draw_says_which_logits_are_not_finite():
    logits = torch.tensor([[1.0, float("nan")], [0.0, 9.0], [float("inf"), 0.0], [-float("inf")] * 2])
    uniform = torch.full((4,), 0.5, dtype=torch.float64)
    for sampling in (Sampling(), Sampling(1.0), Sampling(1.0, top_k=1), Sampling(1.0, top_p=0.5)):
        assert sampling.draw(logits, uniform).tolist() == [-1, 1, -1, -1]


@pytest.mark.parametrize("temperature", [1e-4, 1e-40, 5e-324])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_smaller_the_temperature_the_greedier(temperature, dtype):
    logits = torch.randn(16, VOCAB, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[:, 7] = logits.amax(dim=1) * 2 + 1  # one is the largest in either dtype
    uniform = torch.linspace(0, 0.999, 16, dtype=torch.float64)
    assert (Sampling(temperature).draw(logits, uniform) == 7).all()
