"""Classification below the command line: rows of tables, token sequences with a class, metrics and baseline."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_f1_score,
    multiclass_matthews_corrcoef,
)

from app.data.columns import RowColumns, read_document
from app.data.labelled import LabelledBlocks, _row, encode_row, read_classes
from app.data.labelled_module import LabelledData, read_columns
from app.data.packing import PADDING
from app.data.sources import open_source
from app.data.tokenizer import train_tokenizer
from app.evaluation.assemble import change_of_quality
from app.evaluation.metrics import MacroF1, MatthewsCorrelation
from app.evaluation.quality import evaluate_qualities
from app.tasks import CausalLM, Classify
from models.config import ModelConfig
from models.errors import UserError
from models.projection import IGNORED
from models.transformer import Transformer

ROWS = [("a fine day", "so it was", "yes"), ("rain again", "", "no"), ("the sun, at last", "warm and dry", "yes")] * 4
NAMED = RowColumns(("first", "second"), "class")
NUMBERED = RowColumns(("2", "3"), "1")


def written(folder, kind):
    """The rows as a file of this kind, and the columns that name them."""
    path, header = folder / f"rows.{kind.rpartition('-')[2]}", ["class", "first", "second"]
    rows = [[label, first, second] for first, second, label in ROWS]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(dict(zip(header, row, strict=True))) + "\n" for row in rows))
    elif kind == "parquet":
        columns = dict(zip(header, zip(*rows, strict=True), strict=True))
        pyarrow.parquet.write_table(pyarrow.table({name: list(cells) for name, cells in columns.items()}), path)
    else:
        lines = rows if kind.startswith("headerless") else [header, *rows]
        cells = [[f'"{cell}"' if kind.endswith("csv") else cell for cell in line] for line in lines]
        path.write_text("".join(("\t" if kind.endswith("tsv") else ",").join(line) + "\n" for line in cells))
    return path, NUMBERED if kind.startswith("headerless") else NAMED


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(row) for row in ROWS], 280)


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet", "headerless-tsv", "headerless-csv"])
def test_every_kind_of_table_gives_the_same_rows(kind, tmp_path):
    path, columns = written(tmp_path, kind)
    found = [read_document(document.text) for document in open_source(str(path), columns).documents("all")]
    assert found == [([first, second], label) for first, second, label in ROWS]


@pytest.mark.parametrize(("value", "text"), [(1, "1"), (True, "true"), ("  a ", "a"), (-1.5, "-1.5")])
def test_a_label_may_be_a_number(value, text, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i}", "label": value}) + "\n" for i in range(3)))
    corpus = open_source(str(path), RowColumns(("text",), "label"))
    assert {read_document(document.text)[1] for document in corpus.documents("all")} == {text}


@pytest.mark.parametrize(
    ("content", "columns", "words"),
    [
        ("text\tlabel\na\t1\nb\t2\n", (("sentence",), "label"), "no column 'sentence'; its columns are text, label"),
        ("text\tlabel\na\t1\nb\t\n", (("text",), "label"), "row 3: the label ('label') is empty"),
        ("a\t1\nb\t2\n", (("0",), "2"), "counted from 1"),
        ("a\t1\nb\t2\n", (("1",), "3"), "no column '3'"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(content, columns, words, tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text(content)
    with pytest.raises(UserError) as refused:
        list(open_source(str(path), RowColumns(*columns)).documents("all"))
    assert words in str(refused.value)


@pytest.mark.parametrize("source", ["python", "synthetic", "plain.txt"])
def test_plain_text_has_no_rows(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.txt").write_text("some text\n" * 20)
    with pytest.raises(UserError, match="plain text and has no column 'label'"):
        list(open_source(source, RowColumns(("text",), "label")).documents("all"))


@pytest.mark.parametrize(
    ("labels", "columns", "expected"),
    [
        (["10", "9", "9", "10"], "text", ("9", "10")),
        (["b", "a", "10", "b", "a", "10"], "text", ("10", "a", "b")),
        (["1", "1", "1"], "text", "holds 1 label ('1')"),
        ([str(i / 7) for i in range(9)], "text", "a number cannot be predicted as a class"),
        (["label", "1", "0", "1", "0"], "1", "stands in the first row alone"),
    ],
)
def test_classes_of_a_column(labels, columns, expected, tmp_path):
    path, named = tmp_path / "rows.tsv", columns == "text"
    header = "text\tlabel\n" if named else ""
    path.write_text(header + "".join(f"row {i}\t{label}\n" for i, label in enumerate(labels)))
    corpus = open_source(str(path), RowColumns(("text",), "label") if named else RowColumns(("1",), "2"))
    if isinstance(expected, tuple):
        assert read_classes(corpus, "all", not named) == expected
        return
    with pytest.raises(UserError) as refused:
        read_classes(corpus, "all", not named)
    assert expected in str(refused.value)


def blocks(folder, tokenizer, length=32, classes=("no", "yes")):
    path, columns = written(folder, "tsv")
    return LabelledBlocks(open_source(str(path), columns), tokenizer, "all", classes, length)


def test_a_pair_is_one_sequence_with_its_class_at_the_end(tmp_path, tokenizer):
    rows = blocks(tmp_path, tokenizer)
    batch = rows.batch([0, 1, PADDING])
    for row, (first, second, label) in enumerate(ROWS[:2]):
        end = tokenizer.eot
        wanted = [tokenizer.begin, *tokenizer.encode(first), end, *tokenizer.encode(second), end]
        size = len(wanted)
        assert batch["tokens"][row, :size].tolist() == wanted == encode_row([first, second], tokenizer, 32)
        assert batch["targets"][row, size - 1] == ["no", "yes"].index(label)
        assert (batch["targets"][row] != IGNORED).sum() == 1
        assert (batch["documents"][row] >= 0).sum() == size
        assert set(batch["documents"][row, :size].tolist()) == {row}
    assert (batch["targets"][2] == IGNORED).all()
    assert (batch["documents"][2] == PADDING).all()
    assert batch["ids"].tolist() == [[0, 0], [1, 1], [PADDING, PADDING]]
    assert batch["tokens"].shape[1] % 8 == 0
    assert rows.batch([1])["tokens"].shape[1] < rows[1]["tokens"].shape[0] == rows.sequence_length
    again = rows.batch([len(rows)])
    assert torch.equal(again["tokens"], rows.batch([0])["tokens"])
    assert [len(rows.first(2)), len(rows)] == [2, len(ROWS)]
    assert torch.equal(rows.choose([2])[0]["tokens"], rows[2]["tokens"])


def test_a_long_pair_loses_tokens_of_its_longest_text(tokenizer):
    long, short = [5] * 30, [6] * 4
    assert _row([long, short], tokenizer, 16) == [tokenizer.begin, *[5] * 9, tokenizer.eot, *short, tokenizer.eot]
    assert _row([long, long], tokenizer, 16)[1:].count(5) == 13
    with pytest.raises(UserError, match="at least 5"):
        _row([long, short], tokenizer, 4)


def test_an_unknown_label_is_named_with_its_row(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"row 2: the label 'yes' is none of the classes that are trained: no"):
        blocks(tmp_path, tokenizer, classes=("no", "perhaps"))


def test_the_split_is_that_of_the_validation_source(tmp_path):
    path, _ = written(tmp_path, "tsv")
    other = tmp_path / "dev.tsv"
    other.write_text("class\tfirst\tsecond\nyes\ta\tb\nno\tc\td\n")
    data = LabelledData(str(path), str(other), "first,second", "class", batch_size=4, vocab_size=270)
    data.task = Classify()
    assert [len(data.blocks(split)) for split in ("train", "validation", "test")] == [len(ROWS), 2, 2]
    assert data.classes == ("no", "yes")
    alone = LabelledData(str(path), None, "first,second", "class", batch_size=4, vocab_size=270)
    assert len(list(alone.corpus.documents("train"))) < len(ROWS)
    assert alone.fingerprint != data.fingerprint


@pytest.mark.parametrize(("text", "label"), [("a,a", "b"), ("a,b", "a"), ("a,", "b")])
def test_a_column_comes_once(text, label):
    with pytest.raises(UserError, match="each column once"):
        read_columns(text, label)


def classifier(seed, classes=3):
    torch.manual_seed(seed)
    sublayers = {"attention": {"kind": "full", "heads": 2}, "feedforward": {"kind": "swiglu", "width": 24}}
    base = {"vocab_size": 280, "width": 16, "depth": 1, "direction": "bidirectional", "context": 32}
    model = Transformer(
        ModelConfig.from_dict({**base, **sublayers, "head": {"kind": "classifier", "classes": classes}})
    )
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


@pytest.fixture
def many(tmp_path, tokenizer):
    path = tmp_path / "many.tsv"
    draw = np.random.default_rng(0)
    lines = [
        f"{' '.join(draw.choice(list('abcdefgh'), draw.integers(2, 10)))}\t{draw.choice(['x', 'y', 'z'])}\n"
        for _ in range(120)
    ]
    path.write_text("".join(lines))
    return LabelledBlocks(open_source(str(path), NUMBER), tokenizer, "all", ("x", "y", "z"), 32)


NUMBER = RowColumns(("1",), "2")


def test_figures_are_those_of_torchmetrics_over_all_rows(many):
    task, models = Classify(labels=("x", "y", "z")), [classifier(0), classifier(1)]
    (before, after), divergence = evaluate_qualities(models, many, metrics=task.metrics, batch_size=7)
    batch = many.batch(range(len(many)))
    targets = batch["targets"][batch["targets"] != IGNORED]
    for model, quality in zip(models, (before, after), strict=True):
        with torch.no_grad():
            logits = model(batch["tokens"], documents=batch["documents"]).logits[batch["targets"] != IGNORED]
        figures, best = quality.figures(), logits.argmax(1)
        assert figures["tokens"] == len(many)
        for name, wanted in (
            ("accuracy", multiclass_accuracy(best, targets, 3, average="micro")),
            ("macro_f1", multiclass_f1_score(best, targets, 3, average="macro")),
            ("matthews_correlation", multiclass_matthews_corrcoef(best, targets, 3)),
            ("loss", torch.nn.functional.cross_entropy(logits, targets)),
        ):
            assert figures[name] == pytest.approx(float(wanted), abs=1e-5)
            low, high = figures["interval"][name]
            assert low < figures[name] < high
        assert "120 documents as clusters" in figures["interval"]["method"]
        assert "bootstrap" in figures["interval"]["method"]
    moved = change_of_quality(before, after, divergence)
    for name in ("accuracy", "macro_f1", "matthews_correlation"):
        assert moved[name] == pytest.approx(after.figures()[name] - before.figures()[name], abs=1e-6)
    same = change_of_quality(before, before, None)
    assert same["interval"]["macro_f1"] == [0, 0]
    task_sums = task.measured(models[0], batch)
    assert task_sums.count == len(many)
    assert MacroF1().figure(task_sums.units["confusion"]) == pytest.approx(before.figures()["macro_f1"])


def test_a_constant_prediction_has_no_correlation():
    always, mixed = torch.zeros(10, dtype=torch.int64), torch.arange(10) % 2
    log = torch.nn.functional.one_hot(always, 2).float()
    assert MatthewsCorrelation().figure(MatthewsCorrelation().units(log, mixed)) == 0
    log = torch.nn.functional.one_hot(mixed, 2).float()
    assert MatthewsCorrelation().figure(MatthewsCorrelation().units(log, mixed)) == pytest.approx(1)


def test_the_majority_class_is_that_of_the_training_rows(many):
    task = Classify(labels=("x", "y", "z"))
    found = task.baselines(classifier(0).config, many.first(60), many)["majority"]
    batch = many.first(60).batch(range(60))
    share = float((batch["targets"][batch["targets"] != IGNORED] == int(many.counts.argmax())).float().mean())
    assert found["accuracy"] == pytest.approx(share)
    assert found["matthews_correlation"] == 0
    assert found["source"] == "class frequencies of the training split"


def test_a_batch_as_long_as_its_rows_has_the_loss_of_a_padded_one(many):
    task, model = Classify(labels=("x", "y", "z")), classifier(0)
    sizes = [int((many[row]["documents"] >= 0).sum()) for row in range(len(many))]
    rows = sorted(range(len(many)), key=sizes.__getitem__)[:2]
    short = many.batch(rows)
    long = {name: torch.stack([many[row][name] for row in rows]) for name in short}
    assert short["tokens"].shape[1] < long["tokens"].shape[1]
    ours, theirs = task.losses(model, short), task.losses(model, long)
    torch.testing.assert_close(ours.total, theirs.total)
    assert ours.places == theirs.places == 2  # alike on ranks whose rows are not


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ({"head": {"kind": "classifier", "classes": 2, "pool": "first"}}, "its first token has seen no other"),
        ({"head": {"kind": "classifier", "classes": 5}}, "5 classes, and the task 2"),
        ({"head": "untied"}, "needs a classifier"),
    ],
)
def test_an_architecture_that_cannot_classify_is_refused(architecture, words):
    base = {"vocab_size": 40, "width": 16, "depth": 1, "attention": {"kind": "full", "heads": 2}}
    config = ModelConfig.from_dict({**base, "feedforward": {"kind": "swiglu", "width": 24}, **architecture})
    with pytest.raises(UserError) as refused:
        Classify(labels=("no", "yes")).check(config)
    assert words in str(refused.value)


def test_the_head_follows_direction_and_classes():
    task = Classify(labels=("a", "b", "c"))
    assert task.shaped({})["head"] == {"kind": "classifier", "pool": "last", "classes": 3}
    assert task.shaped({"direction": "bidirectional", "head": "tied"})["head"]["pool"] == "mean"
    given = {"kind": "classifier", "pool": "first", "classes": 2}
    assert task.shaped({"head": given})["head"] == {**given, "classes": 3}


def test_language_models_and_classes_do_not_mix():
    with pytest.raises(UserError, match="predicts a token of 280"):
        CausalLM().check(classifier(0).config)
    with pytest.raises(UserError, match="macro_f1 is a figure of classes"):
        CausalLM(metrics=(MacroF1(),))
