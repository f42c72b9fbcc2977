"""Initialization of a student: random, from blocks of its teacher, or upcycled to experts.

Copying every k-th block starts a shallower student far below a random one's loss (DistilBERT, arXiv 1910.01108,
section 3; PKD, arXiv 1908.09355). It needs blocks of equal shape; a student of another width starts at random.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress.distillation.layer_map import LAYER_MAPS, LayerMap, UniformLayers
from models.errors import UserError
from models.experts import MixtureOfExperts, StackedExperts
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

    layer_map: LayerMap = field(default_factory=UniformLayers, metadata={"registry": LAYER_MAPS})

    @torch.no_grad()
    def apply(self, student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
        """Fill `student` in place; returns what was copied, as JSON.

        Raises UserError when a block, or anything outside the blocks that both models have, differs in shape.
        """
        pairs = self.layer_map.pairs(len(student.blocks), len(teacher.blocks))
        for student_block, teacher_block in pairs:
            copied, source = student.blocks[student_block], teacher.blocks[teacher_block]
            state = self._state(copied, source)
            _require_equal(copied, state, f"student block {student_block}", f"teacher block {teacher_block}")
            copied.load_state_dict(state)
            if (
                source.attention is not None and teacher.positions and student.positions
            ):  # an encoding may belong to a layer, and then has the layer's number
                own, other = student.positions[copied.place.positional], teacher.positions[source.place.positional]
                names = f"the positions of {student_block}", f"teacher block {teacher_block}"
                _require_equal(own, other.state_dict(), *names)
                own.load_state_dict(other.state_dict())
        outside = _outside(student, teacher)
        student.load_state_dict({name: teacher.state_dict()[name] for name in outside}, strict=False)
        return {"kind": self.kind, "blocks": [list(pair) for pair in pairs], "copied": outside}

    def _state(self, student: nn.Module, teacher: nn.Module) -> dict[str, Tensor]:
        """State dict of a student's block from its teacher's."""
        return teacher.state_dict()


@INITIALIZATIONS.register("upcycled")
@dataclass(frozen=True)
class Upcycled(Layers):
    """As `layers`, and every expert of the student starts as a copy of the dense feed-forward of the teacher's block.

    (Sparse upcycling, arXiv 2212.05055, section 3.) The routers keep what they were built with. While all experts are
    alike and their weights sum to 1 (`weights: renormalised`), the student computes what the teacher does.

    Args:
        layer_map: as for `layers`.
    """

    def _state(self, student: nn.Module, teacher: nn.Module) -> dict[str, Tensor]:
        state, mixture = teacher.state_dict(), student.feedforward
        if not isinstance(mixture, MixtureOfExperts) or isinstance(teacher.feedforward, MixtureOfExperts):
            return state
        if mixture.shared is not None:
            raise UserError(
                "the student's shared expert adds to what the others make, and copies of the teacher's feed-forward "
                "would count twice; leave it out, or use initialisation 'random'"
            )
        own = {name: tensor for name, tensor in state.items() if not name.startswith("feedforward.")}
        for name, tensor in teacher.feedforward.state_dict().items():
            part, _, leaf = name.rpartition(".")
            if isinstance(mixture.experts, StackedExperts):
                stacked = part if leaf == "weight" else f"{part}_{leaf}"
                own[f"feedforward.experts.{stacked}"] = tensor.expand(mixture.spec.count, *tensor.shape)
            else:
                own |= {f"feedforward.experts.{expert}.{name}": tensor for expert in range(mixture.spec.count)}
        routers = {f"feedforward.router.{name}": tensor for name, tensor in mixture.router.state_dict().items()}
        return own | routers


def _outside(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Names of the tensors outside the blocks that both models have."""
    ours, theirs = student.state_dict(), teacher.state_dict()
    of_layers = ("blocks.",) if student.config.position.acts == "input" else ("blocks.", "positions.")
    names = [name for name in ours if name in theirs and not name.startswith(of_layers)]
    for name in names:
        if ours[name].shape != theirs[name].shape:
            raise _unequal(f"student's {name}", tuple(ours[name].shape), "teacher's", tuple(theirs[name].shape))
    return names


def _require_equal(student: nn.Module, state: Mapping[str, Tensor], student_name: str, teacher_name: str) -> None:
    ours = {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise _unequal(f"{student_name}: {name}", ours.get(name), teacher_name, theirs.get(name))


def _unequal(what: str, ours: tuple | None, whose: str, theirs: tuple | None) -> UserError:
    return UserError(
        f"{what} has shape {ours or 'none'}, the {whose} {theirs or 'none'}: layers can be copied only between equal "
        "shapes; use initialisation 'random'"
    )
