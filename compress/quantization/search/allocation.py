"""Bit allocation: bits per layer with the least sum of divergences under a budget of bytes.

    minimise  sum_l sum_b c_lb x_lb    subject to  sum_b x_lb = 1,  sum_lb s_lb x_lb <= budget,  x_lb in {0, 1}

with c_lb as `sensitivity` measures it, and s_lb the bytes of layer l at b bits as they lie on disk. The sum stands for
the divergence of all layers together, which it need not be: what the plan is worth shows on held-out text. Solved
exactly, as an integer program (SciPy's HiGHS).
"""

import json
import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array
from torch import Tensor, nn

from compress.quantization.formats.packed import Packed
from models.errors import UserError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_DTYPES = {  # in the order in which a file holds them
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def allocate(costs: Sequence[Mapping[int, float]], sizes: Sequence[Mapping[int, int]], budget: int) -> list[int]:
    """The bits of each layer.

    Args:
        costs: for each layer, bits -> divergence, at least 0.
        sizes: for each layer, bits -> bytes.
        budget: bytes of all layers together, at most; at least the sum of the smallest.
    """
    choices = [(layer, bits) for layer, size in enumerate(sizes) for bits in size]
    cost = np.array([costs[layer][bits] for layer, bits in choices])
    size = np.array([sizes[layer][bits] for layer, bits in choices])
    least = sum(min(layer.values()) for layer in sizes)
    if budget < least:
        raise ValueError(f"{budget} bytes are fewer than the {least} of the smallest plan")
    places = ([layer for layer, _ in choices], range(len(choices)))
    owner = coo_array((np.ones(len(choices)), places), shape=(len(sizes), len(choices))).tocsr()
    above = size - np.array([min(sizes[layer].values()) for layer, _ in choices])  # what is left to decide
    objective = cost * (1e3 / max(cost.max(), 1e-300))  # the solver's own tolerances are absolute
    room = budget
    while True:
        scale = max(1, room - least)
        within = LinearConstraint(above[None] / scale, -np.inf, (room - least) / scale)
        constraints = [LinearConstraint(owner, 1, 1), within]
        found = milp(
            objective,
            integrality=np.ones(len(choices)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            raise RuntimeError(f"the integer program was not solved: {found.message}")
        taken = [choice for choice, x in zip(choices, found.x, strict=True) if x > 0.5]
        excess = sum(sizes[layer][bits] for layer, bits in taken) - budget
        if excess <= 0:
            return [bits for _, bits in sorted(taken)]
        room -= excess  # within the solver's tolerance of the budget, and over it


def read_bytes(text: str | int) -> int:
    """The bytes that `20MB`, `512 KiB` or a plain number stand for. Raises UserError for anything else."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-z]*)\s*", str(text).lower())
    if found is None or found[2] not in _UNITS:
        raise UserError(f"budget_bytes is {text!r}; it must be a number of bytes such as 20MB, 512KiB or 1500000")
    return int(float(found[1]) * _UNITS[found[2]])


def file_bytes(model: nn.Module, packed: Mapping[str, Packed]) -> int:
    """Bytes of the one safetensors file of a model, were the modules named stored packed.

    Args:
        model: dense, or partly packed, as it would be saved.
        packed: name of a linear layer or embedding -> the packed module that takes its place, on any device.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        path, _, last = name.rpartition(".")
        if path not in packed:
            tensors[name] = tensor
        elif last == "bias":
            tensors[name] = torch.empty(tensor.shape, dtype=torch.float32, device="meta")  # packed layers keep it so
    for path, module in packed.items():
        tensors |= {f"{path}.{name}": tensor for name, tensor in module.state_dict().items()}
    # the header: 8 bytes of length, then JSON padded to a multiple of 8, tensors of one dtype together
    order = list(_DTYPES)
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0])):
        end = offset + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + offset
