"""What each verb of the command line can be told: one dataclass a verb, every field typed and explained.

This module imports nothing heavy: the help of a verb is built from it alone. `parser.py` turns a dataclass into a
parser, `cli.py` says which function a verb calls with the result.
"""

# ruff: noqa: RUF009 (the calls in the defaults return dataclass fields)

from dataclasses import MISSING, dataclass, field
from typing import Any, Literal

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Names = str | list[str]


def option(help: str, default: Any = MISSING, *, factory: Any = MISSING) -> Any:
    """Return a dataclass field with the sentence that `--help` shows; without a default the option must be given."""
    return field(default=default, default_factory=factory, metadata={"help": help})


def positional(help: str, metavar: str, *, many: bool = False) -> Any:
    """Return a field that is given by its place on the command line; `many` takes one or more."""
    return field(metadata={"help": help, "metavar": metavar, "nargs": "+" if many else None})


def names(value: Names) -> tuple[str, ...]:
    """Return `a,b` or `[a, b]` as `("a", "b")`."""
    parts = value.split(",") if isinstance(value, str) else value
    return tuple(part.strip() for part in parts if part.strip())


@dataclass(kw_only=True)
class Compute:
    """Where and in which number format a model runs."""

    device: Device = option("where to run: auto takes the GPU when there is one", "auto")
    dtype: Dtype = option("number format of the weights while they run: auto keeps the stored one", "auto")


@dataclass(kw_only=True)
class Measure(Compute):
    """On which text a model is measured."""

    data: str = option(
        "text: `python` (the default corpus), a txt/jsonl/parquet/csv file, a folder or glob of them, a `datasets` "
        "folder, or a hub name",
        "python",
    )
    sequence_length: int | None = option("tokens of one block; default: the model's context, at most 1024", None)
    seed: int = option("seed of everything that is drawn at random", 0)
    batch_size: int | None = option("blocks of text that run at once; default: chosen from the vocabulary", None)
    evaluation_data: str | None = option("held-out text; default: the test split of --data", None)
    evaluation_blocks: int | None = option("measure on the first N held-out blocks only; default: all of them", None)


@dataclass(kw_only=True)
class Written:
    """Where a result goes."""

    out: str = option("folder to write; it must not hold anything yet, or --overwrite")
    overwrite: bool = option("replace what --out holds, once the new result is complete", False)


@dataclass(kw_only=True)
class Quantize(Written, Measure):
    """Store the weights in fewer bits, and report what that cost."""

    model: str = positional("model folder, Lightning checkpoint, or Hugging Face folder", "MODEL")
    method: Literal["rtn", "gptq"] = option(
        "rtn rounds every weight to the nearest grid point; gptq lets the weights that are still free make up for the "
        "error of those already rounded, on calibration text",
        "gptq",
    )
    bits: Literal[2, 3, 4, 8] = option("bits of a weight of a linear layer", 4)
    group_size: int = option("weights of one row that share a scale; -1: the whole row", 64)
    symmetric: bool = option("a grid around zero (true), or one with a zero point for each group (false)", True)
    embedding_bits: Literal[2, 3, 4, 8, 16] = option("bits of the token embedding; 16 leaves it as it is", 16)
    skip: Names = option("layers to leave as they are, by name or pattern (`head`, `blocks.0.*`), comma-separated", "")
    samples: int = option("calibration blocks of --sequence_length tokens, from the training split of --data", 128)
    damping: float = option("gptq: share of the mean diagonal that is added to the Hessian's diagonal", 0.01)


@dataclass(kw_only=True)
class Prune(Written, Measure):
    """Take weights, neurons or heads away, and report what that cost."""

    model: str = positional("model folder, Lightning checkpoint, or Hugging Face folder", "MODEL")
    method: Literal["magnitude", "wanda", "structured"] = option(
        "magnitude and wanda set weights to zero; structured takes neurons or key/value groups out of the tensors",
        "wanda",
    )
    sparsity: float = option("magnitude, wanda: share of the weights to set to zero, above 0 and below 1", 0.5)
    pattern: str = option(
        "magnitude, wanda: `unstructured`, or N:M to keep the N largest of every M inputs", "unstructured"
    )
    targets: Names = option(
        "structured: what to take out, comma-separated: neurons, groups (key/value groups)", "neurons"
    )
    ratio: float = option("structured: share of the targets to take out of every layer, above 0 and below 1", 0.25)
    criterion: Literal["magnitude", "activation"] = option(
        "structured: how the importance of a target is measured: by its weights, or by its activations on --samples",
        "activation",
    )
    skip: Names = option("layers to leave as they are, by name or pattern (`head`, `blocks.0.*`), comma-separated", "")
    samples: int = option("calibration blocks of --sequence_length tokens, from the training split of --data", 128)


@dataclass(kw_only=True)
class Distill(Written, Measure):
    """Train a student on what a teacher predicts, and report what that won."""

    teacher: str = option("the model to learn from: model folder, Lightning checkpoint, or Hugging Face folder")
    student: str | None = option(
        "the model that learns: a folder, or an architecture file (.yaml), which starts from random weights; "
        "default: the teacher cut down to --student_layers",
        None,
    )
    student_layers: int | None = option(
        "without --student: how many of the teacher's layers, evenly spaced, it keeps", None
    )
    losses: Names = option("what the student imitates, comma-separated: logit, feature", "logit")
    temperature: float = option("divides both models' logits before they are compared (Hinton et al. 2015)", 2.0)
    alpha: float = option("weight of the imitation against the loss on the text itself: 1 is imitation alone", 0.5)
    max_steps: int = option("optimizer steps", 1000)
    train_batch_size: int = option("blocks of text in one optimizer step", 16)
    learning_rate: float = option("the highest learning rate of AdamW", 1e-3)
    warmup_steps: int = option("steps in which the learning rate rises from 0", 50)
    weight_decay: float = option("AdamW's weight decay of the matrices", 0.1)
    precision: str = option("Lightning's precision: `32-true`, `bf16-mixed`, `bf16-true`", "32-true")
    checkpoint_every: int = option("steps between two checkpoints from which an interrupted run continues", 100)


@dataclass(kw_only=True)
class Evaluate(Measure):
    """Measure one or more models on the same held-out text."""

    models: list[str] = positional("model folders, Lightning checkpoints, or Hugging Face folders", "MODEL", many=True)
    tasks: Names = option("further tasks to measure, comma-separated", "")
    out: str | None = option("also write the figures as JSON to this file", None)
    overwrite: bool = option("replace --out if it exists", False)


@dataclass(kw_only=True)
class Compare(Measure):
    """Set two models side by side on the same text: figures, and the paired change with its interval."""

    before: str = positional("the model to compare with", "BEFORE")
    after: str = positional("the model that came out of it", "AFTER")
    out: str | None = option("also write report.json, report.md, report.html and plots/ to this folder", None)
    overwrite: bool = option("replace what --out holds", False)


@dataclass(kw_only=True)
class Generate(Compute):
    """Continue a text."""

    model: str = positional("model folder, Lightning checkpoint, or Hugging Face folder", "MODEL")
    prompt: str = option("the text to continue")
    max_new_tokens: int = option("the most tokens to add", 100)
    temperature: float = option("0 takes the likeliest token, 1 samples from the model's distribution", 0.8)
    top_k: int | None = option("sample from the K likeliest tokens only", None)
    top_p: float | None = option("sample from the fewest tokens that hold this much probability", None)
    seed: int = option("seed of the sampling", 0)


@dataclass(kw_only=True)
class Inspect:
    """Show a model layer by layer: shape, bits, sparsity, parameters, bytes, FLOPs."""

    model: str = positional("model folder, Lightning checkpoint, or Hugging Face folder", "MODEL")
    out: str | None = option("also write the table as JSON to this file", None)
    overwrite: bool = option("replace --out if it exists", False)


@dataclass(kw_only=True)
class Import(Written):
    """Turn a Hugging Face folder of a supported family into a model folder."""

    folder: str = positional("a folder that `save_pretrained` wrote", "HF_FOLDER")
    dtype: Dtype = option("number format to store: auto keeps the one of the files", "auto")


@dataclass(kw_only=True)
class Export(Written):
    """Write a model in a format that other software loads."""

    model: str = positional("model folder or Lightning checkpoint", "MODEL")
    format: Literal["transformers", "compressed-tensors"] = option(
        "transformers writes dense weights; compressed-tensors keeps symmetric 4- and 8-bit weights packed",
        "transformers",
    )
    dtype: Dtype = option("number format of dense weights: auto keeps the stored one", "auto")


@dataclass(kw_only=True)
class Report(Written):
    """One page over many folders: size and speed against quality, the Pareto front marked."""

    folders: list[str] = positional("model folders that hold a report.json", "DIR", many=True)


@dataclass(kw_only=True)
class Run(Written):
    """Run the stages of a pipeline in a row; the same command again goes on after the last finished one."""

    recipe: str = positional("a pipeline file: recipes/pipeline/NAME.yaml", "RECIPE")
    model: str | None = option("the model the first stage starts from, where the pipeline does not pretrain one", None)
    device: Device = option("where to run: auto takes the GPU when there is one", "auto")
