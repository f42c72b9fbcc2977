"""The shape of a JSON file that was written once, checked where it is read."""

import copy

import pytest

from models.errors import UserError
from models.shapes import COUNT, EACH, NUMBER, POSITIVE, TEXT, VALUES, check_shape, maybe

SHAPE = {
    "name": TEXT,
    "tokens": COUNT,
    "loss?": NUMBER,
    "interval": [maybe(POSITIVE), maybe(POSITIVE)],
    "rows": [{"seed": COUNT}],
    "layers": {EACH: {"load": [NUMBER]}},
    "recipe": VALUES,
}
RIGHT = {
    "name": "x",
    "tokens": 3,
    "interval": [1.5, None],
    "rows": [{"seed": 1}, {"seed": 2}],
    "layers": {"blocks.0": {"load": [0.5, 0]}},
    "recipe": {"anything": [None]},
    "further": None,
}


def test_what_was_written_passes():
    check_shape(RIGHT, SHAPE, "x.json")
    check_shape(RIGHT | {"loss": -1, "rows": []}, SHAPE, "x.json")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["name"], None, r"x\.json: name must be text, not None"),
        (["tokens"], True, "tokens must be a whole number of at least 1, not True"),
        (["tokens"], 0, "tokens must be"),
        (["tokens"], 3.0, "tokens must be"),
        (["loss"], None, "loss must be a number, not None"),
        (["loss"], float("nan"), "loss must be a number, not nan"),
        (["loss"], 10**400, "loss must be a number"),
        (["interval"], [1.0], "interval must be a list of 2 values"),
        (["interval", 1], 0, r"interval\[1\] must be a number above 0 or null, not 0"),
        (["rows"], {}, "rows must be a list, not {}"),
        (["rows", 1], 3, r"rows\[1\] must hold keys and values, not 3"),
        (["rows", 1], {}, r"rows\[1\] has no 'seed'"),
        (["layers", "blocks.0"], None, r"layers\.blocks\.0 must hold keys and values"),
        (["layers", "blocks.0", "load", 0], "x", r"layers\.blocks\.0\.load\[0\] must be a number, not 'x'"),
        (["recipe"], "y" * 999, "recipe must be keys and values, not 'y{79}[.]{3}$"),
    ],
)
def test_the_first_place_that_differs_is_named(path, value, words):
    tree = copy.deepcopy(RIGHT)
    node = tree
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(UserError, match=words):
        check_shape(tree, SHAPE, "x.json")
