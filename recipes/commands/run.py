"""`espalier run`: the stages of a pipeline in a row. The same command again goes on after the last finished one."""

import dataclasses
import importlib
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.evaluation.report.overview import read_report, write_overview
from models.errors import UserError
from models.io import inside, read_json, write_json
from recipes.commands import compare, options
from recipes.commands.pipeline import PRETRAIN, StagePlan, read_pipeline
from recipes.commands.report import print_overview
from recipes.commands.terminal import say

STATE = "pipeline.json"
REPORT = ("report.json", "report.md", "report.html", "plots")


def main(chosen: options.Run) -> int:
    """Run `espalier run`.

    OUT/01-NAME, OUT/02-NAME, ... are the stages, OUT/report.* and OUT/plots show all, OUT/overall sets the first
    model and the last side by side, and OUT/model leads to the last.
    """
    recipe, out = Path(chosen.recipe), Path(chosen.out).expanduser().absolute()
    model = None if chosen.model is None else Path(chosen.model).expanduser().absolute()
    steps = read_pipeline(recipe, out, model, chosen.device, chosen.trust)
    if model is not None and not model.exists():
        raise UserError(f"there is no model at {model}")
    check_steps(steps)
    finished = prepare(steps, out, chosen.overwrite)
    for number, step in enumerate(steps, start=1):
        if number <= finished:
            say(f"stage {number} of {len(steps)}, {step.name}: finished before")
            continue
        say(f"stage {number} of {len(steps)}, {step.name}")
        status = run_step(step)
        if status:
            return status
    if finished == len(steps) and (out / "report.json").exists():
        say(f"{out} is complete")
        return 0
    first = steps[0].out if steps[0].verb == PRETRAIN and model is None else model
    measured = [step for step in steps if step.verb != PRETRAIN]
    if measured:
        overall(first, measured[-1], out / "overall")
        write_report([step.out for step in measured], out)
    link(out / "model", steps[-1].out)
    say(f"written to {out}: report.html over all stages, overall/report.html from first to last, and the final model")
    return 0


def overall(first: Path, last: StagePlan, out: Path) -> None:
    """Set the first model and the last side by side, in one process, on the text of the last stage."""
    shared = {field.name: getattr(last.options, field.name) for field in dataclasses.fields(options.Measure)}
    say("from first to last")
    compare.main(options.Compare(before=str(first), after=str(last.out), out=str(out), overwrite=True, **shared))


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Put report.* and plots/ over all stages into OUT, each replaced whole."""
    with tempfile.TemporaryDirectory(dir=out, prefix=".report-") as place:
        content = write_overview(folders, Path(place), title="The pipeline, stage by stage")
        shutil.rmtree(out / "plots", ignore_errors=True)
        for name in reversed(REPORT):  # report.json last: where it is, all of it is
            (Path(place) / name).rename(out / name)
    print_overview(content)


def prepare(steps: list[StagePlan], out: Path, overwrite: bool) -> int:
    """Return how many stages are finished already, and remove what is there of those that have to be done again.

    OUT/pipeline.json says what each stage was to be when it was started. Its folder appears only when it is complete:
    where it is there and the recipe is the same, the stage is finished.

    Raises:
        UserError: OUT holds something else, or a pipeline of another recipe or of inputs that have changed since, and
            `overwrite` is false.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out must name a folder")
    if out.exists() and any(out.iterdir()) and not (out / STATE).exists() and not overwrite:
        raise UserError(f"{out} already holds something; name another folder or pass --overwrite")
    wanted = [
        {"folder": step.out.name, "fingerprint": step.fingerprint, "inputs": contents}
        for step, contents in zip(steps, input_contents(steps), strict=True)
    ]
    begun = read_state(out)
    same = 0
    while same < min(len(begun), len(wanted)) and begun[same] == wanted[same]:
        same += 1
    if begun and begun != wanted:
        lost = [old for old in begun[same:] if (out / old["folder"]).exists()]
        if lost and not overwrite:
            raise UserError(
                f"{out} holds a pipeline of another recipe or input: {_difference(begun, wanted, same)}; name another "
                "folder or pass --overwrite to do that stage and what follows again"
            )
        say(f"another recipe or input than before: {_difference(begun, wanted, same)}")
    elif begun and overwrite and (out / "report.json").exists():
        say(f"{out} is complete: starting anew")
        same = 0
    listed = {old["folder"] for old in begun}
    if foreign := [step.out for step in steps[same:] if step.out.exists() and step.out.name not in listed]:
        raise UserError(
            f"{foreign[0]} is there, and {out / STATE} does not list it; move it away, or name another --out"
        )
    for old in begun[same:]:
        for leftover in (old["folder"], f"{old['folder']}.partial", f"{old['folder']}.run"):
            shutil.rmtree(out / leftover, ignore_errors=True)
    if same < len(wanted) or same < len(begun):
        (out / "report.json").unlink(missing_ok=True)  # what it says is no longer so
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{STATE}.new", {"stages": wanted})
    (out / f"{STATE}.new").replace(out / STATE)
    finished = 0
    while finished < same and steps[finished].out.is_dir():
        finished += 1
    for step in steps[:finished]:
        if step.verb != PRETRAIN:
            read_report(step.out)  # the pages over all stages need it, after all the work
    return finished


def read_state(out: Path) -> list[dict[str, Any]]:
    """Return what OUT/pipeline.json says of each stage that was begun; empty where there is none.

    Raises:
        UserError: something else, or a folder that no pipeline makes: what is named there may be removed.
    """
    if not (out / STATE).exists():
        return []
    begun = read_json(inside(out, STATE)).get("stages")
    if not isinstance(begun, list) or not all(
        isinstance(stage, dict)
        and isinstance(stage.get("fingerprint"), str)
        and isinstance(stage.get("inputs"), dict)
        and re.fullmatch(r"\d{2,}-[^/\\\0]+", str(stage.get("folder")))
        for stage in begun
    ):
        raise UserError(f"{out / STATE} was not written by espalier run; name another folder, or remove the file")
    return begun


def _difference(begun: list[dict[str, Any]], wanted: list[dict[str, Any]], same: int) -> str:
    if same == len(wanted):
        return f"it has more stages, from {begun[same]['folder']} on"
    new = wanted[same]
    if same == len(begun):
        return f"{new['folder']} is new"
    old = begun[same]
    changed = [name for name, content in new["inputs"].items() if old.get("inputs", {}).get(name) != content]
    if changed and old["fingerprint"] == new["fingerprint"]:
        return f"{' and '.join(changed)} changed since stage {new['folder']} was begun"
    return f"stage {new['folder']} differs"


def input_contents(steps: list[StagePlan]) -> list[dict[str, str]]:
    """Return what each step reads from outside, as a person calls it, with its SHA-256; each is read once."""
    known = {given: given.content() for given in dict.fromkeys(given for step in steps for given in step.inputs)}
    return [{str(given): known[given] for given in step.inputs} for step in steps]


def check_steps(steps: list[StagePlan]) -> None:
    """Raise UserError for options of any stage that cannot work, before the first one is begun."""
    for step in steps:
        if step.verb != PRETRAIN:
            module = importlib.import_module(f"recipes.commands.{step.verb}")
            try:
                getattr(module, step.verb.capitalize())(step.options).check_options()
            except UserError as error:
                raise UserError(f"stage {step.name}: {error}") from None


def run_step(step: StagePlan) -> int:
    """Run one stage and return its exit status. Only the modules that it needs are imported."""
    if step.verb == PRETRAIN:
        return importlib.import_module("recipes.fit").main("fit", step.options)
    importlib.import_module(f"recipes.commands.{step.verb}").main(step.options)
    return 0


def link(name: Path, folder: Path) -> None:
    """Let `name` lead to `folder` beside it; where the file system knows no links, the folder's own name must do."""
    try:
        name.unlink(missing_ok=True)
        name.symlink_to(folder.name)
    except OSError:
        say(f"{name} could not be made a link; the final model is {folder}")
