"""Keeping pruned weights at zero while the rest is trained: the mask is read from the zeros and held at every step.

Masking the product alone is not enough: weight decay, momentum and orthogonalised updates move a weight whose gradient
is zero. So a held mask acts in three places: the gradient (before it reaches the optimizer or the norm that is
clipped), the optimizer's state, and the weight after each step. So no masked weight ever differs from 0. Of a sharded
parameter (FSDP2) each rank holds its part of the mask.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from models.experts import StackedExperts


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Recover masks (bool, True = kept) of every matrix, or stack of experts' matrices, that holds some zeros, by name.

    A layer that holds no zeros was not pruned, and one that holds nothing else was never trained: neither is masked.
    """
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            weights = {"weight": module.weight}
        elif isinstance(module, StackedExperts):
            weights = {part: parameter for part, parameter in module.named_parameters() if parameter.dim() == 3}
        else:
            continue
        for part, weight in weights.items():
            mask = weight.detach() != 0
            if not mask.all() and mask.any():
                masks[f"{name}.{part}" if name else part] = mask
    return masks


def count_violations(model: nn.Module, masks: Mapping[str, Tensor]) -> int:
    """Number of masked weights that are not zero."""
    parameters = dict(model.named_parameters())
    return sum(int((parameters[name].detach()[~mask] != 0).sum()) for name, mask in masks.items())


class HeldMasks:
    """Holds masks on a model's parameters until `release`.

    Args:
        model: its parameters named by `masks` are set to zero where the mask is False, now and after every step.
        masks: parameter name -> bool in its shape, True = kept; `masks_of(model)` recovers them from zeros.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        parameters = dict(model.named_parameters())
        self._held = [(parameters[name], _like(parameters[name], mask)) for name, mask in masks.items()]
        self._hooks = [_mask_gradient(*held) for held in self._held if held[0].requires_grad]
        self.apply()

    def attach(self, *optimizers: torch.optim.Optimizer) -> None:
        """Re-apply the masks to weights and optimizer state after every step of these optimizers."""
        for optimizer in optimizers:
            self._hooks.append(optimizer.register_step_post_hook(lambda stepped, *_: self.apply(stepped)))

    @torch.no_grad()
    def apply(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Zero every masked weight and, given an optimizer, its momentum and every other state of the same shape."""
        for parameter, mask in self._held:
            parameter.mul_(mask)
            state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
            for value in state.values():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    value.mul_(mask)

    def release(self) -> None:
        """Stop holding."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _like(parameter: Tensor, mask: Tensor) -> Tensor:
    """The mask on the device of the parameter, in shards as the parameter is."""
    mask = mask.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return mask
    return distribute_tensor(mask, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _mask_gradient(parameter: Tensor, mask: Tensor) -> Any:
    """Mask every gradient that arrives; returns the hook's handle."""
    if isinstance(parameter, DTensor):  # its gradient comes from the reduction over ranks, past the tensor's own hooks
        return parameter.register_post_accumulate_grad_hook(lambda held: held.grad.mul_(mask))
    return parameter.register_hook(lambda gradient: gradient * mask)
