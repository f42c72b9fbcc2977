"""The written report: complete, self-contained, and the same in JSON, Markdown, HTML and TensorBoard."""

import copy
import json
import re

import pytest
from evaluation_cases import comparison
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from app.evaluation import formatting
from app.evaluation.report.charts import ChartPoint, on_front
from app.evaluation.report.overview import beats, collect, write_overview
from app.evaluation.report.pages import About, build_report, write_report
from app.evaluation.report.tables import quality_rows
from compress.calibration.records import LayerRecord
from models.errors import UserError

ASKED = {"method": "gptq", "bits": 4, "group_size": 8}
RECORDS = [
    LayerRecord("blocks.0.attention.q", (16, 16), ASKED, {"bits": 4.5, "error_of": "outputs"}, 0.01, 0.5),
    LayerRecord(
        "blocks.0.attention.k", (8, 16), ASKED, {"bits": 4.5, "error_of": "outputs"}, 0.02, 0.5, "fell back to rounding"
    ),
    LayerRecord.skip("blocks.1.feedforward.down", (16, 24), "24 columns do not divide into groups of 7 | sorry", ASKED),
    LayerRecord.skip("head", (61, 16), "left <dense> by the recipe"),
]


@pytest.fixture(scope="module")
def figures():
    return comparison()


@pytest.fixture(scope="module")
def written(figures, tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    about = About(
        "GPTQ, 4 bits",
        "quantize",
        recipe={"method": "gptq", "bits": 4, "note": "a < b & c"},
        history=[{"stage": "pretrain", "title": "tiny", "time": "2026-01-01T00:00:00+00:00", "seed": 3}],
        data={"source": "synthetic"},
        seed=3,
        seconds=1.5,
    )
    write_report(directory, figures, RECORDS, about)
    return directory


def test_a_figure_that_was_zero_or_below_may_get_better(figures):
    for before, after, tone in ((0.0, 0.3, "good"), (-0.2, 0.1, "good"), (0.1, -0.2, "bad")):
        changed = copy.deepcopy(figures) | {"task": "classify"}
        for side, value in (("before", before), ("after", after)):
            changed[side]["quality"] = {"matthews_correlation": value}
        changed["change"]["quality"] = {"matthews_correlation": after - before, "beyond_noise": True}
        (row,) = quality_rows(changed)
        assert row.tone == tone


def test_report_json_holds_every_block(written):
    report = json.loads((written / "report.json").read_text())
    for side in ("before", "after"):
        block = report[side]
        for name in ("loss", "perplexity", "bits_per_byte"):
            low, high = block["quality"]["interval"][name]
            assert low < block["quality"][name] < high
        assert block["quality"]["tokens"] == report["measurement"]["tokens"]
        assert {"parameters", "nonzero_parameters", "stored_bytes", "memory_bytes"} <= block["size"].keys()
        assert {
            "prefill_tokens_per_second",
            "decode_tokens_per_second",
            "first_token_ms",
            "per_token_ms",
            "peak_memory_bytes",
            "flops_per_token",
            "device",
            "threads",
        } <= block["speed"].keys()
    change = report["change"]["quality"]
    assert {"kl_divergence", "agreement", "loss"} <= change.keys()
    difference = report["after"]["quality"]["loss"] - report["before"]["quality"]["loss"]
    assert change["loss"] == pytest.approx(difference)
    assert change["interval"]["loss"][0] < difference < change["interval"]["loss"][1]
    assert report["baselines"].keys() == {"unigram", "untrained"}
    assert "tasks" not in report["after"]


@pytest.mark.parametrize("page", ["report.html", "report.md"])
def test_every_layer_stands_there_with_what_was_asked_what_came_out_and_why_not(written, page):
    text = (written / page).read_text()
    for record in RECORDS:
        assert record.name in text
    assert "fell back to rounding" in text
    assert "24 columns do not divide into groups of 7" in text
    assert re.search(r"[Ss]kipped: left (<|&lt;)dense(>|&gt;) by the recipe", text)
    assert "4 layers, 2 of them skipped" in text
    assert "Bits asked" in text
    assert "Bits achieved" in text


def test_markdown_tables_are_whole(written):
    """Every row of a table has as many cells as its head, also where a note holds a bar."""
    tables = re.findall(r"(?:^\|.*\n)+", (written / "report.md").read_text(), flags=re.MULTILINE)
    assert len(tables) >= 3
    for table in tables:
        rows = [re.findall(r"(?<!\\)\|", line) for line in table.splitlines()]
        assert len({len(row) for row in rows}) == 1, table


def test_html_refers_to_nothing_outside_and_escapes_what_it_is_given(written):
    text = (written / "report.html").read_text()
    assert "http" not in text
    assert "<script" not in text
    assert "@import" not in text
    assert all(link.startswith("#") for link in re.findall(r'(?:src|href)="([^"]*)"', text))
    assert all(link.startswith("#") for link in re.findall(r"url\(([^)]*)\)", text))
    assert "a &lt; b &amp; c" in text
    assert "left &lt;dense&gt;" in text
    assert text.count("<svg") == 4
    identifiers = re.findall(r' id="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))
    targets = re.findall(r'(?:href="#|url\(#)([^")]+)', text)
    assert set(targets) <= set(identifiers)


def test_the_charts_follow_the_colours_of_the_page(written):
    text = (written / "report.html").read_text()
    pictures = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    for picture in pictures:
        assert "var(--ink)" in picture
        assert set(re.findall(r"#[0-9a-f]{6}\b", picture)) <= {"#000000"}
        assert "<text" in picture
        assert "font-family: inherit" in picture


def test_the_figures_are_the_same_in_all_forms(written):
    report = json.loads((written / "report.json").read_text())
    perplexity = formatting.number(report["after"]["quality"]["perplexity"])
    for page in ("report.html", "report.md"):
        text = (written / page).read_text()
        assert perplexity in text
        assert f"{report['measurement']['tokens']:,} tokens" in text
        assert "unigram" in text
        assert "stride" in text.lower()
        for sentence in report["verdict"]:
            assert sentence["text"].split(" (")[0].replace("&", "&amp;") in text.replace("&#39;", "'")


def test_pictures_are_written(written):
    for name in ("perplexity", "trade-offs", "latency", "layers"):
        assert (written / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_holds_the_same_figures(written):
    (file,) = (written / "tensorboard").iterdir()
    assert file.name == "events.out.tfevents.0.report"  # no host name
    events = EventAccumulator(str(written / "tensorboard"))
    events.Reload()
    report = json.loads((written / "report.json").read_text())
    values = [event.value for event in events.Scalars("quality/perplexity")]
    assert values == pytest.approx([report[side]["quality"]["perplexity"] for side in ("before", "after")])
    assert "plots/perplexity" in events.Tags()["images"]
    assert any("verdict" in tag for tag in events.Tags()["tensors"])


def test_a_report_without_speed_layers_or_recipe(figures, tmp_path):
    bare = {key: dict(value) if isinstance(value, dict) else value for key, value in figures.items()}
    for part in ("before", "after", "change"):
        bare[part].pop("speed")
    report = write_report(tmp_path, bare, [], About("Two models", "compare"))
    assert report["verdict"][0]["text"].endswith("speed not measured")
    text = (tmp_path / "report.html").read_text()
    assert "Layer by layer" not in text
    assert "Recipe" not in text
    assert not (tmp_path / "plots" / "latency.png").exists()


def test_a_broken_model_still_gets_its_report(figures, tmp_path):
    broken = json.loads(json.dumps(figures))
    broken["after"]["quality"] |= {"perplexity": None, "loss": None, "bits_per_byte": None}
    broken["after"]["quality"]["interval"] = {name: [None, None] for name in ("loss", "perplexity", "bits_per_byte")}
    report = write_report(tmp_path, broken, [], About("Broken", "quantize"))
    assert any("broken" in sentence["text"] for sentence in report["verdict"])
    assert "not finite" in (tmp_path / "report.html").read_text()


def folder(path, name, before, after, figures, **changes):
    """A stage's folder whose report has these names and hashes, and some figures changed: perplexity, bytes, rate."""
    path = path / name
    path.mkdir()
    one = json.loads(json.dumps(figures))
    for side, sha in (("before", before), ("after", after)):
        one[side] |= {"name": sha, "weights_sha256": sha}
    one["before"]["quality"]["perplexity"] = 20.0
    one["before"]["size"]["stored_bytes"] = 8000
    one["before"]["speed"]["decode_tokens_per_second"] = 80.0
    one["after"]["quality"]["perplexity"] = changes.get("perplexity", 30.0)
    one["after"]["size"]["stored_bytes"] = changes.get("stored_bytes", 1000)
    one["after"]["speed"]["decode_tokens_per_second"] = changes.get("rate", 100.0)
    one["measurement"] |= changes.get("measurement", {})
    report = build_report(one, RECORDS, About(name, "prune", time="2026-01-01T00:00:00+00:00"))
    (path / "report.json").write_text(json.dumps(report))
    return path


def test_one_page_over_a_chain_of_stages(figures, tmp_path):
    first = folder(tmp_path, "pruned", "aaa", "bbb", figures, perplexity=30.0, stored_bytes=4000, rate=100.0)
    second = folder(tmp_path, "quantized", "bbb", "ccc", figures, perplexity=31.0, stored_bytes=1000, rate=150.0)
    worse = folder(tmp_path, "worse", "bbb", "ddd", figures, perplexity=40.0, stored_bytes=2000, rate=90.0)
    entries = collect([first, second, worse])
    # where the chain starts comes once, then the steps
    assert [entry.name for entry in entries] == ["aaa", "pruned", "quantized", "worse"]
    out = tmp_path / "page"
    out.mkdir()
    content = write_overview([first, second, worse], out)
    fronts = {model["name"]: model["fronts"] for model in content["models"]}
    assert fronts["quantized"] == ["size", "speed"]
    assert fronts["worse"] == []
    assert content["dominated"] == [
        "worse is dominated by quantized: no larger, no slower, and no worse in perplexity."
    ]
    for page in ("report.html", "report.md"):
        text = (out / page).read_text()
        assert "worse is dominated by quantized" in text
        assert "unigram" in text
        assert "untrained" in text
        assert "not comparable" not in text
    assert "http" not in (out / "report.html").read_text()
    assert (out / "plots" / "trade-offs.png").exists()


def test_figures_on_other_text_are_said_to_be_incomparable(figures, tmp_path):
    one = folder(tmp_path, "one", "aaa", "bbb", figures)
    two = folder(tmp_path, "two", "bbb", "ccc", figures, measurement={"data": "another text", "context": 999})
    out = tmp_path / "page"
    out.mkdir()
    warnings = write_overview([one, two], out)["warnings"]
    assert any("the text or the tokenizer differs" in sentence for sentence in warnings)
    assert any("the context length differs" in sentence for sentence in warnings)


def test_folders_of_one_name_are_told_apart(figures, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    one = folder(tmp_path / "x", "same", "aaa", "bbb", figures)
    two = folder(tmp_path / "y", "same", "bbb", "ccc", figures)
    assert [entry.name for entry in collect([one, two])] == ["aaa", "same", "same (2)"]


def test_folders_without_a_report_are_refused(tmp_path):
    with pytest.raises(UserError, match="at least one"):
        collect([])
    with pytest.raises(UserError, match="no folder"):
        collect([tmp_path / "missing"])
    with pytest.raises(UserError, match=r"report\.json"):
        collect([tmp_path])
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(UserError, match="not a report"):
        collect([tmp_path])


def places(value, path=()):
    """The path of every value inside lists and objects."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def test_a_report_that_lacks_a_key_or_holds_another_type_is_refused_or_shown(figures, tmp_path, monkeypatch):
    """Each key left out, and each value replaced: one sentence that names the key, or the whole page."""
    monkeypatch.setattr("app.evaluation.report.overview.charts.values", lambda *arguments, **options: None)
    monkeypatch.setattr("app.evaluation.report.overview.charts.trade_offs", lambda *arguments: None)
    monkeypatch.setattr("app.evaluation.report.overview.draw", lambda drawings, folder: None)
    path = folder(tmp_path, "pruned", "aaa", "bbb", figures)
    whole = json.loads((path / "report.json").read_text())
    paths = [one for one in places(whole) if one[0] not in ("layers", "recipe", "environment", "history")]
    refused = 0
    for number, place in enumerate(paths):
        for value in (..., (None, "x", [])[number % 3], (-1, {}, 0, [1, "x"])[number % 4]):
            report = json.loads(json.dumps(whole))
            *above, last = place
            parent = report
            for key in above:
                parent = parent[key]
            if value is ...:
                del parent[last]
            else:
                parent[last] = value
            monkeypatch.setattr("app.evaluation.report.overview.read_json", lambda path, report=report: report)
            try:
                write_overview([path], tmp_path)
            except UserError as error:
                assert "report.json" in str(error)  # noqa: PT017
                refused += 1
    assert refused > len(paths) / 2


def test_the_pareto_front_by_brute_force():
    points = [
        (ChartPoint(str(i), ppl, (0, 0)), x)
        for i, (x, ppl) in enumerate([(1, 9), (2, 5), (2, 5), (3, 5), (4, 1), (5, 2)])
    ]
    assert [step.name for step, x in points if on_front(step, x, points, more_is_better=False)] == ["0", "1", "2", "4"]
    assert [step.name for step, x in points if on_front(step, x, points, more_is_better=True)] == ["4", "5"]


def test_a_model_is_dominated_only_by_one_that_is_better_in_something():
    def step(perplexity, stored, rate):
        return ChartPoint("model", perplexity, (1, 99), stored, rate)

    assert not beats(step(10, 100, 5), step(10, 100, 5))
    for better in (step(9, 100, 5), step(10, 99, 5), step(10, 100, 6)):
        assert beats(better, step(10, 100, 5))
        assert not beats(step(10, 100, 5), better)
    assert not beats(step(9, 101, 5), step(10, 100, 5))
    assert not beats(step(10, 100, None), step(10, 100, 5))  # one was not timed
    assert beats(step(10, 100, 5), step(None, 1, 50))
