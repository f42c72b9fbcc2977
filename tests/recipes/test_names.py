"""Names that a person or a file gives stand as they are in the terminal, in Markdown, HTML and pictures."""

import html
import json
import re

import pytest
from markupsafe import Markup

from app.evaluation import formatting
from app.evaluation.metrics import Perplexity
from app.evaluation.report.charts import ChartPoint, values
from app.evaluation.report.overview import write_overview
from app.evaluation.report.pages import About, write_report
from app.history import write_card
from app.tasks import CausalLM
from models.config import ModelConfig
from models.errors import UserError, printable
from models.transformer import Transformer
from recipes import cli
from recipes.commands import terminal
from recipes.commands.evaluate import write_figures
from tests.app.evaluation_cases import comparison

NAME = "a[bold]$x^$ `b` | <script>alert(1)</script> *c* [d](http://e) \x1b[31m$"


@pytest.fixture(scope="module")
def figures():
    found = comparison()
    for side in ("before", "after"):
        found[side]["name"] = f"{side} {NAME}"
    return found


def assert_plain(text):
    """No element, link, emphasis or code of the name is left."""
    outside = re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)  # the recipe, fenced
    assert "<script" not in outside
    assert "[d](http" not in outside
    assert "*c*" not in outside.replace(r"\*c\*", "")
    assert not re.search(r"(?<!\\)`b(?<!\\)`", outside)


def test_a_report(figures, tmp_path):
    folder = tmp_path / NAME.replace("/", "_")
    folder.mkdir()
    recipe = {"data": f"{NAME} ```\n# no heading"}
    history = [{"stage": NAME, "title": NAME, "seed": 1}]
    write_report(folder, figures, [], About(NAME, NAME, recipe, history, {"source": NAME}, notes=[NAME]))
    text = (folder / "report.md").read_text()
    assert_plain(text)
    assert re.search(r"^````yaml\n.*^````$", text, re.DOTALL | re.MULTILINE)
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert html.escape("<script>alert(1)", quote=False) in page
    out = tmp_path / "many"
    out.mkdir()
    write_overview([folder], out)
    assert_plain((out / "report.md").read_text())
    assert "<script" not in (out / "report.html").read_text()


def test_a_picture(tmp_path):
    steps = [ChartPoint(f"{number} {NAME}", 20.0 + number, (19.0, 22.0), 1000, 1.0) for number in range(2)]
    chart = values(steps, {NAME: 300.0}, 1, Perplexity())
    chart.png(tmp_path)
    assert "$x^$" in chart.svg()  # as text, no formula


def test_a_model_card(tmp_path):
    values = {"width": 32, "depth": 1, "vocab_size": 64, "feedforward": {"kind": "swiglu", "width": 64}}
    model = Transformer(ModelConfig.from_dict(values | {"attention": {"kind": "full", "heads": 4}}))
    entries = [{"stage": NAME, "title": f"{NAME}\n# no heading", "data": {"source": NAME}, "weights": NAME}]
    write_card(tmp_path, model, entries, CausalLM())
    card = (tmp_path / "README.md").read_text()
    assert "\n# no heading" not in card
    outside = re.sub(r"(?<!\\)(`+)(?!`).*?(?<!`)\1(?!`)", "", card)  # code spans, where nothing means anything
    assert_plain(outside)


def test_markdown_and_code():
    assert formatting.markdown("a|b\nc <d> & `e`") == r"a\|b c &lt;d> &amp; \`e\`"
    assert formatting.markdown(Markup("**a**")) == "**a**"
    assert formatting.code("plain") == "`plain`"
    assert formatting.code("a `b` c") == "`` a `b` c ``"


def test_the_terminal(capsys, monkeypatch):
    terminal.say(f"written to {NAME}")
    shown = capsys.readouterr().err
    assert NAME.replace("\x1b", r"\x1b") in shown

    def fail(argv):
        raise UserError(f"there is no {NAME}" + "x" * 5000)

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["inspect"]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert len(said) < 1000
    assert said.count("\n") == 1


def test_a_table_shows_names_as_they_are(capsys, figures):
    report = json.loads(json.dumps(figures)) | {"title": NAME, "verdict": [{"text": NAME}]}
    terminal.print_summary(report)
    shown = capsys.readouterr().err
    assert "\x1b" not in shown
    assert "[bold]" in shown


def test_control_characters_are_written_as_escapes():
    assert printable("a\x1b[0m\u202eb\x00\r\tc\né") == r"a\x1b[0m\u202eb\x00\r" + "\tc\né"


def test_figures_that_are_not_finite_are_null(tmp_path):
    write_figures(tmp_path / "out.json", {"interval": [float("nan"), float("inf")], "loss": 1.5})
    assert json.loads((tmp_path / "out.json").read_text()) == {"interval": [None, None], "loss": 1.5}
