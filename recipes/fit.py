"""`espalier fit|validate|test|predict`: LightningCLI over the training of a task and the text data module.

The command line wins over the recipes, and both win over what a checkpoint holds; the difference is printed.
"""

import json
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar, Timer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from app.callbacks import (
    Checkpoints,
    ExpertLoad,
    FiniteGuard,
    KeepTermination,
    Metrics,
    ModelFolder,
    NonFiniteLoss,
    RandomState,
    RunProgress,
    RunRecord,
    Samples,
    StopEarly,
)
from app.callbacks.begun import Begun
from app.callbacks.folder import Weights
from app.memory import keep_freed_memory
from app.strategies import FSDP2, WholeCheckpoints
from app.tasks import TASKS
from app.tasks.architecture import resolve_architecture
from app.tasks.gradients import check_max_norm
from app.tasks.start import load_start, starting_architecture
from app.tasks.training import Training
from models.errors import UserError, did_you_mean
from recipes.fit_arguments import SHOWN, chosen_task, prepare, trusting, types_of
from recipes.fit_errors import explained
from recipes.fit_state import (
    FitPlan,
    describe,
    describe_checkpoint,
    differences,
    find_checkpoint,
    flatten,
    plan_fit,
    run_folder,
)
from recipes.trust import check_recipe, local_files_only, place_below, restrict_imports
from recipes.values import check_finite, check_nulls, check_numbers, check_times

DEFAULTS = {  # of the trainer, where a recipe says nothing
    "use_distributed_sampler": False,  # the data module shards by itself, in an order that can be resumed
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "gradient_clip_val": 1.0,
}
if "fsdp2" not in StrategyRegistry.available_strategies():
    StrategyRegistry.register("fsdp2", FSDP2, description="fully_shard over every process")


def main(verb: str, argv: list[str]) -> int:
    """Run one of Lightning's loops and return the exit status: 1 when the loss was no longer a number.

    Raises:
        UserError: the input is wrong.
    """
    quieten()
    keep_freed_memory()
    local_files_only()
    if not trusting(argv):
        restrict_imports()
    try:
        with explained(verb):
            FitCLI(args=[verb, *argv])
    except Nothing as sentence:
        say(str(sentence))
    except NonFiniteLoss as error:
        if rank_zero_only.rank == 0:
            print(f"espalier: error: {error}", file=sys.stderr)
        return 1
    return 0


class Nothing(Exception):
    """There is nothing left to do; the message says why."""


def quieten() -> None:
    """Leave Lightning's hints and notices out, so that what is said is about the run; its warnings stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")  # `metrics` logs by itself
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # the values are sums over all ranks already


@rank_zero_only
def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class FitCLI(LightningCLI):
    """The command. `args` are the verb and what stood behind it."""

    def __init__(self, args: ArgsType) -> None:
        self.plan = FitPlan()
        loops = {name: {"exit_on_error": False} for name in self.subcommands()} | {"exit_on_error": False}
        super().__init__(
            Training,
            data_class(args),
            save_config_callback=None,  # it refuses to resume into its own folder; RunRecord writes the recipe
            trainer_defaults=DEFAULTS,
            auto_configure_optimizers=False,  # its schedules move once an epoch
            load_from_checkpoint_support=False,  # the module writes its own, plain hyper-parameters
            parser_kwargs=loops,
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        whole_numbers_first(parser)
        parser.add_argument("--out", type=str | None, default=None, help="folder to write the trained model to")
        parser.add_argument("--overwrite", type=bool, default=False, help="replace what --out holds and train anew")
        parser.add_argument("--weights", type=Weights, default="last", help="which weights --out gets")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.add_lightning_class_args(StopEarly, "early_stopping")
        parser.add_lightning_class_args(Metrics, "metrics")
        parser.add_lightning_class_args(Samples, "samples")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        verb, *argv = args
        self.parser = parser
        shown = [argument for argument in argv if SHOWN.match(argument)]
        if any("help" in argument or argument == "-h" for argument in shown):
            parser.parse_args(args)
        argv = [argument for argument in argv if argument not in shown]
        values = prepare(verb, argv, types_of(self._subcommand_parsers[verb]))
        if shown:
            parser.parse_args([verb, f"--config={json.dumps(values)}", *shown])
        self.config = parser.parse_object({"subcommand": verb, verb: values})
        if not trusting(argv):
            check_recipe(self.config[verb].as_dict())

    def _parse_ckpt_path(self) -> None:
        """Lightning would let the checkpoint's values win here, silently."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        self.recipe = self._plain_recipe()
        check_finite(self.recipe)
        check_nulls(self.recipe)
        check_numbers(flatten(self.recipe))
        check_times(self.recipe["trainer"])
        check_device(config.trainer.accelerator)
        check_strategy(config.trainer.strategy)
        check_max_norm(config.trainer.gradient_clip_val)
        self._check_architecture(config)
        out = None if config.out is None else Path(config.out).expanduser()
        self.root = run_folder(out) if out is not None else None
        place_below(config.trainer, self.root)
        if self.subcommand == "fit":
            if out is None:
                raise UserError(
                    "fit needs --out DIR (or out: in the recipe), the folder that the trained model goes to"
                )
            self.plan = plan_fit(out, self.recipe, config.ckpt_path, config.overwrite)
            if self.plan.done:
                raise Nothing(self.plan.done)
            resume = self.plan.resume
        else:
            resume = find_checkpoint(config.ckpt_path or "last", self.root)
            if resume is None:
                raise UserError(f"{self.subcommand} needs a trained model: --ckpt_path last, best, or a path")
        self.resume = resume
        config.ckpt_path = None if resume is None else str(resume)
        config.weights_only = True

    def _check_architecture(self, config: Any) -> None:
        """Refuse an architecture that the task cannot train before any data is read; find the tokenizer of a start."""
        task = TASKS.parse(config.model.task, "model.task")
        start = None if config.model.from_ is None else load_start(config.model.from_)
        if start is not None and config.data.tokenizer is None and start.tokenizer is not None:
            config.data.tokenizer = str(start.source.tokenizer_folder)
        architecture = starting_architecture(config.model.architecture, start, task)
        task.check(resolve_architecture(architecture, 1, config.data.sequence_length))  # 1: no tokenizer is known yet

    def _plain_recipe(self) -> dict[str, Any]:
        text = self.parser.dump(self.config, skip_none=False, format="yaml")
        return yaml.safe_load(text)[self.subcommand]

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        self.datamodule.task = self.model.task
        if self.resume is None:
            return
        trained = describe_checkpoint(self.resume)
        if self.subcommand == "fit":
            trained.check(self.recipe, self.resume)
        self.model.expect(trained.architecture, self.resume)
        changes = differences(trained.recipe, self.recipe)
        say(f"continuing from {self.resume}" if self.subcommand == "fit" else f"reading {self.resume}")
        if changes:
            say(f"differs from the checkpoint, and wins: {describe(changes)}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer")
        callbacks = self._callbacks(config)
        if self.subcommand != "fit":
            config["logger"] = False
        elif config.get("logger") in (None, True):
            config["logger"] = TensorBoardLogger(str(self.root), name="", version="")
        if self.root is not None:
            config["default_root_dir"] = str(self.root)
        config["plugins"] = [*_listed(config.get("plugins")), WholeCheckpoints()]
        config["callbacks"] = [*_listed(config.get("callbacks")), *callbacks]
        return super().instantiate_trainer(**kwargs)

    def _callbacks(self, config: dict[str, Any]) -> list[Any]:
        callbacks: list[Any] = [KeepTermination(), RandomState(), FiniteGuard()]
        shown = config.get("enable_progress_bar") is not False
        if shown and not any(isinstance(callback, ProgressBar) for callback in _listed(config.get("callbacks"))):
            callbacks.append(RunProgress())
        if self.subcommand == "fit":
            settings = self.config[self.subcommand]
            callbacks.append(RunRecord(self.recipe, self.plan.stale))
            callbacks.append(ExpertLoad(settings.metrics.every_n_steps))
            out = Path(settings.out).expanduser()
            callbacks.append(ModelFolder(out, self.recipe, settings.seed_everything, settings.weights))
        callbacks.append(Begun())
        return callbacks

    def after_fit(self) -> None:
        steps, planned = self.trainer.global_step, self.trainer.estimated_stepping_batches
        for callback in self.trainer.callbacks:
            if isinstance(callback, StopEarly) and callback.stops:
                say(
                    f"stopped early after {steps} steps: {callback.monitor} has not improved for "
                    f"{callback.waited} validations in a row; with more --early_stopping.patience it goes on"
                )
            elif isinstance(callback, Timer) and (callback.time_remaining() or 1) < 0 and steps < planned:
                say(
                    f"stopped after {steps} of {planned} steps: trainer.max_time is over; with a longer one and "
                    "--ckpt_path last it goes on"
                )
        say(f"the trained model is in {self.config[self.subcommand].out}")

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand == "predict":
            with self._restoring():
                batches = self.trainer.predict(**self._prepare_subcommand_kwargs(subcommand))
            write_predictions(batches)
            return
        before = _content(self.root)
        try:
            with self._restoring():
                super()._run_subcommand(subcommand)
        except (UserError, MisconfigurationException):
            if subcommand == "fit" and (self.trainer.global_step == 0 or not self._begun()):
                remove_since(self.root, before)
            raise

    def _begun(self) -> bool:
        """Whether a loop has begun."""
        return any(isinstance(callback, Begun) and callback.begun for callback in self.trainer.callbacks)

    @contextmanager
    def _restoring(self) -> Iterator[None]:
        """UserError for what fails after a checkpoint is read and before a loop begins: its content does not fit."""
        try:
            yield
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            if self.resume is None or self._begun():
                raise
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{self.resume} holds another state than a run of this recipe has: {reason}") from error


def data_class(args: list[str]) -> type:
    """The class of the data of the task that recipes and flags name."""
    kind = chosen_task(args[0], args[1:])
    return TASKS.parse(kind if kind in tuple(TASKS) else "causal_lm", "model.task").data_class()


@rank_zero_only
def write_predictions(batches: list[list[dict[str, Any]]]) -> None:
    """Print one JSON line for every row: what the task says of it."""
    for row in (row for batch in batches for row in batch):
        print(json.dumps(row))


@rank_zero_only
def remove_since(run: Path, before: set[Path] | None) -> None:
    """Take away what a run that was refused before its first step has put into its folder.

    Args:
        run: its folder.
        before: the paths that were in it; None where there was no folder.
    """
    for path in (_content(run) or set()) - (before or set()):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if before is None and run.is_dir():
        run.rmdir()


def _content(folder: Path | None) -> set[Path] | None:
    return set(folder.iterdir()) if folder is not None and folder.is_dir() else None


def whole_numbers_first(parser: LightningArgumentParser) -> None:
    """Let `limit_val_batches: 1` mean one batch and not all of them.

    Python caches `Optional[Union[int, float]]` together with `Optional[Union[float, int]]`, so which of the two types
    is tried first depends on what else was imported before.
    """
    for action in parser._actions:
        if getattr(action, "_typehint", None) == int | float | None:
            action._typehint = int | float | None


def check_device(accelerator: Any) -> None:
    """Raise UserError when a GPU is asked for where there is none."""
    if accelerator in ("cuda", "gpu") and not torch.cuda.is_available():
        built = "this machine has no usable CUDA device" if torch.version.cuda else "this torch was built without CUDA"
        raise UserError(f"trainer.accelerator is {accelerator}, but {built}; use --device cpu")


def check_strategy(strategy: Any) -> None:
    """Raise UserError for a name that no strategy has."""
    names = {"auto", *StrategyRegistry.available_strategies()}
    if isinstance(strategy, str) and strategy not in names:
        raise UserError(f"trainer.strategy: there is no '{strategy}'{did_you_mean(strategy, names)}")


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
