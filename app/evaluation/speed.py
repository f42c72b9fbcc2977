"""Speed: interleaved timed rounds with intervals.

All models of a comparison are in one process and take turns, round after round (A B, B A, A B, ...), so that a machine
that warms up, throttles or is shared takes them all along. A round generates greedily from one prompt at batch 1, or is
one forward of a model that does not generate.
A figure is the median over the rounds; a change is the median of the ratios of the rounds with a 95 % interval, and is
beyond the noise only where that interval leaves out 1.
"""

import os
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from app.evaluation.environment import device_name
from app.evaluation.intervals import ratio_of_rounds
from app.evaluation.quality import Progress, no_progress
from app.evaluation.size import device_of, dtype_of, held_bytes, holders, kernels
from models.generation import stream
from models.transformer import Transformer


class Throughput(NamedTuple):
    """A rate in tokens per second: its name in report.json, and what the model does, in a word."""

    name: str
    label: str


class Latency(NamedTuple):
    """A time in milliseconds: its name in report.json, what it is in a table, and what it is the time of."""

    name: str
    label: str
    unit: str


@dataclass(frozen=True)
class SpeedProtocol:
    """Speed protocol of generation: greedy, from one prompt, at batch 1.

    Args:
        prompt_tokens: length of the prompt; at most half the model's context is used.
        new_tokens: tokens generated after it; at most what the context leaves.
        rounds: timed rounds of each model.
        warmup: rounds of each model before the first timed one.
    """

    prompt_tokens: int = 128
    new_tokens: int = 48
    rounds: int = 10
    warmup: int = 2

    # the first is the one that verdicts are about
    throughputs: ClassVar[tuple[Throughput, ...]] = (
        Throughput("decode_tokens_per_second", "Decoding"),
        Throughput("prefill_tokens_per_second", "Reading the prompt"),
    )
    latency: ClassVar[Latency] = Latency("per_token_ms", "Time per token", "generated token")

    def fitted(self, context: int) -> "SpeedProtocol":
        """The same protocol within a context of so many tokens."""
        prompt = max(1, min(self.prompt_tokens, context // 2))
        return replace(self, prompt_tokens=prompt, new_tokens=max(2, min(self.new_tokens, context - prompt)))

    @property
    def tokens(self) -> int:
        """Tokens that a model has seen at the end of a round."""
        return self.prompt_tokens + self.new_tokens

    def run(self, model: Transformer, prompt: list[int]) -> "Round":
        """One timed round; the token's value is read back each step, which waits for the device."""
        times = [time.perf_counter()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in stream(model, [prompt], max_new_tokens=self.new_tokens):
                times.append(time.perf_counter())
        steps = np.diff(times).tolist()
        return Round(steps[0], tuple(steps[1:]))

    def begin(self, model: Transformer, prompt: list[int]) -> None:
        """As much of a round as has its peak of memory: the cache has its whole size from the first step."""
        for _ in islice(stream(model, [prompt], max_new_tokens=self.new_tokens), 2):
            pass

    def series(self, prompt: list[int], rounds: "Sequence[Round]") -> dict[str, list[float]]:
        """Each throughput, round by round."""
        return {
            "prefill_tokens_per_second": [len(prompt) / one.first for one in rounds],
            "decode_tokens_per_second": [len(one.further) / sum(one.further) for one in rounds],
        }

    def times(self, rounds: "Sequence[Round]") -> dict:
        """Latencies."""
        further = np.array([step for one in rounds for step in one.further]) * 1000  # milliseconds
        return {
            "first_token_ms": 1000 * statistics.median(one.first for one in rounds),
            "per_token_ms": {"p50": float(np.percentile(further, 50)), "p95": float(np.percentile(further, 95))},
        }

    @staticmethod
    def say(speed: dict) -> str:
        """A round in words, from the figures."""
        return (
            f"greedy generation at batch {speed['batch_size']}: a prompt of {speed['prompt_tokens']} tokens, then "
            f"{speed['new_tokens']} new ones"
        )

    def describe(self) -> dict:
        """Settings of the speed figures."""
        return {"prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens, "batch_size": 1}


@dataclass(frozen=True)
class ForwardProtocol(SpeedProtocol):
    """One forward of a sequence at batch 1: nothing is generated."""

    prompt_tokens: int = 256
    new_tokens: int = 0

    throughputs: ClassVar[tuple[Throughput, ...]] = (Throughput("forward_tokens_per_second", "A forward"),)
    latency: ClassVar[Latency] = Latency("forward_ms", "Time per sequence", "sequence")

    def fitted(self, context: int) -> "SpeedProtocol":
        return replace(self, prompt_tokens=max(1, min(self.prompt_tokens, context)))

    def run(self, model: Transformer, prompt: list[int]) -> "Round":
        start = time.perf_counter()
        self.begin(model, prompt)
        return Round(time.perf_counter() - start, ())

    def begin(self, model: Transformer, prompt: list[int]) -> None:
        with torch.inference_mode():
            logits = model(torch.tensor([prompt], device=device_of(model))).logits  # (1, T, V)
            logits[0, -1].argmax().item()  # waits for the device

    def series(self, prompt: list[int], rounds: "Sequence[Round]") -> dict[str, list[float]]:
        return {"forward_tokens_per_second": [len(prompt) / one.first for one in rounds]}

    def times(self, rounds: "Sequence[Round]") -> dict:
        whole = np.array([one.first for one in rounds]) * 1000  # milliseconds
        return {
            "sequences_per_second": 1000 / float(np.median(whole)),
            "forward_ms": {"p50": float(np.percentile(whole, 50)), "p95": float(np.percentile(whole, 95))},
        }

    @staticmethod
    def say(speed: dict) -> str:
        return f"one forward at batch {speed['batch_size']} over a sequence of {speed['sequence_tokens']} tokens"

    def describe(self) -> dict:
        return {"sequence_tokens": self.prompt_tokens, "batch_size": 1}


STANDARD = SpeedProtocol()


@dataclass(frozen=True)
class Round:
    """One round: seconds to the first token or of the whole forward, then seconds for each further token."""

    first: float
    further: tuple[float, ...]


def peak_rise(model: Transformer, prompt: list[int], protocol: SpeedProtocol) -> int:
    """The most bytes that torch's allocator holds beyond what it held before, while a round begins.

    CUDA: the allocator's own record; CPU:
    the allocations and releases that the profiler saw, added up in their order.
    """
    device = device_of(model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        level = torch.cuda.memory_allocated(device)
        protocol.begin(model, prompt)
        return torch.cuda.max_memory_allocated(device) - level
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler says on stderr that it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        protocol.begin(model, prompt)
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(0, *accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def measure_speeds(
    models: Sequence[Transformer],
    prompt: Sequence[int],
    *,
    protocol: SpeedProtocol | None = None,
    progress: Progress = no_progress,
) -> list[dict]:
    """The `speed` block of report.json for each model, measured in interleaved rounds.

    Args:
        models: each on its device and in the dtype it runs in; they share a vocabulary.
        prompt: token ids to begin with; repeated where the protocol asks for more.
        protocol: `STANDARD` within the shortest context of the models when None.
        progress: called with (rounds done, rounds in all).

    `peak_memory_bytes` is `memory_bytes` of the weights plus the most that a round added to it (`peak_rise`).
    """
    protocol = (protocol or STANDARD).fitted(min(model.config.context for model in models))
    prompt = (list(prompt) * (1 + protocol.prompt_tokens // max(1, len(prompt))))[: protocol.prompt_tokens]
    rounds: list[list[Round]] = [[] for _ in models]
    total = (protocol.warmup + protocol.rounds) * len(models)
    done = 0
    for number in range(protocol.warmup + protocol.rounds):
        order = range(len(models)) if number % 2 == 0 else reversed(range(len(models)))
        for index in order:
            timed = protocol.run(models[index], prompt)
            if number >= protocol.warmup:
                rounds[index].append(timed)
            done += 1
            progress(done, total)
    return [summary(model, prompt, protocol, timed) for model, timed in zip(models, rounds, strict=True)]


def summary(model: Transformer, prompt: list[int], protocol: SpeedProtocol, rounds: list[Round]) -> dict:
    """One model's figures from its rounds."""
    series = protocol.series(prompt, rounds)
    rise = peak_rise(model, prompt, protocol)
    weights = sum(held_bytes(module) for _, module in holders(model))
    device = device_of(model)
    return {
        **{name: statistics.median(values) for name, values in series.items()},
        **protocol.times(rounds),
        "peak_memory_bytes": weights + rise,
        "flops_per_token": model.flops_per_token(protocol.tokens),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype_of(model)).removeprefix("torch."),
        "kernels": kernels(model),
        **protocol.describe(),
        "rounds": series,
    }


def change_of_speed(before: dict, after: dict) -> dict:
    """Ratios after/before: of throughputs round by round with their interval, of the other figures plainly."""
    change: dict = {}
    for name in before["rounds"]:
        ratio = ratio_of_rounds(before["rounds"][name], after["rounds"][name])
        change[name] = {
            "ratio": ratio.value,
            "interval": [ratio.low, ratio.high],
            "beyond_noise": ratio.low > 1 or ratio.high < 1,
        }
    for name in ("first_token_ms", "peak_memory_bytes", "flops_per_token"):
        if before.get(name) and after.get(name):
            change[name] = {"ratio": after[name] / before[name]}
    for name in ("per_token_ms", "forward_ms"):
        if name in before:
            change[name] = {
                quantile: {"ratio": after[name][quantile] / before[name][quantile]} for quantile in ("p50", "p95")
            }
    return change
