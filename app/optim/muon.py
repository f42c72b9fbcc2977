"""Muon (Jordan 2024; scaled as in arXiv 2502.16982) for hidden matrices and AdamW for the rest, as one optimizer.

E matrices of a stack (experts), M rows and N columns each.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from app.optim.base import Optimization, check_numbers, keep_options, parameters_by_role
from models.cpu import dispatch
from models.errors import UserError


class Muon(Optimization):
    """Muon on the hidden matrices (each of a stack by itself), AdamW on embeddings, head, norms and biases.

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
            if parameter.ndim > 3:
                raise UserError(
                    "Muon moves matrices and stacks of them; a weight of shape "
                    f"{tuple(parameter.shape)} must be split first"
                )
        muon = {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}
        adamw = {"lr": self.adamw_lr, "betas": self.betas, "eps": self.eps}
        optimizer = MuonWithAdamW(
            [{"params": [one for one in roles["hidden"] if one.ndim == 2], **muon}],
            [
                {"params": roles["head"], "weight_decay": self.weight_decay, **adamw},
                {"params": roles["embedding"] + roles["vector"], "weight_decay": 0.0, **adamw},
            ],
            [{"params": [one for one in roles["hidden"] if one.ndim == 3], **muon}],
        )
        return keep_options(optimizer)


class MuonWithAdamW(Optimizer):
    """`torch.optim.Muon` and `torch.optim.AdamW` behind the interface of one optimizer.

    All groups and all states belong to this object, so schedules, checkpoints (also sharded ones) and Lightning's
    automatic optimization see an ordinary optimizer; the two inner ones look at its groups and states.

    Args:
        muon: parameter groups of 2-D parameters.
        adamw: parameter groups of the others.
        stacks: parameter groups of 3-D parameters, stacks of matrices for Muon.
    """

    def __init__(
        self, muon: list[dict[str, Any]], adamw: list[dict[str, Any]], stacks: list[dict[str, Any]] | None = None
    ) -> None:
        self._inner: dict[str, Optimizer] = {}
        groups = []
        for name, build, given in (("muon", _muon, muon), ("adamw", _adamw, adamw), ("stacks", MuonOfStacks, stacks)):
            given = [group for group in given or [] if group["params"]]
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
    if all(_wants_fp32(one) for group in groups for one in group["params"]):
        return MuonOfStacks(groups)
    return torch.optim.Muon(groups, nesterov=True, adjust_lr_fn="match_rms_adamw")


def _adamw(groups: list[dict[str, Any]]) -> Optimizer:
    return torch.optim.AdamW(groups, fused=True)


NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)  # a, b, c of X <- a X + (b A + c A A) X with A = X X', as torch.optim.Muon has
STEPS, EPS = 5, 1e-7  # of that iteration; of the norm that it starts with


def _wants_fp32(tensor: Tensor) -> bool:
    """Whether products in fp32 take less time than in bf16, in which `torch.optim.Muon` always computes."""
    return dispatch.WIDENS_BF16 and tensor.device.type == "cpu" and not isinstance(tensor, DTensor)


class MuonOfStacks(Optimizer):
    """Muon on stacks of matrices (E, M, N), which `torch.optim.Muon` refuses: each matrix is orthogonalised by itself.

    The update of one matrix is that of `torch.optim.Muon(nesterov=True, adjust_lr_fn="match_rms_adamw")`. It also takes
    single matrices (M, N), for processors on which fp32 is faster.

    Args:
        groups: parameter groups of 3-D or 2-D parameters with `lr`, `momentum` and `weight_decay`.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"momentum": 0.95, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                weight, gradient, mean = (_own(x) for x in (parameter, parameter.grad, state["momentum_buffer"]))
                mean.lerp_(gradient, 1 - group["momentum"])
                update = gradient.lerp(mean, group["momentum"])  # (E, M, N) or (M, N)
                update = orthogonalized(update.view(-1, *update.shape[-2:])).view_as(update)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * 0.2 * max(weight.shape[-2:]) ** 0.5)


def _own(stack: Tensor) -> Tensor:
    """The matrices of a stack that lie on this rank, whole: shards are cut between matrices."""
    if not isinstance(stack, DTensor):
        return stack
    if any(isinstance(place, Shard) and place.dim != 0 for place in stack.placements):
        raise UserError("Muon needs the matrices of a stack whole on one rank; shard the stack by its first dimension")
    return stack.to_local()


def orthogonalized(stack: Tensor) -> Tensor:
    """U V' of each matrix U S V' of a stack (E, M, N), nearly: the singular values come out between 0.5 and 1.5.

    In bf16, or fp32 where that is faster, by Newton and Schulz' iteration on the smaller side (Jordan 2024).
    """
    tall = stack.shape[1] > stack.shape[2]
    x = (stack.mT if tall else stack).to(torch.float32 if _wants_fp32(stack) else torch.bfloat16)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    a, b, c = NEWTON_SCHULZ
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
