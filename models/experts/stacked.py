"""All experts of a layer in one tensor a map, computed together.

N tokens, P pairs of a token and an expert, E experts, D model width, F hidden neurons of an expert.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.cpu.dispatch import ungrouped
from models.cpu.experts import one_token
from models.experts.assignments import Assignments
from models.experts.dispatch import group, grouped_linear, sum_pairs, take_rows
from models.feedforward import ACTIVATIONS, Mlp, Swiglu
from models.linear import Drawn, residual_std


class StackedExperts(Drawn):
    """E feed-forwards of one shape: down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate.

    Attributes:
        gate, up: (E, F, D) parameters; `gate` only for swiglu.
        down: (E, D, F) parameter.
        gate_bias, up_bias, down_bias: (E, F), (E, F) and (E, D) parameters where the spec has them, else None.
        stds: standard deviation that each map draws from.
    """

    def __init__(self, count: int, expert: Swiglu | Mlp, width: int, branches: int) -> None:
        super().__init__()
        self.count, self.activation = count, ACTIVATIONS[expert.activation]
        self.stds = {"up": 0.02, "down": residual_std(0.02, branches)}
        shapes = {"up": (expert.width, width), "down": (width, expert.width)}
        if isinstance(expert, Swiglu):
            self.stds, shapes = {"gate": 0.02, **self.stds}, {"gate": shapes["up"], **shapes}
        for name, shape in shapes.items():
            biased = expert.out_bias if name == "down" else expert.bias
            setattr(self, name, nn.Parameter(torch.empty(count, *shape)))
            bias = nn.Parameter(torch.empty(count, shape[0])) if biased else None
            self.register_parameter(f"{name}_bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, std in self.stds.items():
            nn.init.normal_(getattr(self, name), std=std)
            if (bias := getattr(self, f"{name}_bias")) is not None:
                nn.init.zeros_(bias)

    def draw_xavier(self, gain: float) -> None:
        self.stds = {name: gain * (2 / sum(getattr(self, name).shape[1:])) ** 0.5 for name in self.stds}

    def forward(self, x: Tensor, pairs: Assignments) -> Tensor:
        """x (N, D) -> (N, D): the sum over a token's pairs of weight times what the expert makes of it.

        Computed in the autocast dtype where autocast is on, and in that of x otherwise.
        """
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if ungrouped(x):
            return self._one_token(x.to(dtype), pairs)
        groups = group(pairs, self.count)

        def apply(name: str, rows: Tensor) -> Tensor:
            bias = getattr(self, f"{name}_bias")
            bias = None if bias is None else bias.to(dtype)
            return grouped_linear(rows, getattr(self, name).to(dtype), bias, groups)

        y = self._network(take_rows(x.to(dtype), groups), apply)  # (P, D)
        return sum_pairs(y, pairs.weights, groups, len(x))

    def _network(self, rows: Tensor, apply: Callable[[str, Tensor], Tensor]) -> Tensor:
        """The network of the experts on rows (P, D), with `apply` for its maps by name."""
        if "gate" in self.stds:
            hidden = self.activation(apply("gate", rows)) * apply("up", rows)  # (P, F)
        else:
            hidden = self.activation(apply("up", rows))
        return apply("down", hidden)

    def _one_token(self, x: Tensor, pairs: Assignments) -> Tensor:
        """As `forward` for x (1, D), on CPU."""
        counts: dict[int, float] = {}
        for expert, weight in zip(pairs.experts.tolist(), pairs.weights.tolist(), strict=True):
            counts[expert] = counts.get(expert, 0.0) + weight
        counts.pop(self.count, None)  # what was dropped
        maps = {name: (getattr(self, name), getattr(self, f"{name}_bias")) for name in self.stds}
        return one_token(x, counts, maps, self._network)
