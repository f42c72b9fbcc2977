"""What GPTQ holds beside the model, as the depth doubles: counted over every allocation of a run."""

import pytest
import torch

from compress.quantization.affine import IntFormat
from compress.quantization.formats.linear import PackedInt
from compress.quantization.methods.gptq import Gptq
from compress.quantization.plan import quantize_model
from tests.benchmarks.bench_attention import peak
from tests.benchmarks.shapes import Shape

ROWS, BATCH, LENGTH = 8, 4, 64


def extra(depth: int, width: int, feedforward: int) -> tuple[int, int]:
    """Bytes allocated at most at one moment of GPTQ beyond the model, in bf16, and those of a packed block.

    The allocator does not see the dense weights go, which were there before: the packed ones come on top of them.
    """
    shape = Shape(layers=depth, width=width, kv_heads=2, feedforward=feedforward, vocabulary=64, context=LENGTH)
    model = shape.core().to(torch.bfloat16).eval()
    batches = [{"tokens": rows} for rows in torch.randint(64, (ROWS, LENGTH)).split(BATCH)]
    most = peak(lambda: quantize_model(model, Gptq(IntFormat(4, 32)), batches))
    return most, sum(module.stored_bytes() for module in model.blocks[0].modules() if isinstance(module, PackedInt))


def bound(width: int, feedforward: int) -> int:
    """Bytes of a block's weights and Hessians, three copies of the largest of them, and the activations."""
    weights = 4 * (3 * width**2 + 3 * width * feedforward)
    hessians = 4 * (3 * width**2 + feedforward**2)
    between = 2 * ROWS * LENGTH * width  # blocks, in bf16
    inside = 4 * BATCH * LENGTH * (width + 3 * feedforward)
    return weights + hessians + 3 * 4 * feedforward**2 + between + inside


def check(width: int, feedforward: int) -> None:
    (four, packed), (eight, _) = extra(4, width, feedforward), extra(8, width, feedforward)
    assert eight - four == pytest.approx(4 * packed, rel=0.01)
    assert 4 * (3 * width**2 + feedforward**2) < four - 4 * packed < bound(width, feedforward)


def test_memory_stays_that_of_one_block_as_the_depth_doubles():
    check(32, 64)


@pytest.mark.slow
def test_memory_stays_that_of_one_block_at_a_larger_width():
    check(256, 1024)
