"""One look for every figure and table: colours, captions, alternative texts.

Not here: computing what is drawn. A `plot_*` function takes plain rows, returns its Axes and never shows it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from html import escape

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distill_utils.report import placement

# Okabe and Ito's colours, told apart with every common colour blindness; yellow is left out, too pale on white.
METHOD_COLORS = {
    "teacher": "#6b6b6b",
    "sft": "#0072b2",
    "kd": "#d55e00",
    "pl": "#009e73",
    "pl_kl": "#cc79a7",
    "pl_gold": "#00604a",
    "on_policy": "#a6761d",
    "kd_cached": "#8c3a00",
    "miniend": "#56b4e9",
    "reference": "#1c2127",
}
# Paths of task-agnostic distillation (miniend.PATHS), in no figure with the objectives above.
PATH_COLORS = {
    "scratch": "#8b949e",
    "logits": "#d55e00",
    "encoder": "#009e73",
    "decoder": "#cc79a7",
    "self": "#e69f00",
    "decoder_cross": "#a6761d",
    "miniend_logits": "#0072b2",
    "hidden": "#00604a",
    "none": "#1c2127",
}
BASELINE_COLOR = "#b0b0b0"
METHOD_LABELS = {"sft": "SFT", "kd": "KD", "pl": "PL", "pl_kl": "PL+KL", "pl_gold": "PL+references",
                 "on_policy": "on-policy KD", "kd_cached": "cached KD", "miniend": "MiniEnD",
                 "miniend_logits": "MiniEnD + logits"}  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
FIGURE_SIZE = (6.5, 3.5)  # inches
MANY_MARKS = 2000  # above this an SVG grows past a PNG at 150 dpi
HEADINGS = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "parameters_m": "parameters (M)",
    "latency_ms": "latency (ms)",
    "ms_per_token": "ms/token",
    "throughput": "summaries/s",
    "speedup": "speed-up",
}
AXIS_LABELS = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "ms_per_token": "time per generated token (ms)",
    "latency_ms": "latency of one summary (ms)",
    "throughput": "summaries per second",
    "parameters_m": "parameters (millions)",
    "words": "words per summary",
    "speedup": "speed-up over the teacher",
    "loss": "loss",
    "ce_loss": "cross-entropy (nats per token)",
    "kl_loss": "KL from teacher (nats per token)",
    "own_kl_loss": "KL on the student's own samples (nats per token)",
    "hidden_loss": "hidden-state error",
}


def use_style() -> None:
    """Set the style of all figures: white, light grid, no frame at the top and right."""
    sns.set_theme(
        context="notebook",
        style="ticks",
        font_scale=0.85,
        rc={
            "figure.figsize": FIGURE_SIZE,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": "#8b949e",
            "axes.linewidth": 0.8,
            "axes.labelcolor": "#373e47",
            "axes.titlesize": "medium",
            "axes.titlelocation": "left",
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e8ebee",
            "grid.linewidth": 0.8,
            "xtick.color": "#586069",
            "ytick.color": "#586069",
            "xtick.major.size": 3,
            "ytick.major.size": 3,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "svg.fonttype": "path",
            "svg.hashsalt": "distill",  # the same figure gives the same bytes
        },
    )
    sns.set_palette(list(METHOD_COLORS.values()))


def method_color(method: str) -> str:
    """Return the colour of a method or path in every figure; what is neither is a light grey baseline."""
    return (METHOD_COLORS | PATH_COLORS).get(method, BASELINE_COLOR)


def method_label(method: str, student: str | None = None) -> str:
    """Return the name of a method for readers, with the student's shape."""
    name = METHOD_LABELS.get(method, str(method).replace("_", " "))
    return f"{name} {student}" if student else name


# ------------------------------------------------------------------------------------------------------------ showing


def show(figure_or_axes: Figure | Axes, alt: str, caption: str) -> None:
    """Display a figure with its alternative text and a caption below, and close it.

    Few marks become SVG, many a PNG at 150 dpi. `alt` says in a sentence what the pattern is, `caption` what is
    drawn, of how many, and what the intervals mean. Raises ValueError when one is empty.
    """
    from IPython.display import HTML, display

    if not alt.strip() or not caption.strip():
        raise ValueError(f"alt {alt!r} and caption {caption!r} must both say something about the figure")
    figure = figure_or_axes if isinstance(figure_or_axes, Figure) else figure_or_axes.get_figure()
    buffer = io.BytesIO()
    if count_marks(figure) > MANY_MARKS:
        mime, options = "image/png", {"format": "png", "dpi": 150}
        size = {"width": round(figure.get_figwidth() * 96)}
    else:
        mime, options, size = "image/svg+xml", {"format": "svg", "metadata": {"Date": None, "Creator": None}}, {}
    figure.savefig(buffer, bbox_inches="tight", pad_inches=0.05, **options)
    plt.close(figure)
    data: bytes | str = buffer.getvalue()
    data = data if mime == "image/png" else data.decode()
    display({mime: data, "text/plain": alt}, metadata={mime: {"alt": alt, **size}}, raw=True)
    display(HTML(f'<div class="figcaption">{escape(caption)}</div>'))


def count_marks(figure: Figure) -> int:
    """Count what a vector file would hold: points of lines and scatters, bars, cells of images."""
    marks = 0
    for ax in figure.axes:
        marks += sum(len(line.get_xdata()) for line in ax.lines) + len(ax.patches) + len(ax.texts)
        marks += sum(max(len(c.get_offsets()), len(c.get_paths())) for c in ax.collections)
        marks += sum(int(math.prod(image.get_array().shape[:2])) for image in ax.images)
    return marks


# ------------------------------------------------------------------------------------------------------------ figures


def new_axes(ax: Axes | None = None) -> Axes:
    """Return `ax`, or the axes of a new figure of the one size."""
    return plt.subplots(figsize=FIGURE_SIZE, layout="constrained")[1] if ax is None else ax


def plot_history(histories: Mapping[str, Sequence[Mapping]], key: str = "loss", ax: Axes | None = None) -> Axes:
    """Plot one quantity of training histories over the steps.

    `histories` maps a run's name ("kd", "kd 6-3") to history rows with "step" and `key`; rows without it are skipped.
    The first word is the method and gives the colour; runs of one method differ by dashes. Up to four runs are
    named at their line's end, more in a legend.
    """
    ax = new_axes(ax)
    ends: list[tuple[float, float, str, str]] = []
    dashes: dict[str, int] = {}
    for name, history in histories.items():
        points = [(row["step"], row[key]) for row in history if row.get(key) is not None]
        if not points:
            continue
        method, _, rest = name.partition(" ")
        style = ("-", "--", ":", "-.")[dashes.get(method, 0) % 4]
        dashes[method] = dashes.get(method, 0) + 1
        steps, values = zip(*points, strict=True)
        label, color = method_label(method, rest), method_color(method)
        ax.plot(steps, values, style, color=color, lw=1.5, label=label, marker="o" if len(points) == 1 else None)
        ends.append((steps[-1], values[-1], label, color))
    ax.set(xlabel="optimizer step", ylabel=AXIS_LABELS.get(key, key.replace("_", " ")))
    if len(ends) > 4:
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=2.2)
    elif ends:
        right = max(x for x, *_ in ends)
        placement.label_right(ax, [(y, label, color) for _, y, label, color in ends], at=right)
    return ax


def plot_quality_speed(
    rows: Sequence[Mapping], x: str = "ms_per_token", y: str = "rouge2", ax: Axes | None = None
) -> Axes:
    """Plot quality against speed, one point a row, intervals as error bars, the teacher's as a band.

    Rows are results rows: method, student, `x`, `y`, `y`_low, `y`_high. Colour is the method, marker the student's
    shape. Rows without `x` (lead words, object name) are dotted lines, the teacher is a point in its band. Points of
    nearly equal `x` (students of one shape) are moved apart sideways so that no error bar hides another.
    """
    ax = new_axes(ax)
    rows = [row for row in rows if _is_number(row.get(y))]
    students = dict.fromkeys(row["student"] for row in rows if row.get("student") and row.get("method") != "teacher")
    shapes = {student: MARKERS[i % len(MARKERS)] for i, student in enumerate(students)}
    points, lines = [], []
    placed = placement.move_apart([row[x] if _is_number(row.get(x)) else None for row in rows])
    for row, at in zip(rows, placed, strict=True):
        method, value = row.get("method", ""), row[y]
        color, low, high = method_color(method), row.get(f"{y}_low"), row.get(f"{y}_high")
        has_interval = _is_number(low) and _is_number(high)
        if method == "teacher":
            if has_interval:
                ax.axhspan(low, high, color=color, alpha=0.12, lw=0)
            ax.axhline(value, color=color, lw=0.9)
        elif at is None:
            ax.axhline(value, color=color, lw=1.2, ls=":")
        elif has_interval:
            bar = [[max(value - low, 0)], [max(high - value, 0)]]
            ax.errorbar(at, value, yerr=bar, color=color, lw=1.1, capsize=2, zorder=3)
        is_line = method == "teacher" or at is None
        if is_line:
            lines.append((value, method_label(method), "#6b6b6b"))
        if at is not None:
            marker = "*" if method == "teacher" else shapes.get(row.get("student"), "o")
            ax.plot(at, value, marker, color=color, ms=11 if marker == "*" else 7, mec="white", mew=0.8, zorder=4)
        if not is_line:
            points.append((at, value, method_label(method, row.get("student")), color))
    ax.set(xlabel=AXIS_LABELS.get(x, x.replace("_", " ")), ylabel=AXIS_LABELS.get(y, y))
    ax.margins(x=0.14, y=0.1)
    ax.autoscale_view()
    if all(at is None or at >= 0 for at in placed):
        ax.set_xlim(left=max(ax.get_xlim()[0], 0))
    placement.label_right(ax, lines)
    placement.label_points(ax, points)
    return ax


def pareto_front(rows: Sequence[Mapping], x: str, y: str = "rouge2") -> list[Mapping]:
    """Return the rows that no other row matches or beats in both a lower `x` and a higher `y`, fastest first."""
    known = sorted(
        (row for row in rows if _is_number(row.get(x)) and _is_number(row.get(y))), key=lambda r: (r[x], -r[y])
    )
    return [row for i, row in enumerate(known) if all(other[y] < row[y] for other in known[:i])]


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def plot_lengths(
    lengths: Mapping[str, Sequence[int]],
    limits: Mapping[str, int] | None = None,
    unit: str = "tokens",
    ax: Axes | None = None,
) -> Axes:
    """Plot cumulative distributions of lengths on a log axis, with truncation limits as dashed lines.

    `lengths` maps a name ("source", "reference", "kd") to lengths in `unit`; `limits` maps some of the names to the
    length they are cut at. Where a curve meets its dashed line stands the share that is left whole.
    """
    ax = new_axes(ax)
    others = iter(("#0072b2", "#d55e00", "#009e73", "#cc79a7"))
    limits = limits or {}
    for name, values in lengths.items():
        color = METHOD_COLORS.get(name.split()[0]) or next(others)
        ordered = sorted(values)
        shares = [k / 200 for k in range(201)]  # 201 quantiles draw any number of documents
        at = [max(ordered[min(int(share * len(ordered)), len(ordered) - 1)], 1) for share in shares]
        ax.plot(at, [100 * share for share in shares], color=color, label=method_label(name))
        if name in limits:
            whole = 100 * sum(value <= limits[name] for value in ordered) / len(ordered)
            ax.axvline(limits[name], color=color, ls="--", lw=1.1)
            note = f"{limits[name]} ({whole:.0f} % whole)"
            ax.annotate(note, (limits[name], 101), (0, 4), textcoords="offset points", color=color, ha="center")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set(xlabel=f"length ({unit}, log scale)", ylabel="documents up to this length (%)", ylim=(0, 101))
    ax.legend(loc="upper left")
    return ax


def plot_coverage_density(pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]], ax: Axes | None = None) -> Axes:
    """Plot coverage (share of words inside copied fragments) against density (mean squared length of fragments).

    `pairs` maps a name to (coverage, density), one value a document.
    """
    ax = new_axes(ax)
    for i, (name, (coverage, density)) in enumerate(pairs.items()):
        color = method_color(name.split()[0])
        options = {"s": 10, "lw": 0, "marker": "o"} if i % 2 == 0 else {"s": 12, "lw": 0.8, "marker": "x"}
        ax.scatter(coverage, density, color=color, alpha=0.4, label=method_label(name), **options)
    ax.set_yscale("symlog", linthresh=1)
    ax.set(
        xlabel="coverage: share of words copied", ylabel="density: squared length of copied runs", xlim=(-0.02, 1.02)
    )
    if len(pairs) > 1:
        legend = ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), markerscale=2)
        for handle in legend.legend_handles:
            handle.set_alpha(1)
    return ax


def plot_intervals(
    rows: Sequence[Mapping],
    metrics: Sequence[str] = ("rouge1", "rouge2", "rougeL", "rougeLsum"),
    ax: Axes | None = None,
) -> Axes:
    """Plot mean and interval of every row, one group a metric, the teacher's interval as a band behind its group.

    Rows are results rows: method, <metric>, <metric>_low, <metric>_high. Names stand beside the first group.
    """
    ax = new_axes(ax)
    step = 0.72 / len(rows)
    for i, metric in enumerate(metrics):
        for k, row in enumerate(rows):
            at, low, high = i + step * (k - (len(rows) - 1) / 2), row[f"{metric}_low"], row[f"{metric}_high"]
            is_teacher, marker = row["method"] == "teacher", "*" if row["method"] == "teacher" else MARKERS[k]
            color = method_color("teacher") if is_teacher else "#8b949e"
            if is_teacher:
                ax.fill_betweenx([i - 0.45, i + 0.45], low, high, color=color, alpha=0.12, lw=0)
            ax.plot([low, high], [at, at], color=color, lw=1.6, zorder=3)
            ax.plot(row[metric], at, marker, color=color, ms=11 if is_teacher else 6, mec="white", mew=0.8, zorder=4)
            if i == 0:
                text = method_label(row["method"], row.get("student"))
                ax.annotate(text, (high, at), (5, 0), textcoords="offset points", va="center", color="#586069")
    ax.set_yticks(range(len(metrics)), [HEADINGS.get(metric, metric) for metric in metrics])
    ax.set_ylim(len(metrics) - 0.45, -0.55)
    ax.set_xlim(left=min(0, ax.get_xlim()[0]))
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("F1 × 100")
    return ax


# ------------------------------------------------------------------------------------------------------------- layers


def plot_maps(maps: Mapping[str, Sequence[int]], teacher_layers: int) -> Axes:
    """Draw maps, one row each: a column for each teacher layer, filled with the student's layer number where kept.

    Maps of different sizes stand apart.
    """
    rows, places = list(maps.values()), []
    for before, ids in zip([rows[0], *rows], rows, strict=False):
        places.append(places[-1] + (1.5 if len(ids) != len(before) else 1) if places else 0)
    height = 0.27 * (places[-1] + 1) + 0.55
    ax = plt.subplots(figsize=(FIGURE_SIZE[0], height), layout="constrained")[1]
    for place, ids in zip(places, rows, strict=True):
        for layer in range(teacher_layers):
            color = "#0072b2" if layer in ids else "#eceff2"
            ax.add_patch(mpl.patches.Rectangle((layer - 0.47, place - 0.42), 0.94, 0.84, color=color, lw=0))
        for own, layer in enumerate(ids):
            ax.text(layer, place, own, color="white", ha="center", va="center", fontweight="bold")
    ax.set_yticks(places, maps)
    ax.set_xticks(range(teacher_layers))
    ax.set(xlim=(-0.6, teacher_layers - 0.4), ylim=(places[-1] + 0.6, -0.6), xlabel="teacher layer")
    ax.xaxis.tick_top()
    ax.xaxis.set_label_position("top")
    ax.grid(False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax


def plot_layers(rows: Sequence[Mapping], key: str, ylabel: str) -> Figure:
    """Plot one quantity of every layer as bars, encoder and decoder side by side on one scale.

    Rows have stack, layer, `key` and, where there is an interval, `key`_low and `key`_high.
    """
    stacks = list(dict.fromkeys(row["stack"] for row in rows))
    figure, axes = plt.subplots(1, len(stacks), figsize=(6.5, 2.7), sharey=True, layout="constrained", squeeze=False)
    for ax, stack in zip(axes[0], stacks, strict=True):
        own = [row for row in rows if row["stack"] == stack]
        layers, values = [row["layer"] for row in own], [row[key] for row in own]
        ax.bar(layers, values, 0.7, color="#8b949e")
        if all(f"{key}_low" in row for row in own):
            bars = [[row[key] - row[f"{key}_low"] for row in own], [row[f"{key}_high"] - row[key] for row in own]]
            ax.errorbar(layers, values, yerr=bars, fmt="none", color="#373e47", lw=1.1, capsize=2)
        ax.axhline(0, color="#8b949e", lw=0.8)
        ax.set(title=stack, xlabel="teacher layer", xticks=layers)
        ax.grid(False, axis="x")
        ax.tick_params(axis="x", length=0)
    axes[0][0].set_ylabel(ylabel)
    return figure


def plot_heatmaps(
    panels: Mapping[str, pd.DataFrame], decimals: Mapping[str, int] | int = 2, limits: Sequence[float] | None = None
) -> Figure:
    """Plot tables of numbers as shaded cells, side by side; darker is higher, on one scale where `limits` are given.

    The names of a table's index and columns label its axes. Up to twelve columns the cells carry their numbers.
    """
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6.5, 6.5 / len(panels) + 0.4), layout="constrained", squeeze=False
    )
    low, high = limits or (None, None)
    for ax, (title, frame) in zip(axes[0], panels.items(), strict=True):
        digits = decimals if isinstance(decimals, int) else decimals[title]
        size = {"size": 9 if frame.shape[1] <= 4 else 6.5}
        sns.heatmap(
            frame, ax=ax, cmap="Blues", vmin=low, vmax=high, annot=frame.shape[1] <= 12, fmt=f".{digits}f", cbar=False,
            square=True, linewidths=1, annot_kws=size,
        )  # fmt: skip
        ax.set_title(title)
        ax.tick_params(length=0, rotation=0)
    return figure


def plot_agreement(rows: Sequence[Mapping], x: str, y: str, xlabel: str, ylabel: str) -> Axes:
    """Plot one measured value against another, one point a row with its name above; `y`_low, `y`_high: its interval."""
    ax, color = new_axes(), METHOD_COLORS["sft"]
    rows = sorted(rows, key=lambda row: row[x])
    for row in rows:
        bar = [[row[y] - row[f"{y}_low"]], [row[f"{y}_high"] - row[y]]]
        ax.errorbar(row[x], row[y], yerr=bar, color=color, lw=1.1, capsize=2, marker="o", ms=6, mec="white")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.margins(x=0.08)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.6 * (high - low))  # room for names, which stand upright: neighbours are often close
    gap = 0.026 * (ax.get_xlim()[1] - ax.get_xlim()[0])
    for row, at in zip(rows, placement.spread([row[x] for row in rows], gap), strict=True):
        place = (at, row[f"{y}_high"] + 0.02 * (high - low))
        ax.text(*place, row["name"], color=color, rotation=90, ha="center", va="bottom")
    return ax


def plot_differences(rows: Sequence[Mapping], ax: Axes | None = None) -> Axes:
    """Plot paired differences with their intervals, one line a row from the top.

    Filled are those whose interval has no zero, unless seeds disagree on the sign. Rows have name,
    difference, low, high, and may have seeds_agree.
    """
    ax = ax or plt.subplots(figsize=(FIGURE_SIZE[0], 0.9 + 0.34 * len(rows)))[1]
    ax.axvline(0, color="#8b949e", lw=1)
    for at, row in enumerate(rows):
        real = (row["low"] > 0 or row["high"] < 0) and row.get("seeds_agree", True)
        color = method_color(str(row["name"]).split()[0])
        ax.plot([row["low"], row["high"]], [at, at], color=color, lw=2)
        ax.plot(row["difference"], at, "o", color=color, ms=7, mfc=color if real else "white", zorder=3)
    ax.set_yticks(range(len(rows)), [str(row["name"]).replace(" versus ", "\nversus ") for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    ax.set_xlabel("difference in ROUGE-2 (right: the change helps)")
    return ax


def plot_trade_off(
    rows: Sequence[Mapping], x: str = "latency_ms", y: str = "rouge2", legend: str = "numbers: beams",
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Plot quality against speed, one line a name through its settings by time; a setting is written beside its point.

    Rows have name, method, setting, `x`, `y`, `y`_low and `y`_high. Names of one method share its colour, not the
    marker; where all are of one method, colours tell the names apart. What nothing else beats is joined by dashes.
    """
    ax = new_axes(ax)
    names = list(dict.fromkeys(row["name"] for row in rows))
    shades = sns.color_palette("crest_r", len(names)).as_hex()
    mixed = len({row["method"] for row in rows} - {"teacher"}) > 1 or len(names) <= 2
    for number, name in enumerate(names):
        own = sorted((row for row in rows if row["name"] == name), key=lambda row: row[x])
        color = method_color(own[0]["method"]) if mixed else shades[number]
        values, at = [row[y] for row in own], [row[x] for row in own]
        bars = [[max(row[y] - row[f"{y}_low"], 0) for row in own], [max(row[f"{y}_high"] - row[y], 0) for row in own]]
        ax.errorbar(at, values, yerr=bars, color=color, lw=1.2, marker=MARKERS[number], ms=7, mec="white", capsize=2,
                    label=name, elinewidth=0.7)  # fmt: skip
        for row in own:
            text = row["setting"].replace(" beams", "").replace(" beam", "")
            ax.annotate(text, (row[x], row[y]), (4, 5), textcoords="offset points", color=color, fontsize="small")
    ax.set(xlabel=AXIS_LABELS.get(x, x.replace("_", " ")), ylabel=AXIS_LABELS.get(y, y))
    best = pareto_front(rows, x, y)
    ax.plot([row[x] for row in best], [row[y] for row in best], color="#1c2127", lw=0.9, ls="--", zorder=1)
    ax.set_xlim(left=0)
    ax.legend(title=legend, frameon=False)
    return ax


def plot_capacity_gap(rows: Sequence[Mapping], ylabel: str = "score", ax: Axes | None = None) -> Axes:
    """Plot a student's score against its teacher's size, one line a name through its teachers, a lone one as a mark.

    The student is always of one size. Rows have name, method (its colour), teacher_parameters, score, score_low and
    score_high; those named "teacher" hold a teacher's own score and stand behind in grey, the interval may be missing.
    A student by way of an assistant has the size of the teacher that its assistant learned from.
    """
    ax = new_axes(ax)
    sizes = sorted({row["teacher_parameters"] / 1e6 for row in rows})
    teachers = sorted((row for row in rows if row["name"] == "teacher"), key=lambda row: row["teacher_parameters"])
    names = list(dict.fromkeys(row["name"] for row in rows if row["name"] != "teacher"))
    labels, right = [], sizes[-1]
    if teachers:
        at, values = [row["teacher_parameters"] / 1e6 for row in teachers], [row["score"] for row in teachers]
        ax.plot(at, values, color=method_color("teacher"), lw=0.9, ls=":", marker="*", ms=9, alpha=0.6, zorder=2)
        labels.append((values[-1], "teacher", method_color("teacher")))
    for number, name in enumerate(names):
        own = sorted((row for row in rows if row["name"] == name), key=lambda row: row["teacher_parameters"])
        # Intervals of one teacher's students must not hide each other; on a log axis steps sideways are factors.
        aside = max(sizes[-1] / sizes[0], 2) ** (0.025 * (number - (len(names) - 1) / 2))
        at = [row["teacher_parameters"] / 1e6 * aside for row in own]
        values, color = [row["score"] for row in own], method_color(own[0]["method"])
        bars = [[max(row["score"] - row["score_low"], 0) for row in own],
                [max(row["score_high"] - row["score"], 0) for row in own]]  # fmt: skip
        lone = len(own) == 1
        ax.errorbar(
            at, values, yerr=bars, color=color, lw=1.4, elinewidth=1.1, capsize=2, marker=MARKERS[number % 8],
            ms=9 if lone else 7, mec="#1c2127" if lone else "white", mew=1.1 if lone else 0.8, zorder=4,
        )  # fmt: skip
        labels.append((values[-1], name, color))
        right = max(right, at[-1])
    ax.set_xscale("log")
    ax.set_xticks(sizes, [f"{size:.3g}" for size in sizes])
    ax.minorticks_off()
    ax.set(xlabel="teacher parameters (M, log scale)", ylabel=ylabel)
    ax.margins(y=0.1)
    placement.label_right(ax, labels, at=1.015 * right)  # beyond a large mark
    return ax


def plot_stacked(
    rows: Sequence[Mapping], parts: Sequence[str], xlabel: str, limit: float | None = None, limit_label: str = ""
) -> Axes:
    """Plot what a total is made of, one bar a row from the top, with the total behind it.

    Rows have `name` and a number for each of `parts`; parts that are 0 everywhere are left out. `limit` is drawn as a
    line across all bars.
    """
    parts = [part for part in parts if any(row.get(part) for row in rows)]
    ax = plt.subplots(figsize=(FIGURE_SIZE[0], 1.3 + 0.45 * len(rows)))[1]
    colors = sns.color_palette("colorblind", len(parts))
    ends = [0.0] * len(rows)
    for part, color in zip(parts, colors, strict=True):
        values = [row.get(part) or 0.0 for row in rows]
        ax.barh(range(len(rows)), values, left=ends, height=0.62, color=color, edgecolor="white", lw=0.6, label=part)
        ends = [end + value for end, value in zip(ends, values, strict=True)]
    for at, end in enumerate(ends):
        ax.annotate(f" {end:.3g}", (end, at), va="center")
    if limit is not None:
        ax.axvline(limit, color="#1c2127", lw=1, ls="--")
        ax.annotate(limit_label, (limit, -0.55), ha="right", va="bottom", xytext=(-3, 0), textcoords="offset points")
    ax.set_yticks(range(len(rows)), [row["name"] for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5 if limit is None else -0.9)
    ax.set_xlim(0, 1.15 * max([*ends, limit or 0.0]))
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    ax.set_xlabel(xlabel)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=1.2)
    return ax


def plot_thresholds(table: pd.DataFrame) -> Figure:
    """Plot a histogram a measure of pseudo-labels, side by side; what the threshold removes is pale.

    One row a label: measure, value, removed, low, high (pseudo_labels.threshold_rows).
    """
    names = list(dict.fromkeys(table["measure"]))
    figure, axes = plt.subplots(1, len(names), figsize=(2.4 * len(names) + 0.6, 2.4), sharey=True, squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        own = table[table["measure"] == name]
        edges = np.histogram_bin_edges(own["value"], bins=20)
        for removed, alpha in ((False, 0.9), (True, 0.35)):
            ax.hist(own["value"][own["removed"] == removed], bins=edges, color=method_color("pl"), alpha=alpha)
        for bound in (own["low"].iloc[0], own["high"].iloc[0]):
            if math.isfinite(bound):
                ax.axvline(bound, color="#1c2127", lw=1.2)
        ax.set_xlabel(name.replace("_", " ").replace("rouge2", "ROUGE-2"))
        ax.set_title(f"{100 * own['removed'].mean():.0f} % removed", loc="left")
    axes[0][0].set_ylabel("pseudo-labels")
    return figure
