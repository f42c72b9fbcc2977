"""The files that travel with the weights: the tokenizer, and which tokens begin and end a text."""

import shutil
from pathlib import Path
from typing import Any

from models.files import inside, read_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
SPECIAL = ("bos_token", "eos_token", "pad_token")


def copy_tokenizer(source: str | Path, directory: Path) -> list[str]:
    """Copy the tokenizer files of `source`, as they are, into `directory`, and return their names."""
    source = Path(source).expanduser()
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(inside(source, name), directory / name)
    return names


def special_tokens(source: str | Path) -> dict[str, Any]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id` of a folder, as far as it names them.

    `generation_config.json` has the last word, then `tokenizer_config.json` with the ids in `tokenizer.json`.
    """
    source = Path(source).expanduser()
    found: dict[str, Any] = {}
    if (source / "tokenizer_config.json").is_file() and (source / "tokenizer.json").is_file():
        named = read_json(inside(source, "tokenizer_config.json"))
        added = read_json(inside(source, "tokenizer.json")).get("added_tokens") or []
        ids = {token["content"]: token["id"] for token in added}
        for role in SPECIAL:
            token = named.get(role)
            text = token.get("content") if isinstance(token, dict) else token
            if text in ids:
                found[f"{role}_id"] = ids[text]
    if (source / "generation_config.json").is_file():
        generation = read_json(inside(source, "generation_config.json"))
        keys = [f"{role}_id" for role in SPECIAL]
        found |= {key: generation[key] for key in keys if generation.get(key) is not None}
    return found
