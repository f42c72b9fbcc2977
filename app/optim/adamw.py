"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) in torch's fused form, weight decay on matrices only."""

import torch
from torch import nn
from torch.optim import Optimizer

from app.optim.base import Optimization, check_numbers, keep_options, parameters_by_role


class AdamW(Optimization):
    """AdamW.

    Args:
        lr: the highest learning rate; the schedule multiplies it.
        betas: decay of the running mean and of the running square.
        eps: added to the root of the running square.
        weight_decay: of matrices; norms, biases and embeddings have none.

    Raises:
        UserError: a negative number, or betas outside 0 to 1.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        check_numbers("AdamW", betas, lr=lr, eps=eps, weight_decay=weight_decay)
        self.lr, self.betas, self.eps, self.weight_decay = lr, tuple(betas), eps, weight_decay

    def build(self, model: nn.Module) -> Optimizer:
        roles = parameters_by_role(model)
        groups = [
            {"params": roles["hidden"] + roles["head"], "weight_decay": self.weight_decay},
            {"params": roles["embedding"] + roles["vector"], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        return keep_options(torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True))
