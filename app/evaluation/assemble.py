"""The figures of report.json: a block for a model, and before / after / change for two.

    evaluate_model(subject, blocks)          -> {"name", "quality", "size", "speed", "measurement"}
    evaluate_pair(before, after, blocks)     -> {"before", "after", "change", "baselines", "measurement"}

Both models of a pair are evaluated on the same batches in one pass and timed in interleaved rounds, in this process.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from app.evaluation.intervals import Interval
from app.evaluation.metrics.perplexity import exp
from app.evaluation.quality import (
    Divergence,
    Progress,
    Quality,
    check_same,
    device_of,
    evaluate_qualities,
    evaluate_quality,
)
from app.evaluation.size import size_figures
from app.evaluation.speed import STANDARD, SpeedProtocol, change_of_speed, measure_speeds
from app.tasks import CausalLM, Task
from models.checkpoint import hash_weights
from models.transformer import Transformer

Report = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Subject:
    """A model under evaluation: what it is called, and the folder that its weights lie in."""

    model: Transformer
    name: str
    folder: Path | None = None

    def block(self, quality: Quality) -> dict:
        """The figures that need no clock: name, hash of the weights, quality, size, and the load of experts."""
        found = {"name": self.name, "quality": quality.figures(), "size": size_figures(self.model, self.folder)}
        found |= {"experts": quality.experts} if quality.experts else {}
        return found if self.folder is None else found | {"weights_sha256": hash_weights(self.folder)}


def phase(progress: Report, what: str) -> Progress:
    """The progress of one phase: (done, total) with its name in front."""
    return lambda done, total: progress(what, done, total)


def clean(value):
    """The same figures as JSON can hold them: None for a number that is infinite or not a number."""
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluate_pair(
    before: Subject,
    after: Subject,
    blocks: Sequence[dict[str, Tensor]],
    *,
    task: Task | None = None,
    training_blocks: Iterable[dict[str, Tensor]] | None = None,
    baselines: dict | None = None,
    references: Sequence[Subject] = (),
    speed: SpeedProtocol | None = STANDARD,
    batch_size: int | None = None,
    progress: Report = silent,
) -> dict:
    """Everything that `report.json` holds about two models.

    Args:
        before, after: of one vocabulary. `folder` gives `stored_bytes`; evaluate what was saved, loaded back.
        blocks: the whole held-out split.
        task: what both were trained for; by default causal_lm.
        training_blocks: where the unigram baseline counts its frequencies; without it, the evaluation text itself.
        baselines: those of an earlier stage on the same data, to save measuring them again.
        references: further models to show the two against, for example the teacher of a distilled student.
        speed: the protocol of a round, or None to leave speed out.
        batch_size: rows at a time; chosen when None.
        progress: called with (phase, done, total).

    Raises UserError for an empty split or two vocabularies.
    """
    task, models = task or CausalLM(), [before.model, after.model]
    (was, now), divergence = evaluate_qualities(
        models,
        blocks,
        metrics=task.metrics,
        batch_size=batch_size,
        progress=phase(progress, "predicting held-out text"),
    )
    timed: list[dict] = [{}, {}]
    if speed is not None:
        prompt = blocks[0]["tokens"].tolist()
        found = measure_speeds(models, prompt, protocol=speed, progress=phase(progress, "timing"))
        timed = [{"speed": figures} for figures in found]
    # after the models have run: by then the weights are held as their kernels want them
    blocks_of = [before.block(was) | timed[0], after.block(now) | timed[1]]
    if baselines is None:
        baselines = task.baselines(
            before.model.config,
            blocks,
            training_blocks,
            device=device_of(before.model),
            progress=phase(progress, "untrained baseline"),
        )
    found = {
        "before": blocks_of[0],
        "after": blocks_of[1],
        "change": change(blocks_of[0], blocks_of[1], change_of_quality(was, now, divergence)),
        "baselines": baselines,
        "measurement": measurement(was, blocks, task),
        "task": task.dump(),
    }
    if references:
        found["references"] = {
            subject.name: subject.block(
                evaluate_quality(
                    subject.model,
                    blocks,
                    metrics=task.metrics,
                    progress=phase(progress, f"predicting with {subject.name}"),
                )
            )
            for subject in references
        }
    return clean(found)


def evaluate_model(
    subject: Subject,
    blocks: Sequence[dict[str, Tensor]],
    *,
    task: Task | None = None,
    speed: SpeedProtocol | None = STANDARD,
    batch_size: int | None = None,
    progress: Report = silent,
) -> dict:
    """The block that `espalier evaluate` writes for one model, with `measurement` beside its figures."""
    task = task or CausalLM()
    (quality,), _ = evaluate_qualities(
        [subject.model],
        blocks,
        metrics=task.metrics,
        batch_size=batch_size,
        progress=phase(progress, "predicting held-out text"),
    )
    timed: dict = {}
    if speed is not None:
        prompt = blocks[0]["tokens"].tolist()
        timed["speed"] = measure_speeds([subject.model], prompt, protocol=speed, progress=phase(progress, "timing"))[0]
    return clean(subject.block(quality) | timed | {"measurement": measurement(quality, blocks, task)})


def change_of_quality(before: Quality, after: Quality, divergence: Divergence | None) -> dict:
    """Paired differences (after - before) of the metrics with their 95 % intervals, KL(before || after) and agreement.

    `beyond_noise` is that of the first metric, which verdicts are about; `KIND_ratio` is the change of one that is told
    as a ratio.
    """
    check_same(before, after)
    scales: dict[str, Interval | None] = {}
    for metric in before.metrics:
        scales[metric.kind] = metric.change(before, after)
        if metric.relative:
            scales[f"{metric.kind}_ratio"] = metric.difference(before, after).map(exp)
    if divergence is not None:
        scales["kl_divergence"] = divergence.kl_divergence
        scales["agreement"] = divergence.agreement
    found = {name: interval for name, interval in scales.items() if interval is not None}
    figures: dict = {name: interval.value for name, interval in found.items()}
    figures["tokens"] = before.tokens
    figures["beyond_noise"] = before.metrics[0].difference(before, after).beyond_noise
    figures["interval"] = {name: [interval.low, interval.high] for name, interval in found.items()}
    figures["interval"]["method"] = f"paired; {before.method}"
    return figures


def change(before: dict, after: dict, quality: dict) -> dict:
    """The `change` block: the quality given, size and speed from the two blocks."""
    sizes = {
        name: {"difference": after["size"][name] - value, "ratio": after["size"][name] / value if value else None}
        for name, value in before["size"].items()
    }
    found = {"quality": quality, "size": sizes}
    if "speed" in before and "speed" in after:
        found["speed"] = change_of_speed(before["speed"], after["speed"])
    return found


def measurement(quality: Quality, blocks: Sequence[dict[str, Tensor]], task: Task) -> dict:
    """Protocol of the figures (text, context, tokens), without which a perplexity means nothing."""
    return {
        "context": quality.context,
        "mean_context": quality.mean_context,
        "stride": quality.context,
        "tokens": quality.tokens,
        "blocks": len(blocks),
        "tokens_in_split": getattr(blocks, "tokens", None),
        "documents": "kept apart: no token sees another document" if "documents" in blocks[0] else "not kept apart",
        "normalisation": task.normalisation,
        "bytes_per_token": quality.bytes_per_token,
        "intervals": quality.method,
        "data": getattr(blocks, "fingerprint", None),
    }
