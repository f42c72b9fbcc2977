"""What compression costs in perplexity, beside llm-compressor's figures for the same size of model, text and settings.

    python -m tests.benchmarks.wikitext_compression --data FOLDER [--tokens N] [--weights FILE] [--peer PYTHON]
                                                    [--out FILE]

A Llama of 5.4M parameters (6 layers, width 256, 4 query and 2 key/value heads, feed-forward 688, vocabulary 4096, tied)
is trained on N tokens of the text, then compressed in each way from the same weights; perplexity is over the whole test
split in windows of 256 tokens, documents run together as in the peer's run. Compression sees 128 x 256 tokens of the
training split. Only relative changes compare: the peer's base model is another one (perplexity 51.93).

With the interpreter of an environment with llm-compressor as --peer, the two GPTQs take the same base model on the same
tokens instead, in fp32, with and without the order of the columns by the Hessian; the peer's dequantized weights are
evaluated here.
"""

import argparse
import copy
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor

from app.data.packing import TokenBlocks, token_blocks
from app.data.sources import open_source
from app.data.tokenizer import Tokenizer, train_tokenizer
from app.evaluation.quality import evaluate_quality
from app.optim import AdamW, Cosine
from app.tasks.compile import CompileBlocks
from app.tasks.gradients import scale_and_clip
from app.tasks.precision import call_in
from compress.pruning.patterns import PATTERNS
from compress.pruning.sparsify import sparsify
from compress.quantization.affine import IntFormat
from compress.quantization.methods.gptq import Gptq
from compress.quantization.methods.rtn import Rtn
from compress.quantization.plan import quantize_model
from models.families import export_folder, import_folder
from models.transformer import Transformer
from tests.benchmarks.bench_gptq_peer import Peer
from tests.benchmarks.shapes import Shape
from tests.benchmarks.timing import say

SHAPE = Shape(kv_heads=2, tied=True)
ROWS, LENGTH, SAMPLES = 16, 256, 128
PEER_BASE = 51.93
PEER = {  # perplexities of llm-compressor 0.14
    "RTN, 4 bits": 52.11,
    "GPTQ, 4 bits": 51.98,
    "RTN, 3 bits": 52.91,
    "GPTQ, 3 bits": 52.12,
    "magnitude, 50 %": 53.59,
    "Wanda, 50 %": 53.56,
    "SparseGPT, 50 %": 52.41,
    "magnitude, 2:4": 56.14,
    "Wanda, 2:4": 55.78,
}

Batches = list[dict[str, Tensor]]


def methods(calibration: Batches) -> dict[str, Callable[[Transformer], object]]:
    """What is done to a copy of the model; Wanda compares within a row, the others within a layer, as in the peer."""

    def quantize(method) -> Callable[[Transformer], object]:
        return lambda model: quantize_model(model, method, calibration)

    def prune(criterion: str, pattern: str, sparsity: float | None) -> Callable[[Transformer], object]:
        scope = None if sparsity is None else "row" if criterion == "wanda" else "layer"
        chosen = PATTERNS.parse(pattern, "pattern").given(sparsity, scope)
        return lambda model: sparsify(model, criterion, chosen, calibration)

    formats = {bits: IntFormat(bits, "channel", scale_dtype="float32") for bits in (4, 3)}
    return {
        **{f"RTN, {bits} bits": quantize(Rtn(format)) for bits, format in formats.items()},
        **{f"GPTQ, {bits} bits": quantize(Gptq(format)) for bits, format in formats.items()},
        "magnitude, 50 %": prune("magnitude", "unstructured", 0.5),
        "Wanda, 50 %": prune("wanda", "unstructured", 0.5),
        "SparseGPT, 50 %": prune("sparsegpt", "unstructured", 0.5),
        "magnitude, 2:4": prune("magnitude", "2:4", None),
        "Wanda, 2:4": prune("wanda", "2:4", None),
        "SparseGPT, 2:4": prune("sparsegpt", "2:4", None),
    }


class Plain:
    """Blocks as a sequence of rows whose documents run together."""

    def __init__(self, blocks: TokenBlocks) -> None:
        blocks.cross_documents = True
        self.blocks, self.bytes_per_token = blocks, blocks.bytes_per_token

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.blocks[index]

    def batches(self, rows: int) -> Batches:
        return list(self.blocks.batches(rows))


def train(model: Transformer, blocks: Plain, steps: int) -> None:
    """AdamW 2e-3, cosine with 5 % warm-up, bf16 with fp32 master weights."""
    CompileBlocks().apply(model)
    optimizer = AdamW(lr=2e-3).build(model)
    schedule = Cosine(warmup_steps=max(1, steps // 20)).build(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    order = torch.cat(
        [torch.randperm(len(blocks), generator=generator) for _ in range(1 + steps * ROWS // len(blocks))]
    )
    began = time.perf_counter()
    for step in range(steps):
        batch = blocks.blocks.batch(order[step * ROWS : (step + 1) * ROWS].tolist())
        loss = call_in(torch.bfloat16, model, batch["tokens"], targets=batch["targets"]).loss
        loss.backward()
        scale_and_clip(model.parameters(), torch.tensor(1.0), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 50 == 49:
            left = (time.perf_counter() - began) / (step + 1) * (steps - step - 1)
            say(f"step {step + 1} of {steps}: loss {loss.item():.3f}, {left:.0f} s left")


def trained(data: str, tokenizer: Tokenizer, tokens: int, weights: Path | None) -> Transformer:
    """The base model: from `weights` where that file exists, trained (and kept there) otherwise."""
    model = SHAPE.core()
    if weights is not None and weights.exists():
        load_model(model, weights)
        return model.eval()
    train(model, Plain(token_blocks(data, tokenizer, "train", LENGTH)), tokens // (ROWS * LENGTH))
    if weights is not None:
        save_model(model, str(weights))
    plain = SHAPE.core()
    plain.load_state_dict(model.state_dict())
    return plain.eval()


def beside_peer(python: str, model: Transformer, calibration: Batches, test: Plain, base: float) -> dict[str, dict]:
    """Both GPTQs from one base model: case -> perplexities, and the share of the weights on which they agree."""
    tokens = torch.cat([batch["tokens"] for batch in calibration])
    rows = {}
    print("| GPTQ | ours | change | llm-compressor | change | equal weights |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        folder, theirs, file = Path(place) / "base", Path(place) / "theirs", Path(place) / "tokens.npy"
        export_folder(model, folder)
        shutil.copytree(folder, theirs)
        numpy.save(file, tokens.numpy())
        peer = Peer(python, folder, file, torch.get_num_threads())
        say(f"against {peer.versions()}")
        for bits, order in ((3, "static"), (3, None), (4, "static")):
            format = IntFormat(bits, "channel", scale_dtype="float32")
            changed = copy.deepcopy(model)
            quantize_model(changed, Gptq(format, act_order=order is not None), calibration)
            peer.quantize(format, len(tokens), order, theirs / "model.safetensors")
            other = import_folder(theirs)
            ours, lost = (evaluate_quality(one, test).loss.value for one in (changed, other))
            row = {"ours": math.exp(ours), "change": math.expm1(ours - base)}
            row |= {"peer": math.exp(lost), "peer_change": math.expm1(lost - base), "equal": agreement(changed, other)}
            name = f"{bits} bits, {'by the Hessian' if order else 'in the given order'}"
            rows[name] = row
            shown = f"{row['ours']:.3f} | {row['change']:+.2%} | {row['peer']:.3f} | {row['peer_change']:+.2%}"
            print(f"| {name} | {shown} | {row['equal']:.2%} |", flush=True)
        peer.close()
    return rows


def agreement(ours: Transformer, theirs: Transformer) -> float:
    """Share of the weights of the blocks that are the same but for the rounding of a product in fp32."""
    equal = total = 0
    for name, module in theirs.blocks.named_modules():
        if isinstance(module, torch.nn.Linear):
            dense = ours.blocks.get_submodule(name).dequantize().float()  # (N, K)
            equal += torch.isclose(dense, module.weight.float(), rtol=1e-4, atol=1e-7).sum().item()
            total += dense.numel()
    return equal / total


def alone(model: Transformer, calibration: Batches, test: Plain, base: float) -> dict[str, dict]:
    """Every method from the base model, whose loss on the test split is `base`, beside the peer's published change."""
    rows = {}
    print("| method | perplexity | change | llm-compressor's change | seconds |\n|---|---|---|---|---|")
    for name, compress in methods(calibration).items():
        changed = copy.deepcopy(model)
        began = time.perf_counter()
        compress(changed)
        seconds = time.perf_counter() - began
        loss = evaluate_quality(changed, test).loss.value
        change, peer = math.expm1(loss - base), PEER.get(name, math.nan) / PEER_BASE - 1  # nan: no figure of theirs
        rows[name] = {"perplexity": math.exp(loss), "change": change, "peer_change": peer, "seconds": seconds}
        print(
            f"| {name} | {math.exp(loss):.2f} | {change:+.2%} | {peer:+.2%} | {seconds:.1f} |",
            flush=True,
        )
    return rows


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.wikitext_compression")
    parser.add_argument(
        "--data", required=True, help="a SOURCE with train and test splits, such as a WikiText-2 folder"
    )
    parser.add_argument("--tokens", type=int, default=4_500_000, help="tokens that the base model is trained on")
    parser.add_argument("--weights", type=Path, help="safetensors file that keeps the base model between runs")
    parser.add_argument("--peer", help="Python of an environment with llm-compressor")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args(argv)
    tokenizer = train_tokenizer((d.text for d in open_source(options.data).documents("train")), SHAPE.vocabulary)
    model = trained(options.data, tokenizer, options.tokens, options.weights)
    calibration = Plain(token_blocks(options.data, tokenizer, "train", LENGTH, samples=SAMPLES)).batches(ROWS)
    test = Plain(token_blocks(options.data, tokenizer, "test", LENGTH))
    base = evaluate_quality(model, test).loss.value
    print(f"base: perplexity {math.exp(base):.2f} ({model.count_parameters()['total']:,} parameters)")
    if options.peer:
        rows = beside_peer(options.peer, model, calibration, test, base)
    else:
        rows = alone(model, calibration, test, base)
    if options.out:
        options.out.write_text(json.dumps({"base": math.exp(base), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
