"""What README and docs/ tell people to type is typed here, on a tiny model and a tiny text; what they name is there."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from app.tasks import Classify
from models.checkpoint import load, save_model, writing
from models.config import ModelConfig
from models.transformer import Transformer
from recipes import cli
from tests.recipes.conftest import ARCHITECTURE, QUICK

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / "docs/architecture_picture.py", ROOT / "tests/benchmarks/RESULTS.md"]
GUIDE = (ROOT / "docs/guide.md").read_text()  # its examples go on from those of the README
INDENTED = [x.strip() for x in (README + GUIDE).replace("\\\n", " ").splitlines() if x.startswith("    ")]
COMMANDS = [shlex.split(line, comments=True) for line in INDENTED if line.startswith("espalier ")]
SHORT_FIT = ["--data.vocab_size", "320", "--trainer.max_steps", "2", "--trainer.val_check_interval", "2"]
SHORT_FIT += [
    "--trainer.accelerator",
    "cpu",
    "--model.compile",
    "null",
    "--model.schedule.init_args.warmup_steps",
    "1",
    "--samples.prompts",
    "[]",
]


def test_readme_shows_commands_of_every_kind():
    assert {command[1] for command in COMMANDS} >= {"fit", "quantize", "prune", "import", "export"}


def test_table_lists_every_verb():
    listed = set(re.findall(r"`espalier (\w+)", README))
    assert set(cli.VERBS) - {"validate", "test", "predict"} <= listed


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page):
    text = page.read_text()
    named = re.findall(r"(?<![\w/.-])((?:recipes|models|compress|app|tests|docs)/[\w/.*-]*)(?<!\.)", text)
    assert named
    named = [path for path in named if "NAME" not in path]
    assert [path for path in named if not list(ROOT.glob(path.removesuffix("/")))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in link]
    for link in links:
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, link


def test_targets_that_the_pages_name_are_there():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {target for page in PAGES for target in re.findall(r"(?:`|    )make ([a-z-]+)", page.read_text())}
    assert named <= set(targets)


def test_what_is_to_be_copied_registers_as_the_page_says():
    """A row of the table: the file to copy, the line that makes it known as the copied file has it, and its file."""
    table = (ROOT / "docs/architecture.md").read_text().partition("## What to copy")[2]
    rows = re.findall(r"^\| an? .+", table, re.MULTILINE)
    assert len(rows) > 8
    for row in rows:
        *_, copied, line, known, _ = [re.findall(r"`([^`]+)`", cell) for cell in row.split("|")]
        assert all((ROOT / name).is_file() for name in copied if "/" in name), row
        assert not known or line[0] in (ROOT / known[0]).read_text(), row


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", README, re.DOTALL))
def test_architectures_in_the_readme_are_accepted(block):
    from models.presets import PRESETS

    values = yaml.safe_load(block if block.startswith("model:") else "model:\n  architecture:\n" + block)
    ModelConfig.from_dict({**PRESETS["quickstart"], **values["model"]["architecture"]})


@pytest.fixture
def workplace(teacher, tokenizer, tmp_path, monkeypatch):
    """A folder in which the README's relative paths mean something small."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "runs").mkdir()
    (tmp_path / "notes").mkdir()
    for number in range(40):
        text = " ".join(f"word{(number * 7 + i) % 50}" for i in range(400))
        (tmp_path / "notes" / f"{number}.txt").write_text(text)
    lines = [f'{{"text": "{path.read_text()}"}}' for path in sorted((tmp_path / "notes").iterdir())]
    (tmp_path / "my.jsonl").write_text("\n".join(lines))
    (tmp_path / "runs" / "notes").symlink_to(teacher)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained("path/to/hf-folder")
    tokenizer.save(tmp_path / "path/to/hf-folder")
    save_classifier(tmp_path, tokenizer)
    return tmp_path


def save_classifier(place, tokenizer):
    """A model of pairs that has learned nothing, and rows to measure it on."""
    rows = "".join(f"word{i}\tword{i % 7}\t{i % 2}\n" for i in range(40))
    (place / "dev.tsv").write_text(f"sentence1\tsentence2\tlabel\n{rows}")
    task = Classify(text=("sentence1", "sentence2"), label="label", labels=("0", "1"), sequence_length=32)
    config = ModelConfig.from_dict(task.shaped(ARCHITECTURE | {"vocab_size": tokenizer.vocab_size}))
    with writing(place / "runs" / "classifier") as folder:
        save_model(Transformer(config), folder, task=task.dump())
        tokenizer.save(folder)


def test_compression_commands_run(workplace, espalier):
    short = ["--sequence_length", "64", "--speed_rounds", "0", "--device", "cpu"]
    for _, verb, *arguments in COMMANDS:
        if verb in ("fit", "sweep", "run"):  # these take up to an hour; other tests read their files
            continue
        extra = short if verb in ("quantize", "prune") else []
        status, output = espalier(verb, *arguments, *extra, *(["--samples", "4"] if extra else []))
        assert status == 0, output.err
    assert (workplace / "runs/llama-ct/model.safetensors").is_file()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[1] == "fit" and "quickstart" in " ".join(c)])
def test_training_commands_run(workplace, espalier, command):
    arguments = [argument.replace("runs/", "trained/") for argument in command[2:]]
    small = [
        f"--model.architecture.{key}={yaml.safe_dump(value, default_flow_style=True)}"
        for key, value in ARCHITECTURE.items()
    ]
    data = [] if "--data" in arguments else QUICK[:2]
    status, output = espalier("fit", *arguments, *data, "--sequence_length", "64", *small, *SHORT_FIT)
    assert status == 0, output.err


def test_python_example_runs(teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/pipeline").mkdir(parents=True)
    (tmp_path / "runs/pipeline/model").symlink_to(teacher)
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {"tokens": torch.zeros(2, 5, dtype=torch.int64)}
    exec(compile(block, "README.md", "exec"), names)
    assert names["logits"].shape == (2, 5, load(teacher).config.vocab_size)
