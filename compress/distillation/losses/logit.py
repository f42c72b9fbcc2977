"""Logit distillation: cross-entropy with the data and T^2 KL with the teacher, over chunks of tokens.

    L = alpha * CE(targets, p_s) + beta * T^2 * KL(p_t^T || p_s^T),   p^T = softmax(logits / T)

(Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", arXiv 1503.02531, section 2; there beta is
1 - alpha.) Both terms are means over the tokens that have a target. T^2 keeps the size of the gradient when T changes.

`logit_terms_reference` is the definition over whole logits. `logit_terms` gives the same from hidden states and head
weights, chunk by chunk (models/projection.py).

Shapes: N tokens, C tokens of a chunk, V vocabulary, D the student's width, E the teacher's width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.distillation.losses.loss import LOSSES, DistillationLoss
from models.errors import UserError
from models.projection import IGNORED, Chunk, Found, Term, sums_over_chunks


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
    count = max(len(student), 1)
    cross_entropy = F.cross_entropy(student, targets[counted], reduction="sum") / count
    student_log = F.log_softmax(student / temperature, dim=-1)  # (n, V)
    teacher_log = F.log_softmax(teacher / temperature, dim=-1)  # (n, V)
    pointwise = F.kl_div(student_log, teacher_log, reduction="none", log_target=True)  # (n, V)
    divergence = temperature**2 * pointwise.sum() / count
    agreement = (student.argmax(dim=-1) == teacher.argmax(dim=-1)).sum() / count
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
    count = max(len(labels), 1)

    def loss(chunk: Chunk) -> Found:
        logits = chunk.logits()  # (C, V)
        teacher_logits = teacher_project(teacher_rows[chunk.part]).to(logits.dtype)  # (C, V)
        return _found(logits, teacher_logits, labels[chunk.part], temperature, alpha / count, beta / count)

    total, *sums = sums_over_chunks(rows, weight, loss)
    return LogitTerms(total, *(value / count for value in sums))


def _found(
    logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, alpha: float, beta: float
) -> Found:
    """The total with its gradient, and the sums of the three terms over the chunk; alpha and beta are per token."""
    labels = labels[:, None]  # (C, 1)
    best, teacher_best = logits.amax(dim=-1, keepdim=True), teacher_logits.amax(dim=-1, keepdim=True)  # (C, 1)
    agreements = ((logits == best) & (teacher_logits == teacher_best)).any(dim=-1).sum().to(logits.dtype)
    slopes = F.log_softmax(logits, dim=-1)  # (C, V)
    cross_entropy = -slopes.gather(1, labels).sum()
    slopes.exp_().scatter_add_(1, labels, slopes.new_full(labels.shape, -1.0)).mul_(alpha)  # softmax - one-hot
    student_log = F.log_softmax(logits / temperature, dim=-1)  # (C, V)
    teacher_log = F.log_softmax(teacher_logits / temperature, dim=-1)  # (C, V)
    teacher = teacher_log.exp()  # (C, V)
    divergence = torch.linalg.vecdot(teacher, teacher_log.sub_(student_log)).sum() * temperature**2
    slopes.add_(student_log.exp_().sub_(teacher), alpha=beta * temperature)  # d (T^2 KL) / d logits = T (p_s - p_t)
    total = alpha * cross_entropy + beta * divergence
    return Found((total, cross_entropy, divergence, agreements), slopes, (Term(),))
