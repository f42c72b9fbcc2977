"""Mechanisms by name: every axis of the architecture (attention, feed-forward, position, norm) is a registry of specs.

A spec is a frozen dataclass with the few numbers of one mechanism; its `build` makes the module. In YAML and JSON a
spec is `{"kind": NAME, ...numbers}`, or just `NAME` when the defaults will do.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from models.errors import UserError, did_you_mean

LARGEST = 2**32  # of a whole number: a seed has 32 bits, and nothing is counted in more
LARGEST_FLOAT = 3.4028234663852886e38  # of float32, which is what models compute in


class Registry:
    """The mechanisms of one axis, by the name that a config uses for them.

    Args:
        axis: what a sentence calls one of them.
        example: a spec as it stands in YAML. Nothing: the first kind that needs no numbers.
    """

    def __init__(self, axis: str, example: str | None = None) -> None:
        self.axis = axis
        self._example = example
        self._specs: dict[str, type] = {}

    def register(self, kind: str) -> Callable[[type], type]:
        def remember(spec: type) -> type:
            spec.kind = kind
            self._specs[kind] = spec
            return spec

        return remember

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._specs))

    def __getitem__(self, kind: str) -> type:
        return self._specs[kind]

    @property
    def example(self) -> str:
        """A spec of the axis that is valid, as it stands in YAML."""
        if self._example is not None:
            return self._example
        return f"{{kind: {next(kind for kind in self if not any(map(_required, dataclasses.fields(self[kind]))))}}}"

    def parse(self, value: Any, where: str) -> Any:
        """Read a spec from `NAME`, `{"kind": NAME, ...}` or a spec itself.

        Raises:
            UserError: unknown kind or argument, missing argument, or a value of the wrong type, with its place.
        """
        if dataclasses.is_dataclass(value) and type(value) in self._specs.values():
            return value
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, Mapping) or "kind" not in value:
            article = "an" if self.axis[0] in "aeiou" else "a"
            raise UserError(f"{where}: expected {article} {self.axis} such as {self.example}, got {value!r}")
        kind = value["kind"]
        if not isinstance(kind, str) or kind not in self._specs:
            raise UserError(f"{where}: unknown {self.axis} {kind!r}{did_you_mean(kind, self._specs)}")
        arguments = {key: argument for key, argument in value.items() if key != "kind"}
        for key in arguments.keys() - _hints(self._specs[kind]).keys():
            if able := " or ".join(other for other in self if key in _hints(self._specs[other])):
                raise UserError(
                    f"{where}: {key} is an option of {self.axis} {able}, not of {kind}; leave it out, or choose {able}"
                )
        return read_dataclass(self._specs[kind], arguments, where, f" ({kind} needs it)")

    def dump(self, spec: Any) -> dict[str, Any]:
        return {"kind": spec.kind, **dump_dataclass(spec)}


class Several:
    """In a field's `registry`: any number of specs of one registry, a list in YAML and a tuple in the spec."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry

    def parse(self, value: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}: expected a list such as [{self.registry.example}], got {value!r}")
        return tuple(self.registry.parse(item, f"{where}[{i}]") for i, item in enumerate(value))

    def dump(self, specs: tuple[Any, ...]) -> list[dict[str, Any]]:
        return [self.registry.dump(spec) for spec in specs]


class Names:
    """In a field's `registry`: names, as `a,b` or a list, and a tuple in the spec."""

    def parse(self, value: Any, where: str) -> tuple[str, ...]:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
            raise UserError(f"{where}: expected names such as a,b or a list of them, got {value!r}")
        return tuple(part.strip() for part in parts if part.strip())

    def dump(self, names: tuple[str, ...]) -> list[str]:
        return list(names)


class Single:
    """In a field's `registry`: a spec of one class, which needs no `kind`."""

    def __init__(self, cls: type) -> None:
        self.cls = cls

    def parse(self, value: Any, where: str) -> Any:
        if isinstance(value, self.cls):
            return value
        if not isinstance(value, Mapping):
            names = ", ".join(field.name for field in dataclasses.fields(self.cls))
            raise UserError(f"{where}: expected its keys ({names}), got {value!r}")
        return read_dataclass(self.cls, value, where)

    def dump(self, spec: Any) -> dict[str, Any]:
        return dump_dataclass(spec)


def read_dataclass(cls: type, arguments: Mapping[str, Any], where: str, needed: str = "") -> Any:
    """Build `cls` from plain values, checking names and types; `registry` in a field's metadata reads a nested spec.

    needed: what an error adds about a missing key.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = _hints(cls)
    values = {}
    for name, value in arguments.items():
        if name not in fields:
            raise UserError(f"{where}: unknown key {name!r}{did_you_mean(name, fields)}")
        registry = fields[name].metadata.get("registry")
        if registry is not None and value is None and fields[name].default is None:
            values[name] = None
        elif registry is not None:
            values[name] = registry.parse(value, f"{where}.{name}")
        else:
            values[name] = _checked(value, hints[name], f"{where}.{name}")
    for name, field in fields.items():
        if name not in values and _required(field):
            raise UserError(f"{where}: {name!r} is missing{needed}")
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _required(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def dump_dataclass(spec: Any) -> dict[str, Any]:
    """The fields of a spec as plain JSON values."""
    values = {}
    for field in dataclasses.fields(spec):
        value, registry = getattr(spec, field.name), field.metadata.get("registry")
        values[field.name] = registry.dump(value) if registry is not None and value is not None else value
    return values


@functools.cache
def _hints(cls: type) -> dict[str, tuple[Any, ...]]:
    """The types that each option of a spec may have."""
    hints = typing.get_type_hints(cls)
    return {field.name: _alternatives(hints[field.name]) for field in dataclasses.fields(cls) if field.init}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _checked(value: Any, allowed: tuple[Any, ...], where: str) -> Any:
    """Return `value` as one of the plain types (an int passes as a float); refuse any other, NaN and what is huge."""
    if type(value) not in allowed and not (float in allowed and type(value) is int):
        for kind in allowed:
            if typing.get_origin(kind) is dict is type(value):
                inner = _alternatives(typing.get_args(kind)[1])
                return {key: _checked(one, inner, f"{where}.{key}") for key, one in value.items()}
            if typing.get_origin(kind) is typing.Literal and value in typing.get_args(kind):
                return value
        raise UserError(f"{where}: expected {' or '.join(dict.fromkeys(map(_named, allowed)))}, got {value!r}")
    whole = type(value) is int and int in allowed
    if type(value) in (int, float) and not abs(value) <= (LARGEST if whole else LARGEST_FLOAT):
        most = f"a whole number of at most {LARGEST}" if whole else "a finite number of at most 3.4e38"
        raise UserError(f"{where}: expected {most}, got {value!r}")
    return float(value) if type(value) is int and not whole else value


def _named(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    return "nothing" if kind is type(None) else (typing.get_origin(kind) or kind).__name__
