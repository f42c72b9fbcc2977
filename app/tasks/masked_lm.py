"""Masked language modelling (BERT, arXiv 1810.04805): some tokens are hidden, and predicted from both sides.

Of the tokens that are chosen 80 % become the mask token, 10 % a random one, and 10 % stay. As in ModernBERT (arXiv
2412.13663, section 2.2) 30 % are chosen in training. Which ones is a function of (seed, block, epoch) alone: a run that
is resumed masks as the uninterrupted one, and every model is measured on the same masks.

B rows, T tokens a row, V vocabulary.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from app.data.packing import PADDING, Batch, TokenBlocks
from app.data.tokenizer import Tokenizer
from app.evaluation.metrics import METRICS, Accuracy, Loss, Metric
from app.evaluation.rows import IGNORED
from app.evaluation.speed import ForwardProtocol
from app.tasks.base import TASKS
from app.tasks.tokens import TokenTask
from models.config import ModelConfig
from models.errors import UserError
from models.registry import Several
from models.transformer import Transformer

MASKED, RANDOM = 0.8, 0.1  # of the chosen tokens; the rest stay as they are
EVALUATION_SEED = 0


@TASKS.register("masked_lm")
@dataclass(frozen=True)
class MaskedLM(TokenTask):
    """Masked-token prediction, for an encoder.

    Args:
        mask: share of the tokens that are predicted in training.
        evaluation_mask: the same where a model is measured.
        whole_word: whether the tokens of a word are chosen together.
        metrics: what a model is measured by; the first is the one that verdicts are about.
    """

    mask: float = 0.3
    evaluation_mask: float = 0.15
    whole_word: bool = False
    metrics: tuple[Metric, ...] = field(default=(Loss(), Accuracy()), metadata={"registry": Several(METRICS)})

    needs_mask = True
    describes, predicts, pipeline = "encoder", "masked token", "fill-mask"
    protocol = ForwardProtocol
    normalisation = "per masked token of this tokenizer; the masks are the same for every model"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mask", "evaluation_mask"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name):g}; it must be above 0 and below 1")

    def check(self, config: ModelConfig) -> None:
        super().check(config)
        if config.direction != "bidirectional":
            raise UserError(
                "the architecture is causal, and masked_lm predicts a token from both sides; give it direction: "
                "bidirectional, or train it with task: causal_lm"
            )

    def examples(self, blocks: TokenBlocks, tokenizer: Tokenizer, *, training: bool, seed: int = 0) -> "MaskedBlocks":
        share = self.mask if training else self.evaluation_mask
        return MaskedBlocks(blocks, tokenizer, share, self.whole_word, seed if training else EVALUATION_SEED)

    def samples(self, model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], **options: Any) -> list[str]:
        """Each prompt with some of its tokens hidden, and filled in by the model between brackets."""
        texts = []
        for number, prompt in enumerate(prompts):
            whole = np.array(tokenizer.prompt(prompt))[: model.config.context]
            masking = Masking(tokenizer, self.mask, self.whole_word, EVALUATION_SEED)
            chosen = masking.chosen(whole[None], masking.draws(number, 0, len(whole))[0][None])[0]  # (T,)
            hidden = np.where(chosen, masking.token, whole)
            logits = model(torch.from_numpy(hidden)[None].to(next(model.parameters()).device)).logits[0]  # (T, V)
            guessed = logits.argmax(-1).cpu().numpy()
            parts = [
                f"[{tokenizer.decode([int(guess)])}]" if masked else tokenizer.decode([int(token)])
                for token, guess, masked in zip(whole, guessed, chosen, strict=True)
            ]
            texts.append("".join(parts))
        return texts


class Masking:
    """Masking of a block: the tokens that are predicted, and their replacements (arXiv 1810.04805, section 3.1).

    Args:
        tokenizer: has a mask token. Its special tokens are never hidden.
        share: of the other tokens that are chosen, on average.
        whole_word: whether the tokens of a word are chosen together.
        seed: of the draws.
    """

    def __init__(self, tokenizer: Tokenizer, share: float, whole_word: bool, seed: int) -> None:
        self.token, self.vocabulary, self.share, self.seed = tokenizer.mask, tokenizer.vocab_size, share, seed
        self.special = np.zeros(self.vocabulary, dtype=bool)  # (V,)
        self.special[tokenizer.special_ids] = True
        self.words = tokenizer.word_edges if whole_word else None  # two (V,) bool

    def draws(self, block: int, epoch: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each token of a block: what chooses it and what replaces it, uniform in [0, 1), and a random token."""
        draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch, block])))
        return draw.random(length), draw.random(length), draw.integers(0, self.vocabulary, length)

    def chosen(self, tokens: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Whether a token (B, T) is predicted, by its draw (B, T) or by that of the first token of its word."""
        if self.words is not None:
            opens, closes = self.words
            follows = np.zeros(tokens.shape, dtype=bool)
            follows[:, 1:] = opens[tokens[:, 1:]] & closes[tokens[:, :-1]]
            first = np.maximum.accumulate(np.where(follows, 0, np.arange(tokens.shape[1])), axis=1)  # (B, T)
            draws = np.take_along_axis(draws, first, axis=1)
        return (draws < self.share) & ~self.special[tokens]

    def __call__(self, batch: Batch, blocks: Sequence[int], epochs: Sequence[int]) -> Batch:
        """The batch with hidden `tokens`, and `targets` where they are hidden: both (B, T)."""
        tokens = batch["tokens"].numpy()
        drawn = [self.draws(block, epoch, tokens.shape[1]) for block, epoch in zip(blocks, epochs, strict=True)]
        which, how, random = (np.stack(part) for part in zip(*drawn, strict=True))  # each (B, T)
        chosen = self.chosen(tokens, which) & (batch["targets"].numpy() != IGNORED)
        hidden = np.where(how < MASKED, self.token, np.where(how < MASKED + RANDOM, random, tokens))
        return batch | {
            "tokens": torch.from_numpy(np.where(chosen, hidden, tokens)),
            "targets": torch.from_numpy(np.where(chosen, tokens, IGNORED)),
        }


class MaskedBlocks(Dataset):
    """`TokenBlocks` with hidden tokens as inputs and those tokens as targets.

    An index past the end is a block of a later epoch, with other masks.
    """

    def __init__(self, blocks: TokenBlocks, tokenizer: Tokenizer, share: float, whole_word: bool, seed: int) -> None:
        self.blocks, self.masking = blocks, Masking(tokenizer, share, whole_word, seed)
        self.sequence_length, self.corpus, self.split = blocks.sequence_length, blocks.corpus, blocks.split
        self.tokens = None  # how many tokens of the split are hidden takes a pass over it
        self.bytes_per_token = None
        how = f"masked {share} {whole_word} {seed}"
        self.fingerprint = hashlib.sha256(f"{blocks.fingerprint} {how}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {name: tensor[0] for name, tensor in self.batch([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return self.batch(indices)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The blocks `indices` as one batch, as `TokenBlocks.batch` gives them; the index -1 gives a row of padding."""
        epochs = [0 if index == PADDING else index // len(self) for index in indices]
        numbers = [0 if index == PADDING else self.blocks.number(index) for index in indices]
        return self.masking(self.blocks.batch(indices), numbers, epochs)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Every block in order, `batch_size` at a time; the last batch may be smaller."""
        for begin in range(0, len(self), batch_size):
            yield self.batch(range(begin, min(begin + batch_size, len(self))))
