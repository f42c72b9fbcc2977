"""Base class of tasks: data, losses, metrics, baselines, speed and samples of one objective.

A task is an object that one LightningModule trains (app/tasks/training.py), one distils (app/tasks/distill.py), and
that the model folder names (`config.json: task`), so that every stage and report takes it from there.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from torch import Tensor

from app.evaluation.metrics import Metric
from app.evaluation.speed import SpeedProtocol
from models.config import ModelConfig
from models.registry import Registry
from models.transformer import Output, Transformer

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule  # takes seconds to import

    from app.data.corpus import Corpus
    from app.data.tokenizer import Tokenizer

TASKS = Registry("task", example="causal_lm")

Batch = Mapping[str, Tensor]
Forward = Callable[..., Output]  # as `Transformer.forward`, in whatever dtype and on whatever devices


class Losses(NamedTuple):
    """The loss of one batch, so that micro-batches and ranks add up.

    Attributes:
        total: () mean over what counts, plus what the mechanisms add; carries the gradient.
        sums: quantity of the metrics -> () detached sum over what counts; the first is the task's loss.
        count: () how many targets count.
        places: the most that could count in a batch of so many rows.
        units: quantity of the gathered metrics -> (N,), of each target; of `measured` only.
    """

    total: Tensor
    sums: dict[str, Tensor]
    count: Tensor
    places: int
    units: Mapping[str, Tensor] = MappingProxyType({})


class Task:
    """Base class of the registered tasks, each a frozen dataclass of its options.

    Attributes:
        kind: its name in a recipe and in config.json.
        metrics: what a model is measured by; the first is the one that verdicts are about.
        needs_mask: whether its tokenizer needs a mask token.
        generates: whether a model of it continues a text.
        describes: a model of it in a word.
        protocol: how a model of it is timed.
        normalisation: what a figure counts, for the protocol of a report.
        predicts: what two models agree or disagree on, in a sentence.
        predicted, per, positions: what is predicted, what it is predicted once for, and those in a report, in a word.
        model: a model of it in a report's verdict.
        floor: the baseline that a model which is no better than has lost the task.
        pipeline: the task as model hubs name it.
        default_source: the data of a stage that names none; None: it must be named.
        sequence_length: tokens of a block where the data of a stage does not say; None: the model's context.
    """

    kind: ClassVar[str]
    metrics: tuple[Metric, ...]
    needs_mask: ClassVar[bool] = False
    generates: ClassVar[bool] = False
    describes: ClassVar[str] = "model"
    protocol: ClassVar[type[SpeedProtocol]] = SpeedProtocol
    normalisation: ClassVar[str] = ""
    predicts: ClassVar[str] = "token"
    predicted: ClassVar[str] = "token"
    per: ClassVar[str] = "token"
    positions: ClassVar[str] = "positions"
    model: ClassVar[str] = "language model"
    floor: ClassVar[str] = "unigram"
    pipeline: ClassVar[str] = "text-generation"
    default_source: ClassVar[str | None] = "python"
    sequence_length: int | None = None

    @property
    def shown(self) -> tuple[Metric, ...]:
        """The metrics of a table with little room: the loss only where it is the first."""
        return tuple(metric for metric in self.metrics if metric.kind != "loss" or metric is self.metrics[0])

    def shaped(self, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """The architecture of a recipe or of a model to start from, with what the task decides; default: as it is."""
        return dict(architecture)

    def check(self, config: ModelConfig) -> None:
        """Raise UserError for an architecture that the task cannot train."""

    def data_class(self) -> type["LightningDataModule"]:
        """The class of its data modules, whose options `data` of a recipe has."""
        raise NotImplementedError

    def data(self, **options: Any) -> "LightningDataModule":
        """The data module with these options."""
        data = self.data_class()(**options)
        data.task = self
        return data

    def with_data(self, data: "LightningDataModule") -> Self:
        """The task with what it takes from the data that it is trained on; default: nothing."""
        return self

    def corpus(self, source: str, column: str | None = None) -> "Corpus":
        """The data that a stage names. Raises UserError where it cannot be read."""
        raise NotImplementedError

    def blocks(
        self, corpus: "Corpus", tokenizer: "Tokenizer", split: str, length: int, samples: int | None, seed: int
    ) -> Any:
        """Blocks of a split: all for evaluation, or so many `samples` drawn with the seed for calibration."""
        raise NotImplementedError

    def examples(self, blocks: Any, tokenizer: "Tokenizer", *, training: bool, seed: int = 0) -> Any:
        """Blocks as inputs and targets: the `blocks` themselves, or a data set over them.

        Args:
            blocks: as `blocks` gives them.
            tokenizer: of the blocks.
            training: whether they are to be trained on, or to be measured on.
            seed: of what is drawn for the training; what is measured is the same for every model.
        """
        return blocks

    def losses(self, model: Forward, batch: Batch, *, z_loss: float = 0.0) -> Losses:
        """The losses of a batch of `examples`; z_loss: weight of the z-loss."""
        raise NotImplementedError

    def measured(self, model: Forward, batch: Batch) -> Losses:
        """The sums of a batch of a validation or a test: every quantity of the metrics."""
        return self.losses(model, batch)

    def predictions(self, model: Forward, batch: Batch) -> Tensor:
        """Predictions: log-probabilities (N, V) at the N targets of a batch, in their order."""
        raise NotImplementedError

    def predicted_rows(self, model: Forward, batch: Batch) -> list[dict[str, Any]]:
        """What `espalier predict` prints of a batch, as JSON values: one mapping for each row that is no padding."""
        raise NotImplementedError

    def baselines(self, config: ModelConfig, blocks: Sequence[Batch], training: Any = None, **options: Any) -> dict:
        """Baselines by name, for the `baselines` block of report.json; none by default."""
        return {}

    def speed(self, rounds: int) -> SpeedProtocol:
        """Speed protocol of the task, in so many rounds."""
        return self.protocol(rounds=rounds)

    def samples(self, model: Transformer, tokenizer: "Tokenizer", prompts: Sequence[str], **options: Any) -> list[str]:
        """Samples: texts that the model generates from the prompts; none by default.

        Args:
            options: `max_new_tokens`, `temperature` and `seed`, of which a task uses what it can.
        """
        return []

    def dump(self) -> dict[str, Any]:
        """The task as config.json names it."""
        return TASKS.dump(self)


def task_of(report: Mapping[str, Any]) -> Task:
    """The task whose figures a report holds; causal_lm where it says nothing."""
    return TASKS.parse(report.get("task", "causal_lm"), "report.json: task")
