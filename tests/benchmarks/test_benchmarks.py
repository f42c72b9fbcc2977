"""The benchmarks run, and time equal work: on shapes so small that the figures mean nothing."""

import functools

import pytest
import torch

pytest.importorskip("transformers")

from tests.benchmarks import (
    bench_attention,
    bench_attention_peers,
    bench_decode,
    bench_experts,
    bench_gptq,
    bench_lightning,
    bench_projection,
    bench_training,
)
from tests.benchmarks.shapes import Shape
from tests.benchmarks.timing import Row, fastest, rate_row, table, take_turns

TINY = Shape(layers=1, width=32, heads=2, kv_heads=2, feedforward=48, vocabulary=64, context=32)


def test_training_covers_both_precisions():
    rows = bench_training.run(bench_training.Training(TINY, rows=2, length=16, rounds=1, compiled=False))
    assert {row.case for row in rows if row.ratio} == {"core, bf16", "core, fp32"}
    assert all(row.value > 0 for row in rows)
    assert "core, bf16" in table(rows)


def test_both_models_start_with_the_same_loss_on_the_same_weights():
    core, peer = bench_decode.both(TINY, torch.float32)
    tokens = torch.randint(TINY.vocabulary, (2, 17))
    mine = core(tokens[:, :-1], targets=tokens[:, 1:]).loss
    theirs = peer(input_ids=tokens, labels=tokens).loss
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_both_decoders_produce_the_same_tokens():
    core, peer = bench_decode.both(TINY, torch.float32)
    prompts = torch.randint(1, TINY.vocabulary, (3, 5))
    assert bench_decode.ours(core, prompts, 8) == bench_decode.theirs(peer, prompts, 8)


def test_decoding_is_timed_for_each_batch_and_precision():
    packed = bench_decode.PackedDecoding(TINY, batches=((1, 3), (2, 3)), rounds=1)
    rows = bench_decode.run(bench_decode.Decoding(TINY, batches=(1, 2), prompt=4, new=3, rounds=1, packed=packed))
    assert sum(row.ratio is not None for row in rows if row.benchmark == "decode") == 4
    assert sum(row.ratio is not None for row in rows if row.benchmark == "packed") == 5 * len(bench_decode.FORMS) + 3
    assert all(row.value > 0 for row in rows)


def test_a_mixture_meets_its_equals():
    shape = bench_experts.Mixture(layers=1, width=32, heads=2, kv_heads=2, feedforward=48, vocabulary=64, context=32)
    core, plain, peer = shape.core(), bench_experts.dense(shape).core(), shape.transformers()
    assert core.flops_per_token(16) == plain.flops_per_token(16) + 2 * 32 * shape.count
    assert core.count_parameters()["total"] == sum(parameter.numel() for parameter in peer.parameters())
    settings = bench_experts.Settings(
        shape, rows=2, length=16, rounds=1, compiled=False, batches=(2,), prompt=4, new=3, decode_rounds=1
    )
    rows = bench_experts.run(settings)
    assert all(row.value > 0 for row in rows)
    assert {row.peer.partition(",")[0] for row in rows} == {"", "dense core", "transformers"}


def test_trainer_and_bare_loop_are_timed():
    settings = bench_lightning.Overhead(TINY, rows=2, length=16, steps=2, rounds=1, compiled=False)
    rows = bench_lightning.run(settings)
    assert [row.ratio is not None for row in rows] == [False, True, True]


def test_gptq_and_kernels_are_timed():
    rows = bench_gptq.run(
        bench_gptq.Quantizing(TINY, samples=4, length=16, size=64, batches=(1,), rounds=1, kernel_rounds=1, repeats=1)
    )
    assert {row.benchmark for row in rows} == {"gptq", "kernels"}


def test_attention_is_measured_over_the_length():
    lengths = bench_attention.Lengths(
        (16, 32, 64), quadratic_to=32, peer_to=32, heads=2, width=8, rounds=1, decoded=2, cached=(300,)
    )
    rows = {row.case: row for row in bench_attention.run(lengths)}
    assert "full, 64 tokens" not in rows
    assert rows["window 256, 32 tokens"].ratio is not None
    assert rows["window 256, cache at 300 tokens"].value < rows["full, cache at 300 tokens"].value
    for name, mechanism in bench_attention.MECHANISMS.items():
        assert f"{name}, exponent of memory" in rows
        assert mechanism.bidirectional or rows[f"{name}, decoding after 300 tokens"].value > 0
    assert "| window 256 | " in bench_attention.grid(list(rows.values()), lengths)


def test_in_the_grid_the_peer_alone_stands_for_one():
    row = functools.partial(Row, bench_attention.NAME, value=9.0, low=9.0, high=9.0, unit="tokens/s")
    rows = [row("full, 2048 tokens"), row("full, tiled in PyTorch, 2048 tokens", ratio=0.46)]
    rows.append(row("window 256, 2048 tokens"))
    lines = bench_attention.grid(rows, bench_attention.Lengths((2048,))).splitlines()
    shown = {line.split(" | ")[0].strip("| "): line.split(" | ")[1] for line in lines if "---" not in line}
    assert shown["full"] == "1"
    assert shown["full, tiled in PyTorch"] == "0.46x"
    assert shown["window 256"] == "9 tokens/s"


def test_each_mechanism_meets_its_peer():
    settings = bench_attention_peers.Peers(tokens=1024, width=16, heads=2, rounds=1)
    rows = bench_attention_peers.run(settings)
    assert len(rows) == len(bench_attention_peers.PAIRS)
    assert all(row.value > 0 and row.ratio for row in rows)


def test_the_loss_meets_that_of_torch():
    rows = bench_projection.run(bench_projection.Projections(((24, 8, 40),), rounds=1))
    distances = {row.case: row.value for row in rows if row.unit == "relative distance"}
    assert all(value < (1e-5 if "fp32" in case else 0.03) for case, value in distances.items())


def test_the_exponent_is_the_slope_of_the_logarithms():
    assert bench_attention.exponent({size: 3 * size**2 for size in (1, 10, 20, 40)}) == pytest.approx(2)


def test_peak_memory_is_that_of_one_moment():
    def step():
        for _ in range(3):
            torch.empty(1000, dtype=torch.uint8)

    assert 1000 <= bench_attention.peak(step) < 2000


def test_cases_take_turns_in_both_orders():
    order = []
    cases = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = take_turns("test", cases, rounds=2, warmup=1)
    assert "".join(order) == "ab" + "ab" + "ba"
    assert [len(times) for times in seconds.values()] == [2, 2]


def test_rate_and_ratio():
    seconds = {"slow": [4.0] * 7, "quick": [2.0] * 7}
    row = rate_row("test", "quick", seconds, 8, "tokens/s", peer=fastest(seconds, ["slow"]))
    assert (row.value, row.ratio, row.ratio_low, row.ratio_high) == (4.0, 2.0, 2.0, 2.0)
