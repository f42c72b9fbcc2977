"""Layers whose weights are codewords: each row is cut into sub-vectors, and each of those is an index.

Numerics. As in `packed.py`; codewords are rounded to bf16 before the indices are chosen. One row of x, of any dtype,
is multiplied by way of a table of its sub-vectors' products with the codewords, from which every output adds up its own
in fp32; more rows are multiplied with the weight rounded to the dtype of x, in the order in which its columns were cut.

Measured with torch 2.13 on one core (AVX-512 with bf16, no AMX), a 2048 x 2048 layer of 256 codewords, one row of x in
bf16, in ms:

    length of a sub-vector                  4       8
    table, then a gather of its entries     1.5     0.9
    dequantize, then matmul                 1.8     1.5
    dense bf16                              0.7     0.5

The table costs the same again for every further row, the dequantized product nothing: it wins from two rows on. Neither
is faster than dense weights: what such a layer saves is memory.

N outputs (or vocabulary), K inputs (or width), v length of a sub-vector, B = ceil(K / v) sub-vectors a row, C codewords
of a codebook, R codebooks that are added up (2 with a residual one), G groups of columns with codebooks of their own.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.quantization.formats.bit_packing import pack, packed_bytes, unpack
from compress.quantization.formats.packed import Packed, PackedEmbedding, PackedLinear
from compress.quantization.kernels.dispatch import Choice
from models.cpu.matmul import linear
from models.errors import UserError
from models.registry import read_dataclass

INDEX_BITS = (2, 3, 4, 8)  # what `storage.pack` holds
CODEWORD = torch.bfloat16
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}  # one element a codeword of that size
LARGEST_BATCH = 1  # rows of x above which dequantizing is faster than a table for each


@dataclass(frozen=True)
class ProductFormat:
    """Layout of product-quantized weights: codewords and indices.

    Args:
        vector: length of a sub-vector; the last one of a row is padded where it does not divide the width.
        codewords: of a codebook, 2 to 256; an index takes 2, 3, 4 or 8 bits.
        codebooks: 1, or 2 whose codewords are added up.
        group_size: columns that share their codebooks, a multiple of `vector`, or `tensor` for all.
        permuted: whether the columns are cut in an order of their own.

    Raises:
        UserError: a value that is none of these.
    """

    vector: int = 4
    codewords: int = 256
    codebooks: int = 1
    group_size: int | str = "tensor"
    permuted: bool = False

    def __post_init__(self) -> None:
        _whole("vector (the length of a sub-vector)", self.vector, 1, 64)
        _whole("codewords", self.codewords, 2, 256)
        _whole("codebooks", self.codebooks, 1, 2)
        if self.group_size != "tensor":
            _whole("group_size", self.group_size, 1, math.inf, " columns that share a codebook, or tensor")
            if self.group_size % self.vector:
                raise UserError(
                    f"group_size is {self.group_size}; sub-vectors of {self.vector} need a multiple of {self.vector}"
                )
        if not isinstance(self.permuted, bool):
            raise UserError(f"permuted must be true or false, got {self.permuted!r}")

    @property
    def index_bits(self) -> int:
        """Bits of an index as it is stored."""
        return next(bits for bits in INDEX_BITS if 2**bits >= self.codewords)

    def vectors(self, width: int) -> int:
        """B, sub-vectors of a row."""
        return -(-width // self.vector)

    def per_group(self, width: int) -> int:
        """Sub-vectors of a row in one group of columns."""
        whole = self.vectors(width)
        return whole if self.group_size == "tensor" else min(whole, self.group_size // self.vector)

    def groups(self, width: int) -> int:
        """G; the last may be shorter."""
        return -(-self.vectors(width) // self.per_group(width))

    def codebooks_shape(self, width: int) -> tuple[int, int, int, int]:
        """(R, G, C, v)."""
        return self.codebooks, self.groups(width), self.codewords, self.vector

    def codes_width(self, width: int) -> int:
        """Bytes of a row's indices."""
        return packed_bytes(self.codebooks * self.vectors(width), self.index_bits)

    def stored_bytes(self, rows: int, width: int) -> int:
        """Bytes of indices, codebooks and order, with all padding."""
        order = self.vectors(width) * self.vector * order_dtype(self.vectors(width) * self.vector).itemsize
        books = math.prod(self.codebooks_shape(width)) * CODEWORD.itemsize
        return rows * self.codes_width(width) + books + (order if self.permuted else 0)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def _whole(name: str, value: Any, least: int, most: float, what: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        span = f"from {least} to {most}" if most < math.inf else f"of at least {least}"
        raise UserError(f"{name} must be a whole number {span}{what}, got {value!r}")


def order_dtype(columns: int) -> torch.dtype:
    """The smallest integer that numbers so many columns."""
    return torch.int16 if columns <= 2**15 else torch.int32


class Codewords(NamedTuple):
    """A weight matrix as codewords.

    Attributes:
        index: (N, R, B) uint8.
        codebooks: (R, G, C, v) bf16.
        order: (B v,) column of the padded matrix that comes i-th, or None for the given order.
        format: how they lie.
        width: K.
    """

    index: Tensor
    codebooks: Tensor
    order: Tensor | None
    format: ProductFormat
    width: int

    def dequantize(self) -> Tensor:
        """The weights (N, K) fp32."""
        return unarranged(decode(self.index, self.codebooks, self.format), self.order, self.width)


def decode(index: Tensor, codebooks: Tensor, format: ProductFormat, dtype: torch.dtype = torch.float32) -> Tensor:
    """The rows (n, B v), columns in the order in which they were cut, of index (n, R, B) and codebooks (R, G, C, v).

    Sums of codewords are taken in at least fp32. Differentiable in the codebooks.
    """
    count = index.shape[2]
    flat = codebooks.flatten(1, 2)  # (R, G C, v)
    offset = _offsets(format, count, flat.shape[1], index.device)
    parts = [_pick(book, one.int() + offset) for book, one in zip(flat, index.unbind(1), strict=True)]  # (n, B, v)
    if len(parts) == 1:
        return parts[0].flatten(1).to(dtype)
    wide = torch.promote_types(codebooks.dtype, torch.float32)
    return (parts[0].to(wide) + parts[1].to(wide)).flatten(1).to(dtype)


def _offsets(format: ProductFormat, count: int, entries: int, device: torch.device) -> Tensor | int:
    """Offset of the first codeword of each sub-vector's group, (B,) int32."""
    if entries == format.codewords:
        return 0
    group = torch.arange(count, device=device, dtype=torch.int32) // (format.group_size // format.vector)
    return group * format.codewords


def _pick(book: Tensor, index: Tensor) -> Tensor:
    """Codewords (n, B, v) of a book (C, v): copied as one element each where there is one of their size."""
    size = WORDS.get(book.shape[1] * book.element_size())
    compiling = torch.compiler.is_compiling()
    if size is None or book.requires_grad or book.device.type != "cpu" or (compiling and size.itemsize > 8):
        return F.embedding(index, book)
    book = book.contiguous()
    if not compiling and book.data_ptr() % size.itemsize:
        book = book.clone()  # in a file tensors begin anywhere, where loads of 16 bytes would end the process
    picked = book.view(size).flatten().index_select(0, index.flatten())
    return picked.view(book.dtype).view(*index.shape, book.shape[1])


def unarranged(rows: Tensor, order: Tensor | None, width: int) -> Tensor:
    """Rows (n, B v) with their columns back in place and without padding: (n, K)."""
    return rows[:, :width] if order is None else rows[:, order.argsort()[:width]]


class Product(Packed):
    """A matrix (N, K) of codewords.

    Buffers: `codes` (N, ceil(R B b / 8)) uint8, indices of b bits, the first codebook's of a row before the second's;
    `codebooks` (R, G, C, v) bf16; with a permutation `order` (B v,) int16 or int32.
    """

    def __init__(self, rows: int, width: int, format: ProductFormat, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(rows, width, format, dtype)
        self.register_buffer("codes", torch.empty(rows, format.codes_width(width), dtype=torch.uint8))
        self.register_buffer("codebooks", torch.empty(format.codebooks_shape(width), dtype=CODEWORD))
        columns = format.vectors(width) * format.vector
        order = torch.empty(columns, dtype=order_dtype(columns)) if format.permuted else None
        self.register_buffer("order", order)

    @staticmethod
    def read_format(spec: dict[str, Any]) -> ProductFormat:
        return read_dataclass(ProductFormat, spec, "codewords")

    def fill(self, words: Codewords) -> None:
        self.codes = pack(words.index.flatten(1), self.format.index_bits)
        self.codebooks = words.codebooks.contiguous()
        if words.order is not None:
            self.order = words.order.to(self.order.dtype)

    def index(self, codes: Tensor) -> Tensor:
        """The indices (n, R, B) uint8 of packed rows."""
        count = self.format.vectors(self.shape[1])
        books = self.format.codebooks
        return unpack(codes, self.format.index_bits, books * count).view(-1, books, count)

    def dense(self, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        return self._decoded(self.codes[start:stop], dtype)

    def rows(self, index: Tensor) -> Tensor:
        return self._decoded(self.codes[index], self.dtype)

    def _decoded(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        rows = decode(self.index(codes), self.codebooks, self.format, dtype)
        return unarranged(rows, self._order(), self.shape[1])

    def stored_bytes(self) -> int:
        return self.format.stored_bytes(*self.shape)

    def choice(self, device: str, batch: int, dtype: torch.dtype) -> Choice:
        if device != "cpu":
            return Choice(None, "dequantize, then matmul", f"the table of products has not been measured on {device}")
        if batch > LARGEST_BATCH:
            return Choice(None, "dequantize, then matmul", "a table of products pays for one row only")
        return Choice(None, "table of products with the codewords", "", LARGEST_BATCH)

    def unpacked(self, x: Tensor) -> Tensor:
        x, index = self.arranged(x), self.index(self.codes)
        if len(x) == LARGEST_BATCH and x.device.type == "cpu" and not torch.compiler.is_compiling():
            return self.from_table(x[0], index).to(x.dtype)[None]
        return linear(x, decode(index, self.codebooks, self.format, x.dtype))

    def from_table(self, x: Tensor, index: Tensor) -> Tensor:
        """x (B v,) times the transposed weights: (N,) in at least fp32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        count, per = index.shape[2], self.format.per_group(self.shape[1])
        vectors = x.view(count, -1).to(wide).split(per)
        start = torch.arange(count, dtype=torch.int32, device=x.device) * self.format.codewords  # of a row of the table
        y = x.new_zeros(len(index), dtype=wide)  # (N,)
        for books, one in zip(self.codebooks.to(wide), index.unbind(1), strict=True):
            table = torch.cat([part @ book.T for part, book in zip(vectors, books, strict=True)])  # (B, C)
            places = (one.int() + start).flatten()
            y += table.flatten().index_select(0, places).view(one.shape).sum(1)
        return y

    def arranged(self, x: Tensor) -> Tensor:
        """x (..., K) padded and in the order of the columns: (..., B v)."""
        if more := -x.shape[-1] % self.format.vector:
            x = F.pad(x, (0, more))
        return x if self.order is None else x[..., self._order()]

    def _order(self) -> Tensor | None:
        return None if self.order is None else self.order.long()


class ProductLinear(PackedLinear, Product):
    """`nn.Linear` of codewords."""


class ProductEmbedding(PackedEmbedding, Product):
    """`nn.Embedding` of codewords."""
