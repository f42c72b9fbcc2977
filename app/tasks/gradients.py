"""Scaling and clipping gradients, plain or sharded, in one pass and without waiting for the device."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.errors import UserError


def check_max_norm(max_norm: float | None) -> None:
    """Raise UserError for a largest norm below 0, which would turn every gradient round, or one that is no number."""
    if max_norm is not None and not max_norm >= 0:
        raise UserError(f"gradient_clip_val must be at least 0 (0 or null does not clip), not {max_norm}")


def scale_and_clip(parameters: Iterable[nn.Parameter], scale: Tensor, max_norm: float | None) -> Tensor:
    """Multiply all gradients by `scale`, then by what brings their joint 2-norm down to `max_norm`.

    Args:
        parameters: those without a gradient are passed over.
        scale: () positive factor.
        max_norm: largest norm after scaling; None or 0 does not clip.

    Returns:
        () float32: the norm after scaling and before clipping.

    Raises:
        UserError: `max_norm` is below 0.
    """
    check_max_norm(max_norm)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).float() * scale
    factor = scale
    if max_norm:
        factor = scale * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if factor.device.type == "cpu" and factor.item() == 1.0:
        return norm
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    torch._foreach_mul_(local, factor.to(local[0].dtype))
    return norm
