"""Attention mechanisms over the length of the sequence: forward and backward, memory, decoding, and the cache.

Each mechanism mixes one sequence of 512 channels (8 heads of 64, fp32). The linear maps around it are replaced by
copies of their input, so that what is measured is the mechanism. The exponent e of time ~ T^e and memory ~ T^e is the
least-squares slope over the last three lengths. The peer of every mechanism is `full`, causal
`scaled_dot_product_attention`, at the same length; tests/benchmarks/bench_attention_peers.py has the peers by name.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from models.attention.protocol import ForwardInputs, mixed_of
from models.positions import Positional
from models.specs import ATTENTIONS, LayerContext
from tests.benchmarks.timing import Row, rate_row, take_turns

NAME = "attention"
PEER = "full"


@dataclass(frozen=True)
class Mechanism:
    """One row of the table.

    Attributes:
        spec: as an architecture writes it; `heads` is filled in where the mechanism has heads.
        quadratic: whether its time grows with the square of the length; then it stops earlier.
        bidirectional: whether it can only be measured in an encoder.
    """

    spec: dict[str, Any]
    quadratic: bool = False
    bidirectional: bool = False


MECHANISMS = {
    PEER: Mechanism({"kind": "full"}, quadratic=True),
    "full, tiled in PyTorch": Mechanism({"kind": "full", "kernel": "tiled"}, quadratic=True),
    "single heads": Mechanism({"kind": "single_heads"}, quadratic=True),
    "top-k 64": Mechanism({"kind": "top_k", "keep": 64}, quadratic=True),
    "selective": Mechanism({"kind": "selective"}, quadratic=True),
    "window 256": Mechanism({"kind": "window", "window": 256}),
    "window 256, dilation 2": Mechanism({"kind": "window", "window": 256, "dilation": 2}),
    "longformer 256 + 16": Mechanism({"kind": "longformer", "window": 256, "globals": 16}),
    "transient 256 + blocks of 64": Mechanism({"kind": "transient", "window": 256, "block": 64}),
    "strided 128": Mechanism({"kind": "strided", "stride": 128}),
    "fixed 128, 4 of each": Mechanism({"kind": "fixed", "block": 128, "summary": 4}),
    "bigbird 64": Mechanism({"kind": "bigbird", "block": 64}),
    "linformer 256": Mechanism({"kind": "linformer", "rank": 256, "documents": 1}, bidirectional=True),
    "lsh 64, 2 rounds": Mechanism({"kind": "lsh", "buckets": 64, "chunk": 64}),
    "recursive 64": Mechanism({"kind": "recursive", "chunk": 64}),
    "hierarchical 64": Mechanism({"kind": "hierarchical", "segment": 64}),
    "retention": Mechanism({"kind": "retention"}),
    "convolution 4": Mechanism({"kind": "convolution"}),
}


@dataclass(frozen=True)
class Lengths:
    """Settings: the lengths, and the most tokens for what is quadratic."""

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384, 32768)
    quadratic_to: int = 8192
    peer_to: int = 16384
    heads: int = 8
    width: int = 64
    rounds: int = 3
    decoded: int = 64
    cached: tuple[int, ...] = (1024, 8192)
    mechanisms: dict[str, Mechanism] = field(default_factory=lambda: MECHANISMS)


def run(settings: Lengths | None = None) -> list[Row]:
    """Rows of every mechanism at every length, then their exponents, their decoding and their caches."""
    settings = settings or Lengths()
    rows, times, memory = [], {}, {}
    for length in settings.lengths:
        steps = {
            name: partial(step, *built(settings, mechanism, length))
            for name, mechanism in settings.mechanisms.items()
            if length <= reach(settings, name, mechanism)
        }
        cases = {f"{name}, {length} tokens": case for name, case in steps.items()}
        seconds = take_turns(NAME, cases, rounds=settings.rounds, warmup=1)
        peer = f"{PEER}, {length} tokens"
        for name, case in steps.items():
            label = f"{name}, {length} tokens"
            times.setdefault(name, {})[length] = statistics.median(seconds[label])
            memory.setdefault(name, {})[length] = peak(case)
            against = peer if peer in cases and label != peer else ""
            note = f"forward and backward, one sequence, {settings.heads} heads of {settings.width} channels, fp32"
            rows.append(rate_row(NAME, label, seconds, length, "tokens/s", peer=against, note=note))
            rows.append(single(f"{name}, peak memory at {length} tokens", memory[name][length] / 2**20, "MiB"))
    for what, found in (("time", times), ("memory", memory)):
        rows += [single(f"{name}, exponent of {what}", exponent(found[name]), "e in T^e") for name in found]
    return rows + decoding(settings)


def reach(settings: Lengths, name: str, mechanism: Mechanism) -> float:
    """The longest sequence on which this mechanism is measured."""
    if name == PEER:
        return settings.peer_to
    return settings.quadratic_to if mechanism.quadratic else math.inf


class Copies(nn.Module):
    """In place of a linear map: its input, repeated or cut to the width of its output."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        return x.repeat_interleave(-(-self.outputs // x.shape[-1]), dim=-1)[..., : self.outputs]


def resolved(spec: dict[str, Any], heads: int, width: int) -> Any:
    """The spec for a model of this width, with so many heads where the mechanism has heads."""
    given = {"heads": heads} if "heads" in ATTENTIONS[spec["kind"]].__dataclass_fields__ else {}
    return ATTENTIONS.parse({**given, **spec}, "attention").resolve(width)


def built(settings: Lengths, mechanism: Mechanism, length: int) -> tuple[nn.Module, Tensor, ForwardInputs]:
    """The mechanism without its maps, a sequence (1, T, D), and what it knows about it."""
    torch.manual_seed(1)
    width = settings.heads * settings.width
    spec = resolved(mechanism.spec, settings.heads, width)
    module = spec.build(LayerContext(width, context=length, bidirectional=mechanism.bidirectional))
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.Linear):
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, Copies(child.out_features))
    x = torch.randn(1, length, width, requires_grad=True)
    return module, x, ForwardInputs((Positional(),), None, causal=not mechanism.bidirectional)


def step(module: nn.Module, x: Tensor, inputs: ForwardInputs) -> None:
    """One forward and backward."""
    mixed_of(module(x, inputs)).y.sum().backward()
    x.grad = None
    for parameter in module.parameters():
        parameter.grad = None


def peak(case: Callable[[], None]) -> int:
    """Bytes allocated at most at one moment of a step, beyond what was there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        case()
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
    """Tokens per second of decoding behind so many tokens, and the bytes of the cache then."""
    cases, rows = {}, []
    decoders = {name: one for name, one in settings.mechanisms.items() if not one.bidirectional}
    for cached in settings.cached:
        for name, mechanism in decoders.items():
            module, x, context = built(settings, mechanism, cached)
            capacity = cached + settings.decoded * (settings.rounds + 2)
            cache = module.eval().new_cache(1, capacity, torch.device("cpu"), torch.float32)
            module(x.detach(), context, cache)
            state = [cached]
            cases[f"{name}, decoding after {cached} tokens"] = partial(decode, module, cache, settings, context, state)
            rows.append(single(f"{name}, cache at {cached} tokens", cache_bytes(settings, mechanism, cached), "bytes"))
    seconds = take_turns(NAME, cases, rounds=settings.rounds, warmup=1)
    for case in cases:
        peer = f"{PEER}, {case.rpartition(', ')[2]}"
        rows.append(rate_row(NAME, case, seconds, settings.decoded, "tokens/s", peer="" if case == peer else peer))
    return rows


def decode(module: nn.Module, cache: Any, settings: Lengths, inputs: ForwardInputs, state: list[int]) -> None:
    """`decoded` tokens, one at a time; state holds how many there were before."""
    for _ in range(settings.decoded):
        x = torch.randn(1, 1, settings.heads * settings.width)
        module(x, inputs._replace(past=state[0], causal=False), cache)
        state[0] += 1


def cache_bytes(settings: Lengths, mechanism: Mechanism, tokens: int) -> int:
    """Bytes of one layer's cache, fp32."""
    return 4 * resolved(mechanism.spec, settings.heads, settings.heads * settings.width).cache_elements(tokens)


def grid(rows: list[Row], settings: Lengths | None = None) -> str:
    """The comparison as one Markdown table: a mechanism a line."""
    settings = settings or Lengths()
    found = {row.case: row for row in rows if row.benchmark == NAME}
    cached = max(settings.cached)
    wide = [length for length in settings.lengths if length >= 2048]
    peers = {f"{PEER}, {length} tokens" for length in wide}

    def cell(case: str, form: Callable[[Row], str]) -> str:
        return form(found[case]) if case in found else ""

    def speed(row: Row) -> str:
        """Against the peer; tokens/s where that is not measured."""
        if row.case in peers:
            return "1"
        return f"{row.ratio:.2f}x" if row.ratio else f"{row.value:,.0f} tokens/s"

    heads = [f"speed at {length:,}" for length in wide] + [f"peak MiB at {cached:,}", "time ~ T^", "memory ~ T^"]
    heads += [f"decode tokens/s at {length:,}" for length in settings.cached] + [f"cache MB at {cached:,}"]
    lines = ["| mechanism | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name in settings.mechanisms:
        cells = [cell(f"{name}, {length} tokens", speed) for length in wide]
        cells.append(cell(f"{name}, peak memory at {cached} tokens", lambda row: f"{row.value:,.0f}"))
        cells += [cell(f"{name}, exponent of {what}", lambda row: f"{row.value:.2f}") for what in ("time", "memory")]
        cells += [cell(f"{name}, decoding after {n} tokens", lambda row: f"{row.value:,.0f}") for n in settings.cached]
        cells.append(cell(f"{name}, cache at {cached} tokens", lambda row: f"{row.value / 1e6:,.2f}"))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def single(case: str, value: float, unit: str) -> Row:
    return Row(NAME, case, value, value, value, unit)
