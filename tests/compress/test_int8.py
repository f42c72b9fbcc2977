"""8-bit weights and inputs: the products of integers against exact sums, `bitsandbytes` and `torchao`."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress.quantization.kernels import int8 as int8_kernels
from compress.quantization.kernels.dispatch import kernel_for
from compress.quantization.kernels.int8 import Dynamic, IntMm, Outliers, Rows, quantize_rows
from compress.quantization.methods.int8 import Int8, Int8Linear
from models.errors import UserError

SHAPES = [(64, 128), (48, 100), (7, 33)]
KINDS = [Dynamic(), Outliers(2.0), Outliers(6.0)]


def layer(rows, width, activations, bias=True):
    module = nn.Linear(width, rows, bias=bias)
    return Int8(activations).compress("layer", module, None)[0], module


def spiked(rows, width):
    """Inputs of which a few columns are large."""
    x = torch.randn(rows, width)
    x[:, ::29] *= 20
    return x


def relative(y, expected):
    return float(((y.float() - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("activations", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_gives_the_exact_sums(activations, dtype):
    for rows, width in SHAPES:
        weight = quantize_rows(torch.randn(rows, width))
        for batch in (1, 5, 40):
            x = spiked(batch, width).to(dtype)
            codes = activations.split(x)[0].codes
            exact = int8_kernels.eager_product(codes, weight.codes)
            assert torch.equal(IntMm().product(codes, weight.codes), exact.int())
            assert torch.equal(IntMm(device="cuda").product(codes, weight.codes), exact.int())  # which pads few rows
            fast = int8_kernels.multiply(x, weight, activations, IntMm())
            assert fast.dtype == dtype
            eager = int8_kernels.multiply(x, weight, activations, None)
            assert relative(fast, eager.float()) < (1e-6 if dtype == torch.float32 else 0.004)


def test_outliers_stay_exact_and_save_what_rounding_loses():
    weight = torch.randn(64, 256)
    x = spiked(16, 256)
    exact = x @ quantize_rows(weight).dequantize().T
    errors = [relative(int8_kernels.multiply(x, quantize_rows(weight), kind, None), exact) for kind in KINDS[::2]]
    assert errors[1] < 0.3 * errors[0]
    only = torch.zeros(2, 256)
    only[:, 7] = 50.0
    assert torch.allclose(
        int8_kernels.multiply(only, quantize_rows(weight), Outliers(), None),
        only @ quantize_rows(weight).dequantize().T,
    )


def test_llm_int8_is_that_of_bitsandbytes():
    pytest.importorskip("bitsandbytes")
    for rows, width in SHAPES:
        weight, x = torch.randn(rows, width).half(), spiked(9, width).half()
        codes, absmax, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(weight.clone())
        ours = quantize_rows(weight)
        assert torch.equal(ours.codes, codes)
        assert torch.equal(ours.absmax, absmax)
        theirs = torch.ops.bitsandbytes.int8_vectorwise_dequant(codes, absmax)
        torch.testing.assert_close(ours.dequantize(), theirs, rtol=3e-7, atol=0)
        own = torch.ops.bitsandbytes.int8_vectorwise_quant(x.clone(), threshold=6.0)
        mine, columns = Outliers(6.0).split(x)
        assert torch.equal(mine.codes, own[0])
        assert torch.equal(mine.absmax, own[1])
        assert torch.equal(columns, own[2])
        expected, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(x, own[0], codes, own[1], absmax, own[2], None)
        y = int8_kernels.multiply(x, ours, Outliers(6.0), IntMm())
        torch.testing.assert_close(y, expected, rtol=2e-3, atol=0.02)  # one rounding to fp16: sums reach 16 to 32


def test_dynamic_products_are_those_of_torchao():
    """Its own rounding divides by 127.5, so the codes are ours on both sides."""
    intmm = pytest.importorskip("torchao.kernel.intmm")
    weight, x = quantize_rows(torch.randn(64, 128)), torch.randn(24, 128)
    rows, _ = Dynamic().split(x)
    theirs = intmm.int_scaled_matmul(rows.codes, weight.codes.t().contiguous(), rows.absmax[:, None] / 127)
    y = int8_kernels.multiply(x, weight, Dynamic(), IntMm())
    torch.testing.assert_close(y, theirs * weight.absmax / 127, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activations", KINDS, ids=str)
def test_a_layer_is_what_it_stores(activations):
    for rows, width in SHAPES:
        packed, module = layer(rows, width, activations)
        weight, bias = packed.dequantize(), module.bias
        assert torch.equal(weight, quantize_rows(module.weight.data).dequantize())
        x = spiked(6, width).bfloat16().view(2, 3, width)
        with torch.no_grad():
            y = packed(x)
        split, columns = activations.split(x.view(6, width))
        heard = split.dequantize()
        if columns is not None:
            heard[:, columns] = x.view(6, width)[:, columns].float()
        assert relative(y, F.linear(heard, weight, bias).view_as(y)) < 0.006
        with torch.device("meta"):
            again = Int8Linear.empty(module, packed.spec())
        again.load_state_dict(packed.state_dict(), assign=True)
        assert torch.equal(again(x), packed(x))
        packed.to(torch.bfloat16)
        assert packed.absmax.dtype == torch.float32
        assert torch.equal(packed.dequantize(), weight)


def test_gradients_pass_straight_through():
    packed, _ = layer(32, 64, Dynamic())
    x = torch.randn(3, 64, requires_grad=True)
    y = packed(x)
    assert torch.equal(y, packed(x.detach()))
    y.sum().backward()
    torch.testing.assert_close(x.grad, packed.dequantize().sum(0).expand(3, 64))


def test_rows_of_zeros_and_nan_and_no_rows():
    packed, _ = layer(8, 16, Outliers(), bias=False)
    assert torch.equal(packed(torch.zeros(2, 16)), torch.zeros(2, 8))
    assert packed(torch.full((1, 16), torch.nan)).isnan().all()
    assert packed(torch.zeros(0, 16)).shape == (0, 8)
    assert torch.equal(Rows(*quantize_rows(torch.zeros(2, 3))).dequantize(), torch.zeros(2, 3))


def test_memory_is_the_true_bits():
    packed, _ = layer(256, 512, Dynamic(), bias=False)
    assert packed.memory_bytes() == packed.stored_bytes() == 256 * 512 + 256 * 4
    assert packed.memory_bytes() <= 1.05 * 256 * 512
    assert packed.memory_bytes() == sum(tensor.nbytes for tensor in packed.state_dict().values())


def test_the_table_and_bad_input():
    packed, _ = layer(64, 128, Dynamic())
    assert kernel_for(packed, "cpu", 4096).name == "aten::_int_mm"
    assert kernel_for(packed, "mps").name == "integers as fp64, then matmul"
    assert kernel_for(packed, "mps").reason == "no packed kernel on mps"
    with pytest.raises(UserError, match="threshold must be above 0"):
        Outliers(0.0)
    with pytest.raises(UserError, match="unknown rounding of activations 'static'"):
        Int8Linear.empty(nn.Linear(4, 4), {"activations": {"kind": "static"}})
    with pytest.raises(UserError, match="unknown key 'bits'"):
        Int8Linear.empty(nn.Linear(4, 4), {"bits": 8})
    module = nn.Linear(4, 4)
    module.weight.data[0] = torch.inf
    with pytest.raises(UserError, match="the weight of head holds NaN"):
        Int8().compress("head", module, None)
