"""The skeleton that quantize, prune and distill share: load, compress, save, evaluate both models, report.

What is measured is what was written: the compressed model is loaded back from the folder before it is evaluated,
beside the model it came from, in one process on the same tokens. The folder appears under its name only when all of
it is there. Until then OUT.partial holds what an interrupted run goes on from (partial.py).
"""

import dataclasses
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from app.data.packing import TokenBlocks
from app.evaluation.assemble import Subject, evaluate_pair
from app.evaluation.report.overview import REPORT, read_report
from app.evaluation.report.pages import About, write_report
from app.history import history_entry, read_history, write_card, write_history
from app.loading import Loaded, Source, load_model, resolve_device, resolve_dtype
from app.memory import MATRICES_APART, keep_freed_memory
from compress.calibration.records import LayerRecord
from models import checkpoint
from models.errors import UserError
from models.io import read_json, writing
from models.sidecars import hash_sidecars
from models.transformer import Transformer
from recipes.commands import resume
from recipes.commands.options import StageOptions, check_seed
from recipes.commands.stage_data import Text, speed_protocol
from recipes.commands.terminal import Bars, print_summary, say

Options = TypeVar("Options", bound=StageOptions)

# What changes no weights, or is told by the hash of the weights: it may differ when an interrupted run goes on.
_PATHS = ("model", "teacher", "student", "out")
_BESIDE_THE_POINT = (*_PATHS, "overwrite", "batch_size", "speed_rounds")


class Stage(ABC, Generic[Options]):
    """One verb. A subclass says what it compresses and how; `run` does the rest.

    Args:
        options: what the person chose.
    """

    verb: str
    largest_kept = MATRICES_APART  # bytes, of what is freed, that stay with the process (app/memory.py)

    def __init__(self, options: Options) -> None:
        self.options = options
        self.out = Path(options.out).expanduser().absolute()
        self.device = resolve_device(options.device)
        self.dtype = resolve_dtype(options.dtype)
        self.notes: list[str] = []  # sentences of `compress` for the report

    @abstractmethod
    def title(self) -> str:
        """Title of the stage in a few words, such as "GPTQ, 4 bits, groups of 64"."""

    def check(self) -> None:
        """Raise UserError for options that cannot work with any model."""

    @abstractmethod
    def parents(self) -> dict[str, Loaded]:
        """Load the models that go in, by their role; `model` is the one that the result is compared with."""

    @abstractmethod
    def compress(
        self, parents: dict[str, Loaded], text: Text, state: Path, bars: Bars
    ) -> tuple[Transformer, Sequence[LayerRecord]]:
        """Return the compressed model and what was done to each layer. May change the loaded models.

        Args:
            parents: as `parents` loaded them.
            text: what to calibrate or train on.
            state: an existing folder for what an interrupted run goes on from; it may hold some of it already.
        """

    def inputs(self) -> dict[str, Any]:
        """Return what else decides about the result: files that the options only name."""
        return {}

    def references(self, sources: dict[str, Source]) -> list[str]:
        """Roles of further models to show in the report."""
        return []

    def keep(self, state: Path, target: Path) -> None:
        """Put what else of the run is worth keeping into the folder that is being written."""

    def run(self) -> dict[str, Any]:
        """Do the stage and return its report."""
        resume.check_output(self.out, self.options.overwrite)
        self.check_options()
        torch.manual_seed(self.options.seed)
        parents = self.parents()
        text = Text(self.options, parents["model"])
        fingerprint = self.fingerprint(parents, text)
        if self._complete(fingerprint):
            return read_json(self.out / "report.json")
        sources = {role: loaded.source for role, loaded in parents.items()}
        self.baselines = inherited_baselines(sources["model"].path, text.held_out)
        with resume.resumable(self.out, fingerprint, say) as state:
            keep_freed_memory(self.largest_kept)
            started = time.perf_counter()
            with Bars() as bars:
                model, records = self.compress(parents, text, state, bars)
            parents.clear()
            seconds = time.perf_counter() - started
            return self._finish(model, records, text, sources, fingerprint, seconds, state)

    def check_options(self) -> None:
        """Raise UserError for options that cannot work with any model; nothing is read for it."""
        check_seed(self.options.seed)
        self.check()

    def fingerprint(self, parents: dict[str, Loaded], text: Text) -> str:
        """Return the hash of all that decides about the result."""
        return resume.fingerprint_of(
            {
                "stage": self.verb,
                "recipe": {key: value for key, value in self.recipe().items() if key not in _BESIDE_THE_POINT},
                "inputs": self.inputs(),
                "parents": {role: loaded.source.weights_sha256 for role, loaded in parents.items()},
                "beside": hash_sidecars(text.tokenizer.files),
                "data": text.describe(),
                "device": self.device.type,
                "versions": {name: version(name) for name in ("espalier-lm", "torch")},
            }
        )

    def recipe(self) -> dict[str, Any]:
        """Return every option with its value; paths of models as they are seen from beside the output."""
        values = dataclasses.asdict(self.options)
        for key in _PATHS:
            if values.get(key) and (key == "out" or Path(values[key]).expanduser().exists()):
                values[key] = os.path.relpath(Path(values[key]).expanduser(), self.out.parent)
        return values

    def _complete(self, fingerprint: str) -> bool:
        """Whether OUT holds this very result: left by a run that was killed just before it had cleaned up."""
        leftover = resume.partial_folder(self.out)
        if not self.out.exists() or not any(self.out.iterdir()):
            return False
        entries = read_history(self.out)
        if entries and entries[-1].get("fingerprint") == fingerprint and leftover.exists():
            shutil.rmtree(leftover)
            say(f"{self.out} is complete already")
            return True
        if not self.options.overwrite:
            raise UserError(f"{self.out} already holds something; name another folder or pass --overwrite")
        return False

    def _finish(
        self,
        model: Transformer,
        records: Sequence[LayerRecord],
        text: Text,
        sources: dict[str, Source],
        fingerprint: str,
        seconds: float,
        state: Path,
    ) -> dict[str, Any]:
        """Save, load back, evaluate, report; everything appears at once under the output's name."""
        with writing(self.out, overwrite=self.options.overwrite) as target:
            checkpoint.save_model(model, target, task=text.task.dump())
            text.tokenizer.save(target)
            entry = history_entry(
                self.verb,
                self.title(),
                recipe=self.recipe(),
                seed=self.options.seed,
                data=text.describe() | text.used,
                parents={role: source.weights_sha256 for role, source in sources.items()},
                weights=checkpoint.hash_weights(target),
                seconds=seconds,
            )
            entries = [*sources["model"].history, entry | {"fingerprint": fingerprint}]
            write_history(target, entries)
            figures = self._measure(target, sources, text)
            about = About(
                title=self.title(),
                stage=self.verb,
                recipe=self.recipe(),
                history=[{key: past.get(key) for key in ("stage", "title", "time", "seed")} for past in entries],
                data=text.describe() | text.used,
                seed=self.options.seed,
                seconds=seconds,
                device=str(self.device),
                notes=[*text.notes, *self.notes],
            )
            report = write_report(target, figures, records, about)
            self.keep(state, target)
            write_card(target, model, entries, text.task, figures["after"])
        print_summary(report)
        say(f"written to {self.out}")
        return report

    def _measure(self, target: Path, sources: dict[str, Source], text: Text) -> dict[str, Any]:
        """Evaluate what was written beside what it came from, both loaded anew from their files."""
        source = sources["model"]
        with Bars() as bars:
            return evaluate_pair(
                self._subject(source),
                Subject(checkpoint.load(target, self.device, self.dtype), self.out.name, target),
                text.held_out,
                task=text.task,
                training_blocks=None if self.baselines else text.training,
                baselines=self.baselines,
                references=[self._subject(sources[role]) for role in self.references(sources)],
                speed=speed_protocol(self.options, text.task),
                batch_size=self.options.batch_size,
                progress=bars,
            )

    def _subject(self, source: Source) -> Subject:
        """The model of a source, as its files have it."""
        return Subject(load_model(source.path, self.device, self.dtype).model, source.path.name, source.folder)


def inherited_baselines(parent: Path, blocks: TokenBlocks) -> dict[str, Any] | None:
    """Return the baselines of the parent's report where they were measured on these very blocks, else None.

    Raises:
        UserError: the report is not as a stage wrote it.
    """
    path = parent / "report.json"
    if not path.is_file() or read_json(path).get("format") != REPORT:
        return None
    report = read_report(parent)
    how = report["measurement"]
    same = (how.get("data"), how.get("context"), how.get("blocks")) == (
        blocks.fingerprint,
        blocks.sequence_length,
        len(blocks),
    )
    return report.get("baselines") if same else None
