"""Codewords tuned against the original: block-wise distillation of the outputs.

When a block is quantized, its indices stay and its codewords learn to give the outputs of the original block,

    min over codewords of E |f_q(x) - f(x)|^2,    x what the quantized blocks before it give on the calibration text

as AQLM does (arXiv 2401.06118, section 3.4), and as "And the Bit Goes Down" (arXiv 1907.05686, section 3.3) does with
the logits of the whole network. It is distillation of features, not of logits: so no more than one original block is
held beside the model, and a finished block never changes again, which lets an interrupted run go on where it stood.

The gradient of a codeword is that of all weights that it stands for. Adam divides by the gradient's own size, so their
sum and their mean, which those papers take, lead to the same steps.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibration.sequential import BlockStep, moved
from compress.quantization.formats.codebook import CODEWORD, Product, decode
from models.cpu.matmul import linear
from models.errors import UserError
from models.registry import Registry

TUNINGS = Registry("tuning")


@TUNINGS.register("blocks")
@dataclass(frozen=True)
class BlockTuning:
    """Adam on the codewords of a block.

    Args:
        steps: batches that are learned from, in turn.
        rate: learning rate at the first step, in root mean squares of the codebook; it falls to zero in a line.
    """

    steps: int = 100
    rate: float = 0.02

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps of the tuning is {self.steps}; it must be at least 1")
        if not self.rate > 0:
            raise UserError(f"rate of the tuning is {self.rate:g}; it must be above 0")


class Tuned(nn.Module):
    """A linear layer of codewords whose codebooks are parameters, in fp32."""

    def __init__(self, layer: Product) -> None:
        super().__init__()
        self.layer = layer
        self.index = layer.index(layer.codes)
        self.codebooks = nn.Parameter(layer.codebooks.float())

    def forward(self, x: Tensor) -> Tensor:
        weight = decode(self.index, self.codebooks, self.layer.format)  # (N, B v)
        y = linear(self.layer.arranged(x), weight.to(x.dtype))
        return y if self.layer.bias is None else y + self.layer.bias.to(y.dtype)


def tune_block(
    step: BlockStep, original: nn.Module, layers: dict[str, Product], chosen: BlockTuning
) -> tuple[float, float]:
    """Tune the codewords of the layers of a block in place; where the result is no better, they stay as they were.

    Args:
        step: a block, with its inputs.
        original: the block before it was quantized.
        layers: full name -> layer of codewords in the block.
        chosen: how.

    Returns:
        |f_q(x) - f(x)|^2 / |f(x) - x|^2 over the calibration text before and after.
    """
    device = next(original.parameters()).device
    batches = _Batches(step, device)
    before = _error(step.module, original, batches)
    found = {name: layer.codebooks for name, layer in layers.items()}
    with _tunable(step, layers) as tuned, torch.enable_grad():
        groups = [
            {"params": [one.codebooks], "lr": chosen.rate * float(one.codebooks.detach().square().mean().sqrt())}
            for one in tuned.values()
        ]
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / chosen.steps)
        for number in range(chosen.steps):
            x, context = batches[number % len(batches)]
            with torch.no_grad():
                wanted = original(x, context).y
            loss = _tokens(step.module(x, context).y - wanted, context).square().mean()
            gradients = torch.autograd.grad(loss, [one.codebooks for one in tuned.values()])
            for one, gradient in zip(tuned.values(), gradients, strict=True):
                one.codebooks.grad = gradient
            optimizer.step()
            schedule.step()
    for name, one in tuned.items():
        layers[name].codebooks = one.codebooks.detach().to(CODEWORD)
    after = _error(step.module, original, batches)
    if after < before:
        return before, after
    for name, codebooks in found.items():
        layers[name].codebooks = codebooks
    return before, before


class _Batches:
    """Inputs of the block, batch by batch, on the device that the block runs on."""

    def __init__(self, step: BlockStep, device: torch.device) -> None:
        self.step, self.device = step, device

    def __len__(self) -> int:
        return len(self.step.inputs)

    def __getitem__(self, i: int) -> tuple[Tensor, Any]:
        if i >= len(self):
            raise IndexError(i)
        return moved(self.step.inputs[i], self.device), moved(self.step.contexts[i], self.device)


def _error(block: nn.Module, original: nn.Module, batches: _Batches) -> float:
    lost = total = 0.0
    for x, context in batches:
        wanted = original(x, context).y
        lost += float(_tokens(block(x, context).y - wanted, context).square().sum())
        total += float(_tokens(wanted - x, context).square().sum())
    return lost / max(total, 1e-30)


def _tokens(x: Tensor, context: Any) -> Tensor:
    """Rows of x (B, T, D) that are no padding, in fp32: (N, D)."""
    if context.documents is None:
        return x.float().flatten(0, 1)
    return x.float()[(context.documents >= 0).expand(x.shape[:2])]


@contextmanager
def _tunable(step: BlockStep, layers: dict[str, Product]) -> Iterator[dict[str, Tuned]]:
    """The layers replaced by ones whose codebooks are parameters, for a while."""
    tuned = {name: Tuned(layer) for name, layer in layers.items()}
    try:
        for name, one in tuned.items():
            step.replace(name, one)
        yield tuned
    finally:
        for name, layer in layers.items():
            step.replace(name, layer)
