"""Look-up table format: a table of 2^b values per row, an index per weight, and sparse outliers (arXiv 2306.07629).

    weight[n, k] = values[s]               where entry s of the sparse part is at (n, k)
                   table[n, code[n, k]]    elsewhere

which is the form of SqueezeLLM's dense-and-sparse decomposition (arXiv 2306.07629, section 4.2).

Speed. PyTorch has no product that reads a table for each row, so every call looks the weights up and multiplies:
smaller than dense weights, and not faster. The look-up takes neighbours together, from a table of their 4-bit pairs,
3-bit pairs or 2-bit quadruples that is made in the call. Measured with torch 2.13 on one core (AVX-512, no AMX) that
other work shared, the best of 60 calls, a 2048 x 2048 layer in bf16 with 0.5 % apart, one row of x, in ms:

    bits                     2           3           4           dense bf16
    this layer               14          21          9.4         0.46
    looked up one by one     97          85          38

After torch.compile the same loops take 6 to 7 for one by one and for pairs alike, where these 4-bit pairs take 3 (on an
idle core), so a compiled look-up is not used.

N rows (outputs, or vocabulary), K columns (inputs, or width), S sparse entries.
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compress.quantization.formats.bit_packing import pack, packed_bytes, unpack
from compress.quantization.formats.packed import Packed, PackedEmbedding, PackedLinear
from compress.quantization.kernels.dispatch import Choice
from models.errors import UserError, did_you_mean
from models.registry import read_dataclass

BITS = (2, 3, 4)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
NARROW = torch.iinfo(torch.int16).max  # columns and counts up to here take two bytes


@dataclass(frozen=True)
class LookupFormat:
    """Layout of the look-up tables.

    Args:
        bits: of an index: 2, 3 or 4.
        dtype: `bfloat16` or `float16`, of the tables and of the sparse values.

    Raises:
        UserError: a value that is none of these.
    """

    bits: int = 4
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in BITS:
            raise UserError(f"bits of a look-up must be one of {', '.join(map(str, BITS))}, got {self.bits!r}")
        if self.dtype not in DTYPES:
            raise UserError(f"unknown dtype {self.dtype!r} of a table{did_you_mean(str(self.dtype), DTYPES)}")

    @property
    def entries(self) -> int:
        """Values in the table of a row."""
        return 2**self.bits


@dataclass(frozen=True)
class StoredLookup(LookupFormat):
    """Format of a matrix: its tables, and `sparse`, the number of outliers that are stored in full precision."""

    sparse: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.sparse, bool) or not isinstance(self.sparse, int) or self.sparse < 0:
            raise UserError(f"sparse must be a number of weights, got {self.sparse!r}")

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


class Sparse(NamedTuple):
    """Single weights, row by row, ascending in a row.

    Attributes:
        counts: (N,) how many a row has; int16, or int32 where a row is wider than that can say. So are the columns.
        columns: (S,).
        values: (S,) bf16 or fp16.
    """

    counts: Tensor
    columns: Tensor
    values: Tensor

    @classmethod
    def of(cls, weight: Tensor, mask: Tensor, dtype: torch.dtype) -> "Sparse":
        """The weights (N, K) at `mask` (N, K) bool."""
        index = _index_dtype(weight.shape[1])
        return cls(mask.sum(1).to(index), mask.nonzero()[:, 1].to(index), weight[mask].to(dtype))

    def rows(self) -> Tensor:
        """The row (S,) int64 of each entry."""
        numbers = torch.arange(len(self.counts), device=self.counts.device)
        return numbers.repeat_interleave(self.counts.long(), output_size=len(self.columns))

    def cut(self, start: int, stop: int) -> "Sparse":
        """The sparse part of the rows from `start` to `stop`."""
        first, last = (int(self.counts[:row].sum()) for row in (start, stop))
        return Sparse(self.counts[start:stop], self.columns[first:last], self.values[first:last])

    def pick(self, index: Tensor) -> "Sparse":
        """The sparse part of the rows `index` (n,)."""
        counts = self.counts[index].long()  # (n,)
        skipped = self.counts.long().cumsum(0)[index] - counts.cumsum(0)  # of the whole, less of those picked
        places = skipped.repeat_interleave(counts)
        places += torch.arange(len(places), device=places.device)
        return Sparse(counts, self.columns[places], self.values[places])

    def put(self, weight: Tensor) -> Tensor:
        """Set the entries in `weight` (N, K)."""
        weight[self.rows(), self.columns.long()] = self.values.to(weight.dtype)
        return weight


class Looked(NamedTuple):
    """A weight matrix as indices.

    Attributes:
        codes: (N, K) uint8; those at a sparse entry mean nothing.
        table: (N, 2^b) bf16 or fp16.
        sparse: what stands apart, or None.
        tables: their format.
    """

    codes: Tensor
    table: Tensor
    sparse: Sparse | None
    tables: LookupFormat

    @property
    def format(self) -> StoredLookup:
        """Format of the matrix."""
        return StoredLookup(**asdict(self.tables), sparse=0 if self.sparse is None else len(self.sparse.columns))

    def dequantize(self) -> Tensor:
        """The weights (N, K) fp32, exactly."""
        weight = self.table.float().gather(1, self.codes.long())
        return weight if self.sparse is None else self.sparse.put(weight)


def _index_dtype(width: int) -> torch.dtype:
    return torch.int16 if width <= NARROW else torch.int32


def look_up(packed: Tensor, table: Tensor, bits: int, width: int) -> Tensor:
    """The weights (N, width) of packed codes (N, packed_bytes) and tables (N, 2^bits), in the dtype of the tables."""
    span = 4 if bits == 2 else 2  # codes looked up at once: all in a byte, or two of 3 bits
    word = {2: torch.int32, 4: torch.int64}[span]
    index = packed.long() if bits != 3 else _pairs(packed)
    entries = table.shape[1]
    several = table.new_empty(len(table), *[entries] * span, span)
    for i in range(span):  # the first code is in the lowest bits, and so its values are those of the last dimension
        several[..., i] = table.view(-1, *[entries if i == span - 1 - place else 1 for place in range(span)])
    several = several.view(len(table), -1).view(word)  # (N, 2^(b span))
    return several.gather(1, index).view(table.dtype)[:, :width]


def _pairs(packed: Tensor) -> Tensor:
    """Two 3-bit codes at a time (N, 4 / 3 of the bytes) int64, of packed codes: 8 codes in 3 bytes."""
    low, middle, high = packed.view(len(packed), -1, 3).int().unbind(-1)  # (N, words)
    word = low | (middle << 8) | (high << 16)
    pairs = word.new_empty(*word.shape, 4, dtype=torch.int64)
    for i in range(4):
        pairs[..., i] = (word >> (6 * i)) & 63
    return pairs.flatten(1)


class Lookup(Packed):
    """Indices of a matrix (N, K) into a table for each row, packed at their true size, and its sparse part.

    Buffers: `codes` (N, packed_bytes(K)) uint8, `table` (N, 2^b), and where S > 0 the tensors of `Sparse`.
    """

    def __init__(self, rows: int, width: int, format: StoredLookup, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(rows, width, format, dtype)
        stored, index = DTYPES[format.dtype], _index_dtype(width)
        self.register_buffer("codes", torch.empty(rows, packed_bytes(width, format.bits), dtype=torch.uint8))
        self.register_buffer("table", torch.empty(rows, format.entries, dtype=stored))
        if format.sparse:
            self.register_buffer("counts", torch.empty(rows, dtype=index))
            self.register_buffer("columns", torch.empty(format.sparse, dtype=index))
            self.register_buffer("values", torch.empty(format.sparse, dtype=stored))

    @staticmethod
    def read_format(spec: dict[str, Any]) -> StoredLookup:
        return read_dataclass(StoredLookup, spec, "look-ups")

    def fill(self, looked: Looked) -> None:
        self.codes = pack(looked.codes, self.format.bits)
        self.table = looked.table.contiguous()
        if looked.sparse is not None:
            self.counts, self.columns, self.values = looked.sparse

    @property
    def sparse(self) -> Sparse | None:
        """What stands apart."""
        return Sparse(self.counts, self.columns, self.values) if self.format.sparse else None

    def dense(self, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        bits, width = self.format.bits, self.shape[1]
        weight = look_up(self.codes[start:stop], self.table[start:stop], bits, width).to(dtype)
        return self.sparse.cut(start, stop).put(weight) if self.format.sparse else weight

    def rows(self, index: Tensor) -> Tensor:
        codes = unpack(self.codes[index], self.format.bits, self.shape[1])  # (n, K)
        rows = self.table[index].gather(1, codes.long()).to(self.dtype)
        return self.sparse.pick(index).put(rows) if self.format.sparse else rows

    def stored_bytes(self) -> int:
        names = ("codes", "table", "counts", "columns", "values")
        return sum(tensor.nbytes for name, tensor in self.named_buffers() if name in names)

    def choice(self, device: str, batch: int, dtype: torch.dtype) -> Choice:
        return Choice(None, "look up, then matmul", "no kernel reads a table for each row")


class LookupLinear(PackedLinear, Lookup):
    """`nn.Linear` by look-up."""


class LookupEmbedding(PackedEmbedding, Lookup):
    """`nn.Embedding` by look-up."""
