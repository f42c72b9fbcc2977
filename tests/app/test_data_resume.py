"""A run that stops and goes on reads exactly what the uninterrupted one reads, whatever the workers and ranks."""

import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from app.data.corpus import synthetic
from app.data.module import TextData
from models.errors import UserError

LENGTH, BATCH = 32, 8


class Recorder(pl.LightningModule):
    """A bigram model with dropout-free weights that writes down the rows of every batch it is trained on."""

    def __init__(self, vocab_size: int, folder: Path) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)
        self.folder = folder
        self.rows: list[torch.Tensor] = []

    def training_step(self, batch: dict, _: int) -> torch.Tensor:
        self.rows.append(batch["tokens"].clone())
        return nn.functional.cross_entropy(self.table(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())

    def on_train_end(self) -> None:
        torch.save(self.rows, self.folder / f"rows-{self.global_rank}.pt")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    texts = [document.text for document in synthetic(documents=120, words=60).texts]
    (folder / "text.txt").write_text("\n".join(texts))
    return folder


def text_data(source: Path, **changes) -> TextData:
    options = {"source": str(source / "text.txt"), "sequence_length": LENGTH, "batch_size": BATCH, "vocab_size": 300}
    return TextData(**(options | {"cache_dir": str(source / "cache")} | changes))


def fit(
    source: Path,
    folder: Path,
    steps: int,
    *,
    resume: Path | None = None,
    accumulate: int = 1,
    ranks: int = 1,
    **changes,
) -> list[torch.Tensor]:
    """Train to `steps` optimizer steps with a checkpoint after each; return the global batches in order."""
    folder.mkdir(exist_ok=True)
    data = text_data(source, **changes)
    torch.manual_seed(0)
    model = Recorder(data.vocab_size, folder)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp_spawn" if ranks > 1 else "auto",
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(model, data, ckpt_path=resume, weights_only=True)
    parts = [torch.load(folder / f"rows-{rank}.pt", weights_only=True) for rank in range(ranks)]
    return [torch.cat(batch) for batch in zip(*parts, strict=True)]  # [(BATCH, LENGTH)]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def weights(folder: Path, step: int) -> torch.Tensor:
    return torch.load(folder / f"step={step}.ckpt", weights_only=True)["state_dict"]["table.weight"]


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[torch.Tensor], int]:
    """The uninterrupted run over more than two epochs; its folder, its batches, and the batches in an epoch."""
    folder = tmp_path_factory.mktemp("whole")
    epoch = len(text_data(source).train_dataloader())
    assert epoch >= 4
    return folder, fit(source, folder, 2 * epoch + 3), epoch


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("where", ["middle", "end of epoch", "second epoch"])
def test_resume_continues_the_order_and_the_weights(source, whole, tmp_path, workers, where):
    folder, batches, epoch = whole
    stop = {"middle": epoch // 2, "end of epoch": epoch, "second epoch": epoch + 2}[where]
    steps = len(batches)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable.*")
        rest = fit(source, tmp_path, steps, resume=folder / f"step={stop}.ckpt", workers=workers)
    assert_equal(rest, batches[stop:])
    assert torch.equal(weights(tmp_path, steps), weights(folder, steps))


def test_resume_between_accumulated_batches(source, tmp_path):
    whole = fit(source, tmp_path / "whole", 9, accumulate=2, workers=2)
    rest = fit(source, tmp_path / "rest", 9, accumulate=2, workers=2, resume=tmp_path / "whole" / "step=4.ckpt")
    assert_equal(rest, whole[8:])
    assert torch.equal(weights(tmp_path / "rest", 9), weights(tmp_path / "whole", 9))


@pytest.mark.parametrize("more", [1, 5])
def test_every_step_has_all_its_batches_also_across_the_end_of_an_epoch(source, whole, tmp_path, more):
    """More batches in a step than in an epoch, and a number that does not divide an epoch."""
    _, batches, epoch = whole
    accumulate, steps = (epoch + 1, 2) if more == 1 else (5, 4)
    assert epoch % accumulate
    found = fit(source, tmp_path / "whole", steps, accumulate=accumulate)
    assert len(found) == steps * accumulate
    assert_equal(found[: len(batches)], batches[: len(found)])
    rest = fit(source, tmp_path / "rest", steps, accumulate=accumulate, resume=tmp_path / "whole" / "step=1.ckpt")
    assert_equal(rest, found[accumulate:])
    assert torch.equal(weights(tmp_path / "rest", steps), weights(tmp_path / "whole", steps))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"limit_train_batches": 5},
            r"limit_train_batches .* 5 leaves 5 batches in an epoch, .* multiple of 2, such as 4",
        ),
        ({"limit_train_batches": 1, "max_epochs": 1}, "such as 2"),
        ({"overfit_batches": 3}, r"overfit_batches\) 3 leaves 3 batches"),
        ({"val_check_interval": 1000}, r"val_check_interval is 1000, and an epoch has \d+ batches"),
    ],
)
def test_epochs_that_do_not_fit_the_trainer_are_refused_before_any_work(source, tmp_path, options, sentence):
    data = text_data(source)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        accumulate_grad_batches=2, **{"max_steps": 2} | options,
    )  # fmt: skip
    with pytest.raises(UserError, match=sentence):
        trainer.fit(Recorder(data.vocab_size, tmp_path), data)


@pytest.mark.slow
def test_one_rank_resumes_on_two(source, whole, tmp_path):
    folder, batches, epoch = whole
    stop = epoch // 2
    rest = fit(source, tmp_path, epoch + 2, resume=folder / f"step={stop}.ckpt", ranks=2, workers=2)
    assert_equal(rest, batches[stop : epoch + 2])
    again = fit(source, tmp_path, epoch + 4, resume=tmp_path / f"step={epoch + 2}.ckpt")  # and back on one
    assert_equal(again, batches[epoch + 2 : epoch + 4])


def test_another_batch_size_continues_with_the_next_sample(source, whole, tmp_path):
    folder, batches, _ = whole
    samples = torch.cat(batches)
    rest = fit(source, tmp_path, 4, resume=folder / "step=2.ckpt", batch_size=BATCH // 2)
    assert_equal(rest, list(samples[2 * BATCH : 3 * BATCH].split(BATCH // 2)))


def test_an_interrupted_step_has_consumed_nothing(source, whole, tmp_path):
    _, batches, _ = whole

    class Breaks(Recorder):
        def training_step(self, batch: dict, index: int) -> torch.Tensor:
            if index == 3:
                raise RuntimeError("the power went")
            return super().training_step(batch, index)

    data = text_data(source, workers=2)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, limit_val_batches=0,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="the power went"):
        trainer.fit(Breaks(data.vocab_size, tmp_path), data)
    assert data.state_dict()["position"] == 3 * BATCH
    trainer.save_checkpoint(tmp_path / "broken.ckpt")
    rest = fit(source, tmp_path, 5, resume=tmp_path / "broken.ckpt")
    assert_equal(rest, batches[3:5])


def test_a_new_trainer_begins_anew_with_the_same_data(source, whole, tmp_path):
    _, batches, _ = whole
    data = text_data(source)
    for _ in range(2):
        model = Recorder(data.vocab_size, tmp_path)
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(model, data)
        assert_equal(model.rows, batches[:2])


def test_other_data_cannot_continue(source, whole, tmp_path):
    checkpoint = whole[0] / "step=2.ckpt"
    with pytest.raises(UserError, match="sequence_length 32 and cannot continue with 16"):
        fit(source, tmp_path, 4, resume=checkpoint, sequence_length=16)
    (tmp_path / "text.txt").write_text((source / "text.txt").read_text() + "\nmore\n")
    with pytest.raises(UserError, match=r"text\.txt' with its tokenizer is not what the checkpoint was trained on"):
        fit(tmp_path, tmp_path, 4, resume=checkpoint)


def test_another_seed_is_reported(source, whole, tmp_path):
    with pytest.warns(UserWarning, match="data.seed is 1, the checkpoint's was 0"):
        fit(source, tmp_path, 4, resume=whole[0] / "step=2.ckpt", seed=1)


def test_iterating_leaves_the_global_random_generator_alone(source):
    data = text_data(source)
    before = torch.get_rng_state()
    assert len(list(data.train_dataloader())) == len(data.train_dataloader())
    list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)
