"""Grids and storage: the right points, the nearest of them, and every bit of them back."""

import pytest
import torch

from compress.quantization.affine import BITS, IntFormat, MseClip, dequantize, fit, quantize
from compress.quantization.formats.bit_packing import pack, packed_bytes, unpack
from models.errors import UserError


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [1, 7, 8, 31, 64, 100])
def test_pack_round_trip_at_true_size(bits, width):
    codes = torch.randint(0, 2**bits, (5, width)).to(torch.uint8)
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, width), codes)
    assert packed.shape == (5, packed_bytes(width, bits))
    assert packed.numel() * 8 <= 5 * (width + 7) * bits  # never more than one word of padding a row


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_bytes_are_the_words_of_compressed_tensors(bits):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(0, 2**bits, (6, 64)).to(torch.uint8)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack(codes, bits).view(torch.int32), helpers.pack_to_int32(signed, bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", ["tensor", "channel", 16, 24])
def test_symmetric_matches_the_formula_written_out(bits, group):
    weight = torch.randn(6, 96)
    result = quantize(weight, IntFormat(bits, group, scale_dtype="float32")).dequantize()
    size = {"tensor": None, "channel": 96}.get(group, group)
    rows = [weight.flatten()] if size is None else [part for row in weight for part in row.split(size)]
    expected = []
    for values in rows:
        scale = values.abs().max() / ((2**bits - 1) / 2)
        expected.append((values / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale)
    assert torch.equal(result, torch.cat(expected).view(6, 96))


@pytest.mark.parametrize("bits", BITS)
def test_affine_matches_the_formula_written_out(bits):
    weight = torch.randn(8, 32).abs() + 3  # min <= 0 <= max has to be forced
    weight[4:] *= -1
    weight[0, :16] -= 5
    result = quantize(weight, IntFormat(bits, 16, symmetric=False, scale_dtype="float32")).dequantize()
    for got, values in zip(result.view(-1, 16), weight.view(-1, 16), strict=True):
        low, high = min(0, values.min()), max(0, values.max())
        scale = (high - low) / (2**bits - 1)
        zero = (-low / scale).round()
        assert torch.equal(got, ((values / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero) * scale)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_clipped_range_is_the_best_of_those_tried(symmetric):
    """Both ends shrink together, from the full range down to the smallest share, that one included."""
    clip, form = MseClip(steps=4, smallest=0.6), IntFormat(2, 32, symmetric, "float32")
    assert clip.shares() == pytest.approx([0.9, 0.8, 0.7, 0.6])
    values = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    values[:, 0] *= torch.linspace(-8, 8, 400)  # one that stands out, on either side
    low, high = values.amin(1).clamp(max=0), values.amax(1).clamp(min=0)

    def lost(scale, zero):
        codes = ((values / scale[:, None]).round() + zero[:, None]).clamp(0, 3)
        return ((codes - zero[:, None]) * scale[:, None] - values).square().sum(1)  # (400,)

    tried = []
    for share in (1, 0.9, 0.8, 0.7, 0.6):
        scale = share * (torch.maximum(-low, high) / 1.5 if symmetric else (high - low) / 3)
        tried.append(lost(scale, torch.full_like(scale, 2) if symmetric else (-share * low / scale).round()))
    least, best = torch.stack(tried).min(0)
    assert len(best.unique()) == 5  # each of them is the best for some
    torch.testing.assert_close(lost(*fit(values, form, clip)), least)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_parity_with_compressed_tensors(bits, symmetric):
    """Their scales, their fake quantization: the same weights from the same bits."""
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    utils = pytest.importorskip("compressed_tensors.quantization.utils")
    args = pytest.importorskip("compressed_tensors.quantization").QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy="channel"
    )
    weight = torch.randn(16, 64)
    scale, zero = utils.calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), args)
    expected = forward.fake_quantize(weight, scale, zero, args)
    ours = quantize(weight, IntFormat(bits, "channel", symmetric, scale_dtype="float32")).dequantize()
    assert torch.allclose(ours, expected, rtol=0, atol=1e-6)


def test_rounds_half_to_even():
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 7.5]])
    quantized = quantize(weight, IntFormat(4, "channel", scale_dtype="float32"))
    assert quantized.scales.item() == 1
    assert (quantized.codes.int() - 8).tolist() == [[0, 2, 2, 0, -2, 7]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_zero_is_on_every_grid(symmetric, dtype):
    weight = torch.randn(32, 96) + 1
    weight[torch.rand(32, 96) < 0.5] = 0
    weight[3] = 0
    for bits in BITS:
        dense = quantize(weight, IntFormat(bits, 32, symmetric, dtype), MseClip()).dequantize()
        assert (dense[weight == 0] == 0).all()
        assert dense.isfinite().all()


def test_what_pads_the_last_group_changes_nothing():
    """70 columns in groups of 32: the last 6 get the grid that they would have alone."""
    weight = torch.randn(4, 70) + 2
    for clip in (None, MseClip()):
        for symmetric in (True, False):
            whole = quantize(weight, IntFormat(3, 32, symmetric), clip)
            tail = quantize(weight[:, 64:], IntFormat(3, "channel", symmetric), clip)
            assert whole.scales.shape == (4, 3)
            assert torch.equal(whole.dequantize()[:, 64:], tail.dequantize())


def test_clipping_search_lowers_the_squared_error():
    weight = torch.randn(64, 128)
    weight[:, 0] = 8  # one outlier stretches every range
    plain, clipped = (quantize(weight, IntFormat(3, "channel"), clip).dequantize() for clip in (None, MseClip()))
    errors = [(weight - dense).square().sum(1) for dense in (plain, clipped)]
    assert (errors[1] <= errors[0]).all()
    assert errors[1].sum() < 0.8 * errors[0].sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantizing_in_a_dtype_is_rounding_the_exact_weight_to_it(dtype):
    for bits in BITS:
        for symmetric in (True, False):
            for group in (16, 24, "channel", "tensor"):
                q = quantize(torch.randn(8, 48), IntFormat(bits, group, symmetric))
                assert torch.equal(dequantize(*q, dtype=dtype), q.dequantize().to(dtype))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"bits": 5}, "bits must be one of 2, 3, 4, 8, got 5"),
        ({"bits": True}, "bits must be"),
        ({"group_size": 0}, "at least 2"),
        ({"group_size": -1}, "channel"),
        ({"group_size": 6.4}, "at least 2"),
        ({"group_size": "chanel"}, "did you mean 'channel'"),
        ({"scale_dtype": "bf16"}, "did you mean 'bfloat16'"),
        ({"symmetric": "yes"}, "true or false"),
    ],
)
def test_impossible_formats_are_refused_in_a_sentence(arguments, words):
    with pytest.raises(UserError, match=words):
        IntFormat(**arguments)
