"""`espalier sweep`: a tiny one from end to end, going on after an interruption, and wrong files."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from models.errors import UserError
from recipes.cli import main
from recipes.commands import sweep
from recipes.commands.sweep import read_sweep

ROOT = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def recipe(tmp_path):
    """A sweep file over a recipe that trains in seconds on a text of its own."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        words = " ".join(f"word{(number * step) % 17} and" for step in range(60))
        (text / f"{number}.txt").write_text(f"Document {number}. {words}")
    base = yaml.safe_load((ROOT / "pretrain" / "tiny.yaml").read_text())
    base["model"]["architecture"] |= {"width": 16, "depth": 1, "feedforward": {"kind": "mlp", "width": 16}}
    base["data"] |= {"source": str(text), "sequence_length": 16, "vocab_size": 300, "batch_size": 2}
    base["model"]["schedule"]["init_args"]["warmup_steps"] = 1
    base["trainer"] |= {"max_steps": 2, "val_check_interval": 2, "limit_val_batches": 1}
    base["samples"] = {"prompts": []}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    values = {
        "pretrain": "base.yaml",
        "baseline": "the base",
        "seeds": [1, 2],
        "tokens": 64,
        "lengths": [32],
        "extrapolate": ["position"],
        "axes": {
            "position": {"learned": {"position": "learned"}},
            "experts": {"two": {"feedforward": {"kind": "experts", "count": 4, "expert": {"kind": "mlp", "width": 8}}}},
        },
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(values))
    return path, values


def test_a_sweep_trains_measures_and_compares(recipe, tmp_path, capsys):
    path, values = recipe
    out = tmp_path / "out"
    assert main(["sweep", str(path), "--out", str(out)]) == 0
    text = (out / "sweep.md").read_text()
    assert "| position | learned |" in text
    assert "ends before" in text  # learned positions stop at 16
    assert (out / "plots" / "differences.png").stat().st_size > 1000
    assert (out / "plots" / "expert-load.png").stat().st_size > 1000
    assert "of the runs with seed 1](plots/expert-load.png)" in text
    figures = json.loads((out / "sweep.json").read_text())
    assert [run["seed"] for run in figures["runs"]["position/learned"]] == [1, 2]
    assert set(figures["runs"]["position/learned"][0]["losses"]) == {"16"}
    assert set(figures["runs"]["the base"][0]["losses"]) == {"16", "32"}
    experts = figures["runs"]["experts/two"][0]
    assert sum(experts["experts"]["blocks.0"]["load"]) == pytest.approx(1)
    assert experts["active_parameters"] < experts["parameters"]
    assert figures["runs"]["the base"][0]["experts"] == {}
    before = {run.name: run.stat().st_mtime_ns for run in (out / "runs").glob("*.json")}
    (out / "runs" / "position-learned-s2.json").unlink()
    assert main(["sweep", str(path), "--out", str(out)]) == 0
    after = {run.name: run.stat().st_mtime_ns for run in (out / "runs").glob("*.json")}
    assert {name for name in after if after[name] != before[name]} == {"position-learned-s2.json"}
    assert json.loads((out / "sweep.json").read_text())["runs"] == figures["runs"]
    path.write_text(yaml.safe_dump(values | {"axes": {"position": {"learned": {"position": "alibi"}}}}))
    assert main(["sweep", str(path), "--out", str(out)]) == 2
    assert "was trained with another recipe" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_processes_end_when_the_sweep_is_killed():
    script = (
        "import os, time\n"
        "from recipes.commands.sweep import pool_of\n"
        "if __name__ == '__main__':\n"
        "    pool = pool_of(1)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 600)\n"
        "    time.sleep(600)\n"
    )
    sweep = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT.parent)
    worker = int(sweep.stdout.readline())
    sweep.kill()
    sweep.wait()
    for _ in range(100):
        if not alive(worker):
            return
        time.sleep(0.1)
    pytest.fail("a process of the pool outlives the sweep")


def alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sedes": [1]}, "unknown key 'sedes'"),
        ({"seeds": []}, "'seeds' is missing"),
        ({"pretrain": "nowhere.yaml"}, "there is no recipe nowhere.yaml"),
        ({"axes": {"position": {"none": {"position": "nonne"}}}}, "axes.position.none: .*unknown position"),
        ({"extrapolate": ["positions"]}, "there is no axis 'positions'"),
        ({"extrapolate": "position"}, "extrapolate is 'position'; it must be a list of axes"),
        ({"seeds": 3}, "seeds is 3; it must be a list of whole numbers"),
        ({"seeds": 0}, "seeds is 0; it must be a list of whole numbers"),
        ({"seeds": ["one"]}, r"seeds is \['one'\]; it must be a list of whole numbers"),
        ({"seeds": [1, 2, 1]}, "seeds names 1 twice"),
        ({"lengths": 128}, "lengths is 128; it must be a list of whole numbers"),
        ({"lengths": [0]}, r"lengths is \[0\]; it must be a list of whole numbers of at least 1"),
        ({"tokens": "many"}, "tokens is 'many'; it must be a whole number of at least 1"),
        ({"tokens": 0}, "tokens is 0; it must be a whole number of at least 1"),
        ({"pretrain": ["base.yaml"]}, "it must be the name of one recipe"),
        ({"axes": [{"position": {}}]}, "axes must give each axis its variants by name"),
        (
            {"axes": {"position": {"a b": {"position": "none"}, "a/b": {"position": "learned"}}}},
            "axes.position.a b and axes.position.a/b would both be written to position-a-b-s1",
        ),
        (
            {"axes": {"the": {"base": {"position": "none"}}}, "extrapolate": []},
            "baseline the base and axes.the.base would both be written to the-base-s1",
        ),
    ],
)
def test_a_wrong_file_is_refused_before_anything_trains(recipe, change, sentence):
    path, values = recipe
    path.write_text(yaml.safe_dump(values | change))
    with pytest.raises(UserError, match=sentence):
        read_sweep(path)
    assert main(["sweep", str(path), "--out", str(path.parent / "out")]) == 2
    assert not (path.parent / "out").exists()


@pytest.mark.parametrize("data", [None, {"source": "text"}, {"sequence_length": "long"}])
def test_a_base_without_the_length_of_its_blocks_is_refused(recipe, data):
    path, _ = recipe
    base = yaml.safe_load((path.parent / "base.yaml").read_text())
    (path.parent / "base.yaml").write_text(yaml.safe_dump(base | {"data": data}))
    with pytest.raises(UserError, match="data.sequence_length must stand in the recipe"):
        read_sweep(path)


@pytest.mark.parametrize("path", sorted((ROOT / "sweep").glob("*.yaml")), ids=lambda path: path.name)
def test_the_sweeps_that_come_with_espalier_can_be_read(path):
    assert len(read_sweep(path).variants) >= {"architectures.yaml": 30, "experts.yaml": 4}[path.name]


def test_a_seed_settles_the_weights_and_the_order_of_the_text(tmp_path):
    base = {"model": {"architecture": {}}, "data": {"source": "synthetic"}}
    plan = sweep.Sweep(base, "base", [3, 5], [8], 1, [], {("axis", "one"): {"width": 8}})
    recipes = [one.recipe for one in sweep.prepare(plan, tmp_path, False)]
    assert [(one["seed_everything"], one["data"]["seed"]) for one in recipes] == [(3, 3), (5, 5)] * 2
