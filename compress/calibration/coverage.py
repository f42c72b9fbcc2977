"""Coverage: a record for every weight that no step of a calibration offers to a method, with the reason."""

from torch import nn

from compress.calibration.experts import router_maps
from compress.calibration.records import LayerRecord
from compress.calibration.sequential import steps_of
from models.mixture_of_depths import DepthRouter
from models.weight_formats import form_of


def left_out(model: nn.Module, what: str) -> list[LayerRecord]:
    """A record for each matrix, and each router of mixture of depths, that no step of the calibration offers.

    Args:
        model: a `Transformer`.
        what: the weights are left as: "dense" or "in full precision".
    """
    routers = router_maps(model)
    offered = {name for step in steps_of(model) for name in step.linears}
    offered |= {name for name, module in model.named_modules() if form_of(module)}
    records = []
    for name, parameter in model.named_parameters():
        path = name.rpartition(".")[0]
        owner = model.get_submodule(path)
        if path not in offered and (parameter.dim() >= 2 or isinstance(owner, DepthRouter)):
            role = "the router that chooses the experts of a token" if path in routers else _role(owner)
            reason = f"{role}: left {what}"
            records.append(LayerRecord.skip(name.removesuffix(".weight"), tuple(parameter.shape), reason))
    return records


def _role(owner: nn.Module) -> str:
    """The role of the parameters of such a module."""
    if isinstance(owner, nn.Embedding):
        return "a table that is looked up, and no product reads"
    if isinstance(owner, DepthRouter):
        return "the router that chooses the tokens of its layer"
    if isinstance(owner, nn.Linear):
        return "a linear layer outside of the blocks, before the head"
    return "read by products of its own module, which is no linear layer"
