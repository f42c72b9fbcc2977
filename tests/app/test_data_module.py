"""TextData: what a LightningModule gets, what the command line shows, and what is refused."""

from pathlib import Path

import jsonargparse
import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser

from app.data.cache import cache_root
from app.data.corpus import synthetic
from app.data.module import TextData
from app.data.packing import IGNORED
from app.data.tokenizer import train_tokenizer
from models.errors import UserError
from models.io import writing


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def text_data(cache, **changes):
    options = {"source": "synthetic", "sequence_length": 64, "batch_size": 4, "vocab_size": 400, "cache_dir": cache}
    data = TextData(**(options | changes))
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_of_training_batches(cache, workers):
    data = text_data(cache, workers=workers)
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) == len(data.blocks("train")) // 4
    assert {name: tuple(tensor.shape) for name, tensor in batches[0].items()} == {
        "tokens": (4, 64), "targets": (4, 64), "documents": (4, 64), "ids": (4, 2),
    }  # fmt: skip
    rows = torch.cat([batch["tokens"] for batch in batches])
    assert len(rows.unique(dim=0)) == len(rows)
    assert all(batch["targets"].ne(IGNORED).all() for batch in batches)
    other = next(iter(text_data(cache, seed=1).train_dataloader()))
    assert not torch.equal(other["tokens"], batches[0]["tokens"])


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluation_covers_the_whole_split(cache, split):
    data = text_data(cache, batch_size=7)
    loader = data.val_dataloader() if split == "validation" else data.test_dataloader()
    batches = list(loader)
    assert {tuple(batch["tokens"].shape) for batch in batches} == {(7, 64)}
    targets = torch.cat([batch["targets"].flatten() for batch in batches])
    assert targets.ne(IGNORED).sum() == data.blocks(split).tokens
    assert torch.equal(
        targets[: data.blocks(split).tokens], torch.from_numpy(data.blocks(split).stream[1:].astype("int64"))
    )


def test_what_others_ask_for(cache, tmp_path):
    data = text_data(cache)
    assert data.vocab_size == data.tokenizer.vocab_size == 400
    assert data.bytes_per_token == data.blocks("validation").bytes_per_token
    assert data.fingerprint == data.blocks("train").fingerprint
    assert "documents" not in next(iter(text_data(cache, cross_documents=True).train_dataloader()))
    train_tokenizer(["some text " * 50], 270).save(tmp_path)
    given = text_data(cache, tokenizer=str(tmp_path))
    assert given.vocab_size <= 270
    assert given.fingerprint != data.fingerprint


def test_what_is_refused(cache, tmp_path):
    with pytest.raises(UserError, match=r"data\.batch_size is 0; it must be at least 1"):
        TextData(batch_size=0)
    (tmp_path / "small.txt").write_text("a few words\n\n" * 40)
    with pytest.raises(
        UserError, match=r"holds \d+ tokens in its training split, and one batch of 64 x 512 needs 32768"
    ):
        text_data(cache, source=str(tmp_path / "small.txt"), batch_size=64, sequence_length=512)


def test_the_command_line_shows_every_option():
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(TextData, "data")
    text = parser.format_help()
    for option in ("source", "column", "sequence_length", "batch_size", "tokenizer", "vocab_size", "cross_documents"):
        assert f"--data.{option} " in text
    assert "rows in a batch over all ranks together" in text  # the docstring is the help
    parsed = parser.parse_args(["--data.source", "synthetic", "--data.workers", "2"])
    data = parser.instantiate_classes(parsed).data
    assert isinstance(parsed.data, jsonargparse.Namespace)
    assert (data.source, data.workers) == ("synthetic", 2)


def test_what_is_not_read_is_said(tmp_path, capsys):
    rows = ["null", "NA", "", *(document.text.strip().replace("\n", " ") for document in synthetic(documents=60).texts)]
    (tmp_path / "a.csv").write_text("text,id\n" + "".join(f"{text},{number}\n" for number, text in enumerate(rows)))
    data = text_data(str(tmp_path / "cache"), source=str(tmp_path / "a.csv"))
    assert "1 of 63 documents are empty and left out" in capsys.readouterr().err
    assert "1 of 63" in data.left_out


def test_a_user_without_a_home_needs_a_cache_to_be_named(monkeypatch, tmp_path):
    """As in a container that runs under a number that has no account."""

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("ESPALIER_CACHE")
    with pytest.raises(UserError, match="no home folder for the cache; name a folder with .* ESPALIER_CACHE"):
        cache_root()
    assert cache_root(tmp_path / "given") == tmp_path / "given"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with writing(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
