"""Options of the verbs: one dataclass a verb, every field typed and explained.

This module imports nothing heavy: the help of a verb is built from it alone. `parser.py` turns a dataclass into a
parser, `cli.py` says which function a verb calls with the result.
"""

# ruff: noqa: RUF009 (the calls in the defaults return dataclass fields)

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from models.errors import UserError

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Names = str | list[str]
Spec = str | dict[str, Any]  # a name, or {kind: name, ...its own options}
MODEL = "model folder, Lightning checkpoint, or Hugging Face folder"


LARGEST = 2**53  # of a whole number


ROWS = 2**16  # blocks of text at once
STEPS = 10**8  # of a training


def option(
    help: str,
    default: Any = MISSING,
    *,
    factory: Any = MISSING,
    least: float | None = None,
    most: float = LARGEST,
    registry: str = "",
    beside: bool = False,
    of: str = "",
) -> Any:
    """Return a dataclass field with the sentence that `--help` shows; without a default the option must be given.

    Args:
        least, most: a number below or above is refused before any work.
        registry: of the objects that it names: folder:VARIABLE (recipes/kinds.py).
        beside: whether the options of these objects may stand beside it, as flags of their own.
        of: the option of whose object this is one.
    """
    metadata = {"help": help, "least": least, "most": most, "registry": registry, "beside": beside, "of": of}
    return field(default=default, default_factory=factory, metadata=metadata)


def positional(help: str, metavar: str, *, many: bool = False) -> Any:
    """Return a field that is given by its place on the command line; `many` takes one or more."""
    metadata = {"help": help, "registry": "", "beside": False, "of": ""}
    return field(metadata={**metadata, "metavar": metavar, "nargs": "+" if many else None})


def check_numbers(chosen: Any) -> None:
    """Raise UserError for a number outside of the range of its option."""
    for one in fields(chosen):
        value, least = getattr(chosen, one.name), one.metadata.get("least")
        most = one.metadata.get("most", LARGEST)
        if isinstance(value, int) and abs(value) > most:
            raise UserError(f"{one.name} is {value}; it must be at most {most:,}")
        if least is not None and value is not None and not value >= least:  # NaN neither
            raise UserError(f"{one.name} is {value:g}; it must be at least {least:g}")


def check_seed(seed: int) -> None:
    """Raise UserError for a seed that not every generator takes: NumPy's have 32 bits."""
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; it must be at least 0 and below 2^32")


@dataclass(kw_only=True)
class Compute:
    """Device and dtype of a model."""

    device: Device = option("where to run: auto takes the GPU when there is one", "auto")
    dtype: Dtype = option("number format of the weights while they run: auto keeps the stored one", "auto")


@dataclass(kw_only=True)
class Measure(Compute):
    """On which text a model is measured."""

    data: str = option(
        "text to calibrate, train and measure on: `python` (the default corpus), a txt/jsonl/parquet/csv file, "
        "a folder or glob of them, a `datasets` folder, or a hub name",
        "python",
    )
    column: str | None = option("column or field of --data with the text, where there is more than one", None)
    sequence_length: int | None = option(
        "tokens of one block; default: the model's context, at most 1024", None, least=2
    )
    seed: int = option("seed of everything that is drawn at random", 0)
    batch_size: int | None = option(
        "blocks of text that run at once; default: chosen from the vocabulary", None, least=1, most=ROWS
    )
    evaluation_data: str | None = option("held-out text; default: the test split of --data", None)
    speed_rounds: int = option("timed rounds of generation for each model; 0 leaves speed out", 7, least=0, most=10_000)
    evaluation_blocks: int | None = option(
        "measure on the first N held-out blocks only; default: all of them", None, least=1
    )


@dataclass(kw_only=True)
class Written:
    """Output folder of a result."""

    out: str = option("folder to write; it must not hold anything yet, or --overwrite")
    overwrite: bool = option("replace what --out holds, once the new result is complete", False)


@dataclass(kw_only=True)
class StageOptions(Written, Measure):
    """Options of every stage that makes a model smaller."""


@dataclass(kw_only=True)
class Quantize(StageOptions):
    """Store the weights in fewer bits, and report what that cost."""

    model: str = positional(MODEL, "MODEL")
    method: Spec = option("how weights are rounded", "gptq", registry="compress/quantization:METHODS")
    bits: int | None = option(
        "bits of a weight of a linear layer; default: 4, where the method has a choice", None, of="method"
    )
    budget_bits: float | None = option(
        "in place of bits: the most bits that a weight of a linear layer takes on average, with scales and zeros; each "
        "layer is given those of 2, 3, 4 and 8 that lose least on the validation text together",
        None,
    )
    budget_bytes: int | str | None = option(
        "in place of bits: the most bytes of the whole weights file, such as 20MB or 512KiB", None
    )
    sensitivity_samples: int | None = option(
        "blocks of the validation split of --data on which each layer is tried at each of the bits; default: 32 with a "
        "budget, otherwise none",
        None,
        least=1,
    )
    group_size: int | Literal["channel", "tensor"] | None = option(
        "weights of one row that share a scale; `channel` or -1: the whole row, `tensor`: all of them; default: 64, "
        "where the method has groups",
        None,
        of="method",
    )
    symmetric: bool | None = option(
        "a grid around zero (true), or one with a zero point for each group (false); default: what suits the method",
        None,
        of="method",
    )
    embedding_bits: Literal[2, 3, 4, 8, 16] = option("bits of the token embedding; 16 leaves it as it is", 16)
    head_bits: Literal[2, 3, 4, 8, 16] = option("bits of an untied output head; 16 leaves it as it is", 16)
    skip: Names = option("layers to leave as they are, by name or pattern (`blocks.0.*`), comma-separated", "")
    samples: int = option(
        "calibration blocks of --sequence_length tokens, from the training split of --data", 128, least=1
    )
    minimum_tokens: int | None = option(
        "calibration tokens that every expert is to see: where its router gives it fewer, it takes the likeliest "
        "others; default: as many as its widest matrix has inputs",
        None,
        least=0,
    )
    layers: dict[str, dict[str, Any]] = option(
        "layers with a method, bits, group_size or symmetric of their own, by name or pattern: {'*.down': {bits: 8}}",
        factory=dict,
    )


@dataclass(kw_only=True)
class Prune(StageOptions):
    """Take weights, neurons, heads or remembered tokens away, and report what that cost."""

    model: str = positional(MODEL, "MODEL")
    method: Spec = option("what goes, and by which measure", "wanda", registry="compress/pruning:METHODS", beside=True)
    samples: int = option(
        "calibration blocks of --sequence_length tokens, from the training split of --data; of context, which compares "
        "losses, from its validation split",
        128,
        least=1,
    )


@dataclass(kw_only=True)
class Distill(StageOptions):
    """Train a student on what a teacher predicts, and report what that won."""

    teacher: str = option(f"the model to learn from: {MODEL}")
    student: str | None = option(
        "the model that learns: a model folder or checkpoint, or an architecture file (.yaml); default: the teacher's "
        "architecture with --student_layers layers",
        None,
    )
    student_layers: int | None = option("without --student: how many layers the student has; default: half", None)
    initialization: Spec | None = option(
        "of a student that is no model yet; default: layers without --student, random with an architecture file",
        None,
        registry="compress/distillation:INITIALIZATIONS",
    )
    losses: str | list[str | dict[str, Any]] | dict[str, Any] = option(
        "what the student imitates: names, comma-separated, or a list", "logit", registry="compress/distillation:LOSSES"
    )
    temperature: float | None = option(
        "logit: divides the logits of both models before they are compared; default: 2", None, least=0
    )
    alpha: float = option("share of the loss on the text itself; the logit loss has the rest", 0.5)
    weights: dict[str, float] = option("factors of further losses by name: {feature: 0.1}", factory=dict)
    max_steps: int = option("optimizer steps", 1000, least=1, most=STEPS)
    train_batch_size: int = option("blocks of text in one optimizer step", 16, least=1, most=ROWS)
    learning_rate: float = option("the highest learning rate of AdamW", 1e-3)
    warmup_steps: int = option("steps in which the learning rate rises from 0", 50, least=0)
    weight_decay: float = option("AdamW's weight decay of the matrices", 0.1, least=0)
    clip: float = option("the largest norm of the gradient", 1.0, least=0)
    compute_dtype: Literal["auto", "float32", "bfloat16"] = option(
        "number format of activations while training; the weights that are trained stay float32; auto: as the teacher",
        "auto",
    )
    zeros: Literal["held", "free"] = option("whether weights of the student that are exactly 0 stay 0", "held")
    compile: Literal["nothing", "blocks"] = option("what torch.compile is applied to in the student", "nothing")
    checkpoint_every: int = option("steps between two checkpoints from which an interrupted run goes on", 100, least=1)


@dataclass(kw_only=True)
class Evaluate(Measure):
    """Measure one or more models on the same held-out text."""

    models: list[str] = positional("model folders, Lightning checkpoints, or Hugging Face folders", "MODEL", many=True)
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

    model: str = positional(MODEL, "MODEL")
    prompt: str = option(
        "the text to continue; names of special tokens in it (<|im_start|>) are read as characters, unless "
        "--special_tokens says otherwise"
    )
    special_tokens: bool = option("read names of special tokens in the prompt as these tokens", False)
    max_new_tokens: int = option("the most tokens to add", 100, least=1, most=10**8)
    temperature: float = option("0 takes the likeliest token, 1 samples from the model's distribution", 0.8, least=0)
    top_k: int | None = option("sample from the K likeliest tokens only", None, least=1)
    top_p: float | None = option("sample from the fewest tokens that hold this much probability", None)
    seed: int = option("seed of the sampling", 0)
    exit_confidence: float | None = option(
        "leave a model with early exits where the likeliest token has this probability; default: run all layers", None
    )
    page_size: int | None = option(
        "keep keys and values in pages of so many tokens, taken as the text grows; default: all room at once",
        None,
        least=1,
    )


@dataclass(kw_only=True)
class Inspect:
    """Show a model layer by layer: shape, bits, sparsity, parameters, bytes, FLOPs."""

    model: str = positional(MODEL, "MODEL")
    out: str | None = option("also write the table as JSON to this file", None)
    verify: bool = option("first compare the SHA-256 of each file of the weights with the one in history.json", False)
    overwrite: bool = option("replace --out if it exists", False)


@dataclass(kw_only=True)
class Import(Written):
    """Turn a Hugging Face folder of a supported family into a model folder."""

    folder: str = positional("a folder that `save_pretrained` wrote", "HF_FOLDER")
    task: Spec | None = option(
        "its task, such as {kind: classify, text: sentence, label: label}; by default that of its head", None
    )
    dtype: Dtype = option("number format to store: auto keeps the one of the files", "auto")


@dataclass(kw_only=True)
class Export(Written):
    """Write a model in a format that other software loads."""

    model: str = positional("model folder or Lightning checkpoint", "MODEL")
    format: Spec = option("what loads it", "transformers", registry="recipes/commands:FORMATS")
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
    device: Device | None = option(
        "where to run; default: what the pipeline says under common, or else the GPU when there is one", None
    )
    trust: bool = option(
        "allow a pretraining recipe to name any class, not only those that recipes/trust.py lists", False
    )


@dataclass(kw_only=True)
class Sweep(Written):
    """Train one small recipe with one choice changed at a time, each with several seeds; the same command goes on."""

    recipe: str = positional("a sweep file: recipes/sweep/NAME.yaml", "RECIPE")
    parallel: int = option("runs at a time; each gets its share of the cores", 1, least=1, most=1024)
