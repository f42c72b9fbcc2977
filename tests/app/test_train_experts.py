"""Training with experts: how their weights move, what is counted, and what TensorBoard shows of them."""

import pytest
import torch
from torch import nn

from app.optim import AdamW, Muon
from app.optim.base import parameters_by_role
from app.optim.muon import orthogonalized


class Stack(nn.Module):
    """Three experts' matrices and biases, as `models.experts.stacked` holds them."""

    def __init__(self, rows=6, columns=10):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(3, rows, columns, generator=generator))
        self.up_bias = nn.Parameter(torch.zeros(3, rows))


@pytest.mark.parametrize(("rows", "columns"), [(6, 10), (10, 6), (8, 8)])
def test_muon_moves_each_matrix_of_a_stack_as_if_it_were_alone(rows, columns):
    stack = Stack(rows, columns)
    apart = [nn.Parameter(matrix.clone()) for matrix in stack.up.detach()]
    ours = Muon(lr=0.1, weight_decay=0.2).build(stack)
    theirs = torch.optim.Muon(apart, lr=0.1, momentum=0.95, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    start, sizes = stack.up.detach().clone(), torch.tensor([1.0, 1e-3, 50.0])[:, None, None]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        stack.up.grad = torch.randn(stack.up.shape, generator=generator) * sizes
        for matrix, gradient in zip(apart, stack.up.grad, strict=True):
            matrix.grad = gradient.clone()
        ours.step()
        theirs.step()
    moved, wanted = stack.up.detach() - start, torch.stack([one.detach() for one in apart]) - start
    assert (moved - wanted).norm() < 0.01 * wanted.norm()  # both iterate in bf16


def test_the_matrices_of_a_stack_become_orthogonal_one_by_one():
    stack = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(1))
    stack[3] = 0  # an expert that saw no token
    values = torch.linalg.svdvals(orthogonalized(stack).float())  # (E, 6)
    assert (values[:3] > 0.4).all()
    assert (values[:3] < 1.6).all()
    assert (values[3] == 0).all()


def test_stacks_decay_as_matrices_do_and_their_biases_as_biases():
    stack = Stack()
    roles = parameters_by_role(stack)
    assert [one.shape for one in roles["hidden"]] == [(3, 6, 10)]
    assert [one.shape for one in roles["vector"]] == [(3, 6)]
    for optimization in (AdamW(weight_decay=0.3), Muon(weight_decay=0.3)):
        groups = optimization.build(stack).param_groups
        decay = {id(one): group["weight_decay"] for group in groups for one in group["params"]}
        assert decay == {id(stack.up): 0.3, id(stack.up_bias): 0.0}


def test_muon_on_stacks_goes_on_exactly_from_what_was_saved(tmp_path):
    stack, other = Stack(), Stack()
    optimizer, again = (Muon(lr=0.1).build(one) for one in (stack, other))

    def step(module, own, seed):
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        own.step()

    step(stack, optimizer, 1)
    torch.save([stack.state_dict(), optimizer.state_dict()], tmp_path / "state")
    step(stack, optimizer, 2)
    weights, state = torch.load(tmp_path / "state", weights_only=True)
    other.load_state_dict(weights)
    again.load_state_dict(state)
    step(other, again, 2)
    assert all(torch.equal(a, b) for a, b in zip(stack.parameters(), other.parameters(), strict=True))
