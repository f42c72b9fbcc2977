"""`espalier compare`: two models on the same tokens, and the paired change with its interval."""

import dataclasses
from pathlib import Path

from app.evaluation.assemble import Subject, evaluate_pair
from app.evaluation.report.pages import About, build_report, write_report
from app.loading import Loaded, load_model, resolve_device, resolve_dtype
from models.errors import UserError
from models.io import writing
from recipes.commands import options, resume
from recipes.commands.stage_data import Text, speed_protocol
from recipes.commands.terminal import Bars, print_summary, say


def main(chosen: options.Compare) -> None:
    """Run `espalier compare`."""
    options.check_seed(chosen.seed)
    out = None if chosen.out is None else Path(chosen.out).expanduser().absolute()
    if out is not None:
        resume.check_output(out, chosen.overwrite)
    device, dtype = resolve_device(chosen.device), resolve_dtype(chosen.dtype)
    before, after = (load_model(path, device, dtype) for path in (chosen.before, chosen.after))
    require_same_tokens(before, after)
    text = Text(chosen, before)
    with Bars() as bars:
        figures = evaluate_pair(
            *(Subject(loaded.model, loaded.source.path.name, loaded.source.folder) for loaded in (before, after)),
            text.held_out,
            task=text.task,
            training_blocks=text.training,
            speed=speed_protocol(chosen, text.task),
            batch_size=chosen.batch_size,
            progress=bars,
        )
    about = About(
        title=f"{before.source.path.name} and {after.source.path.name}",
        stage="compare",
        recipe=dataclasses.asdict(chosen),
        history=after.source.history,
        data=text.describe(),
        seed=chosen.seed,
        device=str(device),
        notes=text.notes,
    )
    if out is None:
        print_summary(build_report(figures, [], about))
        return
    with writing(out, overwrite=chosen.overwrite) as target:
        report = write_report(target, figures, [], about)
    print_summary(report)
    say(f"written to {out}")


def require_same_tokens(before: Loaded, after: Loaded) -> None:
    """Raise UserError unless both models were trained for one task, and read the same text as the same tokens."""
    if before.task != after.task:
        kinds = [loaded.task.kind for loaded in (before, after)]
        what = " and ".join(kinds) if kinds[0] != kinds[1] else f"{kinds[0]} with other options"
        raise UserError(
            f"{before.source.path} and {after.source.path} were trained for different tasks ({what}): their figures "
            "cannot be compared"
        )
    if before.text_tokenizer().sha256 != after.text_tokenizer().sha256:
        raise UserError(
            f"{before.source.path} and {after.source.path} have different tokenizers: their perplexities per token "
            "cannot be compared"
        )
