"""Cases by kind: which file or option is changed, how, and which verb has to answer.

A case is its name and seed alone: `KIND/NUMBER` and the seed give the same random numbers, and so the same mutation of
the same base.
"""

import base64
import concurrent.futures
import contextlib
import dataclasses
import io
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml

from . import mutators
from .base import FIT, QUICK

OUT = ["--out", "out"]
LINE = ["--model", "model", "--device=cpu"]
LAST = ["-c", "fit.yaml", "--ckpt_path", "last"]
COMMANDS: dict[str, list[str]] = {
    "inspect": ["inspect", "model"],
    "generate": ["generate", "model", "--prompt", "The quick", "--max_new_tokens", "3"],
    "evaluate": ["evaluate", "model", *QUICK],
    "compare": ["compare", "model", "quantized", *OUT, *QUICK],
    "quantize": ["quantize", "model", "-c", "quantize.yaml", *OUT, *QUICK],
    "awq": ["quantize", "model", "-c", "awq.yaml", *OUT, *QUICK],
    "prune": ["prune", "model", "-c", "prune.yaml", *OUT, *QUICK],
    "wanda": ["prune", "model", "-c", "wanda.yaml", *OUT, *QUICK],
    "distill": ["distill", "--teacher", "model", "-c", "distill.yaml", *OUT, *QUICK],
    "student": ["distill", "--teacher", "model", "--student", "student.yaml", "--max_steps=2", "--warmup_steps=1", *OUT,
                "--train_batch_size=2", *QUICK],
    "import": ["import", "hf", *OUT],
    "export": ["export", "model", *OUT],
    "packed": ["export", "quantized", "--format=compressed-tensors", *OUT],
    "gptq": ["export", "quantized", "--format=gptq", *OUT],
    "report": ["report", "quantized", "pruned", *OUT],
    "run": ["run", "pipeline.yaml", *OUT, *LINE],
    "rerun": ["run", "pipeline.yaml", "--out", "line", *LINE],
    "sweep": ["sweep", "sweep.yaml", *OUT],
    "resweep": ["sweep", "sweep.yaml", "--out", "grid"],
    "fit": ["fit", "-c", "fit.yaml", *OUT],
    "refit": ["fit", "-c", "fit.yaml", "--out", "model", "--trainer.max_steps=3"],
    "validate": ["validate", *LAST, "--out", "model"],
    "test": ["test", *LAST, "--out", "model"],
    "predict": ["predict", *LAST, "--out", "model"],
    "further": ["quantize", "quantized", "--method=rtn", *OUT, *QUICK],
}  # fmt: skip
READERS = ["inspect", "generate", "evaluate", "compare", "quantize", "awq", "prune", "wanda", "distill", "export"]
QUANTIZED = ["inspect quantized", "generate quantized", "evaluate quantized", "compare", "packed", "gptq", "further"]
FOREIGN = ["import", "inspect hf", "generate hf", "evaluate hf", "prune hf"]
CHECKPOINT = ["inspect x.ckpt", "generate x.ckpt", "evaluate x.ckpt", "export x.ckpt", "quantize x.ckpt",
              "validate x.ckpt", "predict x.ckpt", "refit x.ckpt"]  # fmt: skip
TEXTS = ["text.txt", "packed.txt.gz", "rows.jsonl", "rows.csv", "rows.tsv", "rows.parquet", "texts", "saved"]
KINDS: dict[str, dict[str, list[str]]] = {  # kind -> file -> the commands that read it
    "config": {"model/config.json": READERS, "quantized/config.json": QUANTIZED, "hf/config.json": FOREIGN},
    "tensors": {
        "model/model.safetensors": READERS,
        "quantized/model.safetensors": QUANTIZED,
        "hf/model.safetensors": FOREIGN,
    },
    "tokenizer": {
        **{f"model/{name}": READERS[1:] for name in ("tokenizer.json", "tokenizer_config.json")},
        **{f"hf/{name}": FOREIGN for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")},
        "tokenizer.json": ["fit --data.tokenizer=tokenizer.json"],
        "tokenizer_config.json": ["fit --data.tokenizer=tokenizer.json"],
    },
    "recipe": {
        "fit.yaml": ["fit", "fit", "fit", "refit", "validate", "test", "predict", "sweep"],
        "quantize.yaml": ["quantize"],
        "awq.yaml": ["awq"],
        "prune.yaml": ["prune"],
        "wanda.yaml": ["wanda"],
        "distill.yaml": ["distill"],
        "student.yaml": ["student"],
        "pipeline.yaml": ["run", "rerun"],
        "sweep.yaml": ["sweep", "resweep"],
    },
    "data": {name: ["evaluate", "quantize", "prune", "distill", "fit"] for name in TEXTS},
    "checkpoint": {"x.ckpt": CHECKPOINT},
    "record": {
        "quantized/report.json": ["report", "further", "report"],
        "quantized/history.json": ["further", "export quantized", "compare", "report", "inspect quantized"],
        "model/history.json": ["quantize", "export", "refit"],
        "line/pipeline.json": ["rerun", "rerun --overwrite"],
        "line/01-narrow/report.json": ["rerun"],
        "line/02-quantize/history.json": ["rerun", "rerun --overwrite"],
        "grid/runs/base-s1.json": ["resweep"],
        "grid/runs/base-s1.yaml": ["resweep"],
        "grid/sweep.json": ["resweep"],
    },
}
NAMES = (*KINDS, "option")
PIXEL = base64.b64decode(
    b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@dataclasses.dataclass
class Case:
    """One mutation of the base and the command that reads it. `what` says it once `prepare` has run."""

    name: str
    seed: int
    what: str = ""

    def prepare(self, work: Path) -> list[str]:
        """Change the files in the working folder; returns the arguments of `espalier`."""
        in_this_process()
        kind = self.name.partition("/")[0]
        random = Random(f"{self.seed} {self.name}")
        if random.random() < 0.75:
            without_pictures()
        if kind == "valid":
            argv = command(list(COMMANDS)[int(self.name.partition("/")[2]) % len(COMMANDS)])
        elif kind == "option":
            argv, self.what = option(random)
        else:
            file = random.choice(list(KINDS[kind]))
            argv = command(random.choice(KINDS[kind][file]))
            if kind == "data":
                argv = [word.replace("text.txt", file) for word in argv]
                argv += [f"--data.source={file}"] if argv[0] == "fit" else []
            twice = random.choice([1, 1, 1, 2]) == 2
            changes = [change(random, work / file)]
            with contextlib.suppress(Exception):  # the second mutation may find a file that nothing can read
                changes += [change(random, work / file)] if twice else []
            self.what = f"{file}: {'; '.join(changes)}"
        shown = " ".join(word if len(word) < 100 else f"{word[:60]}..." for word in argv)
        self.what = f"{shown} | {self.what}"
        (work.resolve().parent / "what").write_text(self.what, encoding="utf-8", errors="replace")
        return argv


def command(words: str) -> list[str]:
    """`VERB [MODEL] [--flags]`: the arguments of a command, with another model in the place of `model`."""
    name, *rest = words.split()
    argv = list(COMMANDS[name])
    for word in rest:
        if word.startswith("--"):
            argv.append(word)
        elif name in ("validate", "predict", "refit"):
            argv += ["--ckpt_path", word]
        else:
            argv = [word if given == "model" else given for given in argv]
    return argv


def option(random: Random) -> tuple[list[str], str]:
    """A command with one option changed, left out, or given twice."""
    from recipes import cli

    argv = command(random.choice(list(COMMANDS)))
    options = cli.VERBS[argv[0]].options
    keys = dotted(FIT) if options is None else options_of(options)
    drawn = random.random()
    if drawn < 0.1:
        place = random.randrange(1, len(argv))
        return [*argv[:place], *argv[place + 1 :]], f"without {argv[place]}"
    value = random.choice(mutators.VALUES)
    text = value if isinstance(value, str) else json.dumps(value)
    if drawn < 0.2:
        place = random.randrange(1, len(argv))
        return [*argv[:place], text, *argv[place + 1 :]], f"{argv[place]} := {mutators.show(value)}"
    key = random.choice(list(keys))
    value = mutators.bearable(key, value)
    text = (value if isinstance(value, str) else json.dumps(value)).replace("\0", "")
    return [*argv, f"--{key}={text}"], f"--{key} := {mutators.show(value)}"


def options_of(options: type) -> list[str]:
    """The flags of a verb: its options, and those of the kinds that they name, beside them and below."""
    from recipes.commands.parser import short_forms
    from recipes.kinds import kinds

    found = [*(field.name for field in dataclasses.fields(options)), *short_forms(options)]
    for field in dataclasses.fields(options):
        for kind in kinds(field.metadata["registry"]) if field.metadata["registry"] else ():
            found += [f"{field.name}.kind", *(f"{field.name}.{one.name}" for one in kind.options)]
    return found


def dotted(tree: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted key."""
    found = {}
    for key, value in tree.items():
        inner = isinstance(value, dict) and before + key != "model.architecture"
        found |= dotted(value, f"{before}{key}.") if inner else {f"{before}{key}": value}
    return found


def change(random: Random, path: Path) -> str:
    """Change a file, or a file of a folder, as its ending calls for; rarely the file itself becomes something else."""
    if path.is_dir():
        path = random.choice(sorted(inner for inner in path.rglob("*") if inner.is_file()))
    if not path.is_file() or path.is_symlink():
        return "nothing"
    if random.random() < 0.04:
        return replaced(random, path)
    data = path.read_bytes()
    ending = path.suffix.removeprefix(".")
    if ending in ("json", "yaml") and random.random() < 0.8:
        try:
            tree = json.loads(data) if ending == "json" else yaml.safe_load(data)
        except (ValueError, yaml.YAMLError, RecursionError):  # the first of two mutations was one of the text
            tree = {}
        if b"*a0" in data:  # the first of two was an alias bomb, whose nodes are too many to be listed
            tree = {}
        tree, what = mutators.mutate_tree(random, tree)
        path.write_text(mutators.dump(tree, ending), encoding="utf-8", errors="surrogatepass")
        return what
    mutate: Callable[[Random, bytes], tuple[bytes, str]] = mutators.mutate_text
    if ending == "safetensors" and len(data) > 8:
        mutate = mutators.mutate_safetensors
    elif ending == "ckpt" and random.random() < 0.6:
        return checkpoint(random, path)
    elif ending in ("safetensors", "ckpt", "gz", "parquet", "arrow") or random.random() < 0.2:
        mutate = mutators.mutate_bytes
    elif ending in ("jsonl", "csv", "tsv") and random.random() < 0.5:
        mutate = table
    data, what = mutate(random, data)
    path.write_bytes(data)
    return what


def replaced(random: Random, path: Path) -> str:
    """Something else in the place of a file."""
    path.unlink()
    what = random.choice(["missing", "a folder", "a fifo", "a link to itself", "a dangling link", "endless zeros"])
    if what == "a folder":
        path.mkdir()
    elif what == "a fifo":
        os.mkfifo(path)
    elif what != "missing":
        target = {"a link to itself": path.name, "a dangling link": "nowhere", "endless zeros": "/dev/zero"}[what]
        path.symlink_to(target)
    return what


def table(random: Random, data: bytes) -> tuple[bytes, str]:
    """A table with one odd row, in JSON lines or with separators."""
    odd = {
        "an empty row": b"\n",
        "nested brackets": b"[" * 20_000 + b"]" * 20_000 + b"\n",
        "nested in a row": b'{"text": ' + b"[" * 20_000 + b"]" * 20_000 + b"}\n",
        "a null": b'{"id": 1, "text": null}\n',
        "a number for a text": b'{"id": 1, "text": 3}\n',
        "a list for a text": b'{"id": 1, "text": ["a", "b"]}\n',
        "another column": b'{"id": 1, "words": "a"}\n',
        "half a row": b'{"id": 1, "te\n',
        "a large number": b'{"id": ' + b"1" * 5000 + b', "text": "a"}\n',
        "a lone surrogate": b'{"id": 1, "text": "\\ud800"}\n',
        "an open quote": b'1,"never closed\n',
        "more columns": b"1,2,3,4,5,6\n1\t2\t3\t4\n",
        "NUL": b"1,\0\n",
        "missing values": b"1,NA\n2,null\n3,None\n1\tNA\n",
        "a long row": b"1," + b"word " * 200_000 + b"\n",
    }
    name = random.choice(list(odd))
    lines = data.splitlines(keepends=True)
    place = random.randrange(len(lines) + 1)
    return b"".join([*lines[:place], odd[name], *lines[place:]]), f"{name} before line {place + 1}"


def checkpoint(random: Random, path: Path) -> str:
    """A checkpoint with one changed value, written as torch writes it, or zipped anew."""
    import zipfile

    import torch

    if random.random() < 0.15:
        with zipfile.ZipFile(path) as old:
            content = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name, data in content.items():
                new.writestr(name, data)
        return "zipped anew, compressed"
    try:
        content = torch.load(path, weights_only=True)
    except Exception:
        return "nothing more"
    content, what = mutators.mutate_tree(random, content)
    torch.save(content, path)
    return what


class InThisProcess(concurrent.futures.Executor):
    """Runs what is submitted at once, so that a sweep needs no process that imports everything again."""

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future:
        future: concurrent.futures.Future = concurrent.futures.Future()
        try:
            future.set_result(task(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def in_this_process() -> None:
    """Let sweeps train in the process that was started for the case, read a small default corpus, warn of nothing."""
    from app.data import sources
    from recipes.commands import sweep

    sweep.pool_of = lambda parallel: InThisProcess()
    sources.python_corpus = sources.synthetic  # the default, where --data was left out, takes longer than a case may
    warnings.filterwarnings("ignore")


def without_pictures() -> None:
    """Leave the rendering out, which takes most of the time of a report; what is to be drawn is still put together."""
    from matplotlib.figure import Figure

    def savefig(figure: Figure, target: Any, **options: Any) -> None:
        if isinstance(target, io.StringIO):
            target.write("<svg></svg>")
        elif isinstance(target, Path):
            target.write_bytes(PIXEL)
        else:
            target.write(PIXEL)

    Figure.savefig = savefig
