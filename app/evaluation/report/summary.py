"""Summary of a stage in sentences that can be checked against the table beside them.

    judge(figures, layers) -> list[Sentence]

The first sentence is the headline. Nothing is rounded in the model's favour: a speed that differs by less than the
noise is "no faster", one timed in too few rounds for an interval is not judged, a file that shrank by less than 1 % is
"not smaller".
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from app.evaluation import formatting
from app.evaluation.formatting import known
from app.evaluation.metrics import Metric
from app.tasks.base import task_of

SMALLER = 0.99  # a file above this share of the old one is not called smaller


@dataclass(frozen=True)
class Sentence:
    """One finding. `topic`: headline, size, speed, quality, layers, notes; `tone`: good, neutral, bad."""

    topic: str
    tone: str
    text: str

    def to_dict(self) -> dict:
        """As it stands in report.json."""
        return asdict(self)


def judge(figures: dict, layers: Sequence[dict] = ()) -> list[Sentence]:
    """The sentences for one before-and-after comparison: headline, size, speed, quality, layers, in this order.

    Args:
        figures: {"before", "after", "change", "baselines"} as `figures.evaluate_pair` returns them.
        layers: layer records of the stage, as dictionaries.
    """
    found = [*judge_size(figures), *judge_speed(figures), *judge_quality(figures), *judge_layers(layers)]
    return [headline(figures), *found]


def size_ratio(figures: dict) -> float | None:
    """Stored bytes after / before."""
    return figures["change"].get("size", {}).get("stored_bytes", {}).get("ratio")


def direction(figures: dict, name: str) -> str:
    """Direction of a change in throughput beyond the noise of the rounds: faster, slower, same; undecided without an
    interval; unknown where it was not measured."""
    change = figures["change"].get("speed", {}).get(name)
    if not change or not known(change.get("ratio")):
        return "unknown"
    if not all(known(bound) for bound in change["interval"]):
        return "undecided"
    if not change["beyond_noise"]:
        return "same"
    return "faster" if change["ratio"] > 1 else "slower"


def headline(figures: dict) -> Sentence:
    """Smaller, faster, both or neither, in three or four words."""
    ratio, speed = size_ratio(figures), direction(figures, task_of(figures).protocol.throughputs[0].name)
    smaller = known(ratio) and ratio < SMALLER
    if speed in ("unknown", "undecided"):
        why = "speed not measured" if speed == "unknown" else "too few rounds to judge the speed"
        text = f"Smaller; {why}" if smaller else f"Not smaller; {why}"
        return Sentence("headline", "good" if smaller else "neutral", text)
    if smaller and speed == "faster":
        return Sentence("headline", "good", "Smaller and faster")
    if smaller:
        return Sentence("headline", "neutral", "Smaller but slower" if speed == "slower" else "Smaller but not faster")
    if speed == "faster":
        return Sentence("headline", "neutral", "Faster but not smaller")
    return Sentence("headline", "bad", "Slower and not smaller" if speed == "slower" else "Neither smaller nor faster")


def judge_size(figures: dict) -> list[Sentence]:
    """The file, dense zeros, and weights that grow again when they are loaded."""
    before, after, ratio = figures["before"].get("size", {}), figures["after"].get("size", {}), size_ratio(figures)
    if not known(ratio):
        return [Sentence("size", "neutral", "The size of the stored weights was not measured.")]
    was, now = formatting.size(before["stored_bytes"]), formatting.size(after["stored_bytes"])
    sentences = []
    if ratio < SMALLER:
        text = f"The weights file is {formatting.times(1 / ratio)} smaller: {now} instead of {was}."
        sentences.append(Sentence("size", "good", text))
    elif ratio <= 2 - SMALLER:
        sentences.append(Sentence("size", "bad", f"The weights file is not smaller: {now} now, {was} before."))
    else:
        sentences.append(Sentence("size", "bad", f"The weights file is larger: {now} now, {was} before."))
    zeros = 1 - after["nonzero_parameters"] / after["parameters"] if after.get("parameters") else 0.0
    zeros_before = 1 - before["nonzero_parameters"] / before["parameters"] if before.get("parameters") else 0.0
    if zeros > zeros_before + 0.01 and ratio >= SMALLER:
        text = (
            f"{formatting.percent(zeros)} of the weights are zero, yet they are stored as dense zeros: "
            "a compressed tensor stored as dense zeros is not smaller."
        )
        sentences.append(Sentence("size", "bad", text))
    held = figures["change"]["size"].get("memory_bytes", {}).get("ratio")
    if known(held) and ratio < SMALLER <= held:
        text = (
            f"Only the file is smaller: when the model runs, its weights are held in "
            f"{formatting.size(after['memory_bytes'])}, against {formatting.size(before['memory_bytes'])} before."
        )
        sentences.append(Sentence("size", "bad", text))
    cached = figures["change"]["size"].get("cache_bytes", {}).get("ratio")
    if known(cached) and 0 < cached < SMALLER:
        was, now = formatting.size(before["cache_bytes"]), formatting.size(after["cache_bytes"])
        text = f"The cache of a full context is {formatting.times(1 / cached)} smaller: {now} instead of {was}."
        sentences.append(Sentence("size", "good", text))
    return sentences


def judge_speed(figures: dict) -> list[Sentence]:
    """Decoding and prefill, each against the noise of the interleaved rounds."""
    changes = figures["change"].get("speed", {})
    if not changes:
        return [Sentence("speed", "neutral", "Speed was not measured.")]
    sentences = []
    for name, what in task_of(figures).protocol.throughputs:
        way = direction(figures, name)
        if way == "unknown":
            continue
        ratio, bounds = changes[name]["ratio"], changes[name]["interval"]
        was, now = formatting.rate(figures["before"]["speed"][name]), formatting.rate(figures["after"]["speed"][name])
        spread = f"95% interval of the ratio {formatting.interval(bounds, lambda x: f'{x:.2f}')}"
        if way == "undecided":
            doubt = formatting.doubt(changes[name])
            text = f"{what} ran at {formatting.times(ratio)} the speed, {now} against {was}; {doubt}."
            sentences.append(Sentence("speed", "neutral", text))
        elif way == "same":
            text = f"{what} is no faster: {now} against {was}; the difference is within the noise ({spread})."
            sentences.append(Sentence("speed", "neutral", text))
        elif way == "faster":
            text = f"{what} is {formatting.times(ratio)} as fast: {now} against {was} ({spread})."
            sentences.append(Sentence("speed", "good", text))
        else:
            text = f"{what} is slower, {formatting.times(ratio)} the speed: {now} against {was} ({spread})."
            sentences.append(Sentence("speed", "bad", text))
    return sentences + judge_kernels(figures["after"].get("speed", {}))


def judge_kernels(speed: dict) -> list[Sentence]:
    """Packed layers that no packed kernel runs: smaller, but unpacked for every product."""
    sentences = []
    for found in speed.get("kernels", []):
        if found["kernel"].startswith(("dequantize", "look up")):
            what = "1 packed layer is" if found["modules"] == 1 else f"{found['modules']} packed layers are"
            text = f"{what} unpacked for every product, which saves bytes but no time: {found['reason']}."
            sentences.append(Sentence("speed", "neutral", text))
    return sentences


def judge_quality(figures: dict) -> list[Sentence]:
    """The task's first metric against its paired interval, divergence, and the baseline below which it is broken."""
    before, after = figures["before"].get("quality", {}), figures["after"].get("quality", {})
    change, task = figures["change"].get("quality", {}), task_of(figures)
    metric = task.metrics[0]
    if not known(after.get(metric.kind)):
        return [Sentence("quality", "bad", f"The {metric.label} is not finite: the model is broken.")]
    sentences = [judge_change(before, after, change, metric)]
    if known(change.get("kl_divergence")):
        moved, same = formatting.number(change["kl_divergence"], 3), formatting.percent(change["agreement"])
        text = (
            f"The {task.predicts.replace(' ', '-')} distribution moved by {moved} nats per {task.per} (KL from the "
            f"model before); both rank the same {task.predicted} first in {same} of the {task.positions}."
        )
        sentences.append(Sentence("quality", "neutral", text))
    line = figures.get("baselines", {}).get(task.floor, {}).get(metric.kind)
    if known(line) and not metric.got_better(after[metric.kind] - line):
        never = known(before.get(metric.kind)) and not metric.got_better(before[metric.kind] - line)
        text = (
            f"The {metric.label} is no better than that of {task.predicted} frequencies alone ({metric.show(line)}): "
            + ("nor was that of the model before." if never else f"this is no longer a {task.model}.")
        )
        sentences.append(Sentence("quality", "bad", text))
    return sentences


def judge_change(before: dict, after: dict, change: dict, metric: Metric) -> Sentence:
    """Change of a metric, as a ratio where it is told as one, and whether that is beyond noise."""
    name, form, none = metric.kind, metric.show_change, 0
    if metric.relative:
        name, form, none = f"{metric.kind}_ratio", formatting.change_percent, 1
    moved, bounds = change.get(name), change.get("interval", {}).get(name)
    if not known(moved):
        reason = change.get("reason", "the two were not measured on the same tokens")
        return Sentence("quality", "neutral", f"The two models cannot be compared in {metric.label}: {reason}.")
    if not bounds or not all(known(bound) for bound in bounds):
        text = f"Quality: {metric.label} changed by {form(moved)}; the text is too short for an interval."
        return Sentence("quality", "neutral", text)
    spread = f"95% interval {formatting.interval(bounds, form)}"
    values = f"from {metric.show(before[metric.kind])} to {metric.show(after[metric.kind])}"
    if bounds[0] <= none <= bounds[1]:
        text = f"Quality: {metric.label} moved by {form(moved)}, {values} ({spread})"
        return Sentence("quality", "good", f"{text}: within noise, no difference was found.")
    verb = "rose" if moved > none else "fell"
    size = form(moved).lstrip(f"+{formatting.MINUS}")
    text = f"Quality: {metric.label} {verb} by {size}, {values} ({spread}): beyond noise."
    return Sentence("quality", "good" if metric.got_better(moved - none) else "bad", text)


def judge_layers(layers: Sequence[dict]) -> list[Sentence]:
    """Number of layers that were skipped, and of those that carry a note (a fallback taken)."""
    if not layers:
        return []
    skipped = [layer for layer in layers if layer["skipped"]]
    noted = [layer for layer in layers if layer.get("note") and not layer["skipped"]]
    sentences = []
    if skipped:
        verb = "was" if len(skipped) == 1 else "were"
        text = f"{len(skipped)} of {len(layers)} layers {verb} skipped; each is listed with its reason."
        sentences.append(Sentence("layers", "neutral", text))
    else:
        sentences.append(Sentence("layers", "good", f"All {len(layers)} layers were treated; none was skipped."))
    if noted:
        text = f"{len(noted)} of {len(layers)} layers carry a note: a fallback, or something to know about the result."
        sentences.append(Sentence("layers", "neutral", text))
    return sentences
