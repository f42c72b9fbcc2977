"""Training of any task as a LightningModule: a task, an architecture, an optimizer and a schedule are injected.

B sequences in a batch, T tokens in a sequence.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import CatMetric, SumMetric

from app.activation_checkpointing import ActivationCheckpointing
from app.loading import Loaded, Source
from app.optim import AdamW, Cosine, Optimization, Schedule
from app.parallelize import parallelize
from app.strategies import FSDP2
from app.tasks.architecture import resolve_architecture
from app.tasks.base import TASKS, Task
from app.tasks.compile import Compile
from app.tasks.gradients import scale_and_clip
from app.tasks.precision import ComputeDtype, call_in
from app.tasks.start import copy_weights, load_start, starting_architecture
from compress.pruning.masks import HeldMasks, masks_of
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Output, Transformer, outline


class StepFigures(NamedTuple):
    """One optimizer step on this rank.

    Attributes:
        sums: quantity -> () sum over the targets of the step's micro-batches; the first is the task's loss.
        count: () number of these targets.
        grad_norm: () norm of the whole gradient before clipping.
        learning_rate: of the first parameter group in this step.
    """

    sums: dict[str, Tensor]
    count: Tensor
    grad_norm: Tensor
    learning_rate: float

    @property
    def loss(self) -> Tensor:
        """() sum of the task's loss."""
        return next(iter(self.sums.values()))


class Training(LightningModule):
    """Trains a Transformer for a task.

    The loss is normalised by the number of targets of the whole optimizer step: over all accumulated micro-batches and
    all ranks, each target counts the same. Clipping is done here too, because Lightning's refuses fused optimizers.

    Args:
        architecture: mapping in the short or the canonical form (models/config.py), a preset's name, or a YAML or JSON
            file. Vocabulary and context come from the data where they are not given. With `from_` it need hold only
            what is to differ.
        optimizer: by default AdamW.
        schedule: by default Cosine without warm-up.
        z_loss: weight of the z-loss (PaLM, arXiv 2204.02311: 1e-4); 0 leaves it out.
        compute_dtype: of activations and of the weights as they are used; the weights that are trained stay fp32.
        compile: what torch.compile is applied to; nothing by default.
        activation_checkpointing: which activations the backward computes again; by default all are kept.
        task: what is trained: `causal_lm`, `masked_lm` for an encoder, or `classify`; `{kind: NAME, ...}` with its own
            options.
        from_: `from` in a recipe: the model whose weights training starts from (a model folder, a checkpoint or a
            Hugging Face folder); a head that is another than the task's is drawn anew.
        zeros: whether weights of the start that are exactly 0, as after pruning, are `held` at 0 or `free` to grow.
    """

    def __init__(
        self,
        architecture: str | dict | None = None,
        optimizer: Optimization | None = None,
        schedule: Schedule | None = None,
        z_loss: float = 0.0,
        compute_dtype: ComputeDtype = "float32",
        compile: Compile | None = None,
        activation_checkpointing: ActivationCheckpointing | None = None,
        task: str | dict | Task = "causal_lm",
        from_: str | None = None,
        zeros: Literal["held", "free"] = "held",
    ) -> None:
        super().__init__()
        self.task: Task = TASKS.parse(task, "model.task")
        self.architecture = architecture
        self.optimizer = optimizer or AdamW()
        self.schedule = schedule or Cosine()
        self.z_loss = z_loss
        self.compute_dtype = getattr(torch, compute_dtype)
        self.compiling = compile
        self.activation_checkpointing = activation_checkpointing
        self.config: ModelConfig | None = None
        self.model: Transformer | None = None
        self.from_ = from_
        self.zeros = zeros
        self.masks: dict[str, Tensor] = {}  # of the parameters that hold zeros, by their names in the model
        self._start: tuple[Loaded, ...] = ()  # a tuple keeps it out of this module's parameters
        self.origin: Source | None = None  # of the weights that training started from
        self._expected: tuple[Mapping[str, Any], Path] | None = None
        self.figures: StepFigures | None = None  # of the latest optimizer step
        self.stepped = False  # whether the latest batch ended an optimizer step
        self._window: list[tuple[dict[str, Tensor], Tensor]] = []  # sums and count of each micro-batch of this step
        self._unit = 1  # targets that a micro-batch's loss is divided by before the real number is known
        self._totals = nn.ModuleDict()  # quantity, and `count` -> its sum over the batches of a validation or a test

    def expect(self, architecture: Mapping[str, Any] | None, checkpoint: Path) -> None:
        """Remember what a checkpoint holds that is going to be loaded, so that `setup` can refuse another shape."""
        self._expected = None if architecture is None else (architecture, checkpoint)

    def setup(self, stage: str) -> None:
        """Settle the architecture; the data module knows its vocabulary by now."""
        data = self.trainer.datamodule
        self.task = self.task.with_data(data)
        self._settle(getattr(data, "vocab_size", None), getattr(data, "sequence_length", None))

    def _settle(self, vocab_size: int | None = None, context: int | None = None) -> None:
        if self.config is None:
            if self.from_ is not None:
                self._start = (load_start(self.from_),)
                self.origin = self._start[0].source
            architecture = starting_architecture(self.architecture, next(iter(self._start), None), self.task)
            self.config = resolve_architecture(architecture, vocab_size, context)
            self.task.check(self.config)
            self._check_expected()
        # plain values only, so that a checkpoint describes itself and loads with weights_only=True
        self._set_hparams({"architecture": self.config.to_dict(), "task": self.task.dump()})

    def _check_expected(self) -> None:
        if self._expected is None:
            return
        architecture, checkpoint = self._expected
        stored = outline(ModelConfig.from_dict(architecture)).state_dict()
        wanted = outline(self.config).state_dict()
        for name in {**stored, **wanted}:
            shapes = [tuple(state[name].shape) if name in state else "absent" for state in (stored, wanted)]
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"{checkpoint} holds another architecture: {name} is {shapes[0]} there and {shapes[1]} in the "
                    "recipe; set model.architecture back, or train anew (--overwrite, or another --out)"
                )

    def configure_model(self) -> None:
        """Build the model and apply what makes it train on this machine (app/parallelize.py)."""
        if self.model is not None:
            return
        if self.config is None:
            self._settle()
        self.model = self._build()
        parallelize(
            self.model,
            checkpointing=self.activation_checkpointing,
            compile=self.compiling,
            strategy=self._strategy(),
            dtype=self.compute_dtype,
        )

    def _build(self) -> Transformer:
        """The model with the weights that training starts from."""
        model = Transformer(self.config)
        for start in self._start:
            copy_weights(model, start.model, self.from_)
            if self.zeros == "held":
                self.masks = masks_of(model)
        if self.masks and self.global_rank == 0:
            print(f"the zeros of {len(self.masks)} matrices of {self.from_} stay zero", file=sys.stderr)
        self._start = ()
        return model

    def _strategy(self) -> Any:
        return self._trainer.strategy if self._trainer is not None else None

    def forward(self, tokens: Tensor, **options: Any) -> Output:
        """Run the model in the compute dtype: tokens (B, T) int64; options as `Transformer.forward` takes them."""
        if isinstance(self._strategy(), FSDP2):
            return self.model(tokens, **options)
        return call_in(self.compute_dtype, self.model, tokens, **options)

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        self.stepped = False
        losses = self.task.losses(self, batch, z_loss=self.z_loss)
        if not self._window:
            self._unit = losses.places
        self._window.append((losses.sums, losses.count))
        return losses.total * (losses.count / self._unit)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Divide the gradient by the step's targets, then clip its norm; keep the figures of the step.

        Raises:
            UserError: another algorithm than the norm.
        """
        if gradient_clip_algorithm not in (None, "norm"):
            raise UserError(f"gradient_clip_algorithm {gradient_clip_algorithm!s} is not supported; norm is")
        sums = {name: torch.stack([found[name] for found, _ in self._window]).sum() for name in self._window[0][0]}
        count = torch.stack([counted for _, counted in self._window]).sum()
        ranks = self.trainer.world_size
        everywhere = self._sum_over_ranks(count)
        scale = self._unit * self.trainer.accumulate_grad_batches * ranks / everywhere.clamp(min=1)
        norm = scale_and_clip(self.parameters(), scale, gradient_clip_val)
        self.figures = StepFigures(sums, count, norm, optimizer.param_groups[0]["lr"])
        self._window, self.stepped = [], True

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let the mechanisms follow that move once a step without a gradient (loss-free balancing)."""
        super().optimizer_step(*args, **kwargs)
        self.model.after_step()

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        return value if self.trainer.world_size == 1 else self.trainer.strategy.reduce(value.clone(), reduce_op="sum")

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.optimizer.build(self)
        if self.masks:
            HeldMasks(self.model, self.masks).attach(optimizer)
        total = self.trainer.estimated_stepping_batches
        schedule = self.schedule.build(optimizer, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        self._evaluate(batch)

    def predict_step(self, batch: dict[str, Tensor], batch_index: int) -> list[dict[str, Any]]:
        """What the task says of each row of a batch (`Task.predicted_rows`)."""
        return self.task.predicted_rows(self._without_compiling, batch)

    def _without_compiling(self, tokens: Tensor, **options: Any) -> Output:
        if self.compiling is None:
            return self(tokens, **options)
        with self.compiling.evaluating(tokens.device):
            return self(tokens, **options)

    def _evaluate(self, batch: dict[str, Tensor]) -> None:
        losses = self.task.measured(self._without_compiling, batch)
        self._count_in({**losses.sums, "count": losses.count})
        self._count_in(losses.units, CatMetric)

    def _count_in(self, found: Mapping[str, Tensor], kind: type[SumMetric | CatMetric] = SumMetric) -> None:
        """Add the sums of a batch to those of the split, or its units to all others."""
        for name, value in found.items():
            if name not in self._totals:
                self._totals[name] = kind(nan_strategy="disable").set_dtype(torch.double).to(self.device)
            self._totals[name].update(value)

    def on_validation_epoch_end(self) -> None:
        self._report("validation")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _report(self, split: str) -> dict[str, float]:
        """Log the loss and every metric of the task over the whole split, each target once; returns all means."""
        found = {name: total.compute() for name, total in self._totals.items()}  # over all ranks
        units = {name: found[name] for name, total in self._totals.items() if isinstance(total, CatMetric)}
        sums = {name: value.item() for name, value in found.items() if name not in units}
        for total in self._totals.values():
            total.reset()
        means = {name: value / max(1.0, sums["count"]) for name, value in sums.items()}
        self.log(f"{split}/loss", next(iter(means.values())), rank_zero_only=False)
        figures = {one.kind: one.figure(units[one.quantity]) for one in self.task.metrics if one.quantity in units}
        for name, value in (self.metrics_of(means) | figures).items():
            if name != "loss":
                self.log(f"{split}/{name}", value)
        return means

    def metrics_of(self, means: Mapping[str, float]) -> dict[str, float]:
        """The metrics of the task that these means of quantities give, by name."""
        size = getattr(self.trainer.datamodule, "bytes_per_token", None)
        found = {one.kind: one.of(means[one.quantity], size) for one in self.task.metrics if one.quantity in means}
        return {name: value for name, value in found.items() if value is not None}
