"""A pipeline file: stages in a row, each starting from what the one before it wrote.

common: {data: python, seed: 0}          # options of every stage that has them, and flags of pretraining
stages:
  - stage: pretrain
    config: ../pretrain/quickstart.yaml  # a recipe, beside this file or below the working directory
  - stage: distill
    name: student                        # its folder is OUT/02-student; without a name, OUT/02-distill
    teacher: "@pretrain"                 # the folder of an earlier stage
    student_layers: 3
  - stage: quantize                      # MODEL is the folder of the stage before
    bits: 4

A stage `pretrain` behind others, or with a model before it, goes on from its weights.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import UserError, did_you_mean
from recipes.command_line import COMMAND_LINE, check_keys, find_recipe, read_recipe, refuse_classes, refuse_keys
from recipes.commands import options
from recipes.commands.parser import parse_sources, short_forms
from recipes.commands.pipeline_inputs import Input, pretraining_inputs, stage_inputs
from recipes.commands.resume import fingerprint_of
from recipes.fit_arguments import ALIASES

PRETRAIN = "pretrain"
START = "model.from"  # of `espalier fit`: the model whose weights it starts from
OPTIONS = {"quantize": options.Quantize, "prune": options.Prune, "distill": options.Distill}


@dataclass(frozen=True)
class StagePlan:
    """One stage of a pipeline, with every path in place.

    Attributes:
        verb: pretrain, quantize, prune or distill.
        name: what other stages call it.
        out: its folder.
        options: what the stage is told, or for pretraining the arguments of `espalier fit`.
        fingerprint: of this stage and of those before it: a change anywhere up to here changes it.
        inputs: what it reads from outside of the pipeline's folder, whose content is not in the fingerprint.
    """

    verb: str
    name: str
    out: Path
    options: Any
    fingerprint: str
    inputs: list[Input]


def read_pipeline(
    path: Path, out: Path, model: Path | None, device: str | None, trust: bool = False
) -> list[StagePlan]:
    """Return the steps of a pipeline file.

    Args:
        path: the file.
        out: the folder that the stages' folders go into.
        model: what the first stage starts from, unless it pretrains.
        device: for stages that name none; None: the one under `common`, or else auto.
        trust: whether a pretraining recipe may name any class.

    Raises:
        UserError: an unknown key or stage, a stage without a model, a name that is used twice or not known.
    """
    values = read_recipe(path)
    check_keys(values, {"common", "stages"}, path)
    stages = values.get("stages")
    if not isinstance(stages, list) or not stages:
        raise UserError(f"{path}: stages must list at least one stage")
    common = {} if values.get("common") is None else values["common"]
    if not isinstance(common, dict):
        raise UserError(f"{path}: common must be a mapping of options to values, not {common!r}")
    every = set().union(*(keys_of(kind) for kind in OPTIONS.values())) - {"out", "overwrite"}
    check_keys(common, every, f"{path}: common")
    refuse_classes(common, f"{path}: common")
    common = {"device": "auto"} | common | ({} if device is None else {"device": device})
    reader = _Reader(path, out, common, model, trust)
    for number, stage in enumerate(stages, start=1):
        reader.add(number, stage)
    return reader.steps


def keys_of(kind: type) -> set[str]:
    """The options of a stage, short forms among them."""
    return {field.name for field in dataclasses.fields(kind)} | short_forms(kind).keys()


class _Reader:
    """Reads one stage after the other, knowing the folders of those before."""

    def __init__(self, path: Path, out: Path, common: Mapping[str, Any], model: Path | None, trust: bool) -> None:
        self.path, self.out, self.common, self.trust = path, out, common, trust
        self.steps: list[StagePlan] = []
        self.folders: dict[str, Path] = {}
        self.latest = model
        self.fingerprint = fingerprint_of({"model": None if model is None else str(model.resolve())})

    def add(self, number: int, stage: Any) -> None:
        where = f"{self.path}: stage {number}"
        if not isinstance(stage, dict) or not isinstance(stage.get("stage"), str):
            raise UserError(f"{where} must be a mapping with the key `stage`, its verb")
        values = dict(stage)
        verb = values.pop("stage")
        if verb not in (PRETRAIN, *OPTIONS):
            raise UserError(f"{where}: there is no stage '{verb}'{did_you_mean(verb, (PRETRAIN, *OPTIONS))}")
        name = str(values.pop("name", verb))
        if name in self.folders or Path(name).name != name:
            raise UserError(f"{where}: the name '{name}' is taken or no plain name; give another with `name`")
        out = self.out / f"{number:02d}-{name}"
        refuse_keys(values, COMMAND_LINE, where)
        config = values.pop("config", None)
        if config is not None and not isinstance(config, str):
            raise UserError(f"{where}: config must be the name of a recipe, not {config!r}")
        recipe = {} if config is None else read_recipe(find_recipe(config, self.path, where))
        if verb == PRETRAIN:
            before = {} if self.latest is None else {START: str(self.latest)}
            flags = {key: self._folder(value, where) for key, value in (before | self._shared_flags() | values).items()}
            chosen: Any = self._pretrain(config, flags, out, where)
            told: Any = {"recipe": recipe, "values": {key: flags[key] for key in flags.keys() - {"device"}}}
            inputs = pretraining_inputs(recipe, flags, self.out)
        else:
            chosen = self._options(verb, recipe, values, out, where)
            told = {key: value for key, value in dataclasses.asdict(chosen).items() if key != "out"}
            inputs = stage_inputs(chosen, self.out)
        self.fingerprint = fingerprint_of({"before": self.fingerprint, "stage": verb, "told": self._portable(told)})
        self.steps.append(StagePlan(verb, name, out, chosen, self.fingerprint, inputs))
        self.folders[name] = self.latest = out

    def _shared_flags(self) -> dict[str, Any]:
        """Options of `common` that pretraining has a flag for; `dtype: auto` is its default."""
        flags = {"data.column" if key == "column" else key: value for key, value in self.common.items()}
        flags = {key: value for key, value in flags.items() if key in (*ALIASES, "data.column") and value is not None}
        return {key: value for key, value in flags.items() if (key, value) != ("dtype", "auto")}

    def _pretrain(self, config: str | None, flags: Mapping[str, Any], out: Path, where: str) -> list[str]:
        if config is None:
            raise UserError(f"{where}: pretrain needs `config`, a recipe of recipes/pretrain")
        argv = ["-c", str(find_recipe(config, self.path, where))]
        argv += [f"--{key}={value}" for key, value in flags.items()]
        return [*argv, *(["--trust"] if self.trust else []), f"--out={out}", "--ckpt_path=last"]

    def _options(self, verb: str, recipe: dict[str, Any], values: dict[str, Any], out: Path, where: str) -> Any:
        common = {key: value for key, value in self.common.items() if key in keys_of(OPTIONS[verb])}
        role = "teacher" if verb == "distill" else "model"
        before = {} if self.latest is None else {role: str(self.latest)}
        given = before | common | recipe | values
        for key in ("out", "overwrite"):
            if key in given:
                raise UserError(f"{where}: {key} is not for a stage; its folder is {out}")
        if role not in given:
            raise UserError(f"{where}: nothing comes before it; name a model with --model, or pretrain first")
        sources = [before, common, recipe, values]
        placed = [{key: self._folder(value, where) for key, value in source.items()} for source in sources]
        return parse_sources(verb, OPTIONS[verb], [(source, where) for source in [*placed, {"out": str(out)}]])

    def _folder(self, value: Any, where: str) -> Any:
        """`@NAME` is the folder of that stage."""
        if not isinstance(value, str) or not value.startswith("@"):
            return value
        if value[1:] not in self.folders:
            raise UserError(f"{where}: {value} names no stage before it{did_you_mean(value[1:], self.folders)}")
        return str(self.folders[value[1:]])

    def _portable(self, told: Any) -> Any:
        """Without the folder that all of it goes to, so that a pipeline may be moved while it is unfinished."""
        if isinstance(told, dict):
            return {key: self._portable(value) for key, value in told.items()}
        return told.replace(str(self.out), "OUT") if isinstance(told, str) else told
