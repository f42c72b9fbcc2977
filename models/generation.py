"""Generation with a key/value cache: one pass over the prompts, then one token a step for every prompt of the batch.

B prompts, T tokens of the longest prompt, V vocabulary, N new tokens.
"""

import contextlib
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.cache import ModelCache
from models.early_exit_decoding import EarlyExit, check_confidence
from models.errors import UserError
from models.finite import not_finite
from models.transformer import Transformer

BROKEN = -1  # drawn where the logits are not finite


@dataclass(frozen=True)
class Sampling:
    """Sampling of the next token from the logits: temperature, top-k, top-p.

    Args:
        temperature: divides the logits; 0 takes the likeliest token (greedy).
        top_k: only the k likeliest tokens.
        top_p: only the smallest set of likeliest tokens whose probability reaches p (nucleus, arXiv 1904.09751),
            measured after the temperature and among the top k.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Draw one token per row by inverting the cumulative distribution at `uniform`.

        Args:
            logits: (B, V).
            uniform: (B,) fp64 in [0, 1); unused when greedy.

        Returns:
            (B,) int64; `BROKEN` where the logits are not finite.
        """
        tokens = self._sample(logits.float(), uniform) if self.temperature else logits.argmax(dim=-1)
        return tokens.where(logits.amax(dim=-1).isfinite(), BROKEN)  # the largest is NaN where any is

    def _sample(self, logits: Tensor, uniform: Tensor) -> Tensor:
        tokens = None
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits, tokens = logits.topk(self.top_k, dim=-1)  # (B, K), likeliest first
        elif self.top_p is not None:
            logits, tokens = logits.sort(dim=-1, descending=True)
        logits = logits.double() - logits.amax(dim=-1, keepdim=True)  # the largest stays 0 at any temperature
        probabilities = (logits / self.temperature).softmax(dim=-1)
        cumulative = probabilities.cumsum(dim=-1)
        if self.top_p is not None:  # a token stays while those before it have not reached p
            probabilities = probabilities.where(cumulative - probabilities < self.top_p, 0.0)
            cumulative = probabilities.cumsum(dim=-1)
        total = cumulative[:, -1:]
        target = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))  # below the total
        index = torch.searchsorted(cumulative, target, right=True)  # (B, 1), the first whose cumulative exceeds it
        index = index.clamp(max=cumulative.shape[-1] - 1)  # NaN is above all
        return (index if tokens is None else tokens.gather(1, index)).squeeze(1)


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Collection[int] = (),
    seed: int = 0,
    exit_confidence: float | None = None,
    layers_used: list[int] | None = None,
    page_size: int | None = None,
) -> list[list[int]]:
    """Continue every prompt, and return its new tokens: at most `max_new_tokens`, ending before the first stop token.

    Prompt i draws from its own generator, seeded with `seed + i`: what it gets does not depend on its neighbours.
    The arguments and errors are those of `stream`.
    """
    continued: list[list[int]] = [[] for _ in prompts]
    sampling = Sampling(temperature, top_k, top_p)
    for step in stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_tokens=stop_tokens,
        seed=seed,
        exit_confidence=exit_confidence,
        layers_used=layers_used,
        page_size=page_size,
    ):
        for tokens, token in zip(continued, step, strict=True):
            if token is not None:
                tokens.append(token)
    return continued


def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop_tokens: Collection[int] = (),
    seed: int = 0,
    exit_confidence: float | None = None,
    layers_used: list[int] | None = None,
    page_size: int | None = None,
) -> Iterator[list[int | None]]:
    """Yield, step by step, the next token of every prompt, or None for a prompt that has met a stop token.

    Args:
        model: any decoder; it is put into evaluation mode meanwhile.
        prompts: token ids, of any lengths; shorter ones are padded on the left, and padding is never attended to.
        max_new_tokens: steps at most.
        sampling: how a token is drawn.
        stop_tokens: ids that end a prompt's continuation; they are not part of it.
        seed: of the draws.
        exit_confidence: probability that the likeliest token needs at an early exit of the model, in every prompt that
            goes on, for the step to be drawn from there (models/early_exit.py). By default all layers run.
        layers_used: gets the number of layers that each step has run, step by step.
        page_size: tokens of a page, to keep keys and values in pages (models/cache/paged.py). Prompts that are the same
            are then read once and share their pages. By default room for all tokens is taken at once.

    Raises:
        UserError: an empty prompt, an id outside the vocabulary, more tokens than learned positions reach, or a
            confidence for a model without early exits; while it runs, logits that are not finite. Positions that are
            computed (RoPE) can go beyond the context that the model was trained with; then there is a warning.
    """
    _check(model, prompts, max_new_tokens)
    if exit_confidence is not None:
        check_confidence(model, exit_confidence)
    used = [] if layers_used is None else layers_used
    cache, parents = _new_cache(model, prompts, max_new_tokens, page_size, exit_confidence is None)
    early = None if exit_confidence is None else EarlyExit(model, cache, exit_confidence)
    return _steps(model, prompts, max_new_tokens, sampling, frozenset(stop_tokens), seed, cache, parents, early, used)


def _new_cache(
    model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int, page_size: int | None, share: bool
) -> tuple[ModelCache, list[int] | None]:
    """A cache for the prompts, or where equal ones can `share`, for one of each kind and which each goes on from."""
    tokens = max(map(len, prompts)) + max_new_tokens
    kinds = {tuple(prompt): number for number, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    if page_size is not None and share and len(kinds) < len(prompts):
        cache = model.new_cache(len(kinds), tokens, pages=page_size)
        return cache, [kinds[tuple(prompt)] for prompt in prompts]
    return model.new_cache(len(prompts), tokens, pages=page_size), None


def _check(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not prompts:
        raise UserError("there is no prompt to continue")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {number} is empty: a model needs at least one token to continue")
        if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
            wrong = min(prompt) if min(prompt) < 0 else max(prompt)
            raise UserError(f"prompt {number} has token {wrong}, outside the vocabulary of {model.config.vocab_size}")
    longest, context = max(map(len, prompts)), model.config.context
    if longest + max_new_tokens <= context:
        return
    asked = f"{longest} prompt tokens and {max_new_tokens} new ones exceed the model's context of {context}"
    if model.config.position.bounded:
        raise UserError(
            f"{asked}, where its {model.config.position.kind} positions end; shorten the prompt or ask for fewer"
        )
    warnings.warn(f"{asked}; the model was not trained that far and may ramble", stacklevel=3)


def _steps(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop_tokens: frozenset[int],
    seed: int,
    cache: ModelCache,
    parents: list[int] | None,
    early: EarlyExit | None,
    layers_used: list[int],
) -> Iterator[list[int | None]]:
    device = next(model.parameters()).device
    read = prompts if parents is None else list(dict.fromkeys(map(tuple, prompts)))
    cache.begin([len(prompt) for prompt in read])
    tokens = _left_padded(read, device)  # (B, T)
    uniforms = _uniforms(sampling, len(prompts), max_new_tokens, seed).to(device)  # (N, B)
    alive = [True] * len(prompts)
    for uniform in uniforms:
        # inference mode is left before every yield: it would leak into the code between two steps
        with torch.inference_mode(), _evaluating(model):
            if early is None:
                logits = _next_logits(model, tokens, cache)  # (B, V)
            else:
                logits = early.step(tokens, going=torch.tensor(alive, device=device))  # (B, V)
            if parents is not None:
                cache.fork(parents)
                logits, parents = logits[parents], None
            tokens = sampling.draw(logits, uniform)[:, None]  # (B, 1)
        layers_used.append(len(model.blocks) if early is None else early.layers_used[-1])
        drawn = tokens[:, 0].tolist()
        for prompt, living, token in zip(prompts, alive, drawn, strict=True):
            if living and token == BROKEN:
                raise _broken(model, prompt)
        tokens = tokens.clamp(min=0)  # of prompts that have ended
        alive = [living and token not in stop_tokens for living, token in zip(alive, drawn, strict=True)]
        if not any(alive):
            return
        yield [token if living else None for living, token in zip(alive, drawn, strict=True)]


@torch.no_grad()
def _broken(model: Transformer, prompt: Sequence[int]) -> UserError:
    with _evaluating(model):
        return not_finite(model, torch.tensor([list(prompt)], device=next(model.parameters()).device))


def _next_logits(model: Transformer, tokens: Tensor, cache: ModelCache) -> Tensor:
    """Feed tokens (B, T) to the model and its cache, and return the logits (B, V) after the last of them."""
    x, context = model.embed(tokens, cache=cache)
    x = model.run(x, context, cache=cache).x  # (B, T, D)
    return model.project(model.read(x[:, -1]))  # only the last position pays for the vocabulary


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Tokens (B, T), those of a shorter prompt behind zeros."""
    longest = max(map(len, prompts))
    return torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)


def _uniforms(sampling: Sampling, count: int, steps: int, seed: int) -> Tensor:
    """Draws (steps, B) in [0, 1), a column per prompt from its own CPU generator: the same on any device."""
    if sampling.temperature == 0:
        return torch.zeros(steps, count)
    columns = [
        torch.rand(steps, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + row))
        for row in range(count)
    ]
    return torch.stack(columns, dim=1)


@contextlib.contextmanager
def _evaluating(model: Transformer) -> Iterator[None]:
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()
