"""GPTQ's seconds per million weights, and the packed layers against dense bf16 ones.

GPTQ: the whole of `quantize_model` (Hessians, solves, packing, feeding forward) over every linear map of the blocks.
Kernels: one 4096 x 4096 layer. A packed layer runs through the kernel that its own table picks for that batch; the case
says which.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from compress.quantization.affine import IntFormat
from compress.quantization.kernels.dispatch import kernel_for
from compress.quantization.methods.gptq import Gptq
from compress.quantization.methods.rtn import Rtn
from compress.quantization.plan import quantize_model
from models.transformer import Transformer
from tests.benchmarks.shapes import Shape
from tests.benchmarks.timing import Row, rate_row, take_turns, time_row

NAME = "gptq"
KERNELS = "kernels"
FORMATS = {
    "4 bits, channel": IntFormat(4, "channel"),
    "4 bits, groups of 128": IntFormat(4, 128),
    "3 bits, channel": IntFormat(3, "channel"),
}
LAYERS = {"int4, groups of 128": IntFormat(4, 128), "int8, channel": IntFormat(8, "channel")}


@dataclass(frozen=True)
class Quantizing:
    """Settings: `samples` x `length` calibration tokens; kernels on a `size` x `size` layer."""

    shape: Shape = field(default_factory=Shape)
    samples: int = 128
    length: int = 256
    size: int = 4096
    batches: tuple[int, ...] = (1, 8, 64)
    rounds: int = 5
    kernel_rounds: int = 15
    repeats: int = 10


def run(settings: Quantizing | None = None) -> list[Row]:
    """Rows of both parts."""
    settings = settings or Quantizing()
    return [*gptq_rows(settings), *kernel_rows(settings)]


def gptq_rows(settings: Quantizing) -> list[Row]:
    """Seconds per million quantized weights."""
    model = settings.shape.core().eval()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(settings.shape.vocabulary, (settings.samples, settings.length), generator=generator)
    batches = [{"tokens": rows} for rows in tokens.split(16)]
    weights = sum(module.weight.numel() for module in model.blocks.modules() if isinstance(module, nn.Linear))
    cases = {label: functools.partial(_quantize, model, Gptq(format), batches) for label, format in FORMATS.items()} | {
        "round to nearest, 4 bits, channel": functools.partial(_quantize, model, Rtn(FORMATS["4 bits, channel"]), None)
    }
    seconds = take_turns(NAME, cases, rounds=settings.rounds, warmup=1)
    note = (
        f"{settings.samples} x {settings.length} calibration tokens, {weights / 1e6:.2f}M weights in the blocks, "
        f"{settings.shape}"
    )
    return [time_row(NAME, case, seconds, weights / 1e6, "s per 1M weights", note=note) for case in cases]


def _quantize(model: Transformer, method: Gptq | Rtn, batches: list | None) -> None:
    quantize_model(copy.deepcopy(model), method, batches)


@torch.no_grad()
def kernel_rows(settings: Quantizing) -> list[Row]:
    """Rows of x per second through a packed layer, against a dense bf16 `nn.Linear` of the same shape."""
    torch.manual_seed(0)
    dense = nn.Linear(settings.size, settings.size, bias=False)
    packed = {label: Rtn(format).compress(label, dense, None)[0] for label, format in LAYERS.items()}
    dense.to(torch.bfloat16)
    rows = []
    for batch in settings.batches:
        x = torch.randn(batch, settings.size, dtype=torch.bfloat16)
        peer = f"dense bf16, batch {batch}"
        cases: dict[str, Callable[[], None]] = {peer: _repeat(dense, x, settings.repeats)}
        for label, layer in packed.items():
            name = kernel_for(layer, "cpu", batch).name
            cases[f"{label}, batch {batch} ({name})"] = _repeat(layer, x, settings.repeats)
        seconds = take_turns(KERNELS, cases, rounds=settings.kernel_rounds)
        work = settings.repeats * batch
        note = f"one {settings.size} x {settings.size} layer, {settings.repeats} calls a round, x in bf16"
        for case in cases:
            against = "" if case == peer else peer
            rows.append(rate_row(KERNELS, case, seconds, work, "rows/s", peer=against, note=note))
    return rows


def _repeat(layer: nn.Module, x: torch.Tensor, repeats: int) -> Callable[[], None]:
    def call() -> None:
        for _ in range(repeats):
            layer(x)

    return call
