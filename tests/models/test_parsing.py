"""YAML and JSON from outside are plain values within bounds, or one sentence says why not."""

import os
import resource

import pytest
import yaml

from models.errors import UserError
from models.io import read_json
from models.parsing import Malformed, parse_json, parse_yaml, read_plain

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join(['*a' + str(i - 1)] * 10)}]\n" for i in range(1, 10)
)
DEEP = "a0: &a0 " + "[" * 60 + "]" * 60 + "\na1: " + "[" * 60 + "*a0" + "]" * 60
YAML = [
    ("seed: 1\nbits: 4\nseed: 2", "line 3: the key 'seed' stands there twice"),
    ("{a: {b: 1, b: 2}}", "'b' stands there twice"),
    ("a: &a [*a]", "contains itself"),
    ("a: &a {b: *a}", "contains itself"),
    (BOMB, "100,000 values with the aliases written out"),
    (BOMB.replace("[", "{<<: [").replace("]", "]}").replace("x, " * 9 + "x", "{k: 1}"), "aliases written out"),
    (DEEP, "nested more than 100 deep with the aliases"),
    ("a: " + "[" * 100_000, "nested more than 100 deep"),
    ("a: " + "9" * 5000, "a number has 5000 characters"),
    ("a: 0b_", "invalid literal"),
    ("a: [" + "1, " * 300_000 + "]", "more than 100,000 values"),
    ("a: !!python/name:os.system ''", "tag"),
    ("a: !!set {b}", "tag"),
    ("a: !!binary aGk=", "tag"),
    ("[a]: 1", "unhashable"),
    ("a: 1\n---\na: 2", "single document"),
    ("a: \x00", "control characters"),
]
JSON = [
    ('{"a": 1, "b": {"c": 1, "c": 1}}', "'c' stands there twice"),
    ('{"a": NaN}', "NaN is no number"),
    ('{"a": -Infinity}', "-Infinity is no number"),
    ('{"a": 1e999}', "too large"),
    ('{"a": ' + "9" * 5000 + "}", "a number has 5000 digits"),
    ("[" * 100_000, "nested more than 100 deep"),
    ("[" * 102 + "]" * 102, "nested more than 100 deep"),
    ('{"a": "\\ud800"}', "surrogate"),
    ("{", "line 1"),
]


@pytest.mark.parametrize(("text", "why"), YAML, ids=[why[:30] for _, why in YAML])
def test_yaml_is_refused(text, why):
    with pytest.raises(Malformed, match=why):
        parse_yaml(text)


@pytest.mark.parametrize(("text", "why"), JSON, ids=[why[:30] for _, why in JSON])
def test_json_is_refused(text, why):
    with pytest.raises(Malformed, match=why):
        parse_json(text)


def test_a_bomb_takes_no_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Malformed):
        parse_yaml(BOMB)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB; written out it is 10^10 texts


def test_what_recipes_hold_is_read():
    text = "a: &a {eps: 1e-5, b: [.5, 1., 1_000, 0x1f, -1e5, .inf, true, null, yes]}\nc: {<<: *a, b: 2024-01-01}\n1: ~"
    values = {"eps": 1e-5, "b": [0.5, 1.0, 1000, 31, -1e5, float("inf"), True, None, True]}
    assert parse_yaml(text) == {"a": values, "c": values | {"b": "2024-01-01"}, 1: None}
    assert parse_yaml("") is None
    assert parse_json('{"model_max_length": 1000000000000000019884624838656, "a": [1e-5, null, "\\u00e9"]}') == {
        "model_max_length": 1000000000000000019884624838656,
        "a": [1e-5, None, "é"],
    }
    assert parse_yaml("[" * 99 + "]" * 99) == yaml.safe_load("[" * 99 + "]" * 99)


def test_a_file_that_is_none(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match=r"pipe\.json is not readable JSON: it is no regular file"):
        read_json(tmp_path / "pipe.json")
    (tmp_path / "large.json").write_text("{}" + " " * 100)
    monkeypatch.setattr("models.parsing.LARGEST", 50)
    with pytest.raises(Malformed, match="it has 102 bytes; at most 50 are read"):
        read_plain(tmp_path / "large.json", parse_json)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    (tmp_path / "marked.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "marked.json") == {"a": 1}
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(UserError, match="no UTF-8"):
        read_json(tmp_path / "latin.json")
