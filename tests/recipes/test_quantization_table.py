"""The table over all quantization methods: what it runs, keeps and prints."""

import subprocess
from dataclasses import replace

import pytest

from recipes import cli
from tests.benchmarks import quantization_table
from tests.recipes.conftest import QUICK

SMALL = ["--sequence_length", "64", "--device", "cpu", "--speed_rounds", "0", "--samples", "8", "--group_size", "16"]


@pytest.fixture
def runs(monkeypatch):
    """Commands run in this process; their number is kept."""
    counted = []

    def run(command, **_):
        counted.append(command)
        return subprocess.CompletedProcess(command, cli.main(command[3:]), "", "espalier: error: it cannot")

    monkeypatch.setattr(quantization_table.subprocess, "run", run)
    return counted


def test_one_table_of_all_that_is_there_and_a_finished_folder_is_kept(teacher, runs, tmp_path, capsys, monkeypatch):
    known = quantization_table.cases()
    absent = replace(known[0], name="absent, 8 bits", method={"kind": "absent"})
    monkeypatch.setattr(quantization_table, "cases", lambda: [*known, absent])
    argv = ["--model", str(teacher), "--data", "synthetic", "--out", str(tmp_path), *SMALL]
    only = ["--only", "rtn, 3 bits; gptq, 2 bits; absent*; nf4"]
    assert quantization_table.main([*argv, *only]) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| dense (teacher)", "| rtn, 3 bits", "| gptq, 2 bits"]
    assert "absent, 8 bits is left out: there is no method absent" in printed
    assert "nf4 is left out: it cannot" in printed  # it has no groups, and is told of some
    bits = [float(line.split(" | ")[3]) for line in lines[3:]]
    assert 3 < bits[1] < 4 < bits[0] < 5  # and of 16 weights a scale and a zero point
    assert len(runs) == 3
    assert quantization_table.main([*argv, *only]) == 0
    assert len(runs) == 4
    assert capsys.readouterr().out.splitlines()[:5] == printed.splitlines()[:5]


def test_every_case_is_a_command_that_espalier_takes(teacher, espalier, tmp_path):
    """It gets as far as the model, which is not there."""
    for case in quantization_table.cases():
        if case.method["kind"] in quantization_table.METHODS:
            status, output = espalier("quantize", tmp_path / "none", *case.options(), *QUICK, "--out", tmp_path / "out")
            assert status == 2
            assert "none" in output.err.splitlines()[-1]


def test_an_unknown_case_is_refused(capsys, tmp_path):
    with pytest.raises(SystemExit):
        quantization_table.main(["--model", "m", "--data", "python", "--out", str(tmp_path), "--only", "gtpq*"])
    assert "gptq, 4 bits" in capsys.readouterr().err
