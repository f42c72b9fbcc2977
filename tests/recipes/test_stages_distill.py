"""`espalier distill`, from the command to the folder."""

import dataclasses
import json

import pytest

import models.checkpoint
from app.data.corpus import synthetic
from app.data.tokenizer import load_tokenizer, train_tokenizer
from models.config import ModelConfig
from models.transformer import Transformer
from recipes.commands.distill import lost_kinds
from tests.recipes.conftest import QUICK

SHORT = [*QUICK, "--max_steps", "12", "--train_batch_size", "4", "--warmup_steps", "2", "--checkpoint_every", "5"]


def test_student_of_half_the_layers(teacher, espalier, tmp_path):
    out = tmp_path / "student"
    status, output = espalier("distill", "--teacher", teacher, "--out", out, *SHORT, "--debug")
    assert status == 0, output.err
    student = models.checkpoint.load(out)
    assert len(student.blocks) == 2
    assert student.norm.weight.dtype == models.checkpoint.load(teacher).norm.weight.dtype
    report = json.loads((out / "report.json").read_text())
    assert report["before"]["name"] == "teacher"
    assert report["change"]["size"]["stored_bytes"]["ratio"] < 0.8
    assert any((out / "tensorboard").iterdir())
    assert not (tmp_path / "student.partial").exists()


def test_teacher_with_norms_after_the_sublayers(teacher, espalier, tmp_path):
    """Such a model has no norm before its head."""
    post, out = tmp_path / "post", tmp_path / "student"
    config = models.checkpoint.read_config(teacher)
    config = dataclasses.replace(config, norm=dataclasses.replace(config.norm, position="post"))
    with models.checkpoint.writing(post) as target:
        models.checkpoint.save_model(Transformer(config), target)
        load_tokenizer(teacher).save(target)
    status, output = espalier("distill", "--teacher", post, "--out", out, *SHORT, "--max_steps", 2)
    assert status == 0, output.err
    assert len(models.checkpoint.load(out).blocks) == 2


def test_what_every_other_layer_loses_is_said(teacher, espalier, tmp_path):
    """Of layers in turns, every other one is all of one kind."""
    mixed, out = tmp_path / "mixed", tmp_path / "student"
    config = models.checkpoint.read_config(teacher).to_dict()
    for layer in config["layers"][1::2]:
        layer["depth"] = {"kind": "mixture_of_depths"}
    config = ModelConfig.from_dict(config | {"exits": {"layers": [1]}})
    with models.checkpoint.writing(mixed) as target:
        models.checkpoint.save_model(Transformer(config), target)
        load_tokenizer(teacher).save(target)
    status, output = espalier("distill", "--teacher", mixed, "--out", out, *SHORT, "--max_steps", 2)
    assert status == 0, output.err
    found = [one["text"] for one in json.loads((out / "report.json").read_text())["verdict"] if one["topic"] == "notes"]
    mix = "depth: 2 none, 2 mixture_of_depths in the teacher, 0 none, 2 mixture_of_depths in the student"
    assert mix in found[0]
    assert "--student_layers" in found[0]
    assert "early exits are left out" in found[1]
    said = " ".join(output.err.split())
    assert all(sentence in said for sentence in found)


def test_only_another_mix_of_kinds_is_said(teacher):
    config = models.checkpoint.read_config(teacher)
    layers = [dataclasses.replace(layer, feedforward=None) for layer in config.layers]
    pairs = dataclasses.replace(config, layers=(*layers[:2], *config.layers[:2]))
    assert lost_kinds(config, 2) == lost_kinds(pairs, 2) == []
    assert "feedforward: 2 none, 2 swiglu in the teacher, 0 none, 1 swiglu" in lost_kinds(pairs, 1)[0]


def test_recovery_of_a_pruned_student(teacher, espalier, tmp_path):
    """Before is the pruned student, and the teacher is shown beside it; pruned weights stay 0."""
    pruned, out = tmp_path / "pruned", tmp_path / "recovered"
    assert espalier("prune", teacher, "--out", pruned, *QUICK, "--method", "magnitude")[0] == 0
    status, output = espalier("distill", "--teacher", teacher, "--student", pruned, "--out", out, *SHORT)
    assert status == 0, output.err
    report = json.loads((out / "report.json").read_text())
    assert report["before"]["name"] == "pruned"
    assert list(report["references"]) == ["teacher"]
    assert report["change"]["quality"]["loss"] < 0
    before, after = models.checkpoint.load(pruned), models.checkpoint.load(out)
    zeros = before.blocks[1].feedforward.up.weight == 0
    assert zeros.any()
    assert (after.blocks[1].feedforward.up.weight[zeros] == 0).all()
    history = json.loads((out / "history.json").read_text())["stages"]
    assert [entry["stage"] for entry in history] == ["prune", "distill"]
    assert history[1]["parents"]["teacher"] == models.checkpoint.hash_weights(teacher)


def test_student_from_an_architecture_file(teacher, espalier, tmp_path):
    architecture = tmp_path / "small.yaml"
    architecture.write_text(
        "width: 16\ndepth: 2\nattention: {kind: full, heads: 2}\nfeedforward: {kind: swiglu, width: 32}\n"
    )
    out = tmp_path / "student"
    argv = [
        "distill",
        "--teacher",
        teacher,
        "--student",
        architecture,
        "--out",
        out,
        *SHORT,
        "--losses",
        "logit,feature",
    ]
    status, output = espalier(*argv)
    assert status == 0, output.err
    student = models.checkpoint.load(out)
    assert student.config.width == 16
    assert not any("projector" in name or "objective" in name for name in student.state_dict())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--student", "x.yaml", "--student_layers", "2"], ["--student", "--student_layers"]),
        (["--student_layers", "9"], ["student_layers is 9", "4 layers"]),
        (["--student_layers", "2", "--alpha", "2"], ["alpha", "2"]),
        (["--student_layers", "2", "--temperature", "0"], ["temperature is 0"]),
        (["--student_layers", "2", "--losses", "logits"], ["logits", "did you mean 'logit'"]),
        (["--student_layers", "2", "--max_steps", "0"], ["max_steps is 0"]),
        (["--student", "TEACHER", "--initialization", "layers"], ["initialization", "weights of its own"]),
        (["--learning_rate", "-1"], ["learning_rate is -1"]),
        (["--clip", "-1"], ["clip is -1", "at least 0"]),
        (["--losses", "feature", "--temperature", "3"], ["temperature is an option of the loss logit"]),
        (["--student", "no/such.yaml"], ["no/such.yaml"]),
    ],
)
def test_impossible_wishes(argv, words, teacher, refused, tmp_path):
    argv = [teacher if word == "TEACHER" else word for word in argv]
    refused("distill", "--teacher", teacher, "--out", tmp_path / "student", *SHORT, *argv, words=words)
    assert list(tmp_path.iterdir()) == []


def test_teacher_of_another_vocabulary(teacher, refused, tmp_path):
    other = tmp_path / "other"
    small = train_tokenizer([document.text for document in synthetic().documents("train")], 290)
    config = models.checkpoint.read_config(teacher)
    with models.checkpoint.writing(other) as target:
        models.checkpoint.save_model(Transformer(dataclasses.replace(config, vocab_size=small.vocab_size)), target)
        small.save(target)
    out = tmp_path / "student"
    sizes = "tokenizers of 320 and 290 tokens which differ in"
    refused("distill", "--teacher", teacher, "--student", other, "--out", out, *SHORT, words=[sizes])
    assert {path.name for path in tmp_path.iterdir()} == {"other"}


def test_a_quantized_student_is_trained_as_it_is_stored(teacher, espalier, tmp_path):
    quantized, out = tmp_path / "quantized", tmp_path / "trained"
    argv = ["--bits", 2, "--group_size", 16, "--embedding_bits", 8, "--symmetric", "false", "--samples", 8]
    status, output = espalier("quantize", teacher, "--out", quantized, *QUICK, *argv)
    assert status == 0, output.err
    argv = ["--teacher", teacher, "--student", quantized, "--out", out, *SHORT, "--weight_decay", 0]
    status, output = espalier("distill", *argv, "--learning_rate", "3e-3", "--debug")
    assert status == 0, output.err
    assert models.checkpoint.read_config(out).compression == models.checkpoint.read_config(quantized).compression
    assert {name: tensor.dtype for name, tensor in models.checkpoint.load(out).state_dict().items()} == {
        name: tensor.dtype for name, tensor in models.checkpoint.load(quantized).state_dict().items()
    }
    report = json.loads((out / "report.json").read_text())
    assert report["title"].startswith("quantization-aware distillation")
    assert report["change"]["size"]["stored_bytes"]["ratio"] == 1
    assert report["change"]["quality"]["interval"]["loss"][1] < 0
    assert all(layer["requested"]["bits"] <= layer["achieved"]["bits"] for layer in report["layers"])


def test_a_student_that_cannot_be_trained_as_it_is_stored(teacher, espalier, refused, tmp_path):
    out = tmp_path / "quantized"
    assert espalier("quantize", teacher, "--out", out, *QUICK, "--method", "nf4")[0] == 0
    argv = ["distill", "--teacher", teacher, "--student", out, "--out", tmp_path / "trained", *SHORT]
    refused(*argv, words=["blocks.0.attention.q is stored as nf4", "only integers"])
    assert espalier("quantize", teacher, "--out", out, *QUICK, "--method", "rtn", "--overwrite")[0] == 0
    refused(*argv, "--compute_dtype", "bfloat16", words=["quantized", "compute_dtype float32"])
