"""GPTQ's time against llm-compressor's: the same weights, tokens and settings, taking turns.

    python -m tests.benchmarks.bench_gptq_peer --peer PYTHON [--shape small|1b] [--samples N] [--threads N]
                                               [--rounds N] [--cpu] [--out FILE]

PYTHON is the interpreter of an environment with llm-compressor, whose versions of torch and transformers are its own.
Both quantize to 4 bits in groups of 64 around zero on N x 256 tokens in batches of 16, the columns by the Hessian's
diagonal, groups static, damping 0.01, blocks of 128, in fp32. Loading is not counted. `small` is a Llama of 5.5M
parameters; `1b` has two layers as wide as those of Llama 3.2 1B and a vocabulary of 4096: GPTQ leaves that alone.
"""

import argparse
import copy
import functools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy
import torch
from torch import nn

from app.memory import MATRICES_APART, keep_freed_memory
from compress.quantization.affine import IntFormat
from compress.quantization.methods.gptq import Gptq
from compress.quantization.plan import quantize_model
from models.families import export_folder
from tests.benchmarks.shapes import Shape
from tests.benchmarks.timing import say, table, take_turns, time_row

SHAPES = {
    "small": Shape(kv_heads=2, tied=True, feedforward=704),  # the peer wants whole groups
    "1b": Shape(layers=2, width=2048, heads=32, kv_heads=8, feedforward=8192, tied=True),
}
LENGTH, BATCH = 256, 16
FORMAT = IntFormat(4, 64, symmetric=True)
OURS = "4 bits, groups of 64"


class Peer:
    """The other process: it quantizes once for every request."""

    def __init__(self, python: str, folder: Path, tokens: Path, threads: int) -> None:
        script = Path(__file__).with_name("llmcompressor_gptq.py")
        command = [python, str(script), str(folder), str(tokens), str(BATCH), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def versions(self) -> dict[str, str]:
        return self._ask("versions")

    def quantize(
        self, format: IntFormat, samples: int, act_order: str | None = "static", out: Path | None = None
    ) -> list[float]:
        """[seconds, CPU seconds] for the first `samples` rows; the dequantized weights go to the safetensors `out`."""
        asked = {"samples": samples, "bits": format.bits, "group": format.group_size, "act_order": act_order}
        return self._ask(json.dumps(asked | {"out": out and str(out)}))

    def _ask(self, line: str) -> object:
        """Send a line; what it prints of itself beside the answer is passed over."""
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        for answer in self.process.stdout:
            try:
                return json.loads(answer)
            except json.JSONDecodeError:
                continue
        raise SystemExit(f"llm-compressor ended with status {self.process.wait()}")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_gptq_peer")
    parser.add_argument("--peer", required=True, help="Python of an environment with llm-compressor")
    parser.add_argument("--shape", choices=list(SHAPES), default="small", help="width of the layers")
    parser.add_argument("--samples", type=int, default=128, help="calibration rows, in whole batches")
    parser.add_argument("--threads", type=int, default=2, help="threads that torch uses, in both")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    parser.add_argument("--cpu", action="store_true", help="count CPU seconds: with one thread, on a busy machine")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    keep_freed_memory(MATRICES_APART)  # as `espalier quantize` does
    shape = SHAPES[options.shape]
    model = shape.core().eval()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(shape.vocabulary, (options.samples, LENGTH), generator=generator)
    batches = [{"tokens": rows} for rows in tokens.split(BATCH)]

    def ours(samples: int) -> float:
        changed = copy.deepcopy(model)
        began, used = time.perf_counter(), time.process_time()
        quantize_model(changed, Gptq(FORMAT), batches[: samples // BATCH])
        return (time.perf_counter() - began, time.process_time() - used)[options.cpu]

    with tempfile.TemporaryDirectory() as place:
        folder, file = Path(place) / "model", Path(place) / "tokens.npy"
        export_folder(model, folder)
        numpy.save(file, tokens.numpy())
        peer = Peer(options.peer, folder, file, options.threads)
        versions = peer.versions()
        say(f"against {versions}")
        name = f"llm-compressor {versions['llmcompressor']}"
        cases = {name: lambda samples: peer.quantize(FORMAT, samples)[options.cpu], OURS: ours}
        for case, call in cases.items():
            say(f"{case}: {call(BATCH):.1f} s with {BATCH} samples, to warm up")
        timed = {case: functools.partial(call, options.samples) for case, call in cases.items()}
        seconds = take_turns("gptq", timed, rounds=options.rounds, warmup=0)
        say(f"seconds: {seconds}")
        peer.close()
    weights = sum(module.weight.numel() for module in model.blocks.modules() if isinstance(module, nn.Linear))
    settings = f"{options.samples} x {LENGTH} tokens, {weights / 1e6:.2f}M weights, {options.threads} threads"
    unit = f"{'CPU ' if options.cpu else ''}s per 1M weights"
    rows = [time_row("gptq", name, seconds, weights / 1e6, unit, note=f"{settings}, {versions}")]
    rows.append(time_row("gptq", OURS, seconds, weights / 1e6, unit, peer=name, note=rows[0].note))
    if options.out:
        options.out.write_text(json.dumps([row.to_dict() for row in rows], indent=1) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
