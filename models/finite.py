"""Numbers that are not finite (NaN, infinity): found, and named by the tensor or the layer that holds them."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from models.errors import UserError


def is_finite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor holds neither NaN nor infinity; one pass that takes no memory."""
    if not tensor.numel():
        return True
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # torch knows no minimum of 8-bit floats
    return all(bool(bound.isfinite()) for bound in wide.detach().aminmax())


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Raise UserError for the first tensor, by its name, that holds NaN or infinity; `where` says whose it is."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not is_finite(tensor):
            raise UserError(f"the tensor {name} {where} holds NaN or infinity: the model is broken there")


def converted(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in another floating-point `dtype` (None: as it is).

    Raises:
        UserError: it holds a number that is too large for `dtype`, which would become infinity.
    """
    result = tensor.to(dtype or tensor.dtype)
    if result.dtype == tensor.dtype or is_finite(result) or not is_finite(tensor):
        return result
    largest, most, short = float(tensor.abs().max()), torch.finfo(result.dtype).max, str(dtype).removeprefix("torch.")
    raise UserError(
        f"the tensor {name} holds numbers up to {largest:g}, and {short} ends at {most:g}; choose a wider number "
        "format, float32 or the one that is stored"
    )


def not_finite(model: nn.Module, tokens: Tensor, documents: Tensor | None = None) -> UserError:
    """The error that names the first layer of a Transformer whose output is not finite for these tokens (1, T)."""
    found: list[str] = []

    def watch(name: str, module: nn.Module):
        def look(_module: nn.Module, _inputs: object, output: object) -> None:
            if not found and isinstance(output, Tensor) and output.is_floating_point() and not is_finite(output):
                found.append(f"{name} ({str(output.dtype).removeprefix('torch.')})")

        return module.register_forward_hook(look)

    handles = [watch(name, module) for name, module in model.named_modules() if name]
    try:
        model(tokens, documents=documents)
    finally:
        for handle in handles:
            handle.remove()
    layer = f"the output of {found[0]}" if found else "what the model predicts"
    return UserError(
        f"{layer} is not finite (NaN or infinity): weights or activations are too large for the number format; "
        "choose a wider one, or another model"
    )
