"""Muon (Jordan 2024; scaled as in arXiv 2502.16982) for hidden matrices and AdamW for the rest, as one optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from app.optim.base import Optimization, check_numbers, keep_options, parameters_by_role
from models.errors import UserError


class Muon(Optimization):
    """Muon on the hidden matrices, AdamW on embeddings, head, norms and biases.

    Muon's update is scaled to the root mean square of AdamW's (arXiv 2502.16982, section 2.2), so that both run at
    learning rates of the same size.

    Args:
        lr: highest learning rate of the hidden matrices; the schedule multiplies it.
        momentum: of the gradients, in Nesterov's form.
        weight_decay: of the hidden matrices and the head.
        adamw_lr: highest learning rate of everything else; by default `lr`.
        betas, eps: of AdamW.

    Raises:
        UserError: a negative number, or a momentum or betas outside 0 to 1.
    """

    def __init__(
        self,
        lr: float = 2e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        adamw_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        adamw_lr = lr if adamw_lr is None else adamw_lr
        check_numbers("Muon", betas, lr=lr, momentum=momentum, weight_decay=weight_decay, adamw_lr=adamw_lr, eps=eps)
        if momentum >= 1:
            raise UserError(f"momentum of Muon must be below 1, not {momentum}")
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.adamw_lr, self.betas, self.eps = adamw_lr, tuple(betas), eps

    def build(self, model: nn.Module) -> Optimizer:
        roles = parameters_by_role(model)
        for parameter in roles["hidden"]:
            if parameter.ndim != 2:
                raise UserError(f"Muon moves matrices; a weight of shape {tuple(parameter.shape)} must be split first")
        muon = {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}
        adamw = {"lr": self.adamw_lr, "betas": self.betas, "eps": self.eps}
        optimizer = MuonWithAdamW(
            [{"params": roles["hidden"], **muon}],
            [
                {"params": roles["head"], "weight_decay": self.weight_decay, **adamw},
                {"params": roles["embedding"] + roles["vector"], "weight_decay": 0.0, **adamw},
            ],
        )
        return keep_options(optimizer)


class MuonWithAdamW(Optimizer):
    """`torch.optim.Muon` and `torch.optim.AdamW` behind the interface of one optimizer.

    All groups and all states belong to this object, so schedules, checkpoints (also sharded ones) and Lightning's
    automatic optimization see an ordinary optimizer; the two inner ones look at its groups and states.

    Args:
        muon: parameter groups of 2-D parameters.
        adamw: parameter groups of the others.
    """

    def __init__(self, muon: list[dict[str, Any]], adamw: list[dict[str, Any]]) -> None:
        self._inner: dict[str, Optimizer] = {}
        groups = []
        for name, build, given in (("muon", _muon, muon), ("adamw", _adamw, adamw)):
            given = [group for group in given if group["params"]]
            if given:
                self._inner[name] = build(given)
                groups += [{**group, "algorithm": name} for group in self._inner[name].param_groups]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter once; `closure` computes the loss and the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, optimizer in self._inner.items():
            optimizer.param_groups = [group for group in self.param_groups if group["algorithm"] == name]
            optimizer.state = self.state
            optimizer.step()
        return loss


def _muon(groups: list[dict[str, Any]]) -> Optimizer:
    return torch.optim.Muon(groups, nesterov=True, adjust_lr_fn="match_rms_adamw")


def _adamw(groups: list[dict[str, Any]]) -> Optimizer:
    return torch.optim.AdamW(groups, fused=True)
