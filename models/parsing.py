"""YAML and JSON from outside: plain values, each key once, within bounds of size, nesting and length of numbers."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import yaml

DEEPEST = 100  # lists and mappings inside each other
LONGEST = 100  # characters of a number
MOST = 100_000  # values of a YAML text, with every alias written out
LARGEST = 2**26  # bytes of a file: the tokenizer of a large vocabulary has half of that


class Malformed(ValueError):
    """A text that is no YAML or JSON, or more than a file of settings can be; the message says where and why."""


def read_plain(path: Path, parse: Callable[[str], Any]) -> Any:
    """The value in a UTF-8 file, read by `parse_json` or `parse_yaml`.

    Raises:
        OSError: the file is missing or may not be read.
        Malformed: it is no regular file, no UTF-8, too large, or what `parse` refuses.
    """
    status = path.stat()
    if not path.is_file():
        raise Malformed("it is no regular file")
    if status.st_size > LARGEST:
        raise Malformed(f"it has {status.st_size:,} bytes; at most {LARGEST:,} are read")
    try:
        return parse(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Malformed(f"it is no UTF-8 text: {error}") from None


def parse_json(text: str) -> Any:
    """The value of a JSON text (RFC 8259: NaN and infinity are none). Raises Malformed."""
    try:
        value = json.loads(
            text, object_pairs_hook=unique_keys, parse_int=_whole, parse_float=_fraction, parse_constant=_constant
        )
    except RecursionError:
        raise Malformed(f"lists and objects are nested more than {DEEPEST} deep") from None
    except json.JSONDecodeError as error:
        raise Malformed(str(error)) from None
    _check_depth(value)
    _check_text(text, value)
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as `json.loads` gives its pairs to `object_pairs_hook`. Raises Malformed for a key given twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise Malformed(f"the key {twice!r} stands there twice")
    return found


def _whole(digits: str) -> int:
    if len(digits) > LONGEST:
        raise Malformed(f"a number has {len(digits)} digits; at most {LONGEST} are read")
    return int(digits)


def _fraction(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise Malformed(f"the number {digits[:LONGEST]} is too large")
    return value


def _constant(name: str) -> float:
    raise Malformed(f"{name} is no number of JSON")


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        if depth > DEEPEST:
            raise Malformed(f"lists and objects are nested more than {DEEPEST} deep")
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, dict | list)
        ]
        depth += 1


def _check_text(text: str, value: Any) -> None:
    """Raise Malformed for half of a surrogate pair, which an escape can write and no file can hold."""
    if re.search(r"\\[uU]", text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Malformed("an escape stands for half of a surrogate pair, which is no character") from None


_FLOAT = re.compile(  # of YAML 1.2, where `1e-5` is a number
    r"""^(?:[-+]?(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?
    |[-+]?\d[\d_]*[eE][-+]?\d+
    |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_INT = re.compile(r"^[-+]?(?:0b[01_]+|0x[\da-fA-F_]+|0[0-7_]*|[1-9][\d_]*)$")  # `2:4` is a text, not sixty times two
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """YAML of plain values: no dates, sets or binary, and a key that stands twice is refused."""

    yaml_constructors: ClassVar = {
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in _PLAIN
    }
    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, form) for tag, form in forms if not tag.endswith((":timestamp", ":float", ":int"))]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name in seen and name is not None:
                raise Malformed(f"line {key.start_mark.line + 1}: the key {key.value!r} stands there twice")
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        if len(node.value) > LONGEST:
            line, length = node.start_mark.line + 1, len(node.value)
            raise Malformed(f"line {line}: a number has {length} characters; at most {LONGEST} are read")
        whole = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))


def parse_yaml(text: str) -> Any:
    """The value of a YAML text with one document; None where it is empty. Raises Malformed."""
    try:
        depth = 0
        for number, event in enumerate(yaml.parse(text, Loader=_Loader)):
            if number > 2 * MOST:
                raise Malformed(f"it holds more than {MOST:,} values")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise Malformed(f"line {event.start_mark.line + 1}: nested more than {DEEPEST} deep")
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _weigh(node, {})
            value = loader.construct_document(node)
        finally:
            loader.dispose()
    except Malformed:
        raise
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        raise Malformed(" ".join(str(error).replace('in "<unicode string>", ', "in ").split())) from None
    _check_text(text, value)
    return value


def _weigh(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Values in a node and levels of nesting, with every alias written out."""
    if id(node) in known:
        if known[id(node)] is None:
            raise Malformed(f"line {node.start_mark.line + 1}: a value contains itself")
        return known[id(node)]
    known[id(node)] = None
    values = node.value if isinstance(node, yaml.CollectionNode) else []
    inner = [part for one in values for part in (one if isinstance(one, tuple) else (one,))]
    weights = [_weigh(one, known) for one in inner]
    size, depth = 1 + sum(one for one, _ in weights), 1 + max((deep for _, deep in weights), default=0)
    if size > MOST or depth > DEEPEST + 1:
        what = f"more than {MOST:,} values" if size > MOST else f"nested more than {DEEPEST} deep"
        raise Malformed(f"line {node.start_mark.line + 1}: {what} with the aliases written out")
    known[id(node)] = size, depth
    return size, depth
