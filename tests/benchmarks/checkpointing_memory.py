"""Memory of one training step by activation checkpointing, as the depth doubles.

    python -m tests.benchmarks.checkpointing_memory [--layers 2,4,8] [--rows N] [--length N]

Width 256, feed-forward 688, a vocabulary of 512, fp32. Each case is a process of its own; counted is the highest
resident size in a second step less that before it: the gradients of the weights are there since the first.
"""

import argparse
import json
import subprocess
import sys

import torch

from app.activation_checkpointing import CheckpointBlocks, CheckpointOperations
from tests.benchmarks.gptq_memory import CLEAR, resident
from tests.benchmarks.shapes import Shape

POLICIES = {"none": None, "blocks": CheckpointBlocks, "operations": CheckpointOperations}


def measure(layers: int, rows: int, length: int, policy: str) -> int:
    """Bytes at most beside weights and gradients."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = Shape(layers=layers, width=256, heads=4, kv_heads=4, feedforward=688, vocabulary=512, context=length)
    model = shape.core().train()
    if POLICIES[policy] is not None:
        POLICIES[policy]().apply(model, compiled=False)
    tokens = torch.randint(512, (rows, length))

    def step() -> None:
        model(tokens, targets=tokens).loss.backward()

    step()
    before = resident("VmRSS")
    CLEAR.write_text("5")
    step()
    return resident("VmHWM") - before


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", default="2,4,8,16")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--one", help="for itself: depth and policy of one case")
    options = parser.parse_args(argv)
    if options.one:
        depth, policy = options.one.split(",")
        print(json.dumps(measure(int(depth), options.rows, options.length, policy)))
        return 0
    print("| layers | " + " | ".join(f"{name}, MB" for name in POLICIES) + " |\n|" + "---|" * (len(POLICIES) + 1))
    for depth in options.layers.split(","):
        found = []
        for policy in POLICIES:
            command = [sys.executable, "-m", "tests.benchmarks.checkpointing_memory", "--one", f"{depth},{policy}"]
            command += ["--rows", str(options.rows), "--length", str(options.length)]
            found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(f"| {depth} | " + " | ".join(f"{value / 1e6:,.0f}" for value in found) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
