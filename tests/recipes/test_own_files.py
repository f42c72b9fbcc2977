"""A person's own files: what carries no marker of Espalier is neither deleted nor replaced, whatever a file says."""

import json

import pytest
import yaml
from test_fit import write

from app.callbacks.record import RECIPE
from models.errors import UserError
from recipes.commands import resume
from recipes.commands.options import Quantize, Run
from recipes.commands.parser import parse_arguments
from recipes.commands.pipeline import StagePlan, read_pipeline
from recipes.commands.run import STATE, prepare
from recipes.fit_arguments import prepare as fit_arguments
from recipes.fit_state import plan_fit

FINGERPRINT = "0" * 64


@pytest.fixture
def mine(tmp_path):
    """A folder beside OUT with a file in it."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    return folder


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "named", ["../mine", "{mine}", "mine", ".", "01-x/../../mine", "01-a\0b", 3, None, ["../mine"]]
)
def test_a_pipelines_record_names_only_folders_that_pipelines_make(named, overwrite, mine, tmp_path):
    out = tmp_path / "out"
    (out / "mine").mkdir(parents=True)
    (out / "mine" / "notes.txt").write_text("mine")
    folder = named.format(mine=mine) if isinstance(named, str) else named
    begun = [{"folder": folder, "fingerprint": FINGERPRINT, "inputs": {}}]
    (out / STATE).write_text(json.dumps({"stages": begun}))
    with pytest.raises(UserError, match=r"pipeline.json was not written by espalier run"):
        prepare([StagePlan("prune", "a", out / "01-a", None, "1" * 64, [])], out, overwrite)
    assert (mine / "notes.txt").exists()
    assert (out / "mine" / "notes.txt").exists()


@pytest.mark.parametrize("stages", [3, {}, [3], [{}], [{"folder": "01-a"}]])
def test_a_pipelines_record_of_another_form_is_refused(stages, tmp_path):
    (tmp_path / STATE).write_text(json.dumps({"stages": stages}))
    with pytest.raises(UserError, match="was not written by espalier run"):
        prepare([StagePlan("prune", "a", tmp_path / "01-a", None, "1" * 64, [])], tmp_path, True)


def test_a_partial_folder_without_a_fingerprint_stays(mine, tmp_path):
    folder = mine.rename(tmp_path / "out.partial")
    for use in (
        lambda: resume.check_output(tmp_path / "out", False),
        lambda: resume.resumable(tmp_path / "out", FINGERPRINT, print).__enter__(),
    ):
        with pytest.raises(UserError, match=r"out.partial is not of an unfinished run"):
            use()
        (folder / "fingerprint").write_text("of my finger")  # a file of that name is no marker yet
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_partial_folder_of_a_run_killed_at_its_beginning_is_used(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "fingerprint").touch()
    resume.check_output(tmp_path / "out", False)
    with resume.resumable(tmp_path / "out", FINGERPRINT, print) as folder:
        assert (folder / "fingerprint").read_text() == FINGERPRINT


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_place_of_a_run_that_is_somebodys_own_folder(overwrite, mine, tmp_path):
    folder = mine.rename(tmp_path / "model.run")
    with pytest.raises(UserError, match=r"model.run is not the folder of a run"):
        plan_fit(tmp_path / "model", {}, None, overwrite)
    assert (folder / "notes.txt").exists()
    (folder / RECIPE).write_text("{}")
    assert plan_fit(tmp_path / "model", {}, None, True).stale


def test_a_run_killed_before_it_wrote_its_recipe_goes_on(tmp_path):
    (tmp_path / "model.run").mkdir()
    (tmp_path / "model.run" / "events.out.tfevents.1").touch()
    assert plan_fit(tmp_path / "model", {}, None, False).resume is None


def test_overwriting_and_trust_are_said_on_the_command_line(tmp_path):
    """By no recipe of any verb, no stage of a pipeline, and no recipe inside of another."""
    recipe = tmp_path / "recipe.yaml"
    words = "can only be given on the command line"
    recipe.write_text("overwrite: true\n")
    with pytest.raises(UserError, match=words):
        parse_arguments("quantize", Quantize, ["-c", str(recipe), "model", "--out", "out"])
    recipe.write_text("trust: true\n")
    with pytest.raises(UserError, match=words):
        parse_arguments("run", Run, ["-c", str(recipe), "pipeline.yaml", "--out", "out"])
    with pytest.raises(UserError, match=words):
        fit_arguments("fit", ["-c", str(write(recipe, overwrite=True))], {"overwrite": bool, "out": str})
    with pytest.raises(UserError, match=words):
        fit_arguments("fit", ["-c", str(write(recipe, config="other.yaml"))], {"config": None, "out": str})
    write(tmp_path / "plain.yaml")
    for key in ("overwrite", "trust"):
        for stage in ({"stage": "pretrain", "config": "plain.yaml"}, {"stage": "prune"}):
            recipe.write_text(yaml.safe_dump({"stages": [stage | {key: True}]}))
            with pytest.raises(UserError, match=words):
                read_pipeline(recipe, tmp_path / "out", tmp_path / "model", None)
