"""Model size: parameters, bytes on disk and in memory; of the model and of each layer.

parameters            weights of the architecture as it stands (a packed tensor counts the weights it stands for)
active_parameters     those that take part in one token: all, but of experts only those that it chooses
nonzero_parameters    those that are not zero once unpacked
stored_bytes          what the file system says of the weight files; without a folder, what its tensors would take
memory_bytes          the weights as they are held when the model runs (repacked for a kernel where it wants that)
cache_bytes           the cache of one sequence as long as the model's context
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.quantization.kernels.dispatch import kernel_for
from models.experts import StackedExperts
from models.io import weight_files
from models.mixture_of_depths import DepthRouter
from models.positions.transformer_xl import DistanceMap
from models.transformer import Transformer
from models.weight_formats import form_of

BLOCK = re.compile(r"blocks\.(\d+)\.(.*)")


@dataclass(frozen=True)
class LayerSize:
    """One module that holds weights.

    `bits`: stored bits per weight, scales and bias included. `bytes`: in memory. `flops`: forward, for one token, the
    mean over tokens where not every token takes part; 0 for an embedding unless it is also the head. `kernel`: what it
    runs through at batch 1, and up to `largest_batch` tokens at once (None: any number); above, the dense product.
    """

    name: str
    shape: tuple[int, ...]
    form: str
    bits: float
    sparsity: float
    parameters: int
    bytes: int
    flops: int
    kernel: str
    largest_batch: int | None

    def to_dict(self) -> dict:
        """As JSON values."""
        return asdict(self) | {"shape": list(self.shape)}


def holders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold weights themselves, with their names; a packed module stands for all that is inside it."""
    packed: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if packed and name.startswith(packed):
            continue
        if form_of(module) is not None:
            packed += (f"{name}.",)
            yield name, module
        elif any(True for _ in module.parameters(recurse=False)):
            yield name, module


def dense_tensors(module: nn.Module) -> list[Tensor]:
    """The weights of one module, unpacked: its weight first, then what else it holds."""
    if form_of(module) is None:
        named = dict(module.named_parameters(recurse=False))
        return [named[name] for name in sorted(named, key=lambda name: name != "weight")]
    bias = getattr(module, "bias", None)
    return [module.dequantize(), *([bias] if isinstance(bias, Tensor) else [])]


def stored_tensors(module: nn.Module) -> list[Tensor]:
    """Tensors that the module writes to disk: also buffers, such as the threshold of a router."""
    if form_of(module) is not None:
        return list(module.state_dict().values())
    buffers = [one for name, one in module.named_buffers(recurse=False) if name in module.state_dict()]
    return [*module.parameters(recurse=False), *buffers]


def nbytes(tensors: list[Tensor]) -> int:
    """Bytes of these tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def held_bytes(module: nn.Module) -> int:
    """Bytes that the module's weights take in memory, with the buffers that are stored beside them."""
    return module.memory_bytes() if form_of(module) is not None else nbytes(stored_tensors(module))


@torch.no_grad()
def layer_sizes(model: Transformer) -> list[LayerSize]:
    """The table of `espalier inspect`: every module that holds weights, in the order of the model."""
    rows = []
    for name, module in holders(model):
        tensors = dense_tensors(module)
        weight, total = tensors[0], sum(tensor.numel() for tensor in tensors)
        nonzero = sum(int(torch.count_nonzero(tensor)) for tensor in tensors)
        choice = kernel_for(module, device_of(model), dtype=dtype_of(model)) if multiplies(module) else None
        held = held_bytes(module)  # first: reading the state dict brings the stored layout back
        rows.append(
            LayerSize(
                name=name,
                shape=tuple(weight.shape),
                form=form_of(module) or str(weight.dtype).removeprefix("torch."),
                bits=8 * nbytes(stored_tensors(module)) / total,
                sparsity=1 - nonzero / total,
                parameters=total,
                bytes=held,
                flops=round(share(model, name, module) * flops(model, module, tensors)),
                kernel=choice.name if choice else "",
                largest_batch=choice.largest_batch if choice else None,
            )
        )
    return rows


def share(model: Transformer, name: str, module: nn.Module) -> float:
    """The share of the tokens that the module `name` runs on: of those that take part in its layer, and choose it."""
    place = BLOCK.match(name)
    if place is None or isinstance(module, DepthRouter):
        return 1
    layer = model.config.layers[int(place[1])]
    chosen = place[2].startswith("feedforward.experts")
    return layer.share * (layer.feedforward.top_k / layer.feedforward.count if chosen else 1)


def flops(model: Transformer, module: nn.Module, tensors: list[Tensor]) -> int:
    """Forward FLOPs of one module for one token that it runs on: two for each weight of a matrix product."""
    weight = tensors[0]
    if isinstance(module, StackedExperts):
        return sum(2 * stack.numel() for stack in tensors if stack.ndim == 3)
    if module is model.embedding:
        return 2 * weight.numel() if model.head is None else 0
    if isinstance(module, DistanceMap):  # maps one distance more for each token, and multiplies each key by u
        return 2 * (weight.numel() + module.u.numel())
    return 2 * weight.numel() if isinstance(module, nn.Linear | DepthRouter) or form_of(module) is not None else 0


def multiplies(module: nn.Module) -> bool:
    """Whether the module is a matrix that a product or a lookup goes through."""
    return isinstance(module, nn.Linear | nn.Embedding) or form_of(module) is not None


def device_of(model: nn.Module) -> torch.device:
    """The device that holds the model's first parameter."""
    return next(model.parameters()).device


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype that the model computes in: that of its first parameter."""
    return next(model.parameters()).dtype


def kernels(model: Transformer) -> list[dict]:
    """Kernels of the matrices at batch 1: [{"kernel", "modules", "reason", "largest_batch", "layers"}].

    `reason`: why none is packed. `largest_batch`: tokens at once above which the dense product takes over, or None.
    """
    found: dict[tuple[str, str, int | None], list[str]] = {}
    for name, module in holders(model):
        if multiplies(module):
            choice = kernel_for(module, device_of(model), dtype=dtype_of(model))
            found.setdefault((choice.name, choice.reason, choice.largest_batch), []).append(name)
    return [
        {"kernel": kernel, "modules": len(names), "reason": reason, "largest_batch": largest, "layers": names}
        for (kernel, reason, largest), names in found.items()
    ]


@torch.no_grad()
def size_figures(model: Transformer, folder: str | Path | None = None) -> dict:
    """The `size` block of report.json.

    Args:
        model: the model as it runs.
        folder: that it was loaded from or saved to. Without one `stored_bytes` is the sum over the state dict.
    """
    modules = list(holders(model))
    tensors = [tensor for _, module in modules for tensor in dense_tensors(module)]
    total = sum(tensor.numel() for tensor in tensors)
    counts = model.count_parameters()
    return {
        "parameters": total,
        "active_parameters": total - (counts["total"] - counts["active"]),
        "nonzero_parameters": sum(int(torch.count_nonzero(tensor)) for tensor in tensors),
        "stored_bytes": stored_bytes(model, folder),
        "memory_bytes": sum(held_bytes(module) for _, module in modules),
        "cache_bytes": model.cache_bytes(model.config.context, dtype_of(model)),
    }


def stored_bytes(model: nn.Module, folder: str | Path | None) -> int:
    """Bytes of the weight files in the folder, or, without a folder, of the tensors that would be written."""
    if folder is not None:
        return sum(path.stat().st_size for path in weight_files(Path(folder)))
    return nbytes(list(model.state_dict().values()))
