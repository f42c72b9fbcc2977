"""Cached greedy decoding against `generate` of `transformers`, the same weights in both.

A random Llama is saved by `transformers` and imported through the family reader. One round reads the prompts and then
generates; no stop token, so that both produce every token. In fp32 both must produce the same ones.
"""

import contextlib
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import LlamaForCausalLM

from models.families import import_folder
from models.generation import generate
from models.transformer import Transformer
from tests.benchmarks.shapes import Shape
from tests.benchmarks.timing import Row, rate_row, take_turns

NAME = "decode"


@dataclass(frozen=True)
class Decoding:
    """Settings: `new` tokens after prompts of `prompt` tokens, for every batch size."""

    shape: Shape = field(default_factory=Shape)
    batches: tuple[int, ...] = (1, 8)
    prompt: int = 64
    new: int = 128
    rounds: int = 9


def run(settings: Decoding | None = None) -> list[Row]:
    """New tokens/s for each batch size and precision."""
    settings = settings or Decoding()
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
