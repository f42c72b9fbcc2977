"""Computing in bf16 with fp32 master weights.

The parameters that the optimizer moves stay fp32. The forward runs on bf16 copies of them, made anew by one
differentiable cast, so the backward brings fp32 gradients, which accumulate and synchronise as fp32. Unlike autocast
the residual stream is bf16 too, and no weight is cast twice. FSDP2's `MixedPrecisionPolicy(param_dtype=bf16)` means
the same thing, so a run has the same arithmetic on one device and on many.
"""

from typing import Any, Literal

import torch
from torch import nn

ComputeDtype = Literal["float32", "bfloat16"]


def call_in(dtype: torch.dtype, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Return `model(*args, **kwargs)` computed with its floating-point parameters cast to `dtype`.

    Gradients arrive at the parameters themselves, in their own dtype. Buffers keep theirs.
    """
    parameters = dict(model.named_parameters())
    if all(parameter.dtype == dtype or not parameter.is_floating_point() for parameter in parameters.values()):
        return model(*args, **kwargs)
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in parameters.items()}
    return torch.func.functional_call(model, cast, args, kwargs)
