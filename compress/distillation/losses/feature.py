"""Feature distillation: hidden states of the student, through a learned projector, imitate those of the teacher.

Distances over hidden states, each a mean over the tokens that count:

    mean_squared:  mean over tokens and channels of (P s - t)^2     (FitNets, arXiv 1412.6550)
    cosine:        mean over tokens of 1 - cos(P s, t)

Hidden states are not logits: no softmax, no temperature, and no mean over the batch alone (a softmax over normalised
features is almost uniform, its gradient vanishes, and a loss divided by the batch grows with the length).

Shapes: B sequences, T tokens, D the student's width, E the teacher's width, P pairs of blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.distillation.layer_map import LAYER_MAPS, LayerMap, UniformLayers
from compress.distillation.losses.loss import LOSSES, DistillationLoss, StateLoss
from models.config import ModelConfig
from models.registry import Registry

DISTANCES = Registry("feature distance")


class Distance(Protocol):
    """A distance between projected student states and teacher states."""

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """A scalar from states (N, E) of N counted tokens, N > 0."""


@DISTANCES.register("mean_squared")
@dataclass(frozen=True)
class MeanSquared:
    """Mean over tokens and channels of the squared difference."""

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.mse_loss(student, teacher)


@DISTANCES.register("cosine")
@dataclass(frozen=True)
class CosineDistance:
    """Mean over tokens of 1 - cosine similarity: blind to the length of a state, equal for narrow and wide teachers."""

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (1.0 - F.cosine_similarity(student, teacher, dim=-1)).mean()


class Projector(nn.Module):
    """One linear layer without bias from the student's width to the teacher's for every pair of blocks.

    It is trained with the student and saved in the checkpoint, but is no part of the student that is exported.
    Where the widths agree it starts as the identity, otherwise orthogonally.
    """

    def __init__(self, pairs: int, student_width: int, teacher_width: int):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(student_width, teacher_width, bias=False) for _ in range(pairs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Identity where the widths agree, else a (semi-)orthogonal matrix."""
        for linear in self.maps:
            if linear.in_features == linear.out_features:
                nn.init.eye_(linear.weight)
            else:
                nn.init.orthogonal_(linear.weight)

    def forward(self, index: int, states: Tensor) -> Tensor:
        """Project the student states of one pair: (..., D) -> (..., E)."""
        return self.maps[index](states)


@LOSSES.register("feature")
@dataclass(frozen=True)
class Feature(DistillationLoss):
    """Feature distillation.

    Args:
        distance: `cosine` or `mean_squared`.
        layer_map: which student block learns from which teacher block: `uniform`, `last`, `explicit`.
    """

    distance: Distance = field(default_factory=CosineDistance, metadata={"registry": DISTANCES})
    layer_map: LayerMap = field(default_factory=UniformLayers, metadata={"registry": LAYER_MAPS})

    def build(self, student: ModelConfig, teacher: ModelConfig) -> "FeatureLoss":
        pairs = self.layer_map.pairs(len(student.layers), len(teacher.layers))
        return FeatureLoss(self.distance, pairs, student.width, teacher.width)


class FeatureLoss(StateLoss):
    """The mean over all pairs of blocks of the distance between projected student states and teacher states."""

    def __init__(self, distance: Distance, pairs: list[tuple[int, int]], student_width: int, teacher_width: int):
        super().__init__()
        self.distance, self.pairs = distance, pairs
        self.projector = Projector(len(pairs), student_width, teacher_width)

    @property
    def student_taps(self) -> tuple[str, ...]:
        """Blocks of the student whose output is needed, by name."""
        return tuple(sorted({f"blocks.{student}" for student, _ in self.pairs}))

    @property
    def teacher_taps(self) -> tuple[str, ...]:
        """Blocks of the teacher whose output is needed, by name."""
        return tuple(sorted({f"blocks.{teacher}" for _, teacher in self.pairs}))

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], counted: Tensor) -> Tensor:
        """See `StateLoss.forward`. Tokens outside `counted` have no influence; the teacher receives no gradient."""
        if not counted.any():
            return sum(parameter.sum() * 0.0 for parameter in self.projector.parameters())
        losses = []
        for index, (student_block, teacher_block) in enumerate(self.pairs):
            projected = self.projector(index, student[f"blocks.{student_block}"][counted])  # (N, E)
            wanted = teacher[f"blocks.{teacher_block}"][counted].detach()  # (N, E)
            losses.append(self.distance(projected.float(), wanted.float()))
        return torch.stack(losses).mean()
