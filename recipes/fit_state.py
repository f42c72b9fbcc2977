"""State of OUT and OUT.run when `espalier fit` starts, and the plan that follows from it.

OUT        the model folder; appears, whole, when the training has ended
OUT.run    the run itself: checkpoints/, recipe.json, tokenizer.json, TensorBoard's files; stays, so that a run can be
           looked at and lengthened
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.callbacks.checkpoints import checkpoints_in, newest_checkpoint, step_of
from app.callbacks.folder import COMPLETE
from app.callbacks.record import FORMAT_VERSION, KEY, RECIPE
from app.history import HISTORY, read_history
from app.loading import CHECKPOINT, read_checkpoint
from app.strategies.checkpoint_io import METADATA
from models.errors import UserError
from models.io import clean_leftovers, read_json
from models.shapes import COUNT, VALUES, check_shape

LIMITS = ("trainer.max_steps", "trainer.max_epochs", "trainer.max_time", "early_stopping.patience")
NOT_OF_THE_RUN = ("ckpt_path", "out", "overwrite", "config", "weights_only")
MACHINERY = (  # where and how a run is done and watched: it is the same run on another machine
    *("trainer.accelerator", "trainer.strategy", "trainer.devices", "trainer.num_nodes", "trainer.enable_progress_bar"),
    *("trainer.logger", "trainer.profiler", "data.workers", "data.cache_dir", "metrics", "samples", "checkpoint"),
)


@dataclass(frozen=True)
class FitPlan:
    """Plan of a fit: start, resume, finish, or nothing to do.

    Attributes:
        resume: the checkpoint to go on from, or None to start.
        stale: what an earlier run left in the run's folder and this one removes.
        done: the sentence to say when there is nothing to do.
    """

    resume: Path | None = None
    stale: tuple[Path, ...] = ()
    done: str | None = None


@dataclass(frozen=True)
class Trained:
    """Metadata of a checkpoint: the run that wrote it.

    Attributes:
        recipe: resolved, plain values.
        architecture: of the model, or None.
        batches: of the current epoch, that the run had read.
    """

    recipe: dict[str, Any]
    architecture: dict[str, Any] | None
    batches: int

    def check(self, recipe: Mapping[str, Any], path: Path) -> None:
        """Raise UserError where a fit of `recipe` cannot go on from this checkpoint, which is at `path`."""
        before, now = (_optimizer(given) for given in (self.recipe, recipe))
        if before != now:
            raise UserError(
                f"{path} holds the state of the optimizer {before}, and model.optimizer is {now}; set it back, or "
                "train anew (--overwrite, or another --out)"
            )
        window = recipe["trainer"]["accumulate_grad_batches"]
        if self.batches % window:
            right = max(number for number in range(1, window) if self.batches % number == 0)
            raise UserError(
                f"{path} was written after {self.batches} batches of an epoch, which is inside a step of "
                f"{window} (trainer.accumulate_grad_batches); with {right} it can go on"
            )


def _optimizer(recipe: Mapping[str, Any]) -> str:
    """The name of a recipe's optimizer."""
    chosen = recipe.get("model", {}).get("optimizer") or {"class_path": "AdamW"}
    return chosen["class_path"].rpartition(".")[2]


def run_folder(out: Path) -> Path:
    """Folder of the checkpoints and logs of the run whose model goes to `out`."""
    return out.with_name(f"{out.name}.run")


def plan_fit(out: Path, recipe: Mapping[str, Any], ckpt_path: str | None, overwrite: bool) -> FitPlan:
    """Decide from what is there; nothing is changed yet.

    Args:
        out: the model folder to write.
        recipe: the resolved recipe, plain values.
        ckpt_path: `last`, `best`, a path, or None.
        overwrite: whether what `out` holds may be replaced.

    Raises:
        UserError: `out` holds something else or cannot be written, or there is no such checkpoint.
    """
    run = run_folder(out)
    clean_leftovers(out)
    _check_run(run)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out must name a folder")
    _check_writable(out)
    if overwrite:
        return _overwriting(out, run, recipe, ckpt_path)
    if out.exists() and any(out.iterdir()):
        finished = _finished(out, run, recipe, ckpt_path)
        if finished is not None:
            return finished
    elif ckpt_path is None and _checkpoints(run):
        raise UserError(f"{run} holds an unfinished run; go on with --ckpt_path last, or start anew with --overwrite")
    resume = find_checkpoint(ckpt_path, run)
    _refuse_a_branch(resume, run / "checkpoints")
    return FitPlan(resume=resume)


def _check_run(run: Path) -> None:
    """Raise UserError for an OUT.run that no run made: files of the run would replace its files."""
    if run.exists() and not run.is_dir():
        raise UserError(f"{run} is a file, and the run needs a folder there; move it, or name another --out")
    if any((run / name).exists() for name in (RECIPE, COMPLETE)) or _checkpoints(run):
        return
    early = ("events.out.", "hparams.yaml", "checkpoints")  # what a logger writes before there is a recipe
    if run.exists() and not all(path.name.startswith(early) for path in run.iterdir()):
        raise UserError(f"{run} is not the folder of a run, and its place is needed; move it, or name another --out")


def _refuse_a_branch(resume: Path | None, folder: Path) -> None:
    """Refuse to go on from the middle of a run in that run's own folder: its later checkpoints would get mixed in."""
    later = newest_checkpoint(folder)
    if resume is None or later is None or resume.resolve().parent != folder.resolve():
        return
    step = step_of(resume)
    if step is not None and step < step_of(later):
        raise UserError(
            f"{folder} goes on to {later.name} after {resume.name}; go on with --ckpt_path last, or name another --out"
        )


def _check_writable(out: Path) -> None:
    """Raise UserError where `out` cannot be made, before any work is done."""
    place = next(parent for parent in out.absolute().parents if parent.exists())
    if not place.is_dir():
        raise UserError(f"{out} cannot be written: {place} is a file; --out must name a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{out} cannot be written: {place} allows no writing; choose another --out")


def _overwriting(out: Path, run: Path, recipe: Mapping[str, Any], ckpt_path: str | None) -> FitPlan:
    """Start anew, unless this very command was killed before and is being repeated."""
    started = read_json(run / RECIPE) if (run / RECIPE).exists() else None
    unfinished = started is not None and not (run / COMPLETE).exists()
    if unfinished and ckpt_path == "last" and not differences(started, recipe, MACHINERY):
        return FitPlan(resume=find_checkpoint(ckpt_path, run))
    resume = None if ckpt_path in (None, "last") else find_checkpoint(ckpt_path, run)
    for folder in (run, out):
        if resume is not None and resume.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"--overwrite would empty {folder}, and {resume} is in it; leave --overwrite out, or copy the "
                "checkpoint to another place first"
            )
    return FitPlan(resume, stale=tuple(run.iterdir()) if run.is_dir() else ())


def _checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run: the newest and the best."""
    return [*checkpoints_in(run / "checkpoints"), *checkpoints_in(run / "checkpoints", "best")]


def _finished(out: Path, run: Path, recipe: Mapping[str, Any], ckpt_path: str | None) -> FitPlan | None:
    """The plan for an `out` that holds something: nothing to do, a longer run, or a refusal."""
    entries = read_history(out)
    if not entries or entries[-1].get("stage") != "pretrain":
        raise UserError(f"{out} already holds something else; name another folder or pass --overwrite")
    check_shape(entries[-1], {"recipe": VALUES, "steps": COUNT}, f"{out / HISTORY}: stages[{len(entries) - 1}]")
    changes = differences(entries[-1]["recipe"], recipe, leaving_out=MACHINERY)
    steps = entries[-1]["steps"]
    if not changes:
        return FitPlan(done=f"{out} is complete: {steps} steps. There is nothing to do (--overwrite trains anew).")
    if any(key not in LIMITS for key in changes):
        raise UserError(
            f"{out} holds a finished run of another recipe ({describe(changes)}); "
            "name another folder or pass --overwrite"
        )
    limit = flatten(recipe).get("trainer.max_steps", -1)
    if isinstance(limit, int) and 0 < limit <= steps:
        return FitPlan(done=f"{out} is complete: it was trained for {steps} steps, and max_steps is {limit}.")
    if ckpt_path is None:
        raise UserError(
            f"{out} holds a finished run of {steps} steps; go on with --ckpt_path last, or start anew with --overwrite"
        )
    if ckpt_path == "last" and newest_checkpoint(run / "checkpoints") is None:
        raise UserError(f"{run} has no checkpoint left to train {out} further; --overwrite trains anew")
    return None


def find_checkpoint(ckpt_path: str | None, run: Path | None) -> Path | None:
    """Return the checkpoint that `last`, `best` or a path names; None for `last` where there is none yet.

    Raises:
        UserError: no such checkpoint.
    """
    if ckpt_path is None:
        return None
    if ckpt_path in ("last", "best"):
        if run is None:
            raise UserError(f"ckpt_path is {ckpt_path}, and without --out nobody knows of which run; give its path")
        found = newest_checkpoint(run / "checkpoints", "step" if ckpt_path == "last" else "best")
        if found is None and ckpt_path == "best":
            raise UserError(f"{run / 'checkpoints'} has no best checkpoint")
        return found
    path = Path(ckpt_path).expanduser()
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}")
    if path.is_dir() and not (path / METADATA).exists():
        raise UserError(f"{path} is no Lightning checkpoint; a model folder is measured with espalier evaluate")
    return path


def describe_checkpoint(path: Path) -> Trained:
    """Return what a checkpoint says about its run, without reading its tensors.

    Raises:
        UserError: corrupt, truncated, or of another version.
    """
    content = read_checkpoint(path, sharded=False)
    check_shape(content, CHECKPOINT, str(path))
    record = content.get(KEY, {})
    version = record.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} is a checkpoint of version {version!r}; this installation continues version {FORMAT_VERSION}"
        )
    architecture = content.get("hyper_parameters", {}).get("architecture")
    try:
        batches = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"]
    except (KeyError, TypeError):
        raise UserError(f"{path} does not say how far its run had come, and cannot be continued") from None
    return Trained(record.get("recipe", {}), architecture, batches)


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], leaving_out: tuple[str, ...] = ()
) -> dict[str, tuple[Any, Any]]:
    """The keys in which two recipes differ, dotted, with both values.

    Args:
        before, now: resolved recipes.
        leaving_out: keys that do not matter, with all below them; where a run reads and writes never does.
    """
    first, second = flatten(before), flatten(now)
    ignored = (*NOT_OF_THE_RUN, *leaving_out)
    keys = [key for key in {**first, **second} if not any(f"{key}.".startswith(f"{name}.") for name in ignored)]
    return {key: (first.get(key), second.get(key)) for key in keys if first.get(key) != second.get(key)}


def describe(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """`trainer.max_steps: 100 -> 200, ...`"""
    return ", ".join(f"{key}: {before} -> {now}" for key, (before, now) in changes.items())


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
