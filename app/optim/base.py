"""Base of optimizers in a recipe, and parameter groups by role.

Weight decay and Muon act on matrices that map hidden states to hidden states. Everything else is left out of both:

    role        parameters                                         weight decay    Muon
    hidden      weights of 2 or more dimensions inside the blocks  yes             yes
    head        the output projection, where it is not tied        yes             no
    embedding   token and position tables (also a tied head)       no              no
    vector      norms and biases                                   no              no

A weight of 3 dimensions is a stack of matrices, one an expert (models/experts/stacked.py); its biases (E, F) are
vectors all the same. A router is a matrix like any other.
"""

import math
from abc import ABC, abstractmethod

from torch import nn
from torch.optim import Optimizer

from models.errors import UserError

ROLES = ("hidden", "head", "embedding", "vector")


class Optimization(ABC):
    """An optimizer with its numbers, before there are parameters."""

    @abstractmethod
    def build(self, model: nn.Module) -> Optimizer:
        """Return the optimizer of all parameters of `model` that require a gradient."""


def check_numbers(name: str, betas: tuple[float, float], **values: float) -> None:
    """Raise UserError for what no update can be made with: a negative rate or decay, or a running mean that grows.

    Args:
        name: of the optimizer.
        betas: decays of running means.
        values: numbers that must be at least 0, by their names.
    """
    for key, value in values.items():
        if not 0 <= value < math.inf:
            raise UserError(f"{key} of {name} must be a number of at least 0, not {value}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"betas of {name} must be two numbers of at least 0 and below 1, not {list(betas)}")


def parameters_by_role(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the trainable parameters by role, each once (a tied head belongs to the embedding), in a fixed order."""
    roles: dict[str, list[nn.Parameter]] = {role: [] for role in ROLES}
    seen: set[int] = set()
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            roles[_role(name, module, own, parameter)].append(parameter)
    return roles


def _role(name: str, module: nn.Module, own: str, parameter: nn.Parameter) -> str:
    if parameter.ndim < 2 or own.endswith("bias"):
        return "vector"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "head" if name.rpartition(".")[2] == "head" else "hidden"


def keep_options(optimizer: Optimizer) -> Optimizer:
    """Let the options that `optimizer` was built with win over those in a checkpoint, which then brings its state only.

    Without this, `load_state_dict` would silently bring back the old learning rate, betas and weight decay.
    """
    chosen = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]

    def restore(loaded: Optimizer) -> None:
        for group, options in zip(loaded.param_groups, chosen, strict=True):
            group.update(options, **({"initial_lr": options["lr"]} if "initial_lr" in group else {}))

    optimizer.register_load_state_dict_post_hook(restore)
    return optimizer
