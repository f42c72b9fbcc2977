"""The kinds that a help lists are those of the registries, with their own options and defaults."""

import dataclasses

import pytest

from compress import pruning, quantization
from compress.distillation.initialization import INITIALIZATIONS
from compress.distillation.losses import feature, logit  # noqa: F401  register their losses
from compress.distillation.losses.loss import LOSSES
from compress.quantization.quantizer import Quantizer, grid_of, own_options
from models.registry import dump_dataclass
from recipes import cli
from recipes.commands.export import FORMATS
from recipes.kinds import kinds

REGISTRIES = {
    "compress/quantization:METHODS": quantization.METHODS,
    "compress/pruning:METHODS": pruning.METHODS,
    "compress/distillation:LOSSES": LOSSES,
    "compress/distillation:INITIALIZATIONS": INITIALIZATIONS,
    "recipes/commands:FORMATS": FORMATS,
}


def shown(value):
    """A default as the help shows it."""
    if isinstance(value, dict) and "kind" in value:
        return value["kind"]
    if value in (None, [], ()):
        return "none"
    return ",".join(value) if isinstance(value, list | tuple) else str(value).lower()


def test_every_registry_of_an_option_is_compared():
    fields = [field for verb in cli.VERBS.values() if verb.options for field in dataclasses.fields(verb.options)]
    assert {field.metadata["registry"] for field in fields} - {""} == REGISTRIES.keys()


@pytest.mark.parametrize("name", REGISTRIES)
def test_kinds_options_and_defaults(name):
    registry = REGISTRIES[name]
    found = {kind.name: kind for kind in kinds(name)}
    assert list(found) == [kind for kind in registry if registry[kind].__module__.startswith(("compress", "recipes"))]
    for kind, described in found.items():
        spec = registry[kind]()
        values = own_options(spec) | grid_of(spec) if isinstance(spec, Quantizer) else dump_dataclass(spec)
        assert {one.name: one.default for one in described.options} == {key: shown(v) for key, v in values.items()}
        assert described.help
        assert all(one.help for one in described.options), kind
