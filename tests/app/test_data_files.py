"""Files of text as people and programs leave them: nothing left out in silence, nothing read that is no text."""

import bz2
import gzip
import json
import lzma
import os

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from app.data.cache import track
from app.data.corpus import synthetic
from app.data.sources import open_source
from models.errors import UserError

TEXTS = [document.text for document in synthetic(documents=20, words=10).texts]


def read(source, **options):
    return [document.text for document in open_source(str(source), **options).documents("all")]


@pytest.fixture
def cache(tmp_path):
    return {"cache_dir": tmp_path / ".cache"}


def refused(source, words, **options):
    with pytest.raises(UserError, match=words) as caught:
        read(source, **options)
    assert "\n" not in str(caught.value)


def jsonl(texts, field="text"):
    return "".join(json.dumps({field: text}) + "\n" for text in texts)


def test_no_cell_of_csv_is_a_missing_value_and_empty_ones_are_counted(tmp_path, cache):
    words = ["null", "NA", "None", "nan", "", "hello world", "good bye", "and so on", "007", "1.50", "True"]
    rows = [f"{number},{word}\n" for number, word in enumerate(words)]
    (tmp_path / "a.csv").write_text("id,text\n" + "".join(rows))
    corpus = open_source(str(tmp_path / "a.csv"), **cache)
    assert [document.text for document in corpus.documents("all")] == [word for word in words if word]
    assert corpus.left_out == [f"source '{tmp_path / 'a.csv'}': 1 of 11 documents are empty and left out"]
    (tmp_path / "n.csv").write_text("id,text\n1,007\n2,1.50\n3,12\n")  # a named column of numbers is text too
    assert read(tmp_path / "n.csv", **cache) == ["007", "1.50", "12"]
    (tmp_path / "a.jsonl").write_text(jsonl(["a", "", "b"]) + '{"text": null}\n{"id": 1}\n')
    corpus = open_source(str(tmp_path / "a.jsonl"), **cache)
    assert len(list(corpus.documents("all"))) == 2
    assert "3 of 5 documents are empty" in corpus.left_out[0]


def test_json_strings_are_taken_as_they_stand(tmp_path, cache):
    texts = ["2024-05-01", "2024-05-02T10:00:00", "12", "a\u2028b", "x\r\ny"]  # no dates, no numbers, no line ends
    (tmp_path / "a.jsonl").write_text(jsonl(texts))
    assert read(tmp_path / "a.jsonl", **cache) == texts
    (tmp_path / "b.json").write_text("\n" + json.dumps([{"text": text} for text in texts], indent=1))
    assert read(tmp_path / "b.json", **cache) == texts
    (tmp_path / "c.json").write_text(json.dumps(texts))
    assert read(tmp_path / "c.json", **cache) == texts


def test_a_quote_in_tsv_is_text_and_takes_no_lines_with_it(tmp_path, cache):
    words = ['"to be', "or not", 'he said "no"', '"one" and "two"', 'end"']
    (tmp_path / "a.tsv").write_text("id\ttext\n" + "".join(f"{n}\t{word}\n" for n, word in enumerate(words)))
    assert read(tmp_path / "a.tsv", **cache) == words
    (tmp_path / "b.tsv").write_text('id\ttext\n1\t"a ""b"" c"\n2\t"d"\n')  # as spreadsheets write it
    assert read(tmp_path / "b.tsv", **cache) == ['a "b" c', "d"]
    (tmp_path / "c.tsv").write_text('id\ttext\n1\t"a\tb\nc"\n2\td\n')
    assert read(tmp_path / "c.tsv", **cache) == ["a\tb\nc", "d"]


@pytest.mark.parametrize(("sign", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_a_csv_of_other_separators_is_refused(sign, name, tmp_path, cache):
    """It would be read as one column."""
    file = tmp_path / "rows.csv"
    file.write_text(f"id{sign}text\n1{sign}hello\n")
    with pytest.raises(UserError, match=f"no comma but {name}, .* write it with commas"):
        _ = open_source(str(file), **cache).sha256
    file.write_text("text\nhello; world\tagain\n")
    assert [document.text for document in open_source(str(file), **cache).documents("all")] == ["hello; world\tagain"]


def test_a_key_twice_in_a_line_of_json_is_refused(tmp_path, cache):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "one"}\n{"text": "two", "text": "three"}\n')
    with pytest.raises(UserError, match="line 2: the key 'text' stands there twice"):
        _ = open_source(str(file), **cache).sha256


def test_rows_of_csv_that_do_not_fit_are_refused(tmp_path, cache):
    (tmp_path / "a.csv").write_text('id,text\n1,"two\nlines, one text"\n2,say "x"\n')
    assert read(tmp_path / "a.csv", **cache) == ["two\nlines, one text", 'say "x"']
    (tmp_path / "open.csv").write_text('id,text\n1,"never closed\n2,b\n3,c\n')
    refused(tmp_path / "open.csv", "cannot be read as csv: line 4: unexpected end of data", **cache)
    (tmp_path / "lone.csv").write_text('id,text\n1,"never\n2,say "x"\n3,c\n')
    refused(tmp_path / "lone.csv", "cannot be read as csv: line 3", **cache)
    (tmp_path / "more.csv").write_text("id,text\n1,a, b\n")
    refused(tmp_path / "more.csv", "row 2: 3 fields, but the first row names 2 columns", **cache)
    (tmp_path / "twice.csv").write_text("text,text\na,b\n")
    refused(tmp_path / "twice.csv", "names a column twice", **cache)
    (tmp_path / "long.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert read(tmp_path / "long.csv", **cache) == ["x" * 200_000]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_every_arrow_type_of_text_is_text(kind, tmp_path, cache):
    table = pa.table({"id": list(range(20)), "body": pa.array(TEXTS).cast(kind)})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", **cache) == TEXTS
    if not pa.types.is_dictionary(kind):  # `datasets` has no such type
        datasets.Dataset(table).save_to_disk(tmp_path / "saved")
        assert read(tmp_path / "saved", **cache) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.csv", "a.tsv"])
def test_a_byte_order_mark_is_no_text(name, tmp_path, cache):
    content = {"jsonl": jsonl(TEXTS), "csv": "text\n", "tsv": "text\n"}.get(name.rpartition(".")[2], "")
    content = ("\ufeff" + (content if "jsonl" in name else content + "".join(TEXTS))).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    found = read(tmp_path / name, **cache)
    assert found
    assert not any("\ufeff" in text for text in found)
    for number, text in enumerate(TEXTS * 2):
        (tmp_path / f"{number}.md").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert sorted(read(tmp_path / "*.md", **cache)) == sorted(TEXTS * 2)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.csv", "a.tsv"])
def test_blank_files_hold_no_text(name, tmp_path, cache):
    (tmp_path / name).write_text("\n\n \n\n" if name != "a.txt" else "\n")
    if name == "a.txt":
        assert read(tmp_path / name, **cache) == ["\n"]  # a line end is a text
    else:
        refused(tmp_path / name, "holds no text|which column is the text", **cache)


def test_a_folder_is_read_whole_or_refused_or_says_what_is_not_read(tmp_path, cache):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:02d}.txt").write_text(text)
    (folder / "meta.json").write_text('{"text": "one"}\n')
    refused(folder, "mixes json, text files", **cache)
    (folder / "meta.json").rename(folder / "meta.yaml")
    (folder / "page.html").write_text("<p>")
    (folder / "index.html").write_text("<p>")
    (tmp_path / "elsewhere").mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    assert open_source(str(folder), **cache).left_out == [
        f"source '{folder}': not read: 2 *.html, 1 *.yaml, 1 linked folder"
    ]
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "a.jsonl").write_text(jsonl(TEXTS))
    (rows / "README.md").write_text("what this is")
    corpus = open_source(str(rows), **cache)
    assert len(list(corpus.documents("all"))) == len(TEXTS)
    assert corpus.left_out == [f"source '{rows}': not read: 1 README.md"]
    (rows / "more.md").write_text("a text")
    refused(rows, "mixes json, text files", **cache)
    (rows / "more.md").unlink()
    (rows / "b.jsonl").write_text(jsonl(["other"], field="body"))
    refused(rows, "b.jsonl' has no column 'text'", **cache)
    (rows / "b.jsonl").unlink()
    (rows / "below").mkdir()
    assert open_source(str(rows / "[!R]*"), **cache).left_out == [f"source '{rows / '[!R]*'}': not read: 1 folder"]


def test_what_is_no_file_is_refused(tmp_path, cache):
    (tmp_path / "a.txt").write_text("a text")
    os.mkfifo(tmp_path / "pipe.txt")
    for source in (tmp_path / "pipe.txt", tmp_path, tmp_path / "*.txt", "/dev/zero"):
        refused(source, "is a pipe or a device", **cache)
    (tmp_path / "pipe.txt").unlink()
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    refused(tmp_path, "is a broken link", **cache)
    refused("x" * 5000, "cannot be read: File name too long", **cache)
    refused("~nobody-of-this-name/a.txt", "home directory", **cache)


def test_files_and_folders_that_may_not_be_read(tmp_path, cache, monkeypatch):
    (tmp_path / "a.txt").write_text("a text")

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", denied)
        refused(tmp_path / "a.txt", "cannot be read: Permission denied", **cache)
    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", denied)
        refused(tmp_path, "cannot be read: Permission denied", **cache)


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst"])
def test_packed_files_are_checked_like_others(ending, tmp_path, cache):
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}[ending]
    (tmp_path / f"a.jsonl.{ending}").write_bytes(pack(jsonl(TEXTS).encode()))
    assert read(tmp_path / f"a.jsonl.{ending}", **cache) == TEXTS
    (tmp_path / f"nul.txt.{ending}").write_bytes(pack(b"abc\0"))
    refused(tmp_path / f"nul.txt.{ending}", "binary, not text: byte 3 is NUL", **cache)
    (tmp_path / f"cut.txt.{ending}").write_bytes(pack("".join(TEXTS).encode())[:40])
    refused(tmp_path / f"cut.txt.{ending}", "cannot be", **cache)
    (tmp_path / f"plain.txt.{ending}").write_bytes(b"not packed at all")
    refused(tmp_path / f"plain.txt.{ending}", "cannot be", **cache)


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.csv.gz"])
def test_small_files_that_unpack_to_far_more_are_refused(name, tmp_path, cache):
    with gzip.open(tmp_path / name, "wb", compresslevel=1) as stream:
        for _ in range(70):
            stream.write(b'"' + b"x" * (1 << 20))
    refused(tmp_path / name, "unpacks to more than 64 times its", **cache)


@pytest.mark.parametrize("text", ["[" * 20_000, '{"text": ' * 20_000, "1" * 5000, '{"text": "a"} {"text": "b"}', "3"])
def test_hostile_json_is_refused(text, tmp_path, cache):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + text + "\n")
    refused(tmp_path / "a.jsonl", "a.jsonl'.*line 2", **cache)
    (tmp_path / "b.json").write_text(text)
    refused(tmp_path / "b.json", "b.json'", **cache)


def test_json_that_holds_no_text_is_refused(tmp_path, cache):
    (tmp_path / "a.jsonl").write_text(jsonl(["a"]) + '{"text": ["b"]}\n')
    refused(tmp_path / "a.jsonl", r"line 2: 'text' must be text, not list", **cache)
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": "\\ud800"}\n')
    refused(tmp_path / "b.jsonl", "document b.jsonl:1 holds half of a surrogate pair", **cache)


def test_a_datasets_folder_reads_nothing_outside_itself(tmp_path, cache):
    def saved(name):
        datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": TEXTS})).save_to_disk(tmp_path / name)
        return tmp_path / name

    def change(file, **values):
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    secret = saved("secret") / "train" / "data-00000-of-00001.arrow"
    one = saved("one")
    for outside in ("../../secret/train/" + secret.name, str(secret)):
        change(one / "train" / "state.json", _data_files=[{"filename": outside}])
        refused(one, "lies outside the folder", **cache)
    two = saved("two")
    change(two / "dataset_dict.json", splits=["../secret/train"])
    refused(two, "lies outside the folder", **cache)
    three = saved("three") / "train"
    (three / secret.name).unlink()
    (three / secret.name).symlink_to(secret)
    refused(three, "lies outside the folder", **cache)
    for number, damage in enumerate(("[" * 20_000, "[]", '{"_data_files": 3}', '{"_data_files": [3]}')):
        four = saved(f"four{number}") / "train"
        (four / "state.json").write_text(damage)
        refused(four, "state.json", **cache)


def test_brackets_in_a_name_are_shown_as_they_are():
    assert list(track(["text"], "Reading notes[/b].txt", 5_000_000, len)) == ["text"]
