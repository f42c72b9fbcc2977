"""Kernel dispatch of packed weights: `TABLE`, read from the top; other forms are dequantized exactly and multiplied.

    form         device   kernel                                up to rows   what it asks for
    packed_int   cpu      aten::_weight_int4pack_mm_for_cpu     128, AMX 48  2, 3, 4 bits, groups of a multiple of 32
    packed_int   cpu      aten::_weight_int8pack_mm             32, or 96    8 bits, symmetric, a scale a row
    packed_int   cuda     aten::_weight_int4pack_mm             4096         as on the CPU, compute capability 8.0
    packed_int   cuda     aten::_weight_int8pack_mm             32           as on the CPU
    nf4          cpu      bitsandbytes::gemv_4bit               256          whole blocks in a row, AVX512-BF16
    nf4          cuda     bitsandbytes::gemm_4bit               any
    int8         cpu      aten::_int_mm                         any
    int8         cuda     bitsandbytes::int8_linear_matmul      any          inputs a multiple of 4
    int8         cuda     aten::_int_mm                         any          inputs and outputs multiples of 8
    fp8          cuda     aten::_scaled_mm                      any          compute capability 8.9, multiples of 16
    lookup, product: on every device the dense weights are looked up and multiplied

Above `largest_batch` rows restoring the dense weights (a slice of them at a time) and multiplying with them is faster.
The limits on CUDA have not been measured: nobody has run those rows on a GPU. In ms of one core with torch 2.13, a
2048 x 2048 layer on an AMD EPYC (Zen 4, avx512_bf16, no AMX); in brackets 4096 x 4096, beyond the cache:

    rows                     1            8            32           64           128          256          512
    4 bits, kernel           0.24 (0.86)  0.77 (3.2)   3.7 (14)     7.0 (25)     13 (59)      31 (114)     52 (234)
    4 bits, unpacked         6.6 (30)     6.3 (32)     13 (37)      11 (42)      15 (68)      25 (88)      37 (149)
    8 bits, kernel           0.21 (1.6)   0.83 (4.7)   4.6 (20)     8.0 (40)     15 (82)      34 (162)     70 (332)
    8 bits, unpacked         3.4 (14)     5.0 (15)     5.3 (19)     6.7 (28)     9.4 (39)     18 (68)      31 (116)
    NF4, kernel              0.15 (0.50)  0.51 (2.2)   2.2 (7.9)    4.2 (15)     7.9 (32)     16 (65)      34 (145)
    NF4, unpacked            4.4 (18)     6.2 (27)     7.5 (27)     12 (28)      12 (55)      20 (80)      35 (121)
    W8A8, aten::_int_mm      0.16 (1.1)   1.5 (7.4)    2.2 (9.4)    3.0 (13)     4.6 (19)     7.9 (33)     17 (60)
    dense bf16               0.37 (4.9)   0.82 (4.1)   2.3 (7.8)    3.3 (13)     5.8 (22)     11 (43)      21 (90)

On one core with AMX, 2048 x 2048 (unpacked in one piece, as it was then):

    4 bits, kernel           0.25         1.1          4.3          8.4          16           34           66
    4 bits, unpacked         6.7          8.2          8.8          7.7          10           13           12
    8 bits, kernel           0.28         0.95         4.1          9.2          18           36           61
    8 bits, unpacked         3.5          4.0          5.2          5.9          7.3          10           9.9
    dense bf16               0.36         0.85         1.3          1.9          3.2          6.3          5.6

On one core with AVX-512 and without bf16 instructions (avx512_vnni), where bf16 products of 16 rows or more run in fp32
(`models/cpu/dispatch.py`), the 8-bit kernel is worth its while up to 96 rows. 2048 x 2048, in brackets 4096 x 4096:

    rows                     1            8            32           64           96           128          256
    4 bits, kernel           0.26 (1.3)   1.0 (3.9)    4.0 (15)     7.4 (29)     11 (46)      17 (73)      38 (133)
    4 bits, unpacked         8.3 (37)     11 (48)      11 (46)      13 (63)      14 (71)      18 (99)      30 (139)
    8 bits, kernel           0.26 (1.4)   1.0 (3.9)    4.0 (15)     7.4 (36)     11 (52)      16 (77)      32 (175)
    8 bits, unpacked         4.2 (24)     6.8 (32)     8.8 (32)     10 (49)      13 (64)      16 (75)      25 (140)
    NF4, unpacked            2.1 (11)     4.8 (23)     9.2 (23)     8.4 (37)     9.9 (50)     13 (61)      25 (111)
    W8A8, aten::_int_mm      0.38 (0.88)  0.66 (3.4)   1.5 (4.4)    1.7 (7.0)    2.3 (12)     3.5 (13)     7.4 (22)
    dense bf16               0.81 (4.2)   3.0 (14)     6.5 (47)     6.4 (57)     7.7 (85)     11 (72)      21 (100)
    dense fp32               0.63 (5.1)   1.9 (17)     3.6 (14)     4.6 (22)     6.5 (34)     8.5 (37)     14 (69)

There fp32 products are faster than bf16 ones from 32 rows on, and W8A8 faster than both at every number of rows.

So packed weights are faster than dense bf16 ones at a few rows only. From there on a layer that has no dense weights
takes the faster of its two ways, and both cost more than the dense product; 8-bit inputs alone keep up with it.

B rows of x, N outputs, K inputs.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from compress.quantization.kernels.fp8 import ScaledMm
from compress.quantization.kernels.int8 import BitsAndBytesInt8, IntMm
from compress.quantization.kernels.nf4 import Nf4Cpu, Nf4Cuda
from compress.quantization.kernels.packed_int import INT8_CPU_ROWS, Int4Cpu, Int4Cuda, Int8
from models.weight_formats import form_of


class Kernel(Protocol):
    """One row of the table.

    Attributes:
        format: of the stored forms that it runs, e.g. `IntFormat`.
        name: what a person can look up.
        device: the device type.
        dtypes: of x; empty for any.
        largest_batch: rows of x above which restoring the dense weights is faster; None: never.
        picks: whether it can give single rows back, as the look-up of an embedding needs.
    """

    format: type
    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    largest_batch: int | None
    picks: bool

    def refuses(self, format: Any, rows: int, width: int) -> str:
        """Why it cannot run weights of this form and shape here, e.g. a package that lacks; empty when it can."""


TABLE: tuple[Kernel, ...] = (
    Int4Cpu(),
    Int8(largest_batch=INT8_CPU_ROWS),
    Int4Cuda(),
    Int8(device="cuda"),
    Nf4Cpu(),
    Nf4Cuda(),
    IntMm(),
    BitsAndBytesInt8(),
    IntMm(device="cuda"),
    ScaledMm(),
)


class Choice(NamedTuple):
    """Through what a module runs: `kernel` and its `name`, or None with the `reason` why it dequantizes.

    `largest_batch`: the rows of x up to which that holds, None for any number.
    """

    kernel: Any
    name: str
    reason: str
    largest_batch: int | None = None


def choose(
    format: Any,
    shape: tuple[int, int],
    device: str,
    batch: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    lookup: bool = False,
) -> Choice:
    """The first kernel of the table that runs weights (N, K) of this form on this device for `batch` rows of x.

    `lookup`: the weights are an embedding's, whose rows are also read one by one.
    """
    reasons = []
    for kernel in TABLE:
        if kernel.device != device or not isinstance(format, kernel.format):
            continue
        reason = kernel.refuses(format, *shape)
        if not reason and kernel.dtypes and dtype not in kernel.dtypes:
            reason = f"the kernels compute in bfloat16, and the input is {str(dtype).removeprefix('torch.')}"
        if not reason and lookup and not kernel.picks:
            reason = "its layout gives no single rows back, which an embedding needs"
        if not reason and kernel.largest_batch is not None and batch > kernel.largest_batch:
            reason = f"above {kernel.largest_batch} rows at once the dense product is faster"
        if not reason:
            return Choice(kernel, kernel.name, "", kernel.largest_batch)
        reasons.append(reason)
    return Choice(None, "dequantize, then matmul", "; ".join(reasons) or f"no packed kernel on {device}")


def kernel_for(
    module: nn.Module, device: str | torch.device = "cpu", batch: int = 1, dtype: torch.dtype = torch.bfloat16
) -> Choice:
    """The kernel of `module` on `device` for `batch` tokens at once; that of a dense module is `aten::linear`."""
    if form_of(module) is None:
        return Choice(None, "aten::linear", "dense weights")
    return module.choice(torch.device(device).type, batch, dtype)
