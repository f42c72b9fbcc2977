"""`espalier distill`: a student learns what a teacher predicts, under a Lightning Trainer."""

import dataclasses
import logging
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from app.callbacks import (
    Checkpoints,
    ExpertLoad,
    FiniteGuard,
    KeepTermination,
    Metrics,
    RandomState,
    RunProgress,
    newest_checkpoint,
)
from app.loading import Loaded, Source, load_model
from app.memory import ANY_SIZE
from app.optim import AdamW, Cosine
from app.strategies import WholeCheckpoints
from app.tasks import Task
from app.tasks.architecture import read_architecture
from app.tasks.compile import CompileBlocks
from app.tasks.distill import Distillation, is_model
from compress.calibration.records import LayerRecord
from compress.distillation.layer_map import UniformLayers
from compress.distillation.losses.loss import Combine, parse_losses
from compress.quantization.qat import check_trainable, pack_again
from models.config import ModelConfig
from models.errors import UserError
from models.registry import Names
from models.transformer import Transformer
from models.weight_formats import described
from recipes.commands import options
from recipes.commands.stage import Stage
from recipes.commands.stage_data import Text
from recipes.commands.terminal import Bars, say

CHECKPOINTS, LOGS = "checkpoints", "tensorboard"


class Distill(Stage[options.Distill]):
    """Distillation into a folder's model, an architecture, or the teacher cut down to fewer layers."""

    verb = "distill"
    largest_kept = ANY_SIZE  # as in all training
    packed = False  # whether the student is quantized

    def title(self) -> str:
        kind = "quantization-aware distillation" if self.packed else "distillation"
        return f"{kind} ({', '.join(self.losses())}), {self.options.max_steps} steps"

    def losses(self) -> dict[str, Any]:
        """The losses by name, as specs; --temperature is that of a logit loss that has none of its own."""
        given, temperature = self.options.losses, self.options.temperature
        listed: Any = Names().parse(given, "losses") if isinstance(given, str) else given
        listed = [listed] if isinstance(listed, dict) else listed
        specs = [{"kind": loss} if isinstance(loss, str) else loss for loss in listed]
        open_ones = [spec for spec in specs if spec.get("kind") == "logit" and "temperature" not in spec]
        if temperature is not None:
            if not open_ones:
                raise UserError(
                    "temperature is an option of the loss logit, which losses does not name (or names with its "
                    "own); leave it out, or add logit"
                )
            specs = [spec | {"temperature": temperature} if spec in open_ones else spec for spec in specs]
        return parse_losses(specs)

    def combine(self) -> Combine:
        """Weights of the losses."""
        combine = Combine(self.options.alpha, self.options.weights)
        combine.check(self.losses())
        return combine

    def check(self) -> None:
        chosen = self.options
        self.combine()
        if chosen.student is not None and chosen.student_layers is not None:
            raise UserError("name the student once: --student (a model or an architecture file) or --student_layers N")
        if chosen.student is not None and chosen.initialization is not None and is_model(chosen.student):
            raise UserError(
                f"initialization is for a student that is no model yet, and {chosen.student} has weights of its own; "
                "leave it out, or name an architecture file"
            )
        if not 0 < chosen.learning_rate < math.inf:
            raise UserError(f"learning_rate is {chosen.learning_rate:g}; it must be above 0 and finite")

    def parents(self) -> dict[str, Loaded]:
        """A student that is a model is what the result is compared with; otherwise the teacher is."""
        teacher = load_model(self.options.teacher, self.device, self.dtype)
        if self.options.student is None or not is_model(self.options.student):
            return {"model": teacher}
        student = load_model(self.options.student, self.device, self.dtype)
        if student.task.kind != teacher.task.kind:
            raise UserError(
                f"the teacher was trained for {teacher.task.kind} and the student for {student.task.kind}; a student "
                "learns the task of its teacher"
            )
        check_trainable(student.model)
        self.packed = bool(described(student.model))
        return {"model": student, "teacher": teacher}

    def references(self, sources: dict[str, Source]) -> list[str]:
        return ["teacher"] if "teacher" in sources else []

    def inputs(self) -> dict[str, Any]:
        """The content of an architecture file."""
        student = self.options.student
        return {} if student is None or is_model(student) else {"architecture": read_architecture(student)}

    def compress(
        self, parents: dict[str, Loaded], text: Text, state: Path, bars: Bars
    ) -> tuple[Transformer, Sequence[LayerRecord]]:
        chosen, config = self.options, parents["model"].model.config
        stored = next(parents["model"].model.parameters()).dtype  # packed weights are buffers
        parents.clear()  # the task loads its own
        seed_everything(chosen.seed, verbose=False)
        text.check_training()
        text.tokenizer.save(state)
        module = self.module(config, stored, text.task)
        data = text.task.data(
            source=text.source,
            column=chosen.column,
            sequence_length=text.length,
            batch_size=chosen.train_batch_size,
            tokenizer=str(state / "tokenizer.json"),
            seed=chosen.seed,
        )
        resume = newest_checkpoint(state / CHECKPOINTS)
        self.trainer(state).fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
        records = pack_again(module.model)
        return module.model.to(stored).eval().requires_grad_(False), records

    def module(self, teacher: ModelConfig, stored: torch.dtype, task: Task) -> Distillation:
        """The LightningModule; `teacher` is cut down where the student is named by its number of layers."""
        chosen = self.options
        student: Any = chosen.student
        initialization = chosen.initialization
        if student is None:
            half = (len(teacher.layers) + 1) // 2
            student = fewer_layers(teacher, half if chosen.student_layers is None else chosen.student_layers).to_dict()
            initialization = initialization or "layers"
            say(f"the student has {len(student['layers'])} of the teacher's {len(teacher.layers)} layers")
            self.notes = lost_kinds(teacher, len(student["layers"]))
            for note in self.notes:
                say(note)
        auto = "bfloat16" if stored == torch.bfloat16 and not self.packed else "float32"
        return Distillation(
            teacher=chosen.teacher,
            student=student,
            losses=list(self.losses().values()),
            combine=self.combine(),
            initialization=initialization,
            zeros=chosen.zeros,
            optimizer=AdamW(lr=chosen.learning_rate, weight_decay=chosen.weight_decay),
            schedule=Cosine(warmup_steps=min(chosen.warmup_steps, chosen.max_steps)),
            compute_dtype=auto if chosen.compute_dtype == "auto" else chosen.compute_dtype,
            compile=CompileBlocks() if chosen.compile == "blocks" else None,
            task=task,
        )

    def trainer(self, state: Path) -> Trainer:
        """A Trainer that keeps its checkpoints in `state` and shows one bar."""
        chosen = self.options
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its lines on devices and products
        return Trainer(
            accelerator=self.device.type,
            devices=1,
            max_steps=chosen.max_steps,
            max_epochs=-1,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            gradient_clip_val=chosen.clip,
            use_distributed_sampler=False,
            enable_model_summary=False,
            default_root_dir=state,
            logger=TensorBoardLogger(str(state), name="", version=LOGS),
            callbacks=[
                KeepTermination(),
                RandomState(),
                FiniteGuard(),
                Metrics(),
                ExpertLoad(),
                RunProgress(),
                Checkpoints(chosen.checkpoint_every, monitor=None),
            ],
            plugins=[WholeCheckpoints()],
        )

    def keep(self, state: Path, target: Path) -> None:
        """The curves."""
        if (state / LOGS).is_dir():
            shutil.copytree(state / LOGS, target / LOGS, dirs_exist_ok=True)


def fewer_layers(config: ModelConfig, count: int) -> ModelConfig:
    """Return the architecture with `count` of its layers, those whose weights the student begins with, and no exits.

    Raises:
        UserError: fewer than one layer, or more than there are.
    """
    if not 1 <= count <= len(config.layers):
        raise UserError(f"student_layers is {count}; the teacher has {len(config.layers)} layers")
    kept = [config.layers[number] for number in kept_layers(config, count)]
    return dataclasses.replace(config, layers=tuple(kept), exits=None, compression={})


def kept_layers(config: ModelConfig, count: int) -> list[int]:
    """The numbers of the `count` layers that a student of fewer layers has."""
    return [teacher for _, teacher in UniformLayers().pairs(count, len(config.layers))]


def lost_kinds(config: ModelConfig, count: int) -> list[str]:
    """Sentences on what a student of `count` layers has in another mix than its teacher, or not at all.

    A mix is another one where a kind is missing, or has one layer more or fewer than its share.
    """
    kept, depth, notes = kept_layers(config, count), len(config.layers), []
    changes = []
    for part in ("attention", "feedforward", "depth"):
        kinds = [getattr(getattr(layer, part), "kind", "none") for layer in config.layers]
        before, after = Counter(kinds), Counter(kinds[number] for number in kept)
        if any(not after[kind] or abs(after[kind] - before[kind] * count / depth) >= 1 for kind in before):
            was, now = (", ".join(f"{mix[kind]} {kind}" for kind in before) for mix in (before, after))
            changes.append(f"{part}: {was} in the teacher, {now} in the student")
    if changes:
        notes.append(
            f"The student's layers (the teacher's {', '.join(map(str, kept))}, counted from 0) are another mix of "
            f"kinds than the teacher's ({'; '.join(changes)}); another --student_layers, or an architecture file as "
            "--student, chooses otherwise."
        )
    if config.exits is not None:
        notes.append(
            "The teacher's early exits are left out, as the student has other layers; an architecture file as "
            "--student can name exits of its own."
        )
    return notes


def main(chosen: options.Distill) -> None:
    """Run `espalier distill`."""
    Distill(chosen).run()
