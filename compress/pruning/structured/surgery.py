"""Removal of neurons, query heads, key/value groups and experts from a block: tensors and config shrink.

torch-pruning finds and cuts what belongs to a neuron; heads are cut by explicit indexes, as torch-pruning never prunes
key/value heads. The block is then built anew from its new config, and takes over the tensors that are left: any width
that is not the one asked for is an error, never a silent no-op.

D model width, G key/value groups, R query heads of a group, W head width.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.attention.full import FullAttention
from models.block import Block
from models.config import LayerConfig
from models.experts import Experts
from models.feedforward import DenseFeedForward
from models.transformer import Transformer


@torch.no_grad()
def cut_neurons(feedforward: DenseFeedForward, kept: Tensor) -> None:
    """Keep the neurons `kept` (sorted, int64) of a feed-forward in place, with every row and column that is theirs.

    Raises RuntimeError when the widths afterwards are not the ones asked for.
    """
    import torch_pruning  # takes two seconds to import, and only this needs it

    device, width = feedforward.down.weight.device, feedforward.down.out_features
    count = feedforward.down.in_features
    dropped = sorted(set(range(count)) - set(kept.tolist()))
    if dropped:
        frozen = [parameter for parameter in feedforward.parameters() if not parameter.requires_grad]
        for parameter in frozen:  # the coupling is read from the autograd graph: without one, only `down` would shrink
            parameter.requires_grad_(True)
        with torch.enable_grad():
            example = torch.zeros(1, 2, width, device=device, dtype=feedforward.down.weight.dtype)
            graph = torch_pruning.DependencyGraph().build_dependency(feedforward, example_inputs=example)
            group = graph.get_pruning_group(feedforward.down, torch_pruning.prune_linear_in_channels, dropped)
            group.prune()
    hidden = [feedforward.down.in_features, *(linear.out_features for linear in feedforward.writers())]
    if any(found != len(kept) for found in hidden):
        raise RuntimeError(f"{len(kept)} of {count} neurons were to be kept, but the maps now have {hidden}")


@torch.no_grad()
def cut_heads(attention: FullAttention, kept: Tensor) -> None:
    """Keep the query heads `kept` (G', R') of the old numbering, a row for every group that stays, in place.

    The heads of a row must be of one group; the group's keys and values stay, those of all other groups go.
    """
    width, per_group = attention.head_width, attention.heads // attention.kv_heads
    groups = kept[:, 0] // per_group  # (G',)
    if not torch.equal(kept // per_group, groups[:, None].expand_as(kept)):
        raise ValueError("each row must hold query heads of one group")
    rows = _channels(kept.flatten(), width)  # (G' * R' * W,)
    shared = _channels(groups, width)  # (G' * W,)
    _take_rows(attention.q, rows)
    _take_rows(attention.k, shared)
    _take_rows(attention.v, shared)
    attention.o.weight = nn.Parameter(attention.o.weight[:, rows].contiguous())
    attention.heads, attention.kv_heads = kept.numel(), len(groups)


def take_experts(state: Mapping[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
    """The tensors of a block with the experts `kept` (E',) alone, renumbered, and their rows of the router."""
    numbers = {old: new for new, old in enumerate(kept.tolist())}
    experts, router = "feedforward.experts.", "feedforward.router."
    found = {}
    for name, tensor in state.items():
        if name.startswith(experts):
            number, _, rest = name.removeprefix(experts).partition(".")
            if int(number) in numbers:
                found[f"{experts}{numbers[int(number)]}.{rest}"] = tensor
        else:  # everything in a router has a row for each expert
            found[name] = tensor[kept] if name.startswith(router) else tensor
    return found


def _channels(units: Tensor, width: int) -> Tensor:
    """Channels of units that are `width` wide: (U,) -> (U * width,)."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def _take_rows(linear: nn.Linear, rows: Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight[rows].contiguous())
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[rows].contiguous())


@torch.no_grad()
def compensate(linear: nn.Linear, removed: Tensor, mean: Tensor) -> None:
    """Let the bias take over the mean (K,) of the input channels `removed` (bool, (K,)): b += W[:, j] mean(a_j).

    Exact when these channels never change. A map without a bias gets one.
    """
    if linear.bias is None:
        linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
    shift = linear.weight[:, removed].float() @ mean[removed].float()  # (out,)
    linear.bias += shift.to(linear.bias.dtype)


def shrunk(
    layer: LayerConfig,
    neurons: int | None,
    heads: tuple[int, int] | None,
    experts: int | None,
    biased: dict[str, bool],
) -> LayerConfig:
    """The config of a layer with so many neurons, (groups, query heads of a group) and experts, and output biases."""
    attention, feedforward = layer.attention, layer.feedforward
    if heads is not None:
        attention = replace(attention, kv_heads=heads[0], heads=heads[0] * heads[1], out_bias=biased["attention"])
    if neurons is not None:
        network = feedforward.expert if isinstance(feedforward, Experts) else feedforward
        network = replace(network, width=neurons, out_bias=biased["feedforward"])
        feedforward = replace(feedforward, expert=network) if isinstance(feedforward, Experts) else network
    if experts is not None:
        feedforward = replace(feedforward, count=experts)
    return replace(layer, attention=attention, feedforward=feedforward)


def adopt(model: Transformer, index: int, layer: LayerConfig, state: dict[str, Tensor]) -> None:
    """Put a block built from `layer` with exactly the tensors `state` in place of block `index`; the config follows.

    Raises RuntimeError when the tensors are not those of the config.
    """
    old = model.blocks[index]
    layers = (*model.config.layers[:index], layer, *model.config.layers[index + 1 :])
    config = replace(model.config, layers=layers)
    with torch.device("meta"):
        block = Block(config.layers[index], config, old.place)
    block.load_state_dict(state, strict=True, assign=True)
    model.blocks[index] = block.train(old.training)
    model.config = config
