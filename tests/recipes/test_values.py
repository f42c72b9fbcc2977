"""Numbers that no run can mean, nulls where a value must stand, and the parser's complaints as sentences."""

import re

import pytest

from models.errors import UserError
from recipes.fit_errors import sentence
from recipes.stages.options import Distill
from recipes.stages.parser import parse_arguments, parse_values
from recipes.values import LEAST, check_finite, check_nulls, check_numbers


@pytest.mark.parametrize("key", LEAST)
def test_numbers_that_are_too_small(key):
    least, others = LEAST[key]
    below = 0 if 0 < least < 1 else least - 1
    below = next(value for value in (below, below - 2) if value not in others)
    with pytest.raises(UserError, match=rf"{re.escape(key)} is {below}; it must be (at least|above)"):
        check_numbers({key: below})
    for value in (*others, least, None):
        check_numbers({key: value})


@pytest.mark.parametrize("key", ["data.seed", "samples.seed"])
def test_seeds_of_more_than_32_bits(key):
    check_numbers({key: 2**32 - 1})
    with pytest.raises(UserError, match=rf"{re.escape(key)} is 4294967296; .* below 2\^32"):
        check_numbers({key: 2**32})


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite(number):
    check_finite({"a": {"b": [1.0, {"c": None}]}, "d": "nan"})
    with pytest.raises(UserError, match=rf"a\.b\.1\.c is {number}; it must be a finite number"):
        check_finite({"a": {"b": [1.0, {"c": number}]}})


@pytest.mark.parametrize("key", ["temperature", "alpha", "learning_rate", "weight_decay", "clip"])
@pytest.mark.parametrize("number", ["nan", "inf"])
def test_numbers_of_a_stage_that_are_not_finite(key, number):
    """On the command line, and in the stage of a pipeline."""
    with pytest.raises(UserError, match=f"{key} is {number}; it must be a finite number"):
        parse_arguments("distill", Distill, ["--teacher", "t", "--out", "o", f"--{key}=.{number}"])
    with pytest.raises(UserError, match=f"{key} is {number}; it must be a finite number"):
        parse_values("distill", Distill, {"teacher": "t", "out": "o", key: float(number)}, "stage 1")


def test_nulls_in_the_options_of_a_class():
    muon = {"class_path": "app.optim.Muon", "init_args": {"adamw_lr": None}}
    check_nulls({"model": {"optimizer": muon, "schedule": None}})
    for key in ("lr", "momentum", "betas", "eps"):
        with pytest.raises(UserError, match=f"^model.optimizer.{key} of Muon is null; give a value"):
            check_nulls({"model": {"optimizer": {**muon, "init_args": {key: None}}}})


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            'Parser key "trainer.max_epochs":\n  Does not validate against any of the Union subtypes\n  Subtypes: '
            "[<class 'int'>, <class 'NoneType'>]\n  Errors:\n    - Expected a <class 'int'>\n    - Expected a <class "
            "'NoneType'>\n  Given value type: <class 'str'>\n  Given value: x",
            "trainer.max_epochs must be a whole number or null, not x",
        ),
        (
            'Parser key "trainer.deterministic":\n  Does not validate against any of the Union subtypes\n  Subtypes: '
            "[<class 'bool'>, typing.Literal['warn'], <class 'NoneType'>]\n  Errors:\n    - Expected a <class 'bool'>\n"
            "  Given value type: <class 'int'>\n  Given value: 3",
            "trainer.deterministic must be true or false or one of 'warn' or null, not 3",
        ),
        (
            "Parser key \"data.seed\": Expected a <class 'int'>. Got value: None",
            "data.seed must be a whole number, not null",
        ),
        (
            'Parser key "trainer":\n  Unable to load config \'null\'\n  - Parser key "trainer": Unable to load config',
            "trainer must be keys and values, not null",
        ),
    ],
)
def test_the_parser_s_types_become_words(message, said):
    assert sentence(message) == said
