"""Distillation as a LightningModule: a student learns from the text and from a teacher that stays outside of it.

B sequences in a batch, T tokens in a sequence.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from app.loading import Loaded, load_model
from app.optim import Optimization, Schedule
from app.strategies import FSDP2
from app.strategies.checkpoint_io import METADATA
from app.tasks.architecture import read_architecture, resolve_architecture
from app.tasks.base import Task
from app.tasks.compile import Compile
from app.tasks.precision import ComputeDtype, call_in
from app.tasks.training import Training
from compress.distillation.initialization import INITIALIZATIONS
from compress.distillation.losses.loss import Combine, parse_losses
from compress.distillation.objective import Objective, require_same_vocabulary
from compress.pruning.masks import masks_of
from compress.quantization.qat import ORIGINAL, check_trainable, unpack
from models.errors import UserError
from models.projection import IGNORED
from models.transformer import Transformer
from models.weight_formats import described


class _Pair(nn.Module):
    """Student and objective as one module, so that one cast of parameters covers both."""

    def __init__(self, student: Transformer, objective: Objective) -> None:
        super().__init__()
        self.student, self.objective = student, objective

    def forward(self, teacher: Transformer, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.objective(self.student, teacher, batch)


class Distillation(Training):
    """Trains a student for a task and on what a teacher says about the same tokens.

    A student whose layers are packed integers is trained as it will be stored (compress/quantization/qat.py).

    The teacher is loaded in evaluation mode, gets no gradient and is in no checkpoint. The projectors of feature losses
    are trained and saved with the checkpoint (under `objective`), but are no part of the student (`model`).

    Args:
        teacher: model folder, checkpoint or Hugging Face folder.
        student: the same, or an architecture: mapping, preset's name, YAML or JSON file. Vocabulary and context come
            from the teacher and the data where an architecture names none.
        losses: what the student imitates: names or `{kind: NAME, ...}` of `logit`, `feature`.
        combine: weights of the losses; by default alpha 0.5.
        initialization: of a student that is an architecture: `random` (by default), `layers` copied from the teacher,
            or `upcycled`, with every expert a copy of the teacher's dense feed-forward.
        zeros: whether weights of the student that are exactly 0, as after pruning, are `held` at 0 or `free` to grow;
            in quantized layers, those that are 0 in the teacher too.
        optimizer: by default AdamW.
        schedule: by default Cosine without warm-up.
        compute_dtype: of activations, of both models' weights as they are used; trained weights stay fp32.
        compile: what torch.compile is applied to in the student; nothing by default.
        task: what the teacher was trained for.
    """

    def __init__(
        self,
        teacher: str,
        student: str | dict,
        losses: list[str | dict[str, Any]] | None = None,
        combine: Combine | None = None,
        initialization: str | dict[str, Any] | None = None,
        zeros: Literal["held", "free"] = "held",
        optimizer: Optimization | None = None,
        schedule: Schedule | None = None,
        compute_dtype: ComputeDtype = "float32",
        compile: Compile | None = None,
        task: str | dict | Task = "causal_lm",
    ) -> None:
        super().__init__(
            student, optimizer, schedule, compute_dtype=compute_dtype, compile=compile, task=task, zeros=zeros
        )
        self.teacher_path = teacher
        self.losses = parse_losses(["logit"] if losses is None else losses)
        self.combine = combine or Combine()
        self.combine.check(self.losses)
        if initialization is not None and is_model(student):
            raise UserError(f"initialization is for a student that is an architecture; {student} has weights already")
        self.initialization = INITIALIZATIONS.parse(initialization or "random", "initialization")
        self.initialized: dict[str, Any] = {}  # what the initialisation did
        self.objective: Objective | None = None
        # Tuples keep modules out of this module, and so out of its parameters and checkpoints.
        self._teacher: tuple[Loaded, ...] = ()
        self._student: tuple[Loaded, ...] = ()
        self._pair: tuple[_Pair, ...] = ()

    @property
    def teacher(self) -> Transformer:
        """The teacher, frozen; there from `setup` on."""
        return self._teacher[0].model

    def setup(self, stage: str) -> None:
        """Load the teacher, and the student's architecture; raises UserError where their vocabularies differ."""
        data = self.trainer.datamodule
        self._load()
        self._require_same_tokens(getattr(data, "tokenizer", None))
        super().setup(stage)

    def _load(self) -> None:
        if self._teacher:
            return
        teacher = load_model(self.teacher_path, dtype=self.compute_dtype)
        teacher.model.requires_grad_(False)
        self._teacher = (teacher,)
        if is_model(self.architecture):
            student = load_model(self.architecture, dtype=torch.float32)
            check_trainable(student.model)
            if described(student.model) and self.compute_dtype != torch.float32:
                raise UserError(
                    "the student is quantized, and is trained as it will be stored only with compute_dtype float32"
                )
            self._student = (student,)

    def _require_same_tokens(self, tokenizer: Any) -> None:
        """All tokenizers that are known must number their tokens alike."""
        known = [loaded.tokenizer for loaded in (*self._teacher, *self._student)] + [tokenizer]
        tokens = [given.tokenizer.get_vocab() for given in known if given is not None]
        rows = self.teacher.config.vocab_size
        for other in tokens[1:]:
            require_same_vocabulary(rows, rows, other, tokens[0])

    def _settle(self, vocab_size: int | None = None, context: int | None = None) -> None:
        """The student's config: its folder's, or the architecture with the teacher's vocabulary."""
        self._load()
        if self.config is None:
            rows = self.teacher.config.vocab_size
            if self._student:
                self.architecture = self._student[0].model.config.to_dict()
            values = self.task.shaped(read_architecture(self.architecture))
            require_same_vocabulary(values.get("vocab_size") or rows, rows)
            self.architecture = {**values, "vocab_size": rows}
            if self._student:
                self.config = self._student[0].model.config
            else:
                self.config = resolve_architecture(self.architecture, None, context)
            self.task.check(self.config)
            if self.config.exits is not None:
                raise UserError(
                    "distillation trains what the last layer says, and the student has early exits; leave "
                    "architecture.exits out of it"
                )
            self._check_expected()
        super()._settle()

    def _build(self) -> Transformer:
        if self._student:
            model = self._student[0].model
            self.masks = masks_of(model)  # before packed layers are not: a coarse grid has zeros of its own
            packed = unpack(model)
            model.train().requires_grad_(True)
            self.masks |= self._pruned_before(model, packed)
        else:
            model = super()._build()
            self.initialized = self.initialization.apply(model, self.teacher)
            self.masks = masks_of(model)
        if self.zeros == "free":
            self.masks = {}
        return model

    def _pruned_before(self, model: Transformer, packed: list[str]) -> dict[str, Tensor]:
        """Masks of the teacher's for packed layers that have its zeros: they were pruned, and then quantized."""
        masks, found = masks_of(self.teacher) if packed else {}, {}
        for name in packed:
            mask, weight = masks.get(f"{name}.weight"), model.get_parameter(f"{name}.{ORIGINAL}")
            if mask is not None and mask.shape == weight.shape and not weight[~mask].any():
                found[f"{name}.{ORIGINAL}"] = mask
        return found

    def configure_model(self) -> None:
        """Build student and objective."""
        if self.model is not None:
            return
        super().configure_model()
        self.objective = Objective(self.losses, self.combine, self.config, self.teacher.config)
        self._pair = (_Pair(self.model, self.objective),)
        if isinstance(strategy := self._strategy(), FSDP2):
            strategy.shard_objective(self.objective, self.compute_dtype)

    def terms(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The terms of the objective on a batch, see `Objective.forward`."""
        teacher = self.teacher.to(self.device)  # whole on every rank
        if isinstance(self._strategy(), FSDP2):  # shards are gathered in the compute dtype
            return self._pair[0](teacher, batch)
        return call_in(self.compute_dtype, self._pair[0], teacher, batch)

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        self.stepped = False
        targets = batch["targets"]  # (B, T)
        terms = self.terms(batch)
        count = (targets != IGNORED).sum()
        if not self._window:
            self._unit = targets.numel()
        self._window.append(({"nll": terms["cross_entropy"].float() * count}, count))
        total = terms.pop("total")
        self.log_dict({f"train/{name}": value for name, value in terms.items()}, on_step=True, on_epoch=False)
        return total * (count / self._unit)

    def _evaluate(self, batch: dict[str, Tensor]) -> None:
        eager = nullcontext() if self.compiling is None else self.compiling.evaluating(self.device)
        with eager:
            terms = self.terms(batch)
        count = (batch["targets"] != IGNORED).sum().double()
        means = {"nll": terms["cross_entropy"], "agreement": terms["agreement"], "logit": terms["logit"]}
        self._count_in({**{name: mean * count for name, mean in means.items()}, "count": count})

    def _report(self, split: str) -> dict[str, float]:
        """Beside the student's loss: how often both agree on the next token, and the T^2 KL from teacher to student."""
        means = super()._report(split)
        for name in ("agreement", "logit"):
            self.log(f"{split}/{name}", means[name])
        return means


def is_model(student: str | Mapping[str, Any]) -> bool:
    """Whether a student is given as weights (folder or checkpoint) and not as an architecture."""
    if isinstance(student, Mapping):
        return False
    path = Path(student).expanduser()
    return path.is_dir() or path.suffix == ".ckpt" or (path / METADATA).exists()
