"""What must hold for every decoder that the registries can build.

A mechanism is covered by being registered: the cases are drawn from the registries so that every two values of two axes
meet in some case (all-pairs covering), as far as a config accepts the pairing. `make test` runs every property on a
sixth of them that holds every value of every axis, `make test-slow` on the rest.
"""

import dataclasses
import functools
import itertools
import json
import random
from contextlib import nullcontext, suppress

import pytest
import torch
from torch.func import functional_call

from models.attention.linformer import SHARINGS, SUMS
from models.config import ORDERS, RESIDUALS, SQRT_WIDTH, ModelConfig
from models.errors import UserError
from models.experts import ROUTERS
from models.feedforward import ACTIVATIONS
from models.generation import generate
from models.positions.rope import ROPE_SCALINGS
from models.specs import ATTENTIONS, DEPTHS, FEEDFORWARDS, HEADS, INPUTS, NORM_POSITIONS, NORMS, POSITIONS
from models.transformer import Transformer

VOCAB, WIDTH, CONTEXT = 40, 16, 24
# what the fields that a spec must be given are here, by their names
EXAMPLES = {
    "heads": 4,
    "rank": 5,
    "documents": 3,
    "buckets": 4,
    "width": 24,
    "factor": 2.0,
    "low_frequency_factor": 1.0,
    "high_frequency_factor": 4.0,
    "original_context": 8,
    "window": 6,
    "globals": 2,
    "stride": 3,
    "block": 4,
    "keep": 3,
    "chunk": 2,
    "segment": 3,
    "count": 4,
    "expert": {"kind": "swiglu", "width": 8},
    "classes": VOCAB,
}


def example(registry, kind, **more):
    """The smallest spec of a kind: its required fields filled in, all others left as they are."""
    none = dataclasses.MISSING
    fields = dataclasses.fields(registry[kind])
    required = [field.name for field in fields if field.default is none and field.default_factory is none]
    return {"kind": kind, **{name: EXAMPLES[name] for name in required}, **more}


def led_by(kind, registry):
    """All kinds, first one that goes with everything: what a case has not chosen yet is the first of its axis."""
    return sorted(registry, key=lambda other: (other != kind, other))


def has(registry, kind, name):
    return name in registry[kind].__dataclass_fields__


AXES = {
    "attention": [
        *(example(ATTENTIONS, kind) for kind in led_by("full", ATTENTIONS)),
        *(example(ATTENTIONS, kind, kv_heads=2) for kind in ATTENTIONS if has(ATTENTIONS, kind, "kv_heads")),
        example(ATTENTIONS, "full", kv_heads=1, head_width=6, bias=True, out_bias=True),
        example(ATTENTIONS, "full", kv_heads=2, qk_norm="rms", scale=0.7),
        *(example(ATTENTIONS, kind, softcap=2.0, sink="learned") for kind in ("full", "window")),
        example(ATTENTIONS, "full", sink="zero"),
        *(example(ATTENTIONS, "full", kv_heads=2, kernel=kernel) for kernel in ("flex", "tiled", "reference")),
        example(ATTENTIONS, "selective", kv_heads=2, budget=3, softcap=2.0, sink="zero"),
        example(ATTENTIONS, "selective", carry=0.5),
        example(ATTENTIONS, "selective", budget=4, carry=0.5),
        *(example(ATTENTIONS, "linformer", sharing=sharing, bias=True, out_bias=True) for sharing in SHARINGS),
        *(example(ATTENTIONS, "linformer", sums=sums) for sums in SUMS),
        example(ATTENTIONS, "lsh", buckets=2, chunk=2, rounds=3, bias=True, out_bias=True),
        example(ATTENTIONS, "lsh", chunk=4, scale=1.0, across_buckets=True, duplicates=True),
        example(ATTENTIONS, "bigbird", block=2, random=1),
        example(ATTENTIONS, "window", dilation=5),
        example(
            ATTENTIONS, "recursive", chunk=4, pooling={"kind": "query", "summaries": 2}, levels=2, level_embedding=True
        ),
        example(ATTENTIONS, "hierarchical", pooling={"kind": "query", "summaries": 2}, bias=True, segment_heads=1),
        example(ATTENTIONS, "retention", value_width=3, decay={"kind": "range"}, chunk=4),
    ],
    "position": [
        *(example(POSITIONS, kind) for kind in led_by("none", POSITIONS)),
        *(example(POSITIONS, "rope", scaling=example(ROPE_SCALINGS, kind)) for kind in ROPE_SCALINGS),
        example(POSITIONS, "rope", fraction=0.5),
        example(POSITIONS, "rope", layout="interleaved"),
        example(POSITIONS, "shaw", clip=3, terms="keys_and_values"),
    ],
    "norm": [
        *(example(NORMS, kind, position=position) for kind in NORMS for position in NORM_POSITIONS),
        example(NORMS, "rms", offset=1.0),
    ],
    "order": [*ORDERS, "sandwich(1)", "ssff"],
    "feedforward": [
        *(example(FEEDFORWARDS, kind) for kind in led_by("mlp", FEEDFORWARDS)),
        *(example(FEEDFORWARDS, "swiglu", activation=activation, bias=True) for activation in ACTIVATIONS),
        *(
            example(FEEDFORWARDS, "experts", router={"kind": kind}, top_k=1 if kind == "switch" else 2)
            for kind in ROUTERS
            if kind != "softmax"
        ),
        example(
            FEEDFORWARDS,
            "experts",
            expert={"kind": "mlp", "width": 8},
            router={"kind": "sigmoid", "groups": 2, "top_groups": 2, "weights": "probability"},
            balance=[{"kind": "bias"}, {"kind": "auxiliary"}],
            capacity={"factor": 0.5},
            shared={"kind": "swiglu", "width": 8},
            layout="separate",
        ),
    ],
    "head": [
        *(kind for kind in HEADS if kind != "classifier"),
        example(HEADS, "tied", bias=True, transform={"activation": "gelu", "norm": "rms"}),
        example(HEADS, "untied", bias=True, transform={"activation": "tanh"}),
    ],
    "input": ["tokens", example(INPUTS, "tokens", norm="layer")],
    "first_norm": [True, False],
    "embedding_scale": [1.0, SQRT_WIDTH],
    "residual": RESIDUALS,
    "depths": [None, *([None, example(DEPTHS, kind)] for kind in DEPTHS)],
}


def read(case):
    return ModelConfig.from_dict({"vocab_size": VOCAB, "width": WIDTH, "context": CONTEXT, "depth": 2, **case})


@functools.cache
def _accepted(text):
    try:
        read(json.loads(text))
    except UserError:
        return False
    return True


def accepted(case):
    return _accepted(json.dumps(case))


def covering(axes, together=2):
    """Cases in which every two values of two axes meet: greedily, each case around one pair that has not met yet.

    With `together` 1 every value is in some case, and no more.
    """
    sizes = [range(len(values)) for values in axes.values()]
    groups = itertools.combinations(range(len(sizes)), together)
    unmet = {
        tuple(zip(group, values, strict=True))
        for group in groups
        for values in itertools.product(*(sizes[axis] for axis in group))
    }

    def case(chosen):  # what is not chosen yet is the first of its axis
        return {name: values[chosen.get(axis, 0)] for axis, (name, values) in enumerate(axes.items())}

    def news(chosen, axis, value):
        others = itertools.combinations(chosen.items(), together - 1)
        return sum(tuple(sorted([(axis, value), *other])) in unmet for other in others)

    cases = []
    while unmet:
        seed = min(unmet)
        unmet.remove(seed)
        chosen = dict(seed)
        if not accepted(case(chosen)):
            continue
        for axis in set(range(len(sizes))) - chosen.keys():
            best_first = sorted(sizes[axis], key=functools.partial(news, chosen, axis), reverse=True)
            chosen[axis] = next(value for value in best_first if accepted(case(chosen | {axis: value})))
        cases.append(case(chosen))
        unmet -= set(itertools.combinations(sorted(chosen.items()), together))
    return cases


def label(case):
    def words(value):
        return "-".join(map(words, value.values())) if isinstance(value, dict) else str(value)

    return " ".join(words(value) for value in case.values())


def hybrid(**attentions):
    """A case in which every layer has another attention."""
    rest = {axis: values[0] for axis, values in AXES.items() if axis != "attention"} | {"position": {"kind": "rope"}}
    layers = {"layers": list(attentions), "depth": len(attentions)}
    return {"direction": "causal", "attention": attentions, **rest, **layers}


DRAWN = covering({"direction": ["causal"], **AXES})
HYBRIDS = [
    hybrid(
        a=example(ATTENTIONS, "retention", chunk=4),
        b=example(ATTENTIONS, "convolution"),
        c=example(ATTENTIONS, "full", kv_heads=2),
    ),
    hybrid(a=example(ATTENTIONS, "convolution"), b=example(ATTENTIONS, "window"), c=example(ATTENTIONS, "retention")),
]
CASES = DRAWN + HYBRIDS
POOLED = [example(HEADS, "classifier", pool=pool) for pool in ("mean", "first", "last")]
POOLED += [example(HEADS, "classifier", pool="first", transform={"activation": "silu"})]
SEGMENTED = [example(INPUTS, "tokens", segments={"count": 2, "separator": 9})]
ENCODERS = covering(
    {
        "direction": ["bidirectional"],
        **AXES,
        "head": [*AXES["head"], *POOLED],
        "input": [*AXES["input"], *SEGMENTED],
    },
    together=1,
)


def values(case):
    """The value of every axis: of a mechanism its options too."""
    return {(axis, label({axis: value})) for axis, value in case.items()}


def kinds(case):
    """The value of every axis that is a mechanism or an arrangement: of a mechanism only its kind."""
    plain = values({axis: case[axis] for axis in ("norm", "order", "residual", "depths")})
    return plain | {(axis, case[axis].get("kind")) for axis in ("attention", "position", "feedforward")}


def variants(case):
    """As `kinds`, of attention its options too."""
    return kinds(case) | values({"attention": case["attention"]})


def has_experts(case):
    return case["feedforward"]["kind"] == "experts"


def per_token(case):
    """Whether experts, if any, are chosen for each token by itself, whatever else is in its row."""
    return not has_experts(case) or ROUTERS[case["feedforward"].get("router", {"kind": "softmax"})["kind"]].per_token


def few(cases, of):
    """The first cases that hold something new of what `of` names."""
    picked, seen = [], set()
    for case in cases:
        if not of(case) <= seen:
            picked.append(case)
            seen |= of(case)
    return picked


def sixth(cases):
    """A sixth of the cases, drawn with a seed, and those it takes beside them to have every value of every axis."""
    drawn = random.Random(0).sample(cases, len(cases))
    picked = drawn[: len(cases) // 6]
    return picked + [case for case in few([*filter(per_token, drawn), *drawn], values) if case not in picked]


def marked(cases, quick):
    """All of the cases; those that are not among the quick ones are slow."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


QUICK = sixth(DRAWN) + HYBRIDS
# a finite difference may cross the kink of relu
SMOOTH = [[case for case in cases if case["feedforward"].get("activation") != "relu"] for cases in (CASES, ENCODERS)]
every_case = pytest.mark.parametrize("case", marked(CASES, QUICK) + ENCODERS, ids=label)
every_decoder = pytest.mark.parametrize("case", marked(CASES, QUICK), ids=label)
every_encoder = pytest.mark.parametrize("case", ENCODERS, ids=label)
# for what takes long
some_cases = pytest.mark.parametrize(
    "case", [case for cases in SMOOTH for case in marked(few(cases, variants), few(cases, kinds))], ids=label
)
compiled_cases = pytest.mark.parametrize(
    "case",
    [case for cases in SMOOTH for case in marked(few(cases, variants), few(cases, kinds)[::5])],
    ids=label,
)


def build(case, dtype=torch.float32):
    """A model whose weights are large enough that every token matters to every later one."""
    torch.manual_seed(0)
    model = Transformer(read(case)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_((1 if "norm" in name and "weight" in name else 0) + 0.3 * torch.randn(parameter.shape))
    depths = [block.depth for block in model.blocks if block.depth is not None]
    if depths:  # as after training: of some tokens a part is on either side of each threshold
        logits(model.train(), random_tokens(2, 16))
        for depth in depths:
            depth.threshold.copy_(depth.target)
    return model.eval().to(dtype)


@functools.cache
def _shared(text, dtype):
    return build(json.loads(text), dtype)


def shared(case, dtype=torch.float32):
    """As `build`, one model for all the tests of a process that do not change it."""
    return _shared(json.dumps(case), dtype)


def random_tokens(*shape):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))


def logits(model, tokens, **arguments):
    with torch.no_grad():
        return model(tokens, **arguments).logits


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def test_every_registered_mechanism_is_in_a_case():
    for axis, registry in (
        ("attention", ATTENTIONS),
        ("position", POSITIONS),
        ("norm", NORMS),
        ("feedforward", FEEDFORWARDS),
    ):
        assert {case[axis]["kind"] for case in DRAWN + ENCODERS} == set(registry)
    heads = {case["head"] if isinstance(case["head"], str) else case["head"]["kind"] for case in DRAWN + ENCODERS}
    assert heads == set(HEADS)
    for axis, values in AXES.items():
        assert all(any(case[axis] == value for case in DRAWN + ENCODERS) for value in values)
        assert all(
            any(case[axis] == value for case in QUICK) for value in values if any(case[axis] == value for case in DRAWN)
        )


def test_every_accepted_pair_of_values_meets():
    for (one, first), (other, second) in itertools.combinations(AXES.items(), 2):
        for a, b in itertools.product(first, second):
            together = {axis: values[0] for axis, values in AXES.items()} | {one: a, other: b}
            assert not accepted(together) or any(case[one] == a and case[other] == b for case in DRAWN)


@every_decoder
def test_no_token_sees_a_later_one(case):
    """To the bit; but how many tokens an expert has decides in what order a product of theirs is summed."""
    model, tokens = shared(case, torch.float64 if has_experts(case) else torch.float32), random_tokens(2, 12)
    rounding = 1e-11 if has_experts(case) else 0.0
    before = logits(model, tokens)
    for t in (1, 6, 11):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCAB
        after = logits(model, changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=rounding, rtol=rounding)
        assert not torch.equal(after[:, t], before[:, t])


@every_decoder
def test_the_last_token_sees_the_first(case):
    model, tokens = shared(case), random_tokens(1, 6)
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % VOCAB
    assert (logits(model, changed)[:, -1] - logits(model, tokens)[:, -1]).abs().max() > 1e-4


@every_encoder
def test_the_first_token_of_an_encoder_sees_the_last(case):
    model, tokens = shared(case), random_tokens(1, 6)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % VOCAB
    assert (logits(model, changed)[:, 0] - logits(model, tokens)[:, 0]).abs().max() > 1e-4


@every_encoder
def test_an_encoder_does_not_generate(case):
    with pytest.raises(UserError, match="a bidirectional model cannot generate"):
        generate(shared(case), [[1, 2]], max_new_tokens=2)


@every_decoder
@pytest.mark.parametrize("chunks", [[1] * 11, [5, 1, 1, 3, 1]], ids=str)
def test_cached_decoding_equals_the_whole_forward(case, chunks):
    model, tokens = shared(case, torch.float64), random_tokens(2, 11)
    cache = model.new_cache(2, 11)
    pieces = [logits(model, piece, cache=cache) for piece in tokens.split(chunks, dim=1)]
    close(torch.cat(pieces, dim=1), logits(model, tokens))


@every_case
def test_a_packed_document_is_as_it_would_be_alone(case):
    if not per_token(case):
        pytest.skip("experts that choose among all tokens of a row choose otherwise where it holds other documents")
    model, tokens = shared(case, torch.float64), random_tokens(2, 13)
    documents = torch.tensor([[0] * 4 + [1] * 8 + [2], [7] * 1 + [8] * 6 + [9] * 6])
    packed = logits(model, tokens, documents=documents)
    for row in range(2):
        for document in documents[row].unique():
            where = documents[row] == document
            close(packed[row, where], logits(model, tokens[row : row + 1, where])[0])


@every_case
def test_padding_changes_nothing(case):
    model, tokens = shared(case, torch.float64), random_tokens(3, 9)
    documents = torch.zeros(3, 9, dtype=torch.int64)
    documents[1, :4] = documents[2, 6:] = -1
    padded = logits(model, tokens, documents=documents)
    assert padded.isfinite().all()
    for row in range(3):
        where = documents[row] == 0
        close(padded[row, where], logits(model, tokens[row : row + 1, where])[0])


@every_decoder
def test_a_ragged_batch_generates_what_each_prompt_does_alone(case):
    model = shared(case)
    prompts = [random_tokens(length).tolist() for length in (7, 1, 4)]
    together = generate(model, prompts, max_new_tokens=6)
    assert together == [generate(model, [prompt], max_new_tokens=6)[0] for prompt in prompts]


@pytest.mark.parametrize("case", few(SMOOTH[0], variants), ids=label)
def test_pages_change_nothing(case):
    model = shared(case)
    prompts = [random_tokens(length).tolist() for length in (7, 1, 7)]
    assert generate(model, prompts, max_new_tokens=6, page_size=4) == generate(model, prompts, max_new_tokens=6)


class Beside:
    """A cache of rows, and each row alone in a cache of its own: what follows must be the same."""

    def __init__(self, model, rows, pages=None):
        self.model, self.rows, self.pages = model, [list(row) for row in rows], pages
        self.cache = self.caches_of(self.rows)
        self.check(self.begun)

    def caches_of(self, rows):
        cache = self.model.new_cache(len(rows), 24, pages=self.pages)
        cache.begin([len(row) for row in rows])
        longest = max(map(len, rows))
        tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        self.begun = logits(self.model, tokens, cache=cache)[:, -1:]
        return cache

    def check(self, found):
        assert self.cache.lengths == [len(row) for row in self.rows]
        for row, mine in zip(self.rows, found, strict=True):
            close(mine, logits(self.model, torch.tensor([row]))[0, -len(mine) :])

    def go_on(self, *chunks):
        for chunk in chunks:
            tokens = random_tokens(len(self.rows), sum(map(len, self.rows)))[:, -chunk:]
            self.rows = [row + more for row, more in zip(self.rows, tokens.tolist(), strict=True)]
            self.check(logits(self.model, tokens, cache=self.cache))

    def fork(self, *parents):
        self.cache.fork(parents)
        self.rows = [self.rows[parent] for parent in parents]

    def put(self, number, row):
        self.cache.put(number, self.caches_of([[3], row]), 1)
        self.rows[number] = row

    def shorten(self, *counts):
        self.cache.shorten(counts)
        self.rows = [row[: len(row) - count] for row, count in zip(self.rows, counts, strict=True)]


@pytest.mark.parametrize("case", marked(few(CASES, variants), few(CASES, kinds)), ids=label)
@pytest.mark.parametrize("pages", [None, 4], ids=["whole", "pages"])
def test_rows_of_their_own_lengths_are_as_each_would_be_alone(case, pages):
    """Where rows cannot be replaced or shortened, this is said, and nothing has changed."""
    rows = Beside(shared(case, torch.float64), [random_tokens(length).tolist() for length in (7, 1, 4)], pages)
    rows.go_on(1, 1, 3)
    rows.fork(1, 2, 1, 2)  # the longest is gone
    rows.go_on(1, 4)
    if case["depths"] is not None:
        for change in (lambda: rows.put(0, [1, 2]), lambda: rows.shorten(1, 0, 0, 0)):
            with pytest.raises(UserError, match="where tokens pass by a layer"):
                change()
        return rows.go_on(1)
    rows.put(1, random_tokens(14).tolist())  # longer than all
    rows.go_on(1, 2)
    rows.put(0, [5, 6])  # shorter than all
    rows.go_on(3, 1)
    # a wide window has forgotten nothing yet, and may be shortened
    with nullcontext() if kinds_of_attention(case) <= WHOLE else suppress(UserError):
        rows.shorten(3, 0, 2, 1)
    rows.go_on(1, 2)


WHOLE = {"full", "top_k", "strided", "fixed", "bigbird", "lsh", "single_heads"}  # they keep every token


def kinds_of_attention(case):
    specs = [case["attention"]] if "kind" in case["attention"] else case["attention"].values()
    return {spec["kind"] for spec in specs}


def unchosen(model):
    """How the names of the experts begin that no token of the latest forward chose."""
    prefixes = []
    for i, block in enumerate(model.blocks):
        load = block.feedforward.statistics.load if hasattr(block.feedforward, "statistics") else torch.ones(1)
        prefixes += [f"blocks.{i}.feedforward.experts.{e}." for e in (load == 0).nonzero().flatten().tolist()]
    return tuple(prefixes)


@every_case
def test_every_parameter_matters(case):
    model, tokens = build(case), random_tokens(8, 16) if has_experts(case) else random_tokens(2, 8)
    model(tokens).logits.square().mean().backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    # the softmax cancels the one without RoPE, and the other is of training alone
    known = [name for name in idle if name.endswith(("attention.k.bias", "router.noise.weight"))]
    if case["head"] in POOLED:  # the one token that is read may be none of those with global attention
        known += [name for name in idle if "_global." in name]
    assert idle == [name for name in idle if name in known or name.startswith(unchosen(model))]


@some_cases
def test_gradients_are_those_of_finite_differences(case):
    """In fp64, of all parameters at once along random directions (the fast mode of gradcheck)."""
    model, tokens = shared(case, torch.float64), random_tokens(1, 4)
    names, values = zip(*model.named_parameters(), strict=True)

    def run(*parameters):
        return functional_call(model, dict(zip(names, parameters, strict=True)), (tokens,)).logits

    assert torch.autograd.gradcheck(run, values, fast_mode=True)


@every_case
def test_config_and_weights_survive_the_round_trip(case):
    model, tokens = shared(case), random_tokens(2, 8)
    config = ModelConfig.from_dict(json.loads(json.dumps(model.config.to_dict())))
    assert config == model.config
    with torch.device("meta"):
        other = Transformer(config)
    other.load_state_dict(model.state_dict(), strict=True, assign=True)
    assert torch.equal(logits(other.eval(), tokens), logits(model, tokens))


@every_case
def test_initialising_from_the_meta_device_gives_the_same_model(case):
    config = read(case)
    torch.manual_seed(5)
    direct = Transformer(config).state_dict()
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    torch.manual_seed(5)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(torch.equal(tensor, direct[name]) for name, tensor in model.state_dict().items())


@compiled_cases
def test_compiled_blocks_equal_eager_ones(case):
    """Forward and gradients, in one unbroken graph; `aot_eager` traces and differentiates as the default does.

    Separate experts, whose numbers of tokens are known only as they run, stay outside of it.
    """
    model, tokens = build(case), random_tokens(2, 8)
    learned = [parameter for name, parameter in model.named_parameters() if not name.endswith("router.noise.weight")]
    expected = model(tokens, targets=tokens.roll(-1, 1)).loss
    idle = {"allow_unused": True, "materialize_grads": True}  # an expert that no token has room in
    gradients = torch.autograd.grad(expected, learned, **idle)
    torch.compiler.reset()
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=case["feedforward"].get("layout") != "separate")
    loss = model(tokens, targets=tokens.roll(-1, 1)).loss
    close(loss, expected)
    for compiled, eager in zip(torch.autograd.grad(loss, learned, **idle), gradients, strict=True):
        close(compiled, eager)


def test_a_block_compiled_to_machine_code_equals_the_eager_one():
    model, tokens = build(CASES[0]), random_tokens(2, 8)
    expected = logits(model, tokens)
    torch.compiler.reset()
    for block in model.blocks:
        block.compile(fullgraph=True)
    close(logits(model, tokens), expected)
