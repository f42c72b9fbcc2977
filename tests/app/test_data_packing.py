"""Blocks: every token predicted once, no document crossed, files that appear whole whatever happens."""

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
import tokenizers
import torch

from app.data.cache import track
from app.data.corpus import Document, MemoryCorpus, synthetic
from app.data.packing import IGNORED, PADDING, TokenBlocks, token_blocks, tokenize
from app.data.sampler import EvaluationBatches, Order, TrainingBatches
from app.data.tokenizer import END_OF_TEXT, Tokenizer, train_tokenizer
from models.errors import UserError

CORPUS = synthetic(documents=80, words=30)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([document.text for document in CORPUS.documents("train")], 300)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    return tokenize(CORPUS, tokenizer, "train", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def reference(tokenizer):
    """Token, target, and document of every input of the training split, by a plain loop."""
    rows = []
    documents = list(CORPUS.documents("train"))
    for place, document in enumerate(documents):
        ids = [tokenizer.eot, *tokenizer.encode(document.text)]
        rows += [(a, b, place) for a, b in zip(ids, [*ids[1:], tokenizer.eot], strict=True)]
    return np.array(rows), [document.number for document in documents]


@pytest.mark.parametrize("length", [1, 7, 64, 100_000])
def test_blocks_equal_a_plain_loop(folder, reference, length):
    rows, numbers = reference
    blocks = TokenBlocks(folder, length)
    batch = blocks.batch(range(len(blocks)))
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "tokens": torch.int64, "targets": torch.int64, "documents": torch.int32, "ids": torch.int64,
    }  # fmt: skip
    missing = len(blocks) * length - len(rows)
    assert 0 <= missing < length
    for name, column, fill in (("tokens", 0, blocks.end_of_text), ("targets", 1, IGNORED), ("documents", 2, PADDING)):
        expected = np.concatenate([rows[:, column], np.full(missing, fill)])
        assert np.array_equal(batch[name].flatten().numpy(), expected), name
    for number, (first, last) in enumerate(batch["ids"].tolist()):
        inside = rows[number * length : (number + 1) * length, 2]
        assert (first, last) == (numbers[inside[0]], numbers[inside[-1]])
    assert len(TokenBlocks(folder, length, last="drop")) == len(rows) // length


def test_any_order_of_rows_and_a_row_of_padding(folder):
    blocks = TokenBlocks(folder, 16)
    whole = blocks.batch(range(len(blocks)))
    some = blocks.batch([5, 0, PADDING, 5])
    for name, tensor in some.items():
        assert torch.equal(tensor[[0, 1, 3]], whole[name][[5, 0, 5]])
    assert some["targets"][2].eq(IGNORED).all()
    assert some["documents"][2].eq(PADDING).all()
    assert some["ids"][2].tolist() == [PADDING, PADDING]
    assert torch.equal(blocks[3]["tokens"], whole["tokens"][3])
    with pytest.raises(IndexError):
        blocks[len(blocks)]
    assert torch.equal(torch.cat([batch["tokens"] for batch in blocks.batches(4)]), whole["tokens"])
    assert "documents" not in TokenBlocks(folder, 16, cross_documents=True).batch([0])


def test_figures_of_a_split(folder, reference, tokenizer):
    rows, numbers = reference
    blocks = TokenBlocks(folder, 16)
    assert blocks.tokens == len(rows)
    assert blocks.bytes_per_token == CORPUS.sizes["train"] / len(rows)
    spans = pairwise(np.load(folder / "starts.npy"))
    for (begin, end), document in zip(spans, CORPUS.documents("train"), strict=True):
        assert blocks.stream[begin] == tokenizer.eot
        assert tokenizer.decode(blocks.stream[begin + 1 : end]) == document.text
        assert blocks.name(document.number) == document.name
    outside = next(number for number in range(len(CORPUS.texts)) if number not in numbers)
    with pytest.raises(UserError, match=f"no document {outside} in its train split"):
        blocks.name(outside)


@pytest.fixture(scope="module")
def begins(tokenizer):
    """The same tokenizer with a begin token of its own, as imported Llamas have one."""
    given = tokenizers.Tokenizer.from_str(tokenizer.tokenizer.to_str())
    given.add_special_tokens(["<s>"])
    return [Tokenizer(given, {}, END_OF_TEXT, begin) for begin in (None, "<s>")]


@pytest.mark.parametrize("length", [1, 7, 64, 100_000])
@pytest.mark.parametrize("cross_documents", [False, True])
def test_a_begin_token_stands_first_in_every_document_and_is_no_target(begins, tmp_path, length, cross_documents):
    without, own = (
        TokenBlocks(tokenize(CORPUS, tokenizer, "train", tmp_path), length, cross_documents=cross_documents)
        for tokenizer in begins
    )
    assert own.fingerprint != without.fingerprint
    plain, batch = (blocks.batch(range(len(blocks))) for blocks in (without, own))
    assert torch.equal(batch["targets"], plain["targets"])
    expected = plain["tokens"].flatten()
    expected[np.load(own.folder / "starts.npy")[:-1]] = begins[1].begin
    assert torch.equal(batch["tokens"].flatten(), expected)
    assert begins[1].begin not in batch["targets"]
    assert torch.equal(own.batch([PADDING])["tokens"], without.batch([PADDING])["tokens"])


def test_token_files_of_tokenizers_without_a_begin_token_keep_their_place(tokenizer, begins, tmp_path):
    files = {tokenize(CORPUS, each, "train", tmp_path) for each in begins}
    assert len(files) == 2
    text = f"{END_OF_TEXT}\n{tokenizer.tokenizer.to_str()}"
    assert tokenizer.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_a_pickled_dataset_opens_its_own_file(folder):
    blocks = TokenBlocks(folder, 16)
    expected = blocks.batch([1])
    data = pickle.dumps(blocks)
    assert len(data) < blocks.stream.nbytes
    assert torch.equal(pickle.loads(data).batch([1])["tokens"], expected["tokens"])


def test_large_vocabularies_and_empty_splits(tokenizer, tmp_path):
    class Large:
        eot, begin, vocab_size, sha256 = 70_000, 70_000, 70_001, "large"

        def encode_batch(self, texts):
            return [[65_536 + len(text)] for text in texts]

    corpus = MemoryCorpus("pair", [Document(0, "a", "x"), Document(1, "b", "yy")])
    blocks = TokenBlocks(tokenize(corpus, Large(), "all", tmp_path), 3)
    assert blocks.batch([0, 1])["tokens"].tolist() == [[70_000, 65_537, 70_000], [65_538, 70_000, 70_000]]
    with pytest.raises(UserError, match="no document in its test split"):
        tokenize(corpus, tokenizer, "test", tmp_path)
    with pytest.raises(UserError, match="split 'dev' does not exist"):
        tokenize(corpus, tokenizer, "dev", tmp_path)


def test_calibration_samples_are_distinct_full_blocks(tokenizer, tmp_path):
    arguments = (CORPUS, tokenizer, "train", 32)
    whole = token_blocks(*arguments, cache_dir=tmp_path)
    some = token_blocks(*arguments, samples=6, seed=1, cache_dir=tmp_path)
    again = token_blocks(*arguments, samples=6, seed=1, cache_dir=tmp_path)
    other = token_blocks(*arguments, samples=6, seed=2, cache_dir=tmp_path)
    rows = some.batch(range(6))
    assert torch.equal(rows["tokens"], again.batch(range(6))["tokens"])
    assert not torch.equal(rows["tokens"], other.batch(range(6))["tokens"])
    assert rows["targets"].ne(IGNORED).all()
    known = whole.batch(range(len(whole)))["tokens"]
    places = [known.eq(row).all(dim=1).nonzero()[0, 0].item() for row in rows["tokens"]]
    assert places == sorted(set(places))
    assert some.fingerprint == whole.fingerprint
    assert len(token_blocks(*arguments, samples=10**6, cache_dir=tmp_path)) == whole.tokens // 32
    with pytest.raises(UserError, match="fewer than one block of 100000"):
        token_blocks(CORPUS, tokenizer, "train", 100_000, samples=1, cache_dir=tmp_path)


def test_the_stream_passes_over_every_block_once_an_epoch():
    order = Order(13, seed=5)
    stream = order.slice(0, 39).reshape(3, 13)
    assert (stream // 13 == np.arange(3)[:, None]).all()  # the epoch of each sample
    assert all(sorted(epoch) == list(range(13)) for epoch in (stream % 13).tolist())
    assert len({tuple(epoch) for epoch in (stream % 13).tolist()}) == 3
    assert np.array_equal(order.slice(10, 30), stream.flatten()[10:30])
    assert np.array_equal(Order(13, seed=5).slice(0, 39), stream.flatten())
    assert not np.array_equal(Order(13, seed=6).slice(0, 39), stream.flatten())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_the_same_global_batches(ranks):
    order = Order(13, seed=5)
    shares = [list(TrainingBatches(order, lambda: 9, 5, 4, rank, ranks)) for rank in range(ranks)]
    batches = [[row for part in parts for row in part] for parts in zip(*shares, strict=True)]
    assert batches == order.slice(9, 29).reshape(5, 4).tolist()
    rows = [list(EvaluationBatches(10, 4, rank, ranks)) for rank in range(ranks)]
    assert {len(batch) for share in rows for batch in share} == {4 // ranks}
    seen = sorted(row for share in rows for batch in share for row in batch)
    assert seen == [PADDING, PADDING, *range(10)]


SLOW_BUILD = """
import sys, time
from pathlib import Path
from app.data.cache import build_once
def build(folder):
    (folder / "one").write_text("1")
    print("started", flush=True)
    time.sleep(float(sys.argv[2]))
    (folder / "two").write_text("2")
build_once(Path(sys.argv[1]), build)
print("done", flush=True)
"""


def start(place, seconds):
    command = [sys.executable, "-c", SLOW_BUILD, str(place), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_build_leaves_nothing_and_two_builders_build_once(tmp_path):
    place = tmp_path / "cache" / "it"
    killed = start(place, 60)
    assert killed.stdout.readline() == "started\n"
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not place.exists()
    begin = time.monotonic()
    pair = [start(place, 0.5), start(place, 0.5)]
    output = [process.communicate()[0] for process in pair]
    assert time.monotonic() - begin < 60
    assert sorted(output) == ["done\n", "started\ndone\n"]
    assert sorted(file.name for file in place.iterdir()) == ["one", "two"]
    assert sorted(path.name for path in place.parent.iterdir()) == [".it.lock", "it"]


def test_the_bar_stays_out_of_the_output(capsys):
    assert list(track(["a"], "Tokenizing", 5_000_000, len)) == ["a"]
    output = capsys.readouterr()
    assert output.out == ""
    assert "Tokenizing" in output.err


def test_a_cache_that_cannot_be_written(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        tokenize(CORPUS, tokenizer, "train", tmp_path / "file")
