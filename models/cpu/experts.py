"""One token through its experts without sorting and grouping, which would take longer than computing."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from models.cpu.matmul import linear

Apply = Callable[[str, Tensor], Tensor]


def one_token(
    x: Tensor,
    counts: Mapping[int, float],
    maps: Mapping[str, tuple[Tensor, Tensor | None]],
    network: Callable[[Tensor, Apply], Tensor],
) -> Tensor:
    """The sum over the experts of a token of their weight times their output: x (1, D) -> (1, D).

    Any two experts are a slice of the stack, so that each map is one batched product for two; not in bf16, where
    batched products of a row take three times as long.

    Args:
        counts: expert -> its weight.
        maps: name -> weight (E, out, in) and bias (E, out) of all experts.
        network: an expert on rows, given what computes its maps by name.
    """
    total = x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    experts = sorted(counts)
    together = 1 if x.dtype == torch.bfloat16 else 2
    for begin in range(0, len(experts), together):
        these = experts[begin : begin + together]
        step = max(1, these[-1] - these[0])
        where = these[0] if together == 1 else slice(these[0], these[-1] + 1, step)

        def apply(name: str, rows: Tensor, where: int | slice = where) -> Tensor:
            weights, biases = maps[name]
            weight = weights[where].to(x.dtype)
            y = linear(rows, weight) if together == 1 else torch.bmm(rows, weight.mT)
            return y if biases is None else y + biases[where].to(x.dtype).unsqueeze(-2)

        y = network(x if together == 1 else x.expand(len(these), 1, -1), apply)
        for expert, row in zip(these, y.to(total.dtype).view(len(these), 1, -1), strict=True):  # (1, D) each
            total.add_(row, alpha=counts[expert])
    return total.to(x.dtype)
