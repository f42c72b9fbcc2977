"""Per-layer sensitivity in a report: KL to the original model at each bit width, as picture, table and sentences."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from app.evaluation import formatting
from app.evaluation.report.charts import INK, SHADES, WARM, Chart

WRITTEN = 40  # layers up to which their figures are written into the picture


def picture(found: Mapping[str, Any]) -> Chart:
    """Layers by bits, shaded by the divergence on a logarithmic scale, with a frame where a plan stands.

    Args:
        found: the `sensitivity` block of report.json.
    """
    layers = found["layers"]
    bits = sorted({int(b) for layer in layers for b in layer["kl"]})
    values = [[_of(layer["kl"], b) for b in bits] for layer in layers]
    positive = [value for row in values for value in row if formatting.known(value) and value > 0] or [1.0]
    low, high = max(min(positive), max(positive) * 1e-8), max(positive)
    if low == high:
        low = high / 10
    height = min(0.24, 14 / len(layers)) * len(layers)

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        shown = [[max(value, low) if formatting.known(value) else float("nan") for value in row] for row in values]
        norm = LogNorm(low, high)
        image = axis.imshow(shown, cmap=SHADES, norm=norm, aspect="auto", interpolation="nearest")
        for y, (layer, row) in enumerate(zip(layers, values, strict=True)):
            for x, value in enumerate(row if len(layers) <= WRITTEN else []):
                if formatting.known(value):
                    colour = "white" if norm(max(value, low)) > 0.45 else INK
                    axis.text(x, y, f"{value:.1e}", ha="center", va="center", fontsize=6.8, color=colour)
            if layer["bits"] in bits:
                place = (bits.index(layer["bits"]) - 0.48, y - 0.46)
                axis.add_patch(Rectangle(place, 0.96, 0.92, fill=False, edgecolor=WARM, linewidth=1.3))
        axis.set_title("KL to the original in nats per token (log scale)")
        axis.set_xticks(range(len(bits)), [f"{b} bits" for b in bits])
        step = max(1, len(layers) // 56)
        axis.set_yticks(range(0, len(layers), step), [layer["name"] for layer in layers[::step]], fontsize=7)
        axis.grid(False)
        axis.spines["bottom"].set_visible(False)
        axis.tick_params(axis="x", length=0, labelcolor=INK)
        figure.colorbar(image, ax=axis, shrink=min(1.0, 4 / height))

    caption = (
        "How far the next-token distribution moves from the original when one layer alone is rounded to so many bits; "
        "the frame is the number of bits that the layer was given"
    )
    return Chart("sensitivity", caption, draw, 7.6, 0.9 + height)


def table(found: Mapping[str, Any]) -> dict[str, Any]:
    """Headings and rows of the same as text: layer, weights, a column for each number of bits, bits given."""
    bits = sorted({int(b) for layer in found["layers"] for b in layer["kl"]})
    rows = [
        {
            "name": layer["name"],
            "weights": formatting.count(layer["weights"]),
            "kl": [formatting.number(value, 3) for value in (_of(layer["kl"], b) for b in bits)],
            "bits": formatting.plain(layer["bits"]),
        }
        for layer in found["layers"]
    ]
    return {"bits": bits, "rows": rows, "how": how(found)}


def how(found: Mapping[str, Any]) -> str:
    """Protocol of the figures, in a sentence."""
    grouped = any(layer["maps"] > 1 for layer in found["layers"])
    experts = ", the maps of one kind in all the experts of a layer together," if grouped else ""
    return (
        f"Each layer alone{experts} rounded without data, the rest in full precision: KL of the next token from the "
        f"original, in nats per token, over {found['tokens']:,} tokens of the {found['text']}."
    )


def sentences(found: Mapping[str, Any]) -> list[str]:
    """Result of a bit budget for the report's summary; none without a budget."""
    if "budget" not in found:
        return []
    budget, counts = found["budget"], Counter(layer["bits"] for layer in found["layers"])
    asked, achieved, low, high = (_shown(budget, name) for name in ("asked", "achieved", "smallest", "largest"))
    given = ", ".join(f"{counts[bits]} at {bits} bits" for bits in sorted(counts))
    what = "bits a weight on average" if budget["unit"] == "bits" else "in the weights file"
    written = [f"At most {asked} {what} were asked for, {achieved} came out ({low} to {high} are possible): {given}."]
    uniform = found.get("uniform")
    if uniform is None:
        return [
            *written,
            "No uniform plan of other bits takes as many bytes: there is nothing to compare the plan with.",
        ]
    difference, (lowest, highest) = uniform["difference"], uniform["interval"]
    sizes = f"{uniform['mixed_bytes']:,} bytes against {uniform['stored_bytes']:,}"
    change = f"{_signed(difference)} nats per token [{_signed(lowest)}, {_signed(highest)}]"
    if highest < 0:
        verdict = "Mixed bits are better than"
    elif lowest > 0:
        verdict = "Mixed bits are worse than"
    else:
        verdict = "Mixed bits did not beat, beyond noise,"
    return [*written, f"{verdict} {uniform['bits']} bits everywhere on held-out text: {change}, at {sizes}."]


def _shown(budget: Mapping[str, Any], name: str) -> str:
    return f"{budget[name]:.4g}" if budget["unit"] == "bits" else formatting.size(budget[name])


def _signed(value: float) -> str:
    text = formatting.number(value, 3)
    return f"+{text}" if value > 0 else text


def _of(kl: Mapping[Any, float], bits: int) -> float | None:
    """The value at these bits, by a number or, as JSON has it, a text."""
    return kl.get(bits, kl.get(str(bits)))
