"""`espalier inspect`: a model layer by layer."""

from pathlib import Path

from rich.table import Table

from app.evaluation import formatting
from app.evaluation.size import layer_sizes, size_figures
from app.history import verify
from app.loading import load_model
from recipes.commands import options
from recipes.commands.evaluate import checked_file, write_figures
from recipes.commands.terminal import out_console, say


def main(chosen: options.Inspect) -> None:
    """Run `espalier inspect`: print the table, and write `{"layers": [...], "size": {...}}` to --out."""
    out = checked_file(chosen.out, chosen.overwrite)
    if chosen.verify:
        for name in verify(Path(chosen.model).expanduser()):
            say(f"{name}: the SHA-256 is that of the file that was written")
    loaded = load_model(chosen.model)
    layers, size = layer_sizes(loaded.model), size_figures(loaded.model, loaded.source.folder)
    table = Table(title=str(loaded.source.path), title_justify="left")
    for heading in ("layer", "shape", "stored as", "bits", "zeros", "parameters", "in memory", "FLOPs", "runs as"):
        justify = "left" if heading in ("layer", "stored as", "runs as") else "right"
        table.add_column(heading, justify=justify, no_wrap=heading == "layer")
    for layer in layers:
        table.add_row(
            layer.name,
            " x ".join(map(str, layer.shape)),
            layer.form,
            formatting.number(layer.bits, 3),
            formatting.percent(layer.sparsity),
            formatting.count(layer.parameters),
            formatting.size(layer.bytes),
            formatting.flops(layer.flops),
            layer.kernel + (f" up to {layer.largest_batch} tokens" if layer.largest_batch else ""),
        )
    out_console().print(table)
    model = loaded.model
    dtype = next(model.parameters()).dtype
    parts = f"{formatting.count(size['nonzero_parameters'])} not 0"
    if size["active_parameters"] != size["parameters"]:
        parts += f", {formatting.count(size['active_parameters'])} active for a token"
    cache = ""
    if loaded.task.generates:
        cache = f", {formatting.size(model.cache_bytes(model.config.context, dtype))} of cache"
    out_console().print(
        f"{formatting.count(size['parameters'])} parameters ({parts}), "
        f"{formatting.size(size['stored_bytes'])} on disk, {formatting.size(size['memory_bytes'])} in memory; "
        f"{formatting.flops(model.flops_per_token(model.config.context))} for a token at the full context of "
        f"{model.config.context}{cache}"
    )
    if out is not None:
        write_figures(out, {"layers": [layer.to_dict() for layer in layers], "size": size})
        say(f"written to {out}")
