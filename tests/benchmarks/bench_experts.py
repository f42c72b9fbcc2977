"""A mixture of experts against the dense model of equal active FLOPs and against `transformers`' Mixtral.

Training and decoding as `bench_training` and `bench_decode` run them, with the same steps and the same peers' variants.
Nobody adds a balancing loss. Weights are random and the same in shape: loads are as uneven as a router's first ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from models.experts import Experts
from models.feedforward import Swiglu
from models.transformer import Transformer
from tests.benchmarks.bench_decode import ours, theirs
from tests.benchmarks.bench_training import core_step, transformers_step
from tests.benchmarks.shapes import Shape
from tests.benchmarks.timing import Row, fastest, rate_row, take_turns

NAME = "experts"
DENSE, MIXTURE = "dense core", "core, experts"


@dataclass(frozen=True)
class Mixture(Shape):
    """A small Mixtral: `feedforward` is the hidden width of a token's `top_k` experts together."""

    count: int = 8
    top_k: int = 2

    def core(self) -> Transformer:
        config = super().core().config
        spec = Experts(self.count, Swiglu(self.feedforward // self.top_k), self.top_k)
        return Transformer(replace(config, layers=tuple(replace(layer, feedforward=spec) for layer in config.layers)))

    def transformers(self) -> MixtralForCausalLM:
        torch.manual_seed(0)
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=self.vocabulary,
                hidden_size=self.width,
                intermediate_size=self.feedforward // self.top_k,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.kv_heads,
                num_local_experts=self.count,
                num_experts_per_tok=self.top_k,
                max_position_embeddings=self.context,
                tie_word_embeddings=self.tied,
                attn_implementation="sdpa",
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=None,
            )
        )


@dataclass(frozen=True)
class Settings:
    """A training batch of `rows` x `length` tokens; decoding of `new` tokens after `prompt` for every batch size."""

    shape: Mixture = field(default_factory=Mixture)
    rows: int = 16
    length: int = 256
    rounds: int = 11
    compiled: bool = True
    precisions: tuple[str, ...] = ("fp32", "bf16")
    batches: tuple[int, ...] = (1, 8)
    prompt: int = 64
    new: int = 128
    decode_rounds: int = 9


def run(settings: Settings | None = None) -> list[Row]:
    """Training rows, then decoding rows, in both precisions; the mixture stands against each of the others."""
    settings = settings or Settings()
    return train(settings) + decode(settings)


def dense(shape: Mixture) -> Shape:
    """The dense model whose FLOPs are the mixture's but for the router's."""
    return Shape(**{name: getattr(shape, name) for name in Shape.__dataclass_fields__})


def train(settings: Settings) -> list[Row]:
    """Tokens/s of one training step, in each precision."""
    return [row for label in settings.precisions for row in _train(settings, label)]


def _train(settings: Settings, label: str) -> list[Row]:
    generator = torch.Generator().manual_seed(1)
    stream = torch.randint(settings.shape.vocabulary, (settings.rows, settings.length + 1), generator=generator)
    tokens, targets = stream[:, :-1].contiguous(), stream[:, 1:].contiguous()  # (B, T) each
    cases: dict[str, Callable[[], None]] = {}
    for compiled in (False, True) if settings.compiled else (False,):
        for precision in ("autocast", "weights in bf16") if label == "bf16" else ("",):
            kind = "compiled" if compiled else "eager"
            case = ", ".join(filter(None, ("transformers", kind, label, precision)))
            cases[case] = transformers_step(settings.shape, tokens, targets, label, precision, compiled)
    peers = list(cases)
    for case, shape in ((DENSE, dense(settings.shape)), (MIXTURE, settings.shape)):
        cases[f"{case}, {label}"] = core_step(shape, tokens, targets, label, settings.compiled)
    seconds = take_turns(NAME, cases, rounds=settings.rounds)
    note = (
        f"training, {settings.rows} x {settings.length} tokens, {settings.shape}; every step clips and runs fused "
        "AdamW, of the experts' weights as well"
    )
    rows = partial(rate_row, NAME, seconds=seconds, work=settings.rows * settings.length, unit="tokens/s", note=note)
    found = [rows(case) for case in [*peers, f"{DENSE}, {label}"]]
    masters = [peer for peer in peers if "weights in bf16" not in peer]
    against = [f"{DENSE}, {label}", fastest(seconds, peers), fastest(seconds, masters)]
    return found + [rows(f"{MIXTURE}, {label}", peer=peer) for peer in dict.fromkeys(against)]


def decode(settings: Settings) -> list[Row]:
    """New tokens/s for each batch size and precision."""
    found = []
    for dtype, label in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        peer = settings.shape.transformers().to(dtype).eval()
        core, plain = (shape.core().to(dtype).eval() for shape in (settings.shape, dense(settings.shape)))
        for batch in settings.batches:
            prompts = torch.randint(1, settings.shape.vocabulary, (batch, settings.prompt))  # (B, T)
            where = f"decode, {label}, batch {batch}"
            against = [f"{DENSE}, {where}", f"transformers, {where}"]
            cases: dict[str, Callable[[], None]] = {
                against[1]: _silent(theirs, peer, prompts, settings.new),
                against[0]: _silent(ours, plain, prompts, settings.new),
                f"{MIXTURE}, {where}": _silent(ours, core, prompts, settings.new),
            }
            seconds = take_turns(NAME, cases, rounds=settings.decode_rounds, warmup=1)
            note = f"greedy, prompt {settings.prompt}, {settings.new} new tokens, prompt included, {settings.shape}"
            rows = partial(rate_row, NAME, seconds=seconds, work=batch * settings.new, unit="tokens/s", note=note)
            found += [rows(case) for case in against]
            found += [rows(f"{MIXTURE}, {where}", peer=peer) for peer in against]
    return found


def _silent(run: Callable[..., list[list[int]]], *arguments) -> Callable[[], None]:
    """A case without a result: one that returns something has timed itself."""

    def case() -> None:
        run(*arguments)

    return case
