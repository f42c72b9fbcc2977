"""Tokenizer files that are wrong or hostile: one sentence, whether the library raises or panics."""

import json

import pytest

from app.data.corpus import synthetic
from app.data.tokenizer import load_tokenizer, train_tokenizer
from models.errors import UserError


@pytest.fixture(scope="module")
def plain():
    texts = [document.text for document in synthetic(documents=20).texts]
    return train_tokenizer(texts, 270).tokenizer.to_str()


def template(single, special_tokens=None):
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": special_tokens or {}}


TEXT = {"Sequence": {"id": "A", "type_id": 0}}


def replacements(*pairs):
    """Replacements one after the other, as a normalizer and as a decoder."""
    return [{"type": "Replace", "pattern": {"String": before}, "content": after} for before, after in pairs]


DOUBLING = replacements(*[("a", "aa")] * 40)
HOSTILE = {
    "pieces of length 0": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "pieces of length 0 inside": {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "FixedLength", "length": 0}]}
    },
    "a text that doubles": {"normalizer": {"type": "Sequence", "normalizers": DOUBLING}},
    "a text that doubles when it is decoded": {"decoder": {"type": "Sequence", "decoders": DOUBLING}},
    "a text that grows at once": {"normalizer": replacements(("a", "b" * 10**6))[0]},
    "a template with an unknown token": {
        "post_processor": template([{"SpecialToken": {"id": "<nowhere>", "type_id": 0}}, TEXT])
    },
    "a template with a second text": {"post_processor": template([{"Sequence": {"id": "B", "type_id": 0}}])},
    "a template with a token that is no token": {
        "post_processor": template(
            [{"SpecialToken": {"id": "<x>", "type_id": 0}}, TEXT],
            {"<x>": {"id": "<x>", "ids": [2**32 - 1], "tokens": ["<x>"]}},
        )
    },
    "a token for the unknown that is unknown": {
        "model": {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"h": 0}}
    },
    "no token for the unknown": {
        "model": {"type": "Unigram", "unk_id": None, "vocab": [["h", 0.0]], "byte_fallback": False}
    },
    "a character map that is none": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAAEAAAA="}},
    "an empty prefix": {"normalizer": {"type": "Prepend", "prepend": ""}},
    "a pattern without end": {
        "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False,
        }
    },
    "a pattern that is none": {"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}},
    "deep nesting": {"normalizer": json.loads('{"type": "Sequence", "normalizers": [' * 200 + "]}" * 200)},
}  # fmt: skip


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_tokenizer_ends_in_one_sentence(changes, plain, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(plain) | changes))
    for use in (lambda one: one.encode("hello " + "x" * 40), lambda one: one.encode_batch(["x" * 40, "é"])):
        with pytest.raises(UserError) as caught:
            use(load_tokenizer(tmp_path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("token", [3, [1], {"content": ["x"]}, "<nowhere>", True])
def test_an_end_token_that_is_none_is_refused(token, plain, tmp_path):
    (tmp_path / "tokenizer.json").write_text(plain)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    with pytest.raises(UserError):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_cuts_at_random_is_refused(plain, tmp_path):
    content = json.loads(plain)
    content["model"]["dropout"] = 0.5
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"at random \(dropout 0\.5\).* set dropout of its model to null"):
        load_tokenizer(path)
    content["model"]["dropout"] = 0.0
    path.write_text(json.dumps(content))
    load_tokenizer(path)


def test_replacements_that_lengthen_a_text_a_little_are_no_harm(plain, tmp_path):
    """As SentencePiece and its likes write them, however many there are."""
    chain = replacements(*((chr(0x2150 + number), "1/2") for number in range(40)), (" ", "\u2581"), ("``", '"'))
    content = json.loads(plain) | {"normalizer": {"type": "Sequence", "normalizers": chain}}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    load_tokenizer(path)
