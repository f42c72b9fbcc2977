"""Options of a softmax attention: the normalisation of queries and keys, and the attention sink."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.errors import UserError
from models.registry import Registry

QK_NORMS = Registry("query and key norm")


@QK_NORMS.register("rms")
@dataclass(frozen=True)
class QkRms:
    """RMSNorm over the channels of each head, with one weight for all heads (as in Qwen 3 and Gemma 3).

    Args:
        eps: added to the mean square.
    """

    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.eps <= 0:
            raise UserError(f"eps must be positive, got {self.eps}")

    def build(self, head_width: int) -> nn.Module:
        return nn.RMSNorm(head_width, eps=self.eps)


class LearnedSink(nn.Module):
    """A learned logit of each head, beginning at 0 (arXiv 2309.17453, section 3.3; gpt-oss)."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.logit)

    def forward(self, q: Tensor) -> Tensor:  # (B, H, T, d) -> (H,)
        return self.logit


class ZeroSink(nn.Module):
    """A logit of 0 that stays there: the softmax may sum to less than one (arXiv 2309.17453, section 3.3)."""

    def __init__(self, heads: int) -> None:
        super().__init__()

    def forward(self, q: Tensor) -> Tensor:  # (B, H, T, d) -> (H,)
        return q.new_zeros(q.shape[1])


SINKS = {"learned": LearnedSink, "zero": ZeroSink}
