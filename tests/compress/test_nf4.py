"""NF4 beside `bitsandbytes`: the same bytes, the same weights, and products through its kernels."""

import builtins
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress.quantization.kernels import nf4 as nf4_kernels
from compress.quantization.kernels.dispatch import choose, kernel_for
from compress.quantization.kernels.nf4 import Absmax, Nf4Cpu, Nf4Cuda, Nf4Format
from compress.quantization.methods.nf4 import Nf4, Nf4Embedding, Nf4Linear, Nf4Weights
from models.cpu.matmul import linear
from models.errors import UserError

bnb = pytest.importorskip("bitsandbytes.functional")
FORMATS = [Nf4Format(block, double) for block, double in product((32, 64, 128), (False, True))]
SHAPES = [(64, 128), (48, 256), (7, 100), (130, 192), (5, 33), (300, 128)]


def weights(rows, width, format):
    weight = torch.randn(rows, width)
    return weight, Nf4Weights(*nf4_kernels.quantize(weight, format), format)


def layer(rows, width, format, bias=False):
    module = nn.Linear(width, rows, bias=bias)
    return Nf4Linear.of(module, Nf4Weights(*nf4_kernels.quantize(module.weight.data, format), format)), module


def relative(y, expected):
    return float(((y.float() - expected).norm() / expected.norm()).detach())


@pytest.fixture
def without_package(monkeypatch):
    """As if bitsandbytes were not installed."""
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    nf4_kernels.missing.cache_clear()
    yield
    nf4_kernels.missing.cache_clear()


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_and_weights_are_those_of_bitsandbytes(format, shape):
    weight, ours = weights(*shape, format)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=format.block_size, compress_statistics=format.double_quantization, quant_type="nf4"
    )
    assert torch.equal(ours.codes, packed.view(-1))
    absmax = ours.absmax.dequantize()
    if format.double_quantization:
        assert torch.equal(ours.absmax.scales, state.state2.absmax)
        assert torch.equal(ours.absmax.mean, state.offset)
        plain = nf4_kernels.quantize(weight, Nf4Format(format.block_size))[1].values
        theirs = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        assert (
            (absmax - plain).abs() <= (theirs - plain).abs() + 1e-6
        ).all()  # its search on the CPU may take the next but nearest level
        assert (ours.absmax.values != state.absmax).sum() <= max(1, 0.1 * len(state.absmax))
        absmax = Absmax(state.absmax, state.state2.absmax, state.offset).dequantize()
    else:
        assert torch.equal(ours.absmax.values, state.absmax)
    count, whole = weight.numel(), shape[1] % format.block_size == 0
    state.shape = shape if whole else (1, count)  # its kernel for the CPU misreads blocks that end inside a row
    expected = bnb.dequantize_4bit(packed, state).view(shape)
    assert torch.equal(nf4_kernels.dequantize(ours.codes, absmax, format.block_size, shape, torch.float32), expected)
    for dtype in (torch.bfloat16, torch.float16):
        eager = nf4_kernels.dequantize(ours.codes, absmax, format.block_size, shape, dtype)
        assert torch.equal(eager, expected.to(dtype))
        assert torch.equal(nf4_kernels.fast_dequantize(ours.codes, absmax, format.block_size, shape, dtype), eager)


def test_the_dynamic_map_is_that_of_bitsandbytes():
    assert torch.equal(nf4_kernels._dynamic_map(torch.device("cpu")), bnb.create_dynamic_map())
    assert torch.equal(nf4_kernels.levels(torch.device("cpu")), bnb.get_4bit_type("nf4", "cpu"))


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layers_run_their_weights_in_either_layout(format, shape):
    packed, module = layer(*shape, format, bias=True)
    dense, bias, x = packed.dequantize(), module.bias, torch.randn(2, 3, shape[1])
    assert torch.equal(packed(x), F.linear(x, dense) + bias)
    with torch.no_grad():
        y = packed(x.bfloat16())
    assert relative(y, F.linear(x.bfloat16().float(), dense, bias)) < 0.006
    assert packed.kernel is choose(format, shape, "cpu", 6).kernel
    assert torch.equal(packed.dequantize(), dense)
    with torch.no_grad():
        many = torch.randn(300, shape[1]).bfloat16()
        assert torch.equal(packed(many), linear(many, dense.bfloat16()) + bias.bfloat16())
    with torch.device("meta"):
        again = Nf4Linear.empty(module, packed.spec())
    again.load_state_dict(packed.state_dict(), assign=True)
    assert torch.equal(again.dequantize(), dense)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_embedding_rows_are_the_dense_rows_in_either_layout(shape):
    table = Nf4(double_quantization=True).compress("embedding", nn.Embedding(*shape), None)[0]
    assert isinstance(table, Nf4Embedding)
    dense, tokens, hidden = table.dequantize(), torch.randint(0, shape[0], (3, 5)), torch.randn(2, shape[1]).bfloat16()
    assert torch.equal(table(tokens), dense[tokens])
    with torch.no_grad():
        assert relative(table.project(hidden), hidden.float() @ dense.T) < 0.006
    assert torch.equal(table(tokens), dense[tokens])


def test_the_kernel_of_cuda_multiplies_the_stored_layout():
    """On the CPU the same operator of the package unpacks and multiplies: the reference of its arguments."""
    for format, (rows, width) in product(FORMATS, [(64, 128), (48, 256)]):
        weight, ours = weights(rows, width, format)
        kernel = Nf4Cuda()
        held = kernel.repack(ours.codes, ours.absmax.dequantize(), format, (rows, width))
        x = torch.randn(3, width).bfloat16()
        dense = nf4_kernels.dequantize(ours.codes, held.absmax, format.block_size, (rows, width), torch.float32)
        assert relative(kernel.multiply(x, held, format, rows), x.float() @ dense.T) < 0.006
        assert torch.equal(kernel.restore(held, 0, rows, width), ours.codes)
        index = torch.tensor([3, 0, 3])
        values = nf4_kernels.levels(weight.device)[kernel.codes(held, index, width).int()]
        place = index[:, None] * width + torch.arange(width)
        assert torch.equal(values * held.absmax[place // format.block_size], dense[index])


def test_memory_is_the_true_bits():
    for block, double in product((64, 128), (False, True)):
        packed, _ = layer(256, 512, Nf4Format(block, double))
        blocks = 256 * 512 // block
        theory = 256 * 512 / 2 + (blocks + 4 * blocks / 256 if double else 4 * blocks)
        assert packed.memory_bytes() == packed.stored_bytes() == sum(t.nbytes for t in packed.state_dict().values())
        assert theory <= packed.memory_bytes() <= 1.05 * theory
        with torch.no_grad():
            packed(torch.randn(1, 512).bfloat16())
        if packed.kernel is not None:  # the codes once, and beside the stored largest values those in bf16
            assert packed.codes is None
            assert packed.memory_bytes() == packed.stored_bytes() + 2 * blocks


def test_without_the_package_weights_are_the_same_and_the_reason_says_how_to_install_it(without_package):
    packed, _ = layer(64, 128, Nf4Format())
    x = torch.randn(2, 128).bfloat16()
    with torch.no_grad():
        assert torch.equal(packed(x), linear(x, packed.dequantize().bfloat16()))
    assert kernel_for(packed).reason == "needs bitsandbytes: pip install 'espalier-lm[bitsandbytes]'"
    with torch.no_grad():
        assert torch.equal(packed(x[:0]), x.new_empty(0, 64))


def test_the_table_says_why_the_kernel_is_not_taken():
    if Nf4Cpu().refuses(Nf4Format(), 64, 128):
        pytest.skip(Nf4Cpu().refuses(Nf4Format(), 64, 128))
    assert choose(Nf4Format(), (64, 128), "cpu", 1).name == "bitsandbytes::gemv_4bit"
    assert "whole blocks of 64" in choose(Nf4Format(), (64, 100), "cpu", 1).reason
    assert "float32" in choose(Nf4Format(), (64, 128), "cpu", 1, torch.float32).reason
    assert "rows at once" in choose(Nf4Format(), (64, 128), "cpu", 4096).reason


def test_wrong_numbers_and_broken_weights_are_refused():
    with pytest.raises(UserError, match="block_size must be one of 32, 64"):
        Nf4(block_size=48)
    with pytest.raises(UserError, match="NF4 weights: unknown key 'bits'"):
        Nf4Linear.empty(nn.Linear(4, 4), {"bits": 4})
    module = nn.Linear(64, 64)
    module.weight.data[3, 5] = torch.nan
    with pytest.raises(UserError, match=r"blocks\.1\.attention\.q holds NaN"):
        Nf4().compress("blocks.1.attention.q", module, None)


def test_weights_that_fill_no_whole_block_are_counted():
    record = Nf4().compress("x", nn.Linear(33, 5), None)[1]
    assert record.note == "blocks of 64 do not divide 165 weights: the last has 37"
    assert record.achieved["bits"] == 8 * (83 + 3 * 4) / 165
