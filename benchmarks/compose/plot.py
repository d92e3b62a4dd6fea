"""The study's pictures: what every mixture satisfies and how fluent it is, and guidance over its scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.compose.presets import COMPOSED, KEYWORD, LENGTH, ONE, ROWS, SHARED_ONCE
from benchmarks.compose.record import BOTH_HOLD, LONGEST, RUN_ON
from benchmarks.pages import save_figure, two_panels

_SHARES = {
    BOTH_HOLD: ("#08519c", "o", "both conditions"),
    KEYWORD: ("#c8102e", "^", "the keyword"),
    LENGTH: ("#2a7f3f", "s", "the number of words"),
}
# On two lines where the table's label is long.
_SHORT = {
    COMPOSED: "keyword + length,\ntrained apart",
    SHARED_ONCE: "keyword + length\n- keyword without condition",
    ONE: "one auxiliary,\ntrained on both",
}
_SLOR, _REFERENCE = "#08519c", "#b8860b"


def plot_rows(record: dict[str, Any], path: Path) -> None:
    """Shares of texts that satisfy their conditions, and SLOR, of every mixture without guidance.

    Args:
        record: of the study, as ``python -m benchmarks.compose`` writes it.
        path: file name that ends in .png or .svg.

    Raises:
        ValueError: the file name ends otherwise.
        ModuleNotFoundError: matplotlib is not installed.
    """
    known = {row["name"]: row for row in record["rows"]}
    rows = [known[row.name] for row in ROWS]
    figure, (shares, fluency) = two_panels("Auxiliaries composed when texts are written")
    for place, (name, (colour, marker, label)) in enumerate(_SHARES.items()):
        y = [i + 0.22 * (place - 1) for i in range(len(rows))]
        _bars(shares, y, rows, name, colour=colour, marker=marker, label=label)
    _bars(fluency, range(len(rows)), rows, "slor", colour=_SLOR, marker="o")
    _reference(fluency.axvline, record)
    labels = [_SHORT.get(row["name"], row["label"]) for row in rows]
    for axes, ticks in ((shares, labels), (fluency, [""] * len(rows))):
        axes.set_yticks(range(len(rows)), ticks)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    shares.set_xlim(-0.02, 1.02)
    shares.set_title("share of texts that have ...; bars: 95%, Wilson", fontsize=10)
    fluency.set_title("SLOR (nats per token); bars: 95%", fontsize=10)
    for axes in (shares, fluency):
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, -0.2), ncols=3, fontsize=9, frameon=False)
    save_figure(figure, path)


def plot_guidance(record: dict[str, Any], path: Path) -> None:
    """The keyword pair under guidance, over its scale; as ``plot_rows``."""
    rows = guided_rows(record)
    scales = [scale for scale, _ in rows]
    figure, (shares, fluency) = two_panels("Guidance: the keyword pair against itself without its condition")
    grey = "#555555"
    for axes, name, colour, dashes, label in (
        (shares, KEYWORD, _SHARES[KEYWORD][0], "-", "the keyword"),
        (shares, RUN_ON, grey, "--", f"a word of more than {LONGEST} characters"),
        (fluency, "slor", _SLOR, "-", "guidance"),
    ):
        y = [row[name] for _, row in rows]
        axes.plot(scales, y, color=colour, marker="o", ls=dashes, ms=5, lw=1.7, label=label)
        low, high = zip(*(row[f"{name}_interval"] for _, row in rows), strict=True)
        axes.fill_between(scales, low, high, color=colour, alpha=0.12, lw=0)
    shares.set_ylim(-0.02, 1.02)
    shares.set_title("share of texts that have ...; bands: 95%, Wilson", fontsize=10)
    fluency.set_title("SLOR (nats per token); band: 95%", fontsize=10)
    _reference(fluency.axhline, record)
    for axes in (shares, fluency):
        axes.set_xticks(scales, [f"{scale:g}" for scale in scales])
        axes.set_xlabel("scale; 1 is the pair")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=9, frameon=False)
    save_figure(figure, path)


def guided_rows(record: dict[str, Any]) -> list[tuple[float, dict[str, Any]]]:
    """Scale and row of the keyword pair, and of every guidance on it."""
    known = {row["name"]: row for row in record["rows"]}
    guided = [(one["scale"], known[one["first"]]) for one in record["guidance"]]
    return [(1.0, known[KEYWORD]), *guided]


def _bars(axes: Any, y: Any, rows: list[dict[str, Any]], name: str, **style: Any) -> None:
    x = [row[name] for row in rows]
    low, high = zip(*(row[f"{name}_interval"] for row in rows), strict=True)
    ends = [[a - b for a, b in zip(x, low, strict=True)], [b - a for a, b in zip(x, high, strict=True)]]
    colour, marker = style["colour"], style["marker"]
    axes.errorbar(
        x, list(y), xerr=ends, fmt=marker, color=colour, ms=6, lw=1.6, capsize=3, label=style.get("label")
    )


def _reference(line: Any, record: dict[str, Any]) -> None:
    """Where the dictionary's own sentences are."""
    row = next(row for row in record["rows"] if row["name"] == "references")
    line(row["slor"], color=_REFERENCE, ls="-.", lw=1.4, label=row["label"])
