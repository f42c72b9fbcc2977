"""What a fit does with what it finds: start, go on, nothing, or refuse."""

import json

import pytest

from app.callbacks.folder import COMPLETE
from app.callbacks.record import RECIPE
from app.history import write_history
from models.errors import UserError
from recipes.fit_state import LIMITS, MACHINERY, Trained, differences, find_checkpoint, plan_fit, run_folder

RECIPE_VALUES = {"out": "x", "model": {"lr": 0.1}, "trainer": {"max_steps": 10, "devices": 1}}


def other(**trainer):
    return {**RECIPE_VALUES, "trainer": {**RECIPE_VALUES["trainer"], **trainer}}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "model"


def checkpoint(out, step):
    path = run_folder(out) / "checkpoints" / f"step-{step:08d}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    (run_folder(out) / RECIPE).write_text(json.dumps(RECIPE_VALUES))
    return path


def finished(out, steps=10, stage="pretrain"):
    out.mkdir()
    write_history(out, [{"stage": stage, "recipe": RECIPE_VALUES, "steps": steps}])
    (run_folder(out)).mkdir(exist_ok=True)
    (run_folder(out) / COMPLETE).touch()


def test_nothing_there_starts(out):
    plan = plan_fit(out, RECIPE_VALUES, "last", overwrite=False)
    assert (plan.resume, plan.stale, plan.done) == (None, (), None)


def test_a_killed_run_goes_on_from_its_newest_checkpoint(out):
    checkpoint(out, 9)
    newest = checkpoint(out, 100)
    (newest.parent / ".step-00000200.ckpt.writing").touch()
    assert plan_fit(out, RECIPE_VALUES, "last", overwrite=False).resume == newest


def test_a_complete_run_has_nothing_to_do(out):
    checkpoint(out, 10)
    finished(out)
    assert "is complete: 10 steps" in plan_fit(out, RECIPE_VALUES, "last", overwrite=False).done
    assert "is complete" in plan_fit(out, other(devices=2), "last", overwrite=False).done  # the same run elsewhere
    assert "max_steps is 5" in plan_fit(out, other(max_steps=5), "last", overwrite=False).done
    later = {**other(max_steps=10), "early_stopping": {"patience": 3}}
    assert "max_steps is 10" in plan_fit(out, later, "last", overwrite=False).done  # as many steps as there are


def test_more_steps_lengthen_a_complete_run(out):
    newest = checkpoint(out, 10)
    finished(out)
    plan = plan_fit(out, other(max_steps=20), "last", overwrite=False)
    assert (plan.resume, plan.done) == (newest, None)
    newest.unlink()
    with pytest.raises(UserError, match="no checkpoint left"):
        plan_fit(out, other(max_steps=20), "last", overwrite=False)


def test_something_else_is_never_replaced_unasked(out):
    finished(out)
    with pytest.raises(UserError, match=r"another recipe \(model\.lr: 0\.1 -> 0\.2\)"):
        plan_fit(out, {**RECIPE_VALUES, "model": {"lr": 0.2}}, "last", overwrite=False)
    for path in out.iterdir():
        path.unlink()
    (out / "thesis.txt").touch()
    with pytest.raises(UserError, match="already holds something else"):
        plan_fit(out, RECIPE_VALUES, "last", overwrite=False)
    (out / "thesis.txt").unlink()
    write_history(out, [{"stage": "quantize", "recipe": RECIPE_VALUES}])
    with pytest.raises(UserError, match="already holds something else"):
        plan_fit(out, RECIPE_VALUES, "last", overwrite=False)


def test_more_steps_of_another_recipe_are_another_run(out):
    """One key that does not matter beside one that does."""
    checkpoint(out, 10)
    finished(out)
    for more in ({"max_steps": 20}, {"max_steps": 20, "devices": 2}):
        changed = {**other(**more), "model": {"lr": 0.2}}
        with pytest.raises(UserError, match=r"another recipe \(.*model\.lr: 0\.1 -> 0\.2"):
            plan_fit(out, changed, "last", overwrite=False)


@pytest.mark.parametrize("key", LIMITS)
def test_each_limit_alone_lengthens_a_complete_run(out, key):
    newest = checkpoint(out, 5)
    finished(out, steps=5)
    group, name = key.split(".")
    longer = {**RECIPE_VALUES, group: {**RECIPE_VALUES.get(group, {}), name: 20}}
    assert plan_fit(out, longer, "last", overwrite=False).resume == newest


@pytest.mark.parametrize("key", MACHINERY)
def test_each_part_of_the_machinery_alone_may_differ_and_what_only_begins_like_it_may_not(key):
    group, _, name = key.partition(".")

    def recipe(ending, value):
        return {group: {f"{name}{ending}": value}} if name else {f"{group}{ending}": value}

    assert differences(recipe("", 1), recipe("", 2), MACHINERY) == {}
    assert differences(recipe("", {"kind": 1}), recipe("", {"kind": 2}), MACHINERY) == {}
    assert differences(recipe("_of_more", 1), recipe("_of_more", 2), MACHINERY) == {f"{key}_of_more": (1, 2)}


def test_an_unfinished_run_is_not_mixed_with_a_new_one(out):
    checkpoint(out, 4)
    with pytest.raises(UserError, match="--ckpt_path last"):
        plan_fit(out, RECIPE_VALUES, None, overwrite=False)


def test_a_finished_run_is_lengthened_only_on_purpose(out):
    checkpoint(out, 10)
    finished(out)
    with pytest.raises(UserError, match="finished run of 10 steps; go on with --ckpt_path last"):
        plan_fit(out, other(max_steps=20), None, overwrite=False)
    assert "is complete" in plan_fit(out, RECIPE_VALUES, None, overwrite=False).done


def test_a_run_with_a_best_checkpoint_alone_is_not_mixed_with_a_new_one(out):
    newest = checkpoint(out, 4)
    newest.rename(newest.with_name("best-00000004.ckpt"))
    with pytest.raises(UserError, match="unfinished run"):
        plan_fit(out, RECIPE_VALUES, None, overwrite=False)


def test_more_patience_lengthens_a_run_that_stopped_early(out):
    newest = checkpoint(out, 5)
    finished(out, steps=5)
    plan = plan_fit(out, {**RECIPE_VALUES, "early_stopping": {"patience": 3}}, "last", overwrite=False)
    assert (plan.resume, plan.done) == (newest, None)


def test_overwriting_starts_anew_but_repeating_a_killed_overwrite_goes_on(out):
    newest = checkpoint(out, 10)
    finished(out)
    plan = plan_fit(out, RECIPE_VALUES, "last", overwrite=True)
    assert (set(plan.stale), plan.resume) == (set(run_folder(out).iterdir()), None)
    (run_folder(out) / COMPLETE).unlink()  # the new run has begun, and was killed
    plan = plan_fit(out, RECIPE_VALUES, "last", overwrite=True)
    assert (plan.stale, plan.resume) == ((), newest)
    assert plan_fit(out, other(max_steps=20), "last", overwrite=True).stale


def test_a_checkpoint_that_would_be_removed_is_not_resumed(out, tmp_path):
    newest = checkpoint(out, 10)
    best = newest.with_name("best-00000008.ckpt")
    best.touch()
    finished(out)
    for ckpt_path in (str(newest), str(run_folder(out) / "checkpoints" / ".." / "checkpoints" / newest.name), "best"):
        with pytest.raises(UserError, match="--overwrite would empty"):
            plan_fit(out, RECIPE_VALUES, ckpt_path, overwrite=True)
    elsewhere = newest.rename(tmp_path / newest.name)
    assert plan_fit(out, RECIPE_VALUES, str(elsewhere), overwrite=True).resume == elsewhere


def test_a_run_is_not_continued_from_its_middle(out, tmp_path):
    """The later checkpoints of the branch that is left would pass for newer ones of the branch that is taken."""
    newest = checkpoint(out, 10)
    older = newest.with_name("step-00000004.ckpt")
    older.touch()
    with pytest.raises(UserError, match="goes on to step-00000010.ckpt after step-00000004.ckpt"):
        plan_fit(out, RECIPE_VALUES, str(older), overwrite=False)
    assert plan_fit(out, RECIPE_VALUES, "last", overwrite=False).resume == newest
    assert plan_fit(tmp_path / "another", RECIPE_VALUES, str(older), overwrite=False).resume == older


def test_a_place_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file is a file; --out must name a folder"):
        plan_fit(tmp_path / "file" / "model", RECIPE_VALUES, "last", overwrite=False)
    monkeypatch.setattr("os.access", lambda place, mode: False)
    with pytest.raises(UserError, match=r"allows no writing; choose another --out"):
        plan_fit(tmp_path / "deep" / "model", RECIPE_VALUES, "last", overwrite=False)


def test_checkpoints_that_are_not_there(out, tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        find_checkpoint(str(tmp_path / "x.ckpt"), None)
    with pytest.raises(UserError, match="no best checkpoint"):
        find_checkpoint("best", run_folder(out))
    out.mkdir()
    with pytest.raises(UserError, match="espalier evaluate"):
        find_checkpoint(str(out), None)


def test_differences_name_keys_that_one_side_lacks():
    assert differences({"a": {"b": 1}}, {"a": {"b": 2, "c": 3}}) == {"a.b": (1, 2), "a.c": (None, 3)}
    assert differences({"out": "x", "ckpt_path": None}, {"out": "y", "ckpt_path": "last"}) == {}


def trained(batches, optimizer=None):
    return Trained({"model": {"optimizer": optimizer}}, None, batches)


def continued(optimizer=None, window=1):
    return {"model": {"optimizer": optimizer}, "trainer": {"accumulate_grad_batches": window}}


def test_another_optimizer_cannot_go_on(tmp_path):
    """Where its parameter groups look alike, the state of one would be taken for the other's without a word."""
    muon, adamw = {"class_path": "app.optim.Muon", "init_args": {}}, {"class_path": "app.optim.AdamW"}
    trained(3).check(continued(), tmp_path)
    trained(3, adamw).check(continued(), tmp_path)  # what is left out is AdamW
    for before, now, names in ((muon, None, "Muon.* AdamW"), (None, muon, "AdamW.* Muon")):
        with pytest.raises(UserError, match=f"the optimizer {names}; set it back"):
            trained(3, before).check(continued(now), tmp_path)


def test_a_step_is_not_begun_in_its_middle(tmp_path):
    """The Trainer counts the batches of a step from the beginning of the epoch: the first step would have fewer."""
    trained(6).check(continued(window=3), tmp_path)
    with pytest.raises(UserError, match="after 6 batches of an epoch.* a step of 4 .* with 3 it can go on"):
        trained(6).check(continued(window=4), tmp_path)
