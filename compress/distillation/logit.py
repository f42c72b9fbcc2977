"""Logit distillation: cross-entropy with the data and T^2 KL with the teacher, over chunks of tokens.

    L = alpha * CE(targets, p_s) + beta * T^2 * KL(p_t^T || p_s^T),   p^T = softmax(logits / T)

(Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", arXiv 1503.02531, section 2; there beta is
1 - alpha.) Both terms are means over the tokens that have a target. T^2 keeps the size of the gradient when T changes.

`logit_terms_reference` is the definition over whole logits. `logit_terms` gives the same from hidden states and head
weights; at no time does it hold more than a few megabytes of logits, so a vocabulary of 128k does not explode.

Shapes: N tokens, V vocabulary, D the student's width, E the teacher's width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from compress.distillation.losses import LOSSES, DistillationLoss
from models.errors import UserError
from models.projection import CPU_CHUNK_BYTES, GPU_CHUNK_BYTES, IGNORED


@LOSSES.register("logit")
@dataclass(frozen=True)
class Logit(DistillationLoss):
    """Logit distillation.

    Args:
        temperature: T, by which both logits are divided; above 0.
    """

    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"temperature is {self.temperature:g}; it must be above 0")


class LogitTerms(NamedTuple):
    """`total` carries the gradient; the others are detached. Losses in nats per token."""

    total: Tensor  # scalar: alpha * cross_entropy + beta * divergence
    cross_entropy: Tensor  # scalar
    divergence: Tensor  # scalar: T^2 * KL(teacher || student)
    agreement: Tensor  # scalar: fraction of tokens at which both give the same most likely token


def logit_terms_reference(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float, alpha: float, beta: float
) -> LogitTerms:
    """The definition, from logits (N, V) and targets (N,) int64 with -100 for tokens that do not count."""
    counted = targets != IGNORED
    student, teacher = student_logits[counted].float(), teacher_logits[counted].float()  # (n, V)
    cross_entropy = F.cross_entropy(student, targets[counted])
    student_log = F.log_softmax(student / temperature, dim=-1)  # (n, V)
    teacher_log = F.log_softmax(teacher / temperature, dim=-1)  # (n, V)
    pointwise = F.kl_div(student_log, teacher_log, reduction="none", log_target=True)  # (n, V)
    divergence = temperature**2 * pointwise.sum(dim=-1).mean()
    agreement = (student.argmax(dim=-1) == teacher.argmax(dim=-1)).float().mean()
    total = alpha * cross_entropy + beta * divergence
    return LogitTerms(total, cross_entropy.detach(), divergence.detach(), agreement)


def logit_terms(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_project: Callable[[Tensor], Tensor],
    targets: Tensor,
    temperature: float,
    alpha: float,
    beta: float,
) -> LogitTerms:
    """The same from hidden states after the last norm.

    hidden (N, D) and weight (V, D) are the student's and receive gradients; teacher_hidden (N, E) and
    teacher_project: (n, E) -> (n, V) are the teacher's and do not. targets (N,) int64, -100 = not counted.
    No counted token at all gives zeros.
    """
    counted = targets != IGNORED
    rows, teacher_rows, labels = hidden[counted], teacher_hidden[counted], targets[counted]
    return LogitTerms(
        *_ChunkedTerms.apply(rows, weight, teacher_rows, teacher_project, labels, temperature, alpha, beta)
    )


class _ChunkedTerms(torch.autograd.Function):
    """Computes the gradient during the forward, chunk by chunk, so that no logits have to be kept or made twice."""

    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_project, labels, temperature, alpha, beta):
        count, learns = max(len(labels), 1), any(ctx.needs_input_grad[:2])
        rows = max(1, chunk_bytes(hidden.device) // (4 * weight.shape[0]))
        sums = torch.zeros(3, device=hidden.device, dtype=_accumulator(weight.dtype))  # CE, KL, agreements
        grad_hidden = torch.empty_like(hidden) if learns else None
        grad_weight = torch.zeros_like(weight, dtype=sums.dtype) if learns else None
        for start in range(0, len(labels), rows):
            part = slice(start, start + rows)
            logits = F.linear(hidden[part], weight).to(sums.dtype)  # (n, V)
            teacher_logits = teacher_project(teacher_hidden[part]).to(sums.dtype)  # (n, V)
            slopes, terms = _chunk(logits, teacher_logits, labels[part], temperature, alpha / count, beta / count)
            sums += terms
            if learns:
                slopes = slopes.to(hidden.dtype)
                grad_hidden[part] = slopes @ weight.to(hidden.dtype)  # (n, D)
                grad_weight += slopes.T @ hidden[part]  # (V, D)
        if learns:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        cross_entropy, divergence, agreement = (sums / count).unbind()
        total = alpha * cross_entropy + beta * divergence
        ctx.mark_non_differentiable(cross_entropy, divergence, agreement)
        return total, cross_entropy, divergence, agreement

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, *_):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_total, grad_weight * grad_total, None, None, None, None, None, None


def _chunk(logits, teacher_logits, labels, temperature, alpha, beta):
    """Slopes d total / d logits (n, V) and the sums of the three terms over the rows; alpha and beta are per token."""
    labels = labels[:, None]  # (n, 1)
    best, teacher_best = logits.amax(dim=-1, keepdim=True), teacher_logits.amax(dim=-1, keepdim=True)  # (n, 1)
    agreements = ((logits == best) & (teacher_logits == teacher_best)).any(dim=-1).sum()
    slopes = F.log_softmax(logits, dim=-1)  # (n, V)
    cross_entropy = -slopes.gather(1, labels).sum()
    slopes.exp_().scatter_add_(1, labels, slopes.new_full(labels.shape, -1.0)).mul_(alpha)  # softmax - one-hot
    student_log = F.log_softmax(logits / temperature, dim=-1)  # (n, V)
    teacher_log = F.log_softmax(teacher_logits / temperature, dim=-1)  # (n, V)
    teacher = teacher_log.exp()  # (n, V)
    divergence = torch.linalg.vecdot(teacher, teacher_log.sub_(student_log)).sum() * temperature**2
    slopes.add_(student_log.exp_().sub_(teacher), alpha=beta * temperature)  # d (T^2 KL) / d logits = T (p_s - p_t)
    return slopes, torch.stack([cross_entropy, divergence, agreements.to(slopes.dtype)])


def chunk_bytes(device: torch.device) -> int:
    """Bytes of the fp32 logits held at once, of each model: on CPU small enough for the cache."""
    return CPU_CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
