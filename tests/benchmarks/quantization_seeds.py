"""Mixed bits against uniform ones, and training at two bits against mere further training, over several trainings.

    python -m tests.benchmarks.quantization_seeds [--seeds 3]

The model is that of the tests of an order (`tests/conftest.py`), trained anew from each seed, which also draws its
calibration text. Changes of the loss in nats per token on held-out text, with the paired 95 % interval over documents.

Mixed bits: those of `allocate` at no more bytes than 3 bits in groups of 64 take, against 3 bits everywhere.

Training at two bits: GPTQ at 2 bits in groups of 64, then 60 steps of distillation from the original with the weights
rounded in every forward pass. The control has the same 60 steps of the same loss in full precision, then the same GPTQ.
"""

import argparse
import copy
import sys
import tempfile
from pathlib import Path

import torch

from app.data.blocks import token_blocks
from app.data.tokenizer import train_tokenizer
from app.evaluation.quality import Part, evaluate_quality, paired
from compress.distillation.losses import Combine, parse_losses
from compress.distillation.objective import Objective
from compress.quantization import Gptq, Rtn
from compress.quantization.grid import IntFormat
from compress.quantization.plan import quantize_model
from compress.quantization.qat import pack_again, unpack
from models.config import ModelConfig
from models.transformer import Transformer
from tests.benchmarks.timing import say
from tests.compress.test_allocation import mixed_against_uniform
from tests.conftest import ARCHITECTURE, HIGHEST_RATE, LENGTH, ROWS, STEPS, Trained, _corpus, train_steps

FURTHER, RATE = 60, 2e-3
TWO_BITS = Gptq(IntFormat(2, 64, False))


def trained(seed: int, cache: Path) -> Trained:
    """The model of one seed, as `tests/conftest.py` trains that of seed 0."""
    corpus = _corpus()
    tokenizer = train_tokenizer((document.text for document in corpus.documents("train")), ARCHITECTURE["vocab_size"])
    train, test = (token_blocks(corpus, tokenizer, split, LENGTH, cache_dir=cache) for split in ("train", "test"))
    torch.manual_seed(seed)
    model = Transformer(ModelConfig.from_dict(ARCHITECTURE))
    train_steps(model, train, STEPS, HIGHEST_RATE, lambda batch: model(**batch).loss)
    calibration = token_blocks(corpus, tokenizer, "train", LENGTH, samples=64, seed=1 + seed, cache_dir=cache)
    return Trained(model.eval(), train, list(calibration.batches(ROWS)), Part.spread(test, 200))


def at_two_bits(found: Trained) -> dict[str, str]:
    """The rows about training at two bits, by what they compare."""

    def distil(student: Transformer) -> None:
        objective = Objective(parse_losses(["logit"]), Combine(alpha=0.2), student.config, found.model.config)
        both = torch.nn.ModuleList([student.train().requires_grad_(True), objective])
        found.fit(both, FURTHER, RATE, lambda batch: objective(student, found.model, batch)["total"])

    def quality(model: Transformer):
        return evaluate_quality(model.eval(), found.held_out)

    dense = quality(found.model)
    student = copy.deepcopy(found.model)
    quantize_model(student, TWO_BITS, found.calibration)
    start = quality(student)
    unpack(student)
    distil(student)
    pack_again(student)
    control = copy.deepcopy(found.model)
    distil(control)
    further = quality(control)
    quantize_model(control, TWO_BITS, found.calibration)
    after, same = quality(student), quality(control)
    pairs = {
        "GPTQ, 2 bits, against the original": (dense, start),
        "further training in full precision, against the original": (dense, further),
        "further training, then GPTQ, against GPTQ": (start, same),
        "trained at 2 bits, against GPTQ": (start, after),
        "trained at 2 bits, against further training, then GPTQ": (same, after),
    }
    return {name: shown(paired(*pair)) for name, pair in pairs.items()}


def shown(found) -> str:
    return f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.quantization_seeds", allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=3, help="how many trainings")
    options = parser.parse_args(argv)
    print("| seed | comparison | change |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as cache:
        for seed in range(options.seeds):
            say(f"seed {seed}: training")
            found = trained(seed, Path(cache))
            measured, rest = found.calibration[3:], found.calibration[:3]
            rows = {}
            for kind in (Rtn, Gptq):
                pair = mixed_against_uniform(found.model, found.held_out, measured, rest, kind=kind)
                rows[f"mixed bits against 3 bits, {kind.kind}"] = shown(pair)
            rows |= at_two_bits(found)
            for name, change in rows.items():
                print(f"| {seed} | {name} | {change} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
