"""All experts of a layer in one tensor a map, computed together.

N tokens, P pairs of a token and an expert, E experts, D model width, F hidden neurons of an expert.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.experts.dispatch import group, grouped_linear, sum_pairs, take_rows
from models.experts.pairs import Pairs
from models.feedforward import ACTIVATIONS, Mlp, Swiglu
from models.linear import Drawn, residual_std
from models.products import linear

FEW = 4  # pairs an expert, on average, up to which one padded product for all experts is quicker than one for each


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

    def forward(self, x: Tensor, pairs: Pairs) -> Tensor:
        """x (N, D) -> (N, D): the sum over a token's pairs of weight times what the expert makes of it.

        Computed in the autocast dtype where autocast is on, and in that of x otherwise.
        """
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if device == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if len(x) == 1:
                return self._one_token(x.to(dtype), pairs)
            if self.count <= len(pairs.experts) <= FEW * self.count and dtype in (torch.float32, torch.float64):
                return self._few_tokens(x.to(dtype), pairs)
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

    def _few_tokens(self, x: Tensor, pairs: Pairs) -> Tensor:
        """As `forward` for a few rows an expert, on CPU: each map is one batched product, padded to the fullest expert.

        So few rows take as long as it takes to read the weights, and padding adds nothing to that.
        """
        experts, order = pairs.experts.sort(stable=True)
        counts = torch.bincount(experts, minlength=self.count + 1)  # (E + 1,), dropped ones last
        kept = len(experts) - int(counts[-1])
        experts, order = experts[:kept], order[:kept]
        most = int(counts[:-1].max())  # C
        first = (counts.cumsum(0) - counts).index_select(0, experts)  # (P,)
        slots = experts * most + torch.arange(kept) - first  # (P,) of E C
        tokens = pairs.tokens.index_select(0, order)
        padded = x.new_zeros(self.count * most, x.shape[1]).index_copy_(0, slots, x.index_select(0, tokens))

        def apply(name: str, rows: Tensor) -> Tensor:
            y = torch.bmm(rows, getattr(self, name).to(x.dtype).mT)
            bias = getattr(self, f"{name}_bias")
            return y if bias is None else y + bias.to(x.dtype)[:, None]

        y = self._network(padded.view(self.count, most, x.shape[1]), apply)  # (E, C, D)
        y = y.flatten(0, 1).index_select(0, slots) * pairs.weights.index_select(0, order)[:, None].to(x.dtype)
        return torch.zeros_like(x).index_add_(0, tokens, y)

    def _one_token(self, x: Tensor, pairs: Pairs) -> Tensor:
        """As `forward` for x (1, D), on CPU: with so little to compute, sorting and grouping would take longer.

        Any two experts are a slice of the stack, so that each map is one batched product for two; not in bf16, where
        batched products of a row take three times as long.
        """
        total = x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
        counted: dict[int, float] = {}
        for expert, weight in zip(pairs.experts.tolist(), pairs.weights.tolist(), strict=True):
            counted[expert] = counted.get(expert, 0.0) + weight
        counted.pop(self.count, None)
        experts = sorted(counted)
        together = 1 if x.dtype == torch.bfloat16 else 2
        for begin in range(0, len(experts), together):
            these = experts[begin : begin + together]
            step = max(1, these[-1] - these[0])
            where = these[0] if together == 1 else slice(these[0], these[-1] + 1, step)

            def apply(name: str, rows: Tensor, where: int | slice = where) -> Tensor:
                weight, bias = getattr(self, name)[where].to(x.dtype), getattr(self, f"{name}_bias")
                y = linear(rows, weight) if together == 1 else torch.bmm(rows, weight.mT)
                return y if bias is None else y + bias[where].to(x.dtype).unsqueeze(-2)

            y = self._network(x if together == 1 else x.expand(len(these), 1, -1), apply)
            for expert, row in zip(these, y.to(total.dtype).view(len(these), 1, -1), strict=True):  # (1, D) each
                total.add_(row, alpha=counted[expert])
        return total.to(x.dtype)
