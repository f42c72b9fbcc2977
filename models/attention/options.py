"""Options of a softmax attention: the normalisation of queries and keys, and the attention sink."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.errors import UserError
from models.linear import Drawn
from models.registry import Registry

QK_NORMS = Registry("query and key norm")


def head_width_of(head_width: int | None, heads: int, width: int) -> int:
    """Channels of a head: those that are given, or the share of each of the heads in the model's width."""
    if head_width is not None and head_width < 1:
        raise UserError(f"head_width must be at least 1, got {head_width}")
    if head_width is None and width % heads:
        raise UserError(f"width {width} is not a multiple of {heads} heads: give head_width")
    return width // heads if head_width is None else head_width


def check_dropout(dropout: float) -> None:
    """Raise UserError for what is no probability below 1."""
    if not 0 <= dropout < 1:
        raise UserError(f"dropout must be at least 0 and below 1, got {dropout}")


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


class LearnedSink(Drawn):
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
