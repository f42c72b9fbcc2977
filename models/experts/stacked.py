"""All experts of a layer in one tensor a map, computed together.

N tokens, P pairs of a token and an expert, E experts, D model width, F hidden neurons of an expert.
"""

import torch
from torch import Tensor, nn

from models.experts.dispatch import group, grouped_linear, sum_pairs, take_rows
from models.experts.pairs import Pairs
from models.feedforward import ACTIVATIONS, Mlp, Swiglu
from models.linear import residual_std


class StackedExperts(nn.Module):
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

    def forward(self, x: Tensor, pairs: Pairs) -> Tensor:
        """x (N, D) -> (N, D): the sum over a token's pairs of weight times what the expert makes of it.

        Computed in the autocast dtype where autocast is on, and in that of x otherwise.
        """
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        groups = group(pairs, self.count)
        rows = take_rows(x.to(dtype), groups)  # (P, D)

        def apply(name: str, rows: Tensor) -> Tensor:
            bias = getattr(self, f"{name}_bias")
            bias = None if bias is None else bias.to(dtype)
            return grouped_linear(rows, getattr(self, name).to(dtype), bias, groups)

        if "gate" in self.stds:
            hidden = self.activation(apply("gate", rows)) * apply("up", rows)  # (P, F)
        else:
            hidden = self.activation(apply("up", rows))
        return sum_pairs(apply("down", hidden), pairs.weights, groups, x.shape[0])
