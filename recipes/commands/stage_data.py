"""The text of a stage: what it calibrates or trains on, and what it is measured on."""

from functools import cached_property
from typing import Any

import torch

from app.data.corpus import Corpus
from app.data.packing import Batch, fingerprint_of
from app.evaluation.speed import SpeedProtocol
from app.loading import Loaded
from app.tasks.base import Task
from models.errors import UserError
from models.memory import check_bytes
from recipes.commands.options import Measure
from recipes.commands.terminal import say

LONGEST = 1024  # tokens of a block where neither the person nor a shorter context says otherwise
CALIBRATION_TOKENS = 4096  # of one calibration batch


def speed_protocol(chosen: Measure, task: Task) -> SpeedProtocol | None:
    """Return how the speed of a model of the task is measured, or None where it is not."""
    if chosen.speed_rounds < 0:
        raise UserError(f"speed_rounds {chosen.speed_rounds} is impossible; 0 leaves speed out")
    return task.speed(chosen.speed_rounds) if chosen.speed_rounds else None


class Text:
    """Data of a stage: the blocks of tokens that `--data` and its neighbours name, as examples of the model's task.

    Raises:
        UserError: a sequence length that is too short, or longer than learned positions reach.
    """

    def __init__(self, chosen: Measure, loaded: Loaded) -> None:
        config = loaded.model.config
        self.chosen = chosen
        self.task = loaded.task
        self.tokenizer = loaded.text_tokenizer()
        self.used: dict[str, int] = {}  # what of the text went into the stage, for the report
        self.notes: list[str] = []  # what of the text did not, in sentences for the report
        self.rows = config.vocab_size
        self.length = chosen.sequence_length or self.task.sequence_length or min(config.context, LONGEST)
        default = Measure.__dataclass_fields__["data"].default
        self.source = self.task.default_source if chosen.data == default else chosen.data
        if self.length < 2:
            raise UserError(f"sequence_length {self.length} is too short: a prediction needs a token before it")
        self.block_bytes = 4 * self.length * config.width  # of the hidden states that run between two layers
        check_bytes(self.block_bytes, f"one block of {self.length} tokens")
        if config.position.acts == "input" and self.length > config.context:
            raise UserError(
                f"sequence_length {self.length} is more than the model's context of {config.context} tokens"
            )

    @cached_property
    def corpus(self) -> Corpus:
        """The corpus of `--data`."""
        if self.source is None:
            raise UserError(f"a {self.task.describes} has no default data; give --data SOURCE")
        return self._opened(self.source)

    def _opened(self, source: str) -> Corpus:
        corpus = self.task.corpus(source, self.chosen.column)
        for sentence in corpus.left_out:
            self._note(sentence)
        return corpus

    def _note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)
            say(sentence)

    @cached_property
    def held_out(self) -> Any:
        """Held-out blocks: the test split of `--data`, or the whole of `--evaluation_data`.

        With `--evaluation_blocks N` these are the first N blocks.
        """
        if self.chosen.evaluation_data is None:
            blocks = self._blocks(self.corpus, "test")
        else:
            corpus = self._opened(self.chosen.evaluation_data)
            blocks = self._blocks(corpus, "all")
        at_once = min(self.chosen.batch_size or 1, len(blocks))
        check_bytes(at_once * self.block_bytes, f"a batch of {at_once} blocks of {self.length} tokens (batch_size)")
        count = self.chosen.evaluation_blocks
        if count is None:
            return self._examples(blocks, training=False)
        if count < 1:
            raise UserError(f"evaluation_blocks {count} is too small; it must be at least 1")
        if count > len(blocks):
            self._note(f"measured on {len(blocks)} blocks where {count} were asked for: the text holds no more")
        return self._examples(blocks.first(min(count, len(blocks))), training=False)

    @cached_property
    def training(self) -> Any:
        """The whole training split; None: no data is named, and the task has no default."""
        if self.source is None:
            return None
        return self._examples(self._blocks(self.corpus, "train"), training=True)

    def _examples(self, blocks: Any, training: bool) -> Any:
        return self.task.examples(blocks, self.tokenizer, training=training, seed=self.chosen.seed)

    def check_training(self) -> None:
        """Raise UserError where the training split holds a token that the model has no embedding for."""
        self._blocks(self.corpus, "train")

    def _blocks(self, corpus: Corpus, split: str, samples: int | None = None) -> Any:
        """The blocks of a split (`Task.blocks`). Raises UserError for a token that the model has no embedding for."""
        blocks = self.task.blocks(corpus, self.tokenizer, split, self.length, samples, self.chosen.seed)
        if self.tokenizer.vocab_size > self.rows and (highest := blocks.highest) >= self.rows:
            raise UserError(
                f"'{corpus.name}' holds {self.tokenizer.tokenizer.id_to_token(highest)!r}, token {highest} of the "
                f"tokenizer, but the model has embeddings for {self.rows} tokens; give another text or model"
            )
        return blocks

    def calibration(self, samples: int, device: torch.device, split: str = "train") -> list[Batch]:
        """Return `samples` blocks of a split, drawn with the seed, as batches on the device, or all that it holds."""
        blocks = self._blocks(self.corpus, split, samples)
        self.used[f"{split}_blocks"] = len(blocks)
        if len(blocks) < samples:
            self._note(
                f"{len(blocks)} blocks of {self.length} tokens were used where {samples} were asked for: "
                f"the {split} split of '{self.corpus.name}' holds no more"
            )
        check_bytes(len(blocks) * self.block_bytes, f"calibration on {len(blocks)} blocks of {self.length} tokens")
        rows = max(1, CALIBRATION_TOKENS // self.length)
        blocks = self._examples(blocks, training=split == "train")
        return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in blocks.batches(rows)]

    def describe(self) -> dict[str, str]:
        """Source and fingerprint, as they go into history.json: `fingerprint` is that of the text measured on."""
        held_out = self.chosen.evaluation_data
        described = {
            "source": self.source or held_out,
            "held_out": held_out or "its test split",
            "fingerprint": self.held_out.fingerprint,
        }
        if self.source is None:
            return described
        if left_out := self.corpus.left_out:
            described["left_out"] = "; ".join(left_out)
        if held_out is not None:
            described["training_fingerprint"] = fingerprint_of(self.corpus, self.tokenizer)
        return described
