"""Layer maps: pairs of student and teacher blocks for feature losses and initialization.

A map is given as pairs (student block, teacher block), both counted from 0.
"""

from dataclasses import dataclass
from typing import Protocol

from models.errors import UserError
from models.registry import Registry

LAYER_MAPS = Registry("layer map")


class LayerMap(Protocol):
    """Base class of layer maps."""

    def pairs(self, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
        """Pairs (student block, teacher block) for models of these depths."""


@LAYER_MAPS.register("uniform")
@dataclass(frozen=True)
class UniformLayers:
    """Spread the student's blocks evenly over the teacher's: block m learns from (m + 1) * teacher / student - 1.

    The last block always learns from the last one (TinyBERT, arXiv 1909.10351, section 4.1: g(m) = m N / M).
    A student that is deeper than its teacher shares teacher blocks.
    """

    def pairs(self, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
        return [(m, max(0, (m + 1) * teacher_depth // student_depth - 1)) for m in range(student_depth)]


@LAYER_MAPS.register("last")
@dataclass(frozen=True)
class Last:
    """Only the last block learns from the last block."""

    def pairs(self, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
        return [(student_depth - 1, teacher_depth - 1)]


@LAYER_MAPS.register("explicit")
@dataclass(frozen=True)
class Explicit:
    """Exactly these pairs.

    Args:
        blocks: a list of [student block, teacher block].
    """

    blocks: list

    def pairs(self, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
        if not self.blocks:
            raise UserError("the layer map names no pair of blocks; leave it out for the uniform map")
        return [self._checked(pair, student_depth, teacher_depth) for pair in self.blocks]

    @staticmethod
    def _checked(pair: object, student_depth: int, teacher_depth: int) -> tuple[int, int]:
        match pair:
            case [int(student), int(teacher)] if 0 <= student < student_depth and 0 <= teacher < teacher_depth:
                return student, teacher
        raise UserError(
            f"layer map entry {pair!r} is not [student block, teacher block] with blocks counted from 0, "
            f"below {student_depth} and {teacher_depth}"
        )
