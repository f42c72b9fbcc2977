"""The whole objective of a distillation: runs student and teacher over a batch and combines the losses.

B sequences, T tokens, D the student's width, E the teacher's width, V vocabulary.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compress.distillation.losses import feature as _feature  # noqa: F401  registers its loss
from compress.distillation.losses.logit import IGNORED, Logit, LogitTerms, logit_terms, logit_terms_reference
from compress.distillation.losses.loss import Combine, DistillationLoss
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer


class Objective(nn.Module):
    """Losses by name, the projectors that they train, and how they are combined.

    Its parameters (projectors) are trained and checkpointed with the student, and belong to no exported model.

    Args:
        losses: name -> spec, as `parse_losses` reads them.
        combine: the weights.
        student, teacher: configs of the two models.

    Raises:
        UserError: the vocabularies differ in size, or the weights do not fit the losses.
    """

    def __init__(
        self, losses: Mapping[str, DistillationLoss], combine: Combine, student: ModelConfig, teacher: ModelConfig
    ) -> None:
        super().__init__()
        require_same_vocabulary(student.vocab_size, teacher.vocab_size)
        if student.outputs != teacher.outputs:
            raise UserError(
                f"the teacher's head gives {teacher.outputs} logits and the student's {student.outputs}; they cannot "
                "be compared: the student must have the teacher's head"
            )
        combine.check(losses)
        self.combine = combine
        self.logit = losses.get("logit", Logit())
        self.beta = combine.weight("logit") if "logit" in losses else 0.0
        built = {name: spec.build(student, teacher) for name, spec in losses.items()}
        self.states = nn.ModuleDict({name: loss for name, loss in built.items() if loss is not None})

    def forward(self, student: Transformer, teacher: Transformer, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Terms of one batch, scalars: `total` with its gradient; detached `cross_entropy` (nats/token), `agreement`
        (fraction of tokens at which both would choose the same token), `logit` (T^2 KL), one per further loss, and in
        training one per loss that the student's own mechanisms leave, such as the balance of experts.

        batch: tokens (B, T) int64, targets (B, T) int64 with -100 = none, optionally documents (B, T), -1 = padding.
        """
        documents = batch.get("documents")
        student_taps = {tap for loss in self.states.values() for tap in loss.student_taps}
        teacher_taps = {tap for loss in self.states.values() for tap in loss.teacher_taps}
        with torch.no_grad():
            wanted = teacher.hidden(batch["tokens"], documents=documents, taps=teacher_taps)  # (B, T, E)
        hidden = student.hidden(batch["tokens"], documents=documents, taps=student_taps)  # (B, T, D)
        terms = self._logit_terms(student, hidden.x.flatten(0, 1), teacher, wanted.x.flatten(0, 1), batch["targets"])
        logged = {"cross_entropy": terms.cross_entropy, "agreement": terms.agreement, "logit": terms.divergence}
        total = terms.total
        for name, term in hidden.losses.items():
            total = total + term
            logged[name] = term.detach()
        counted = batch["targets"] != IGNORED if documents is None else documents >= 0  # (B, T)
        for name, loss in self.states.items():
            term = loss(hidden.taps, wanted.taps, counted)
            total = total + self.combine.weight(name) * term
            logged[name] = term.detach()
        return {"total": total, **logged}

    def _logit_terms(
        self, student: Transformer, hidden: Tensor, teacher: Transformer, wanted: Tensor, targets: Tensor
    ) -> LogitTerms:
        """Terms between logits of hidden states (N, D) and (N, E): in chunks where the output is a plain matrix."""
        check_output(student)
        weights = self.logit.temperature, self.combine.alpha, self.beta
        if (matrix := student.output_matrix) is not None:
            return logit_terms(hidden, matrix, wanted, teacher.project, targets.flatten(), *weights)
        return logit_terms_reference(student.project(hidden), teacher.project(wanted), targets.flatten(), *weights)


def check_output(model: Transformer) -> None:
    """Raise UserError for a student whose output projection cannot be trained."""
    output = model.embedding if model.head is None else model.head
    if not isinstance(output, nn.Linear | nn.Embedding):
        raise UserError(
            "the student's output projection is stored quantized and cannot be trained; distil before quantizing"
        )


def require_same_vocabulary(
    student_size: int,
    teacher_size: int,
    student_tokens: Mapping[str, int] | None = None,
    teacher_tokens: Mapping[str, int] | None = None,
) -> None:
    """Raise `UserError` unless both models mean the same by every token id.

    The sizes are the rows of the embeddings; the tokens, where tokenizers are at hand, their vocabularies {token: id}.
    """
    if student_size != teacher_size:
        raise UserError(
            f"the teacher's vocabulary has {teacher_size} tokens, the student's {student_size}; logits of different "
            "vocabularies cannot be compared: the student must use the teacher's tokenizer and vocab_size"
        )
    if student_tokens is not None and teacher_tokens is not None and dict(student_tokens) != dict(teacher_tokens):
        different = len(dict(student_tokens).items() ^ dict(teacher_tokens).items())
        raise UserError(
            f"teacher and student have tokenizers of {len(teacher_tokens)} and {len(student_tokens)} tokens which "
            f"differ in {different} entries; the student must use the teacher's tokenizer"
        )
