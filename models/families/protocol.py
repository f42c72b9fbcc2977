"""What a family of Hugging Face files offers, and how a tensor of a file holds matrices of ours."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.config import ModelConfig


class Family:
    """One file format, keyed by the `model_type` in its `config.json`.

    Attributes:
        model_type: as in `config.json`.
        head: name of the output projection in the file.
        old_head: the name that older files have for it.
        buffers: ends of names of constants that some files hold beside the weights.
        old_leaves: ends of names in older files, and what they are today.
        unused: beginnings of names of tensors that have no counterpart here, and are left out.
        copies: pairs of names under which a file holds one tensor of ours twice; the second is only written.
        segmented: whether `read_config` wants `sep_token_id`, that of the tokenizer beside the weights.
    """

    model_type: str
    head = old_head = "lm_head.weight"
    buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)
    old_leaves: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()
    segmented = False

    def read_config(self, values: Mapping[str, Any]) -> ModelConfig:
        """The architecture that a `config.json` describes. Raises UserError for what has no counterpart here."""
        raise NotImplementedError

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """The `config.json` of an architecture. Raises UserError with the reason if the family cannot hold it."""
        raise NotImplementedError

    def names(self, config: ModelConfig) -> dict[str, str]:
        """Name in our state dict -> name in the file, of every tensor that the file holds, in the order of the file.

        Several of ours with one name in the file are parts of that one tensor.
        """
        raise NotImplementedError

    def transform(self, name: str, config: ModelConfig) -> "Transform":
        """How the tensor `name` of the file holds ours; default: as it is, or the rows of several one after another."""
        return ROWS


class Transform:
    """Tensors of ours to the one of the file, and back: the rows of one after those of the other.

    Attributes:
        row_by_row: whether each row of the file's matrix is a row of ours, as packed formats need it.
    """

    row_by_row = True

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The tensor of the file."""
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))

    def split(self, whole: Tensor, rows: Sequence[int]) -> list[Tensor]:
        """Our tensors of so many rows, each with memory of its own where there are several."""
        return [whole] if len(rows) == 1 else [part.clone() for part in whole.split(list(rows))]


class Transposed(Transform):
    """Matrices of (inputs, outputs): the Conv1D of GPT-2."""

    row_by_row = False

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return super().join(parts).T.contiguous()

    def split(self, whole: Tensor, rows: Sequence[int]) -> list[Tensor]:
        return [part.T.contiguous() for part in whole.split(list(rows), dim=1)]


class PerHead(Transform):
    """The rows of one head of every part, then those of the next head: the fused queries, keys and values of GPT-NeoX.

    Args:
        heads: how many; as many in each part.
    """

    def __init__(self, heads: int) -> None:
        self.heads = heads

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([part.unflatten(0, (self.heads, -1)) for part in parts], dim=1).flatten(0, 2)

    def split(self, whole: Tensor, rows: Sequence[int]) -> list[Tensor]:
        heads = whole.unflatten(0, (self.heads, len(rows), -1))  # (heads, parts, rows of a head, ...)
        return [heads[:, number].flatten(0, 1).contiguous() for number in range(len(rows))]


ROWS, TRANSPOSED = Transform(), Transposed()
