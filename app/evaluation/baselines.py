"""Baselines: the same tokens predicted by token frequencies and by an untrained model.

untrained   an architecture, freshly initialised: where its training began
unigram     every token by its frequency in the training text alone: no context used at all
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from app.evaluation import formatting
from app.evaluation.metrics import Metric
from app.evaluation.quality import (
    PREDICTION,
    BlockSubset,
    Progress,
    Quality,
    batches,
    closed,
    evaluate_quality,
    no_progress,
    quality,
)
from app.evaluation.rows import IGNORED, Ledger
from models.checkpoint import skeleton
from models.config import ModelConfig
from models.transformer import Transformer

UNTRAINED_BLOCKS = 64  # a fresh model is about as wrong everywhere: a sample of blocks pins it down


def count_tokens(blocks: Iterable[dict[str, Tensor]], vocabulary: int) -> np.ndarray:
    """Number of times that each token (or class) is a target, (V,) int64."""
    counts = np.zeros(vocabulary, dtype=np.int64)
    for block in blocks:
        targets = block["targets"]
        counts += np.bincount(targets[targets != IGNORED].numpy(), minlength=vocabulary)
    return counts


def unigram(
    blocks: Sequence[dict[str, Tensor]], counts: np.ndarray, metrics: tuple[Metric, ...] = PREDICTION
) -> Quality:
    """Quality of p(token) = (count + 1) / (sum of counts + V), add-one smoothing, on every token of `blocks`."""
    log = torch.from_numpy(np.log(counts + 1.0) - np.log(counts.sum() + len(counts)))  # (V,) float64
    measured = {metric.quantity: metric.units for metric in metrics} | {"nll": lambda log, target: -log[0, target]}
    ledger = Ledger(measured)
    done = 0
    for batch in batches(blocks, 64):
        segment, valid = ledger.open(batch, done)
        target = batch["targets"][valid]  # (N,)
        for name, units in measured.items():
            ledger.add(name, segment[valid], units(log.expand(len(target), -1), target))
        done += len(valid)
    return quality(ledger, *closed(ledger), metrics, blocks)


def untrained(
    config: ModelConfig,
    blocks: Sequence[dict[str, Tensor]],
    *,
    metrics: tuple[Metric, ...] = PREDICTION,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Progress = no_progress,
) -> Quality:
    """Quality of a freshly initialised model of the same architecture, uncompressed, on up to 64 blocks of the split.

    The caller's random state is left as it was.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Transformer(replace(config, compression={})).to(device)
    return evaluate_quality(model, BlockSubset.spread(blocks, UNTRAINED_BLOCKS), metrics=metrics, progress=progress)


def baselines(
    config: ModelConfig,
    blocks: Sequence[dict[str, Tensor]],
    training_blocks: Iterable[dict[str, Tensor]] | None = None,
    *,
    metrics: tuple[Metric, ...] = PREDICTION,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Progress = no_progress,
) -> dict:
    """The `baselines` of a report: a `quality` block for each, with where it comes from.

    Without `training_blocks` the unigram frequencies are those of the evaluation text itself, which flatters the
    unigram baseline (a stricter bar for the model); the figures say which it was. Later stages inherit these figures
    whatever became of the architecture, so the untrained model is described by its own size.
    """
    return {
        "unigram": frequencies(config, blocks, training_blocks, metrics, "token"),
        "untrained": untrained(config, blocks, metrics=metrics, seed=seed, device=device, progress=progress).figures()
        | {"source": f"{describe(config)}, freshly initialised, seed {seed}, at most {UNTRAINED_BLOCKS} blocks"},
    }


def frequencies(
    config: ModelConfig,
    blocks: Sequence[dict[str, Tensor]],
    training_blocks: Iterable[dict[str, Tensor]] | None,
    metrics: tuple[Metric, ...],
    what: str,
) -> dict:
    """Figures of predicting everything by how often it is a target; `what`: a target in a word."""
    counted = "the training split" if training_blocks is not None else "the evaluation text itself"
    counts = count_tokens(training_blocks if training_blocks is not None else blocks, config.outputs)
    return unigram(blocks, counts, metrics).figures() | {"source": f"{what} frequencies of {counted}"}


def describe(config: ModelConfig) -> str:
    """An architecture in words: its layers, its width, its parameters."""
    layers = "1 layer" if len(config.layers) == 1 else f"{len(config.layers)} layers"
    counts = skeleton(replace(config, compression={})).count_parameters()
    parameters = formatting.parameters(counts["total"], counts["active"])
    return f"a model of {layers}, width {config.width} and {parameters} parameters"
