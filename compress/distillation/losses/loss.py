"""Distillation losses: their registry, base classes and weighted sum.

The total is alpha * cross-entropy + (1 - alpha) * w_logit * logit + the sum of w * loss over the other losses.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from models.config import ModelConfig
from models.errors import UserError, did_you_mean
from models.registry import Registry

LOSSES = Registry("distillation loss")


class StateLoss(nn.Module):
    """A distillation loss over hidden states, with the projectors that it trains.

    Attributes:
        student_taps, teacher_taps: names of what it needs of the two models (`Backbone.run`).
    """

    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], counted: Tensor) -> Tensor:
        """student {tap: (B, T, D)}, teacher {tap: (B, T, E)}, counted (B, T) bool -> scalar; 0 if none counts."""
        raise NotImplementedError


class DistillationLoss:
    """Base class of the registered losses, each a frozen dataclass of its options."""

    kind: ClassVar[str]

    def build(self, student: ModelConfig, teacher: ModelConfig) -> StateLoss | None:
        """The loss between hidden states of two models; None: one between logits, which the objective computes."""
        return None


@dataclass(frozen=True)
class Combine:
    """Weights of the terms.

    Args:
        alpha: share of the cross-entropy with the data, in [0, 1]; the logit loss has the share 1 - alpha.
        weights: factor of a loss by its name, 1 where it is not named.
    """

    alpha: float = 0.5
    weights: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise UserError(f"alpha is {self.alpha:g}; it is the share of the cross-entropy and must lie in [0, 1]")
        for name, weight in self.weights.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight < 0:
                raise UserError(f"the weight of loss '{name}' is {weight!r}; it must be a number, 0 or more")

    def check(self, losses: Iterable[str]) -> None:
        """Raise `UserError` for a weight of a loss that is not used, and when nothing at all is learned from."""
        losses = list(losses)
        for name in self.weights:
            if name not in losses:
                raise UserError(f"a weight is given for loss '{name}', which is not used{did_you_mean(name, losses)}")
        others = any(self.weight(name) > 0 for name in losses if name != "logit")
        if self.alpha == 0 and not others and ("logit" not in losses or self.weight("logit") == 0):
            raise UserError("alpha is 0 and no loss has a weight: there is nothing to learn from")

    def weight(self, name: str) -> float:
        """The factor of a loss in the total, the share 1 - alpha of the logit loss included."""
        factor = float(self.weights.get(name, 1.0))
        return (1.0 - self.alpha) * factor if name == "logit" else factor


def parse_losses(values: Iterable[Any]) -> dict[str, DistillationLoss]:
    """Read losses from names, `{"kind": NAME, ...}` or specs: {name: spec}, each name once.

    Raises `UserError` for an unknown or repeated name and when there is none.
    """
    if isinstance(values, (str, Mapping)):
        raise UserError(f"losses: expected a list such as [logit, feature], got {values!r}")
    losses: dict[str, DistillationLoss] = {}
    for index, value in enumerate(values):
        spec = LOSSES.parse(value, f"losses[{index}]")
        if spec.kind in losses:
            raise UserError(f"losses: '{spec.kind}' is named twice")
        losses[spec.kind] = spec
    if not losses:
        raise UserError(f"losses: name at least one of {', '.join(LOSSES)}")
    return losses
