"""A tiny BERT of `transformers` through the command line: fine-tuned, measured, compressed, and back in its files."""

import json
import random
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertTokenizer,
    ModernBertForMaskedLM,
)

from app.data.tokenizer import load_tokenizer
from app.evaluation.report.overview import read_report
from app.loading import load_model
from app.tasks import Classify
from app.tasks.start import copy_weights, load_start, starting_architecture
from models.checkpoint import read_task
from models.config import ModelConfig
from models.families import export_folder
from models.transformer import Transformer
from recipes import cli

WORDS = ("good", "great", "bad", "awful", "the", "film", "plot", "cast", "was", "with", "and", "a", "very", "##ly")
QUICK = ["--device", "cpu", "--speed_rounds", "0"]
POOLER = '{"kind": "classifier", "pool": "first", "transform": {"activation": "tanh"}}'


def bert(folder, kind=BertForMaskedLM, **options):
    """A folder of a model with random weights and its WordPiece tokenizer."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *map(chr, range(97, 123))]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(dict.fromkeys(words))})
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    config = kind.config_class(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes, **options)
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the model, and with pairs whose class is whether both are of one mind."""
    folder = tmp_path_factory.mktemp("bert")
    bert(folder / "hf")
    draw = random.Random(0)
    for name, count in (("train", 240), ("dev", 40)):
        rows = []
        for _ in range(count):
            minds = [draw.random() < 0.5 for _ in range(2)]
            a, b = (
                f"the {draw.choice(('film', 'plot'))} was {draw.choice(WORDS[:2] if mind else WORDS[2:4])}"
                for mind in minds
            )
            rows.append(f"{a}\t{b}\t{'yes' if minds[0] == minds[1] else 'no'}\n")
        (folder / f"{name}.tsv").write_text("sentence1\tsentence2\tlabel\n" + "".join(rows))
    (folder / "text.txt").write_text("\n\n".join(" ".join(draw.choices(WORDS[:-1], k=12)) for _ in range(400)))
    return folder


@pytest.fixture(scope="module")
def tuned(place):
    out = place / "tuned"
    how = ["--data.text", "sentence1,sentence2", "--data.sequence_length", 32, "--trainer.max_steps", 20]
    how += [
        "--trainer.val_check_interval",
        10,
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.accelerator",
        "cpu",
    ]
    how += ["--model.schedule.warmup_steps", 2, "--model.architecture.head", POOLER]
    data = ["--data", place / "train.tsv", "--data.validation", place / "dev.tsv"]
    argv = ["fit", "-c", "recipes/classify/finetune.yaml", "--model.from", place / "hf", *data, "--out", out, *how]
    assert cli.main([str(one) for one in argv]) == 0
    return out


def test_the_start_is_that_of_the_folder(tuned, place):
    model, start = load_model(tuned).model, load_model(place / "hf").model
    assert model.config.input == start.config.input
    assert model.config.input.segments.separator == 3
    assert model.config.head.transform.activation == "tanh"
    tokenizer = load_model(tuned).tokenizer
    assert (tokenizer.begin, tokenizer.eot, tokenizer.mask) == (2, 3, 4)
    assert sorted(tokenizer.special_ids) == [0, 1, 2, 3, 4]
    for name, tensor in start.state_dict().items():
        if not name.startswith("head"):
            assert (model.state_dict()[name] - tensor).abs().max() < 0.05, name
    assert (model.head_transform.dense.weight - start.head_transform.dense.weight).abs().max() > 0.05  # drawn anew


def probabilities(folder, rows):
    """Of each class, as transformers computes them of pairs that its own tokenizer has encoded."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    batch = tokenizer([row[0] for row in rows], [row[1] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits.softmax(-1), model.config


@pytest.mark.parametrize(
    "stage",
    [
        None,
        ("quantize", "--method", "gptq", "--bits", 4, "--samples", 16),
        ("prune", "--method", "wanda", "--sparsity", 0.5, "--samples", 16),
        ("prune", "--method", "structured", "--targets", "neurons", "--ratio", 0.5, "--samples", 8),
    ],
    ids=lambda stage: "as trained" if stage is None else " ".join(map(str, stage[:3])),
)
def test_a_classifier_goes_through_the_stages_and_back_to_transformers(stage, tuned, place, espalier, tmp_path):
    folder = tuned
    if stage is not None:
        verb, *how = stage
        folder = tmp_path / "out"
        data = ("--data", place / "train.tsv", "--evaluation_data", place / "dev.tsv")
        status, output = espalier(verb, tuned, "--out", folder, *how, *data, *QUICK)
        assert status == 0, output.err
        report = read_report(folder)
        assert "accuracy" in report["after"]["quality"]
        notes = {layer["name"]: layer["note"] for layer in report["layers"]}
        for name in ("head_transform.dense", "segments", "positions.0.table"):
            assert "left" in notes[name], notes
        assert notes["head_transform.dense"].startswith("a linear layer outside of the blocks")
    status, output = espalier("export", folder, "--out", tmp_path / "hf")
    assert status == 0, output.err
    rows = [line.split("\t")[:2] for line in (place / "dev.tsv").read_text().splitlines()[1:]]
    found, config = probabilities(tmp_path / "hf", rows)
    assert config.id2label == {0: "no", 1: "yes"}
    loaded = load_model(folder)
    corpus = loaded.task.corpus(str(place / "dev.tsv"))
    batch = next(loaded.task.blocks(corpus, loaded.tokenizer, "all", 32, None, 0).batches(40))
    ours = loaded.task.predictions(loaded.model, batch).exp()
    assert (ours - found).abs().max() < 1e-5
    again = load_model(tmp_path / "hf")  # our files, theirs, and ours again
    assert again.task.labels == ("no", "yes")
    assert (again.task.predictions(again.model, batch).exp() - ours).abs().max() < 1e-6


def test_evaluate_measures_hidden_tokens_of_the_folder_itself(place, espalier, tmp_path):
    measured = ("--data", place / "text.txt", "--sequence_length", 32, "--evaluation_blocks", 8, *QUICK)
    status, output = espalier("evaluate", place / "hf", *measured, "--out", tmp_path / "e.json")
    assert status == 0, output.err
    (block,) = json.loads((tmp_path / "e.json").read_text())["models"].values()
    assert 3 < block["quality"]["loss"] < 5  # log of 45 words
    assert block["quality"]["accuracy"] < 0.5
    status, output = espalier("import", place / "hf", "--out", tmp_path / "ours")
    assert status == 0, output.err
    assert read_task(tmp_path / "ours")["kind"] == "masked_lm"
    assert (tmp_path / "ours" / "tokenizer.json").read_bytes() == (place / "hf" / "tokenizer.json").read_bytes()
    how = ("--method", "rtn", "--bits", 8, *measured)
    status, output = espalier("quantize", tmp_path / "ours", "--out", tmp_path / "q", *how)
    assert status == 0, output.err
    assert espalier("export", tmp_path / "q", "--out", tmp_path / "out")[0] == 0
    theirs, tokens = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval(), torch.randint(5, 40, (2, 9))
    with torch.no_grad():
        assert (theirs(tokens).logits - load_model(tmp_path / "q").model(tokens).logits).abs().max() < 1e-5


@pytest.mark.parametrize(
    "method", [("quantize", "--method", "awq", "--bits", 4), ("prune", "--method", "wanda", "--sparsity", 0.5)]
)
def test_a_modernbert_is_compressed_and_exported(method, place, espalier, tmp_path):
    roles = {
        f"{role}_token_id": number for role, number in (("pad", 0), ("bos", 2), ("eos", 3), ("cls", 2), ("sep", 3))
    }
    bert(tmp_path / "hf", ModernBertForMaskedLM, local_attention=8, **roles)
    measured = ("--data", place / "text.txt", "--sequence_length", 32, "--evaluation_blocks", 8, *QUICK)
    verb, *how = method
    status, output = espalier(verb, tmp_path / "hf", "--out", tmp_path / "out", *how, "--samples", 8, *measured)
    assert status == 0, output.err
    status, output = espalier("export", tmp_path / "out", "--out", tmp_path / "again")
    assert status == 0, output.err
    theirs, tokens = AutoModelForMaskedLM.from_pretrained(tmp_path / "again").eval(), torch.randint(5, 40, (2, 19))
    assert type(theirs) is ModernBertForMaskedLM
    assert (theirs.config.sep_token_id, theirs.config.cls_token_id) == (3, 2)
    with torch.no_grad():
        assert (theirs(tokens).logits - load_model(tmp_path / "out").model(tokens).logits).abs().max() < 1e-5


def test_a_modernbert_is_fine_tuned_with_the_transform_that_it_has(tmp_path):
    start = load_start(bert(tmp_path / "hf", ModernBertForMaskedLM, local_attention=8, pad_token_id=0))
    head = {
        "kind": "classifier",
        "pool": "first",
        "transform": {"bias": False, "norm": {"kind": "layer", "bias": False}},
    }
    values = starting_architecture({"head": head}, start, Classify(labels=("no", "yes")))
    model = Transformer(ModelConfig.from_dict(values))
    copy_weights(model, start.model, "hf")
    assert torch.equal(model.head_transform.dense.weight, start.model.head_transform.dense.weight)
    export_folder(model.eval(), tmp_path / "out", tmp_path / "hf")
    theirs, tokens = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval(),
        torch.tensor([[2, 9, 3]]),
    )
    with torch.no_grad():
        assert (theirs(tokens).logits - model(tokens).logits[:, 0]).abs().max() < 1e-5


def test_a_classifier_of_theirs_is_imported_with_its_columns(place, espalier, refused, tmp_path):
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    bert(tmp_path / "hf", BertForSequenceClassification, **names)
    measured = ("--evaluation_data", place / "dev.tsv", *QUICK)
    refused("evaluate", tmp_path / "hf", *measured, words=["does not know the columns", "--task"])
    columns = "{kind: classify, text: 'sentence1,sentence2', label: label}"
    status, output = espalier("import", tmp_path / "hf", "--out", tmp_path / "ours", "--task", columns)
    assert status == 0, output.err
    assert read_task(tmp_path / "ours")["labels"] == ["no", "yes"]
    status, output = espalier("evaluate", tmp_path / "ours", *measured, "--out", tmp_path / "e.json")
    assert status == 0, output.err
    refused("import", tmp_path / "hf", "--out", tmp_path / "o", "--task", "masked_lm", words=["classifier"])


def test_a_classifier_named_by_a_word_is_that_of_the_start(tmp_path):
    start = load_start(bert(tmp_path / "hf", BertForSequenceClassification))
    for labels, kept in ((("no", "yes"), True), (("no", "so", "yes"), False)):
        values = starting_architecture({"head": "classifier", "dropout": 0.2}, start, Classify(labels=labels))
        model = Transformer(ModelConfig.from_dict(values))
        assert (model.config.head.pool, model.config.head.transform.activation) == ("first", "tanh")
        copy_weights(model, start.model, "hf")
        assert torch.equal(model.head_transform.dense.weight, start.model.head_transform.dense.weight)
        assert (model.head.weight.shape == start.model.head.weight.shape) == kept
    other = starting_architecture({"head": {"kind": "classifier", "pool": "mean"}}, start, Classify(labels=labels))
    assert "transform" not in other["head"]


def test_the_tokenizer_without_its_template_is_read_by_its_names(tmp_path):
    folder = bert(tmp_path / "hf")
    values = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(values | {"post_processor": None}))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.begin, tokenizer.eot, tokenizer.mask) == (2, 3, 4)
    names = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"sep_token": "[PAD]", "cls_token": "[UNK]"}))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.begin, tokenizer.eot) == (1, 0)
    assert load_model(folder).model.config.input.segments.separator == 0


def test_words_of_wordpiece_go_on_where_a_token_says_so(place):
    tokenizer = load_tokenizer(place / "hf")
    opens, closes = tokenizer.word_edges
    ids = tokenizer.encode("the film badly")
    assert [tokenizer.tokenizer.id_to_token(id) for id in ids] == ["the", "film", "bad", "##ly"]
    assert opens[ids].tolist() == [False, False, False, True]
    assert closes[ids].all()


def test_what_an_import_leaves_out_is_said_in_one_line(tmp_path):
    folder = bert(tmp_path / "hf", BertForPreTraining)
    argv = [sys.executable, "-m", "recipes.cli", "import", str(folder), "--out", str(tmp_path / "out")]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    first, *rest = done.stderr.splitlines()
    assert first == (
        f"espalier: {folder}: this model does not use bert.pooler.dense, cls.seq_relationship, which is left out"
    )
    assert len(rest) == 1
