"""Quality on held-out data: the task's metrics, paired differences, KL divergence and agreement.

    evaluate_quality(model, blocks)           -> Quality               one model
    evaluate_qualities([a, b], blocks)        -> [Quality, Quality], Divergence     the same batches, one pass
    paired(before, after)                     -> Interval              nats per token, 95 %

The whole split is read once. Every token with a target is predicted exactly once, from the tokens before it in its own
document that fall in the same block (so the context is 1 to T tokens; its mean is reported). Nothing overlaps: the
stride is the block length. Log-probabilities are taken in fp32 and summed in fp64, whatever the model computes in.

B rows in a batch, T tokens in a block, V vocabulary, D width, N predicted tokens of a chunk.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from app.evaluation.experts import Loads
from app.evaluation.intervals import Interval
from app.evaluation.metrics import BitsPerByte, Loss, Metric, Perplexity, quantities
from app.evaluation.rows import IGNORED, Ledger, Rows, Segments
from app.evaluation.size import device_of
from models.errors import UserError
from models.finite import not_finite
from models.projection import LOGITS_AT_ONCE, kl_divergence, log_probabilities

PREDICTION = (Perplexity(), Loss(), BitsPerByte())  # the metrics of a language model

Progress = Callable[[int, int], None]


class BlockSubset(Sequence):
    """Some blocks of a split, by their indices; `tokens` stays the number of predictions in the whole split."""

    def __init__(self, blocks: Sequence[dict[str, Tensor]], indices: Sequence[int]) -> None:
        self.blocks = blocks
        self.indices = [int(index) for index in indices]
        self.tokens = getattr(blocks, "tokens", None)
        self.bytes_per_token = getattr(blocks, "bytes_per_token", None)
        self.fingerprint = getattr(blocks, "fingerprint", None)

    @classmethod
    def first(cls, blocks: Sequence[dict[str, Tensor]], count: int) -> "BlockSubset":
        """The first `count` blocks, or all where there are fewer."""
        return cls(blocks, range(min(count, len(blocks))))

    @classmethod
    def spread(cls, blocks: Sequence[dict[str, Tensor]], count: int) -> "BlockSubset":
        """At most `count` blocks, evenly spaced over the split."""
        return cls(blocks, np.linspace(0, len(blocks) - 1, min(count, len(blocks))).round())

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.blocks[self.indices[index]]


def no_progress(done: int, total: int) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Quality(Rows):
    """Quality of one model on a split, by metric."""

    metrics: tuple[Metric, ...]
    context: int  # T, the longest context
    mean_context: float
    experts: dict = field(default_factory=dict)  # of each layer with experts, what app/evaluation/experts.py gathers

    @property
    def loss(self) -> Interval:
        """Nats per token."""
        return self.mean("nll")

    @property
    def method(self) -> str:
        """Method of the intervals, in words."""
        others: dict[str, list[str]] = {}
        for metric in self.metrics:
            if metric.intervals:
                others.setdefault(metric.intervals, []).append(metric.label)
        return "; ".join([self.segments.describe(), *(f"{', '.join(of)}: {how}" for how, of in others.items())])

    def figures(self) -> dict:
        """The `quality` block of report.json: every metric, the predicted tokens, and the intervals."""
        found = {metric.kind: metric.value(self) for metric in self.metrics}
        scales = {name: interval for name, interval in found.items() if interval is not None}
        figures: dict = {name: interval.value for name, interval in scales.items()}
        figures["tokens"] = self.tokens
        figures["interval"] = {name: [interval.low, interval.high] for name, interval in scales.items()}
        figures["interval"]["method"] = self.method
        return figures


@dataclass(frozen=True)
class Divergence:
    """KL divergence and agreement of `after` with `before` on the same tokens; sums over the segments, (S,) float64."""

    segments: Segments
    kl: np.ndarray  # KL(before || after), nats
    agreements: np.ndarray  # tokens whose most likely successor is the same in both

    @property
    def kl_divergence(self) -> Interval:
        """KL(before || after) in nats per token."""
        return self.segments.mean(self.kl)

    @property
    def agreement(self) -> Interval:
        """Share of positions where both models rank the same next token first."""
        return self.segments.mean(self.agreements).map(lambda share: min(1.0, share))


def check_same(before: Quality, after: Quality) -> None:
    """Raise UserError where the two were not measured on the same tokens."""
    same = before.segments.tokens.shape == after.segments.tokens.shape and all(
        np.array_equal(getattr(before.segments, part), getattr(after.segments, part))
        for part in ("block", "document", "tokens")
    )
    if not same:
        raise UserError(
            f"the two models were not evaluated on the same tokens ({before.tokens} before, {after.tokens} after): "
            "a paired difference needs one data source, one tokenizer and one sequence length"
        )


def paired(before: Quality, after: Quality) -> Interval:
    """Difference of the two losses (after - before) in nats per token, with its paired 95 % interval.

    Raises UserError where the two were not measured on the same tokens.
    """
    check_same(before, after)
    return before.segments.mean(after.sums["nll"] - before.sums["nll"])


def rows_at_once(vocabulary: int, length: int) -> int:
    """Rows of a batch, such that the hidden states stay small and small models still fill the cores."""
    return max(1, min(32, 8192 // length, 2 * LOGITS_AT_ONCE // (vocabulary * length)))


def batches(blocks: Sequence[dict[str, Tensor]], size: int) -> Iterable[dict[str, Tensor]]:
    """The blocks in order, `size` of them stacked at a time; each tensor (T,) becomes (B, T)."""
    for start in range(0, len(blocks), size):
        yield default_collate([blocks[index] for index in range(start, min(start + size, len(blocks)))])


def final_hidden(model: nn.Module, tokens: Tensor, documents: Tensor | None) -> Tensor:
    """Final hidden states (B, T, D), so that logits can be made in chunks."""
    return model.hidden(tokens, documents=documents).x


@torch.no_grad()
def evaluate_qualities(
    models: Sequence[nn.Module],
    blocks: Sequence[dict[str, Tensor]],
    *,
    metrics: tuple[Metric, ...] = PREDICTION,
    batch_size: int | None = None,
    progress: Progress = no_progress,
) -> tuple[list[Quality], Divergence | None]:
    """Evaluate the models on the same batches in one pass over the whole split.

    Args:
        models: Transformers of one vocabulary, each in the dtype and on the device that it runs in.
        blocks: `TokenBlocks`, or any sequence of {"tokens" (T,), "targets" (T,), "documents" (T,)}; `documents` number
            the documents of the whole split and are left out where tokens see across them.
        metrics: what each Quality gives.
        batch_size: rows at a time; chosen from the vocabulary and the block length when None.
        progress: called with (blocks done, blocks in all).

    Returns the Quality of each model and, where there are two, the Divergence of the second from the first.
    Raises UserError when the split holds no token to predict, the vocabularies differ, or a prediction is not finite.
    """
    if not len(blocks):
        raise UserError("the evaluation split is empty: there is no token to predict")
    vocabularies = {model.config.outputs for model in models}
    if len(vocabularies) > 1:
        raise UserError(f"models of different vocabularies ({sorted(vocabularies)}) cannot be compared token by token")
    vocabulary = vocabularies.pop()
    size = batch_size or rows_at_once(vocabulary, len(blocks[0]["tokens"]))
    count = len(models)
    units = quantities(metrics)
    ledger = Ledger(
        [*(f"{name} {index}" for index in range(count) for name in units), "kl", "agreements"],
        models[0].config.direction == "bidirectional",
    )
    training, loads = [model.training for model in models], [Loads(model) for model in models]
    for model in models:
        model.eval()
    done = 0
    for batch in batches(blocks, size):
        segment, valid = ledger.open(batch, done)
        hidden = [
            final_hidden(model, batch["tokens"].to(device_of(model)), on(batch.get("documents"), device_of(model)))
            for model in models
        ]  # each (B, T, D)
        for load in loads:
            load.add(valid.numel())
        hidden = [h[valid.to(h.device)] for h in hidden]  # each (N of the batch, D)
        rows, segments, targets = valid.nonzero()[:, 0], segment[valid], batch["targets"][valid]  # (N of the batch,)
        for part, logs in log_probabilities([model.project for model in models], hidden, vocabulary):
            row, where, target = rows[part], segments[part], targets[part]
            for index, log in enumerate(logs):
                for name, of in units.items():
                    values = of(log, target.to(log.device)).cpu()  # (N,)
                    if name == "nll" and not values.isfinite().all():
                        raise broken(models[index], batch, int(row[~values.isfinite()][0]))
                    ledger.add(f"{name} {index}", where, values)
            if count == 2:
                before, after = logs[0], logs[1].to(logs[0].device)
                ledger.add("kl", where, kl_divergence(before, after))
                ledger.add("agreements", where, before.argmax(1) == after.argmax(1))
        done += len(valid)
        progress(done, len(blocks))
    for model, was_training in zip(models, training, strict=True):
        model.train(was_training)
    segments, sums = closed(ledger)
    own = [{name: sums[f"{name} {index}"] for name in units} for index in range(count)]
    qualities = [
        quality(ledger, segments, found, metrics, blocks, load.figures())
        for found, load in zip(own, loads, strict=True)
    ]
    return qualities, Divergence(segments, sums["kl"], sums["agreements"]) if count == 2 else None


def broken(model: nn.Module, batch: dict[str, Tensor], row: int) -> UserError:
    """The error that names the layer where the predictions of a row cease to be finite."""
    device, documents = device_of(model), batch.get("documents")
    real = slice(int((batch["targets"][row] != IGNORED).nonzero().max()) + 1)  # padding attends to nothing
    row_of_documents = None if documents is None else documents[None, row, real]
    return not_finite(model, batch["tokens"][None, row, real].to(device), on(row_of_documents, device))


def on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """The tensor on that device, or None."""
    return None if tensor is None else tensor.to(device)


def closed(ledger: Ledger) -> tuple[Segments, dict[str, np.ndarray]]:
    """`Quality` from a ledger. Raises UserError where nothing was predicted."""
    segments, sums = ledger.close()
    if not segments.tokens.sum():
        raise UserError("the evaluation split holds no token to predict: every target is ignored")
    return segments, sums


def quality(
    ledger: Ledger,
    segments: Segments,
    sums: dict[str, np.ndarray],
    metrics: tuple[Metric, ...],
    blocks: Sequence[dict[str, Tensor]],
    experts: dict | None = None,
) -> Quality:
    """The Quality of one model from its sums over the segments of a ledger that was closed."""
    mean_context = ledger.context_sum / int(segments.tokens.sum())
    size = getattr(blocks, "bytes_per_token", None)
    return Quality(segments, sums, size, metrics, ledger.context, mean_context, experts or {})


def evaluate_quality(
    model: nn.Module,
    blocks: Sequence[dict[str, Tensor]],
    *,
    metrics: tuple[Metric, ...] = PREDICTION,
    batch_size: int | None = None,
    progress: Progress = no_progress,
) -> Quality:
    """`evaluate_qualities` for one model."""
    return evaluate_qualities([model], blocks, metrics=metrics, batch_size=batch_size, progress=progress)[0][0]
