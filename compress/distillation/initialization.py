"""What a student starts from: random weights, or blocks of its teacher.

Copying every k-th block starts a shallower student far below a random one's loss (DistilBERT, arXiv 1910.01108,
section 3; PKD, arXiv 1908.09355). It needs blocks of equal shape; a student of another width starts at random.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from compress.distillation.layer_map import LAYER_MAPS, LayerMap, Uniform
from models.errors import UserError
from models.registry import Registry

INITIALIZATIONS = Registry("student initialisation")


@INITIALIZATIONS.register("random")
@dataclass(frozen=True)
class Random:
    """Keep the weights that the student was built with."""

    def apply(self, student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
        return {"kind": "random"}


@INITIALIZATIONS.register("layers")
@dataclass(frozen=True)
class Layers:
    """Copy the teacher's blocks that `layer_map` names, and its embedding, last norm and head.

    Args:
        layer_map: which teacher block each student block is copied from; the default takes every k-th and the last.
    """

    layer_map: LayerMap = field(default_factory=Uniform, metadata={"registry": LAYER_MAPS})

    @torch.no_grad()
    def apply(self, student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
        """Fill `student` in place; returns what was copied, as JSON.

        Raises UserError when a block, or anything outside the blocks that both models have, differs in shape.
        """
        pairs = self.layer_map.pairs(len(student.blocks), len(teacher.blocks))
        for student_block, teacher_block in pairs:
            copied, source = student.blocks[student_block], teacher.blocks[teacher_block]
            _require_equal(copied, source, f"student block {student_block}", f"teacher block {teacher_block}")
            copied.load_state_dict(source.state_dict())
            if source.attention is not None:  # an encoding may belong to a layer, and then has the layer's number
                own, other = student.positions[copied.place.positional], teacher.positions[source.place.positional]
                _require_equal(own, other, f"the positions of {student_block}", f"teacher block {teacher_block}")
                own.load_state_dict(other.state_dict())
        outside = _outside(student, teacher)
        student.load_state_dict({name: teacher.state_dict()[name] for name in outside}, strict=False)
        return {"kind": "layers", "blocks": [list(pair) for pair in pairs], "copied": outside}


def _outside(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Names of the tensors outside the blocks that both models have."""
    ours, theirs = student.state_dict(), teacher.state_dict()
    of_layers = ("blocks.",) if student.config.position.acts == "input" else ("blocks.", "positions.")
    names = [name for name in ours if name in theirs and not name.startswith(of_layers)]
    for name in names:
        if ours[name].shape != theirs[name].shape:
            raise _unequal(f"student's {name}", tuple(ours[name].shape), "teacher's", tuple(theirs[name].shape))
    return names


def _require_equal(student: nn.Module, teacher: nn.Module, student_name: str, teacher_name: str) -> None:
    ours = {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in teacher.state_dict().items()}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise _unequal(f"{student_name}: {name}", ours.get(name), teacher_name, theirs.get(name))


def _unequal(what: str, ours: tuple | None, whose: str, theirs: tuple | None) -> UserError:
    return UserError(
        f"{what} has shape {ours or 'none'}, the {whose} {theirs or 'none'}: layers can be copied only between equal "
        "shapes; use initialisation 'random'"
    )
