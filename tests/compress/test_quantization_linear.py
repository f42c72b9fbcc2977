"""The layers that hold and run packed integers, against the dense weight that they stand for."""

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress.quantization.affine import IntFormat, quantize
from compress.quantization.formats import packed as layers
from compress.quantization.formats.linear import PackedIntEmbedding, PackedIntLinear
from compress.quantization.kernels import packed_int
from compress.quantization.kernels.dispatch import choose, kernel_for
from models.errors import UserError

FORMATS = [
    IntFormat(bits, group, symmetric)
    for bits, group, symmetric in product((2, 3, 4, 8), (16, 32, 48, 96, 128, "channel", "tensor"), (True, False))
]
SHAPES = [(64, 128), (48, 100), (130, 200), (7, 33)]


def linear(rows, width, format, bias=True):
    module = nn.Linear(width, rows, bias=bias)
    quantized = quantize(module.weight.data, format)
    return PackedIntLinear.of(module, quantized), quantized.dequantize(), module.bias


def embedding(rows, width, format):
    module = nn.Embedding(rows, width)
    quantized = quantize(module.weight.data, format)
    return PackedIntEmbedding.of(module, quantized), quantized.dequantize()


def relative(y, expected):
    return float(((y.float() - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_dequantize_is_the_fake_quantized_weight_in_either_layout(format):
    for rows, width in SHAPES:
        packed, dense, bias = linear(rows, width, format)
        assert torch.equal(packed.dequantize(), dense)
        x = torch.randn(2, 3, width)
        assert torch.equal(packed(x), F.linear(x, dense) + bias)  # fp32: the exact product
        with torch.no_grad():
            y = packed(x.bfloat16())
        expected = choose(format, (rows, width), "cpu", 6).kernel
        assert packed.kernel is expected  # repacked where the table has a kernel, and nowhere else
        assert relative(y, F.linear(x.bfloat16().float(), dense, bias)) < 0.006
        assert torch.equal(packed.dequantize(), dense)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_embedding_rows_are_the_dense_rows_in_either_layout(format):
    for rows, width in SHAPES:
        packed, dense = embedding(rows, width, format)
        tokens = torch.randint(0, rows, (3, 5))
        assert torch.equal(packed(tokens), dense[tokens])
        hidden = torch.randn(2, width).bfloat16()
        with torch.no_grad():
            logits = packed.project(hidden)
        assert relative(logits, hidden.float() @ dense.T) < 0.006
        assert torch.equal(packed(tokens), dense[tokens])


@pytest.mark.parametrize("format", FORMATS[::3], ids=str)
def test_state_dict_holds_the_stored_tensors_whatever_the_layer_has_run(format):
    packed, dense, _ = linear(48, 100, format)
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    with torch.no_grad():
        packed(torch.randn(1, 100).bfloat16())
    after = packed.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.device("meta"):
        again = PackedIntLinear.empty(nn.Linear(100, 48), packed.spec())
    assert {name: (t.shape, t.dtype) for name, t in again.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in before.items()
    }
    again.load_state_dict(after, assign=True)
    assert torch.equal(again.dequantize(), dense)


def test_loading_into_a_layer_that_has_run():
    first, dense, _ = linear(64, 64, IntFormat(4, 32))
    second, _, _ = linear(64, 64, IntFormat(4, 32))
    with torch.no_grad():
        second(torch.randn(1, 64).bfloat16())
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.dequantize(), dense)
    assert second.kernel is None


@pytest.mark.parametrize("run_first", [True, False])
def test_packed_tensors_keep_their_dtypes_and_embeddings_follow(run_first):
    packed, dense, _ = linear(64, 64, IntFormat(4, 32, scale_dtype="bfloat16"))
    table, rows = embedding(64, 64, IntFormat(8, "channel", scale_dtype="float32"))
    if run_first:
        with torch.no_grad():
            packed(torch.randn(1, 64).bfloat16())
    model = nn.ModuleList([packed, table])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model.to(dtype)
        assert packed.scales.dtype == torch.bfloat16
        assert packed.bias.dtype == torch.float32
        assert table.scales.dtype == torch.float32
        assert torch.equal(packed.dequantize(), dense)
        tokens = torch.arange(64)
        assert torch.equal(table(tokens), rows.to(dtype))


def test_memory_is_the_true_bits():
    for bits, group, symmetric in product((2, 3, 4, 8), (64, "channel"), (True, False)):
        packed, _, _ = linear(256, 512, IntFormat(bits, group, symmetric), bias=False)
        groups = 8 if group == 64 else 1
        theory = 256 * (512 * bits + groups * (16 + (0 if symmetric else bits))) / 8
        assert packed.memory_bytes() == packed.stored_bytes() == sum(t.nbytes for t in packed.state_dict().values())
        assert theory <= packed.memory_bytes() <= 1.05 * theory


def test_a_layer_holds_its_weights_once():
    for bits in (2, 3, 4):
        packed, _, _ = linear(256, 512, IntFormat(bits, 64), bias=False)
        with torch.no_grad():
            packed(torch.randn(1, 512).bfloat16())
        assert packed.codes is None
        assert packed.memory_bytes() == 256 * 512 / 2 + 256 * 8 * 4  # 4-bit codes; scale and offset in bf16
    packed, _, _ = linear(256, 512, IntFormat(8, "channel"), bias=False)
    with torch.no_grad():
        packed(torch.randn(1, 512).bfloat16())
    assert packed.memory_bytes() == 256 * 512 + 256 * 2


def test_many_rows_take_the_dense_product_and_leave_the_layout():
    packed, dense, _ = linear(64, 64, IntFormat(4, 32), bias=False)
    kernel = choose(packed.format, packed.shape, "cpu", 1).kernel
    with torch.no_grad():
        packed(torch.randn(1, 64).bfloat16())
        x = torch.randn(kernel.largest_batch + 1, 64).bfloat16()
        assert torch.equal(packed(x), F.linear(x, dense.bfloat16()))
    assert packed.kernel is kernel
    assert kernel_for(packed, "cpu", len(x)).kernel is None
    assert "rows at once" in kernel_for(packed, "cpu", len(x)).reason


@pytest.mark.parametrize("run_first", [True, False])
@pytest.mark.parametrize(
    "format", [IntFormat(4, 32, False), IntFormat(3, 48), IntFormat(8, "channel"), IntFormat(4, "tensor", False)]
)
def test_a_dense_product_a_slice_at_a_time_is_the_whole_one(format, run_first, monkeypatch):
    monkeypatch.setattr(layers, "SLICE", 64)
    packed, dense, _ = linear(200, 96, format, bias=False)
    x = torch.randn(600, 96).bfloat16()
    with torch.no_grad():
        if run_first:
            packed(x[:1])
        y = packed(x)
    assert relative(y, F.linear(x.float(), dense)) < 0.006
    assert torch.equal(torch.cat([packed.dense(torch.float32, i, min(i + 64, 200)) for i in range(0, 200, 64)]), dense)


def test_gradients_reach_the_input_exactly():
    packed, dense, bias = linear(32, 64, IntFormat(4, 32))
    x = torch.randn(3, 64).bfloat16().requires_grad_()
    packed(x).sum().backward()
    reference = x.detach().clone().requires_grad_()
    F.linear(reference, dense.bfloat16()).add(bias.bfloat16()).sum().backward()
    assert torch.equal(x.grad, reference.grad)


def test_autocast_runs_the_kernel_as_it_would_cast_a_dense_layer():
    packed, dense, _ = linear(64, 64, IntFormat(4, 32), bias=False)
    x = torch.randn(2, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = packed(x)
    assert y.dtype == torch.bfloat16
    assert packed.kernel is not None
    assert relative(y, F.linear(x.bfloat16().float(), dense)) < 0.006


def test_copies_are_independent():
    packed, dense, _ = linear(64, 64, IntFormat(4, 32))
    with torch.no_grad():
        packed(torch.randn(1, 64).bfloat16())
    copied = copy.deepcopy(packed)
    packed.fill(quantize(torch.randn(64, 64), IntFormat(4, 32)))
    assert torch.equal(copied.dequantize(), dense)


def test_compiles():
    packed, dense, _ = linear(64, 64, IntFormat(4, 32), bias=False)
    compiled = torch.compile(packed, backend="eager", fullgraph=True)
    x = torch.randn(2, 64).bfloat16()
    with torch.no_grad():
        assert torch.equal(compiled(x), F.linear(x, dense.bfloat16()))
        packed(x)  # an eager call repacks
        assert relative(compiled(x), F.linear(x.float(), dense)) < 0.006


def test_no_rows_and_no_tokens():
    packed, _, _ = linear(64, 64, IntFormat(4, 32))
    table, _ = embedding(64, 64, IntFormat(4, 32, False))
    with torch.no_grad():
        assert packed(torch.randn(0, 64).bfloat16()).shape == (0, 64)
    assert table(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 64)


@pytest.mark.parametrize(
    ("format", "words"),
    [
        (IntFormat(4, 16), "multiple of 32"),
        (IntFormat(4, 32, scale_dtype="float32"), "bfloat16 scales"),
        (IntFormat(8, 64), "one scale a row"),
        (IntFormat(8, "channel", False), "no zero points"),
    ],
)
def test_the_table_says_why_a_form_has_no_kernel(format, words):
    choice = choose(format, (64, 128), "cpu", 1)
    assert choice.kernel is None
    assert choice.name == "dequantize, then matmul"
    assert words in choice.reason


def test_the_table_knows_dtype_device_and_dense_layers():
    assert "float32" in choose(IntFormat(4, 32), (64, 64), "cpu", 1, torch.float32).reason
    assert choose(IntFormat(4, 32), (64, 64), "mps", 1).reason == "no packed kernel on mps"
    assert kernel_for(nn.Linear(2, 2)).name == "aten::linear"
    assert choose(IntFormat(3, 32), (64, 64), "cpu", 1).name == "aten::_weight_int4pack_mm_for_cpu"
    assert choose(IntFormat(8, "channel"), (64, 64), "cpu", 1).name == "aten::_weight_int8pack_mm"


def test_an_unknown_layout_of_the_processor_is_dequantized(monkeypatch):
    monkeypatch.setattr(packed_int, "_cpu_layout", lambda: None)
    packed, dense, _ = linear(64, 64, IntFormat(4, 32), bias=False)
    x = torch.randn(1, 64).bfloat16()
    with torch.no_grad():
        assert torch.equal(packed(x), F.linear(x, dense.bfloat16()))
    assert "layout" in kernel_for(packed).reason


def test_a_spec_that_is_none_is_refused():
    with pytest.raises(UserError, match="packed integers: unknown key 'groups'"):
        PackedIntLinear.empty(nn.Linear(4, 4), {"bits": 4, "groups": 3})
    with pytest.raises(UserError, match="bits must be"):
        PackedIntEmbedding.empty(nn.Embedding(4, 4), {"bits": 7})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the CUDA kernels need a GPU")
@pytest.mark.parametrize("format", [f for f in FORMATS if choose(f, (64, 128), "cuda", 1).kernel], ids=str)
def test_cuda_kernels_give_the_dense_product_and_the_weights_back(format):
    for rows, width in SHAPES:
        packed, dense, _ = linear(rows, width, format, bias=False)
        packed.cuda()
        x = torch.randn(3, width, device="cuda").bfloat16()
        with torch.no_grad():
            y = packed(x)
        assert packed.kernel is not None
        assert relative(y.cpu(), F.linear(x.float().cpu(), dense)) < 0.006
        assert torch.equal(packed.cpu().dequantize(), dense)
