"""Cached greedy decoding against `generate` of `transformers`, the same weights in both; and of packed weights.

A random Llama is saved by `transformers` and imported through the family reader. One round reads the prompts and then
generates; no stop token, so that both produce every token. In fp32 both must produce the same ones.

Packed weights: a Llama too large for any cache, in every stored form that has a kernel, and in two that have none,
against the dense model in bf16 and in fp32. Timed are the tokens after the first, so without the prompt.
"""

import contextlib
import copy
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import LlamaForCausalLM

from app.evaluation.size import held_bytes, holders
from compress.quantization.affine import IntFormat
from compress.quantization.kernels.int8 import Dynamic
from compress.quantization.methods.fp8 import Fp8
from compress.quantization.methods.int8 import Int8
from compress.quantization.methods.nf4 import Nf4
from compress.quantization.methods.rtn import Rtn
from compress.quantization.plan import quantize_model
from models.families import import_folder
from models.generation import generate, stream
from models.transformer import Transformer
from tests.benchmarks.shapes import Shape
from tests.benchmarks.timing import Row, rate_row, take_turns

NAME = "decode"
PACKED = "packed"
LARGE = Shape(layers=24, width=1024, heads=16, kv_heads=16, feedforward=2816, vocabulary=32000, context=256)
INT8 = Rtn(IntFormat(8, "channel"))
FORMS = {  # of the linear maps, and of embedding and head
    "int4, groups of 128": (Rtn(IntFormat(4, 128)),) * 2,
    "int8, channel": (INT8, INT8),
    "NF4": (Nf4(), Nf4()),
    "8-bit weights and inputs": (Int8(Dynamic()), INT8),
    "int4 unpacked": (Rtn(IntFormat(4, 128, scale_dtype="float32")),) * 2,  # the kernels know no such scales
    "fp8 unpacked": (Fp8("none"), INT8),
}


@dataclass(frozen=True)
class PackedDecoding:
    """Settings: `batches` as (sequences, new tokens of each), after prompts of `prompt` tokens."""

    shape: Shape = LARGE
    batches: tuple[tuple[int, int], ...] = ((1, 9), (8, 5), (64, 3))
    prompt: int = 4
    rounds: int = 5
    forms: tuple[str, ...] = tuple(FORMS)


@dataclass(frozen=True)
class Decoding:
    """Settings: `new` tokens after prompts of `prompt` tokens, for every batch size."""

    shape: Shape = field(default_factory=Shape)
    batches: tuple[int, ...] = (1, 8)
    prompt: int = 64
    new: int = 128
    rounds: int = 9
    packed: PackedDecoding = field(default_factory=PackedDecoding)


def run(settings: Decoding | None = None) -> list[Row]:
    """Rows of both parts."""
    settings = settings or Decoding()
    return [*peer_rows(settings), *packed_rows(settings.packed)]


def peer_rows(settings: Decoding) -> list[Row]:
    """New tokens/s for each batch size and precision."""
    rows = []
    for dtype, label in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        core, peer = both(settings.shape, dtype)
        for batch in settings.batches:
            prompts = torch.randint(1, settings.shape.vocabulary, (batch, settings.prompt))  # (B, T)
            cases: dict[str, Callable[[], None]] = {
                f"transformers, {label}, batch {batch}": partial(_discard, theirs, peer, prompts, settings.new),
                f"core, {label}, batch {batch}": partial(_discard, ours, core, prompts, settings.new),
            }
            seconds = take_turns(NAME, cases, rounds=settings.rounds, warmup=1)
            theirs_case, ours_case = cases
            note = f"greedy, prompt {settings.prompt}, {settings.new} new tokens, prompt included, {settings.shape}"
            work = batch * settings.new
            rows.append(rate_row(NAME, theirs_case, seconds, work, "tokens/s", note=note))
            rows.append(rate_row(NAME, ours_case, seconds, work, "tokens/s", peer=theirs_case, note=note))
    return rows


def packed_rows(settings: PackedDecoding) -> list[Row]:
    """New tokens/s and bytes of every form, against both dense models."""
    dense = settings.shape.core().bfloat16().eval()
    models = {"bf16": dense, "fp32": copy.deepcopy(dense).float()}
    models |= {form: packed(dense, *FORMS[form]) for form in settings.forms}
    rows = []
    for batch, new in settings.batches:
        prompts = torch.randint(1, settings.shape.vocabulary, (batch, settings.prompt)).tolist()
        cases = {f"{form}, batch {batch}": partial(further, model, prompts, new) for form, model in models.items()}
        seconds = take_turns(PACKED, cases, rounds=settings.rounds, warmup=1)
        note = f"in bf16 but for fp32, greedy, the tokens after the first, {settings.shape}"
        for case in cases:
            for peer in _peers(case, batch):
                rows.append(rate_row(PACKED, case, seconds, batch * (new - 1), "tokens/s", peer=peer, note=note))
    sizes = {form: sum(held_bytes(module) for _, module in holders(model)) / 1e6 for form, model in models.items()}
    for form, size in sizes.items():
        against = ("", None) if form == "bf16" else ("bf16, weights", sizes["bf16"] / size)
        note = "weights as they are held; the ratio says how many times smaller"
        rows.append(Row(PACKED, f"{form}, weights", size, size, size, "MB", *against, note=note))
    return rows


def _peers(case: str, batch: int) -> tuple[str, ...]:
    """The dense models that a case is set against."""
    if case.startswith("bf16"):
        return ("",)
    return (f"bf16, batch {batch}",) + (() if case.startswith("fp32") else (f"fp32, batch {batch}",))


def packed(dense: Transformer, method: Rtn | Nf4 | Int8 | Fp8, ends: Rtn | Nf4) -> Transformer:
    """A copy of the model with packed weights."""
    model = copy.deepcopy(dense)
    quantize_model(model, method, embedding=ends, head=ends)
    return model


def further(model: Transformer, prompts: list[list[int]], new: int) -> float:
    """Seconds from the first new token to the last."""
    steps = stream(model, prompts, max_new_tokens=new)
    next(steps)
    began = time.perf_counter()
    for _ in steps:
        pass
    return time.perf_counter() - began


def both(shape: Shape, dtype: torch.dtype) -> tuple[Transformer, LlamaForCausalLM]:
    """The same weights here and in `transformers`."""
    peer = shape.transformers().eval()
    with tempfile.TemporaryDirectory() as folder, quiet():
        peer.save_pretrained(folder)
        core = import_folder(folder)
    return core.to(dtype), peer.to(dtype)


@contextlib.contextmanager
def quiet():
    """Without the advice of `transformers` about saving."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def ours(model: Transformer, prompts: torch.Tensor, new: int) -> list[list[int]]:
    return generate(model, prompts.tolist(), max_new_tokens=new)


def theirs(model: LlamaForCausalLM, prompts: torch.Tensor, new: int) -> list[list[int]]:
    with torch.inference_mode():
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            use_cache=True,
            pad_token_id=0,
        )
    return out[:, prompts.shape[1] :].tolist()


def _discard(decode: Callable[..., list[list[int]]], *arguments) -> None:
    """Run without a result: a case that returns something has timed itself."""
    decode(*arguments)
