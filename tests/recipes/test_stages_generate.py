"""`espalier generate` with early exits."""

import re

import pytest
import torch

from models import checkpoint
from models.config import ModelConfig
from models.transformer import Transformer

ARCHITECTURE = {
    "width": 32,
    "depth": 4,
    "context": 64,
    "attention": {"kind": "full", "heads": 4},
    "feedforward": {"kind": "swiglu", "width": 64},
}


@pytest.fixture(scope="module")
def untrained(tokenizer, tmp_path_factory):
    """Folders of a model with exits and of one without."""
    made = {}
    for name, exits in (("with", {"layers": [1, 2]}), ("without", None)):
        torch.manual_seed(0)
        config = ModelConfig.from_dict(ARCHITECTURE | {"vocab_size": tokenizer.vocab_size, "exits": exits})
        made[name] = tmp_path_factory.mktemp("exits") / name
        with checkpoint.writing(made[name]) as target:
            checkpoint.save_model(Transformer(config), target)
            tokenizer.save(target)
    return made


def test_it_says_how_many_layers_the_tokens_have_run(untrained, espalier):
    common = ["generate", untrained["with"], "--prompt", "ba", "--max_new_tokens", 6, "--temperature", 0]
    status, plain = espalier(*common)
    assert status == 0, plain.err
    assert "layers" not in plain.err
    for confidence, expected in ((0.001, "1.00 of 4 (6 after 1)"), (1.1, "4.00 of 4 (6 after 4)")):
        status, output = espalier(*common, "--exit_confidence", confidence)
        assert status == 0, output.err
        assert re.search(r"layers run per token: (.*)$", output.err, re.MULTILINE)[1] == expected
    assert output.out == plain.out  # never sure: the text of the whole model


def test_a_model_without_exits_refuses_a_confidence(untrained, refused):
    refused(
        "generate",
        untrained["without"],
        "--prompt",
        "ba",
        "--max_new_tokens",
        6,
        "--exit_confidence",
        0.9,
        words=["this one has none"],
    )


def test_what_is_refused_is_refused_before_the_prompt_is_printed(untrained, espalier):
    status, output = espalier("generate", untrained["without"], "--prompt", "ba", "--exit_confidence", 0.9)
    assert (status, output.out) == (2, "")


def test_a_cache_in_pages_gives_the_same_text(untrained, espalier, refused):
    common = ["generate", untrained["without"], "--prompt", "ba", "--max_new_tokens", 6, "--temperature", 0]
    (status, plain), (paged_status, paged) = espalier(*common), espalier(*common, "--page_size", 4)
    assert status == paged_status == 0
    assert paged.out == plain.out
    refused(*common, "--page_size", 0, words=["page_size is 0; it must be at least 1"])
    refused(*common, "--page_size", 10**12, words=["the cache of 1000000000000 tokens takes", "bytes"])


def test_a_text_past_the_context_is_warned_of_in_one_sentence(untrained, espalier):
    status, output = espalier("generate", untrained["without"], "--prompt", "ba", "--max_new_tokens", 70)
    assert status == 0, output.err
    lines = [line for line in output.err.splitlines() if line.strip()]
    assert len(lines) == 1
    assert re.fullmatch(r"\d+ prompt tokens and 70 new ones exceed the model's context of 64; .* may ramble", lines[0])
