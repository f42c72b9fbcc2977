"""Training tokens/s of the core against `transformers`' Llama of the same shape.

Everybody runs the same step on the same tokens: forward, backward, gradient norm clipped to 1, fused AdamW. The core
runs as `espalier fit` runs it: fp32 master weights, `call_in(compute dtype)`, blocks compiled in place, fused loss.
`transformers` runs eagerly and compiled as a whole; in bf16 with fp32 master weights under autocast, as its Trainer
does with `bf16=True`, and with the weights themselves in bf16 (no master weights, so less work than the others do).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from app.optim import AdamW
from app.tasks.compile import CompileBlocks
from app.tasks.gradients import scale_and_clip
from app.tasks.precision import call_in
from tests.benchmarks.shapes import Shape
from tests.benchmarks.timing import Row, fastest, rate_row, take_turns

NAME = "training"
LR, BETAS, WEIGHT_DECAY = 1e-3, (0.9, 0.95), 0.1


@dataclass(frozen=True)
class Training:
    """Settings: a batch of `rows` x `length` tokens."""

    shape: Shape = field(default_factory=Shape)
    rows: int = 16
    length: int = 256
    rounds: int = 11
    compiled: bool = True


def run(settings: Training | None = None) -> list[Row]:
    """Rows for bf16 and fp32: peers first, then the core against the best of them."""
    settings = settings or Training()
    generator = torch.Generator().manual_seed(1)
    stream = torch.randint(settings.shape.vocabulary, (settings.rows, settings.length + 1), generator=generator)
    tokens, targets = stream[:, :-1].contiguous(), stream[:, 1:].contiguous()  # (B, T) each
    cases: dict[str, Callable[[], None]] = {}
    peers: dict[str, list[str]] = {"bf16": [], "fp32": []}
    for compiled in (False, True) if settings.compiled else (False,):
        for label, precision in (("bf16", "autocast"), ("bf16", "weights in bf16"), ("fp32", "")):
            case = ", ".join(filter(None, ("transformers", "compiled" if compiled else "eager", label, precision)))
            cases[case] = transformers_step(settings.shape, tokens, targets, label, precision, compiled)
            peers[label].append(case)
    for label in peers:
        cases[f"core, {label}"] = core_step(settings.shape, tokens, targets, label, settings.compiled)
    seconds = take_turns(NAME, cases, rounds=settings.rounds)
    note = (
        f"{settings.rows} x {settings.length} tokens, {settings.shape}; every step clips and runs fused AdamW; "
        "the ratio is against the fastest peer of the same precision, and against the fastest with fp32 master weights"
    )
    work = settings.rows * settings.length
    rows = []
    for label, names in peers.items():
        rows += [rate_row(NAME, case, seconds, work, "tokens/s", note=note) for case in names]
        alike = [case for case in names if "weights in bf16" not in case]
        for best in dict.fromkeys((fastest(seconds, names), fastest(seconds, alike))):
            rows.append(rate_row(NAME, f"core, {label}", seconds, work, "tokens/s", peer=best, note=note))
    return rows


def core_step(shape: Shape, tokens: Tensor, targets: Tensor, label: str, compiled: bool) -> Callable[[], None]:
    """One training step of the core, as the LightningModule does it."""
    model = shape.core()
    if compiled:
        CompileBlocks().apply(model)
    optimizer = AdamW(lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY).build(model)
    dtype = torch.bfloat16 if label == "bf16" else torch.float32

    def step() -> None:
        call_in(dtype, model, tokens, targets=targets).loss.backward()
        scale_and_clip(model.parameters(), torch.tensor(1.0), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def transformers_step(
    shape: Shape, tokens: Tensor, targets: Tensor, label: str, precision: str, compiled: bool
) -> Callable[[], None]:
    """One training step of `LlamaForCausalLM`, whose loss shifts the labels itself."""
    model = shape.transformers().train()
    if precision == "weights in bf16":
        model.to(torch.bfloat16)
    if compiled:
        model.forward = torch.compile(model.forward, dynamic=False)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
