"""Provenance: history.json with one entry a stage, and the model card README.md.

    {"format_version": 1, "stages": [{"stage": "pretrain", "title": "...", "time": "...", "recipe": {...}, "seed": 0,
      "versions": {...},
      "data": {"source": "python", "fingerprint": "..."}, "parents": {"model": "<sha256 of its weights>"},
      "weights": "<sha256 of the weights written>", "seconds": 12.3}, ...],
     "files": {"model.safetensors": "<sha256>"}}

An entry holds what is needed to do the stage again: its resolved recipe, seed, versions, data and inputs.
"""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from app.evaluation import formatting
from app.evaluation.environment import environment
from app.tasks.base import Task
from models.checkpoint import hash_files, hash_weights
from models.config import ModelConfig
from models.errors import UserError
from models.families import family_of
from models.io import read_json, weight_files, write_json
from models.shapes import COUNT, NUMBER, TEXT, VALUES, check_shape, maybe
from models.transformer import Transformer

HISTORY = "history.json"
FORMAT_VERSION = 1
ENTRY = {  # what a reader of the history relies on
    **{"stage": TEXT, "title?": TEXT, "time?": TEXT, "seed?": maybe(NUMBER), "recipe?": VALUES, "weights?": TEXT},
    **{"data?": {"source?": maybe(TEXT)}, "steps?": COUNT, "fingerprint?": TEXT, "parents?": VALUES},
}


def history_entry(
    stage: str,
    title: str = "",
    *,
    recipe: Mapping[str, Any],
    seed: int,
    data: Mapping[str, Any],
    weights: str,
    parents: Mapping[str, str] | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Return the entry of one stage as JSON values.

    Args:
        stage: the verb: pretrain, quantize, prune, distill, import.
        title: what the stage did, in a few words: "GPTQ, 4 bits, groups of 64".
        recipe: every option with the value that it had.
        data: `source` and `fingerprint` of the text that was used.
        weights: SHA-256 of the weights that the stage wrote (models.checkpoint.hash_weights).
        parents: role (model, teacher, student) -> SHA-256 of the weights of the models that went in.
    """
    return {
        "stage": stage,
        "title": title,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "recipe": dict(recipe),
        "seed": seed,
        "versions": environment(),
        "data": dict(data),
        "parents": dict(parents or {}),
        "weights": weights,
        "seconds": seconds,
    }


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of a model's history, the first stage first; none where the folder has no history.json.

    Raises:
        UserError: history.json is unreadable, of another version, or not as it was written.
    """
    path = folder / HISTORY
    if not folder.is_dir() or not path.exists():
        return []
    content = read_json(path)
    if content.get("format_version") != FORMAT_VERSION or not isinstance(content.get("stages"), list):
        raise UserError(f"{path} is no history of format version {FORMAT_VERSION}")
    check_shape(content["stages"], [ENTRY], f"{path}: stages")
    return content["stages"]


def write_history(folder: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Write history.json into an existing folder, with a checksum of each file of its weights."""
    files = hash_files(folder) if any(folder.glob("*.safetensors")) else {}
    write_json(folder / HISTORY, {"format_version": FORMAT_VERSION, "stages": list(entries), "files": files})


def verify(folder: Path) -> list[str]:
    """Compare the files of a model folder's weights with the checksums in its history.json; returns their names.

    Raises:
        UserError: a file is another one than was written, or nothing says what was written.
    """
    entries = read_history(folder)
    recorded = read_json(folder / HISTORY).get("files") if entries else None
    if not isinstance(recorded, dict):  # of a time before each file had its own
        weights = entries[-1].get("weights") if entries else None
        if weights is None:
            raise UserError(f"{folder} has no {HISTORY} with checksums of its weights, so nothing can be compared")
        if hash_weights(folder) != weights:
            raise UserError(f"the weights in {folder} are not those that were written: their SHA-256 differs")
        return [path.name for path in weight_files(folder)]
    found = hash_files(folder)
    wrong = [name for name in sorted(recorded.keys() | found) if recorded.get(name) != found.get(name)]
    if wrong:
        raise UserError(f"{folder / wrong[0]} is not the file that was written: its SHA-256 differs, or it is missing")
    return sorted(found)


def write_card(
    folder: Path,
    model: Transformer,
    entries: Sequence[Mapping[str, Any]],
    task: Task,
    figures: Mapping[str, Any] | None = None,
) -> None:
    """Write README.md, the model card: what the model is, how it came about, what it measures, how to load it.

    Args:
        task: what it was trained for.
        figures: the block of report.json of this model (`quality`, `size`, `speed`), where it was measured.
    """
    (folder / "README.md").write_text(_card(model, entries, task, figures or {}), encoding="utf-8")


def _card(model: Transformer, entries: Sequence[Mapping[str, Any]], task: Task, figures: Mapping[str, Any]) -> str:
    config = model.config
    counts = model.count_parameters()
    lines = [
        "---",
        "library_name: espalier",
        f"pipeline_tag: {task.pipeline}",
        "---",
        "",
        f"# {formatting.count(counts['total'])} parameter {task.describes}",
        "",
        f"{len(config.layers)} layers, width {config.width}, vocabulary {config.vocab_size}, "
        f"context {config.context} tokens.{_experts(counts)}",
        "",
        "## How it came about",
        "",
        *(f"{number}. {_stage(entry)}" for number, entry in enumerate(entries, start=1)),
        "",
        "`history.json` holds the whole recipe of each stage.",
        "",
    ]
    if "quality" in figures:
        measured = _measured(figures, task)
        lines += ["## What it measures", "", *measured, "", "`report.md` has the whole report.", ""]
    lines += ["## How to load it", "", "    import models", '    model = models.load("this/folder")', ""]
    if task.generates:
        lines += [
            *_commands(config),
            "",
            "The model continues text of the kind that it was trained on. It was not tuned to follow instructions, and",
            "nothing filters what it writes.",
            "",
        ]
    return "\n".join(lines)


def _experts(counts: Mapping[str, int]) -> str:
    if counts["active"] == counts["total"]:
        return ""
    return f" Of its {counts['total']:,} parameters {counts['active']:,} are active for a token."


def _commands(config: ModelConfig) -> list[str]:
    generate = "or from the command line: `espalier generate this/folder --prompt TEXT`"
    try:
        family_of(config)
    except UserError:  # an architecture that only Espalier has
        return [f"{generate}."]
    return [f"{generate}, and", "`espalier export this/folder --out DIR --format transformers` for other software."]


def _stage(entry: Mapping[str, Any]) -> str:
    source = entry.get("data", {}).get("source")
    on = f" on {formatting.code(source)}" if source else ""
    stage, title = (formatting.markdown(entry.get(key, "")) for key in ("stage", "title"))
    return f"**{stage}**{on}: {title} (weights {formatting.code(str(entry.get('weights'))[:12])})"


def _measured(figures: Mapping[str, Any], task: Task) -> list[str]:
    quality, size = figures["quality"], figures.get("size", {})
    lines = ["| figure | value |", "|---|---|"]
    for number, metric in enumerate(task.metrics):
        if metric.kind in quality:
            over = "" if number else f", over {quality.get('tokens', 0):,} held-out {task.per}s"
            lines.append(f"| {metric.label}{over} | {metric.show(quality[metric.kind])} |")
    if size:
        lines.append(f"| weights on disk | {formatting.size(size['stored_bytes'])} |")
        lines.append(f"| weights in memory | {formatting.size(size['memory_bytes'])} |")
    if "speed" in figures:
        first = task.protocol.throughputs[0]
        lines.append(f"| {first.label.lower()}, batch 1 | {formatting.rate(figures['speed'][first.name])} |")
    return lines
