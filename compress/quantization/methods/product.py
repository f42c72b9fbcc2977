"""Product quantization: every row is cut into short sub-vectors, and each becomes one of a few codewords.

"PQ+" is plain product quantization with four additions, each of them a switch: sub-vectors weighted by their inputs
(arXiv 1907.05686, 2004.07320), columns in an order that makes them easy to cluster (arXiv 2010.15703), a codebook more
for what the first leaves (additive quantization, as in AQLM, arXiv 2401.06118), and codewords tuned against the
original block (`tuning.py`). Blocks are taken in their order, each on what the quantized ones before it give.

On the CPU the same seed gives the same bytes. On CUDA the sums over the members of a codeword are atomic additions,
whose order is not fixed: two runs there may differ in the last bits, and then in a few indices.

N outputs (or vocabulary), K inputs (or width), v length of a sub-vector, B sub-vectors a row, C codewords.
"""

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.calibration.optimal_brain_surgeon import output_error
from compress.calibration.records import LayerRecord
from compress.calibration.sequential import Batch, BlockStep, steps_of
from compress.calibration.statistics import Hessian, Statistic, StatisticType
from compress.quantization.formats.codebook import (
    CODEWORD,
    Codewords,
    Product,
    ProductEmbedding,
    ProductFormat,
    ProductLinear,
)
from compress.quantization.methods.rtn import checked_weight, relative_error
from compress.quantization.quantizer import METHODS, Quantizer, requested
from compress.quantization.tuning import TUNINGS, BlockTuning, tune_block
from compress.quantization.vector_kmeans import arrange, assign, cluster, update
from models.errors import UserError

FLOOR = 0.01  # share of the mean weight that every column has at least: inputs that calibration did not show may come
ROUNDS = 4  # in which two codebooks are fitted to each other
PRUNED_SHARE = 0.05  # of zeros, from which on a matrix counts as pruned
DENSE_BITS = 16  # of a weight that is left as it is


@dataclass(frozen=True)
class Indices:
    """Size of the indices.

    Args:
        bits: of index a weight, at most.
        group_size: columns that share a codebook, or `tensor` for one in all.
    """

    bits: int = 2
    group_size: int | str = "tensor"


@METHODS.register("product")
@dataclass(frozen=True)
class ProductQuantization(Quantizer):
    """Product quantization.

    Args:
        format: what the indices may cost.
        codewords: of a codebook, 2 to 256; an index takes 2, 3, 4 or 8 bits.
        vector: length of a sub-vector; by default the shortest that `bits` allows.
        weighted: weight every column by the mean square of its input.
        permuted: choose the order of the columns.
        residual: a second codebook for what the first leaves, at an index of its own.
        tuning: how the codewords are tuned once a block is quantized, or nothing.
        seed: of the k-means start.
    """

    calibrates: ClassVar[bool] = True
    grid: ClassVar[tuple[str, ...]] = ("bits", "group_size")
    bits: ClassVar[tuple[int, ...]] = (1, 2, 3, 4)
    embedding_bits: ClassVar[tuple[int, ...]] = (1, 2, 3, 4)
    shares: ClassVar[str] = "codebook"

    format: Indices = field(default_factory=Indices)
    codewords: int = 256
    vector: int | None = None
    weighted: bool = True
    permuted: bool = True
    residual: bool = False
    tuning: BlockTuning | None = field(default=None, metadata={"registry": TUNINGS})
    seed: int = 0

    def __post_init__(self) -> None:
        ProductFormat(vector=1 if self.vector is None else self.vector, codewords=self.codewords)

    def prepare(self, model: nn.Module, batches: Sequence[Batch] | None, **shared: Any) -> None:
        form = self.asked()
        shapes = [module.weight.shape for step in steps_of(model) for module in step.linears.values()]
        most = max((rows * form.vectors(width) for rows, width in shapes), default=form.codewords)
        if form.codewords > most:
            raise UserError(
                f"codewords is {form.codewords}, but the largest matrix has {most} sub-vectors of {form.vector}; "
                "ask for fewer"
            )

    def asked(self) -> ProductFormat:
        """The form that the numbers ask for. Raises UserError for numbers that contradict each other."""
        books = 2 if self.residual else 1
        index = ProductFormat(codewords=self.codewords).index_bits
        shortest = -(-books * index // self.format.bits)
        vector = shortest if self.vector is None else self.vector
        if vector < shortest:
            raise UserError(
                f"sub-vectors of {vector} with {books * index} bits of index take more than the {self.format.bits} "
                f"bits a weight that were asked for; they must have at least {shortest} weights"
            )
        return ProductFormat(vector, self.codewords, books, self.format.group_size, self.permuted)

    def statistic(self, name: str, module: nn.Module) -> StatisticType | None:
        return Hessian if self.weighted or self.tuning else None

    def compress(
        self, name: str, module: nn.Module, statistic: Statistic | None
    ) -> tuple[nn.Module | None, LayerRecord]:
        started = time.perf_counter()
        weight = checked_weight(name, module)
        form, notes = self.affordable(name, weight)
        if form is None:
            return None, LayerRecord.skip(name, weight.shape, notes[0], requested(self))
        seen = statistic is not None and statistic.tokens > 0
        if self.weighted and not seen:
            why = "it reads token ids" if statistic is None else "no calibration token reached it"
            notes.append(f"{why}: all inputs weigh the same")
        if (zeros := int((weight == 0).sum())) >= PRUNED_SHARE * weight.numel():
            notes.append(f"pruned: its {zeros} zeros share codewords with other weights and do not stay zero")
        energy = statistic.matrix().diagonal() if self.weighted and seen else None
        words = quantize(weight, form, energy, self.seed)
        new = (ProductEmbedding if isinstance(module, nn.Embedding) else ProductLinear).of(module, words)
        record = LayerRecord(name, tuple(weight.shape), requested(self), {}, None, 0.0, "; ".join(notes))
        return new, measured(record, weight, new, statistic if seen else None, time.perf_counter() - started)

    def affordable(self, name: str, weight: Tensor) -> tuple[ProductFormat | None, list[str]]:
        """The form for a matrix: with fewer codewords where its sub-vectors or its bytes do not allow for all of them.

        None where even two would cost more than the dense weights; then the first note says so.
        """
        form, (rows, width) = self.asked(), weight.shape
        if form.vector > width:
            raise UserError(f"sub-vectors of {form.vector} are longer than the {width} inputs of {name}")
        last = form.vectors(width) - (form.groups(width) - 1) * form.per_group(width)  # sub-vectors in the last group
        dense, codewords = rows * width * DENSE_BITS // 8, form.codewords
        while codewords >= 2:
            fewer = replace(form, codewords=codewords)
            if codewords <= rows * last and fewer.stored_bytes(rows, width) < dense:
                return fewer, [note for note in _notes(form, fewer, width) if note]
            codewords //= 2
        return None, [f"codebooks and indices would take more than its {dense} bytes at {DENSE_BITS} bits: left dense"]

    def compress_block(self, step: BlockStep) -> list[LayerRecord]:
        """Quantize the layers of the step, then tune the codewords of a block."""
        blocklike = step.module is not step.model
        if self.tuning is None or not blocklike or not step.inputs:
            return super().compress_block(step)
        original = deepcopy(step.module)
        dense = {name: module.weight.detach().float() for name, module in step.linears.items()}
        records = super().compress_block(step)
        layers = {record.name: step.model.get_submodule(record.name) for record in records if not record.skipped}
        layers = {name: layer for name, layer in layers.items() if isinstance(layer, Product)}
        if not layers:
            return records
        started = time.perf_counter()
        before, after = tune_block(step, original, layers, self.tuning)
        seconds = (time.perf_counter() - started) / len(layers)
        note = f"codewords tuned: the block's output error went from {before:.3g} to {after:.3g}"
        found = []
        for record in records:
            if record.name in layers:
                record = replace(record, note="; ".join(filter(None, (record.note, note))))
                statistic = step.statistics.get(record.name)
                record = measured(record, dense[record.name], layers[record.name], statistic, seconds)
            found.append(record)
        return found


def _notes(asked: ProductFormat, got: ProductFormat, width: int) -> list[str]:
    fewer = f"too small for {asked.codewords} codewords: {got.codewords}"
    padded = f"sub-vectors of {got.vector} do not divide {width} inputs: the last of a row has {width % got.vector}"
    return [fewer if got.codewords < asked.codewords else "", padded if width % got.vector else ""]


def measured(
    record: LayerRecord, weight: Tensor, layer: Product, statistic: Statistic | None, seconds: float
) -> LayerRecord:
    """The record with what the layer takes and loses, and `seconds` more."""
    quantized, form = layer.dequantize(), layer.format
    lost = relative_error(weight, quantized)
    achieved = {
        "bits": 8 * layer.stored_bytes() / weight.numel(),
        "vector": form.vector,
        "codewords": form.codewords,
        "error_of": "weights" if statistic is None else "outputs",
    }
    if statistic is None:
        return replace(record, achieved=achieved, error=lost, seconds=record.seconds + seconds)
    error = output_error(weight, quantized, statistic.matrix())
    achieved["weight_error"] = lost
    return replace(record, achieved=achieved, error=error, seconds=record.seconds + seconds)


def quantize(weight: Tensor, form: ProductFormat, energy: Tensor | None = None, seed: int = 0) -> Codewords:
    """The codewords of a matrix.

    Args:
        weight: (N, K) fp32.
        form: how they lie.
        energy: (K,) mean square of every input; None weighs all alike.
        seed: of the k-means start.
    """
    rows, width = weight.shape
    more = -width % form.vector
    weights = torch.ones_like(weight[0]) if energy is None else energy + FLOOR * energy.mean()
    if not bool(weights.any()):  # no input was ever other than zero
        weights = torch.ones_like(weights)
    padded, weights = F.pad(weight, (0, more)), F.pad(weights, (0, more))  # (N, B v), (B v,): padding weighs nothing
    order = arrange(padded, weights, form.vector) if form.permuted else None
    if order is not None:
        padded, weights = padded[:, order], weights[order]
    vectors, weights = padded.view(rows, -1, form.vector), weights.view(-1, form.vector)  # (N, B, v), (B, v)
    per = form.per_group(width)
    parts = zip(vectors.split(per, dim=1), weights.split(per), strict=True)
    fitted = [fit_group(part.contiguous(), own, form, seed) for part, own in parts]
    books = torch.stack([books for books, _ in fitted], dim=1)  # (R, G, C, v)
    index = torch.cat([index for _, index in fitted], dim=2)  # (N, R, B)
    return Codewords(index, books, order, form, width)


def fit_group(vectors: Tensor, weights: Tensor, form: ProductFormat, seed: int) -> tuple[Tensor, Tensor]:
    """Codebooks (R, C, v) bf16 and indices (N, R, b) uint8 of sub-vectors (N, b, v) that share them."""
    book, index = cluster(vectors, weights, form.codewords, seed)
    books, indices = [book], [index]
    if form.codebooks == 2:
        book, index = cluster(vectors - book[index], weights, form.codewords, seed)
        books.append(book)
        indices.append(index)
    stored = [book.to(CODEWORD) for book in books]
    for last in [False] * (ROUNDS if form.codebooks == 2 else 0) + [True]:
        for one in range(form.codebooks):
            others = sum(books[i][indices[i]] for i in range(form.codebooks) if i != one)
            target = vectors - others
            # in the last round the codewords are as they are stored, and the indices follow them
            books[one] = stored[one].float() if last else update(target, weights, books[one], indices[one])
            indices[one], _ = assign(target, weights, books[one])
            stored[one] = books[one].to(CODEWORD)
    return torch.stack(stored), torch.stack(indices, dim=1).to(torch.uint8)
