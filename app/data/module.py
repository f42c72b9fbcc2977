"""Text for the Trainer: a LightningDataModule whose state is one number, the samples consumed so far."""

import sys
from functools import cached_property
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import Dataset

from app.data.cache import cache_root, track
from app.data.corpus import SPLITS, Corpus
from app.data.packing import TokenBlocks, fingerprint_of, tokenize
from app.data.sampler import EvaluationBatches, Loader, Order, TrainingBatches
from app.data.sources import open_source
from app.data.tokenizer import Tokenizer, cached_tokenizer, load_tokenizer
from models.errors import UserError


class TextData(LightningDataModule):
    """Documents of a source as batches of token blocks, in an order that can be resumed exactly.

    A batch is a dict: tokens (B, T) int64, targets (B, T) int64 with -100 where nothing is predicted, documents (B, T)
    int32 with -1 for padding (left out with `cross_documents`), ids (B, 2) int64 (see `TokenBlocks.batch`).

    The order belongs to the samples, not to the processes: the same options on one rank or on eight, with any number of
    workers, read the same samples in the same global batches, and a checkpoint of one continues on the other. To keep
    that order when more ranks should do more at once, raise `batch_size` and lower `accumulate_grad_batches` alike.
    An epoch is as many whole optimizer steps as read every block once.
    Validation and test batches have one shape too; their last rows, and the end of the last block, are padding, and
    with several ranks a whole batch may be, so sums of losses must be divided by sums of counts.

    Args:
        source: `python`, a text, JSON-lines, Parquet or CSV file, a folder or glob of them, a datasets folder, or a hub
            name.
        column: column or field with the text, where the source has more than one.
        sequence_length: tokens in a row (T).
        batch_size: rows in a batch over all ranks together; a rank gets batch_size / ranks of them.
        tokenizer: a folder with tokenizer.json, or that file; trained on the training split when None.
        vocab_size: size of a tokenizer that is trained here.
        cross_documents: let attention and loss run across documents.
        workers: loader processes of each rank; 0 reads in the training process, which is fast enough for most runs.
        seed: seed of the order.
        cache_dir: folder for tokenizers and token files; by default $ESPALIER_CACHE or the user's cache folder.

    Raises:
        UserError: an option is out of range (the source is opened by `prepare_data` or at the first use).
    """

    def __init__(
        self,
        source: str = "python",
        column: str | None = None,
        sequence_length: int = 256,
        batch_size: int = 16,
        tokenizer: str | None = None,
        vocab_size: int = 4096,
        cross_documents: bool = False,
        workers: int = 0,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.task: Any = None  # the task whose examples are given (app/tasks/base.py); None: blocks as they are
        for name, value, least in (
            ("sequence_length", sequence_length, 1),
            ("batch_size", batch_size, 1),
            ("workers", workers, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise UserError(f"data.{name} is {value}; it must be at least {least}")
        self.source = source
        self.column = column
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.cross_documents = cross_documents
        self.workers = workers
        self.seed = seed
        self.cache = cache_root(cache_dir)
        self._tokenizer_path = tokenizer
        self._vocab_size = vocab_size
        self._blocks: dict[str, TokenBlocks] = {}
        self._consumed = 0  # samples consumed when the training loader was made
        self._processed: int | None = None  # batches that the trainer had processed by then

    # ---- what others ask for

    @cached_property
    def corpus(self) -> Corpus:
        """The open source."""
        return open_source(self.source, self.column, self.cache)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer: loaded, or trained on the training split once and then found in the cache."""
        if self._tokenizer_path is not None:
            return load_tokenizer(self._tokenizer_path)
        texts = track(
            (document.text for document in self.corpus.documents("train")),
            f"Reading {self.corpus.name} for the tokenizer",
            self.corpus.sizes["train"],
            len,
        )
        mask = self.task is not None and self.task.needs_mask
        return cached_tokenizer(texts, self.corpus.sha256, self._vocab_size, self.cache / "tokenizers", mask)

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding needs: the size of the tokenizer, which may be below the one asked for."""
        return self.tokenizer.vocab_size

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the text, its splits, and the tokenizer."""
        return fingerprint_of(self.corpus, self.tokenizer)

    @property
    def left_out(self) -> str:
        """Parts of the source that are not read, in words."""
        return "; ".join(self.corpus.left_out)

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes a predicted token in the validation split, which turns its loss into bits per byte."""
        return self.examples("validation").bytes_per_token

    def examples(self, split: str) -> Dataset:
        """Return what the task makes of the blocks of a split."""
        blocks = self.blocks(split)
        if self.task is None:
            return blocks
        return self.task.examples(blocks, self.tokenizer, training=split == "train", seed=self.seed)

    def blocks(self, split: str) -> TokenBlocks:
        """Return the blocks of a split, tokenized now unless the cache has them; a short last block is dropped from
        the training split and padded elsewhere."""
        if split not in self._blocks:
            folder = tokenize(self.corpus, self.tokenizer, split, self.cache)
            last = "drop" if split == "train" else "pad"
            self._blocks[split] = TokenBlocks(folder, self.sequence_length, last, self.cross_documents)
        return self._blocks[split]

    @property
    def position(self) -> int:
        """Samples that all ranks together have consumed, in batches whose training step has ended.

        Counted from the trainer's own progress, not from what the loader has handed out: workers fetch ahead, and a
        step that was interrupted has consumed nothing.
        """
        if self._processed is None:
            return self._consumed
        return self._consumed + (self._batches_processed() - self._processed) * self.batch_size

    # ---- Lightning

    def prepare_data(self) -> None:
        """Train the tokenizer and tokenize every split, on one rank of each node; the others find it done.

        Raises:
            UserError: the source cannot be read, or holds too little text.
        """
        if self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            self._check_size()
        for split in SPLITS:
            self.blocks(split)
        for sentence in self.corpus.left_out:
            print(sentence, file=sys.stderr, flush=True)

    def setup(self, stage: str) -> None:
        """Open the token files; a new trainer begins at position 0, one that fits again goes on where it stands.

        Raises:
            UserError: the training split is smaller than one batch, or its epochs do not fit the trainer's options.
        """
        if stage == "fit":
            self._check_size()
            self._check_epoch()
            if not self._batches_processed():
                self._consumed, self._processed = 0, None

    def train_dataloader(self) -> Loader:
        """Return the batches of an epoch from the current position on."""
        self._consumed, self._processed = self.position, self._batches_processed()
        blocks = self.blocks("train")
        order = Order(len(blocks), self.seed)
        rank, ranks = self._ranks()
        batches = TrainingBatches(order, self._start, self._epoch(), self.batch_size, rank, ranks)
        return Loader(self.examples("train"), batches, self.workers)

    def val_dataloader(self) -> Loader:
        """Return the whole validation split in order."""
        return self._evaluation("validation")

    def test_dataloader(self) -> Loader:
        """Return the whole test split in order."""
        return self._evaluation("test")

    def predict_dataloader(self) -> Loader:
        """Return the whole test split in order."""
        return self._evaluation("test")

    def state_dict(self) -> dict[str, int | str]:
        """Return the position and what it is a position in. It is the same on every rank: Lightning saves rank 0's."""
        return {
            "position": self.position,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "sequence_length": self.sequence_length,
        }

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Continue from a saved position; when not fitting there is nothing to continue and the state is ignored.

        Raises:
            UserError: the text, the tokenizer or the sequence length is another than the checkpoint's.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        if state["sequence_length"] != self.sequence_length:
            raise UserError(
                f"the checkpoint was trained with sequence_length {state['sequence_length']} and cannot continue with "
                f"{self.sequence_length}; set data.sequence_length back, or start without ckpt_path"
            )
        if state["fingerprint"] != self.fingerprint:
            raise UserError(
                f"source '{self.source}' with its tokenizer is not what the checkpoint was trained on (fingerprint "
                f"{self.fingerprint[:12]}, not {str(state['fingerprint'])[:12]}); give the same data and tokenizer, or "
                "start without ckpt_path"
            )
        if state["seed"] != self.seed:
            rank_zero_warn(
                f"data.seed is {self.seed}, the checkpoint's was {state['seed']}: the order changes from here"
            )
        self._consumed, self._processed = int(state["position"]), None

    def _check_size(self) -> None:
        blocks = self.blocks("train")
        if len(blocks) < self.batch_size:
            needed = self.batch_size * self.sequence_length
            raise UserError(
                f"source '{self.source}' holds {blocks.tokens} tokens in its training split, and one batch of "
                f"{self.batch_size} x {self.sequence_length} needs {needed}; give more text, or a smaller batch_size "
                "or sequence_length"
            )

    def _epoch(self) -> int:
        """Batches in an epoch: as many optimizer steps as read every block once.

        The Trainer steps on the last batch of an epoch, however few have accumulated by then. So an epoch ends with a
        whole step, whose last batches may be the first of the next permutation.
        """
        window = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        return -(-(len(self.blocks("train")) // self.batch_size) // window) * window

    def _check_epoch(self) -> None:
        """Refuse a `limit_train_batches` that ends an epoch inside a step, and a validation after its end."""
        trainer, epoch = self.trainer, self._epoch()
        if trainer is None or trainer.fast_dev_run:
            return
        limit, interval = trainer.limit_train_batches, trainer.val_check_interval
        window = trainer.accumulate_grad_batches
        batches = min(limit, epoch) if isinstance(limit, int) else int(limit * epoch)
        if batches % window:
            right = max(1, batches // window) * window
            raise UserError(
                f"trainer.limit_train_batches (or overfit_batches) {limit} leaves {batches} batches in an epoch, and a "
                f"step takes {window} (accumulate_grad_batches); give a multiple of {window}, such as {right}"
            )
        validates = trainer.check_val_every_n_epoch is not None and trainer.limit_val_batches > 0
        if isinstance(interval, int) and interval > batches and validates:
            raise UserError(
                f"trainer.val_check_interval is {interval}, and an epoch has {batches} batches; give no more, or "
                "check_val_every_n_epoch: null, which counts batches over the whole run"
            )

    def _batches_processed(self) -> int:
        return 0 if self.trainer is None else self.trainer.fit_loop.epoch_loop.batch_progress.total.processed

    def _start(self) -> int:
        """Start of an epoch: the position, or always 0 when a run is to overfit a few batches."""
        return 0 if self.trainer is not None and self.trainer.overfit_batches else self.position

    def _evaluation(self, split: str) -> Loader:
        blocks = self.examples(split)
        return Loader(blocks, EvaluationBatches(len(blocks), self.batch_size, *self._ranks()), self.workers)

    def _ranks(self) -> tuple[int, int]:
        """Return the data-parallel rank and their number: ranks that share a model's tensors get the same batches."""
        shares = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        if not shares:
            return 0, 1
        rank, ranks = shares["rank"], shares["num_replicas"]
        if self.batch_size % ranks:
            raise UserError(
                f"data.batch_size {self.batch_size} cannot be divided among {ranks} ranks; make it a multiple"
            )
        return rank, ranks
