"""`make bench`: every benchmark in one process each after the other, one table, and `results.json` beside this file.

python -m tests.benchmarks [--only NAME,NAME] [--threads N] [--out FILE]
"""

import argparse
import json
import os
import sys
import time
import warnings
from datetime import date
from pathlib import Path

import torch

from app.evaluation.environment import environment
from app.memory import keep_freed_memory
from tests.benchmarks import (
    bench_attention,
    bench_attention_peers,
    bench_decode,
    bench_experts,
    bench_gptq,
    bench_lightning,
    bench_projection,
    bench_training,
)
from tests.benchmarks.timing import say, table

BENCHMARKS = {
    "training": bench_training.run,
    "lightning": bench_lightning.run,
    "decode": bench_decode.run,
    "experts": bench_experts.run,
    "gptq": bench_gptq.run,
    "attention": bench_attention.run,
    "peers": bench_attention_peers.run,
    "projection": bench_projection.run,
}
RESULTS = Path(__file__).parent / "results.json"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="which benchmarks, separated by commas")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads that torch uses")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the figures go as JSON")
    options = parser.parse_args(argv)
    chosen = options.only.split(",")
    if unknown := [name for name in chosen if name not in BENCHMARKS]:
        parser.error(f"there is no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    keep_freed_memory()  # as `espalier fit` does; for everybody in this process
    busy = os.getloadavg()[0]
    if busy > 0.5:
        say(f"The machine is busy (load {busy:.1f}): the ratios hold, the rates are lower than on an idle one.")
    rows, began = [], time.perf_counter()
    for name in chosen:
        rows += BENCHMARKS[name]()
    found = {
        "date": date.today().isoformat(),
        "command": "python -m tests.benchmarks" + "".join(f" {argument}" for argument in argv),
        "seconds": round(time.perf_counter() - began),
        "load_before": busy,
        "environment": environment(),
        "rows": [row.to_dict() for row in rows],
    }
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(rows))
    if "attention" in chosen:
        print(f"\n{bench_attention.grid(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
