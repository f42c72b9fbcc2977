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

from app.evaluation.quality import evaluate_quality, paired
from compress.distillation.losses.loss import Combine, parse_losses
from compress.distillation.objective import Objective
from compress.quantization import Gptq, Rtn
from compress.quantization.affine import IntFormat
from compress.quantization.plan import quantize_model
from compress.quantization.qat import pack_again, unpack
from models.transformer import Transformer
from tests.benchmarks.timing import say
from tests.compress.test_allocation import mixed_and_uniform
from tests.conftest import Trained, load_decoder, train_decoder

FURTHER, RATE = 60, 2e-3
TWO_BITS = Gptq(IntFormat(2, 64, False))


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
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            say(f"seed {seed}: training")
            place, cache = Path(folder) / f"seed-{seed}", Path(folder) / "cache"
            train_decoder(place, cache, seed)
            found = load_decoder(place, cache, seed)
            measured, rest = found.calibration[3:], found.calibration[:3]
            rows = {}
            for kind in (Rtn, Gptq):
                mixed, uniform = mixed_and_uniform(found.model, measured, rest, kind=kind)
                pair = (evaluate_quality(model, found.held_out) for model in (uniform, mixed))
                rows[f"mixed bits against 3 bits, {kind.kind}"] = shown(paired(*pair))
            rows |= at_two_bits(found)
            for name, change in rows.items():
                print(f"| {seed} | {name} | {change} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
