"""8-bit floats: the stored weights, the kernel against the product of what its codes stand for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress.quantization.kernels.dispatch import choose, kernel_for
from compress.quantization.kernels.fp8 import FP8, Fp8Format, ScaledMm, quantize_rows
from compress.quantization.methods.fp8 import Fp8, Fp8Linear
from models.errors import UserError

SHAPES = [(64, 128), (48, 100), (300, 32)]


def relative(y, expected):
    return float(((y.float() - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("activations", ["dynamic", "none"])
def test_a_layer_is_what_it_stores(activations):
    for rows, width in SHAPES:
        module = nn.Linear(width, rows)
        packed = Fp8(activations).compress("layer", module, None)[0]
        weight, x = packed.dequantize(), torch.randn(2, 3, width)
        scale = module.weight.detach().abs().amax(1, keepdim=True) / 448
        assert torch.equal(weight, (module.weight.detach() / scale).to(FP8).float() * scale)
        heard = quantize_rows(x.view(6, width)).dequantize().view_as(x) if activations == "dynamic" else x
        with torch.no_grad():
            assert torch.equal(packed(x), F.linear(heard, weight) + module.bias)
            x = x.bfloat16()
            heard = quantize_rows(x.view(6, width)).dequantize().view_as(x) if activations == "dynamic" else x.float()
            assert relative(packed(x), F.linear(heard, weight, module.bias)) < 0.006
        with torch.device("meta"):
            again = Fp8Linear.empty(module, packed.spec())
        again.load_state_dict(packed.state_dict(), assign=True)
        assert torch.equal(again(x), packed(x))
        packed.to(torch.bfloat16)
        assert packed.codes.dtype == FP8
        assert torch.equal(packed.dequantize(), weight)


def test_the_kernel_is_the_product_of_what_the_codes_stand_for():
    """The operator runs on the CPU too, slowly: the reference of its arguments."""
    for rows, width in ((64, 128), (48, 96)):
        x, weight = quantize_rows(torch.randn(5, width).bfloat16()), quantize_rows(torch.randn(rows, width))
        y = ScaledMm().multiply(x, weight, torch.bfloat16)
        assert y.dtype == torch.bfloat16
        assert relative(y, x.dequantize() @ weight.dequantize().T) < 0.004


def test_rounding_is_within_the_mantissa():
    values = torch.randn(16, 512)
    rounded = quantize_rows(values).dequantize()
    large = values.abs() > values.abs().amax(1, keepdim=True) * 2**-14  # what is not below its normal numbers
    assert ((rounded - values).abs() <= values.abs() / 16 * (1 + 1e-6))[large].all()
    assert torch.equal(quantize_rows(torch.zeros(2, 4)).dequantize(), torch.zeros(2, 4))
    assert quantize_rows(torch.full((1, 4), torch.nan)).dequantize().isnan().all()


def test_memory_is_the_true_bits():
    packed = Fp8().compress("layer", nn.Linear(512, 256, bias=False), None)[0]
    assert packed.memory_bytes() == packed.stored_bytes() == 256 * 512 + 256 * 4
    assert packed.memory_bytes() == sum(tensor.nbytes for tensor in packed.state_dict().values())


def test_the_table_and_bad_input():
    packed = Fp8().compress("layer", nn.Linear(128, 64), None)[0]
    assert kernel_for(packed).name == "dequantize, then matmul"
    assert kernel_for(packed).reason == "no packed kernel on cpu"
    if not torch.cuda.is_available():
        assert choose(Fp8Format(), (64, 128), "cuda", 1).name == "aten::_scaled_mm"
        assert "multiples of 16" in choose(Fp8Format(), (64, 100), "cuda", 1).reason
    assert "activations" in choose(Fp8Format("none"), (64, 128), "cuda", 1).reason
    with pytest.raises(UserError, match="dynamic or none, got 'static'"):
        Fp8("static")
    with pytest.raises(UserError, match="unknown key 'bits'"):
        Fp8Linear.empty(nn.Linear(4, 4), {"bits": 8})
    module = nn.Linear(4, 4)
    module.weight.data[0] = torch.nan
    with pytest.raises(UserError, match="the weight of head holds NaN"):
        Fp8().compress("head", module, None)
