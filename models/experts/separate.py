"""One module an expert, run one after another: the plain reference, and what compression reads and replaces.

N tokens, P pairs of a token and an expert, E experts, D model width.
"""

import torch
from torch import Tensor, nn

from models.experts.assignments import Assignments
from models.feedforward import Mlp, Swiglu


class SeparateExperts(nn.ModuleList):
    """E feed-forwards of their own; each sees exactly its tokens, in the order of the pairs.

    In training an expert without tokens runs on none: its gradients are zero, and not missing, which is what
    distributed data parallelism waits for. Otherwise it does not run at all.
    """

    def __init__(self, count: int, expert: Swiglu | Mlp, width: int, branches: int) -> None:
        super().__init__(expert.build(width, branches) for _ in range(count))

    @torch.compiler.disable  # how many tokens an expert has is known only as it runs
    def forward(self, x: Tensor, pairs: Assignments) -> Tensor:
        """x (N, D) -> (N, D): the sum over a token's pairs of weight times what the expert makes of it."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        total = x.new_zeros(x.shape, dtype=torch.promote_types(dtype, torch.float32))
        for number, expert in enumerate(self):
            mine = (pairs.experts == number).nonzero()[:, 0]
            if len(mine) or self.training:
                tokens = pairs.tokens[mine]
                y = expert(x[tokens]) * pairs.weights[mine, None].to(total.dtype)
                total = total.index_add(0, tokens, y.to(total.dtype))
        return total.to(dtype)
