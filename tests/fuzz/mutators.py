"""Mutations of trees (JSON, YAML), of texts and of bytes; each is drawn by a `random.Random` and describes itself."""

import json
import math
import re
from collections.abc import Callable
from random import Random
from typing import Any

import yaml

Path = tuple[str | int, ...]
RAW, TWICE = "RAWRAW", "TWICETWICE"  # marks in the values that become text no dumper would write


class Raw(str):
    """Text that goes into the file as it is."""


WORK = {"max_new_tokens", "max_steps", "max_epochs", "min_steps", "min_epochs", "speed_rounds", "common"}
DEEP = 20_000  # levels of nesting that no recursive reader survives
VALUES: list[Any] = [
    None, True, False, [], {}, "", " ", 0, -1, 1, 2, 3, 7, 0.5, -0.5, 1.5, 1e-320, 1e308, -0.0,
    10**9, 2**31, 2**63, 2**64, math.nan, math.inf, -math.inf,
    Raw("1" + "0" * 4000), Raw("[" * DEEP + "]" * DEEP), Raw("[" * 200 + "]" * 200), Raw("1e999"),
    "nan", "none", "a" * 10_000, "\x1b[31mred\x07", "a\nb", "[/bold]$x_{$", "<script>", "ü☃\U0001f600", "\u202e", "..",
    "../victim", "/dev/null/x", "http://127.0.0.1:9/x", "*", "os.system", [None], [[]], [0], [-1], ["x"], [1e9],
    {"kind": None}, {"kind": []}, {"kind": "x"}, {"class_path": "subprocess.Popen", "init_args": {"args": "true"}},
]  # fmt: skip

DTYPES = ["F64", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I8", "U8", "BOOL", "C64", "F4", "x", ""]
PATTERNS = [
    bytes.fromhex(word) for word in ("ffffffff", "0000c07f", "0000807f", "000080ff", "99766379")
]  # NaN, inf, 1e34


def paths(tree: Any, below: Path = ()) -> list[Path]:
    """Paths of all nodes of a tree but its root."""
    found: list[Path] = []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found += [(*below, key), *paths(value, (*below, key))]
    return found


def at(tree: Any, path: Path) -> Any:
    """The node at a path."""
    for key in path:
        tree = tree[key]
    return tree


def show(value: Any) -> str:
    """A value as a short text."""
    text = ascii(value)
    return text if len(text) < 60 else f"{text[:40]}... of {len(text)} characters"


def mutate_tree(random: Random, tree: Any) -> tuple[Any, str]:
    """Change one node of a tree of JSON values, in place where it can be; returns the tree and what was done."""
    everywhere = paths(tree)
    if not everywhere or random.random() < 0.02:
        value = random.choice(VALUES)
        return value, f"all of it := {show(value)}"
    # the keys near the root are as likely as those below
    depth = random.choice(sorted({len(path) for path in everywhere}))
    path = random.choice([path for path in everywhere if len(path) == depth])
    parent, key = at(tree, path[:-1]), path[-1]
    where = ".".join(map(str, path))[:120]
    drawn = random.random()
    if drawn < 0.5:
        value = random.choice(VALUES)
    elif drawn < 0.65:
        value = _near(random, parent[key])
    elif drawn < 0.72:
        value = random.choice([[parent[key]], {"x": parent[key]}, [parent[key]] * 2, str(parent[key])])
    elif drawn < 0.77:
        other = random.choice(everywhere)
        value = json.loads(json.dumps(at(tree, other), default=str))
    elif drawn < 0.9 or not isinstance(parent, dict):
        if _counts_work(key):  # the default may be an hour of it
            parent[key] = 3
            return tree, f"{where} := 3"
        del parent[key]
        return tree, f"{where} is left out"
    else:
        new = random.choice([f"{TWICE}{key}", f"{key}s", "x", "\x1b[31m", "class_path", "__class__"])
        parent[new] = random.choice([parent[key], *VALUES[:12]])
        return tree, f"{where}: a key {show(new.removeprefix(TWICE))} := {show(parent[new])} beside it"
    parent[key] = bearable(key, value)
    return tree, f"{where} := {show(parent[key])}"


def bearable(key: str | int, value: Any) -> Any:
    """The value, or 3 where it is much work, also by default: whoever asks for 10^9 steps gets them, and waits."""
    much = value is None or (isinstance(value, int | float) and 20 < value < 2**63)
    return 3 if much and _counts_work(key) else value


def _counts_work(key: str | int) -> bool:
    return str(key).rpartition(".")[2] in WORK


def _near(random: Random, value: Any) -> Any:
    """A value of the same type near the given one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return random.choice(
            [-value, value + 1, value - 1, value * 2, value // 2, value * 1000, float(value), str(value)]
        )
    if isinstance(value, float):
        return random.choice([-value, value * 1e6, value / 1e6, int(value), str(value)])
    if isinstance(value, str):
        return random.choice([value[:-1], value + "x", value.upper(), value * 2, f" {value}", [value]])
    return random.choice(VALUES)


def dump(tree: Any, form: str) -> str:
    """A tree as JSON or YAML with raw text and keys that occur twice."""
    raws: list[str] = []

    def marked(value: Any) -> Any:
        if isinstance(value, Raw):
            raws.append(value)
            return f"{RAW}{len(raws) - 1}{RAW}"
        if isinstance(value, dict):
            return {key: marked(inner) for key, inner in value.items()}
        return [marked(inner) for inner in value] if isinstance(value, list) else value

    tree = marked(tree)
    text = json.dumps(tree, indent=1) if form == "json" else yaml.safe_dump(tree, sort_keys=False, width=10**6)
    text = re.sub(rf"['\"]?{RAW}(\d+){RAW}['\"]?", lambda found: raws[int(found[1])], text)
    return text.replace(TWICE, "")


def mutate_text(random: Random, text: bytes) -> tuple[bytes, str]:
    """Change a text as editors, transfers and attackers do."""
    lines = text.splitlines(keepends=True) or [b""]
    which = random.randrange(len(lines))
    choices: dict[str, Callable[[], bytes]] = {
        "empty": lambda: b"",
        "blank lines": lambda: b"\n \n\n",
        "a byte order mark": lambda: b"\xef\xbb\xbf" + text,
        "UTF-16": lambda: text.decode("utf-8", "replace").encode("utf-16"),
        "Latin-1": lambda: b"\xe9\xff" + text,
        "a NUL": lambda: text[: len(text) // 2] + b"\0" + text[len(text) // 2 :],
        "CR LF": lambda: text.replace(b"\n", b"\r\n"),
        "tabs": lambda: text.replace(b"  ", b"\t"),
        "only null": lambda: b"null\n",
        "only a number": lambda: b"3\n",
        "only a list": lambda: b"[1, 2]\n",
        "deep nesting": lambda: b"[" * DEEP,
        "deep mappings": lambda: b'{"a":' * DEEP,
        "an alias bomb": lambda: _bomb() + text,
        "a self-reference": lambda: b"x: &x [*x]\n" + text,
        "a self-reference alone": lambda: b"&x {stages: *x, model: *x, data: *x}\n",
        "a Python tag": lambda: b"x: !!python/object/apply:os.system [true]\n" + text,
        "the text twice": lambda: text + text,
        "two documents": lambda: text + b"\n---\n" + text,
        "a merge key": lambda: b"<<: 3\n" + text,
        "one line fewer": lambda: b"".join(lines[:which] + lines[which + 1 :]),
        "one line twice": lambda: b"".join(lines[: which + 1] + lines[which:]),
    }
    name = random.choice(list(choices))
    return choices[name](), f"{name} (line {which + 1})" if name.startswith("one") else name


def _bomb() -> bytes:
    """Nine levels of nine aliases: 387 million values in 400 bytes of YAML."""
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    return ("\n".join(rows) + "\n").encode()


def mutate_bytes(random: Random, data: bytes) -> tuple[bytes, str]:
    """Change a binary file: flipped bits, cuts, holes, pieces moved, wrong lengths."""
    size = max(1, len(data))
    place, length = random.randrange(size), random.choice([1, 4, 64, 1000])
    early = random.randrange(min(size, 512))
    choices: dict[str, Callable[[], bytes]] = {
        f"a bit flipped at {early}": lambda: _flipped(data, early, 1 << (early % 8)),
        f"a byte flipped at {place}": lambda: _flipped(data, place, 255),
        f"cut at {place}": lambda: data[:place],
        f"{length} bytes of zeros at {place}": lambda: data[:place] + bytes(length) + data[place + length :],
        f"{length} bytes of ones at {place}": lambda: data[:place] + b"\xff" * length + data[place + length :],
        f"{length} bytes fewer at {place}": lambda: data[:place] + data[place + length :],
        f"{length} bytes more at the end": lambda: data + random.randbytes(length),
        f"the piece at {early} again at {place}": lambda: (
            data[:place] + data[early : early + 256] + data[place + 256 :]
        ),
        "empty": lambda: b"",
        "noise": lambda: random.randbytes(300),
        "zeros": lambda: bytes(len(data)),
    }
    name = random.choice(list(choices))
    return choices[name](), name


def _flipped(data: bytes, place: int, mask: int) -> bytes:
    return data[:place] + bytes(byte ^ mask for byte in data[place : place + 1]) + data[place + 1 :]


def mutate_safetensors(random: Random, data: bytes) -> tuple[bytes, str]:
    """Change the header's tree, its length, or the body of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    drawn = random.random()
    if drawn < 0.2:
        return mutate_bytes(random, data)
    if drawn < 0.3:
        wrong = random.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])
        return wrong.to_bytes(8, "little") + data[8:], f"header length := {wrong}"
    names = [name for name in header if name != "__metadata__"]
    name = random.choice(names)
    entry = header[name]
    begin, end = entry["data_offsets"]
    if drawn < 0.55:
        pattern = random.choice(PATTERNS)
        many = random.choice([1, max(1, (end - begin) // 4)])
        changed = (pattern * many)[: end - begin]
        return data[: 8 + length + begin] + changed + data[8 + length + begin + len(changed) :], (
            f"{name}: {many} values := {pattern.hex()}"
        )
    if drawn < 0.65:
        dtype = random.choice(DTYPES)
        entry["dtype"], what = dtype, f"{name}: dtype := {dtype!r}"
    elif drawn < 0.75:
        old = entry["shape"]
        shape = random.choice([[], [0], old[::-1], [*old, 1], [-1], [2**62, 2**62], [1.5], old * 2])
        entry["shape"], what = shape, f"{name}: shape := {shape}"
    elif drawn < 0.8:
        del header[name]
        what = f"{name} is left out of the header"
    else:
        header, what = mutate_tree(random, header)
    text = dump(header, "json").encode()
    return len(text).to_bytes(8, "little") + text + body, f"header: {what}"
