"""Calibration statistics: running sums over the inputs of a linear layer.

Memory does not depend on the number of tokens, nor, up to rounding, the result on the cut into batches. N tokens, K
input channels.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Statistic(Protocol):
    """A running summary of the inputs of one linear layer, or of several that read the same input."""

    tokens: int

    def update(self, x: Tensor) -> None:
        """Take in the inputs x (N, K) of N more tokens."""

    def finite(self) -> bool:
        """False when a NaN or an infinity has come in."""


class StatisticType(Protocol):
    """Factory of a statistic: a class such as `Hessian`, or `functools.partial(Class, option=...)`."""

    def __call__(self, width: int, device: torch.device) -> Statistic:
        """An empty statistic over `width` input channels."""


class Hessian:
    """E[x x'] (K, K) of the inputs: half the Hessian of the layer-wise squared error, for every output row.

    GPTQ writes H = 2 X X' / N (arXiv 2210.17323, eq. 2); the factor 2 cancels in every update.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.tokens = 0
        self.sum = torch.zeros(width, width, device=device)  # (K, K) fp32, its blocks on and above the diagonal
        self.block = min(256, -(-width // 2))

    def update(self, x: Tensor) -> None:
        self.tokens += x.shape[0]
        x = x.float()  # (N, K)
        for start in range(0, x.shape[1], self.block):
            end = start + self.block
            self.sum[start:end, start:].addmm_(x[:, start:end].T, x[:, start:])

    def finite(self) -> bool:
        return bool(self.sum.diagonal().isfinite().all())

    def matrix(self) -> Tensor:
        """E[x x'] (K, K) fp32; zeros before the first token."""
        upper = self.sum.triu()
        return upper.add_(upper.triu(1).T).div_(max(1, self.tokens))


class InputNorm:
    """Root mean square of every input channel, (K,): what Wanda calls |X_j| up to a factor common to all channels."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.tokens = 0
        self.sum = torch.zeros(width, dtype=torch.float64, device=device)  # (K,)

    def update(self, x: Tensor) -> None:
        self.sum += x.float().square().sum(0)
        self.tokens += x.shape[0]

    def finite(self) -> bool:
        return bool(self.sum.isfinite().all())

    def norm(self) -> Tensor:
        """sqrt(E[x_j^2]) (K,) fp32; zeros before the first token."""
        return (self.sum / max(1, self.tokens)).sqrt().float()


class Moments:
    """Mean, mean magnitude and variance of every input channel."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.tokens = 0
        self.sums = torch.zeros(3, width, dtype=torch.float64, device=device)  # of x, |x|, x^2

    def update(self, x: Tensor) -> None:
        x = x.double()
        self.sums += torch.stack([x.sum(0), x.abs().sum(0), x.square().sum(0)])
        self.tokens += x.shape[0]

    def finite(self) -> bool:
        return bool(self.sums.isfinite().all())

    def mean(self) -> Tensor:
        """E[x_j] (K,) fp32."""
        return (self.sums[0] / max(1, self.tokens)).float()

    def magnitude(self) -> Tensor:
        """E|x_j| (K,) fp32: AWQ's activation scale (arXiv 2306.00978)."""
        return (self.sums[1] / max(1, self.tokens)).float()

    def variance(self) -> Tensor:
        """E[x_j^2] - E[x_j]^2 (K,) fp32, at least 0."""
        mean = self.sums / max(1, self.tokens)
        return (mean[2] - mean[0].square()).clamp_min(0).float()
