"""`espalier report`: one page over many folders, and the table that goes with it."""

from pathlib import Path
from typing import Any

from rich.table import Table

from app.evaluation import wording
from app.evaluation.many import write_overview
from models.files import writing
from recipes.stages import options, partial
from recipes.stages.terminal import out_console, say


def main(chosen: options.Report) -> None:
    """Run `espalier report`."""
    out = Path(chosen.out).expanduser().absolute()
    partial.check_output(out, chosen.overwrite)
    with writing(out, overwrite=chosen.overwrite) as target:
        content = write_overview([Path(folder).expanduser() for folder in chosen.folders], target)
    print_overview(content)
    say(f"written to {out}")


def print_overview(content: dict[str, Any]) -> None:
    """Print one row a model and one a baseline, and what the page says in sentences."""
    table = Table()
    for heading in ("", "perplexity", "95% interval", "on disk", "in memory", "decode", "best in"):
        table.add_column(heading, justify="right" if heading else "left")
    for model in content["models"]:
        quality, size = model["quality"], model["size"]
        table.add_row(
            model["name"],
            wording.number(quality["perplexity"]),
            wording.interval(quality["interval"]["perplexity"]),
            wording.size(size["stored_bytes"]),
            wording.size(size["memory_bytes"]),
            wording.rate(model.get("speed", {}).get("decode_tokens_per_second")),
            " and ".join(model["fronts"]),
        )
    table.add_section()
    for name, block in content["baselines"].items():
        table.add_row(name, wording.number(block["perplexity"]))
    out_console().print(table)
    for sentence in (*content["dominated"], *content["warnings"]):
        say(sentence)
