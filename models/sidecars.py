"""The files beside the weights: what comes with a tokenizer or a generation config, kept byte for byte.

Every stage writes them as it found them: they are read as bytes, by a list of names, and never through a link that
leads out of their folder.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.errors import UserError
from models.io import inside, read_json

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
GENERATION = "generation_config.json"
SIDECARS = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    SPECIAL_MAP,
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION,
)
NAMED_TEMPLATES = "additional_chat_templates"  # where transformers writes chat templates that have a name, as .jinja
SPECIAL = ("bos_token", "eos_token", "pad_token")


def read_sidecars(source: str | Path) -> dict[str, bytes]:
    """The files beside the weights in a model folder or a Hugging Face folder: path in the folder -> content.

    Where a Hugging Face folder has no generation_config.json, one is made of the special tokens that its config.json
    names, as transformers does.

    Raises:
        UserError: a file that cannot be read, or that lies outside the folder.
    """
    source = Path(source).expanduser()
    templates = sorted(f"{NAMED_TEMPLATES}/{path.name}" for path in (source / NAMED_TEMPLATES).glob("*.jinja"))
    found = {}
    for name in (*SIDECARS, *templates):
        if os.path.lexists(source / name):
            found[name] = _content(inside(source, name))
    if GENERATION not in found and (tokens := _numbers(source, "config.json", foreign=True)):
        found[GENERATION] = (json.dumps(tokens, indent=2) + "\n").encode()
    return found


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"{path} is no file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def write_sidecars(files: Mapping[str, bytes], directory: Path) -> None:
    """Write what `read_sidecars` gave into an existing `directory`."""
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)


def hash_sidecars(files: Mapping[str, bytes]) -> str:
    """SHA-256 (hex) of what `read_sidecars` gave: of every name, and of every content."""
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def special_tokens(source: str | Path) -> dict[str, Any]:
    """`bos_token_id`, `eos_token_id` (a number or a list) and `pad_token_id` of a folder, as far as it names them.

    `generation_config.json` has the last word (in a Hugging Face folder without one, `config.json`), then
    `tokenizer_config.json` with the ids in `tokenizer.json`.

    Raises:
        UserError: something else than numbers.
    """
    source = Path(source).expanduser()
    found: dict[str, Any] = {}
    if (source / TOKENIZER).is_file():
        added = read_json(inside(source, TOKENIZER)).get("added_tokens") or []
        ids = {token["content"]: token["id"] for token in added}
        named = {"sep_token": "[SEP]"} | named_tokens(source)  # as WordPiece tokenizers call it
        found = {f"{role}_id": ids[text] for role, text in named.items() if text in ids}
    return found | _told(source)


def named_tokens(source: Path) -> dict[str, str]:
    """The text of the special tokens by role: tokenizer_config.json, where that is silent special_tokens_map.json."""
    found: dict[str, str] = {}
    for name in (SPECIAL_MAP, TOKENIZER_CONFIG):
        if (source / name).is_file():
            content = read_json(inside(source, name))
            for role in (*SPECIAL, "mask_token", "sep_token", "cls_token"):
                token = content.get(role)
                text = token.get("content") if isinstance(token, dict) else token
                if text is not None and not isinstance(text, str):
                    raise UserError(f"{source / name}: {role} is {text!r}; it must be the text of a token")
                found |= {} if text is None else {role: text}
    return found


def stop_tokens(source: str | Path) -> list[int]:
    """The ids of the tokens that end a text: those of generation_config.json or, without one, a foreign config.json."""
    ends = _told(Path(source).expanduser()).get("eos_token_id", [])
    return [ends] if isinstance(ends, int) else ends


def _told(source: Path) -> dict[str, Any]:
    if (source / GENERATION).is_file():
        return _numbers(source, GENERATION)
    return _numbers(source, "config.json", foreign=True)


def _numbers(source: Path, name: str, foreign: bool = False) -> dict[str, Any]:
    """The ids of special tokens in the file `name`, if it is there; with `foreign` only if it is a Hugging Face one."""
    if not (source / name).is_file():
        return {}
    content = read_json(inside(source, name))
    if foreign and ("model_type" not in content or "format" in content):
        return {}
    found = {f"{role}_id": content.get(f"{role}_id") for role in SPECIAL}
    for key, value in found.items():
        listed = value if key == "eos_token_id" and isinstance(value, list) else [value]
        if value is not None and not all(isinstance(id, int) and not isinstance(id, bool) for id in listed):
            raise UserError(f"{source / name}: {key} is {value!r}; it must be the number of a token")
    return {key: value for key, value in found.items() if value is not None}
