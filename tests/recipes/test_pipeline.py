"""`espalier run`: stages in a row, resumed after the last finished one."""

import dataclasses
import itertools
import json
import shutil

import pytest
import yaml

import models.checkpoint
from app.data.corpus import synthetic
from app.data.tokenizer import load_tokenizer
from models.errors import UserError
from models.transformer import Transformer
from recipes.commands import options, run
from recipes.commands.pipeline import read_pipeline
from recipes.commands.pipeline_inputs import FileInput, stage_inputs

COMMON = {"data": "synthetic", "sequence_length": 64, "speed_rounds": 0, "samples": 8}
STAGES = [
    {
        "stage": "distill",
        "name": "student",
        "student_layers": 2,
        "max_steps": 4,
        "train_batch_size": 4,
        "warmup_steps": 1,
    },
    {"stage": "prune", "method": "structured", "targets": "neurons", "ratio": 0.25},
    {"stage": "prune", "name": "sparse", "method": "magnitude"},
]


def write(path, stages=STAGES, **common):
    path.write_text(yaml.safe_dump({"common": COMMON | common, "stages": stages}))
    return path


def test_stages_in_a_row_and_again(teacher, espalier, tmp_path, monkeypatch):
    recipe, out = write(tmp_path / "short.yaml"), tmp_path / "out"
    argv = ["run", recipe, "--model", teacher, "--out", out, "--device", "cpu", "--debug"]
    status, output = espalier(*argv)
    assert status == 0, output.err
    assert [folder.name for folder in sorted(out.glob("0*"))] == ["01-student", "02-prune", "03-sparse"]
    assert (out / "model").resolve() == out / "03-sparse"
    history = json.loads((out / "model" / "history.json").read_text())["stages"]
    assert [entry["stage"] for entry in history] == ["distill", "prune", "prune"]
    report = json.loads((out / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == ["teacher", "01-student", "02-prune", "03-sparse"]
    assert report["baselines"].keys() == {"unigram", "untrained"}
    overall = json.loads((out / "overall" / "report.json").read_text())
    assert (overall["before"]["name"], overall["after"]["name"]) == ("teacher", "03-sparse")
    before = {path: path.stat().st_mtime_ns for path in out.glob("0*/model.safetensors")}

    # the same command again does nothing
    status, output = espalier(*argv)
    assert status == 0, output.err
    assert {path: path.stat().st_mtime_ns for path in out.glob("0*/model.safetensors")} == before

    # a change in the last stage does that one alone again, and only with --overwrite
    write(recipe, [*STAGES[:2], STAGES[2] | {"sparsity": 0.25}])
    status, output = espalier(*argv)
    assert status == 2
    assert "03-sparse differs" in output.err.splitlines()[-1]
    status, output = espalier(*argv, "--overwrite")
    assert status == 0, output.err
    after = {path: path.stat().st_mtime_ns for path in out.glob("0*/model.safetensors")}
    assert {path.parent.name for path in after if after[path] != before[path]} == {"03-sparse"}


@pytest.mark.slow
def test_goes_on_after_the_last_finished_stage(teacher, espalier, tmp_path, monkeypatch):
    recipe, out = write(tmp_path / "short.yaml"), tmp_path / "out"
    argv = ["run", recipe, "--model", teacher, "--out", out, "--device", "cpu"]
    undisturbed = run.run_step
    begun = []

    def dies(step):
        begun.append(step.name)
        if step.name == "sparse":
            raise KeyboardInterrupt
        return undisturbed(step)

    monkeypatch.setattr(run, "run_step", dies)
    assert espalier(*argv)[0] == 130
    monkeypatch.setattr(run, "run_step", lambda step: begun.append(f"again {step.name}") or undisturbed(step))
    status, output = espalier(*argv)
    assert status == 0, output.err
    assert begun == ["student", "prune", "sparse", "again sparse"]
    assert models.checkpoint.load(out / "model").config.layers[0].feedforward.width == 48


def steps(path, tmp_path, model="teacher"):
    return read_pipeline(path, tmp_path / "out", model and tmp_path / model, "cpu")


def test_names_lead_to_folders(tmp_path):
    stages = [STAGES[0], STAGES[1] | {"name": "narrow"}, STAGES[0] | {"name": "healed", "student": "@narrow"}]
    del stages[2]["student_layers"]
    stages[2]["teacher"] = "@student"
    read = steps(write(tmp_path / "p.yaml", stages), tmp_path)
    assert read[1].options.model == str(tmp_path / "out" / "01-student")
    assert read[2].options.teacher == str(tmp_path / "out" / "01-student")
    assert read[2].options.student == str(tmp_path / "out" / "02-narrow")


def test_fingerprints_change_from_the_changed_stage_on(tmp_path):
    first = steps(write(tmp_path / "p.yaml"), tmp_path)
    second = steps(write(tmp_path / "p.yaml", [STAGES[0], STAGES[1] | {"ratio": 0.5}, STAGES[2]]), tmp_path)
    same = [a.fingerprint == b.fingerprint for a, b in zip(first, second, strict=True)]
    assert same == [True, False, False]


def test_a_pretraining_stage_becomes_arguments_of_fit(tmp_path):
    (tmp_path / "tiny.yaml").write_text("seed_everything: 0\n")
    stages = [{"stage": "pretrain", "config": "tiny.yaml", "trainer.max_steps": 3}, STAGES[1]]
    read = steps(write(tmp_path / "p.yaml", stages), tmp_path, model=None)
    assert read[0].options[:2] == ["-c", str(tmp_path / "tiny.yaml")]
    assert "--trainer.max_steps=3" in read[0].options
    assert read[0].options[-2:] == [f"--out={tmp_path / 'out' / '01-pretrain'}", "--ckpt_path=last"]
    assert read[1].options.model == str(tmp_path / "out" / "01-pretrain")


def test_common_options_reach_the_pretraining(tmp_path):
    (tmp_path / "tiny.yaml").write_text("data: {source: python}\n")
    stages = [{"stage": "pretrain", "config": "tiny.yaml", "seed": 3}, STAGES[1]]
    common = {"data": "my.txt", "column": "body", "dtype": "auto", "seed": 7, "batch_size": 2}
    read = steps(write(tmp_path / "p.yaml", stages, **common), tmp_path, model=None)
    flags = read[0].options[2:-2]
    assert set(flags) == {"--device=cpu", "--data=my.txt", "--data.column=body", "--sequence_length=64", "--seed=3"}
    assert str(read[0].inputs[0]) == "the text my.txt"
    other = steps(write(tmp_path / "p.yaml", stages, **common | {"data": "your.txt"}), tmp_path, model=None)
    assert other[0].fingerprint != read[0].fingerprint


@pytest.mark.parametrize(("flag", "device"), [(None, "cuda"), ("cpu", "cpu")])
def test_the_command_line_decides_about_the_device(flag, device, tmp_path):
    recipe = write(tmp_path / "p.yaml", STAGES[1:], device="cuda")
    assert {step.options.device for step in read_pipeline(recipe, tmp_path, tmp_path / "m", flag)} == {device}
    recipe = write(tmp_path / "p.yaml", STAGES[1:])
    assert read_pipeline(recipe, tmp_path, tmp_path / "m", None)[0].options.device == "auto"


@pytest.mark.slow
def test_an_input_that_changed_under_its_name(teacher, espalier, refused, tmp_path):
    model, text = shutil.copytree(teacher, tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("\n\n".join(document.text for document in synthetic().texts))
    recipe, out = write(tmp_path / "p.yaml", STAGES[2:], data=str(text)), tmp_path / "out"
    argv = ["run", recipe, "--model", model, "--out", out, "--device", "cpu"]
    assert espalier(*argv)[0] == 0

    whole = text.read_text()
    text.write_text(whole + "More words.\n")
    refused(*argv, words=[f"the text {text} changed since stage 01-sparse was begun", "--overwrite"])
    text.write_text(whole)
    assert "is complete" in espalier(*argv)[1].err

    weights = models.checkpoint.load(model).state_dict()
    with models.checkpoint.writing(model, overwrite=True) as target:
        again = Transformer(models.checkpoint.read_config(teacher))
        again.load_state_dict({name: 0.9 * tensor for name, tensor in weights.items()})
        models.checkpoint.save_model(again, target)
        load_tokenizer(teacher).save(target)
    refused(*argv, words=[f"the model {model} changed since stage 01-sparse was begun", "--overwrite"])
    assert espalier(*argv, "--overwrite")[0] == 0
    history = json.loads((out / "01-sparse" / "history.json").read_text())["stages"]
    assert history[0]["parents"]["model"] == models.checkpoint.hash_weights(model)


def test_the_files_beside_the_weights_are_part_of_a_model(teacher, tmp_path):
    model = shutil.copytree(teacher, tmp_path / "model")
    found = []
    for template in (None, "{{ messages }}", "{{ messages }}\n"):
        if template is not None:
            (model / "chat_template.jinja").write_text(template)
        found.append(FileInput(model).content())
    assert len(set(found)) == 3


def test_a_finished_stage_without_a_whole_report_is_refused_before_any_work(tmp_path):
    """The pages over all stages would be missing it once every other stage is done."""
    read = steps(write(tmp_path / "p.yaml", STAGES[1:]), tmp_path)
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "model.safetensors").touch()
    out = tmp_path / "out"
    assert run.prepare(read, out, False) == 0
    read[0].out.mkdir()
    (read[0].out / "report.json").write_text("{}")
    with pytest.raises(UserError, match=r"01-prune/report\.json"):
        run.prepare(read, out, False)


def test_an_architecture_file_is_an_input(tmp_path):
    (tmp_path / "small.yaml").write_text("width: 16\n")
    (tmp_path / "tiny.yaml").write_text(f"model: {{architecture: {tmp_path / 'small.yaml'}}}\n")
    stages = [{"stage": "pretrain", "config": "tiny.yaml"}]
    before, after = [], []
    for found in (before, after):
        found += run.input_contents(steps(write(tmp_path / "p.yaml", stages), tmp_path, model=None))
        (tmp_path / "small.yaml").write_text("width: 32\n")
    assert {name for name in before[0] if before[0][name] != after[0][name]} == {f"the file {tmp_path / 'small.yaml'}"}


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([], "at least one stage"),
        ([{"method": "rtn"}], "stage 1 must be a mapping with the key `stage`"),
        ([{"stage": "quantise"}], "did you mean 'quantize'"),
        ([{"stage": "prune", "ration": 1}], "unknown key 'ration'"),
        ([{"stage": "prune", "ratio": "much"}], "ratio must be"),
        ([STAGES[1], STAGES[1]], "the name 'prune' is taken"),
        ([{"stage": "prune", "name": "a/b"}], "no plain name"),
        ([{"stage": "prune", "model": "@nobody"}], "names no stage before it"),
        ([{"stage": "prune", "config": "no.yaml"}], "there is no recipe no.yaml"),
        ([{"stage": "prune", "out": "x"}], "out is not for a stage"),
        ([{"stage": "pretrain"}], "pretrain needs `config`"),
    ],
)
def test_wrong_pipelines(stages, words, tmp_path):
    with pytest.raises(UserError, match=words):
        steps(write(tmp_path / "p.yaml", stages), tmp_path)


def test_wrong_common_key(tmp_path):
    with pytest.raises(UserError, match="unknown key 'sampels'"):
        steps(write(tmp_path / "p.yaml", sampels=3), tmp_path)


def test_nothing_to_start_from(tmp_path):
    with pytest.raises(UserError, match="name a model with --model"):
        steps(write(tmp_path / "p.yaml", STAGES[1:]), tmp_path, model=None)


def test_output_that_holds_something_else(teacher, refused, tmp_path):
    recipe, out = write(tmp_path / "p.yaml"), tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    refused("run", recipe, "--model", teacher, "--out", out, words=["already holds something", "--overwrite"])
    assert [path.name for path in out.iterdir()] == ["precious.txt"]


PRETRAIN = """
seed_everything: 0
model:
  architecture:
    width: 32
    depth: 4
    attention: {kind: full, heads: 4, kv_heads: 2}
    feedforward: {kind: swiglu, width: 64}
  optimizer: {class_path: AdamW, init_args: {lr: 5.0e-3}}
data: {source: synthetic, sequence_length: 64, batch_size: 16, vocab_size: 320}
trainer: {max_steps: 60, accelerator: cpu, devices: 1, limit_val_batches: 0}
checkpoint: {monitor: null}
"""


def test_from_nothing_to_a_small_model_with_its_report(espalier, tmp_path):
    """Pretrain, distil, prune, recover, quantize: everything that `make pipeline` does, on a tiny model."""
    (tmp_path / "tiny.yaml").write_text(PRETRAIN)
    distill = {"stage": "distill", "max_steps": 30, "train_batch_size": 16, "warmup_steps": 2, "learning_rate": 3e-3}
    stages = [
        {"stage": "pretrain", "name": "teacher", "config": "tiny.yaml"},
        distill | {"name": "student", "student_layers": 2},
        {"stage": "prune", "name": "narrow", "method": "structured", "ratio": 0.25, "round_to": 8},
        distill | {"name": "recovered", "teacher": "@teacher", "student": "@narrow", "max_steps": 15},
        {"stage": "quantize", "name": "quantized", "group_size": 16, "embedding_bits": 8},
    ]
    recipe, out = write(tmp_path / "tiny-pipeline.yaml", stages, speed_rounds=3), tmp_path / "out"
    status, output = espalier("run", recipe, "--out", out, "--device", "cpu", "--debug")
    assert status == 0, output.err
    report = json.loads((out / "report.json").read_text())
    names = ["01-teacher", "02-student", "03-narrow", "04-recovered", "05-quantized"]
    assert [model["name"] for model in report["models"]] == names
    perplexity = {model["name"]: model["quality"]["perplexity"] for model in report["models"]}
    unigram, untrained = (report["baselines"][name]["perplexity"] for name in ("unigram", "untrained"))
    assert perplexity["01-teacher"] < unigram < untrained
    assert perplexity["04-recovered"] < perplexity["03-narrow"]
    overall = json.loads((out / "overall" / "report.json").read_text())
    assert overall["change"]["size"]["stored_bytes"]["ratio"] < 0.25
    assert overall["change"]["speed"]["decode_tokens_per_second"]["ratio"] > 0
    history = json.loads((out / "model" / "history.json").read_text())["stages"]
    assert [entry["stage"] for entry in history] == ["pretrain", "distill", "prune", "distill", "quantize"]
    for before, after in itertools.pairwise(history):
        assert after["parents"]["model"] == before["weights"]
    assert str(tmp_path) not in (out / "model" / "report.json").read_text()
    for name in ("report.html", "report.md", "overall/report.html", "model/README.md"):
        assert (out / name).stat().st_size > 500


def test_a_stage_reads_all_the_models_that_it_names_but_those_of_the_pipeline(tmp_path):
    for name in ("model", "teacher", "student"):
        (tmp_path / name).mkdir()
    own = tmp_path / "out" / "01-own"
    own.mkdir(parents=True)

    def read(chosen):
        return [str(found) for found in stage_inputs(chosen, tmp_path / "out")]

    distill = options.Distill(teacher=str(tmp_path / "teacher"), student=str(tmp_path / "student"), out="o", data="a")
    models = [f"the model {tmp_path / name}" for name in ("teacher", "student")]
    assert read(distill) == ["the text a", *models]
    later = dataclasses.replace(distill, teacher=str(own), evaluation_data="b")
    assert read(later) == ["the text a", "the text b", models[1]]
    prune = options.Prune(model=str(tmp_path / "model"), out="o", data="a")
    assert read(prune) == ["the text a", f"the model {tmp_path / 'model'}"]
