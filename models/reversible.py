"""Reversible residuals (Reformer, arXiv 2001.04451, section 3, after RevNet): memory that depth does not add to.

Two streams a and b take turns; every branch f (an attention or a feed-forward with its norm and dropout) reads one of
them and adds to the other:

    (a, b) -> (b, a + f(b))        and back        (b, c) -> (c - f(b), b)

A layer of two branches is the paper's Y1 = X1 + Attention(X2), Y2 = X2 + FeedForward(Y1). Both streams start as the
embedding, and what the model reads at the end is their mean. So a training step keeps the two last streams only, and
computes what every branch read anew in the backward: one more forward of the blocks, as with activation checkpointing.

The streams are fp32 also where the branches compute in bf16, since a difference of bf16 numbers does not give back what
was added: 8 bytes for each token and channel in place of 2 in a bf16 stream, once for the whole model. What comes back
is exact but for the rounding of the sums. A mechanism that decides something by what it reads keeps the decision in
`ForwardInputs.state` for its recomputation, as that rounding could turn it over.

B batch, T tokens, D model width.
"""

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from models.attention.protocol import ForwardInputs, Mixed, summed


def split(x: Tensor) -> Tensor:
    """Both streams (B, T, 2D), in at least fp32, as the embedded tokens (B, T, D)."""
    return torch.cat([x, x], dim=-1).to(torch.promote_types(x.dtype, torch.float32))


def merge(x: Tensor) -> Tensor:
    """The mean (..., D) of both streams (..., 2D)."""
    return torch.stack(x.chunk(2, dim=-1)).mean(0)


def run_reversible(blocks: nn.ModuleList, x: Tensor, inputs: ForwardInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """All blocks for a training step, keeping nothing between them.

    The branches run as they are written, also in blocks that are compiled: the backward must compute to the bit what
    the forward did, dropout included, and two graphs of a compiler need not agree so far.

    Args:
        blocks: of a reversible model.
        x: (B, T, 2D) both streams.
        inputs: of this forward.

    Returns:
        (B, T, 2D), and in training mode the losses of the mechanisms, summed by name.
    """
    run = ReversibleRun(blocks, inputs._replace(recomputed=True))
    y, *sums = ReversibleStack.apply(run, x, *run.tables(), *run.parameters().values())
    return y, dict(zip(run.losses, sums, strict=True))


@dataclass
class ReversibleRun:
    """One forward, and what its backward must know to repeat it.

    Attributes:
        blocks: the model's.
        context: of the forward; from its end on with what the layers decided.
        randomness: before each branch, in training mode (5 kB each on a CPU).
        losses: names of the losses that mechanisms returned.
        autocast: device type, dtype and whether it was on.
    """

    blocks: nn.ModuleList
    context: ForwardInputs
    randomness: list["Randomness"] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    autocast: tuple[str, torch.dtype, bool] | None = None

    def tables(self) -> list[Tensor]:
        """Tensors of the inputs that gradients go to: learned tables of positions."""
        return [leaf for leaf in tree_flatten(self.context)[0] if _learned(leaf)]

    def with_tables(self, tables: Sequence[Tensor]) -> ForwardInputs:
        """The context with others in their places."""
        rest = iter(tables)
        leaves, form = tree_flatten(self.context)
        return tree_unflatten([next(rest) if _learned(leaf) else leaf for leaf in leaves], form)

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.blocks.named_parameters())

    def casting(self) -> AbstractContextManager:
        """Autocast as it was in the forward."""
        if self.autocast is None:
            return nullcontext()
        kind, dtype, enabled = self.autocast
        return torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False)


class ReversibleStack(torch.autograd.Function):
    """`apply(run, x, *tables, *parameters)` with x (B, T, 2D): the streams behind all blocks, and the summed losses."""

    @staticmethod
    def forward(ctx: FunctionCtx, run: ReversibleRun, x: Tensor, *learned: Tensor) -> tuple[Tensor, ...]:
        if torch.amp.is_autocast_available(x.device.type):
            kind = x.device.type
            run.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        a, b = x.detach().chunk(2, dim=-1)  # (B, T, D) each
        sums: dict[str, Tensor] = {}
        decided: dict[tuple[int, str], Tensor] = {}
        for block in run.blocks:
            for branch in block.branches():
                if block.training:
                    run.randomness.append(Randomness.now(x.device))
                _, (y, losses, state) = _graph(branch, b, run.context)
                a, b = b, a + y.detach()
                decided |= state
                sums = summed(sums, {name: loss.detach() for name, loss in losses.items()})
                del y, losses  # or their graph would live until the next one is built
        run.losses, run.context = list(sums), run.context._replace(state=decided)
        y = torch.cat([a, b], dim=-1)  # (B, T, 2D)
        ctx.run = run
        ctx.save_for_backward(y, *learned)
        return y, *sums.values()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor, *losses: Tensor) -> tuple[Tensor | None, ...]:
        run: ReversibleRun = ctx.run
        y, *learned = ctx.saved_tensors
        fresh = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in learned]
        count = len(run.tables())
        context = run.with_tables(fresh[:count])
        # a functional_call around the forward has ended: its tensors are put into the modules again
        parameters = {f"blocks.{name}": value for name, value in zip(run.parameters(), fresh[count:], strict=True)}
        weights = dict(zip(run.losses, losses, strict=True))
        with run.casting():
            dx = functional_call(_Holder(run.blocks), parameters, (_go_back, run, context, y, dy, weights))
        return None, dx, *(tensor.grad for tensor in fresh)


def _go_back(run: ReversibleRun, inputs: ForwardInputs, y: Tensor, dy: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """From the last streams y (B, T, 2D) and their gradient dy to the gradient of the first ones.

    Gradients of everything else that the branches read are left with it. `weights` are those of the losses.
    """
    (b, c), (db, dc) = y.chunk(2, dim=-1), dy.chunk(2, dim=-1)  # (B, T, D) each
    randomness = list(run.randomness)
    for block in reversed(run.blocks):
        for branch in reversed(block.branches()):
            with randomness.pop().again() if randomness else nullcontext():
                read, (found, losses, _) = _graph(branch, b, inputs)
            ends, gradients = [found, *losses.values()], [dc.to(found.dtype), *(weights[name] for name in losses)]
            torch.autograd.backward(ends, gradients)
            b, c = c - found.detach(), b
            db, dc = dc, db + read.grad
    return torch.cat([db, dc], dim=-1)


def _graph(branch: Any, x: Tensor, inputs: ForwardInputs) -> tuple[Tensor, Mixed]:
    """x (B, T, D) cut loose, and what a branch makes of it.

    With a graph also in the forward, where it is dropped: kernels are chosen by whether there is one.
    """
    with torch.enable_grad():
        read = x.detach().requires_grad_()
        return read, branch(read, inputs)


def _learned(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


class _Holder(nn.Module):
    """Calls a function while `functional_call` holds other tensors in the blocks."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, function: Any, *arguments: Any) -> Any:
        return function(*arguments)


@dataclass(frozen=True)
class Randomness:
    """The state of the random numbers of the CPU, and of the accelerator that a model is on."""

    device: torch.device
    cpu: Tensor
    own: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "Randomness":
        accelerated = device.type not in ("cpu", "meta")
        own = torch.get_device_module(device).get_rng_state(device) if accelerated else None
        return cls(device, torch.get_rng_state(), own)

    @contextmanager
    def again(self) -> Generator[None, None, None]:
        """In this state, and afterwards in the one from before."""
        accelerated = {"device_type": self.device.type, "devices": [self.device]} if self.own is not None else {}
        with torch.random.fork_rng(**(accelerated or {"devices": []})):
            torch.set_rng_state(self.cpu)
            if self.own is not None:
                torch.get_device_module(self.device).set_rng_state(self.own, self.device)
            yield
