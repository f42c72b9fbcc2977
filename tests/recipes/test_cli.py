"""The command line: help without heavy imports, one sentence for a wrong input, exit statuses."""

import errno
import os
import subprocess
import sys

import pytest

from models.errors import UserError
from recipes import cli
from recipes.commands import options
from recipes.commands.parser import build_parser, parse_arguments, parse_sources

STAGE_VERBS = [name for name, verb in cli.VERBS.items() if verb.options is not None]


def run_cli(*argv, capsys):
    status = cli.main(list(argv))
    return status, capsys.readouterr()


def assert_refused(argv, capsys, *words):
    """The command exits with 2 and one line on stderr that holds all of `words`."""
    status, output = run_cli(*argv, capsys=capsys)
    assert status == 2, output.err
    assert output.err.startswith("espalier: error: ")
    assert output.err.count("\n") == 1
    assert "Traceback" not in output.err
    for word in words:
        assert word in output.err


@pytest.mark.parametrize("verb", ["", *STAGE_VERBS])
def test_help_imports_neither_torch_nor_lightning(verb):
    code = (
        "import sys; from recipes import cli; status = cli.main(sys.argv[1:]);"
        "heavy = {'torch', 'lightning', 'transformers', 'datasets', 'numpy', 'matplotlib'} & set(sys.modules);"
        "assert not heavy, heavy; sys.exit(status)"
    )
    arguments = [verb, "--help"] if verb else ["--help"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: espalier" in done.stdout


def test_help_lists_every_verb(capsys):
    status, output = run_cli("--help", capsys=capsys)
    assert status == 0
    assert all(f"  {name} " in output.out for name in cli.VERBS)


def test_every_option_has_help():
    for name in STAGE_VERBS:
        parser = build_parser(name, cli.VERBS[name].options)
        assert all(action.help for action in parser._actions), name


def test_no_verb_is_an_error(capsys):
    status, output = run_cli(capsys=capsys)
    assert status == 2
    assert "usage" in output.out


def test_unknown_verb_names_the_nearest(capsys):
    assert_refused(["quantise"], capsys, "quantise", "did you mean 'quantize'")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["quantize"], ["MODEL and --out must be given"]),
        (["quantize", "m", "--out", "o", "--bitz", "3"], ["--bitz", "did you mean '--bits'"]),
        (["quantize", "m", "--out", "o", "--bits", "5"], ["bits of method gptq must be 2, 3, 4 or 8, not 5"]),
        (
            ["quantize", "m", "--out", "o", "--group_size", "x"],
            ["group_size must be a whole number or one of channel, tensor, not x"],
        ),
        (["quantize", "m", "n", "--out", "o"], ["unrecognized", "n"]),
        (["prune", "m", "--out", "o", "--sparsity", "half"], ["sparsity must be a number, not half"]),
        (["generate", "m"], ["--prompt must be given"]),
        (["quantize", "m", "--out", "o", "-c"], ["-c needs the path of a recipe"]),
        (["quantize", "m", "--out", "o", "-c", "no/such.yaml"], ["no/such.yaml"]),
    ],
)
def test_wrong_arguments_are_one_sentence(argv, words, capsys):
    assert_refused(argv, capsys, *words)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("bitz: 3\n", ["unknown key 'bitz'", "did you mean 'bits'"]),
        ("bits: five\n", ["bits must be a whole number, not five"]),
        ("- 1\n", ["must hold a mapping"]),
        ("bits: [\n", ["cannot be read as YAML"]),
        ("bits: 4\n\x00", ["cannot be read as YAML"]),
    ],
)
def test_wrong_recipe_names_the_file(recipe, words, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    assert_refused(["quantize", "m", "--out", str(tmp_path / "o"), "-c", str(path)], capsys, str(path), *words)
    assert not (tmp_path / "o").exists()


def test_recipes_merge_from_left_to_right_and_the_command_line_wins(tmp_path):
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text(
        "bits: 3\ngroup_size: 32\nsymmetric: false\nskip: [head, 'blocks.0.*']\nmethod: {kind: gptq, clip: mse}\n"
    )
    second.write_text("group_size: 128\nmethod: {act_order: false}\n")
    chosen = parse_arguments(
        "quantize", options.Quantize, ["m", "--bits", "8", "--out", "o", "-c", str(first), "--config", str(second)]
    )
    assert (chosen.bits, chosen.group_size, chosen.symmetric) == (8, 128, False)
    assert chosen.method == {"kind": "gptq", "clip": "mse", "act_order": False}
    assert chosen.skip == ["head", "blocks.0.*"]


def test_options_of_a_method_stand_in_it_or_beside_it_and_the_later_ones_win(tmp_path):
    recipe = tmp_path / "recipe.yaml"

    def method(kind, text, *argv):
        recipe.write_text(text)
        verb = kind.__name__.lower()
        chosen = parse_arguments(verb, kind, ["m", "--out", "o", "-c", str(recipe), *argv])
        return chosen.method, getattr(chosen, "bits", None)

    half = "method: {kind: magnitude, sparsity: 0.5}"
    assert method(options.Prune, half, "--sparsity", "0.7")[0] == {"kind": "magnitude", "sparsity": 0.7}
    assert method(options.Prune, "method: wanda\nsparsity: 0.5", "--method.sparsity", ".7")[0]["sparsity"] == 0.7
    found, _ = method(options.Prune, half, "--pattern", "2:4", "--method", "magnitude")
    assert found == {"kind": "magnitude", "sparsity": 0.5, "pattern": "2:4"}
    assert method(options.Prune, half, "--method", "{kind: wanda, pattern: 2:4}")[0] == {
        "kind": "wanda",
        "pattern": "2:4",
    }
    assert method(options.Quantize, "bits: 3", "--method", "{kind: rtn, bits: 8}") == ({"kind": "rtn", "bits": 8}, None)
    found = method(options.Quantize, "method: {kind: gptq, clip: mse}", "--method.act_order", "false", "--bits", "8")
    assert found == ({"kind": "gptq", "clip": "mse", "act_order": False}, 8)
    with pytest.raises(UserError, match="sparsity stands both in method and beside it; keep one of them"):
        method(options.Prune, f"{half}\nsparsity: 0.7")


def test_help_lists_kinds_with_their_options(capsys):
    for verb, words in (
        ("quantize", ["squeezellm", "act_order", "group_size", "mse {steps: 25, smallest: 0.5}"]),
        ("prune", ["structured", "taylor", "--OPTION VALUE", "(default: existing)"]),
        ("distill", ["upcycled", "cosine, mean_squared", "--losses.OPTION"]),
        ("export", ["compressed-tensors", "Dense weights"]),
    ):
        shown = " ".join(run_cli(verb, "--help", capsys=capsys)[1].out.split())
        assert all(word in shown for word in words), verb


def test_numbers_in_scientific_notation(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 1e-3\n")
    chosen = parse_arguments("distill", options.Distill, ["--teacher", "t", "--out", "o", "-c", str(recipe)])
    assert chosen.learning_rate == 1e-3


def test_a_model_may_have_the_name_of_a_flag():
    assert parse_arguments("inspect", options.Inspect, ["config"]).model == "config"
    chosen = parse_arguments("quantize", options.Quantize, ["--overwrite", "c", "--out", "o"])
    assert (chosen.model, chosen.overwrite) == ("c", True)


def test_a_flag_alone_means_true():
    chosen = parse_arguments("quantize", options.Quantize, ["m", "--out", "o", "--overwrite", "--bits", "3"])
    assert chosen.overwrite is True
    assert chosen.bits == 3


def test_values_of_a_pipeline_are_checked_like_flags():
    chosen = parse_sources("prune", options.Prune, [({"model": "m", "out": "o", "ratio": 0.5}, "here")])
    assert chosen.method == {"kind": "wanda", "ratio": 0.5}
    with pytest.raises(UserError, match=r"p.yaml, stage 2: unknown key 'ration' \(did you mean 'ratio'"):
        parse_sources("prune", options.Prune, [({"model": "m", "out": "o", "ration": 0.5}, "p.yaml, stage 2")])


class Raise:
    """Stands in for a stage: `cli.main` calls it and it raises."""

    def __init__(self, error):
        self.error = error

    def __call__(self, chosen):
        raise self.error


def full_device_as_safetensors_says_it():
    return RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("a sentence\n  over two lines"), 2, "a sentence over two lines"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/model.safetensors"), 2, "/x/model.safetensors"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2, "/root/x: Permission denied; name a file"),
        (full_device_as_safetensors_says_it(), 2, "no space left on the device"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("division by zero"), 1, "division by zero (--debug shows where)"),
        (MemoryError(), 1, "out of memory"),
    ],
)
def test_exit_status(error, status, words, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_function", lambda verb: Raise(error))
    assert cli.main(["inspect", "m"]) == status
    output = capsys.readouterr().err
    assert words in output
    assert output.count("\n") == 1
    assert "Traceback" not in output


@pytest.mark.parametrize("switch", ["flag", "environment"])
def test_debug_shows_the_traceback(switch, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_function", lambda verb: Raise(ZeroDivisionError("oops")))
    argv = ["inspect", "m"]
    if switch == "flag":
        argv.append("--debug")
    else:
        monkeypatch.setenv("ESPALIER_DEBUG", "1")
    assert cli.main(argv) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["inspect", "fit"])
def test_a_sentence_is_one_line_of_bearable_length_for_any_terminal(verb, capsys):
    """It quotes what a person or a file gave: `\\x1b[31m` would colour the terminal, U+202E turns the rest around."""
    value = "\x1b[31mred\u202e" + "x" * 5000
    assert cli.main({"inspect": ["inspect", value], "fit": ["fit", f"--{value}=3"]}[verb]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("espalier: error: ")
    assert line.isprintable()
    assert r"\x1b[31m" in line
    assert len(line) < 1000


def test_output_that_nobody_reads_to_its_end_is_no_fault():
    """`espalier ... | head`."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "recipes.cli", "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
