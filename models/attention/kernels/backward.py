"""FlashAttention's backward for one tile of scores (arXiv 2205.14135, appendix B.2), the step of every kernel here that
has a backward of its own.

B batch, G key/value heads, R query heads of each, t queries of a tile, s keys of a tile, d channels of a head.

With the probabilities P, kept from the forward or made anew from the logsumexp, and delta = rowsum(dO * O):

    dV = P^T dO    dP = dO V^T    dS = P * (dP - delta)    dQ = scale dS K    dK = scale dS^T Q
"""

from torch import Tensor


def per_group(x: Tensor, groups: int) -> Tensor:
    """(B, G * R, t, C) as (B, G, R * t, C): the query heads of one key head below one another."""
    return x.unflatten(1, (groups, -1)).flatten(2, 3)


def score_gradients(dp: Tensor, p: Tensor, delta: Tensor, dropped: Tensor | None = None) -> Tensor:
    """dS (..., t, s) in the place of dP, which has the dtype of P; delta (..., t, 1).

    Args:
        dropped: (..., t, s) what dropout multiplied the probabilities with.
    """
    return (dp if dropped is None else dp.mul_(dropped)).sub_(delta).mul_(p)


def tile_gradients(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    delta: Tensor,
    scale: float,
    dropped: Tensor | None = None,
    dbias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from one tile; products in the dtype of q, everything between them in that of P.

    Args:
        dy, q: (B, G, R * t, d).
        k, v: (B, G, s, d).
        p: (B, G, R * t, s), at least fp32, before dropout.
        delta: (B, G, R * t, 1).
        scale: of the scores.
        dropped: as of `score_gradients`.
        dbias: (B or 1, G * R or 1, t, s), to which the gradient of what was added to the scores is added.
    """
    ds = score_gradients((dy @ v.mT).to(p.dtype), p, delta, dropped)  # (B, G, R * t, s)
    if dbias is not None:
        dbias += ds.view(len(q), -1, *dbias.shape[2:]).sum_to_size(dbias.shape)
    ds = ds.mul_(scale).to(q.dtype)
    p = (p if dropped is None else p * dropped).to(dy.dtype)
    return ds @ k, ds.mT @ q, p.mT @ dy
