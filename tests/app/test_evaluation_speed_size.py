"""Sizes against what is on disk and in memory, and the timing protocol."""

import pytest
import torch
from evaluation_cases import QUICK, VOCABULARY, shifted, tiny
from torch import nn

from app.evaluation import speed as speed_module
from app.evaluation.size import layer_sizes, size_figures
from app.evaluation.speed import STANDARD, Round, SpeedProtocol, change_of_speed, measure_speeds
from compress.quantization.affine import IntFormat
from compress.quantization.methods.rtn import Rtn
from compress.quantization.plan import quantize_model
from models.checkpoint import load, save_model, writing
from models.config import ModelConfig
from models.transformer import Transformer


def test_a_dense_model_by_hand():
    model = tiny()
    total = sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        model.blocks[0].attention.q.weight[:4] = 0
    figures = size_figures(model)
    assert figures["parameters"] == figures["active_parameters"] == total
    assert figures["nonzero_parameters"] == total - 4 * 16
    assert figures["memory_bytes"] == figures["stored_bytes"] == 4 * total


def test_stored_bytes_are_what_the_file_system_says(tmp_path):
    model = tiny()
    with writing(tmp_path / "one") as folder:
        save_model(model, folder)
    with writing(tmp_path / "shards") as folder:
        save_model(model, folder, shard_bytes=4000)
    one, shards = tmp_path / "one", tmp_path / "shards"
    assert size_figures(model, one)["stored_bytes"] == (one / "model.safetensors").stat().st_size
    files = list(shards.glob("*.safetensors"))
    assert len(files) > 1
    assert size_figures(model, shards)["stored_bytes"] == sum(file.stat().st_size for file in files)


def packed(bits):
    model = tiny()
    quantize_model(model, Rtn(IntFormat(bits=bits, group_size=8)))
    return model


def test_a_packed_model_counts_the_weights_it_stands_for(tmp_path):
    dense, model = tiny(), packed(4)
    with writing(tmp_path / "packed") as folder:
        save_model(model, folder)
    model = load(tmp_path / "packed")
    figures, plain = size_figures(model, tmp_path / "packed"), size_figures(dense)
    assert figures["parameters"] == plain["parameters"]
    assert figures["stored_bytes"] < plain["stored_bytes"]
    assert figures["memory_bytes"] < plain["memory_bytes"]
    rows = {row.name: row for row in layer_sizes(model)}
    projection = rows["blocks.0.feedforward.gate"]
    assert projection.form == "packed_int"
    assert projection.shape == (24, 16)
    assert 4 < projection.bits < 9
    zeros = int((model.blocks[0].feedforward.gate.dequantize() == 0).sum())
    assert projection.sparsity == pytest.approx(zeros / (24 * 16))
    assert rows["embedding"].form == "float32"


def test_the_layer_table_covers_every_weight_once():
    model = tiny()
    rows = layer_sizes(model)
    assert sum(row.parameters for row in rows) == sum(parameter.numel() for parameter in model.parameters())
    assert sum(row.bytes for row in rows) == size_figures(model)["memory_bytes"]
    assert [row.name for row in rows if isinstance(model.get_submodule(row.name), nn.Linear)] == [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear)
    ]
    assert all(row.bits == 32 for row in rows)


def test_the_flops_of_the_layers_are_those_of_the_model_without_attention_scores():
    model = tiny()
    products = sum(row.flops for row in layer_sizes(model))
    with_scores = model.flops_per_token(10) - model.flops_per_token(0)
    assert products == model.flops_per_token(10) - with_scores


def test_the_map_of_distances_and_the_router_are_shown_as_they_are():
    depths = [{"kind": "mixture_of_depths"}]
    plain = {"vocab_size": VOCABULARY, "width": 16, "depth": 2, "feedforward": {"kind": "mlp", "width": 24}}
    heads = {"attention": {"kind": "full", "heads": 2, "head_width": 4}}
    model = Transformer(ModelConfig.from_dict(plain | heads | {"position": "transformer_xl"}))
    rows = {row.name: row for row in layer_sizes(model)}
    assert rows["positions.0"].shape == (8, 16)
    assert sum(row.flops for row in rows.values()) == model.flops_per_token(0)
    routed = Transformer(ModelConfig.from_dict(plain | heads | {"depths": depths}))
    router = {row.name: row for row in layer_sizes(routed)}["blocks.1.depth"]
    state = routed.blocks[1].depth.state_dict()
    assert len(state) > 1  # the threshold, too
    assert (router.parameters, router.flops) == (16, 32)
    assert router.bytes == 4 * sum(tensor.numel() for tensor in state.values())
    assert router.bits == 8 * router.bytes / router.parameters
    assert size_figures(routed)["memory_bytes"] == size_figures(routed)["stored_bytes"]


def test_models_take_turns_and_swap_the_order(monkeypatch):
    models = [tiny(), shifted(tiny(), 0.1)]
    order = []

    def record(protocol, model, prompt):
        order.append(models.index(model))
        return Round(0.01, (0.001,) * (protocol.new_tokens - 1))

    monkeypatch.setattr(speed_module.SpeedProtocol, "run", record)
    measure_speeds(models, [1, 2, 3], protocol=QUICK)
    timed = order[2 : 2 + 2 * QUICK.rounds]
    assert timed == [1, 0, 0, 1] * (QUICK.rounds // 2)
    assert order[:2] == [0, 1]  # the warm-up


def test_figures_come_from_the_rounds(monkeypatch):
    rounds = iter([Round(9.9, (9.9,) * 3)] + [Round(0.06, (0.001, 0.002, 0.003 + i / 1000)) for i in range(6)])
    monkeypatch.setattr(speed_module.SpeedProtocol, "run", lambda *_: next(rounds))
    monkeypatch.setattr(speed_module, "peak_rise", lambda *_: 1000)
    model = tiny()
    (figures,) = measure_speeds([model], list(range(1, 20)), protocol=QUICK)
    assert figures["prefill_tokens_per_second"] == pytest.approx(6 / 0.06)
    rates = [3 / (0.006 + i / 1000) for i in range(6)]
    assert figures["rounds"]["decode_tokens_per_second"] == pytest.approx(rates)
    assert figures["decode_tokens_per_second"] == pytest.approx((rates[2] + rates[3]) / 2)
    assert figures["first_token_ms"] == pytest.approx(60)
    assert figures["flops_per_token"] == model.flops_per_token(6 + 4)  # the prompt and what follows it
    assert figures["per_token_ms"]["p50"] == pytest.approx(2.0)
    assert figures["peak_memory_bytes"] == size_figures(model)["memory_bytes"] + 1000
    assert figures["flops_per_token"] == model.flops_per_token(10)
    (found,) = figures["kernels"]
    assert len(found.pop("layers")) == 15
    assert found == {"kernel": "aten::linear", "modules": 15, "reason": "dense weights", "largest_batch": None}


def test_real_rounds_give_every_figure():
    (figures,) = measure_speeds([tiny()], [1, 2, 3], protocol=QUICK)
    for name in (
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "first_token_ms",
        "flops_per_token",
        "threads",
    ):
        assert figures[name] > 0
    assert 0 < figures["per_token_ms"]["p50"] <= figures["per_token_ms"]["p95"]
    assert figures["peak_memory_bytes"] >= size_figures(tiny())["memory_bytes"]
    assert figures["device"].startswith("cpu")
    assert len(figures["rounds"]["decode_tokens_per_second"]) == QUICK.rounds


def speeds(rates):
    return {
        "rounds": dict.fromkeys(("prefill_tokens_per_second", "decode_tokens_per_second"), rates),
        "per_token_ms": {"p50": 1.0, "p95": 2.0},
        "first_token_ms": 3.0,
        "peak_memory_bytes": None,
        "flops_per_token": 10,
    }


def test_a_change_beyond_the_noise_and_one_within():
    steady, faster, wild = [100.0] * 10, [120.0 + i for i in range(10)], [60.0, 170.0] * 5
    change = change_of_speed(speeds(steady), speeds(faster))["decode_tokens_per_second"]
    assert change["beyond_noise"]
    assert change["ratio"] == pytest.approx(1.245)
    change = change_of_speed(speeds(steady), speeds(wild))["decode_tokens_per_second"]
    assert not change["beyond_noise"]
    assert change["interval"] == [0.6, 1.7]
    assert "peak_memory_bytes" not in change_of_speed(speeds(steady), speeds(wild))


@pytest.mark.parametrize("context", [2, 8, 100, 4096])
def test_the_protocol_fits_every_context(context):
    fitted = STANDARD.fitted(context)
    assert fitted.prompt_tokens >= 1
    assert fitted.new_tokens >= 2
    assert fitted.prompt_tokens + fitted.new_tokens <= max(context, 3)


def test_peak_memory_holds_the_cache_and_the_activations_of_the_prompt():
    """A lower bound that is known exactly: keys and values of every layer at full capacity; and no wild excess."""
    model = tiny(context=4096)
    cache = 2 * 2 * 8 * (1000 + 24) * 4  # layers, keys and values, width of one kv head, tokens, bytes
    rise = speed_module.peak_rise(model, [1] * 1000, SpeedProtocol(new_tokens=24))
    logits, scores = 4 * VOCABULARY, 4 * 2 * 1000 * 1024
    assert cache < rise < cache + 4 * scores + logits + 1000 * 16 * 4 * 50
    assert speed_module.peak_rise(model, [1] * 1000, SpeedProtocol(new_tokens=24)) == rise  # counted, not sampled
