"""`espalier generate`: continue a text, token by token."""

import sys
import warnings
from collections import Counter

from app.data.tokenizer import Tokenizer
from app.loading import load_model, resolve_device, resolve_dtype
from models.errors import UserError, printable
from models.generation import Sampling, stream
from models.memory import check_bytes
from recipes.commands import options


def main(chosen: options.Generate) -> None:
    """Run `espalier generate`: print the prompt and what the model adds as it comes."""
    options.check_seed(chosen.seed)
    sampling = Sampling(chosen.temperature, chosen.top_k, chosen.top_p)
    loaded = load_model(chosen.model, resolve_device(chosen.device), resolve_dtype(chosen.dtype))
    if not loaded.task.generates:
        raise UserError(
            f"{loaded.source.path} was trained for {loaded.task.kind}, and such a model does not continue a text; "
            "generate takes a model trained for causal_lm"
        )
    tokenizer = loaded.text_tokenizer()
    prompt = encoded(tokenizer, chosen.prompt, chosen.special_tokens)
    tokens = chosen.page_size or len(prompt) + chosen.max_new_tokens  # one page at least
    check_bytes(loaded.model.cache_bytes(tokens), f"the cache of {tokens} tokens")
    new: list[int] = []
    used: list[int] = []
    shown = ""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", UserWarning)
        steps = stream(
            loaded.model,
            [prompt],
            max_new_tokens=chosen.max_new_tokens,
            sampling=sampling,
            stop_tokens=tokenizer.stops,
            seed=chosen.seed,
            exit_confidence=chosen.exit_confidence,
            layers_used=used,
            page_size=chosen.page_size,
        )
    for warning in found:
        print(warning.message, file=sys.stderr, flush=True)  # the sentence, without the line of code that says it
    shown_as = printable if sys.stdout.isatty() else str  # a file gets what the model wrote
    sys.stdout.write(shown_as(chosen.prompt))
    for step in steps:
        new += [token for token in step[:1] if token is not None]
        text = tokenizer.continuation(prompt, new)
        if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
            sys.stdout.write(shown_as(text[len(shown) :]))
            sys.stdout.flush()
            shown = text
    sys.stdout.write(shown_as(tokenizer.continuation(prompt, new)[len(shown) :]) + "\n")
    if chosen.exit_confidence is not None and used:
        print(layers_per_token(used, len(loaded.model.blocks)), file=sys.stderr)


def encoded(tokenizer: Tokenizer, prompt: str, special_tokens: bool) -> list[int]:
    """Return the ids of the prompt, and say on stderr which special tokens it names without meaning them.

    Raises:
        UserError: the prompt is no text.
    """
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # how Python holds bytes that it cannot decode
        raise UserError("the prompt holds bytes that are no text in the encoding of this terminal; give it in UTF-8")
    if not special_tokens and (named := tokenizer.special_tokens_in(prompt)):
        print(
            f"{printable(', '.join(named))} in the prompt: read as characters, not as special tokens; "
            "--special_tokens true reads them as such",
            file=sys.stderr,
        )
    return tokenizer.prompt(prompt, special_tokens)


def layers_per_token(used: list[int], depth: int) -> str:
    """Return how many layers the tokens have run, on average and one number of layers after the other."""
    counts = ", ".join(f"{count} after {layers}" for layers, count in sorted(Counter(used).items()))
    return f"layers run per token: {sum(used) / len(used):.2f} of {depth} ({counts})"
