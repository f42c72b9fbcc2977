"""Classes of a classifier by name: `id2label` of a Hugging Face config, `labels` in the task of a model folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.checkpoint import CONFIG
from models.errors import UserError
from models.families.uniform import integer, word
from models.io import inside, read_json


def count_classes(values: Mapping[str, Any]) -> int:
    """The number of classes that a `config.json` of a classifier names."""
    if (problem := word(values, "problem_type", "single_label_classification")) != "single_label_classification":
        raise UserError(f"problem_type {problem!r} is not supported: a text has one class here")
    labels = values.get("id2label")
    return len(labels) if isinstance(labels, dict) else integer(values, "num_labels", 2)


def class_names(folder: str | Path, count: int) -> tuple[str, ...]:
    """The names of so many classes in a model folder or a Hugging Face folder; their numbers where it has none."""
    names = [str(number) for number in range(count)]
    path = Path(folder).expanduser() / CONFIG
    content = read_json(inside(path.parent, CONFIG)) if path.is_file() else {}
    task, labels = content.get("task"), content.get("id2label")
    if isinstance(task, dict) and len(task.get("labels") or ()) == count:
        return tuple(task["labels"])
    if not isinstance(labels, dict) or set(labels) != set(names):
        return tuple(names)
    found = [str(labels[number]) for number in names]
    unnamed = labels == class_labels(names)["id2label"]
    return tuple(names if unnamed or len(set(found)) < count else found)


def class_labels(names: Sequence[str | int]) -> dict[str, Any]:
    """The keys of a `config.json` that name the classes; where they are but numbers, as transformers names them."""
    numbered = all(str(name) == str(number) for number, name in enumerate(names))
    labels = [f"LABEL_{name}" if numbered else name for name in names]
    return {
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
    }
