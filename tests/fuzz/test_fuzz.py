"""Whatever a person or a stranger hands in: status 0 or 2, one sentence at 2 and nothing written, within 1 GB and 10 s.

A case that fails is run again by its name and seed: `python -m tests.fuzz --case config/17 --seed 0`.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.fuzz import cases

ROOT = Path(__file__).parents[2]
CASES = 80  # of `make test`, all kinds together
MANY = 400  # of `make test-slow`, of each kind
# Cases that were mended: name and seed -> what was wrong.
MENDED = {
    ("record/0", 0): "a report whose intervals are no mapping",
    ("record/1", 1): "a history whose steps are a list",
    ("record/10", 0): "figures of a sweep with another key",
    ("record/15", 0): "figures of a sweep with a list for losses",
    ("record/15", 1): "a pipeline's state with a list of inputs",
    ("record/29", 0): "a stage that the pipeline's state does not list: others were deleted, then it was refused",
    ("recipe/27", 0): "a second stage that cannot work was refused when the first was done",
    ("recipe/43", 0): "a list for the trainer",
    ("checkpoint/3", 1): "a number for a tensor of a checkpoint",
    ("checkpoint/12", 1): "a checkpoint without its tensors",
    ("checkpoint/14", 0): "a text for a checkpoint's record",
    ("checkpoint/48", 0): "a fraction in a generator's state",
    ("option/1", 1): "control characters in the sentence",
    ("option/4", 0): "a sentence of ten thousand characters",
    ("option/12", 1): "blanks where a number belongs",
    ("tensors/11", 1): "a pipe in the place of the weights",
    ("data/16", 1): "a link that leads to itself",
    ("tensors/42", 1): "weights that overflow in the middle of a stage left OUT.partial",
    ("recipe/54", 1): "bits 8.0",
    ("option/58", 1): "control characters in the name of a class",
    ("option/48", 1): "a pipeline from a model that is not there left its folder",
    ("recipe/107", 1): "a sweep whose recipe no training can read trained all the same",
    ("tensors/251", 1): "a distillation whose gradient is not finite ended with the name of a class",
    ("checkpoint/96", 1): "a checkpoint that was refused left files in the run's folder",
    ("checkpoint/201", 1): "a checkpoint that was refused replaced the record of the run",
    ("record/310", 1): "a recipe of a sweep that is a link to itself",
    ("option/129", 1): "blanks where one of several types belongs",
    ("option/232", 1): "an output in a folder that is a file",
    ("option/348", 1): "lists nested twenty thousand deep",
}
# Cases that are known to fail: name and seed -> the reason; strict: one that is mended has to leave the list.
KNOWN: dict[tuple[str, int], str] = {}


class Server:
    """`python -m tests.fuzz --serve`: a clean process that forks a child for each case."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "tests.fuzz", "--serve", "--folder", str(folder)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )

    def failure(self, name: str, seed: int) -> str | None:
        """What is wrong with the answer to a case, or None."""
        self.process.stdin.write(f"{name} {seed}\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if answer["kind"].startswith("good"):
            return None
        return f"{name} (seed {seed}): {answer['kind']}: {answer['what']}\n    {answer['evidence']}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("fuzz"))
    yield server
    server.process.stdin.close()
    server.process.wait()


def check(server: Server, chosen: Iterable[tuple[str, int]]) -> None:
    chosen = [case for case in chosen if case not in KNOWN]
    found = [failure for case in chosen if (failure := server.failure(*case)) is not None]
    assert not found, "\n".join([f"{len(found)} of {len(chosen)} cases", *found])


def test_every_case_is_answered_in_a_sentence(server: Server) -> None:
    """One test, so that one worker imports everything once and makes the base once."""
    names = [f"{kind}/{number}" for number in range(CASES // len(cases.NAMES)) for kind in cases.NAMES]
    check(server, [*MENDED, *((name, 0) for name in names)])


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.xfail(reason=why, strict=True)) for case, why in KNOWN.items()]
)
def test_known(case: tuple[str, int], server: Server) -> None:
    failure = server.failure(*case)
    assert failure is None, failure


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["valid", *cases.NAMES])
def test_many(kind: str, server: Server) -> None:
    """Thousands of cases of another seed, and every command with the base as it is."""
    check(server, [(f"{kind}/{number}", 1) for number in range(len(cases.COMMANDS) if kind == "valid" else MANY)])
