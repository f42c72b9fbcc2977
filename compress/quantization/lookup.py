"""Weights by number: each row has a table of 2^b values, each weight is the index of one, and a few stand apart.

    weight[n, k] = values[s]               where entry s of the sparse part is at (n, k)
                   table[n, code[n, k]]    elsewhere

which is the form of SqueezeLLM's dense-and-sparse decomposition (arXiv 2306.07629, section 4.2).

Numerics. As in `linear.py`: `dequantize()` is the weight, equal to the bit to what was optimised; an input is
multiplied with `dequantize()` rounded to its dtype. Packed tensors keep their dtypes, an embedding's output follows
`.to(dtype)`. Gradients flow to the input only.

Speed. PyTorch has no product that reads a table for each row, so every call looks the weights up and multiplies:
smaller than dense weights, and not faster. The look-up takes neighbours together, from a table of their 4-bit pairs,
3-bit pairs or 2-bit quadruples that is made in the call. Measured with torch 2.13 on one core (AVX-512, no AMX), a
2048 x 2048 layer in bf16, one row of x, in ms: dense 0.36 to 0.5; looked up one by one 26; 4-bit pairs 3.4, 3-bit pairs
9.7. After torch.compile either way takes 6 to 7 at both widths, so a compiled look-up is not used.

N rows (outputs, or vocabulary), K columns (inputs, or width), S sparse entries.
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compress.quantization.kernels import Choice
from compress.quantization.storage import pack, packed_bytes, unpack
from models.errors import UserError, did_you_mean
from models.products import linear

BITS = (2, 3, 4)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
NARROW = torch.iinfo(torch.int16).max  # columns and counts up to here take two bytes


@dataclass(frozen=True)
class LookupFormat:
    """How the tables lie.

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
        format: how it lies.
    """

    codes: Tensor
    table: Tensor
    sparse: Sparse | None
    format: LookupFormat

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
    if bits == 3:
        codes = unpack(packed, bits, packed.shape[1] // 3 * 8)
        packed = codes[:, ::2] | (codes[:, 1::2] << 3)  # (N, pairs)
    index = torch.arange(table.shape[1] ** span, device=table.device)
    parts = torch.stack([(index >> (bits * i)) & (2**bits - 1) for i in range(span)], dim=1)  # (2^(b span), span)
    several = table.index_select(1, parts.flatten()).view(word)  # (N, 2^(b span))
    return several.gather(1, packed.long()).view(table.dtype)[:, :width]


class Lookup(nn.Module):
    """Indices of a matrix (N, K) into a table for each row, packed at their true size, and its sparse part.

    Buffers: `codes` (N, packed_bytes(K)) uint8, `table` (N, 2^b), and where S > 0 the tensors of `Sparse`.
    """

    def __init__(
        self, rows: int, width: int, format: LookupFormat, sparse: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.shape, self.format, self.entries, self.dtype = (rows, width), format, sparse, dtype
        stored = DTYPES[format.dtype]
        self.register_buffer("codes", torch.empty(rows, packed_bytes(width, format.bits), dtype=torch.uint8))
        self.register_buffer("table", torch.empty(rows, format.entries, dtype=stored))
        if sparse:
            index = _index_dtype(width)
            self.register_buffer("counts", torch.empty(rows, dtype=index))
            self.register_buffer("columns", torch.empty(sparse, dtype=index))
            self.register_buffer("values", torch.empty(sparse, dtype=stored))

    def spec(self) -> dict[str, Any]:
        """The numbers of the form, as JSON values."""
        return {**asdict(self.format), "sparse": self.entries}

    def fill(self, looked: Looked) -> None:
        """Take over quantized weights."""
        self.codes = pack(looked.codes, self.format.bits)
        self.table = looked.table.contiguous()
        if looked.sparse is not None:
            self.counts, self.columns, self.values = looked.sparse

    @property
    def sparse(self) -> Sparse | None:
        """What stands apart."""
        return Sparse(self.counts, self.columns, self.values) if self.entries else None

    def dequantize(self) -> Tensor:
        """The dense weight (N, K) fp32 that the codes stand for."""
        return self._dense(torch.float32)

    def memory_bytes(self) -> int:
        """Bytes of the weights as they are held (and of a bias)."""
        return sum(tensor.nbytes for tensor in self.buffers())

    def stored_bytes(self) -> int:
        """Bytes of codes, tables and sparse part on disk, with all padding."""
        names = ("codes", "table", "counts", "columns", "values")
        return sum(tensor.nbytes for name, tensor in self.named_buffers() if name in names)

    def choice(self, device: str, batch: int, dtype: torch.dtype) -> Choice:
        """Through what `batch` rows of x in `dtype` run on a device type."""
        return Choice(None, "look up, then matmul", "no kernel reads a table for each row")

    def multiply(self, x: Tensor) -> Tensor:
        """x (..., K) times the transposed weights: (..., N) in the dtype of x, or of autocast."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        return linear(x, self._dense(x.dtype))

    def _dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (N, K), rounded once to `dtype`."""
        weight = look_up(self.codes, self.table, self.format.bits, self.shape[1]).to(dtype)
        return self.sparse.put(weight) if self.entries else weight

    def _apply(self, fn, recurse: bool = True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


def _read(spec: dict[str, Any]) -> tuple[LookupFormat, int]:
    """Format and number of sparse entries of a form's spec. Raises UserError for what it cannot be."""
    spec = dict(spec)
    sparse = spec.pop("sparse", 0)
    if isinstance(sparse, bool) or not isinstance(sparse, int) or sparse < 0:
        raise UserError(f"sparse must be a number of entries, got {sparse!r}")
    try:
        return LookupFormat(**spec), sparse
    except TypeError:
        raise UserError(f"look-ups are described by bits, dtype and sparse; got {', '.join(spec)}") from None


def _entries(looked: Looked) -> int:
    return 0 if looked.sparse is None else len(looked.sparse.columns)


class LookupLinear(Lookup):
    """`nn.Linear` by look-up: x (..., K) -> (..., N). A bias is kept in fp32 and added in the dtype of x."""

    def __init__(
        self,
        rows: int,
        width: int,
        format: LookupFormat,
        sparse: int = 0,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(rows, width, format, sparse, dtype)
        self.out_features, self.in_features = rows, width
        self.register_buffer("bias", torch.empty(rows, dtype=torch.float32) if bias else None)

    @classmethod
    def empty(cls, module: nn.Linear, spec: dict[str, Any]) -> "LookupLinear":
        """The layer that takes the place of `module`, its tensors yet to be loaded."""
        spec = dict(spec)
        bias = spec.pop("bias", False)
        return cls(module.out_features, module.in_features, *_read(spec), bias, module.weight.dtype)

    @classmethod
    def of(cls, module: nn.Linear, looked: Looked) -> "LookupLinear":
        """The layer that takes the place of `module`, with these weights and the module's bias."""
        bias = module.bias is not None
        size = module.out_features, module.in_features
        new = cls(*size, looked.format, _entries(looked), bias, module.weight.dtype)
        new.fill(looked)
        if bias:
            new.bias = module.bias.detach().float().clone()
        return new

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "bias": self.bias is not None}

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiply(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.format}, {self.entries} sparse"


class LookupEmbedding(Lookup):
    """`nn.Embedding` by look-up: tokens (...) -> (..., K); `project` makes it the head of a tied model."""

    def __init__(
        self, rows: int, width: int, format: LookupFormat, sparse: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(rows, width, format, sparse, dtype)
        self.num_embeddings, self.embedding_dim = rows, width

    @classmethod
    def empty(cls, module: nn.Embedding, spec: dict[str, Any]) -> "LookupEmbedding":
        """The layer that takes the place of `module`, its tensors yet to be loaded."""
        return cls(module.num_embeddings, module.embedding_dim, *_read(spec), module.weight.dtype)

    @classmethod
    def of(cls, module: nn.Embedding, looked: Looked) -> "LookupEmbedding":
        """The layer that takes the place of `module`, with these weights."""
        new = cls(*module.weight.shape, looked.format, _entries(looked), module.weight.dtype)
        new.fill(looked)
        return new

    def forward(self, tokens: Tensor) -> Tensor:
        index = tokens.reshape(-1)  # (n,)
        codes = unpack(self.codes[index], self.format.bits, self.shape[1])  # (n, K)
        rows = self.table[index].gather(1, codes.long()).to(self.dtype)
        if self.entries:
            rows = self.sparse.pick(index).put(rows)
        return rows.view(*tokens.shape, self.shape[1])

    def project(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., K)."""
        return self.multiply(hidden)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format}, {self.entries} sparse"
