"""Retention: causal mixing by decays where attention has a softmax (RetNet, arXiv 2307.08621, section 2).

B batch, T new tokens, D model width, H heads, d channels of a query or key, e of a value, N chunks of c tokens.

A head with the decay g = 1 - r gives, of queries and keys that the position encoding has rotated,

    o_n = sum over m <= n of g^(n - m) (q_n . k_m) v_m        which is q_n S_n with S_n = g S_(n - 1) + k_n^T v_n

as products of all pairs (`parallel`), token by token (`recurrent`), or by pairs within chunks and the memory between
them (`chunkwise`, O(T c)). The three forms give the same numbers at any eps of the norm behind them, because none
scales its output by what it sees, as the paper's stabilisers do, each form in another way (section 2.2 there). What
keeps the memory in range instead is that it holds r S: a weighted mean of all k^T v, however many they are.
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.options import head_width_of
from models.attention.protocol import Attention, ForwardInputs
from models.cache import RecurrentCache, beginnings
from models.errors import UserError
from models.fp32 import without_autocast
from models.linear import Linear, residual_std
from models.registry import Registry
from models.specs import ATTENTIONS, POSITIONS, AttentionSpec, LayerContext

DECAYS = Registry("decay")
GAIN = 2**-2.5  # of Xavier's distribution, for all maps that read the stream (torchscale, the authors' code)


@DECAYS.register("powers")
@dataclass(frozen=True)
class Powers:
    """Head h forgets 2^-(5 + h) of its memory with every token (paper, section 2.2)."""

    def rates(self, heads: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Decay of each head per token: (H,)."""
        return 2.0 ** -(5 + torch.arange(heads, device=device, dtype=dtype))


@DECAYS.register("range")
@dataclass(frozen=True)
class Range:
    """The heads forget from `first` to `last` of their memory with every token, in equal ratios.

    The defaults are those of the paper's experiments.

    Args:
        first, last: share that the first and the last head forget.
    """

    first: float = 1 / 32
    last: float = 1 / 512

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"{name} must be between 0 and 1, got {getattr(self, name)}")

    def rates(self, heads: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Decay of each head per token: (H,)."""
        ends = math.log(self.first), math.log(self.last)
        return torch.linspace(*ends, heads, device=device, dtype=dtype).exp()


@ATTENTIONS.register("retention")
@dataclass(frozen=True)
class Retention(AttentionSpec):
    """Multi-scale gated retention: o(silu(gate(x)) * norm(heads)), each head with a decay of its own.

    Args:
        heads: heads.
        head_width: channels of a query and of a key. Nothing: model width / heads.
        value_width: channels of a head's values. Nothing: twice head_width, as in the paper.
        decay: how much each head forgets: `powers` or `range`.
        chunk: tokens whose pairs are formed at once; changes the speed and not the result.
        eps: of the norm over the channels of each head.
        position: this layer's own position encoding. Nothing: the model's. The paper's is `rope`, interleaved.
    """

    directions = ("causal",)
    directions_because = "it remembers what lies behind the token"
    position_types = ("rotation",)
    heads_because = "how fast each of them forgets follows from its number"

    heads: int
    head_width: int | None = None
    value_width: int | None = None
    decay: Any = field(default_factory=Powers, metadata={"registry": DECAYS})
    chunk: int = 64
    eps: float = 1e-6
    position: Any = field(default=None, metadata={"registry": POSITIONS})

    def __post_init__(self) -> None:
        for name in ("heads", "head_width", "value_width", "chunk"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} of retention must be at least 1, got {getattr(self, name)}")
        if self.eps <= 0:
            raise UserError(f"eps must be positive, got {self.eps}")

    def resolve(self, width: int, layer: int = 0) -> Self:
        """The same with the widths of its heads spelled out for a model of this width."""
        head_width = head_width_of(self.head_width, self.heads, width)
        return replace(self, head_width=head_width, value_width=self.value_width or 2 * head_width)

    def build(self, place: LayerContext) -> nn.Module:
        return GatedRetention(self, place)

    def flops_per_token(self, width: int, length: int) -> int:
        """Forward FLOPs of one token in a sequence of `length` (of a chunk, the causal half is not subtracted)."""
        projections = 2 * width * self.heads * (2 * self.head_width + 3 * self.value_width)
        pairs = 2 * self.heads * (self.head_width + self.value_width) * min(length, self.chunk)
        memory = 4 * self.heads * self.head_width * self.value_width if length > self.chunk else 0
        return projections + pairs + memory

    def cache_elements(self, tokens: int) -> int:
        """Numbers that the cache holds in the model's dtype: none."""
        return 0

    def cache_singles(self, tokens: int) -> int:
        """Numbers that the cache holds in fp32, whatever the length."""
        return self.heads * self.head_width * self.value_width


class GatedRetention(Attention):
    """The module of `Retention`."""

    def __init__(self, spec: Retention, place: LayerContext) -> None:
        super().__init__()
        width, self.positional = place.width, place.positional
        self.heads, self.head_width, self.value_width = spec.heads, spec.head_width, spec.value_width
        self.decay, self.chunk, self.eps = spec.decay, spec.chunk, spec.eps
        keys, values = spec.heads * spec.head_width, spec.heads * spec.value_width
        self.q, self.k = (Linear(width, keys, bias=False, std=_xavier(width, keys)) for _ in range(2))
        self.v, self.gate = (Linear(width, values, bias=False, std=_xavier(width, values)) for _ in range(2))
        self.o = Linear(values, width, bias=False, std=residual_std(0.02, place.branches))

    def forward(self, x: Tensor, inputs: ForwardInputs, cache: RecurrentCache | None = None) -> Tensor:
        positional = inputs.positional[self.positional]
        q = positional.rotate(self._split(self.q(x)))  # (B, H, T, d)
        k = positional.rotate(self._split(self.k(x))) * self.head_width**-0.5  # (B, H, T, d)
        v = self._split(self.v(x))  # (B, H, T, e)
        rate = self.decay.rates(self.heads, q.device, torch.promote_types(q.dtype, torch.float32))  # (H,)
        if cache is None:
            y, _ = chunkwise(q, k, v, rate, None, beginnings(inputs.documents, inputs.past), self.chunk)  # (B, H, T, e)
        else:
            form = recurrent if x.shape[1] == 1 else partial(chunkwise, chunk=self.chunk)
            y, cache.state = form(q, k, v, rate, cache.state, beginnings(inputs.documents, inputs.past))
        y = F.rms_norm(y, (self.value_width,), eps=self.eps).to(v.dtype)
        return self.o(F.silu(self.gate(x)) * y.transpose(1, 2).flatten(2))  # (B, T, D)

    def _split(self, x: Tensor) -> Tensor:  # (B, T, H * channels) -> (B, H, T, channels)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def new_cache(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> RecurrentCache:
        exact = torch.promote_types(dtype, torch.float32)  # it is added to with every token
        return RecurrentCache((batch, self.heads, self.head_width, self.value_width), device, exact)


def _xavier(inputs: int, outputs: int) -> float:
    return GAIN * (2 / (inputs + outputs)) ** 0.5


def parallel(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, memory: Tensor | None = None, begins: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Retention by the products of all pairs, O(T^2); the reference, and the form for few tokens.

    Args:
        q, k: (B, H, T, d), the keys scaled.
        v: (B, H, T, e).
        rate: (H,) in at least fp32, what each head forgets with a token, between 0 and 1.
        memory: (B, H, d, e) in the dtype of `rate`, r S of the tokens before these; None where there is none and the
            one after these is not wanted.
        begins: (B or 1, T) bool, tokens before which the memory is emptied; None: it never is.

    Returns:
        Outputs (B, H, T, e) in the dtype of `rate`, and the memory after the last token, or None.
    """
    steps = torch.arange(q.shape[2], device=q.device)
    run = torch.zeros_like(steps)[None] if begins is None else begins.cumsum(1)  # (B or 1, T), the how-manieth document
    y = _pairs(q, k, v, rate, None if begins is None else run)  # (B, H, T, e)
    if memory is None:
        return y, None
    reach = _powers(rate, steps + 1) * (run == 0)[:, None]  # (B or 1, H, T), what a token still sees of the memory
    stay = _powers(rate, len(steps) - 1 - steps) * (run == run[:, -1:])[:, None]  # (B or 1, H, T)
    with without_autocast(q.device):
        y = y + (q.to(rate.dtype) @ memory) * (reach / rate[:, None])[..., None]
        added = (k * stay[..., None]).transpose(-1, -2) @ v.to(rate.dtype)  # (B, H, d, e)
    return y, memory * reach[..., -1, None, None] + added * rate[:, None, None]


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, memory: Tensor | None = None, begins: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The same token by token, O(T) with O(1) memory: the form for decoding. Arguments and results of `parallel`."""
    q, k, v = (x.to(rate.dtype) for x in (q, k, v))
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]) if memory is None else memory  # (B, H, d, e)
    forget = rate[:, None, None]
    outputs = []
    for t in range(q.shape[2]):
        stays = 1 - forget if begins is None else (1 - forget) * ~begins[:, t, None, None, None]
        state = state * stays + forget * k[:, :, t, :, None] * v[:, :, t, None]
        with without_autocast(q.device):
            outputs.append(q[:, :, t, None] @ state / forget)  # (B, H, 1, e)
    return torch.cat(outputs, dim=2), None if memory is None else state


def chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    memory: Tensor | None = None,
    begins: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """The same in chunks of so many tokens from the first one on, O(T c): the form for training and for prompts.

    The other arguments and the results are those of `parallel`.
    """
    tokens = q.shape[2]
    chunk = min(chunk, tokens)
    count = -(-tokens // chunk)
    if count == 1 and memory is None:
        return parallel(q, k, v, rate, memory, begins)
    rest = count * chunk - tokens
    q, k, v = (F.pad(x, (0, 0, 0, rest)).unflatten(2, (count, chunk)) for x in (q, k, v))  # (B, H, N, c, d or e)
    run = None if begins is None else F.pad(begins, (0, rest)).unflatten(1, (count, chunk)).cumsum(2)  # (B or 1, N, c)
    reach, stay, kept = _between(rate, tokens, chunk, run)
    with without_autocast(q.device):
        added = (k * stay.to(k.dtype)).transpose(-1, -2) @ v  # (B, H, N, d, e)
    added = added.to(rate.dtype) * rate[:, None, None, None]
    kept = kept.expand(-1, -1, count, -1, -1)
    state = torch.zeros_like(added[:, :, 0]) if memory is None else memory
    before = []
    for forgotten, new in zip(kept.unbind(2), added.unbind(2), strict=True):
        before.append(state)
        state = state * forgotten + new  # (B, H, d, e)
    with without_autocast(q.device):
        carried = q @ torch.stack(before, dim=2).to(q.dtype)  # (B, H, N, c, e)
    y = _pairs(q, k, v, rate, run) + carried.to(rate.dtype) * (reach / rate[:, None, None, None])
    return y.flatten(2, 3)[:, :, :tokens], None if memory is None else state


def _between(rate: Tensor, tokens: int, chunk: int, run: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Decay factors of a chunk: of the state that its tokens read, of tokens in the next state, of the state itself.

    Args:
        rate: (H,).
        run: (B or 1, N, c), documents that have begun in the chunk up to each token; None: none do.

    Returns:
        (B or 1, H, N, c, 1), (B or 1, H, N, c, 1) and (B or 1, H, N, 1, 1).
    """
    count = -(-tokens // chunk)
    numbers = torch.arange(count * chunk, device=rate.device).view(count, chunk)
    starts = numbers[:, :1]
    ends = (starts + chunk).clamp(max=tokens)  # the last chunk may be shorter
    reach = _powers(rate, numbers - starts + 1)[None, ..., None]
    stay = _powers(rate, (ends - 1 - numbers).clamp(min=0))[None, ..., None]
    kept = _powers(rate, ends - starts)[None, ..., None]
    if run is None:
        return reach, stay, kept
    run = run[:, None, ..., None]  # (B or 1, 1, N, c, 1)
    last = run[..., -1:, :]
    return reach * (run == 0), stay * (run == last), kept * (last == 0)


def _pairs(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, run: Tensor | None) -> Tensor:
    """The retention of tokens (B, H, ..., c, .) within their chunk: (B, H, ..., c, e) in the dtype of `rate`.

    run: (B or 1, ..., c); pairs of which it differs do not see each other.
    """
    steps = torch.arange(q.shape[-2], device=q.device)
    weights = _powers(rate, (steps[:, None] - steps).clamp(min=0)).tril()  # (H, c, c)
    weights = weights.view(len(rate), *[1] * (q.dim() - 4), *weights.shape[1:])
    if run is not None:
        weights = weights * (run[..., :, None] == run[..., None, :])[:, None]  # (B or 1, H, ..., c, c)
    with without_autocast(q.device):
        scores = (q @ k.transpose(-1, -2)).to(rate.dtype) * weights  # (B, H, ..., c, c)
        return (scores.to(v.dtype) @ v).to(rate.dtype)


def _powers(rate: Tensor, exponents: Tensor) -> Tensor:
    """(1 - rate)^exponents: (H, ...) for rate (H,) and exponents (...)."""
    return torch.exp(torch.log1p(-rate).view(-1, *[1] * exponents.dim()) * exponents)
