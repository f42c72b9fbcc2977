"""The targets that a person types."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = ["setup", "pretrain", "quantize", "prune", "distill", "evaluate", "pipeline", "report", "tensorboard"]
TARGETS += ["test", "lint", "bench"]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")


def make(*argv):
    return subprocess.run(["make", *argv], cwd=ROOT, capture_output=True, text=True)


def test_make_alone_lists_every_target():
    done = make()
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    for target in TARGETS:
        assert any(line.split()[:2] == ["make", target] and len(line.split()) > 3 for line in lines), target


@pytest.mark.parametrize(
    ("target", "variable"), [("quantize", "MODEL"), ("prune", "MODEL"), ("distill", "TEACHER"), ("report", "MODEL")]
)
def test_a_missing_variable_is_named_before_anything_is_installed(target, variable):
    done = make(target, "VENV=/nowhere/at/all")
    assert done.returncode == 2
    assert f"{variable}=" in done.stderr
    assert "pip" not in done.stdout


@pytest.mark.parametrize("target", ["pretrain", "pipeline", "test", "lint"])
def test_every_target_sets_up_the_environment_first(target):
    done = make("-n", target, "VENV=/nowhere/at/all")
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("pip install") < done.stdout.rindex("/nowhere/at/all/bin")


def test_torch_without_cuda_comes_first_where_it_is_asked_for():
    """What is installed after it finds torch there, of the version that was tested, and fetches no other build."""
    own = [
        line for line in make("-n", "setup", "VENV=/nowhere/at/all", "TORCH=cpu").stdout.splitlines() if "pip" in line
    ]
    assert own[0] == (
        "/nowhere/at/all/bin/python -m pip install --no-deps -c constraints.txt "
        "--index-url https://download.pytorch.org/whl/cpu torch"
    )
    assert own[1:] == [
        line for line in make("-n", "setup", "VENV=/nowhere/at/all").stdout.splitlines() if "pip" in line
    ]
    done = make("setup", "VENV=/nowhere/at/all", "TORCH=gpu")
    assert (done.returncode, "TORCH may be cpu, not gpu" in done.stderr) == (2, True)


def test_variables_reach_the_command():
    done = make("-n", "quantize", "MODEL=m", "OUT=o", "RECIPE=r.yaml", "DATA=d.txt", "ARGS=--bits 3")
    assert "espalier quantize m -c r.yaml --out o --data d.txt --bits 3" in done.stdout


def test_constraints_pin_versions_and_nothing_else():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert "torch==2.13.0" in lines
    assert all(line.count("==") == 1 and "/" not in line and "+" not in line and " " not in line for line in lines)
