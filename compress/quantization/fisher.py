"""The diagonal of the Fisher information: how much the loss minds a change of each single weight.

    F_j = mean over sequences of (d loss / d w_j)^2,    loss = sum over the tokens of a sequence of their NLL

(SqueezeLLM, arXiv 2306.07629, section 4.1): squared first, averaged then. One forward and backward for each sequence.
Beside the model, one fp32 number for each weight is held, the activations of one sequence, and one gradient at a time:
each is squared and freed as soon as the backward has all of it. A weight that is used in two places, as one tied
between embedding and head, has the sum of both in its gradient.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compress.calibration.sequential import Batch
from models.errors import UserError
from models.projection import IGNORED


def fisher(
    model: nn.Module,
    batches: Sequence[Batch],
    names: Iterable[str],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """The diagonal for the weights of some modules of a `Transformer`, which is left as it was.

    Args:
        model: in evaluation mode.
        batches: with `tokens` and `targets` (B, T), and `documents` where there are any.
        names: modules with a `weight`.
        progress: called after every sequence with (sequences done, sequences in all).

    Returns:
        Name -> (N, K) fp32.

    Raises:
        UserError: no text, text without targets, or a gradient that is not finite, by name.
    """
    if not batches or "targets" not in batches[0]:
        raise UserError("squeezellm takes gradients of the loss: give it text (data, samples, sequence_length)")
    weights = {name: model.get_submodule(name).weight for name in names}
    sums: dict[nn.Parameter, Tensor] = {}  # by identity: modules may share a weight
    for weight in weights.values():
        sums.setdefault(weight, torch.zeros_like(weight, dtype=torch.float32))
    with torch.enable_grad(), _squaring(model, sums):
        count = 0
        rows = [_row(batch, i) for batch in batches for i in range(len(batch["tokens"]))]
        for done, row in enumerate(rows, 1):
            count += _backward(model, row)
            if progress is not None:
                progress(done, len(rows))
    if not count:
        raise UserError("the calibration text asks for no prediction: give blocks of at least two tokens")
    for name, weight in weights.items():
        if not sums[weight].isfinite().all():
            raise UserError(f"the gradient of {name} is NaN or infinite on the calibration text: the model is broken")
    for total in sums.values():
        total /= count
    return {name: sums[weight] for name, weight in weights.items()}


def _row(batch: Batch, row: int) -> Batch:
    """One sequence of a batch, as a batch (1, T)."""
    return {name: batch[name][row : row + 1] for name in ("tokens", "targets", "documents") if name in batch}


def _backward(model: nn.Module, one: Batch) -> bool:
    """The backward of one sequence, if it has a target; returns whether it has."""
    targets = int((one["targets"] != IGNORED).sum())
    if targets:
        (model(**one).loss * targets).backward()
    return targets > 0


@contextmanager
def _squaring(model: nn.Module, sums: dict[nn.Parameter, Tensor]) -> Iterator[None]:
    """Add the square of every gradient to `sums` in place of keeping it; nothing else takes part in the backward."""

    def square(weight: nn.Parameter) -> None:
        gradient, weight.grad = weight.grad, None
        gradient = gradient.float()
        sums[weight].addcmul_(gradient, gradient)

    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    handles = []
    try:
        for parameter in model.parameters():
            parameter.grad = None
            parameter.requires_grad_(parameter in sums)
            if parameter in sums:
                handles.append(parameter.register_post_accumulate_grad_hook(square))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, asked, gradient in before:
            parameter.requires_grad_(asked)
            parameter.grad = gradient
