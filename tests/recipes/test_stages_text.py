"""How much text a stage used, and what of it was left out: on the terminal and in the report."""

import json

import pytest

from app.data.corpus import synthetic
from tests.recipes.conftest import QUICK


@pytest.mark.parametrize(
    "verb",
    [
        ["quantize", "--method", "gptq", "--bits", "4"],
        ["quantize", "--method", "rtn", "--budget_bits", "4.5", "--sensitivity_samples", "5000"],
        pytest.param(["prune", "--method", "wanda"], marks=pytest.mark.slow),
        pytest.param(
            ["prune", "--method", "structured", "--targets", "neurons", "--ratio", "0.25"], marks=pytest.mark.slow
        ),
    ],
    ids=["gptq", "budget", "wanda", "structured"],
)
def test_fewer_calibration_samples_than_asked_for_are_reported(verb, teacher, tmp_path, espalier):
    if "--sensitivity_samples" not in verb:
        verb = [*verb, "--samples", "5000"]
    status, output = espalier(verb[0], teacher, "--out", tmp_path / "out", *verb[1:], *QUICK)
    assert status == 0, output.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    split = "validation" if "--sensitivity_samples" in verb else "train"
    used = report["data"][f"{split}_blocks"]
    assert 0 < used < 5000
    sentence = f"{used} blocks of 64 tokens were used where 5000 were asked for"
    assert any(sentence in line["text"] for line in report["verdict"])
    assert sentence in " ".join(output.err.split())
    assert sentence in (tmp_path / "out" / "report.md").read_text()
    entry = json.loads((tmp_path / "out" / "history.json").read_text())["stages"][-1]
    assert entry["data"][f"{split}_blocks"] == used


def test_what_of_the_text_was_left_out_stands_in_the_report(teacher, tmp_path, espalier):
    rows = [{"text": document.text} for document in synthetic().texts] + [{"text": None}, {"text": ""}]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts" / "README.md").write_text("about")
    quick = ["--data", tmp_path / "texts", *QUICK[2:]]
    quick += ["--evaluation_blocks", "5000"]
    status, output = espalier("quantize", teacher, "--out", tmp_path / "out", "--method", "rtn", *quick)
    assert status == 0, output.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for sentence in ("not read: 1 README.md", "2 of 402 documents are empty and left out"):
        assert sentence in " ".join(output.err.split())
        assert any(sentence in line["text"] for line in report["verdict"])
        assert sentence in report["data"]["left_out"]
    sentence = f"measured on {report['measurement']['blocks']} blocks where 5000 were asked for"
    assert sentence in " ".join(output.err.split())
    assert any(sentence in line["text"] for line in report["verdict"])
    file = tmp_path / "figures.json"
    status, output = espalier("evaluate", teacher, "--out", file, *quick)
    assert status == 0, output.err
    (figures,) = json.loads(file.read_text())["models"].values()
    for wanted in ("not read: 1 README.md", "2 of 402 documents are empty and left out", sentence):
        assert any(wanted in note for note in figures["notes"])
