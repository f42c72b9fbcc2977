"""Corpora and tokenizers: what is in them, that they stay the same, and that every byte survives."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from tokenizers import processors

from app.data.corpus import HELD_OUT, SPLITS, Digest, assign_splits, place_of, python_corpus, synthetic
from app.data.tokenizer import END_OF_TEXT, cached_tokenizer, load_tokenizer, train_tokenizer
from models.errors import UserError


def test_the_default_corpus_is_what_it_is_said_to_be():
    corpus = python_corpus()
    names = [document.name for document in corpus.documents("all")]
    assert names == sorted(names)
    assert [document.number for document in corpus.documents("all")] == list(range(len(names)))
    splits = {split: {document.name for document in corpus.documents(split)} for split in SPLITS}
    assert sum(map(len, splits.values())) == len(set(names)) == len(names)
    assert {"argparse.py", "pydoc_data/topics.py"} <= splits["train"]  # topics.py alone is a tenth of all bytes
    words = {word for name in names for word in name.removesuffix(".py").split("/")}
    assert not words & {"test", "tests", "encodings", "idlelib", "turtle", "ctypes", "site-packages", "_pyrepl"}
    assert not any(word.startswith("_sysconfigdata") for word in words)
    assert 5e6 < sum(corpus.sizes.values()) < 12e6
    assert all(0.02 < corpus.sizes[split] / sum(corpus.sizes.values()) < 0.1 for split in ("validation", "test"))
    assert python_corpus().sha256 == corpus.sha256


def test_the_synthetic_corpus_is_the_same_bytes_everywhere_and_can_be_learned():
    corpus = synthetic(seed=3, documents=50, words=40)
    assert corpus.sha256 == "e2881771df74284967fab9493ed43b1604d2544eb6e3c13f960a7b981b284112"
    assert corpus.sha256 != synthetic(seed=4, documents=50, words=40).sha256
    words = [word.strip(".") for document in synthetic().texts for word in document.text.split()]
    pairs = Counter(pairwise(words))
    single = Counter(words)
    unigram = -sum(n / len(words) * math.log(n / len(words)) for n in single.values())
    bigram = -sum(n / len(words) * math.log(n / single[first]) for (first, _), n in pairs.items())
    assert bigram < 1.3 < 3.0 < unigram


def test_splits_do_not_depend_on_the_other_documents():
    places = [place_of(str(number)) for number in range(4000)]
    splits = assign_splits(places)
    assert assign_splits(places[::-1]) == splits[::-1]
    for split in ("validation", "test"):
        assert abs(splits.count(split) / len(splits) - HELD_OUT) < 0.015
    assert sorted(assign_splits([0.5, 0.7, 0.9])) == ["test", "train", "validation"]
    assert assign_splits([0.5]) == ["train"]
    assert "validation" not in assign_splits(places, ["test"])


TEXTS = [document.text for document in synthetic(documents=60).texts]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 320)


def test_training_a_tokenizer_is_deterministic(tokenizer):
    program = (
        "from app.data.corpus import synthetic; from app.data.tokenizer import train_tokenizer;"
        "print(train_tokenizer([d.text for d in synthetic(documents=60).texts], 320).sha256)"
    )
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == tokenizer.sha256


@pytest.mark.parametrize(
    "text", ["", " a\tb\r\n  c", "naïve 𝄞 日本語\u200d", "".join(map(chr, range(1, 256))), "x<|endoftext|>y"]
)
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eot not in ids  # the name of a special token in a text is text
    assert tokenizer.encode_batch([text, "b"]) == [ids, tokenizer.encode("b")]


def test_transformers_loads_what_is_saved(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == tokenizer.eot
    assert len(theirs) == tokenizer.vocab_size == 320
    for text in TEXTS[:5]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text


def test_loading_keeps_the_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert (loaded.sha256, loaded.eot, loaded.files) == (tokenizer.sha256, tokenizer.eot, tokenizer.files)
        assert tokenizer.eot not in loaded.encode(END_OF_TEXT)


def test_a_given_tokenizer_says_what_ends_a_document(tokenizer, tmp_path):
    content = json.loads(tokenizer.tokenizer.to_str())
    content["added_tokens"][0]["content"] = "</s>"
    content["model"]["vocab"]["</s>"] = content["model"]["vocab"].pop(END_OF_TEXT)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).end_of_text == "</s>"  # a known name
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}, "extra": 1}))
    assert json.loads(load_tokenizer(tmp_path).files["tokenizer_config.json"])["extra"] == 1
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<nope>"}))
    with pytest.raises(UserError, match="no token '<nope>'"):
        load_tokenizer(tmp_path)


TEMPLATE = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 320)])


@pytest.mark.parametrize(
    ("processor", "config", "begin"),
    [
        (None, {"bos_token": "<s>"}, END_OF_TEXT),
        (None, {"bos_token": "<s>", "add_bos_token": False}, END_OF_TEXT),
        (None, {"bos_token": {"content": "<s>"}, "add_bos_token": True}, "<s>"),
        (TEMPLATE, {"bos_token": "<s>"}, "<s>"),
        (processors.Sequence([processors.ByteLevel(trim_offsets=False), TEMPLATE]), {}, "<s>"),
    ],
)
def test_a_given_tokenizer_says_what_begins_a_document(tokenizer, tmp_path, processor, config, begin):
    given = tokenizers.Tokenizer.from_str(tokenizer.tokenizer.to_str())
    given.add_special_tokens(["<s>"])
    given.enable_padding(direction="left", length=8)
    if processor is not None:
        given.post_processor = processor
    (tmp_path / "tokenizer.json").write_text(given.to_str())
    if config:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": END_OF_TEXT}))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.begin_of_text, loaded.end_of_text) == (begin, END_OF_TEXT)
    assert loaded.begin == given.token_to_id(begin)
    assert loaded.begin not in loaded.encode("<s> a")  # the name of a special token in a text is text
    loaded.save(tmp_path)
    assert (load_tokenizer(tmp_path).begin, load_tokenizer(tmp_path).sha256) == (loaded.begin, loaded.sha256)


def test_a_begin_token_that_does_not_exist_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    config = {"eos_token": END_OF_TEXT, "bos_token": "<nope>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no token '<nope>' to begin documents with"):
        load_tokenizer(tmp_path)


def test_wrong_tokenizers_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json there"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="at least 257"):
        train_tokenizer(TEXTS, 256)
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([], 300)


def test_the_cache_trains_once(tmp_path):
    def texts():
        yield from TEXTS[:5]
        used.append(1)

    used: list[int] = []
    first = cached_tokenizer(texts(), "a" * 64, 280, tmp_path)
    again = cached_tokenizer(texts(), "a" * 64, 280, tmp_path)
    assert (first.sha256, used) == (again.sha256, [1])
    assert [path.name for path in Path(tmp_path).iterdir() if path.is_dir()] == ["a" * 32 + "-280"]


def test_the_splits_leave_the_training_a_document():
    assert assign_splits([0.5]) == ["train"]
    assert assign_splits([0.6, 0.5]) == ["train", "validation"]
    assert assign_splits([0.6, 0.5, 0.7]) == ["test", "validation", "train"]
    assert assign_splits([0.01, 0.06, 0.5]) == ["validation", "test", "train"]
    assert assign_splits([0.049, 0.05, 0.099, 0.1]) == ["validation", "test", "test", "train"]


def test_the_hash_of_a_corpus_covers_splits_texts_and_where_they_end():
    def sha256(*documents):
        digest = Digest()
        for split, text in documents:
            digest.add(split, text)
        return digest.hexdigest()

    found = [
        sha256(("train", "ab"), ("test", "c")),
        sha256(("train", "ab"), ("train", "c")),
        sha256(("train", "a"), ("test", "bc")),
        sha256(("test", "c"), ("train", "ab")),
        sha256(("train", "ab")),
    ]
    assert len(set(found)) == len(found)
