"""`espalier export`: a model in the files of other software."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from app.loading import Loaded, load_model, resolve_dtype
from compress.quantization.export.compressed_tensors import export_compressed_tensors
from compress.quantization.export.gptq import export_gptq
from models.families import export_folder
from models.weight_formats import described
from recipes.commands import options, resume
from recipes.commands.terminal import say

PACKED = {"compressed-tensors": export_compressed_tensors, "gptq": export_gptq}


def main(chosen: options.Export) -> None:
    """Run `espalier export`: dense for `transformers`, or packed integers for compressed-tensors or GPTQ's readers."""
    out = Path(chosen.out).expanduser().absolute()
    resume.check_output(out, chosen.overwrite)
    loaded = load_model(chosen.model, dtype=resolve_dtype(chosen.dtype))
    with tokenizer_folder(loaded) as source:
        if chosen.format in PACKED:
            notes = PACKED[chosen.format](loaded.model, out, source, chosen.overwrite)
        else:
            export_folder(loaded.model, out, source, chosen.overwrite)
            packed = len(described(loaded.model))
            notes = [f"{packed} packed layers are written as the dense weights that they stand for"] if packed else []
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
