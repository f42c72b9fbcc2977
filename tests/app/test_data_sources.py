"""SOURCE: every kind of text that a person may name, and one clear sentence for each thing that can be wrong."""

import gzip
import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from app.data import tables, unpacked
from app.data.corpus import SPLITS, synthetic
from app.data.readers import cut_text
from app.data.sources import open_source
from models.errors import UserError

TEXTS = [document.text for document in synthetic(documents=60, words=20).texts]


def texts_of(corpus, split="all"):
    return [document.text for document in corpus.documents(split)]


def write_jsonl(path: Path, texts=TEXTS, field="text") -> Path:
    path.write_text("".join(json.dumps({"id": number, field: text}) + "\n" for number, text in enumerate(texts)))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "parquet", "csv", "tsv", "folder", "saved"])
def test_rows_are_documents(kind, tmp_path):
    path = tmp_path / f"data.{kind}"
    table = pa.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    if kind in ("jsonl", "json"):
        write_jsonl(path)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(write_jsonl(tmp_path / "plain").read_bytes()))
    elif kind == "parquet":
        pa.parquet.write_table(table, path)
    elif kind in ("csv", "tsv"):
        options = pa.csv.WriteOptions(delimiter="," if kind == "csv" else "\t")
        pa.csv.write_csv(table, path, options)
    elif kind == "folder":
        path.mkdir()
        write_jsonl(path / "a.jsonl", TEXTS[:40])
        write_jsonl(path / "b.jsonl", TEXTS[40:])
        (path / "README.md").write_text("not text of the corpus")
    else:
        datasets.Dataset(table).save_to_disk(path)
    corpus = open_source(str(path), cache_dir=tmp_path / "cache")
    assert texts_of(corpus) == TEXTS
    assert [document.number for document in corpus.documents("all")] == list(range(len(TEXTS)))
    assert sum(len(texts_of(corpus, split)) for split in SPLITS) == len(TEXTS)
    assert all(corpus.sizes.values())
    assert corpus.sizes["test"] == sum(len(text.encode()) for text in texts_of(corpus, "test"))


def test_the_hash_is_of_the_text_and_not_of_the_file(tmp_path):
    (tmp_path / "other").mkdir()
    one = open_source(str(write_jsonl(tmp_path / "a.jsonl")), cache_dir=tmp_path / "cache")
    path = write_jsonl(tmp_path / "other" / "b.json", field="content")
    two = open_source(str(path), cache_dir=tmp_path / "cache")
    assert one.sha256 == two.sha256
    write_jsonl(path, [*TEXTS[:-1], "changed"], field="content")
    os.utime(path, ns=(1, 1))
    assert open_source(str(path), cache_dir=tmp_path / "cache").sha256 != one.sha256


def test_a_second_use_reads_nothing_again(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl")
    first = open_source(str(path), cache_dir=tmp_path / "cache").sha256

    def fail(*_, **__):
        raise AssertionError("read again")

    monkeypatch.setattr(unpacked, "open_text", fail)
    monkeypatch.setattr(tables, "open_text", fail)
    assert open_source(str(path), cache_dir=tmp_path / "cache").sha256 == first


def test_one_text_file_is_cut_into_documents_for_three_splits(tmp_path):
    path = tmp_path / "a [1].txt"  # brackets are no pattern when the file exists
    path.write_text("\n".join(TEXTS))
    corpus = open_source(str(path), cache_dir=tmp_path / "cache")
    assert "".join(texts_of(corpus)) == "\n".join(TEXTS)
    assert all(texts_of(corpus, split) for split in SPLITS)
    assert next(corpus.documents("all")).name == "a [1].txt:0"


def test_many_text_files_are_documents(tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number:02d}.txt").write_text(text)
    for source in (tmp_path, tmp_path / "*.txt"):
        corpus = open_source(str(source), cache_dir=tmp_path / ".cache")
        assert texts_of(corpus) == TEXTS
        assert next(corpus.documents("all")).name == "00.txt"


def test_splits_that_a_source_brings_are_kept(tmp_path):
    folder = tmp_path / "wiki"
    folder.mkdir()
    (folder / "wiki.train.tokens").write_text("\n".join(TEXTS[:40]))
    (folder / "wiki.valid.tokens").write_text(TEXTS[40])
    corpus = open_source(str(folder), cache_dir=tmp_path / "cache")
    assert "".join(texts_of(corpus, "validation")) == TEXTS[40]
    rest = "".join(texts_of(corpus, "train") + texts_of(corpus, "test"))
    assert texts_of(corpus, "test")  # the missing one is cut from the training split
    assert sorted(rest) == sorted("\n".join(TEXTS[:40]))
    both = datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"text": TEXTS[:30]}), test=datasets.Dataset.from_dict({"text": TEXTS[30:]})
    )
    both.save_to_disk(tmp_path / "saved")
    corpus = open_source(str(tmp_path / "saved"), cache_dir=tmp_path / "cache")
    assert texts_of(corpus, "test") == TEXTS[30:]
    assert sorted(texts_of(corpus, "train") + texts_of(corpus, "validation")) == sorted(TEXTS[:30])


def test_a_held_out_file_alone_is_a_text_like_any_other(tmp_path):
    corpus = open_source(str(write_jsonl(tmp_path / "test.jsonl")), cache_dir=tmp_path / "cache")
    assert all(texts_of(corpus, split) for split in SPLITS)


def test_equal_texts_never_stand_in_two_splits(tmp_path):
    corpus = open_source(str(write_jsonl(tmp_path / "a.jsonl", TEXTS * 3)), cache_dir=tmp_path / "cache")
    splits = [set(texts_of(corpus, split)) for split in SPLITS]
    assert sum(map(len, splits)) == len(set(TEXTS))


def test_a_hub_name_goes_through_datasets(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, config, cache_dir):
        asked.append((name, config, cache_dir))
        return datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": TEXTS}))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = open_source("somebody/words:small", cache_dir=tmp_path)
    assert sorted(texts_of(corpus)) == sorted(TEXTS)
    assert all(texts_of(corpus, split) for split in SPLITS)
    assert asked == [("somebody/words", "small", str(tmp_path / "datasets"))]

    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match="no data set that the hub could give: no route"):
        open_source("somebody/words", cache_dir=tmp_path)


@pytest.mark.parametrize("length", [10, 50, 100_000])
def test_cutting_loses_nothing_and_keeps_its_bounds(length):
    lines = [*"".join(f"{text}\n" for text in TEXTS).splitlines(keepends=True), "x" * 1000 + "\n", "end"]
    pieces = list(cut_text(lines, length))
    assert "".join(pieces) == "".join(lines)
    assert max(map(len, pieces)) <= 4 * length


def test_text_is_cut_behind_blank_lines():
    lines = ["one\n", "two\n", "\n", "three\n", " \n", "four\n"]
    assert list(cut_text(lines, 4)) == ["one\ntwo\n\n", "three\n \n", "four\n"]


def test_wikitext_articles_are_documents():
    lines = [" \n", " = One = \n", " \n", " text a = b \n", " = = Part = = \n", " \n", " = Two = \n", " more\n"]
    assert list(cut_text(lines, 1)) == ["".join(lines[:1]), "".join(lines[1:6]), "".join(lines[6:])]


def refused(source, words, **options):
    with pytest.raises(UserError, match=words) as caught:
        list(open_source(str(source), **options).documents("train"))
    assert "\n" not in str(caught.value)


def test_wrong_sources_are_refused_with_one_sentence(tmp_path, monkeypatch):
    cache = {"cache_dir": tmp_path / "cache"}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("x")
    refused("corpsu.txt", r"no such file or folder \(did you mean 'corpus.txt'\?\)", **cache)
    refused("pyhton", r"did you mean 'python'\?", **cache)
    refused("nowhere/at/all.txt", "its folder 'nowhere/at' does not exist", **cache)
    refused("*.nothing", "the pattern matches no file", **cache)
    (tmp_path / "empty.txt").write_text("")
    refused("empty.txt", "is empty", **cache)
    write_jsonl(tmp_path / "blank.jsonl", ["", ""])
    refused("blank.jsonl", "holds no text", **cache)
    (tmp_path / "nul.txt").write_bytes(b"abc\0def")
    refused("nul.txt", "binary, not text: byte 3 is NUL", **cache)
    (tmp_path / "latin.txt").write_bytes(b"x" * (1 << 20) + "é".encode("latin-1") + b"abc")
    refused("latin.txt", "not UTF-8 text: byte 1048576 cannot be decoded", **cache)
    (tmp_path / "cut.txt").write_bytes("aé".encode()[:2])
    refused("cut.txt", "byte 1 cannot be decoded", **cache)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    refused("bad.jsonl", "cannot be read as json", **cache)
    (tmp_path / "bad.parquet").write_text("no parquet")
    refused("bad.parquet", "cannot be read as parquet", **cache)
    (tmp_path / "none").mkdir()
    refused("none", "no file below this folder ends in", **cache)
    write_jsonl(tmp_path / "none" / "a.jsonl")
    (tmp_path / "none" / "b.csv").write_text("text\nx\n")
    refused("none", "mixes csv, json files", **cache)
    refused("corpus.txt", "has no column 'body'", column="body", **cache)


def test_columns_are_chosen_or_named_in_the_error(tmp_path):
    cache = {"cache_dir": tmp_path / "cache"}
    one = write_jsonl(tmp_path / "one.jsonl", field="body")
    assert texts_of(open_source(str(one), **cache)) == TEXTS  # the only column of text
    refused(one, r"no column 'txt'; its columns are id \(number\), body \(string\)", column="txt", **cache)
    refused(one, "column 'id' holds no text", column="id", **cache)
    two = tmp_path / "two.jsonl"
    two.write_text("".join(json.dumps({"title": "t", "body": text}) + "\n" for text in TEXTS))
    refused(two, r"which column is the text\? Name it with column; its columns are title \(string\), body", **cache)
    assert texts_of(open_source(str(two), column="body", **cache)) == TEXTS
