"""Byte-level BPE: trained on the training split, or given; saved so that `transformers.AutoTokenizer` loads it.

A tokenizer here is a `tokenizers.Tokenizer` with a token that ends every document and one that begins it: both are
`<|endoftext|>` where we train, while a given tokenizer may begin with another (Llama: `<s>`, `<|begin_of_text|>`).
Text never turns into them by accident: the characters `<|endoftext|>` inside a text are encoded as characters.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from app.data.cache import build_once
from models.errors import UserError
from models.io import inside, read_json
from models.sidecars import TOKENIZER, TOKENIZER_CONFIG, named_tokens, read_sidecars, stop_tokens, write_sidecars

END_OF_TEXT = "<|endoftext|>"
LARGEST_GROWTH = 64  # times that the replacements of a tokenizer may lengthen a text
_PROBE = "".join(map(chr, range(32, 127)))
SMALLEST_VOCABULARY = 257  # 256 bytes and the end of text
MASK = "<mask>"
_KNOWN_MASKS = (MASK, "[MASK]")
_SPACES = str.maketrans("ĠĊĉč▁", " \n\t\r ")  # what byte-level BPE and SentencePiece write for white space
# What given tokenizers call the token between documents, where their tokenizer_config.json does not say.
_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")

# Rust threads that ran in this process make `tokenizers` warn in every loader worker that is forked later; the workers
# never tokenize, so the choice is made here once and the warning stays away.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


class Tokenizer:
    """A `tokenizers.Tokenizer` and the files that came with it.

    Args:
        tokenizer: the tokenizer itself; truncation and padding are switched off.
        files: path in a folder -> content of it and the files beside it, saved as they are given (models/sidecars.py).
        end_of_text: the token between documents.
        begin_of_text: the token that a model reads first in a document; `end_of_text` when None.
        mask: the token that stands for a hidden one; None: there is none.
        stops: ids of further tokens that end a text.

    Raises:
        UserError: one of the two is not in the vocabulary.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        files: Mapping[str, bytes],
        end_of_text: str = END_OF_TEXT,
        begin_of_text: str | None = None,
        stops: Iterable[int] = (),
        mask: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.files = dict(files)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # special tokens that occur in a text are text
        self.end_of_text = end_of_text
        self.begin_of_text = begin_of_text or end_of_text
        self.eot = self._id(end_of_text, "to put between documents")
        self.begin = self._id(self.begin_of_text, "to begin documents with")
        self.mask_token = mask
        self.stops = frozenset((self.eot, *stops))  # tokens after which nothing is generated
        # Given tokenizers may number their tokens with gaps: what an embedding needs is the largest number plus one.
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def _id(self, token: str, use: str) -> int:
        number = self.tokenizer.token_to_id(token)
        if number is None:
            raise UserError(f"the tokenizer has no token '{token}' {use}")
        return number

    @property
    def mask(self) -> int:
        """The id of the mask token. Raises UserError where there is none."""
        if self.mask_token is None:
            raise UserError(
                "the tokenizer has no mask token, which masked_lm hides tokens behind; give one that has, or train one "
                "for this task (data.tokenizer: null)"
            )
        return self._id(self.mask_token, "to hide tokens behind")

    @property
    def special_ids(self) -> list[int]:
        """The ids of its special tokens."""
        return [number for number, token in self.tokenizer.get_added_tokens_decoder().items() if token.special]

    @property
    def word_edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each token, whether its first character goes on with a word, and whether its last one can be gone on with.

        Two (V,) bool: a token belongs to the word of the one before where both are true.
        """
        edges = np.zeros((2, self.vocab_size), dtype=bool)
        model = self.tokenizer.model
        goes_on = model.continuing_subword_prefix if isinstance(model, models.WordPiece) else ""
        for token, number in self.tokenizer.get_vocab(with_added_tokens=False).items():
            if text := token.removeprefix(goes_on).translate(_SPACES):
                edges[:, number] = token.startswith(goes_on) and text[0].isalnum(), text[-1].isalnum()
        return edges[0], edges[1]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without any token that marks a beginning or an end."""
        with _library("the tokenizer cannot encode the text"):
            return self.tokenizer.encode(text, add_special_tokens=False).ids

    def prompt(self, text: str, special_tokens: bool = False) -> list[int]:
        """Return the ids of a text to continue: it begins as every document did in training.

        With `special_tokens` the names of special tokens in it stand for these, and one that begins a document is not
        doubled.
        """
        self.tokenizer.encode_special_tokens = not special_tokens
        ids = self.encode(text)
        self.tokenizer.encode_special_tokens = True
        return ids if special_tokens and ids[:1] == [self.begin] else [self.begin, *ids]

    def special_tokens_in(self, text: str) -> list[str]:
        """Return the names of special tokens that `text` contains."""
        added = self.tokenizer.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special and token.content in text]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of every text; the texts are encoded in parallel."""
        with _library("the tokenizer cannot encode the text"):
            encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 (a cut character) become U+FFFD."""
        with _library("the tokenizer cannot decode its tokens"):
            return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def continuation(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        """Return the text that the ids `new` add to that of `prompt`.

        Both are decoded together: a decoder of SentencePiece's kind strips the space before the first word it sees.
        """
        return self.decode([*prompt, *new])[len(self.decode(prompt)) :]

    @property
    def sha256(self) -> str:
        """SHA-256 of its own JSON, the end-of-text token and a begin token of its own: equal ones give equal ids."""
        begin = "" if self.begin == self.eot else f"{self.begin_of_text}\n"
        return hashlib.sha256(f"{begin}{self.end_of_text}\n{self.tokenizer.to_str()}".encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write its files into the existing `folder`."""
        write_sidecars(self.files, Path(folder))


def train_tokenizer(texts: Iterable[str], vocab_size: int, mask: bool = False) -> Tokenizer:
    """Train a byte-level BPE (GPT-2's pre-tokenizer: Radford et al. 2019, section 2.2) on `texts`.

    The same texts in the same order give the same tokenizer, on any number of threads. Small corpora may hold fewer
    merges than were asked for; `vocab_size` of the result says how many tokens there are. `<|endoftext|>` is token 0.

    Args:
        texts: training texts, consumed once.
        vocab_size: tokens wanted, at least 257: the 256 bytes and `<|endoftext|>`.
        mask: whether to add `<mask>`, as token 1.

    Raises:
        UserError: `vocab_size` is below 257, or the texts are empty.
    """
    smallest = SMALLEST_VOCABULARY + mask
    if vocab_size < smallest:
        raise UserError(f"vocab_size {vocab_size} is too small: byte-level BPE needs at least {smallest}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, MASK] if mask else [END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    counted = _Counted(texts)
    tokenizer.train_from_iterator(counted, trainer=trainer)
    if not counted.characters:
        raise UserError("the training split holds no text to train a tokenizer on")
    content = (tokenizer.to_str(pretty=True) + "\n").encode()
    token = MASK if mask else None
    files = {TOKENIZER: content, TOKENIZER_CONFIG: _config(END_OF_TEXT, END_OF_TEXT, token)}
    return Tokenizer(tokenizer, files, mask=token)


class _Counted:
    """Pass texts on and count their characters."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = texts
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.characters += len(text)
            yield text


def _config(end_of_text: str, begin_of_text: str, mask: str | None = None) -> bytes:
    """A tokenizer_config.json with which `transformers.AutoTokenizer` loads a tokenizer."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin_of_text,
        "eos_token": end_of_text,
        "add_bos_token": begin_of_text != end_of_text,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
    } | ({} if mask is None else {"mask_token": mask})
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a folder with tokenizer.json (a model folder, a Hugging Face folder) or from that file.

    The token between documents is the `eos_token` of tokenizer_config.json (or special_tokens_map.json); without one,
    BERT's `sep_token`, or a token of a known name. A document begins with the token that the post-processor puts before
    a text, or else with the `bos_token` where tokenizer_config.json says `add_bos_token`, or else with BERT's
    `cls_token`, or else with the token between documents. Every token that generation_config.json names as an end ends
    a text.

    Raises:
        UserError: nothing there, not a tokenizer, or no token that could stand between documents.
    """
    path = Path(path).expanduser()
    file = path / TOKENIZER if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"tokenizer '{path}': no tokenizer.json there; give a folder that holds one, or the file itself"
        )
    folder = file.parent
    files = (
        read_sidecars(folder) if file == folder / TOKENIZER else read_sidecars(folder) | {TOKENIZER: file.read_bytes()}
    )
    with _library(f"tokenizer '{file}' cannot be read by the tokenizers library"):
        tokenizer = tokenizers.Tokenizer.from_buffer(files[TOKENIZER])
        _check_parts(json.loads(files[TOKENIZER]), file)
        first = _first_token(tokenizer)
    named = named_tokens(folder)
    known = (name for name in _KNOWN_ENDS if tokenizer.token_to_id(name) is not None)
    end = named.get("eos_token") or named.get("sep_token") or next(known, None)
    if end is None:
        known = ", ".join(_KNOWN_ENDS)
        raise UserError(f"tokenizer '{path}' names no eos_token and has none of {known} to put between documents")
    adds_begin = TOKENIZER_CONFIG in files and read_json(inside(folder, TOKENIZER_CONFIG)).get("add_bos_token")
    begin = first or (named.get("bos_token") if adds_begin else None) or named.get("cls_token") or end
    files.setdefault(TOKENIZER_CONFIG, _config(end, begin))
    masks = (named.get("mask_token"), *_KNOWN_MASKS)
    mask = next((name for name in masks if name is not None and tokenizer.token_to_id(name) is not None), None)
    return Tokenizer(tokenizer, files, end, begin, stop_tokens(folder), mask)


def _check_parts(content: Mapping[str, Any], file: Path) -> None:
    """Raise UserError for a tokenizer that never ends, whose text grows without bound, or whose ids are random."""
    random = next((key for key in ("dropout", "alpha") if content["model"].get(key)), None)  # BPE, Unigram
    if random is not None:
        raise UserError(
            f"tokenizer '{file}' cuts text at random ({random} {content['model'][random]}), so that a text "
            f"has other tokens each time; set {random} of its model to null"
        )
    for part in _parts(content.get("pre_tokenizer")):
        if part.get("type") == "FixedLength" and not part.get("length"):
            raise UserError(f"tokenizer '{file}' cuts text into pieces of length 0 (FixedLength), which never ends")
    for role in ("normalizer", "decoder"):
        chain = [part for part in _parts(content.get(role)) if part.get("type") == "Replace"]
        text = _PROBE + "".join(pattern for part in chain for pattern in part["pattern"].values())
        most = LARGEST_GROWTH * len(text)
        for part in chain:
            (kind, pattern), *_ = part["pattern"].items()
            replace = normalizers.Replace(tokenizers.Regex(pattern) if kind == "Regex" else pattern, part["content"])
            text = replace.normalize_str(text) if len(part["content"]) <= most else part["content"]
            if len(text) > most:
                raise UserError(
                    f"tokenizer '{file}' makes a text more than {LARGEST_GROWTH} times as long by the replacements of "
                    f"its {role}"
                )


def _parts(value: Any) -> Iterator[Mapping[str, Any]]:
    """Every part of a normalizer, pre-tokenizer or decoder, in the order in which they are applied."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _parts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _parts(inner)


@contextlib.contextmanager
def _library(wrong: str) -> Iterator[None]:
    """Raise `UserError` for what the library raises: bare Exception, and Rust's panics, which are no Exception."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        raise UserError(f"{wrong}: {' '.join(str(error).split())}") from error


def _first_token(tokenizer: tokenizers.Tokenizer) -> str | None:
    """The special token that the tokenizer's post-processor puts before a text."""
    tokenizer.no_padding()  # which may stand first too
    encoding = tokenizer.encode("a")
    return encoding.tokens[0] if encoding.special_tokens_mask[:1] == [1] else None


def cached_tokenizer(texts: Iterable[str], key: str, vocab_size: int, folder: Path, mask: bool = False) -> Tokenizer:
    """Return the tokenizer trained on the corpus with SHA-256 `key`, from `folder` where an earlier run left it."""
    place = folder / f"{key[:32]}-{vocab_size}{'-mask' if mask else ''}"
    return load_tokenizer(build_once(place, lambda temporary: train_tokenizer(texts, vocab_size, mask).save(temporary)))
