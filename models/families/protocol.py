"""Protocol of model families: reading and writing the files of Hugging Face transformers."""

from collections.abc import Mapping
from typing import Any, Protocol

from models.config import ModelConfig


class Family(Protocol):
    """One file format, keyed by the `model_type` in its `config.json`."""

    model_type: str

    def read_config(self, values: Mapping[str, Any]) -> ModelConfig:
        """The architecture that a `config.json` describes. Raises UserError for what has no counterpart here."""

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """The `config.json` of an architecture. Raises UserError with the reason if the family cannot hold it."""

    def names(self, config: ModelConfig) -> dict[str, str]:
        """Name in our state dict -> name in the file, of every tensor that the file holds, in the order of the file."""
