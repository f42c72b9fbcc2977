"""`python -m tests.fuzz --count 3000 [--seed 0] [--kind config,data]`: counts by kind and verdict.

`python -m tests.fuzz --case config/17 [--seed 0]` runs one case again and shows what it did.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg", "ESPALIER_DEBUG": ""}

from . import base, cases, runner


def preload() -> None:
    """Import what the verbs need, once and in the process that forks; nothing is run in it."""
    import importlib
    import io

    import attrs  # noqa: F401
    import datasets  # noqa: F401
    import scipy.io  # noqa: F401
    import torch
    from matplotlib.figure import Figure

    from recipes import cli

    for verb in cli.VERBS.values():
        importlib.import_module(verb.target.partition(":")[0])
    torch.set_num_threads(1)
    figure = Figure()
    figure.add_subplot().set_title("fonts are read once")
    for form in ("png", "svg"):
        figure.savefig(io.BytesIO(), format=form)


def make_base(folder: Path) -> Path:
    """Make the base in a forked child, unless it is there; returns its folder."""
    place = folder / "base"
    if place.is_dir():
        return place
    temporary = folder / "case"  # where every case runs: some files hold paths
    shutil.rmtree(temporary, ignore_errors=True)
    for name in ("work", "cache"):
        (temporary / name).mkdir(parents=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.environ["ESPALIER_CACHE"] = str(temporary / "cache")
            os.chdir(temporary / "work")
            with (temporary / "said").open("w") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
            base.make(Path())
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"the base could not be made:\n{(temporary / 'said').read_text()[-3000:]}")
    temporary.rename(place)
    return place


def run(name: str, seed: int, place: Path, folder: Path) -> tuple[runner.Verdict, str]:
    """Run one case; returns its verdict and what it changed."""
    own = folder / "case"
    verdict = runner.run(cases.Case(name, seed).prepare, place, own)
    what = own / "what"
    return verdict, what.read_text(encoding="utf-8", errors="replace") if what.exists() else "?"


def names(count: int, kinds: list[str]) -> Iterator[str]:
    """`count` names, the kinds in turns."""
    for number in range(count):
        yield f"{kinds[number % len(kinds)]}/{number // len(kinds)}"


def serve(folder: Path) -> None:
    """Read `NAME SEED` on stdin and answer each with a line of JSON."""
    place = make_base(folder)
    for line in sys.stdin:
        name, seed = line.split()
        verdict, what = run(name, int(seed), place, folder)
        print(json.dumps({"kind": verdict.kind, "evidence": verdict.evidence, "what": what}), flush=True)


def measure(chosen: list[str], seed: int, folder: Path, log: Path | None) -> None:
    """Run cases and print a table: a row for each kind of case, a column for each verdict."""
    place = make_base(folder)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    started = time.monotonic()
    for done, name in enumerate(chosen, start=1):
        verdict, what = run(name, seed, place, folder)
        counts[name.partition("/")[0]][verdict.kind] += 1
        if log is not None:
            row = {"case": name, "seed": seed, "kind": verdict.kind, "evidence": verdict.evidence, "what": what}
            row |= {"seconds": round(verdict.seconds, 2), "megabytes": round(verdict.megabytes)}
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if not verdict.good:
            print(f"{name} (seed {seed}): {verdict.kind}\n  {what}\n  {verdict.evidence}", flush=True)
        if done % 100 == 0:
            print(f"{done} of {len(chosen)}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    columns = ["kind of case", "cases", *runner.KINDS]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for kind in [*counts, "all"]:
        own = counts[kind] if kind != "all" else sum((counts[one] for one in counts), Counter())
        print(f"| {kind} | {own.total()} | " + " | ".join(str(own[verdict]) for verdict in runner.KINDS) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="number of cases, over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", default=",".join(cases.NAMES), help=f"comma-separated: {', '.join(cases.NAMES)}")
    parser.add_argument("--case", help="run this one, or several, comma-separated")
    parser.add_argument("--folder", type=Path, help="where the base is kept between calls")
    parser.add_argument("--log", type=Path, help="append a line of JSON for each case to this file")
    parser.add_argument("--serve", action="store_true", help="read names and seeds on stdin")
    chosen = parser.parse_args()
    preload()
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="espalier-fuzz-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if chosen.serve:
            serve(folder.resolve())
        elif chosen.case:
            for name in chosen.case.split(","):
                verdict, what = run(name, chosen.seed, make_base(folder.resolve()), folder.resolve())
                used = f"{verdict.seconds:.1f} s, {verdict.megabytes:.0f} MB"
                print(f"{name} (seed {chosen.seed}): {verdict.kind}, {used}")
                print(f"  {what}\n  {verdict.evidence}")
        else:
            measure(list(names(chosen.count, chosen.kind.split(","))), chosen.seed, folder.resolve(), chosen.log)
    finally:
        if chosen.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
