"""Numbers that no run can mean, nulls where a value must stand, and the parser's complaints as sentences."""

import re

import pytest

from models.errors import UserError
from recipes.commands.options import Distill
from recipes.commands.parser import parse_arguments, parse_sources
from recipes.fit_errors import sentence
from recipes.trust import HARMLESS
from recipes.values import LEAST, MOST, check_finite, check_nulls, check_numbers, check_times


@pytest.mark.parametrize("key", LEAST)
def test_numbers_that_are_too_small(key):
    least, others = LEAST[key]
    below = 0 if 0 < least < 1 else least - 1
    below = next(value for value in (below, below - 2) if value not in others)
    with pytest.raises(UserError, match=rf"{re.escape(key)} is {below}; it must be (at least|above)"):
        check_numbers({key: below})
    for value in (*others, least, None):
        check_numbers({key: value})


@pytest.mark.parametrize("key", MOST)
def test_numbers_that_are_too_large(key):
    check_numbers({key: MOST[key]})
    with pytest.raises(UserError, match=rf"{re.escape(key)} is {10**10}; it must be at most {MOST[key]:,}"):
        check_numbers({key: 10**10})


@pytest.mark.parametrize("key", ["val_check_interval", "max_time"])
def test_times_that_are_none(key):
    for value in (None, 3, "00:00:01:00", {"hours": 1}):
        check_times({key: value})
    for value in ({}, {"x": 1}, {"hours": -1}, {"hours": "x"}, {"days": 10**30}):
        with pytest.raises(UserError, match=rf"trainer\.{key} is .* must be above 0, such as"):
            check_times({key: value})


def test_a_class_that_is_none_is_answered_with_those_of_the_list():
    for key, kinds in HARMLESS.items():
        said = sentence(
            f"Parser key \"{key}\":\n Expected a dot import path string: Foo <class 'collections.abc.Sized'>"
        )
        names = said.partition("one of: ")[2].rstrip(")").split(", ")
        assert names == sorted(kind.rpartition(".")[2] for kind in kinds), said


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
        parse_sources("distill", Distill, [({"teacher": "t", "out": "o", key: float(number)}, "stage 1")])


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
            'Parser key "model.optimizer": Problem with given class_path \'app.optim.AdamW\': Parser key "betas": '
            "Expected a <class 'tuple'>. Got value: 3",
            "model.optimizer: betas of AdamW must be a list, not 3",
        ),
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
