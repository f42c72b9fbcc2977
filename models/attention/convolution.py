"""A gated causal depthwise convolution: each channel mixes the last few tokens (the short filters of H3 and Mamba).

B batch, T new tokens, D model width, C channels, k taps.

    y_t = o((sum over i < k of w_i * v_(t - i)) * silu(gate_t))        v = V x, gate = G x, w_i one weight a channel
"""

import itertools
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.protocol import Attention, ForwardInputs
from models.cache import RecurrentCache, beginnings
from models.errors import UserError
from models.linear import Drawn, Linear, residual_std
from models.specs import ATTENTIONS, AttentionSpec, LayerContext


@ATTENTIONS.register("convolution")
@dataclass(frozen=True)
class Convolution(AttentionSpec):
    """A gated depthwise convolution over a token and those before it; it has no heads and reads no positions.

    Args:
        kernel: tokens that a channel mixes, the newest included.
        channels: channels of the convolution. Nothing: the model's width.
    """

    directions = ("causal",)
    directions_because = "its taps lie behind the token"
    heads_because = "it has none"

    kernel: int = 4
    channels: int | None = None

    def __post_init__(self) -> None:
        for name in ("kernel", "channels"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} of a convolution must be at least 1, got {getattr(self, name)}")

    def resolve(self, width: int, layer: int = 0) -> Self:
        """The same with its channels spelled out for a model of this width."""
        return replace(self, channels=self.channels or width)

    def build(self, place: LayerContext) -> nn.Module:
        return GatedConvolution(self, place)

    def flops_per_token(self, width: int, length: int) -> int:
        """Forward FLOPs of the matrix products of one token, whatever the length."""
        return 2 * 3 * width * self.channels

    def cache_elements(self, tokens: int) -> int:
        """Numbers that the cache holds, whatever the length."""
        return (self.kernel - 1) * self.channels


class GatedConvolution(Attention):
    """The module of `Convolution`."""

    def __init__(self, spec: Convolution, place: LayerContext) -> None:
        super().__init__()
        self.kernel, self.channels = spec.kernel, spec.channels
        self.v, self.gate = (Linear(place.width, spec.channels, bias=False, std=0.02) for _ in range(2))
        self.taps = Taps(spec.kernel, spec.channels)
        self.o = Linear(spec.channels, place.width, bias=False, std=residual_std(0.02, place.branches))

    def forward(self, x: Tensor, inputs: ForwardInputs, cache: RecurrentCache | None = None) -> Tensor:
        v, begins = self.v(x), beginnings(inputs.documents, inputs.past)  # (B, T, C)
        if cache is None:
            y, _ = shifted(v, self.taps(), None, begins)  # (B, T, C)
        else:
            y, cache.state = shifted(v, self.taps(), cache.state, begins)
        return self.o(y.to(v.dtype) * F.silu(self.gate(x)))  # (B, T, D)

    def new_cache(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> RecurrentCache:
        return RecurrentCache((batch, self.kernel - 1, self.channels), device, dtype)


class Taps(Drawn):
    """The weights of a depthwise convolution, `()` -> (k, C), the newest token's first.

    They are stored in one dimension: like the weights of a norm they scale channels, and are no matrix to an optimizer.
    """

    def __init__(self, kernel: int, channels: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.weight = nn.Parameter(torch.empty(kernel * channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw as `nn.Conv1d` does: uniform within 1 / sqrt(k)."""
        nn.init.uniform_(self.weight, -(self.kernel**-0.5), self.kernel**-0.5)

    def forward(self) -> Tensor:
        return self.weight.view(self.kernel, -1)


def shifted(
    v: Tensor, taps: Tensor, memory: Tensor | None = None, begins: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Causal depthwise convolution as a sum of shifted inputs.

    Args:
        v: (B, T, C).
        taps: (k, C), the newest token's first.
        memory: (B, k - 1, C), the inputs before these, zero where there were none or they are of another document than
            the last; None where there are none and those after these are not wanted.
        begins: (B or 1, T) bool, tokens before which the memory is emptied; None: it never is.

    Returns:
        Outputs (B, T, C) in at least fp32, and the memory after the last token, or None.
    """
    tokens, back = v.shape[1], len(taps) - 1
    inputs = F.pad(v, (0, 0, back, 0)) if memory is None else torch.cat([memory.to(v.dtype), v], dim=1)
    taps = taps.to(torch.promote_types(v.dtype, torch.float32))
    run = None if begins is None else F.pad(begins.cumsum(1), (back, 0))[..., None]  # (B or 1, k - 1 + T, 1)
    y = v * taps[0]
    for i in range(1, back + 1):
        earlier = slice(back - i, back - i + tokens)
        term = inputs[:, earlier] * taps[i]  # (B, T, C)
        y = y + (term if run is None else term * (run[:, earlier] == run[:, back:]))
    if memory is None:
        return y, None
    kept = inputs[:, tokens:]  # (B, k - 1, C)
    return y, kept if run is None else kept * (run[:, tokens:] == run[:, -1:])


def convolved(
    v: Tensor, taps: Tensor, memory: Tensor | None = None, begins: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The reference of `shifted`: PyTorch's convolution of each document by itself. Arguments and results are its."""
    batch, tokens, channels = v.shape
    back = len(taps) - 1
    weight = taps.to(v.dtype).t().flip(1)[:, None]  # (C, 1, k)
    starts = v.new_zeros(batch, tokens, dtype=torch.bool) if begins is None else begins.expand(batch, -1)
    outputs, memories = [], []
    for row in range(batch):
        inputs, done = v.new_zeros(back, channels) if memory is None else memory[row], []
        edges = sorted({0, *starts[row].nonzero().flatten().tolist(), tokens})
        for start, end in itertools.pairwise(edges):
            inputs = torch.cat([inputs * (not starts[row, start]), v[row, start:end]])
            done.append(F.conv1d(inputs.t()[None], weight, groups=channels)[0].t())  # (tokens of the document, C)
            inputs = inputs[len(inputs) - back :]
        outputs.append(torch.cat(done))
        memories.append(inputs)
    return torch.stack(outputs), None if memory is None else torch.stack(memories)
