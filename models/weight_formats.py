"""Stored forms: the ways in which a module's weights lie in a folder other than as plain dense tensors.

A form is a module class that stands in for an `nn.Linear` or `nn.Embedding`. Packages announce theirs through the
entry-point group `espalier.forms` (name = "package.module:Class"), so `models` needs no import of `compress`, and a
folder names a form, never a Python class.
"""

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol

from torch import Tensor, nn

from models.errors import UserError, did_you_mean

GROUP = "espalier.forms"


class Form(Protocol):
    """Interface of a weight format: an `nn.Module` with the forward of the layer that it replaces."""

    @classmethod
    def empty(cls, module: nn.Module, spec: dict[str, Any]) -> nn.Module:
        """The module that replaces `module` (on the meta device), its state dict naming the packed tensors."""

    def spec(self) -> dict[str, Any]:
        """The numbers that `empty` needs, as JSON values."""

    def dequantize(self) -> Tensor:
        """The dense weight (out, in) that the packed tensors stand for."""

    def memory_bytes(self) -> int:
        """Bytes that the weights take in memory as they are run."""


@cache
def _points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def form_of(module: nn.Module) -> str | None:
    """The name of the form that `module` is, or None for a dense module. Imports nothing."""
    place = f"{type(module).__module__}:{type(module).__qualname__}"
    return next((name for name, point in _points().items() if point.value == place), None)


def described(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Module name -> {"form": name, ...numbers} of every packed module of `model`."""
    found = {}
    for name, module in model.named_modules():
        form = form_of(module)
        if form is not None:
            found[name] = {"form": form, **module.spec()}
    return found


def install(model: nn.Module, compression: dict[str, dict[str, Any]]) -> None:
    """Replace the modules of a meta-device `model` that `compression` names by empty packed ones.

    Raises UserError for a module that the model does not have and for a form that no installed package offers.
    """
    points = _points()
    modules = dict(model.named_modules())
    for name, spec in compression.items():
        if not isinstance(modules.get(name), nn.Linear | nn.Embedding):
            raise UserError(f"compression: {name!r} is no linear layer or embedding of this architecture")
        if not isinstance(spec, dict) or str(spec.get("form")) not in points:
            form = spec.get("form") if isinstance(spec, dict) else spec
            raise UserError(f"compression.{name}: unknown stored form {form!r}{did_you_mean(str(form), points)}")
        numbers = {key: value for key, value in spec.items() if key != "form"}
        try:
            packed = points[spec["form"]].load().empty(modules[name], numbers)
        except UserError as error:
            raise UserError(f"compression.{name}: {error}") from None
        model.set_submodule(name, packed, strict=True)
