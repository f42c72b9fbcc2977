"""Products in bf16 against products in fp32 of the same numbers, widened to fp32 and as they are."""

import inspect
import pkgutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from models.cpu import dispatch
from models.cpu.matmul import linear, product
from models.linear import Linear


@pytest.fixture(params=[True, False], ids=["widened", "native"])
def widens(request, monkeypatch):
    """Whether bf16 products run in fp32, whatever this processor has."""
    monkeypatch.setattr(dispatch, "WIDENS_BF16", request.param)
    return request.param


def matrix(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(
    "a", [matrix(5, 7), matrix(7, 5).t(), matrix(5, 14)[:, ::2], matrix(5, 9)[:, 1:8], matrix(18, 7), matrix(7, 18).t()]
)
@pytest.mark.parametrize("b", [matrix(7, 6, seed=1), matrix(6, 7, seed=1).t()])
def test_any_layout(widens, a, b):
    exact = a.float() @ b.float()
    rounding = 1e-6 if widens and len(a) >= 16 else 2.0**-8
    found = product(a, b)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=rounding, atol=1e-5)
    start = torch.ones(len(a), 6)
    torch.testing.assert_close(product(a, b, out=start, accumulate=True), exact + 1, rtol=2 * rounding, atol=1e-2)
    assert product(a, b, out=start) is start
    torch.testing.assert_close(start, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_are_plain_products(widens, dtype):
    a, b = matrix(5, 7, dtype=dtype), matrix(7, 6, dtype=dtype, seed=1)
    assert torch.equal(product(a, b), a @ b)


def test_empty_products(widens):
    assert product(matrix(0, 3), matrix(3, 4)).shape == (0, 4)
    assert torch.equal(product(matrix(2, 0), matrix(0, 4)), torch.zeros(2, 4))
    assert linear(matrix(2, 0, 3), matrix(4, 3)).shape == (2, 0, 4)


def values_and_gradients(function, x, weight, bias):
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    y = function(*leaves)
    return y, *torch.autograd.grad(y.float().square().sum(), leaves)


def test_linear_and_its_gradients(widens):
    given = matrix(2, 9, 16), matrix(20, 16, seed=1), matrix(20, seed=2)
    exact = values_and_gradients(F.linear, *(tensor.float() for tensor in given))
    for mine, true in zip(values_and_gradients(linear, *given), exact, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.float() - true).norm() <= 0.01 * true.norm()


def test_linear_under_autocast(widens):
    x, weight, bias = matrix(3, 16, dtype=torch.float32), matrix(12, 16, dtype=torch.float32, seed=1), torch.ones(12)
    with torch.autocast("cpu", torch.bfloat16):
        found = values_and_gradients(linear, x, weight, bias)
        expected = values_and_gradients(F.linear, x, weight, bias)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine.float() - theirs.float()).norm() <= 0.01 * theirs.float().norm()


def test_same_value_with_and_without_gradient(widens):
    x, weight = matrix(17, 16), matrix(12, 16, seed=1)
    with torch.no_grad():
        quiet = linear(x, weight)
    assert torch.equal(quiet, linear(x, weight.requires_grad_()))


def test_compiled_equals_eager(widens):
    torch._dynamo.reset()
    given = matrix(18, 16), matrix(12, 16, seed=1), matrix(12, seed=2)
    eager = values_and_gradients(linear, *given)
    compiled = values_and_gradients(torch.compile(linear, backend="aot_eager", fullgraph=True), *given)
    for mine, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_module_is_an_ordinary_linear_in_fp32(widens):
    layer = Linear(16, 12, bias=True, std=0.02)
    x = matrix(3, 16, dtype=torch.float32)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_two_threads_of_python_may_multiply_at_once(widens):
    from concurrent.futures import ThreadPoolExecutor

    a, b = matrix(64, 64), matrix(64, 64, seed=1)
    expected = product(a, b)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: product(a, b), range(20)))
    assert all(torch.equal(one, expected) for one in found)


def test_attention_trains_in_the_quicker_dtype_only(widens):
    q = matrix(1, 2, 8, 16)
    assert dispatch.attention_dtype(q) == torch.bfloat16
    assert dispatch.attention_dtype(q.float().requires_grad_()) == torch.float32
    q.requires_grad_()
    assert dispatch.attention_dtype(q) == (torch.float32 if widens else torch.bfloat16)
    with torch.no_grad():
        assert dispatch.attention_dtype(q) == torch.bfloat16


def test_the_core_imports_where_torch_has_no_onednn():
    """As on Apple silicon: the operators of oneDNN are not registered there."""
    code = (
        "import torch\n"
        "torch.backends.mkldnn.is_available = lambda: False\n"
        "torch.ops.mkldnn = object()\n"
        "import models.cpu.dispatch\n"
        "assert models.cpu.dispatch.WIDENS_BF16"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", dispatch.PATHS, ids=lambda path: path.function)
def test_each_cpu_path_is_asked_for_by_the_function_that_the_table_names(path):
    for name in (path.function, path.condition, path.asked_by):
        assert callable(pkgutil.resolve_name(name))
    assert path.function.rpartition(".")[2] in inspect.getsource(pkgutil.resolve_name(path.asked_by))
