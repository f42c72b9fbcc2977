"""The loss from hidden states and the vocabulary against `torch.nn.functional.linear_cross_entropy` (torch 2.13).

Forward and backward with a gradient for both inputs: seconds, peak bytes, and how far loss and gradients are from fp64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.projection import linear_cross_entropy, reference_linear_cross_entropy
from tests.benchmarks.bench_attention import peak
from tests.benchmarks.timing import Row, say, take_turns, time_row

NAME = "projection"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Mean = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Projections:
    """Settings: (tokens, width, vocabulary) of each case."""

    sizes: tuple[tuple[int, int, int], ...] = ((2048, 256, 4096), (512, 256, 32768))
    rounds: int = 5


def run(settings: Projections | None = None) -> list[Row]:
    """For each size and dtype: milliseconds of each contestant, ours against torch's in chunks; MiB; distances."""
    settings = settings or Projections()
    if not hasattr(F, "linear_cross_entropy"):
        say(f"{NAME}: this torch has no torch.nn.functional.linear_cross_entropy; left out")
        return []
    rows = []
    for size in settings.sizes:
        for label, dtype in DTYPES.items():
            rows += _compare(settings, size, label, dtype)
    return rows


def _compare(settings: Projections, size: tuple[int, int, int], label: str, dtype: torch.dtype) -> list[Row]:
    tokens, width, vocabulary = size
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = (0.1 * torch.randn(vocabulary, width, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    options = nn.LinearCrossEntropyOptions()
    contestants: dict[str, Mean] = {
        "torch, whole logits": F.linear_cross_entropy,
        "torch, chunks": partial(F.linear_cross_entropy, options=options),
        "core": lambda *given: linear_cross_entropy(*given)[0],
        "core, with z-loss": lambda *given: sum(linear_cross_entropy(*given, z_loss=True)),
    }
    suffix = f", {label}, {tokens} x {width} x {vocabulary}"
    cases = {name + suffix: partial(step, mean, hidden, weight, targets) for name, mean in contestants.items()}
    peer = "torch, chunks" + suffix
    seconds = take_turns(NAME, {case: partial(_run, one) for case, one in cases.items()}, rounds=settings.rounds)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    true = step(lambda *given: reference_linear_cross_entropy(*given)[0], *exact, targets)
    rows = []
    for case, run_case in cases.items():
        note = "forward and backward; tokens x width x vocabulary; distances are relative to fp64 on the same inputs"
        rows.append(time_row(NAME, case, seconds, 1e-3, "ms", peer="" if case == peer else peer, note=note))
        rows.append(_row(f"{case}, peak", peak(run_case) / 2**20, "MiB"))
        if "z-loss" not in case:
            for what, mine, wanted in zip(("loss", "dH", "dW"), run_case(), true, strict=True):
                distance = float((mine.double() - wanted).norm() / wanted.norm())
                rows.append(_row(f"{case}, {what}", distance, "relative distance"))
    return rows


def step(mean: Mean, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of hidden and weight."""
    loss = mean(hidden, weight, targets)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def _run(case: Callable[[], object]) -> None:
    case()


def _row(case: str, value: float, unit: str) -> Row:
    return Row(NAME, case, value, value, value, unit)
