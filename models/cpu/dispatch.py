"""Dispatch of the paths that only a CPU takes: when each is taken, who asks for it, on which processors it won.

Every other device, and every other case, computes with PyTorch's own operations. Figures are those of
tests/benchmarks/RESULTS.md and of the commits that brought the path; each is against PyTorch's way on the same machine.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.cpu.features import has_bf16, isa_cap, read_cpuinfo


class CpuPath(NamedTuple):
    """One CPU path of the dispatch table.

    Attributes:
        function: what computes.
        condition: what says whether it is taken.
        asked_by: the function that asks.
        won: on which processors, against what, by how much.
    """

    function: str
    condition: str
    asked_by: str
    won: str


PATHS = (
    CpuPath(
        "models.cpu.matmul.product",
        "models.cpu.matmul.widens",
        "models.cpu.matmul.linear",
        "x86 and Arm without bf16 instructions (a virtual Emerald Rapids): 167 against 31 GFLOP/s a core; "
        "where AMX has to be capped (Sapphire Rapids, see features.py): 99 against 66",
    ),
    CpuPath(
        "torch.nn.functional.scaled_dot_product_attention",
        "models.cpu.dispatch.attention_dtype",
        "models.attention.kernels.sdpa.attend",
        "the same processors, training in bf16: the kernel's backward takes 33 ms in fp32, 111 in bf16",
    ),
    CpuPath(
        "models.cpu.short_attention.ShortAttention",
        "models.cpu.dispatch.takes_short_attention",
        "models.attention.kernels.sdpa.attend",
        "x86 with bf16 instructions, compiled training in bf16: 2.2 times PyTorch's kernel on Sapphire Rapids (8 rows "
        "of 256 tokens, 4 heads of 64); the training step on Zen 4 is 1.18 times compiled transformers'",
    ),
    CpuPath(
        "models.cpu.bias_attention.attend_causal",
        "models.cpu.dispatch.trains_bias",
        "models.attention.full.FullAttention.mix",
        "x86 with AVX-512, decoders that train T5's bias: 1.4 to 2.7 times at 256 to 2,048 tokens; selective "
        "attention (SelectiveAttention.mix asks too): 0.31 to 0.39 times SDPA's rate, 0.10 before",
    ),
    CpuPath(
        "models.cpu.bias_attention.attend_masked",
        "models.cpu.dispatch.trains_bias",
        "models.attention.kernels.banded.attend_band",
        "x86 with AVX-512 (Sapphire Rapids), blocks of a band with a trained bias, a key head for each query head: "
        "1.05 to 1.15 times",
    ),
    CpuPath(
        "models.cpu.experts.one_token",
        "models.cpu.dispatch.ungrouped",
        "models.experts.stacked.StackedExperts._one_token",
        "x86 (Sapphire Rapids), 8 experts of 344 neurons, width 256, against sorting and grouping: 1.6 times in fp32, "
        "1.3 in bf16",
    ),
    CpuPath(
        "app.memory.keep_freed_memory",
        "app.memory.keep_freed_memory",
        "recipes.fit.main",
        "Linux with glibc, any processor: 5 to 10 % of a training step, 15 % of GPTQ's time",
    ),
)


def _widens_bf16() -> bool:
    """Whether bf16 products are slower than fp32's here: without instructions for them, or with AMX capped."""
    cpuinfo = read_cpuinfo()
    native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return isa_cap(cpuinfo) is not None or not (native and (has_bf16(cpuinfo) or not cpuinfo))


WIDENS_BF16 = _widens_bf16()
SHORT_TOKENS = 512  # for which one layer keeps 2 * 512 * 512 bytes of scores for each head


def attention_dtype(q: Tensor) -> torch.dtype:
    """The dtype in which scaled dot-product attention should run for queries q: theirs, or fp32 to train in."""
    bf16 = WIDENS_BF16 and q.device.type == "cpu" and q.dtype == torch.bfloat16
    trains = bf16 and type(q) in (Tensor, nn.Parameter) and q.requires_grad and torch.is_grad_enabled()
    return torch.float32 if trains else q.dtype


def takes_short_attention(x: Tensor) -> bool:
    """Whether a training step over embedded tokens x (B, T, D) should take `ShortAttention`."""
    fits = x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.shape[1] <= SHORT_TOKENS
    return fits and not WIDENS_BF16 and torch.is_grad_enabled()


def trains_bias(q: Tensor, bias: Tensor | None) -> bool:
    """Whether what is added to the scores of queries q gets a gradient."""
    return bias is not None and bias.requires_grad and torch.is_grad_enabled() and q.device.type == "cpu"


def ungrouped(x: Tensor) -> bool:
    """Whether x (N, D) goes to its experts without sorting and grouping: one token, outside of training."""
    eager = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return x.device.type == "cpu" and len(x) == 1 and eager
