"""`espalier generate`: continue a text, token by token."""

import sys
import warnings
from collections import Counter

from app.loading import load_model, resolve_device, resolve_dtype
from models.generation import Sampling, stream
from recipes.stages import options


def main(chosen: options.Generate) -> None:
    """Run `espalier generate`: print the prompt and what the model adds as it comes."""
    options.check_seed(chosen.seed)
    sampling = Sampling(chosen.temperature, chosen.top_k, chosen.top_p)
    loaded = load_model(chosen.model, resolve_device(chosen.device), resolve_dtype(chosen.dtype))
    tokenizer = loaded.text_tokenizer()
    prompt = [tokenizer.begin, *tokenizer.encode(chosen.prompt)]  # a text begins as every document did in training
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
            stop_tokens=[tokenizer.eot],
            seed=chosen.seed,
            exit_confidence=chosen.exit_confidence,
            layers_used=used,
            page_size=chosen.page_size,
        )
    for warning in found:
        print(warning.message, file=sys.stderr, flush=True)  # the sentence, without the line of code that says it
    sys.stdout.write(chosen.prompt)
    for step in steps:
        new += [token for token in step[:1] if token is not None]
        text = tokenizer.decode(new)
        if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
    sys.stdout.write(tokenizer.decode(new)[len(shown) :] + "\n")
    if chosen.exit_confidence is not None and used:
        print(layers_per_token(used, len(loaded.model.blocks)), file=sys.stderr)


def layers_per_token(used: list[int], depth: int) -> str:
    """Return how many layers the tokens have run, on average and one number of layers after the other."""
    counts = ", ".join(f"{count} after {layers}" for layers, count in sorted(Counter(used).items()))
    return f"layers run per token: {sum(used) / len(used):.2f} of {depth} ({counts})"
