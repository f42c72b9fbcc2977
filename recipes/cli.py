"""The command `espalier`: a table of verbs, and what becomes of an error.

Nothing heavy is imported before a verb runs, so that help answers at once. Exit status: 0 done, 2 the input is wrong
(one sentence on stderr), 1 a fault of ours, 130 interrupted, 141 nobody read the output
to its end (`| head`), 143 terminated.
"""

import errno
import importlib
import os
import sys
import traceback
import warnings
from dataclasses import dataclass, fields
from typing import Any

from models.errors import Notice, RunFailed, UserError, did_you_mean, printable
from recipes.commands import options
from recipes.commands.parser import parse_arguments, print_help
from recipes.termination import Terminated, terminable


@dataclass(frozen=True)
class Verb:
    """A verb of the command line: `module:function`, called with an instance of `options`."""

    target: str
    options: type | None  # None: the function takes (verb, argv) and parses for itself
    help: str
    again: str = "the same command starts anew"  # after this one was ended before it was done


LONGEST = 900  # characters of a sentence: it may quote what a person gave, of any length
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
LIGHTNING = "recipes.fit:main"
LAST = "the same command with --ckpt_path last goes on from the newest checkpoint"
ON = "the same command goes on from what is finished"
VERBS = {
    "fit": Verb(LIGHTNING, None, "pretrain a model: espalier fit -c recipes/pretrain/NAME.yaml", LAST),
    "validate": Verb(LIGHTNING, None, "run Lightning's validation loop of a pretraining recipe"),
    "test": Verb(LIGHTNING, None, "run Lightning's test loop of a pretraining recipe"),
    "predict": Verb(LIGHTNING, None, "run Lightning's prediction loop of a pretraining recipe"),
    "quantize": Verb("recipes.commands.quantize:main", options.Quantize, "store the weights in fewer bits", ON),
    "prune": Verb("recipes.commands.prune:main", options.Prune, "take weights, neurons or heads away", ON),
    "distill": Verb("recipes.commands.distill:main", options.Distill, "train a student on what a teacher predicts", ON),
    "run": Verb("recipes.commands.run:main", options.Run, "run the stages of a pipeline in a row", ON),
    "sweep": Verb("recipes.commands.sweep:main", options.Sweep, "train variants of one recipe, and compare them", ON),
    "evaluate": Verb("recipes.commands.evaluate:main", options.Evaluate, "measure models on the same held-out text"),
    "compare": Verb("recipes.commands.compare:main", options.Compare, "set two models side by side"),
    "generate": Verb("recipes.commands.generate:main", options.Generate, "continue a text"),
    "inspect": Verb("recipes.commands.inspect:main", options.Inspect, "show a model layer by layer"),
    "import": Verb("recipes.commands.import_:main", options.Import, "turn a Hugging Face folder into a model folder"),
    "export": Verb("recipes.commands.export:main", options.Export, "write a model in another format"),
    "report": Verb("recipes.commands.report:main", options.Report, "one page over many folders"),
}

USAGE = """\
usage: espalier VERB ... [--trust] [--debug]

Train Transformers with PyTorch Lightning, then make the checkpoint smaller.

{verbs}

espalier VERB --help explains the options of a verb.
--trust allows a recipe to name any class; without it, those that recipes/trust.py lists.
--debug shows the traceback of a fault.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status; `argv` is without the program's name."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = _take(argv, "--debug") or os.environ.get("ESPALIER_DEBUG", "") not in ("", "0")
    verb = VERBS.get(argv[0]) if argv else None
    warnings.formatwarning = _format_warning
    try:
        with terminable():
            status = _run(argv)
            sys.stdout.flush()  # here, where a closed pipe is no fault
            return status
    except UserError as error:
        return _complain(str(error), 2)
    except RunFailed as error:
        return _complain(str(error), 1)
    except BaseException as error:
        if (how := _ended(error)) is not None:
            return _complain(how[0] if verb is None else f"{how[0]}; {verb.again}", how[1])
        if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left must not fail at the exit
            return 141
        if isinstance(error, SystemExit) and isinstance(error.code, int):  # argparse's --help
            return error.code
        if debug:
            traceback.print_exc()
        return _complain(*_fault(error, debug))


def _ended(error: BaseException | None) -> tuple[str, int] | None:
    """Return the word and the exit status for what a person or the system has ended, also where it was wrapped."""
    while error is not None:
        for kind, word, status in ((Terminated, "terminated", 143), (KeyboardInterrupt, "interrupted", 130)):
            if isinstance(error, kind):
                return word, status
        error = error.__cause__ or error.__context__
    return None


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE.format(verbs="\n".join(f"  {name:10} {verb.help}" for name, verb in VERBS.items())))
        return 0 if argv else 2
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"espalier {version('espalier-lm')}")
        return 0
    name = argv.pop(0)
    if name not in VERBS:
        raise UserError(f"there is no verb '{name}'{did_you_mean(name, VERBS)}")
    verb = VERBS[name]
    if verb.options is None:
        return _function(verb)(name, argv) or 0
    if "-h" in argv or "--help" in argv:
        print_help(name, verb.options)
        return 0
    trusts = any(field.name == "trust" for field in fields(verb.options))
    if _take(argv, "--trust") and trusts:  # elsewhere nothing names a class, and there is nothing to trust
        argv.append("--trust")
    chosen = parse_arguments(name, verb.options, argv)
    return _function(verb)(chosen) or 0


def _function(verb: Verb):
    module, function = verb.target.split(":")
    return getattr(importlib.import_module(module), function)


def _take(argv: list[str], flag: str) -> bool:
    """Remove a flag from the arguments and say whether it was there."""
    found = flag in argv
    argv[:] = [argument for argument in argv if argument != flag]
    return found


def _complain(message: str, status: int) -> int:
    print("espalier: error:", plain(message), file=sys.stderr)
    return status


_FORMAT_WARNING = warnings.formatwarning


def _format_warning(message: Warning | str, category: type[Warning], *place: Any, **line: Any) -> str:
    if issubclass(category, Notice):
        return f"espalier: {plain(str(message))}\n"
    return _FORMAT_WARNING(message, category, *place, **line)


def plain(message: str) -> str:
    """Return a message as one line that any terminal may get: control characters escaped, what is too long left out."""
    line = printable(" ".join(message.split()))
    if len(line) <= LONGEST:
        return line
    kept = LONGEST // 2 - 30  # of the beginning, which says where, and of the end, which says what would be right
    return f"{line[:kept]} [... {len(line) - 2 * kept:,} characters ...] {line[-kept:]}"


def _fault(error: BaseException, debug: bool) -> tuple[str, int]:
    """Return the sentence and the exit status for an exception that nobody expected."""
    place = full_device(error)
    if place is not None:
        return f"no space left on the device{place}; free some, or write elsewhere (--out)", 2
    if isinstance(error, OSError) and error.errno in REFUSED and error.filename:
        return f"{error.filename}: {error.strerror}; name a file that may be read, or an --out that may be written", 2
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return "out of memory; a smaller --batch_size or --sequence_length needs less", 1
    hint = "" if debug else " (--debug shows where)"
    return f"{type(error).__name__}: {error}{hint}", 1


def full_device(error: BaseException | None) -> str | None:
    """Return ` while writing FILE` (or an empty string) when an error comes from a full device, else None.

    safetensors and torch report a full device with errors of their own, so the words are looked at as well.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f" while writing {error.filename}" if error.filename else ""
        if "os error 28" in str(error) or "No space left on device" in str(error):
            return ""
        error = error.__cause__ or error.__context__
    return None


if __name__ == "__main__":
    sys.exit(main())
