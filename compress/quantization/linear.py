"""The layers that hold packed integers and run them: in place of `nn.Linear` and of `nn.Embedding`.

Numerics. `dequantize()` is the weight: fp32, equal to the bit to the fake-quantized weight that was optimised. An
input in bf16 goes through a packed kernel where `kernels.TABLE` has one for it; every other input is multiplied with
`dequantize()` rounded to its dtype, so a caller in fp32 gets the exact result. Under autocast the input is cast first,
as `nn.Linear` would. Packed tensors keep their dtypes whatever `.to(dtype)` is asked for; an embedding's output follows
it. The packed weights are constants: gradients flow to the input only, through the dense product.

Memory. A layer holds its weights once: as stored, or, from the first product with a kernel on, in that kernel's layout.
`state_dict()` and `.to()` bring the stored layout back.

N outputs (or vocabulary), K inputs (or width), G groups a row.
"""

from typing import Any

import torch
from torch import Tensor, nn

from compress.quantization.grid import IntFormat, Quantized, dequantize
from compress.quantization.kernels import Choice, Held, Kernel, choose
from compress.quantization.storage import pack, packed_bytes, unpack
from models.errors import UserError
from models.products import linear


class PackedInt(nn.Module):
    """Integer codes of a matrix (N, K), packed at their true size.

    Buffers: `codes` (N, packed_bytes(K)) uint8, `scales` (N, G) or (1, 1), and for an affine grid `zeros`
    (N or 1, packed_bytes(G)) uint8.
    """

    lookup = False  # whether single rows are read too

    def __init__(self, rows: int, width: int, format: IntFormat, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.shape, self.format, self.dtype = (rows, width), format, dtype
        self.kernel: Kernel | None = None
        self.held: Held | None = None
        self._best: dict[tuple[str, torch.dtype], Kernel | None] = {}
        scales = format.scales_shape(rows, width)
        self.register_buffer("codes", torch.empty(rows, packed_bytes(width, format.bits), dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(scales, dtype=format.dtype))
        if not format.symmetric:
            zeros = torch.empty(scales[0], packed_bytes(scales[1], format.bits), dtype=torch.uint8)
            self.register_buffer("zeros", zeros)

    def spec(self) -> dict[str, Any]:
        """The numbers of the form, as JSON values."""
        return self.format.to_dict()

    def fill(self, quantized: Quantized) -> None:
        """Take over quantized weights."""
        self._as_stored()
        self.codes = pack(quantized.codes, self.format.bits)
        self.scales = quantized.scales.contiguous()
        if quantized.zeros is not None:
            self.zeros = pack(quantized.zeros, self.format.bits)

    def quantized(self) -> Quantized:
        """The weights on their grid, unpacked."""
        zeros = self._zeros()
        if self.held is None:
            return Quantized(unpack(self.codes, self.format.bits, self.shape[1]), self.scales, zeros, self.format)
        return Quantized(*self.kernel.restore(self.held, zeros, self.format, self.shape), zeros, self.format)

    def dequantize(self) -> Tensor:
        """The dense weight (N, K) fp32 that the codes stand for."""
        return self.quantized().dequantize()

    def memory_bytes(self) -> int:
        """Bytes of the weights as they are held now (and of a bias)."""
        return sum(tensor.nbytes for tensor in [*self.buffers(), *(self.held or ())])

    def stored_bytes(self) -> int:
        """Bytes of the codes, scales and zeros on disk, with all padding."""
        rows, width = self.shape
        scales = self.format.scales_shape(rows, width)
        zeros = 0 if self.format.symmetric else scales[0] * packed_bytes(scales[1], self.format.bits)
        return rows * packed_bytes(width, self.format.bits) + scales[0] * scales[1] * self.format.dtype.itemsize + zeros

    def choice(self, device: str, batch: int, dtype: torch.dtype) -> Choice:
        """Through which kernel `batch` rows of x in `dtype` run on a device type."""
        return choose(self.format, self.shape, device, batch, dtype, lookup=self.lookup)

    def multiply(self, x: Tensor) -> Tensor:
        """x (..., K) times the transposed weights: (..., N) in the dtype of x, or of autocast."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        batch = x.shape[:-1].numel()
        kernel = None
        if not (torch.is_grad_enabled() and x.requires_grad):
            kernel = self._kernel(device, batch, x.dtype)
        if kernel is not None and kernel is not self.kernel:
            self._repack(kernel)
        if kernel is None:
            return linear(x, self._dense(x.dtype))
        y = kernel.multiply(x.reshape(batch, self.shape[1]), self.held, self.shape[0])  # (B, N)
        return y.view(*x.shape[:-1], self.shape[0])

    def _kernel(self, device: str, batch: int, dtype: torch.dtype) -> Kernel | None:
        """`choice(...).kernel`; the part that does not depend on the batch is looked up once.

        A graph that is being compiled takes the layout that is held: run once before compiling.
        """
        if torch.compiler.is_compiling():
            kernel = self.kernel if dtype == torch.bfloat16 else None
        elif (device, dtype) in self._best:
            kernel = self._best[device, dtype]
        else:
            kernel = self._best[device, dtype] = self.choice(device, 1, dtype).kernel
        return kernel if kernel is not None and batch <= kernel.largest_batch else None

    def _dense(self, dtype: torch.dtype) -> Tensor:
        """`dequantize()` rounded to `dtype`, without going through fp32 where that makes no difference."""
        return dequantize(*self.quantized(), dtype=dtype)

    def _zeros(self) -> Tensor | None:
        if self.format.symmetric:
            return None
        return unpack(self.zeros, self.format.bits, self.format.scales_shape(*self.shape)[1])

    def _repack(self, kernel: Kernel) -> None:
        quantized = self.quantized()
        self.held = kernel.repack(quantized.codes, quantized.scales, quantized.zeros, self.format)
        self.kernel, self.codes, self.scales = kernel, None, None

    def _as_stored(self) -> None:
        """Leave a kernel's layout for the stored one."""
        if self.held is not None:
            quantized = self.quantized()
            self.kernel = self.held = None
            self.codes = pack(quantized.codes, self.format.bits)
            self.scales = quantized.scales.contiguous()

    def _apply(self, fn, recurse: bool = True):
        self._as_stored()
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        self._as_stored()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args) -> None:
        self._as_stored()
        super()._load_from_state_dict(*args)


def read_format(spec: dict[str, Any]) -> IntFormat:
    """The format in a form's spec. Raises UserError for a missing, unknown or impossible value."""
    try:
        return IntFormat(**spec)
    except TypeError:
        known = IntFormat.__dataclass_fields__
        raise UserError(f"packed integers are described by {', '.join(known)}; got {', '.join(spec)}") from None


class PackedIntLinear(PackedInt):
    """`nn.Linear` of packed integers: x (..., K) -> (..., N). A bias is kept in fp32 and added in the dtype of x."""

    def __init__(
        self, rows: int, width: int, format: IntFormat, bias: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(rows, width, format, dtype)
        self.out_features, self.in_features = rows, width
        self.register_buffer("bias", torch.empty(rows, dtype=torch.float32) if bias else None)

    @classmethod
    def empty(cls, module: nn.Linear, spec: dict[str, Any]) -> "PackedIntLinear":
        """The layer that takes the place of `module`, its tensors yet to be loaded."""
        spec = dict(spec)
        bias = spec.pop("bias", False)
        return cls(module.out_features, module.in_features, read_format(spec), bias, module.weight.dtype)

    @classmethod
    def of(cls, module: nn.Linear, quantized: Quantized) -> "PackedIntLinear":
        """The layer that takes the place of `module`, with these weights and the module's bias."""
        bias = module.bias is not None
        new = cls(module.out_features, module.in_features, quantized.format, bias, module.weight.dtype)
        new.fill(quantized)
        if bias:
            new.bias = module.bias.detach().float().clone()
        return new

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "bias": self.bias is not None}

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiply(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.format}"


class PackedIntEmbedding(PackedInt):
    """`nn.Embedding` of packed integers: tokens (...) -> (..., K); `project` makes it the head of a tied model."""

    lookup = True

    def __init__(self, rows: int, width: int, format: IntFormat, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(rows, width, format, dtype)
        self.num_embeddings, self.embedding_dim = rows, width

    @classmethod
    def empty(cls, module: nn.Embedding, spec: dict[str, Any]) -> "PackedIntEmbedding":
        """The layer that takes the place of `module`, its tensors yet to be loaded."""
        return cls(module.num_embeddings, module.embedding_dim, read_format(spec), module.weight.dtype)

    @classmethod
    def of(cls, module: nn.Embedding, quantized: Quantized) -> "PackedIntEmbedding":
        """The layer that takes the place of `module`, with these weights."""
        new = cls(module.num_embeddings, module.embedding_dim, quantized.format, module.weight.dtype)
        new.fill(quantized)
        return new

    def forward(self, tokens: Tensor) -> Tensor:
        index = tokens.reshape(-1)  # (n,)
        zeros = None
        if not self.format.symmetric:
            groups = self.format.scales_shape(*self.shape)[1]
            zeros = unpack(self.zeros if len(self.zeros) == 1 else self.zeros[index], self.format.bits, groups)
        if self.held is None:
            codes = unpack(self.codes[index], self.format.bits, self.shape[1])  # (n, K)
            scales = self.scales if len(self.scales) == 1 else self.scales[index]
        else:
            codes, scales = self.kernel.pick(self.held, zeros, self.format, self.shape[1], index)
        rows = dequantize(codes, scales, zeros, self.format, self.dtype)  # (n, K)
        return rows.view(*tokens.shape, self.shape[1])

    def project(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., K)."""
        return self.multiply(hidden)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format}"
