"""Weighted k-means over the sub-vectors of a weight matrix, and the order of columns that makes them easy to cluster.

With w one of the sub-vectors of a row, d >= 0 the weights of its columns, and c(w) the codeword that is given to it,

    objective = sum over sub-vectors of d' (w - c(w))^2,     c = sum d w / sum d over the members of c, column by column

which for d = E[x_j^2] is the error of the outputs as far as the inputs are uncorrelated ("And the Bit Goes Down",
arXiv 1907.05686, section 3; "Training with Quantization Noise", arXiv 2004.07320). With d = 1 it is plain k-means.

N rows, B sub-vectors a row, v columns of a sub-vector, K = B v columns, C codewords.
"""

import math

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

ITERATIONS, TOLERANCE = 30, 1e-4  # the most rounds, and the relative gain below which they end
SAMPLE, START = 256, 64  # sub-vectors a codeword that the rounds and their start look at; all are assigned in the end
CHUNK = 1 << 19  # distances computed at once: what stays in the cache


def cluster(vectors: Tensor, weights: Tensor, codewords: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weighted k-means from a k-means++ start; on the CPU the same for the same seed (CUDA adds in no fixed order).

    Args:
        vectors: (N, B, v) fp32, of which no fewer than `codewords`.
        weights: (B, v) fp32, at least 0.
        codewords: C.
        seed: of the start, and of the rows that are looked at where there are more than 256 sub-vectors a codeword.

    Returns:
        The codewords (C, v) fp32 and the index (N, B) int64 of the nearest to every sub-vector.
    """
    generator = torch.Generator().manual_seed(seed)
    some = _sample(vectors, codewords * SAMPLE, generator)
    book = _start(_sample(some, codewords * START, generator), weights, codewords, generator)
    before = float("inf")
    for _ in range(ITERATIONS):
        index, distance = assign(some, weights, book)
        book = update(some, weights, book, index)
        book = _refill(some, weights, book, index, distance)
        now = float(distance.sum(dtype=torch.float64))
        if before - now <= TOLERANCE * now:
            break
        before = now
    index, _ = assign(vectors, weights, book)
    if some is not vectors:
        book = update(vectors, weights, book, index)
        index, _ = assign(vectors, weights, book)
    return book, index


def _sample(vectors: Tensor, most: int, generator: torch.Generator) -> Tensor:
    rows = -(-most // vectors.shape[1])
    if vectors.shape[0] <= rows:
        return vectors
    return vectors[torch.randperm(vectors.shape[0], generator=generator)[:rows].sort().values.to(vectors.device)]


def assign(vectors: Tensor, weights: Tensor, book: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codeword of each sub-vector (N, B, v): its index (N, B) int64, and d' (w - c)^2 (N, B) fp32."""
    pairs = torch.cat([weights * vectors * -2, weights.expand_as(vectors)], dim=-1).flatten(0, 1)  # (N B, 2v)
    powers = torch.cat([book, book.square()], dim=1).T  # (2v, C)
    found = [(part @ powers).min(1) for part in pairs.split(max(1, CHUNK // len(book)))]
    constant = (weights * vectors.square()).sum(-1)
    distance = torch.cat([one.values for one in found]).view_as(constant) + constant
    return torch.cat([one.indices for one in found]).view_as(constant), distance.clamp_min_(0)


def update(vectors: Tensor, weights: Tensor, book: Tensor, index: Tensor) -> Tensor:
    """The weighted mean (C, v) of each codeword's members; where it has none of any weight, as it was in `book`."""
    flat = index.flatten()
    sums = torch.zeros_like(book).index_add_(0, flat, (weights * vectors).flatten(0, 1))
    shares = torch.zeros_like(book).index_add_(0, flat, weights.expand_as(vectors).flatten(0, 1))
    return torch.where(shares > 0, sums / shares, book)


def _start(vectors: Tensor, weights: Tensor, codewords: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++: of a few sub-vectors drawn by their distance from those so far, the best is next."""
    flat = vectors.flatten(0, 1)  # (n, v)
    book = flat.new_empty(codewords, flat.shape[1])
    best = flat.new_full(flat.shape[:1], torch.inf)
    for i in range(codewords):
        mass = torch.where(best < torch.inf, best, 1).double().cumsum(0)
        draws = torch.rand(2 + int(math.log(codewords)), generator=generator, dtype=torch.float64).to(mass.device)
        drawn = torch.searchsorted(mass, draws * mass[-1]).clamp_max_(len(flat) - 1)
        tried = [torch.minimum(best, (weights * (vectors - flat[j]).square()).sum(-1).flatten()) for j in drawn]
        least = int(torch.stack([one.sum() for one in tried]).argmin())
        book[i], best = flat[drawn[least]], tried[least]
    return book


def _refill(vectors: Tensor, weights: Tensor, book: Tensor, index: Tensor, distance: Tensor) -> Tensor:
    """Give each codeword without members half of one of those with the largest error: its farthest member."""
    flat, distance = index.flatten(), distance.flatten()
    empty = (torch.bincount(flat, minlength=len(book)) == 0).nonzero().flatten()
    if len(empty) == 0:
        return book
    error = torch.zeros_like(book[:, 0]).index_add_(0, flat, distance)
    for target, source in zip(empty, error.argsort(descending=True, stable=True), strict=False):
        farthest = distance.masked_fill(flat != source, -1.0).argmax()
        book[target] = vectors.flatten(0, 1)[farthest]
    return book


def arrange(matrix: Tensor, weights: Tensor, length: int) -> Tensor:
    """An order (K,) int64 of the columns that makes the cloud of sub-vectors small.

    C codewords over a cloud of covariance S leave an error that goes with det(S)^(1/v) ("Permute, Quantize, and
    Fine-tune", arXiv 2010.15703, section 3.2): small, at a given trace, where the columns of the cloud differ in energy
    and agree with each other. So the columns, sorted by energy, are cut into v runs, and the j-th column of every
    sub-vector is one of the j-th run: the one that goes best with the sum of those before it, in the assignment of the
    run to the sub-vectors that makes the sum of these products largest.

    Args:
        matrix: (N, K) fp32, K a multiple of `length`.
        weights: (K,) fp32, at least 0.
        length: v.
    """
    scaled = matrix * weights.sqrt()
    runs = scaled.square().mean(0).argsort(descending=True, stable=True).view(length, -1)  # (v, B)
    columns, total = [runs[0]], scaled[:, runs[0]]  # total (N, B)
    for run in runs[1:]:
        agreement = total.T @ scaled[:, run]  # (B, B)
        _, best = linear_sum_assignment(agreement.cpu().numpy(), maximize=True)
        columns.append(run[torch.from_numpy(best).to(run.device)])
        total = total + scaled[:, columns[-1]]
    return torch.stack(columns, dim=1).flatten()
