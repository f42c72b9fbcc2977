"""`espalier import`: a Hugging Face folder of a supported family becomes a model folder."""

import dataclasses
from dataclasses import replace
from pathlib import Path

from app.history import history_entry, write_card, write_history
from app.loading import foreign_task, resolve_dtype
from app.tasks import TASKS, Classify
from models import checkpoint, families
from models.io import writing
from models.sidecars import read_sidecars, write_sidecars
from recipes.commands import options, resume
from recipes.commands.terminal import say


def main(chosen: options.Import) -> None:
    """Run `espalier import`: config, weights, tokenizer files as they are, history and card."""
    source, out = Path(chosen.folder).expanduser(), Path(chosen.out).expanduser().absolute()
    resume.check_output(out, chosen.overwrite)
    model = families.import_folder(source, dtype=resolve_dtype(chosen.dtype))
    task = foreign_task(source, model.config)
    if chosen.task is not None:
        given = TASKS.parse(chosen.task, "task")
        task = given if given.kind != task.kind or task.kind != Classify.kind else replace(given, labels=task.labels)
        task.check(model.config)
    with writing(out, overwrite=chosen.overwrite) as target:
        checkpoint.save_model(model, target, task=task.dump())
        write_sidecars(read_sidecars(source), target)
        entry = history_entry(
            "import",
            f"from a Hugging Face folder, {source.name}",
            recipe=dataclasses.asdict(chosen),
            seed=0,
            data={},
            parents={"model": checkpoint.hash_weights(source)},
            weights=checkpoint.hash_weights(target),
        )
        write_history(target, [entry])
        write_card(target, model, [entry], task)
    say(f"written to {out}")
