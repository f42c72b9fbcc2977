"""AWQ: folding changes nothing, the search does no worse than rounding, and what cannot be folded is said."""

import copy

import pytest
import torch

from app.evaluation.quality import paired
from compress.calibration.optimal_brain_surgeon import output_error
from compress.calibration.records import LayerRecord
from compress.calibration.sequential import LayerMethod, calibrate_sequentially
from compress.calibration.store import FolderStore
from compress.quantization import METHODS, Awq, Gptq, Rtn
from compress.quantization.affine import IntFormat, fit_matrix, quantize
from compress.quantization.methods.awq import Magnitudes, _some, clipped, on_grids, scale_block
from compress.quantization.plan import quantize_model
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer

SWIGLU = {"kind": "swiglu", "width": 48}
ARCHITECTURES = {
    "llama": {},
    "many heads": {"attention": {"kind": "full", "heads": 4}},
    "gpt2": {
        "norm": "layer",
        "position": "learned",
        "attention": {"kind": "full", "heads": 4, "bias": True, "out_bias": True},
        "feedforward": {"kind": "mlp", "width": 48},
    },
    "relu": {"feedforward": {"kind": "mlp", "width": 48, "activation": "relu"}},
    "gated with biases": {"feedforward": SWIGLU | {"bias": True, "out_bias": True}},
    "parallel": {"order": "parallel"},
    "feed-forward first": {"order": "feedforward_first"},
    "post": {"norm": {"kind": "rms", "position": "post"}},
    "gemma": {"norm": {"kind": "rms", "offset": 1.0}, "embedding_scale": "sqrt_width"},
    "sandwich": {"norm": {"kind": "layer", "position": "sandwich"}},
    "deepnorm": {"norm": {"kind": "layer", "position": "deepnorm"}},
    "reversible": {"residual": "reversible"},
    "values with positions": {
        "position": {"kind": "shaw", "clip": 4, "terms": "keys_and_values"},
        "attention": {"kind": "full", "heads": 4},
    },
    "query norms": {"attention": {"kind": "full", "heads": 4, "kv_heads": 2, "qk_norm": "rms"}},
    "single heads": {"attention": {"kind": "single_heads", "heads": 4}},
    "longformer": {"attention": {"kind": "longformer", "heads": 4, "window": 8, "globals": 2}},
    "linformer": {
        "attention": {"kind": "linformer", "heads": 4, "rank": 8, "documents": 1},
        "direction": "bidirectional",
        "position": "learned",
    },
    "lsh": {"attention": {"kind": "lsh", "heads": 4, "buckets": 4, "chunk": 8}},
    "retention": {"attention": {"kind": "retention", "heads": 4}, "position": "none"},
    "convolution": {"attention": {"kind": "convolution"}, "position": "learned"},
    "experts": {
        "feedforward": {
            "kind": "experts",
            "count": 4,
            "top_k": 2,
            "expert": {"kind": "swiglu", "width": 24},
            "shared": SWIGLU,
            "layout": "separate",
        }
    },
    "selective": {"attention": {"kind": "selective", "heads": 4}},
}


def build(seed=0, **changes):
    """A model whose norms, biases and tables are not what they start as, with a few channels that stand out."""
    torch.manual_seed(seed)
    values = {
        "width": 32,
        "depth": 2,
        "vocab_size": 96,
        "context": 64,
        "attention": {"kind": "full", "heads": 4, "kv_heads": 2},
        "feedforward": SWIGLU,
    }
    model = Transformer(ModelConfig.from_dict(values | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
                if "norm" in name and name.endswith("weight"):
                    parameter[::9] *= 8
            elif "embedding" not in name:
                parameter.mul_(4)
    return model


def batches(count=2, rows=4, length=32):
    generator = torch.Generator().manual_seed(7)
    return [{"tokens": torch.randint(0, 96, (rows, length), generator=generator)} for _ in range(count)]


def logits(model, data):
    with torch.no_grad():
        return torch.cat([model(batch["tokens"]).logits for batch in data])


class ScaleAlone(LayerMethod):
    """The scales of AWQ without any rounding behind them."""

    def __init__(self, method):
        self.method, self.chosen, self.refused = method, {}, {}

    def statistic(self, name, module):
        return Magnitudes

    def compress(self, name, module, statistic):
        return None, LayerRecord.skip(name, module.weight.shape, "it is dense here")

    def compress_block(self, part):
        if part.module is not part.model:
            folds, chosen = scale_block(part, dict.fromkeys(part.linears, self.method))
            self.refused |= folds.refused
            self.chosen |= {name: found for fold, found in chosen for name in fold.consumers}
        return super().compress_block(part)


def scaled(model, method):
    alone = ScaleAlone(method)
    calibrate_sequentially(model, alone, batches())
    return alone


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scaled_without_rounding_it_is_the_same_model(name):
    model = build(**ARCHITECTURES[name]).double()
    before, weights = logits(model, batches()), copy.deepcopy(model.state_dict())
    alone = scaled(model, Awq(IntFormat(2, 16)))
    assert (logits(model, batches()) - before).abs().max() <= 1e-9 * before.abs().max()
    assert set(alone.chosen) | set(alone.refused) == {
        path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear) and ".router." not in path
    }
    assert any(found.alpha > 0 for found in alone.chosen.values())
    assert any(not torch.equal(weight, weights[path]) for path, weight in model.state_dict().items())


FOLDED = {
    "llama": {"q", "k", "v", "o", "gate", "up", "down"},
    "many heads": {"q", "k", "v", "o", "gate", "up", "down"},
    "gpt2": {"q", "k", "v", "o", "up"},
    "relu": {"q", "k", "v", "o", "up", "down"},
    "parallel": {"q", "k", "v", "o", "gate", "up", "down"},
    "sandwich": {"q", "k", "v", "o", "gate", "up", "down"},
    "post": {"o", "down"},
    "gemma": {"o", "down"},
    "values with positions": {"q", "k", "v", "gate", "up", "down"},
    "single heads": {"q", "k", "v", "gate", "up", "down"},
    "retention": {"q", "k", "v", "gate", "up", "down"},
    "convolution": {"v", "gate", "o", "up", "down"},
}
REASONS = {
    "gpt2": {"down": "the activation"},
    "post": {"q": "residual stream", "gate": "residual stream"},
    "values with positions": {"o": "between v and o"},
    "retention": {"o": "between v and o"},
    "gemma": dict.fromkeys(("q", "k", "v", "gate", "up"), "the norm before it is a OffsetRms"),
}


@pytest.mark.parametrize("name", FOLDED)
def test_scales_go_where_they_can_be_folded(name):
    alone = scaled(build(**ARCHITECTURES[name]), Awq(IntFormat(3, 16)))
    assert {path.rpartition(".")[2] for path in alone.chosen} == FOLDED[name]
    for path, reason in alone.refused.items():
        assert REASONS.get(name, {}).get(path.rpartition(".")[2], "") in reason


def test_the_search_is_never_worse_than_rounding_and_mostly_better():
    found = scaled(build(), Awq(IntFormat(3, 16))).chosen.values()
    assert all(min(one.losses) == one.losses[round(one.alpha * 20)] <= one.losses[0] for one in found)
    assert sum(min(one.losses) < 0.9 * one.losses[0] for one in found) > len(found) / 2


def test_alpha_zero_is_rounding():
    model = build()
    records = quantize_model(model, Awq(IntFormat(4, 16, False), steps=1, smallest=1.0), batches())
    rounded = build()
    quantize_model(rounded, Rtn(IntFormat(4, 16, False)))
    for path, value in model.state_dict().items():
        assert torch.equal(value, rounded.state_dict()[path]), path
    assert all(record.achieved["alpha"] == 0 for record in records if not record.skipped)


@pytest.mark.parametrize("group", [16, 24, "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_clipped_ranges_lose_less_of_the_output(group, symmetric):
    torch.manual_seed(0)
    weight = torch.randn(24, 64)
    weight[:, 5] *= 6
    x = torch.randn(200, 64) @ torch.randn(64, 64) * torch.linspace(0.1, 2, 64)
    x[:, 5] *= 0.01  # what is large in the weight hardly matters
    hessian, form = x.T @ x / len(x), IntFormat(3, group, symmetric)
    plain = quantize(weight, form).dequantize()
    short = on_grids(weight, clipped(weight, hessian, form, 20, 0.5), form).dequantize()
    errors = [((weight - dense) @ hessian * (weight - dense)).sum(1) for dense in (plain, short)]
    if group != "tensor":
        assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert errors[1].sum() < 0.8 * errors[0].sum()
    assert output_error(weight, short, hessian) < output_error(weight, plain, hessian)


@pytest.mark.parametrize(
    "method", [Awq(IntFormat(3, 16, False)), Awq(IntFormat(3, 16), solve="gptq")], ids=["rtn", "gptq"]
)
def test_resumed_it_gives_the_same_bits(method, tmp_path):
    whole, again = build(depth=3), build(depth=3)
    records = quantize_model(whole, method, batches())
    store = FolderStore(tmp_path)

    def stop(step):
        if step.index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(build(depth=3), method, batches(), store=store, progress=stop)
    resumed = quantize_model(again, method, batches(), store=store)
    for path, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[path]), path
    assert [record.name for record in records] == [record.name for record in resumed]
    assert [record.achieved.get("alpha") for record in records] == [record.achieved.get("alpha") for record in resumed]


def test_maps_with_bits_of_their_own_are_scaled_with_the_rest():
    model, plain = build(), build()
    method, wide = Awq(IntFormat(3, 16, False)), Awq(IntFormat(8, "channel", False))
    before = logits(model, batches())
    records = {r.name: r for r in quantize_model(model, method, batches(), overrides={"*.v": wide, "*.down": wide})}
    quantize_model(plain, method, batches())
    assert records["blocks.0.attention.v"].requested["bits"] == 8
    assert records["blocks.0.attention.q"].achieved["alpha"] == records["blocks.0.attention.v"].achieved["alpha"]
    assert records["blocks.0.feedforward.down"].achieved["scales_in"] == "up"
    assert (logits(model, batches()) - before).norm() < (logits(plain, batches()) - before).norm()


def test_beside_another_method_what_it_shares_is_not_scaled():
    overrides = {"*.k": Gptq(IntFormat(4, 16)), "*.up": None}
    records = {r.name: r for r in quantize_model(build(), Awq(IntFormat(4, 16)), batches(), overrides=overrides)}
    assert "blocks.0.attention.k, which reads the same input" in records["blocks.0.attention.q"].note
    assert "blocks.1.feedforward.up, which would carry it" in records["blocks.1.feedforward.down"].note
    assert records["blocks.0.attention.o"].achieved["scales_in"] == "v"
    assert records["blocks.0.feedforward.up"].skipped


def test_on_few_tokens_and_dead_channels():
    model = build()
    with torch.no_grad():
        model.blocks[0].attention_norm.weight[3] = 0
    records = quantize_model(model, Awq(IntFormat(4, 16)), [{"tokens": torch.arange(5)[None]}])
    assert all(record.error is not None and record.error < 0.2 for record in records if not record.skipped)
    assert logits(model, batches()).isfinite().all()


def test_in_bfloat16_it_runs_and_is_close():
    model = build()
    before = logits(model, batches())
    records = quantize_model(model.bfloat16(), Awq(IntFormat(8, 16)), batches())
    assert sum("scales_in" in record.achieved for record in records) == 2 * 7
    assert (logits(model, batches()) - before).norm() < 0.1 * before.norm()


@pytest.mark.parametrize("symmetric", [True, False])
def test_each_group_has_the_best_of_all_ranges_tried(symmetric):
    """The full one, then steps of a fifth down to the smallest share, that one included."""
    form = IntFormat(2, 16, symmetric, "float32")
    generator = torch.Generator().manual_seed(0)
    weight, energy = torch.randn(200, 48, generator=generator), torch.rand(48, generator=generator) + 0.1
    weight[:, ::16] *= torch.linspace(0.5, 8, 200)[:, None]  # one in each group that stands out and matters little
    energy[::16] *= 0.1
    hessian = torch.diag(energy)  # of inputs that do not meet: a row is the sum of its groups
    peak = weight.view(200, 3, 16).abs().amax(-1, keepdim=True)

    def lost(grids):
        dense = on_grids(weight, grids, form).dequantize()
        return ((dense - weight).square() * energy).view(200, 3, 16).sum(-1)  # (N, G)

    ranges = [weight.view(200, 3, 16).clamp(-share * peak, share * peak) for share in (1.0, 0.8, 0.6, 0.4)]
    least, best = torch.stack([lost(fit_matrix(one.view(200, 48), form)) for one in ranges]).min(0)
    assert len(best.unique()) == 4  # each of them is the best for some
    torch.testing.assert_close(lost(clipped(weight, hessian, form, 5, 0.4)), least)


@pytest.mark.parametrize("child", ["q", "k", "qk", "q_global", "k_global", "v", "o", "up"])
def test_queries_and_keys_alone_keep_their_ranges(child):
    torch.manual_seed(0)
    module, statistic = torch.nn.Linear(32, 16, bias=False), Magnitudes(32, torch.device("cpu"))
    form = IntFormat(2, 16)
    statistic.update(torch.randn(100, 32))
    new, _ = Awq(form)._rounded(f"blocks.0.attention.{child}", module, statistic, None, {})
    whole = quantize(module.weight.detach(), form).dequantize()
    assert torch.equal(new.dequantize(), whole) == (child in ("q", "k", "qk", "q_global", "k_global"))


def test_the_batches_of_the_search_are_spread_over_all():
    rows = [torch.zeros(1, 512, 4)] * 20  # 10,240 tokens, of which 8 batches are the 4096 of the search
    assert _some(rows) == [0, 2, 5, 7, 10, 12, 15, 17]
    assert _some(rows[:8]) == list(range(8))
    assert _some(rows[:3]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("values", "words"),
    [({"steps": 0}, "steps"), ({"smallest": 0.0}, "smallest"), ({"solve": "rnt"}, "did you mean 'rtn'")],
)
def test_numbers_that_cannot_be(values, words):
    with pytest.raises(UserError, match=words):
        METHODS.parse({"kind": "awq", **values}, "method")


@pytest.fixture(scope="module")
def rounded(trained):
    return pooled(trained, Rtn(IntFormat(3, 64, False)), [None])


def pooled(trained, method, draws):
    """On both held-out splits, the mean over several draws of the calibration text."""
    models = [copy.deepcopy(trained.model) for _ in draws]
    for model, data in zip(models, draws, strict=True):
        quantize_model(model, method, data)
    return trained.pooled(models)


def test_awq_is_better_than_round_to_nearest_at_three_bits(trained, rounded):
    """On two draws of the calibration text together: the whole paired interval lies below zero."""
    draws = [trained.calibration[:2], trained.calibration[2:]]
    assert paired(rounded, pooled(trained, Awq(IntFormat(3, 64, False)), draws)).high < 0


@pytest.mark.parametrize("draw", range(4))
def test_awq_is_better_than_round_to_nearest_on_each_draw(trained, rounded, draw):
    awq = pooled(trained, Awq(IntFormat(3, 64, False)), [[trained.calibration[draw]]])
    assert paired(rounded, awq).high < 0


def test_gptq_behind_awq_is_better_still(trained):
    awq = pooled(trained, Awq(IntFormat(3, 64, False)), [trained.calibration])
    both = pooled(trained, Awq(IntFormat(3, 64, False), solve="gptq", smallest=1.0), [trained.calibration])
    assert paired(awq, both).high < 0
