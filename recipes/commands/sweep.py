"""`espalier sweep`: the same small training with one choice changed at a time, each with several seeds.

OUT/runs/NAME-sS.yaml is the recipe of one run, NAME-sS its model, NAME-sS.json its figures, NAME-sS.log what it said.
The same command again goes on after the runs that are finished. OUT/sweep.md, .json and plots/ are written at the end.
"""

import concurrent.futures
import contextlib
import io
import multiprocessing
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from app.data.packing import token_blocks
from app.evaluation import formatting, sweep
from app.evaluation.environment import environment
from app.evaluation.report.charts import Chart, load_picture
from app.evaluation.report.tensorboard import median_scalar
from app.loading import load_model
from app.tasks.architecture import resolve_architecture
from app.tasks.base import task_of
from models.errors import UserError, did_you_mean
from models.io import read_json
from models.shapes import check_shape
from recipes import cli
from recipes.command_line import check_keys, find_recipe, read_recipe
from recipes.commands import options
from recipes.commands.evaluate import write_figures
from recipes.commands.terminal import Bars, out_console, say
from recipes.fit_state import run_folder

KEYS = {"pretrain", "baseline", "seeds", "lengths", "tokens", "extrapolate", "axes"}
BASELINE = "baseline"
RUNS = 6  # of one process: what is freed stays with it (app/memory.py), and pieces of every size add up


@dataclass(frozen=True)
class Sweep:
    """A sweep file, with the base recipe read.

    Attributes:
        base: the recipe of one training.
        baseline: what the base is called in the table.
        seeds: of every variant.
        lengths: tokens in a block; the first is that of the training, and only `extrapolate` is measured at the others.
        tokens: held-out tokens that are predicted.
        extrapolate: axes whose variants get a table over the lengths.
        variants: (axis, name) -> what the architecture has in place of the base's keys.
    """

    base: dict[str, Any]
    baseline: str
    seeds: list[int]
    lengths: list[int]
    tokens: int
    extrapolate: list[str]
    variants: dict[tuple[str, str], dict[str, Any]]


@dataclass(frozen=True)
class Training:
    """One run: which variant, which seed, and where it goes."""

    axis: str
    name: str
    seed: int
    recipe: dict[str, Any]
    folder: Path

    @property
    def figures(self) -> Path:
        return self.folder.with_name(self.folder.name + ".json")


def main(chosen: options.Sweep) -> int:
    """Run `espalier sweep`."""
    plan = read_sweep(Path(chosen.recipe))
    out = Path(chosen.out).expanduser().absolute()
    trainings = prepare(plan, out, chosen.overwrite)
    missing = [training for training in trainings if not training.figures.exists()]
    for training in trainings:
        if training.figures.exists():
            read_figures(training, plan)  # before anything is trained
    if len(missing) < len(trainings):
        say(f"{len(trainings) - len(missing)} of {len(trainings)} runs are finished")
    failed = train(plan, missing, chosen.parallel)
    for name, sentence in failed.items():
        say(f"{name} failed: {sentence} (its log: {out / 'runs' / name}.log)")
    write(plan, trainings, out)
    return 1 if failed else 0


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file.

    Raises:
        UserError: an unknown or missing key, a value of another type, an axis without variants, two variants of one
            folder, a key that no architecture has.
    """
    values = read_recipe(path)
    check_keys(values, KEYS, path)
    if lacking := [key for key in ("pretrain", "seeds", "axes") if values.get(key) in (None, "", [], {})]:
        raise UserError(f"{path}: '{lacking[0]}' is missing")
    check_values(values, path)
    base, architecture, trained = read_base(find_recipe(values["pretrain"], path, path))
    variants: dict[tuple[str, str], dict[str, Any]] = {}
    for axis, choices in values["axes"].items():
        if not isinstance(choices, dict) or not all(isinstance(change, dict) for change in choices.values()):
            raise UserError(f"{path}: axes.{axis} must give each variant the keys that it changes")
        variants |= {(axis, str(name)): change for name, change in choices.items()}
    extrapolate = list(values.get("extrapolate") or [])
    if unknown := [axis for axis in extrapolate if axis not in values["axes"]]:
        raise UserError(
            f"{path}: extrapolate: there is no axis '{unknown[0]}'{did_you_mean(unknown[0], values['axes'])}"
        )
    lengths = [trained, *(length for length in values.get("lengths") or [] if length != trained)]
    for (axis, name), change in variants.items():
        try:
            resolve_architecture(architecture | change, base["data"].get("vocab_size"), trained)
        except UserError as error:
            raise UserError(f"{path}: axes.{axis}.{name}: {error}") from None
    baseline, tokens = values.get("baseline") or BASELINE, values.get("tokens") or 2**16
    plan = Sweep(base, str(baseline), values["seeds"], lengths, tokens, extrapolate, variants)
    check_folders(plan, path)
    return plan


def read_base(recipe: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return the recipe of one training, its architecture, and the tokens of one of its sequences.

    Raises:
        UserError: it holds no architecture that keys could be changed in, or no length of a sequence.
    """
    base = read_recipe(recipe)
    model, data = base.get("model"), base.get("data")
    architecture = model.get("architecture") if isinstance(model, dict) else None
    if not isinstance(architecture, dict):
        raise UserError(f"{recipe}: a sweep changes keys of model.architecture, so they must stand in the recipe")
    trained = data.get("sequence_length") if isinstance(data, dict) else None
    if not _whole(trained, 1):
        raise UserError(
            f"{recipe}: a sweep measures blocks as long as those of the training, so data.sequence_length must stand "
            "in the recipe, a whole number of at least 1"
        )
    return base, architecture, trained


def check_folders(plan: Sweep, path: Path) -> None:
    """Raise UserError where two variants have names that make one folder."""
    folders: dict[str, str] = {}
    for axis, name in [("", plan.baseline), *plan.variants]:
        folder, called = folder_name(axis, name, plan.seeds[0]), f"axes.{axis}.{name}" if axis else f"baseline {name}"
        if folder in folders:
            raise UserError(
                f"{path}: {folders[folder]} and {called} would both be written to {folder}; give one another name"
            )
        folders[folder] = called


def check_values(values: dict[str, Any], path: Path) -> None:
    """Raise UserError for a value of a sweep file that is of another type than its key."""
    for key, least in (("seeds", 0), ("lengths", 1)):
        given = values.get(key)
        if given is not None and not (isinstance(given, list) and all(_whole(value, least) for value in given)):
            raise UserError(
                f"{path}: {key} is {given!r}; it must be a list of whole numbers of at least {least}, such as "
                f"[{128 if key == 'lengths' else '1, 2'}]"
            )
        if twice := [value for value in given or [] if given.count(value) > 1]:
            raise UserError(f"{path}: {key} names {twice[0]} twice; each must be there once")
    if (tokens := values.get("tokens")) is not None and not _whole(tokens, 1):
        raise UserError(f"{path}: tokens is {tokens!r}; it must be a whole number of at least 1")
    if not isinstance(values["pretrain"], str):
        raise UserError(f"{path}: pretrain is {values['pretrain']!r}; it must be the name of one recipe")
    extrapolate = values.get("extrapolate")
    if extrapolate is not None and not (
        isinstance(extrapolate, list) and all(isinstance(axis, str) for axis in extrapolate)
    ):
        raise UserError(f"{path}: extrapolate is {extrapolate!r}; it must be a list of axes, such as [position]")
    if not isinstance(values["axes"], dict):
        raise UserError(f"{path}: axes must give each axis its variants by name, as in axes: {{position: {{...}}}}")


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def folder_name(axis: str, name: str, seed: int) -> str:
    """Folder name of a run; the baseline has no axis."""
    return re.sub(r"[^\w.-]+", "-", f"{axis}-{name}-s{seed}".strip("-"))


def prepare(plan: Sweep, out: Path, overwrite: bool) -> list[Training]:
    """Write the recipe of every run, and remove what is there of runs that have another recipe now.

    Raises:
        UserError: a run of another recipe is there and `overwrite` is false, or `espalier fit` refuses a recipe.
    """
    runs = out / "runs"
    trainings = []
    for (axis, name), change in {("", plan.baseline): {}, **plan.variants}.items():
        for seed in plan.seeds:
            folder = runs / folder_name(axis, name, seed)
            model = plan.base["model"] | {"architecture": plan.base["model"]["architecture"] | change}
            recipe = plan.base | {"model": model, "seed_everything": seed, "out": str(folder)}
            recipe["data"] = plan.base["data"] | {"seed": seed}
            trainings.append(Training(axis, name, seed, recipe, folder))
    changed = [one for one in trainings if (kept := _kept(one)) is not None and kept != one.recipe]
    if changed and not overwrite:
        raise UserError(
            f"{changed[0].folder} was trained with another recipe; name another --out, or pass --overwrite to train "
            f"{len(changed)} of {len(trainings)} runs anew"
        )
    for one in trainings:
        if one.seed == plan.seeds[0] and not one.figures.exists():
            check_recipe(one)
    runs.mkdir(parents=True, exist_ok=True)
    for one in changed:
        for leftover in (one.folder, one.folder.with_name(f"{one.folder.name}.run")):
            shutil.rmtree(leftover, ignore_errors=True)
        one.figures.unlink(missing_ok=True)
    for one in trainings:
        one.folder.with_name(f"{one.folder.name}.yaml").write_text(yaml.safe_dump(one.recipe, sort_keys=False))
    return trainings


def check_recipe(one: Training) -> None:
    """Raise UserError for a recipe that `espalier fit` cannot read."""
    with tempfile.TemporaryDirectory() as place, io.StringIO() as said:
        (recipe := Path(place) / "recipe.yaml").write_text(yaml.safe_dump(one.recipe, sort_keys=False))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            status = cli.main(["fit", "-c", str(recipe), "--print_config"])
        if status:
            *_, sentence = ["", *filter(str.strip, said.getvalue().splitlines())]
            raise UserError(
                f"{one.folder.name}: {sentence.removeprefix('espalier: error: ').replace(str(recipe), 'its recipe')}"
            )


def _kept(one: Training) -> dict[str, Any] | None:
    path = one.folder.with_name(f"{one.folder.name}.yaml")
    return read_recipe(path) if path.exists() else None


def train(plan: Sweep, missing: list[Training], parallel: int) -> dict[str, str]:
    """Train and measure what is missing, `parallel` runs at a time; returns the names of those that failed, and why."""
    parallel = max(1, min(parallel, len(missing)))  # a pool starts all its processes at once
    threads = max(1, (os.cpu_count() or 1) // parallel)
    failed: dict[str, str] = {}
    with Bars() as bars:
        for start in range(0, len(missing), RUNS * parallel):
            with pool_of(parallel) as pool, at_once(pool):
                begun = {}
                for one in missing[start : start + RUNS * parallel]:
                    lengths = plan.lengths if one.axis in ("", *plan.extrapolate) else plan.lengths[:1]
                    begun[pool.submit(train_one, one, lengths, plan.tokens, threads)] = one
                for done, future in enumerate(concurrent.futures.as_completed(begun), start=start + 1):
                    if sentence := why_failed(future):
                        failed[begun[future].folder.name] = sentence
                    bars("training", done, len(missing), begun[future].folder.name)
    return failed


def pool_of(parallel: int) -> concurrent.futures.ProcessPoolExecutor:
    """So many processes for the runs."""
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(parallel, context, end_with_parent)


@contextlib.contextmanager
def at_once(pool: concurrent.futures.ProcessPoolExecutor) -> Iterator[None]:
    """End the pool's processes when the block is left early; the pool itself would wait until all is trained."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
        raise


def why_failed(future: concurrent.futures.Future) -> str | None:
    """The sentence of a training that failed, or None."""
    try:
        return future.result()
    except BrokenProcessPool:
        return "its process, or one beside it, was killed (out of memory?); the same command trains it again"


def end_with_parent() -> None:
    """End this process when the one that started it is killed: the same command again must find nobody at work."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def train_one(one: Training, lengths: list[int], tokens: int, threads: int) -> str | None:
    """Train one model and measure it; returns why it failed, or None."""
    torch.set_num_threads(threads)
    recipe, log = (one.folder.with_name(f"{one.folder.name}.{end}") for end in ("yaml", "log"))
    with log.open("w") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = cli.main(["fit", "-c", str(recipe), "--ckpt_path=last"])
    if status:
        last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
        return last[0].removeprefix("espalier: error: ") if last else f"exit status {status}"
    loaded = load_model(one.folder)
    blocks = token_blocks(one.recipe["data"]["source"], loaded.text_tokenizer(), "test", lengths[0])
    tokenizer, task = loaded.text_tokenizer(), loaded.task
    examples = partial(task.examples, tokenizer=tokenizer, training=False)
    found = sweep.measure(loaded.model, blocks, lengths, tokens, task.metrics[0], examples)
    found["task"] = task.dump()
    counts = loaded.model.count_parameters()
    found |= {"parameters": counts["total"], "active_parameters": counts["active"], "seed": one.seed}
    found["flops_per_token"] = loaded.model.flops_per_token(lengths[0])
    found["tokens_per_second"] = median_scalar(run_folder(one.folder), "speed/tokens_per_second")
    write_figures(one.figures, found)
    return None


def read_figures(one: Training, plan: Sweep) -> dict[str, Any]:
    """Return the figures of a finished run.

    Raises:
        UserError: they are not as the sweep wrote them, or are of other lengths.
    """
    found = read_json(one.figures)
    check_shape(found, sweep.RUN, str(one.figures))
    lengths = [
        str(length) for length in plan.lengths if one.axis in ("", *plan.extrapolate) or length == plan.lengths[0]
    ]
    forms = {"blocks", "sliding"} if len(lengths) > 1 else {"blocks"}
    losses = found["losses"]
    if (
        next(iter(losses), None) != lengths[0]
        or not set(losses) <= set(lengths)
        or any(set(measured) != forms for measured in losses.values())
    ):
        raise UserError(
            f"{one.figures} holds losses at {', '.join(losses) or 'no length'}, and the sweep measures at "
            f"{', '.join(lengths)}; remove the file to train and measure that run anew"
        )
    return found


def write(plan: Sweep, trainings: list[Training], out: Path) -> None:
    """Write the table, the figures and the pictures over every variant that has all its seeds."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in trainings:
        if one.figures.exists():
            runs.setdefault((one.axis, one.name), []).append(read_figures(one, plan))
    base = runs.get(("", plan.baseline), [])
    if len(base) < len(plan.seeds):
        say("the baseline has not been trained with every seed: there is nothing to compare with")
        return
    whole = {key: found for key, found in runs.items() if len(found) == len(plan.seeds) and key[0]}
    metric = task_of(base[0]).metrics[0]
    outcomes = [sweep.outcome(axis, name, found, base, metric) for (axis, name), found in whole.items()]
    baseline = sweep.outcome("", plan.baseline, base, base, metric)
    tables = [sweep.table(outcomes, baseline)]
    for axis in plan.extrapolate:
        own = [baseline, *(one for one in outcomes if one.axis == axis)]
        tables.append(
            f"{metric.title} by length, blocks side by side / overlapping by half ({formatting.markdown(axis)}):\n\n"
            f"{sweep.extrapolation(own)}"
        )
    everyone = {("", plan.baseline): base} | whole
    loads = {f"{axis}: {name}" if axis else name: found[0]["experts"] for (axis, name), found in everyone.items()}
    caption = f"Load of every layer's experts on held-out text, of the runs with seed {plan.seeds[0]}"
    charts = [sweep.differences(outcomes, baseline), load_picture(loads, caption)]
    shown = draw([chart for chart in charts if chart is not None], out / "plots")
    text = "\n\n".join([f"# Sweep against {formatting.markdown(plan.baseline)}", shown[0], *tables, *shown[1:]])
    (out / "sweep.md").write_text(text + "\n", encoding="utf-8")
    figures = {"environment": environment(), "seeds": plan.seeds, "lengths": plan.lengths, "tokens": plan.tokens}
    figures["runs"] = {f"{axis}/{name}" if axis else name: found for (axis, name), found in runs.items()}
    write_figures(out / "sweep.json", figures)
    out_console().print("\n\n".join(tables))
    say(f"written to {out}: sweep.md, sweep.json, plots/")


def draw(charts: Sequence[Chart], folder: Path) -> list[str]:
    """Draw the pictures into the folder; returns the lines of Markdown that show them."""
    folder.mkdir(exist_ok=True)
    return [f"![{chart.caption}]({folder.name}/{chart.png(folder).name})" for chart in charts]
