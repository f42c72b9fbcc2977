"""Every quantization method at every number of bits on one model, as one table of quality, size and speed.

    python -m tests.benchmarks.quantization_table --model FOLDER --data SOURCE --out DIR [--only 'gptq*; nf4'] [...]

Each case is a run of `espalier quantize` into a folder of DIR; options that are not listed here go to all of them
(`--embedding_bits 8 --evaluation_blocks 64`). A finished folder is kept and an interrupted run goes on where it stood:
the same command again only does what is missing. Figures come from the folders' report.json.

Methods with a grid share it: at 8 bits one scale a row around zero, below it groups of 64 with a zero point.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from app.evaluation import formatting
from app.evaluation.report.overview import collect, warnings
from compress.quantization import METHODS
from tests.benchmarks.timing import say

GROUPS = {"group_size": 64, "symmetric": False}
GRIDS = {8: {"group_size": "channel", "symmetric": True}, 4: GROUPS, 3: GROUPS, 2: GROUPS}
PRODUCT = {
    "plain": {"weighted": False, "permuted": False},
    "weighted": {"weighted": True, "permuted": False},
    "full": {"weighted": True, "permuted": True, "residual": True, "tuning": "blocks"},
}
HEADINGS = ("method", "perplexity", "nats against dense", "bits a weight", "stored", "in memory", "decoding", "seconds")


@dataclass(frozen=True)
class Case:
    """One run of `espalier quantize`: what the table calls it, and its options."""

    name: str
    method: dict[str, Any]
    grid: dict[str, Any]

    @property
    def folder(self) -> str:
        """Its name as the name of a folder."""
        return re.sub(r"\W+", "-", self.name)

    def options(self) -> list[str]:
        """As the command line takes them."""
        named = {"method": self.method, **self.grid}
        return [part for key, value in named.items() for part in (f"--{key}", _plain(value))]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def cases() -> list[Case]:
    """What the table compares, in its order."""
    found = []
    grids = {
        "rtn": {"kind": "rtn"},
        "gptq": {"kind": "gptq"},
        "gptq without act_order": {"kind": "gptq", "act_order": False},
        "awq": {"kind": "awq"},
        "awq with gptq": {"kind": "awq", "solve": "gptq", "smallest": 1.0},
    }
    tables = {
        "squeezellm": {"kind": "squeezellm"},
        "squeezellm without outliers": {"kind": "squeezellm", "sensitive": 0.0, "outliers": 0.0},
    }
    for bits, grid in GRIDS.items():
        found += [Case(f"{name}, {bits} bits", method, {"bits": bits, **grid}) for name, method in grids.items()]
        if bits != 8:
            found += [Case(f"{name}, {bits} bits", method, {"bits": bits}) for name, method in tables.items()]
    for bits in (2, 1):
        for name, options in PRODUCT.items():
            form = {"bits": bits, "group_size": "tensor"}
            found.append(Case(f"product {name}, {bits} bits", {"kind": "product", **options}, form))
    found.append(Case("nf4", {"kind": "nf4"}, {}))
    found.append(Case("nf4, double quantization", {"kind": "nf4", "double_quantization": True}, {}))
    found.append(Case("int8", {"kind": "int8"}, {}))
    found.append(Case("int8, dynamic", {"kind": "int8", "activations": "dynamic"}, {}))
    return found


def quantize(case: Case, model: str, data: str, folder: Path, options: Sequence[str]) -> str:
    """Run one case, unless its folder is finished; returns why there is no result, or nothing."""
    if case.method["kind"] not in METHODS:
        return f"{case.name} is left out: there is no method {case.method['kind']}"
    if (folder / "report.json").exists():
        say(f"{case.name}: finished before")
        return ""
    command = [sys.executable, "-m", "recipes.cli", "quantize", model, "--data", data, "--out", str(folder)]
    done = subprocess.run([*command, *case.options(), *options], stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode == 0:
        return ""
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return f"{case.name} is left out: {last.removeprefix('espalier: error: ')}"


def bits_of(layers: Sequence[dict[str, Any]]) -> float | None:
    """Stored bits a weight over the quantized matrices of the blocks, with scales, tables and padding."""
    counted = [
        (layer["achieved"]["bits"], layer["shape"][0] * layer["shape"][1])
        for layer in layers
        if layer["name"].startswith("blocks.") and "bits" in layer["achieved"]
    ]
    weights = sum(count for _, count in counted)
    return sum(bits * count for bits, count in counted) / weights if weights else None


def row(name: str, block: dict[str, Any], report: dict[str, Any] | None = None) -> list[str]:
    """One line of the table: a model's block of a report, and where it is a result the report itself."""
    quality, size = block["quality"], block["size"]
    bounds = formatting.interval(quality["interval"]["perplexity"])
    cells = [name, f"{formatting.number(quality['perplexity'])} [{bounds}]"]
    sizes = [formatting.size(size["stored_bytes"]), formatting.size(size["memory_bytes"])]
    if report is None:
        return [*cells, "", "", *sizes, "", ""]
    change, speed = report["change"]["quality"], report["change"].get("speed", {})
    low, high = change["interval"]["loss"]
    decoding = speed.get("decode_tokens_per_second", {})
    between = formatting.interval(decoding.get("interval"))
    return [
        *cells,
        f"{change['loss']:+.4f} [{low:+.4f}, {high:+.4f}]" if formatting.known(low) else f"{change['loss']:+.4f}",
        formatting.number(bits_of(report["layers"]), 3),
        *sizes,
        f"{formatting.times(decoding.get('ratio'))}" + (f" [{between}]" if between != formatting.MISSING else ""),
        formatting.number(report["seconds"], 3),
    ]


def table(finished: dict[str, Path]) -> str:
    """The figures of finished folders, by the name of their case, as Markdown; what does not compare is said."""
    entries = collect(list(finished.values()))
    dense = [entry for entry in entries if entry.block is entry.report["before"]]
    results = [entry for entry in entries if entry.block is entry.report["after"]]
    rows = [row(f"dense ({entry.name})", entry.block) for entry in dense]
    rows += [row(name, entry.block, entry.report) for name, entry in zip(finished, results, strict=True)]
    lines = [f"| {' | '.join(cells)} |" for cells in (HEADINGS, ["---"] * len(HEADINGS), *rows)]
    notes = warnings(entries)
    if len(dense) > 1:
        notes.append("The folders come from more than one model.")
    return "\n".join(lines + (["", *notes] if notes else []))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.quantization_table", allow_abbrev=False)
    parser.add_argument("--model", required=True, help="the folder of the dense model")
    parser.add_argument("--data", required=True, help="a SOURCE with train and test splits")
    parser.add_argument("--out", required=True, type=Path, help="folder for the quantized models, one folder each")
    parser.add_argument("--only", default="*", help="names of cases, or patterns, separated by semicolons")
    chosen, options = parser.parse_known_args(argv)
    patterns = [pattern.strip() for pattern in chosen.only.split(";")]
    wanted = [case for case in cases() if any(fnmatchcase(case.name, pattern) for pattern in patterns)]
    if not wanted:
        parser.error(f"no case is called {chosen.only!r}; there are: {'; '.join(case.name for case in cases())}")
    chosen.out.mkdir(parents=True, exist_ok=True)
    finished, missing = {}, []
    for number, case in enumerate(wanted, 1):
        say(f"{number} of {len(wanted)}: {case.name}")
        folder = chosen.out / case.folder
        why = quantize(case, chosen.model, chosen.data, folder, options)
        if why:
            missing.append(why)
            say(why)
        else:
            finished[case.name] = folder
    if finished:
        print(table(finished))
    print("".join(f"\n{why}\n" for why in missing), end="")
    return 0 if finished else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
