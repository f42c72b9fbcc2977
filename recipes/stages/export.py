"""`espalier export`: a model in the files of other software."""

from pathlib import Path

from app.loading import load_model, resolve_dtype
from compress.quantization.export import export_compressed_tensors
from models.families import export_folder
from models.forms import described
from recipes.stages import options, partial
from recipes.stages.terminal import say


def main(chosen: options.Export) -> None:
    """Run `espalier export`: dense for `transformers`, or symmetric packed weights for compressed-tensors."""
    out = Path(chosen.out).expanduser().absolute()
    partial.check_output(out, chosen.overwrite)
    loaded = load_model(chosen.model, dtype=resolve_dtype(chosen.dtype))
    if chosen.format == "compressed-tensors":
        notes = export_compressed_tensors(loaded.model, out, loaded.source.folder, chosen.overwrite)
    else:
        export_folder(loaded.model, out, loaded.source.folder, chosen.overwrite)
        packed = described(loaded.model)
        notes = [f"{len(packed)} packed layers are written as the dense weights that they stand for"] if packed else []
    for note in notes:
        say(note)
    say(f"written to {out}")
