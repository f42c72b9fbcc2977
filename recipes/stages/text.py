"""The text of a stage: what it calibrates or trains on, and what it is measured on."""

from functools import cached_property

import torch

from app.data.blocks import Batch, TokenBlocks, fingerprint_of, token_blocks
from app.data.corpus import Corpus
from app.data.sources import open_source
from app.evaluation.speed import SpeedProtocol
from app.loading import Loaded
from models.errors import UserError
from recipes.stages.options import Measure

LONGEST = 1024  # tokens of a block where neither the person nor a shorter context says otherwise
CALIBRATION_TOKENS = 4096  # of one calibration batch


def speed_protocol(chosen: Measure) -> SpeedProtocol | None:
    """Return how speed is measured, or None where it is not."""
    if chosen.speed_rounds < 0:
        raise UserError(f"speed_rounds {chosen.speed_rounds} is impossible; 0 leaves speed out")
    return SpeedProtocol(rounds=chosen.speed_rounds) if chosen.speed_rounds else None


class Text:
    """What `--data` and its neighbours name, as blocks of tokens for one model.

    Raises:
        UserError: a sequence length that is too short, or longer than learned positions reach.
    """

    def __init__(self, chosen: Measure, loaded: Loaded) -> None:
        config = loaded.model.config
        self.chosen = chosen
        self.tokenizer = loaded.text_tokenizer()
        self.length = chosen.sequence_length or min(config.context, LONGEST)
        if self.length < 2:
            raise UserError(f"sequence_length {self.length} is too short: a prediction needs a token before it")
        if config.position.acts == "input" and self.length > config.context:
            raise UserError(
                f"sequence_length {self.length} is more than the model's context of {config.context} tokens"
            )

    @cached_property
    def corpus(self) -> Corpus:
        """What `--data` names."""
        return open_source(self.chosen.data, self.chosen.column)

    @cached_property
    def held_out(self) -> TokenBlocks:
        """What models are measured on: the test split of `--data`, or the whole of `--evaluation_data`.

        With `--evaluation_blocks N` these are the first N blocks.
        """
        if self.chosen.evaluation_data is None:
            blocks = token_blocks(self.corpus, self.tokenizer, "test", self.length)
        else:
            corpus = open_source(self.chosen.evaluation_data, self.chosen.column)
            blocks = token_blocks(corpus, self.tokenizer, "all", self.length)
        count = self.chosen.evaluation_blocks
        if count is None:
            return blocks
        if count < 1:
            raise UserError(f"evaluation_blocks {count} is too small; it must be at least 1")
        return TokenBlocks(blocks.folder, self.length, chosen=range(min(count, len(blocks))))

    @cached_property
    def training(self) -> TokenBlocks:
        """The whole training split."""
        return token_blocks(self.corpus, self.tokenizer, "train", self.length)

    def calibration(self, samples: int, device: torch.device, split: str = "train") -> list[Batch]:
        """Return `samples` blocks of a split, drawn with the seed, as batches on the device."""
        blocks = token_blocks(self.corpus, self.tokenizer, split, self.length, samples=samples, seed=self.chosen.seed)
        rows = max(1, CALIBRATION_TOKENS // self.length)
        return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in blocks.batches(rows)]

    def describe(self) -> dict[str, str]:
        """Source and fingerprint, as they go into history.json: `fingerprint` is that of the text measured on."""
        held_out = self.chosen.evaluation_data
        described = {
            "source": self.chosen.data,
            "held_out": held_out or "its test split",
            "fingerprint": self.held_out.fingerprint,
        }
        if held_out is not None:
            described["training_fingerprint"] = fingerprint_of(self.corpus, self.tokenizer)
        return described
