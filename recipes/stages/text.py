"""The text of a stage: what it calibrates or trains on, and what it is measured on."""

from functools import cached_property

from app.data.blocks import TokenBlocks, token_blocks
from app.data.corpus import Corpus
from app.data.sources import open_source
from app.loading import Loaded
from models.errors import UserError
from recipes.stages.options import Measure

LONGEST = 1024  # tokens of a block where neither the person nor a shorter context says otherwise


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
        if config.position.level == "input" and self.length > config.context:
            raise UserError(
                f"sequence_length {self.length} is more than the model's context of {config.context} tokens"
            )

    @cached_property
    def corpus(self) -> Corpus:
        """What `--data` names."""
        return open_source(self.chosen.data)

    @cached_property
    def held_out(self) -> TokenBlocks:
        """What models are measured on: the test split of `--data`, or the whole of `--evaluation_data`.

        With `--evaluation_blocks N` these are the first N blocks.
        """
        if self.chosen.evaluation_data is None:
            blocks = token_blocks(self.corpus, self.tokenizer, "test", self.length)
        else:
            blocks = token_blocks(self.chosen.evaluation_data, self.tokenizer, "all", self.length)
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

    def calibration(self, samples: int) -> TokenBlocks:
        """Return `samples` blocks of the training split, drawn with the seed."""
        return token_blocks(self.corpus, self.tokenizer, "train", self.length, samples=samples, seed=self.chosen.seed)

    def describe(self) -> dict[str, str]:
        """Source and fingerprint, as they go into history.json."""
        return {
            "source": self.chosen.data,
            "held_out": self.chosen.evaluation_data or "its test split",
            "fingerprint": self.held_out.fingerprint,
        }
