"""One small model, really trained on real text, for every test that asserts an order among methods."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from app.data.corpus import MemoryCorpus, python_corpus
from app.data.packing import TokenBlocks, token_blocks
from app.data.tokenizer import load_tokenizer, train_tokenizer
from app.evaluation.quality import BlockSubset, Quality, Segments, evaluate_quality
from models import checkpoint
from models.config import ModelConfig
from models.transformer import Transformer

LENGTH, ROWS, STEPS, HIGHEST_RATE = 128, 16, 320, 3e-3
ARCHITECTURE = {
    "vocab_size": 1024,
    "width": 128,
    "depth": 4,
    "context": LENGTH,
    "attention": {"kind": "full", "heads": 4, "kv_heads": 2},
    "feedforward": {"kind": "swiglu", "width": 352},
}


class Trained(NamedTuple):
    """What tests of an order share; `model` is theirs to copy, not to change."""

    model: Transformer
    train: TokenBlocks
    calibration: list[dict[str, Any]]  # 4 batches of 16 x 128 tokens of the training text
    held_out: BlockSubset  # 200 blocks of 128 tokens, evenly spaced over the test text
    splits: tuple[TokenBlocks, TokenBlocks]  # all of the test and of the validation text

    def fit(self, model: nn.Module, steps: int, rate: float, loss_of: Callable, attach: Callable | None = None) -> None:
        """Train any model on the training text, see `train_steps`."""
        train_steps(model, self.train, steps, rate, loss_of, attach)

    def pooled(self, models: Sequence[nn.Module]) -> Quality:
        """Quality on both held-out splits, of several models the mean loss of each segment.

        For orders whose differences are small beside what the blocks of one split, the draw of the calibration text,
        or the last bits of the training (which the number of threads decides about) make of them.
        """
        found = [[evaluate_quality(model, split) for split in self.splits] for model in models]
        means = [np.mean([one.sums["nll"] for one in ones], axis=0) for ones in zip(*found, strict=True)]
        shift = np.concatenate([np.full(len(nll), 10**6 * number) for number, nll in enumerate(means)])
        block, document, tokens = (
            np.concatenate([getattr(one.segments, name) for one in found[0]])
            for name in ("block", "document", "tokens")
        )
        segments = Segments(block + shift, document + shift, tokens)
        return replace(found[0][0], segments=segments, sums={"nll": np.concatenate(means)})


@pytest.fixture(scope="session", params=[pytest.param("trained", marks=pytest.mark.slow)])
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A decoder of 0.9M parameters after 320 steps on a third of the standard library's source code.

    It takes minutes, so every test of it is slow.
    """
    root = tmp_path_factory.mktemp("trained")
    train_decoder(root / "model", root / "cache")
    return load_decoder(root / "model", root / "cache")


def load_decoder(place: Path, cache: Path, seed: int = 0) -> Trained:
    """What `train_decoder` wrote, with its text; the calibration text is drawn by the seed."""
    tokenizer, corpus = load_tokenizer(place), _corpus()
    train, test, validation = (
        token_blocks(corpus, tokenizer, split, LENGTH, cache_dir=cache) for split in ("train", "test", "validation")
    )
    calibration = token_blocks(corpus, tokenizer, "train", LENGTH, samples=64, seed=1 + seed, cache_dir=cache)
    drawn, held_out = list(calibration.batches(ROWS)), BlockSubset.spread(test, 200)
    return Trained(checkpoint.load(place), train, drawn, held_out, (test, validation))


def _corpus() -> MemoryCorpus:
    return MemoryCorpus("a third of python", python_corpus().texts[::3])


def train_decoder(place: Path, cache: Path, seed: int = 0) -> None:
    """Train the decoder of one seed and write it to the folder `place`."""
    corpus = _corpus()
    tokenizer = train_tokenizer((document.text for document in corpus.documents("train")), ARCHITECTURE["vocab_size"])
    blocks = token_blocks(corpus, tokenizer, "train", LENGTH, cache_dir=cache)
    torch.manual_seed(seed)
    model = Transformer(ModelConfig.from_dict(ARCHITECTURE))
    train_steps(model, blocks, STEPS, HIGHEST_RATE, lambda batch: model(**batch).loss)
    with checkpoint.writing(place) as target:
        checkpoint.save_model(model, target)
        tokenizer.save(target)


def train_steps(model, blocks, steps, rate, loss_of, attach=None) -> None:
    """AdamW over `steps` batches in a seeded order; the rate rises over 20 steps and falls to a twentieth at the end.

    loss_of: batch -> scalar. attach: called with the optimizer before the first step.
    """
    order = torch.randperm(len(blocks) - 1, generator=torch.Generator().manual_seed(0))  # the last block is padded
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    if attach is not None:
        attach(optimizer)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (1.0 - 0.95 * step / steps)
        start = step * ROWS % (len(order) - ROWS)
        batch = blocks.batch(order[start : start + ROWS].tolist())
        loss = loss_of({name: batch[name] for name in ("tokens", "targets", "documents")})
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
