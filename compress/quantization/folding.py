"""Scale folding: scales of input channels are divided out of the operation before, so that the block is unchanged.

A map that reads x diag(1/s) in place of x gives the same output once its columns are multiplied by s. What hands it x
can carry the 1/s where it is linear in its own parameters, or passes a positive factor on:

    norm -> q, k, v, ...            weight (and bias) of the norm, where it stands before the branch
    norm -> gate, up (router)       likewise; all experts and the router read one norm, and are scaled together
    up -> down                      rows of up, under a gate or a ReLU
    v -> o                          rows of v, where the output of attention is linear in v channel by channel; query
                                    heads that share a key/value head share its scales

A norm's readers are those maps that are seen to read its output on calibration text, views of it included. Whether
they are all that reads it, and whether what lies between v and o carries a scale through, is tried: scales that are
powers of two change no mantissa, so a fold that is exact gives the same branch, and any other a different one.

D model width, K input channels of a map.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compress.calibration.experts import router_maps
from models.attention.full import FullAttention
from models.attention.protocol import mixed_of
from models.feedforward import DenseFeedForward
from models.specs import AFTER

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}  # relative, of a branch that should not change
COARSE = 1e-3  # in dtypes of 16 bits


@dataclass(frozen=True)
class Fold:
    """One operation and the maps behind it that a scale can go between.

    Args:
        source: the operation, as a sentence calls it.
        branch: `attention` or `feedforward`, the sub-layer that it lies in or before.
        producers: what is divided: the channels of a norm, or the rows of maps.
        consumers: full name -> map whose columns are multiplied.
        carriers: further maps whose columns are multiplied, which are not quantized: routers.
        channels: (K,) the producer's channel that each column of the consumers reads.
        whole: whether the consumers are looked at through the output of the sub-layer, or each through its own.
    """

    source: str
    branch: str
    producers: tuple[nn.Module, ...]
    consumers: dict[str, nn.Linear]
    channels: Tensor
    carriers: tuple[nn.Linear, ...] = ()
    whole: bool = False

    @torch.no_grad()
    def apply(self, scale: Tensor) -> None:
        """Divide the producers by `scale` (one a channel, fp32) and multiply the columns that read them."""
        for module in self.producers:
            for parameter in module.parameters(recurse=False):  # a weight, and a bias where there is one
                shape = (-1, *[1] * (parameter.dim() - 1))
                parameter.copy_(parameter.to(_wide(parameter)) / scale.view(shape))
        for module in (*self.consumers.values(), *self.carriers):
            module.weight.copy_(module.weight.to(_wide(module.weight)) * scale[self.channels])


@dataclass
class Folds:
    """Folds of a block, and for every other linear layer the reason why it has none."""

    found: list[Fold] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


Call = tuple[tuple, dict]  # positional and named arguments of one call of a sub-layer
Run = Callable[[], None]  # passes some calibration text through the block


def find_folds(block: nn.Module, prefix: str, mine: Collection[str], run: Run) -> Folds:
    """The folds of a block.

    Args:
        block: a `models.block.Block` with dense weights where `mine` says so.
        prefix: its name in the model.
        mine: full names of the maps that may be scaled; a fold that needs another is refused.
        run: passes calibration text through the block.
    """
    finder = _Finder(block, prefix, mine, run)
    with torch.no_grad():
        for branch in ("attention", "feedforward"):
            if getattr(block, branch) is not None:
                finder.behind_norm(branch)
                finder.inside(branch)
    for name in mine:
        if not any(name in fold.consumers for fold in finder.folds.found):
            finder.folds.refused.setdefault(name, "nothing before it can carry a scale of its inputs")
    return finder.folds


class _Finder:
    def __init__(self, block: nn.Module, prefix: str, mine: Collection[str], run: Run) -> None:
        self.block, self.prefix, self.mine, self.run = block, prefix, mine, run
        self.folds = Folds()
        names = [id(p) for _, p in block.named_parameters(remove_duplicate=False)]
        self.shared = {one for one in names if names.count(one) > 1}

    def behind_norm(self, branch: str) -> None:
        """The maps of a branch that read its norm."""
        norm = getattr(self.block, f"{branch}_norm")
        maps = self._maps(branch)
        if self.block.norm_position in AFTER or isinstance(norm, nn.Identity):
            where = "the norm stands behind the branch" if self.block.norm_position in AFTER else "it has no norm"
            reason = f"it reads the residual stream itself: {where}"
            names = [name for name in maps if name in self.mine and name.rpartition(".")[2] not in ("o", "down")]
            self.folds.refused |= dict.fromkeys(names, reason)
            return
        readers, silent = self._readers(norm, maps)
        if branch == "feedforward":  # experts read rows that were picked from the norm's output
            readers = [name for name in maps if name.rpartition(".")[2] != "down"]
            silent = []
        wanted = [name for name in readers if name in self.mine]
        if not wanted:
            return
        reason = "" if norm.weight is not None else "the norm before it has no weights"
        if type(norm) not in (nn.RMSNorm, nn.LayerNorm):
            reason = f"the norm before it is a {type(norm).__name__}, of which no fold is known"
        if silent:
            reason = f"{silent[0]} read nothing on the calibration text"
        routers = {f"{self.prefix}.{branch}.{name}" for name in router_maps(getattr(self.block, branch))}
        carriers = tuple(maps[name] for name in readers if name in routers)
        alien = [name for name in readers if name not in self.mine and maps[name] not in carriers]
        if alien:
            reason = f"{alien[0]}, which reads the same input, is not scaled with it"
        consumers = {name: maps[name] for name in wanted}
        width = maps[wanted[0]].in_features
        channels = torch.arange(width, device=maps[wanted[0]].weight.device)
        source = f"{branch}_norm" + (", the router scaled with it" if carriers else "")
        fold = Fold(source, branch, (norm,), consumers, channels, carriers, whole=True)
        self._take(fold, reason, "something else reads the output of its norm as well")

    def inside(self, branch: str) -> None:
        """up before down, and v before o."""
        if branch == "attention":
            self._values()
            return
        for path, module in self.block.feedforward.named_modules():
            name = ".".join(filter(None, (self.prefix, branch, path, "down")))
            if not isinstance(module, DenseFeedForward) or name not in self.mine:
                continue
            if not module.scales_with_up:
                self.folds.refused[name] = "the activation before it carries no scale through"
                continue
            up = name.removesuffix("down") + "up"
            reason = "" if up in self.mine else f"{up}, which would carry it, is not scaled with it"
            channels = torch.arange(module.down.in_features, device=module.down.weight.device)
            self._take(Fold("up", branch, (module.up,), {name: module.down}, channels), reason)

    def _values(self) -> None:
        attention, maps = self.block.attention, self._maps("attention")
        name = f"{self.prefix}.attention.o"
        if name not in self.mine:
            return
        values = [one for one in maps if one.rpartition(".")[2] in ("v", "v_global")]
        if not values:
            self.folds.refused[name] = "there is no map v before it"
            return
        alien = [one for one in values if one not in self.mine]
        reason = f"{alien[0]}, which would carry it, is not scaled with it" if alien else ""
        channels = _value_channels(attention, maps[values[0]].out_features, maps[name].in_features)
        if channels is None:
            self.folds.refused[name] = "its inputs are not the channels of v"
            return
        producers = tuple(maps[one] for one in values)
        fold = Fold("v", "attention", producers, {name: maps[name]}, channels.to(maps[name].weight.device))
        self._take(fold, reason, "what lies between v and o carries no scale through")

    def _take(self, fold: Fold, reason: str, otherwise: str | None = None) -> None:
        """Keep the fold, or the reason against it; where `otherwise` is given, the fold is tried first."""
        parts = [*fold.producers, *fold.consumers.values(), *fold.carriers]
        if not reason and any(id(part.weight) in self.shared for part in parts):
            reason = "weights that it needs are shared with another module"
        if not reason and otherwise is not None and not self._exact(fold):
            reason = otherwise
        if not reason:
            self.folds.found.append(fold)
        for name in fold.consumers if reason else ():
            self.folds.refused[name] = reason

    def _maps(self, branch: str) -> dict[str, nn.Linear]:
        module = getattr(self.block, branch)
        return {f"{self.prefix}.{branch}.{n}": m for n, m in module.named_modules() if isinstance(m, nn.Linear)}

    def _readers(self, norm: nn.Module, maps: dict[str, nn.Linear]) -> tuple[list[str], list[str]]:
        """Names of the maps that read the norm's output, or a view of it, and of those that read nothing at all."""
        outputs: list[Tensor] = []  # held, so that no other tensor takes their place in memory
        reads: dict[str, bool] = {}

        def read(name: str, x: Tensor) -> None:
            places = {y.untyped_storage().data_ptr() for y in outputs}
            reads[name] = reads.get(name, False) or x.untyped_storage().data_ptr() in places

        handles = [norm.register_forward_hook(lambda _, args, y: outputs.append(y))]
        handles += [
            module.register_forward_pre_hook(lambda _, args, name=name: read(name, args[0]))
            for name, module in maps.items()
        ]
        with _removing(handles):
            self.run()
        return [name for name in maps if reads.get(name)], [name for name in maps if name not in reads]

    def _exact(self, fold: Fold) -> bool:
        """Whether the branch stays as it is under scales that change no mantissa."""
        producer = fold.producers[0].weight
        count = torch.arange(producer.shape[0], device=producer.device)
        scale = torch.tensor([0.5, 2.0, 1.0, 4.0], device=producer.device)[count % 4]
        before = self._outputs(fold.branch)
        fold.apply(scale)
        after = self._outputs(fold.branch)
        fold.apply(1 / scale)  # the weights come back to the bit
        changed = sum(float((a - b).double().square().sum()) for a, b in zip(after, before, strict=True))
        size = sum(float(b.double().square().sum()) for b in before)
        return changed**0.5 <= TOLERANCE.get(producer.dtype, COARSE) * size**0.5

    def _outputs(self, branch: str) -> list[Tensor]:
        found: list[Tensor] = []
        handle = getattr(self.block, branch).register_forward_hook(
            lambda _, args, result: found.append(mixed_of(result).y.clone())
        )
        with _removing([handle]):
            self.run()
        return found


class _removing:
    """Hooks that go when the block of code ends."""

    def __init__(self, handles: list) -> None:
        self.handles = handles

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()


def _wide(tensor: Tensor) -> torch.dtype:
    """The dtype to scale in: one rounding."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _value_channels(attention: nn.Module, values: int, inputs: int) -> Tensor | None:
    """(inputs,) the channel of v that each input of o is a mixture of; None where the two do not go together."""
    if values == inputs:
        return torch.arange(inputs)
    if not isinstance(attention, FullAttention) or values * attention.heads != inputs * attention.kv_heads:
        return None
    heads, groups, width = attention.heads, attention.kv_heads, inputs // attention.heads
    return torch.arange(values).view(groups, 1, width).expand(groups, heads // groups, width).reshape(-1)
