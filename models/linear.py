"""The linear map and the table of vectors of every module in the core."""

import torch
from torch import Tensor, nn

from models.cpu.matmul import linear


class Drawn(nn.Module):
    """A module that may hold parameters and buffers of its own, beside those of torch's layers."""

    def reset_parameters(self) -> None:
        """Draw the parameters, and compute the buffers; default: there are none."""

    def draw_xavier(self, gain: float) -> None:
        """From here on draw maps that are no modules from Xavier's normal distribution times the gain."""


class Linear(nn.Linear):
    """`nn.Linear` whose `reset_parameters` draws from N(0, std^2), also after a start on the meta device."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, std: float) -> None:
        self.std = std
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """`nn.Embedding` whose `reset_parameters` draws from N(0, std^2), also after a start on the meta device."""

    def __init__(self, count: int, width: int, *, std: float) -> None:
        self.std = std
        super().__init__(count, width)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


def residual_std(std: float, branches: int) -> float:
    """Standard deviation of the maps that write into the residual stream (GPT-2: std / sqrt(number of branches))."""
    return std / max(1, branches) ** 0.5


def itemsize(dtype: torch.dtype | None) -> int:
    """Bytes of one element; None means the default dtype."""
    return (dtype or torch.get_default_dtype()).itemsize
