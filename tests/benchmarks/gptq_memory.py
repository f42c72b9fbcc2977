"""Memory that GPTQ takes beside the model, on a Llama of 1B shape, as the depth doubles.

    python -m tests.benchmarks.gptq_memory [--layers 2,4] [--samples N] [--length N] [--threads N]

Layers as wide as those of Llama 3.2 1B (width 2048, 32 query and 8 key/value heads, feed-forward 8192), random weights
in bf16, a vocabulary of 4096, not 128,256, as GPTQ does not touch it. Each depth is a process of its own; counted
is the highest resident size while quantizing less that of the process with the model in it just before.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from app.evaluation import formatting
from app.memory import MATRICES_APART, keep_freed_memory
from compress.quantization.affine import IntFormat
from compress.quantization.methods.gptq import Gptq
from compress.quantization.plan import quantize_model
from models.checkpoint import skeleton
from models.transformer import Transformer
from tests.benchmarks.shapes import Shape

LLAMA_1B = {"width": 2048, "heads": 32, "kv_heads": 8, "feedforward": 8192, "vocabulary": 4096, "tied": True}
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since the last `CLEAR`."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def built(layers: int, length: int) -> Transformer:
    """The model in bf16, its matrices of size 0.02."""
    with torch.device("meta"):
        config = Shape(layers=layers, context=length, **LLAMA_1B).core().config
    model = skeleton(config).to(torch.bfloat16).to_empty(device="cpu").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1)
    return model


def measure(layers: int, samples: int, length: int, threads: int) -> dict[str, float]:
    """Bytes of the model, of what bounds the rest, and at most beside the model; seconds."""
    torch.set_num_threads(threads)
    keep_freed_memory(MATRICES_APART)  # as `espalier quantize` does
    model = built(layers, length)
    tokens = torch.randint(LLAMA_1B["vocabulary"], (samples, length))
    maps = [module for module in model.blocks[0].modules() if isinstance(module, nn.Linear)]
    before = resident("VmRSS")
    CLEAR.write_text("5")
    began = time.perf_counter()
    quantize_model(model, Gptq(IntFormat(4, 64)), [{"tokens": rows} for rows in tokens.split(2)])
    return {
        "layers": layers,
        "seconds": time.perf_counter() - began,
        "before": before,
        "extra": resident("VmHWM") - before,
        "block": sum(module.weight.nbytes for module in maps),
        "hessians": sum(4 * width**2 for width in (*(3 * [LLAMA_1B["width"]]), LLAMA_1B["feedforward"])),
        "activations": tokens.numel() * LLAMA_1B["width"] * 2,
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gptq_memory")
    parser.add_argument("--layers", default="2,4", help="depths, each a process")
    parser.add_argument("--samples", type=int, default=16, help="calibration blocks")
    parser.add_argument("--length", type=int, default=512, help="tokens of a block")
    parser.add_argument("--threads", type=int, default=2, help="threads that torch uses")
    options = parser.parse_args(argv)
    depths = [int(layers) for layers in options.layers.split(",")]
    if len(depths) == 1:
        print(json.dumps(measure(depths[0], options.samples, options.length, options.threads)))
        return 0
    columns = ("layers", "before", "extra", "block", "hessians", "activations", "seconds")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for depth in depths:
        numbers = ["--samples", options.samples, "--length", options.length, "--threads", options.threads]
        command = [sys.executable, "-m", "tests.benchmarks.gptq_memory", "--layers", depth, *numbers]
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        sizes = [formatting.size(found[name]) for name in columns[1:-1]]
        print(f"| {' | '.join([str(depth), *sizes, formatting.duration(found['seconds'])])} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
