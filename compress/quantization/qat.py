"""Quantization-aware training: packed integers become weights that are rounded in every forward pass, and back.

A weight w of a group with scale s and zero z is used as

    v = (clamp(round(w / s) + z, 0, 2^b - 1) - z) s

whose gradient passes the rounding unchanged (straight-through estimator, arXiv 1308.3432): to w where the clamp does
not act, and to s as in LSQ (arXiv 1902.08153, eq. 3), with LSQ's factor 1 / sqrt(weights of the group x (2^b - 1)).
What is trained of a scale is its logarithm, relative to the start: a step of AdamW then changes scales of all sizes
alike, and none changes its sign. The scale is rounded to the dtype that it is stored in before it is used, and zeros
stay as they are. So what is packed in the end equals the weight of the last forward pass to the bit, and at the start v
is the packed weight that training begins with.

N rows, K columns, G groups a row.
"""

import time
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.calibration.records import LayerRecord
from compress.quantization.affine import IntFormat, Quantized, encode, spread, stored
from compress.quantization.formats.linear import PackedInt, PackedIntEmbedding, PackedIntLinear
from compress.quantization.formats.packed import Packed
from compress.quantization.methods.rtn import bits_per_weight
from models.errors import UserError
from models.inputs.tokens import TokenEmbedding
from models.linear import Linear
from models.transformer import Transformer
from models.weight_formats import described, form_of

ORIGINAL = "parametrizations.weight.original"  # where the weight that is trained lies in a module


class FakeQuantize(nn.Module):
    """A parametrization of a weight (N, K): the weight that its packed form would stand for.

    Attributes:
        shift: (N G,) or (1,), log of each scale over the one at the start; one-dimensional, so that nothing decays it.
    """

    def __init__(self, quantized: Quantized) -> None:
        super().__init__()
        self.format: IntFormat = quantized.format
        self.shift = nn.Parameter(torch.zeros(quantized.scales.numel()))
        self.register_buffer("start", quantized.scales.float())  # (N, G) or (1, 1)
        self.register_buffer("codes", quantized.codes)  # at the start: to count what has moved
        zeros = torch.full_like(self.start, 2.0 ** (self.format.bits - 1))
        self.register_buffer("zeros", zeros if quantized.zeros is None else quantized.zeros.float())

    def scales(self) -> Tensor:
        """Scales like `start`, in the values that are stored."""
        smallest = torch.finfo(self.format.dtype).tiny
        scales = (self.start * self.shift.exp().view_as(self.start)).clamp(min=smallest)
        return _Stored.apply(scales, self.format.dtype)

    def forward(self, weight: Tensor) -> Tensor:
        scales, width = self.scales(), weight.shape[1]
        factor = (weight.numel() / scales.numel() * self.format.top) ** -0.5
        scale, zero = (spread(one, width, self.format) for one in (scales, self.zeros))  # (N, K), or (N or 1, 1)
        return _Rounded.apply(weight, scale, zero, self.format, factor)

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> Quantized:
        """The codes and scales of a trained weight."""
        scales, width = self.scales(), weight.shape[1]
        scale, zero = (spread(one, width, self.format) for one in (scales, self.zeros))
        codes = encode(weight, scale, zero, self.format)
        return Quantized(*stored(codes, scales, self.zeros, self.format), self.format)


class _Stored(torch.autograd.Function):
    """Round to the dtype that a tensor is stored in, and pass the gradient on."""

    @staticmethod
    def forward(ctx, values, dtype):
        return values.to(dtype).to(values.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class _Rounded(torch.autograd.Function):
    """The nearest point of the grid; the gradient of the scale is multiplied by `factor`."""

    @staticmethod
    def forward(ctx, weight, scale, zero, format, factor):
        codes = encode(weight, scale, zero, format)  # (N, K)
        ctx.save_for_backward(weight, scale, zero, codes)
        ctx.top, ctx.factor = format.top, factor
        return (codes - zero) * scale

    @staticmethod
    def backward(ctx, gradient):
        weight, scale, zero, codes = ctx.saved_tensors
        steps = weight / scale  # (N, K)
        place = steps.round() + zero
        inside = (place >= 0) & (place <= ctx.top)
        slope = codes - zero - torch.where(inside, steps, 0.0)
        return gradient * inside, (gradient * slope).sum_to_size(scale.shape) * ctx.factor, None, None, None


def check_trainable(model: nn.Module) -> None:
    """Raise UserError for a layer that is stored packed other than as integers on a grid."""
    for name, module in model.named_modules():
        if isinstance(module, Packed) and not isinstance(module, PackedInt):
            raise UserError(
                f"{name} is stored as {form_of(module)}, and only integers (rtn, gptq, awq) can be trained as they are "
                "stored; distil before quantizing, or quantize with one of these"
            )


def unpack(model: Transformer) -> list[str]:
    """Put a fake-quantized layer in the place of every packed one, ready to be trained; returns their names."""
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedInt)}
    for name, module in packed.items():
        rows, width = module.shape
        if isinstance(module, PackedIntEmbedding):
            new: nn.Module = TokenEmbedding(rows, width, std=0.0)
        else:
            new = Linear(width, rows, bias=module.bias is not None, std=0.0)
            if module.bias is not None:
                new.bias.data = module.bias.clone()
        quantized = module.quantized()
        new.weight.data = module.dequantize()
        fake = FakeQuantize(Quantized(*(None if t is None else t.clone() for t in quantized[:3]), quantized.format))
        parametrize.register_parametrization(new, "weight", fake)
        model.set_submodule(name, new.to(module.scales.device), strict=True)
    model.config = replace(model.config, compression={})
    return list(packed)


@torch.no_grad()
def pack_again(model: Transformer) -> list[LayerRecord]:
    """The inverse of `unpack`, after training: a record for each layer, with the share of codes that have changed."""
    records = []
    for name, module in list(model.named_modules()):
        if not parametrize.is_parametrized(module, "weight"):
            continue
        started = time.perf_counter()
        (fake,) = module.parametrizations.weight
        quantized = fake.quantized(module.parametrizations.weight.original)
        kind = PackedIntEmbedding if isinstance(module, nn.Embedding) else PackedIntLinear
        new = kind.of(module, quantized)
        model.set_submodule(name, new, strict=True)
        moved = float((quantized.codes != fake.codes).float().mean())
        achieved = {"bits": bits_per_weight(new), "codes_changed": moved}
        asked = {"method": "quantization-aware training", **fake.format.to_dict()}
        records.append(LayerRecord(name, new.shape, asked, achieved, None, time.perf_counter() - started))
    model.config = replace(model.config, compression=described(model))
    return records
