"""Attention mechanisms over the length of the sequence: forward and backward, memory, decoding, and the cache.

Each mechanism mixes the same queries, keys and values (one sequence, 8 heads of 64 channels, fp32), without the maps
around it. The exponent e of time ~ T^e and memory ~ T^e is the least-squares slope over the last three lengths. The
peer of every mechanism is causal `scaled_dot_product_attention` at the same length.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from models.attention import ATTENTIONS
from models.attention.protocol import Context, Place
from models.cache import Kept
from models.positions import Positional
from tests.benchmarks.timing import Row, rate_row, take_turns

NAME = "attention"
MECHANISMS = {
    "full": {"kind": "full"},
    "window 256": {"kind": "window", "window": 256},
}
QUADRATIC = {"full"}


@dataclass(frozen=True)
class Lengths:
    """Settings: the lengths, and the most tokens for what is quadratic."""

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384, 32768)
    quadratic_to: int = 16384
    heads: int = 8
    width: int = 64
    rounds: int = 3
    decoded: int = 64
    cached: int = 8192


def run(settings: Lengths | None = None) -> list[Row]:
    """Rows of every mechanism at every length, then their exponents, their decoding and their caches."""
    settings = settings or Lengths()
    rows, times, memory = [], {}, {}
    for length in settings.lengths:
        cases = {
            f"{name}, {length} tokens": partial(_step, mechanism(settings, spec), *inputs(settings, length))
            for name, spec in MECHANISMS.items()
            if name not in QUADRATIC or length <= settings.quadratic_to
        }
        seconds = take_turns(NAME, cases, rounds=settings.rounds, warmup=1)
        peer = f"full, {length} tokens"
        for case, step in cases.items():
            name = case.split(",")[0]
            times.setdefault(name, {})[length] = statistics.median(seconds[case])
            memory.setdefault(name, {})[length] = peak(step)
            against = peer if peer in cases and case != peer else ""
            note = f"forward and backward, one sequence, {settings.heads} heads of {settings.width} channels, fp32"
            rows.append(rate_row(NAME, case, seconds, length, "tokens/s", peer=against, note=note))
    for what, found in (("time", times), ("memory", memory)):
        rows += [_single(f"{name}, exponent of {what}", exponent(found[name]), "e in T^e") for name in found]
    rows += [_single(f"{name}, peak memory at {max(found)} tokens", found[max(found)] / 2**20, "MiB")
             for name, found in memory.items()]  # fmt: skip
    return rows + decoding(settings)


def mechanism(settings: Lengths, spec: dict) -> torch.nn.Module:
    """The module of a mechanism, of which `mix` is measured."""
    width = settings.heads * settings.width
    return ATTENTIONS.parse({**spec, "heads": settings.heads}, "attention").resolve(width).build(Place(width))


def inputs(settings: Lengths, length: int) -> tuple[list[Tensor], Context]:
    """Queries, keys and values (1, H, T, d), and the context of one document."""
    generator = torch.Generator().manual_seed(1)
    size = (1, settings.heads, length, settings.width)
    drawn = [torch.randn(size, generator=generator).requires_grad_() for _ in range(3)]
    return drawn, Context((Positional(),), None, True)


def _step(module: torch.nn.Module, drawn: list[Tensor], context: Context) -> None:
    q, k, v = drawn
    module.mix(q, Kept(k, v, None), context).sum().backward()
    for tensor in drawn:
        tensor.grad = None


def peak(step: Callable[[], None]) -> int:
    """Bytes allocated at most at one moment of the step, beyond what was there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    held = most = 0
    changes = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def exponent(found: dict[int, float]) -> float:
    """The slope of log(value) over log(length), over the last three lengths."""
    last = sorted(found)[-3:]
    x, y = [math.log(length) for length in last], [math.log(max(found[length], 1e-12)) for length in last]
    return statistics.linear_regression(x, y).slope if len(last) > 1 else math.nan


@torch.no_grad()
def decoding(settings: Lengths) -> list[Row]:
    """Tokens per second of decoding behind `cached` tokens, and the bytes of the cache then."""
    cases, rows = {}, []
    for name, spec in MECHANISMS.items():
        module = mechanism(settings, spec)
        capacity = settings.cached + 8 * settings.decoded * (settings.rounds + 2)
        cache = module.new_cache(1, capacity, torch.device("cpu"), torch.float32)
        (_, k, v), context = inputs(settings, settings.cached)
        cache.append(k.detach(), v.detach())
        cases[f"{name}, decoding after {settings.cached} tokens"] = partial(_decode, module, cache, settings, context)
        rows.append(_single(f"{name}, cache at {settings.cached} tokens", cache_bytes(settings, spec) / 2**20, "MiB"))
    seconds = take_turns(NAME, cases, rounds=settings.rounds, warmup=1)
    peer = next(iter(cases))
    return rows + [
        rate_row(NAME, case, seconds, settings.decoded, "tokens/s", peer="" if case == peer else peer) for case in cases
    ]


def _decode(module: torch.nn.Module, cache, settings: Lengths, context: Context) -> None:
    for _ in range(settings.decoded):
        q, k, v = (torch.randn(1, settings.heads, 1, settings.width) for _ in range(3))
        module.mix(q, cache.append(k, v), context._replace(past=cache.length - 1, causal=False))


def cache_bytes(settings: Lengths, spec: dict) -> int:
    """Bytes of one layer's cache, fp32."""
    resolved = ATTENTIONS.parse({**spec, "heads": settings.heads}, "attention").resolve(settings.heads * settings.width)
    return 4 * resolved.cache_elements(settings.cached)


def _single(case: str, value: float, unit: str) -> Row:
    return Row(NAME, case, value, value, value, unit)
