"""What a perplexity is worth: the same tokens, predicted by two models that know nothing.

untrained   an architecture, freshly initialised: where its training began
unigram     every token by its frequency in the training text alone: no context used at all
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from app.evaluation import wording
from app.evaluation.quality import (
    IGNORED,
    Ledger,
    Part,
    Progress,
    Quality,
    batches,
    evaluate_quality,
    no_progress,
    settle,
)
from models.config import ModelConfig
from models.folder import skeleton
from models.transformer import Transformer

UNTRAINED_BLOCKS = 64  # a fresh model is about as wrong everywhere: a sample of blocks pins it down


def count_tokens(blocks: Iterable[dict[str, Tensor]], vocabulary: int) -> np.ndarray:
    """How often each token is a target, (V,) int64."""
    counts = np.zeros(vocabulary, dtype=np.int64)
    for block in blocks:
        targets = block["targets"]
        counts += np.bincount(targets[targets != IGNORED].numpy(), minlength=vocabulary)
    return counts


def unigram(blocks: Sequence[dict[str, Tensor]], counts: np.ndarray) -> Quality:
    """Quality of p(token) = (count + 1) / (sum of counts + V), add-one smoothing, on every token of `blocks`."""
    nll = torch.from_numpy(np.log(counts.sum() + len(counts)) - np.log(counts + 1.0))  # (V,) float64
    ledger = Ledger(3)
    done = 0
    for batch in batches(blocks, 64):
        segment, valid = ledger.open(batch, done)
        ledger.add(0, segment[valid], nll[batch["targets"][valid]])
        done += len(valid)
    return settle(ledger, 1, getattr(blocks, "bytes_per_token", None))[0][0]


def untrained(
    config: ModelConfig,
    blocks: Sequence[dict[str, Tensor]],
    *,
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
    return evaluate_quality(model, Part.spread(blocks, UNTRAINED_BLOCKS), progress=progress)


def baselines(
    config: ModelConfig,
    blocks: Sequence[dict[str, Tensor]],
    training_blocks: Iterable[dict[str, Tensor]] | None = None,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Progress = no_progress,
) -> dict:
    """The `baselines` of a report: a `quality` block for each, with where it comes from.

    Without `training_blocks` the unigram frequencies are those of the evaluation text itself, which flatters the
    unigram baseline (a stricter bar for the model); the figures say which it was. Later stages inherit these figures
    whatever became of the architecture, so the untrained model is described by its own size.
    """
    counted = "the training split" if training_blocks is not None else "the evaluation text itself"
    counts = count_tokens(training_blocks if training_blocks is not None else blocks, config.vocab_size)
    return {
        "unigram": unigram(blocks, counts).figures() | {"source": f"token frequencies of {counted}"},
        "untrained": untrained(config, blocks, seed=seed, device=device, progress=progress).figures()
        | {"source": f"{describe(config)}, freshly initialised, seed {seed}, at most {UNTRAINED_BLOCKS} blocks"},
    }


def describe(config: ModelConfig) -> str:
    """An architecture in words: its layers, its width, its parameters."""
    layers = "1 layer" if len(config.layers) == 1 else f"{len(config.layers)} layers"
    counts = skeleton(replace(config, compression={})).count_parameters()
    parameters = wording.parameters(counts["total"], counts["active"])
    return f"a model of {layers}, width {config.width} and {parameters} parameters"
