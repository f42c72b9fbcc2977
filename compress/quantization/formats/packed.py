"""Base layers of packed weights, in place of `nn.Linear` and of `nn.Embedding`.

Numerics. `dequantize()` is the weight: fp32, equal to the bit to the fake-quantized weight that was optimised. An
input goes through a kernel where `kernels.TABLE` has one for it; every other one is multiplied with `dequantize()`
rounded to its dtype, so a caller in fp32 gets the exact result. Under autocast the input is cast first, as `nn.Linear`
would. Packed tensors keep their dtypes whatever `.to(dtype)` is asked for; an embedding's output follows it. The packed
weights are constants: gradients flow to the input only, through the dense product.

Memory. A layer holds its weights once: as stored, or, from the first product with a kernel on, in that kernel's layout.
`state_dict()` and `.to()` bring the stored layout back. On CPU the dense product in 16 bits unpacks `SLICE` rows of the
weights at a time, which stay in the cache.

B rows of x, N outputs (or vocabulary), K inputs (or width).
"""

from typing import Any

import torch
from torch import Tensor, nn

from compress.quantization.kernels.dispatch import Choice, choose
from models.cpu.matmul import linear
from models.errors import UserError

SLICE = 256  # rows of weights; a multiple of the tiles of every kernel


class Packed(nn.Module):
    """A packed matrix (N, K) in some `format`, which has `to_dict`."""

    lookup = False  # whether single rows are read too

    def __init__(self, rows: int, width: int, format: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.shape, self.format, self.dtype = (rows, width), format, dtype
        self.kernel: Any = None
        self.held: tuple[Tensor, ...] | None = None  # in the layout of the kernel
        self._best: dict[tuple[str, torch.dtype], Any] = {}

    @staticmethod
    def read_format(spec: dict[str, Any]) -> Any:
        """The format in a form's spec. Raises UserError for a missing, unknown or impossible value."""
        raise NotImplementedError

    def fill(self, quantized: Any) -> None:
        """Take over quantized weights."""
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """The dense weight (N, K) fp32 that the codes stand for."""
        return self.dense(torch.float32, 0, self.shape[0])

    def dense(self, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        """The rows from `start` (a multiple of `SLICE`) to `stop` of `dequantize()`, rounded once to `dtype`."""
        raise NotImplementedError

    def rows(self, index: Tensor) -> Tensor:
        """The rows `index` (n,) of `dequantize()` in the layer's dtype: (n, K)."""
        raise NotImplementedError

    def stored_bytes(self) -> int:
        """Bytes of the packed weights on disk, with all padding, without a bias."""
        raise NotImplementedError

    def repack(self, kernel: Any) -> None:
        """Into the layout of a kernel."""
        raise NotImplementedError

    def as_stored(self) -> None:
        """Leave a kernel's layout for the stored one."""

    def spec(self) -> dict[str, Any]:
        """The numbers of the form, as JSON values."""
        return self.format.to_dict()

    def memory_bytes(self) -> int:
        """Bytes of the weights as they are held now (and of a bias)."""
        return sum(tensor.nbytes for tensor in [*self.buffers(), *(self.held or ())])

    def choice(self, device: str, batch: int, dtype: torch.dtype) -> Choice:
        """Through which kernel `batch` rows of x in `dtype` run on a device type."""
        return choose(self.format, self.shape, device, batch, dtype, lookup=self.lookup)

    def multiply(self, x: Tensor) -> Tensor:
        """x (..., K) times the transposed weights: (..., N) in the dtype of x, or of autocast."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        batch = x.shape[:-1].numel()
        if torch.is_grad_enabled() and x.requires_grad:
            return linear(x, self.dense(x.dtype, 0, self.shape[0]))
        kernel = self._kernel(device, batch, x.dtype)
        flat = x.reshape(batch, self.shape[1])  # (B, K)
        if kernel is None:
            y = self.unpacked(flat)
        else:
            if kernel is not self.kernel:
                self.repack(kernel)
            y = self.run(kernel, flat)
        return y.view(*x.shape[:-1], self.shape[0])

    def run(self, kernel: Any, x: Tensor) -> Tensor:
        """x (B, K) through the kernel whose layout is held: (B, N)."""
        return kernel.multiply(x, self.held, self.shape[0])

    def unpacked(self, x: Tensor) -> Tensor:
        """x (B, K) times the dense weights: (B, N)."""
        count = self.shape[0]
        if x.device.type != "cpu" or x.element_size() > 2 or count <= SLICE:
            return linear(x, self.dense(x.dtype, 0, count))
        y = x.new_empty(len(x), count)  # (B, N)
        for start in range(0, count, SLICE):
            stop = min(start + SLICE, count)
            y[:, start:stop] = linear(x, self.dense(x.dtype, start, stop))
        return y

    def _kernel(self, device: str, batch: int, dtype: torch.dtype) -> Any:
        """`choice(...).kernel`; the part that does not depend on the batch is looked up once.

        A graph that is being compiled takes the layout that is held: run once before compiling.
        """
        if torch.compiler.is_compiling():
            kernel = self.kernel if self.kernel is not None and dtype in self.kernel.dtypes else None
        elif (device, dtype) in self._best:
            kernel = self._best[device, dtype]
        else:
            kernel = self._best[device, dtype] = self.choice(device, 1, dtype).kernel
        over = kernel is not None and kernel.largest_batch is not None and batch > kernel.largest_batch
        return None if over else kernel

    def _apply(self, fn, recurse: bool = True):
        self.as_stored()
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        self.as_stored()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args) -> None:
        self.as_stored()
        super()._load_from_state_dict(*args)


class PackedLinear(Packed):
    """`nn.Linear` of packed weights: x (..., K) -> (..., N). A bias is kept in fp32 and added in the dtype of x."""

    def __init__(
        self, rows: int, width: int, format: Any, bias: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(rows, width, format, dtype)
        self.out_features, self.in_features = rows, width
        self.register_buffer("bias", torch.empty(rows, dtype=torch.float32) if bias else None)

    @classmethod
    def empty(cls, module: nn.Linear, spec: dict[str, Any]) -> "PackedLinear":
        """The layer that takes the place of `module`, its tensors yet to be loaded."""
        spec = dict(spec)
        bias = spec.pop("bias", False)
        if not isinstance(bias, bool):
            raise UserError(f"bias must be true or false, got {bias!r}")
        return cls(module.out_features, module.in_features, cls.read_format(spec), bias, module.weight.dtype)

    @classmethod
    def of(cls, module: nn.Linear, quantized: Any) -> "PackedLinear":
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


class PackedEmbedding(Packed):
    """`nn.Embedding` of packed weights: tokens (...) -> (..., K); `project` makes it the head of a tied model."""

    lookup = True

    def __init__(self, rows: int, width: int, format: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(rows, width, format, dtype)
        self.num_embeddings, self.embedding_dim = rows, width

    @classmethod
    def empty(cls, module: nn.Embedding, spec: dict[str, Any]) -> "PackedEmbedding":
        """The layer that takes the place of `module`, its tensors yet to be loaded."""
        return cls(module.num_embeddings, module.embedding_dim, cls.read_format(spec), module.weight.dtype)

    @classmethod
    def of(cls, module: nn.Embedding, quantized: Any) -> "PackedEmbedding":
        """The layer that takes the place of `module`, with these weights."""
        new = cls(module.num_embeddings, module.embedding_dim, quantized.format, module.weight.dtype)
        new.fill(quantized)
        return new

    def forward(self, tokens: Tensor) -> Tensor:
        return self.rows(tokens.reshape(-1)).view(*tokens.shape, self.shape[1])

    def project(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., K)."""
        return self.multiply(hidden)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format}"
