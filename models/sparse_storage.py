"""Sparse tensors in a model folder: a bit mask and the values that are not zero, in place of the zeros themselves.

A weight `NAME` with many zeros lies in the files as `NAME.mask`, one bit a weight, and `NAME.values`; `config.json`
lists it under `sparse`. It is a way of storing alone: a model that is loaded holds the dense weight, zeros and all. At
16 bits it takes 1/16 + (1 - sparsity) of the bytes.
"""

from collections.abc import Collection, Iterator, Mapping
from math import ceil, prod

import numpy as np
import torch
from torch import Tensor

from models.errors import UserError
from models.io import TensorFiles

SPARSEST = 0.2  # share of zeros from which a weight is stored so
MASK, VALUES = ".mask", ".values"


def is_sparse(tensor: Tensor) -> bool:
    """Whether a weight has zeros enough to be stored without them."""
    return tensor.dim() > 1 and int(torch.count_nonzero(tensor)) <= (1 - SPARSEST) * tensor.numel()


def pack(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the bits, uint8 (ceil(numbers / 8),), and of the values (those that are not zero,)."""
    kept = tensor != 0
    yield name + MASK, torch.from_numpy(np.packbits(kept.cpu().numpy()))
    yield name + VALUES, tensor[kept]


def unpack(bits: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The dense tensor, on the CPU. Raises UserError unless there is a value for each bit that is set."""
    kept = torch.from_numpy(np.unpackbits(bits.numpy(), count=prod(shape)).astype(bool)).view(shape)
    if (wanted := int(kept.sum())) != len(values):
        raise UserError(f"the mask keeps {wanted} weights, and there are {len(values)} values")
    return torch.zeros(shape, dtype=values.dtype).masked_scatter_(kept, values)


class DenseTensors(Mapping[str, Tensor]):
    """The tensors of a folder by the names that its model knows them by; sparse ones are made dense when they are read.

    Args:
        files: of the folder.
        sparse: the names that `config.json` lists.
        shapes: of every tensor of the model.

    Raises:
        UserError: the files do not hold exactly these tensors in these shapes.
    """

    def __init__(self, files: TensorFiles, sparse: Collection[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
        if unknown := sorted(set(sparse) - shapes.keys()):
            raise UserError(f"sparse: {unknown[0]!r} is no tensor of this architecture")
        self._files, self._sparse, self._shapes = files, set(sparse), shapes
        expected = {}
        for name, shape in shapes.items():
            if name not in self._sparse:
                expected[name] = shape
                continue
            values = files.shape(name + VALUES) if name + VALUES in files else (0,)
            expected |= {name + MASK: (ceil(prod(shape) / 8),), name + VALUES: (prod(values),)}
        files.check(expected)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._sparse:
            return self._files[name]
        bits, values = self._files[name + MASK], self._files[name + VALUES]
        if bits.dtype != torch.uint8:
            raise UserError(f"the tensor {name + MASK} is stored as {bits.dtype}; a mask is torch.uint8")
        try:
            return unpack(bits, values, self._shapes[name])
        except UserError as error:
            raise UserError(f"the sparse tensor {name} in {self._files.folder}: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
