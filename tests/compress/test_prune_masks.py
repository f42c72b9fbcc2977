"""Masks are recovered from zeros and hold through training: no masked weight moves."""

import pytest
import torch
from torch import nn

from compress.pruning.masks import HeldMasks, count_violations, masks_of
from compress.pruning.patterns import NOfM


def pruned_network():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    with torch.no_grad():
        for index in (0, 2):
            network[index].weight.mul_(NOfM(2, 4).mask(network[index].weight.abs()))
    return network


def train(network, optimizers, steps=25):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        inputs, targets = torch.randn(8, 16, generator=generator), torch.randn(8, 4, generator=generator)
        loss = (network(inputs) - targets).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.5),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.5, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.5, amsgrad=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_violation_after_steps_with_weight_decay_and_momentum(name):
    network = pruned_network()
    masks = masks_of(network)
    assert set(masks) == {"0.weight", "2.weight"}
    before = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = OPTIMIZERS[name](network.parameters())
    held = HeldMasks(network, masks)
    held.attach(optimizer)
    train(network, [optimizer])
    assert count_violations(network, masks) == 0
    assert all(not torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))


def test_momentum_from_before_the_mask_is_cleared():
    network = pruned_network()
    masks = masks_of(network)
    optimizer = OPTIMIZERS["sgd"](network.parameters())
    train(network, [optimizer], steps=3)  # without the mask: weights grow back, momentum is full
    assert count_violations(network, masks) > 0
    held = HeldMasks(network, masks)
    held.attach(optimizer)
    train(network, [optimizer], steps=1)
    assert count_violations(network, masks) == 0
    assert not optimizer.state[network[0].weight]["momentum_buffer"][~masks["0.weight"]].any()


def test_an_orthogonalised_update_is_held_too():
    network = pruned_network()
    masks = masks_of(network)
    matrices = [parameter for parameter in network.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in network.parameters() if parameter.ndim != 2]
    optimizers = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(vectors)]
    held = HeldMasks(network, masks)
    held.attach(*optimizers)
    train(network, optimizers, steps=5)
    assert count_violations(network, masks) == 0


def test_masked_gradients_do_not_count_in_the_norm_and_release_frees_the_weights():
    network = pruned_network()
    masks = masks_of(network)
    held = HeldMasks(network, masks)
    network(torch.randn(4, 16)).sum().backward()
    assert not network[0].weight.grad[~masks["0.weight"]].any()
    held.release()
    optimizer = OPTIMIZERS["sgd"](network.parameters())
    train(network, [optimizer], steps=1)
    assert count_violations(network, masks) > 0


def test_dense_and_empty_layers_are_not_masked():
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.zeros_(network[1].weight)
    assert masks_of(network) == {}
