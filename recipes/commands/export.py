"""`espalier export`: a model in the files of other software."""

import contextlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from app.loading import Loaded, load_model, resolve_dtype
from compress.quantization.export.compressed_tensors import export_compressed_tensors
from compress.quantization.export.gptq import export_gptq
from models.families import export_folder
from models.registry import Registry
from models.transformer import Transformer
from models.weight_formats import described
from recipes.commands import options, resume
from recipes.commands.terminal import say

FORMATS = Registry("export format")


class ExportFormat(ABC):
    """Base class of the registered formats, each a frozen dataclass of its options."""

    @abstractmethod
    def write(self, model: Transformer, out: Path, source: Path | None, overwrite: bool) -> list[str]:
        """Write a folder whole or not at all; returns sentences on what became of the model.

        Args:
            source: a folder with the files of the tokenizer, or None.

        Raises:
            UserError: the format cannot hold this model.
        """


@FORMATS.register("transformers")
@dataclass(frozen=True)
class Transformers(ExportFormat):
    """Dense weights, in the files of a family that `transformers` knows."""

    def write(self, model: Transformer, out: Path, source: Path | None, overwrite: bool) -> list[str]:
        export_folder(model, out, source, overwrite)
        packed = len(described(model))
        return [f"{packed} packed layers are written as the dense weights that they stand for"] if packed else []


@FORMATS.register("compressed-tensors")
@dataclass(frozen=True)
class CompressedTensors(ExportFormat):
    """Symmetric weights of 2, 4 and 8 bits stay packed."""

    write = staticmethod(export_compressed_tensors)


@FORMATS.register("gptq")
@dataclass(frozen=True)
class GptqFiles(ExportFormat):
    """Weights of 2, 3, 4 and 8 bits stay packed, with or without zero points (version 2 of GPTQ's files)."""

    write = staticmethod(export_gptq)


def main(chosen: options.Export) -> None:
    """Run `espalier export`."""
    out = Path(chosen.out).expanduser().absolute()
    resume.check_output(out, chosen.overwrite)
    form = FORMATS.parse(chosen.format, "format")
    loaded = load_model(chosen.model, dtype=resolve_dtype(chosen.dtype))
    with tokenizer_folder(loaded) as source:
        notes = form.write(loaded.model, out, source, chosen.overwrite)
    if loaded.tokenizer is None:
        notes.append(f"no tokenizer is written: none came with {loaded.source.path}")
    for note in notes:
        say(note)
    say(f"written to {out}")


@contextlib.contextmanager
def tokenizer_folder(loaded: Loaded) -> Iterator[Path | None]:
    """Yield a folder that holds the tokenizer's files, or None without a tokenizer.

    That of a model is its own, with all files that came along; that of a checkpoint is made for the time being.
    """
    if loaded.source.folder is not None or loaded.tokenizer is None:
        yield loaded.source.folder
        return
    with tempfile.TemporaryDirectory() as place:
        loaded.tokenizer.save(place)
        yield Path(place)
