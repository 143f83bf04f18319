"""Figures: a `plot_*` function takes plain rows, returns its Axes and never shows it; `show` does.

Out of scope: computing what is drawn; colours, names and the look (style.py).
"""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distill_utils.report import style
from distill_utils.report.dashboard import is_number, pareto_front  # noqa: F401  as figures.pareto_front
from distill_utils.report.names import METHOD_COLORS, method_color, method_label
from distill_utils.report.style import HEADINGS, show, use_style  # noqa: F401  as figures.show


def plot_history(histories: Mapping[str, Sequence[Mapping]], key: str = "loss") -> Axes:
    """Plot one quantity of training histories over the steps.

    `histories` maps a run's name ("kd", "kd 6-3") to history rows with "step" and `key`; rows without it are skipped.
    The first word is the method and gives the colour; runs of one method differ by dashes.
    """
    ax = style.new_axes()
    ends: list[tuple[float, str, str]] = []
    dashes, right = Counter(), 0
    for name, history in histories.items():
        points = [(row["step"], row[key]) for row in history if row.get(key) is not None]
        if not points:
            continue
        method, _, rest = name.partition(" ")
        dash = ("-", "--", ":", "-.")[dashes[method] % 4]
        dashes[method] += 1
        steps, values = zip(*points, strict=True)
        color = method_color(method)
        ax.plot(steps, values, dash, color=color, lw=1.5, marker="o" if len(points) == 1 else None)
        ends.append((values[-1], method_label(method, rest), color))
        right = max(right, steps[-1])
    ax.set(xlabel="optimizer step", ylabel=style.axis_label(key))
    ax.margins(y=0.1)
    style.label_right(ax, ends, at=right)
    return ax


def _moved_apart(values: Sequence[float]) -> pd.Series:
    """Move values that lie within 3 % of the whole range apart by 2.2 % of it, keeping each group's middle."""
    at = pd.Series(values, dtype=float)
    whole = at.max() - at.min()
    number = (at.dropna().sort_values().diff() > 0.03 * whole).cumsum().sort_index()
    group = at.groupby(number)  # in the order of the rows, the same in every group
    size = group.transform("size")
    aside = (group.cumcount() - (size - 1) / 2) * 0.022 * whole
    return at.where(size == 1, group.transform("mean") + aside)


def plot_quality_speed(rows: Sequence[Mapping], x: str = "ms_per_token", y: str = "rouge2") -> Axes:
    """Plot quality against speed, one point a row, intervals as error bars, the teacher's as a band.

    Rows are results rows: method, student, `x`, `y`, `y`_low, `y`_high. Colour is the method, marker the student's
    shape. Rows without `x` (lead words, object name) are dotted lines, the teacher is a point in its band. Points of
    nearly equal `x` (students of one shape) are moved apart sideways so that no error bar hides another.
    """
    ax = style.new_axes()
    rows = [row for row in rows if is_number(row.get(y))]
    students = dict.fromkeys(row["student"] for row in rows if row.get("student") and row.get("method") != "teacher")
    shapes = {student: style.MARKERS[i % len(style.MARKERS)] for i, student in enumerate(students)}
    places = _moved_apart([row[x] if is_number(row.get(x)) else math.nan for row in rows])
    points, lines, bars = [], [], []  # labels of points, labels at the right edge, error bars
    for row, at in zip(rows, places, strict=True):
        method, value, is_line = row.get("method", ""), row[y], math.isnan(at)
        color, low, high = method_color(method), row.get(f"{y}_low"), row.get(f"{y}_high")
        has_interval = is_number(low) and is_number(high)
        if method == "teacher" and has_interval:
            ax.axhspan(low, high, color=color, alpha=0.12, lw=0)
        elif has_interval and not is_line:
            style.error_bars(ax, [at], [row], y, color=color, zorder=3)
            bars.append(((at, low), (at, high)))
        if method == "teacher" or is_line:
            ax.axhline(value, color=color, lw=0.9 if method == "teacher" else 1.2, ls=":" if is_line else "-")
            lines.append((value, method_label(method), "#6b6b6b"))
        else:
            points.append((at, value, method_label(method, row.get("student")), color))
        if not is_line:
            marker = "*" if method == "teacher" else shapes.get(row.get("student"), "o")
            ax.plot(at, value, marker, color=color, ms=11 if marker == "*" else 7, mec="white", mew=0.8, zorder=4)
    ax.set(xlabel=style.axis_label(x), ylabel=style.axis_label(y))
    ax.margins(x=0.25, y=0.1)
    if places.min() >= 0:
        ax.set_xlim(left=max(ax.get_xlim()[0], 0))
    style.label_right(ax, lines)
    left, right = ax.get_xlim()
    style.label_points(ax, points, bars + [((left, value), (right, value)) for value, *_ in lines])
    return ax


def plot_lengths(lengths: Mapping[str, Sequence[int]], limits: Mapping[str, int] | None = None) -> Axes:
    """Plot cumulative distributions of lengths on a log axis, with truncation limits as dashed lines.

    `lengths` maps a name ("source", "reference", "kd") to lengths in tokens; `limits` maps some of the names to the
    length they are cut at. Where a curve meets its dashed line stands the share that is left whole.
    """
    ax = style.new_axes()
    others = iter(("#0072b2", "#d55e00", "#009e73", "#cc79a7"))
    limits = limits or {}
    shares = np.linspace(0, 1, 201)  # as many points for any number of documents
    for name, values in lengths.items():
        color = METHOD_COLORS.get(name.split()[0]) or next(others)
        ax.plot(np.quantile(values, shares).clip(1), 100 * shares, color=color, label=method_label(name))
        if name in limits:
            whole = 100 * np.mean(np.asarray(values) <= limits[name])
            ax.axvline(limits[name], color=color, ls="--", lw=1.1)
            note = f"{limits[name]} ({whole:.0f} % not cut)"
            ax.annotate(note, (limits[name], 101), (0, 4), textcoords="offset points", color=color, ha="center")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="length (tokens, log scale)", ylabel="documents up to this length (%)", ylim=(0, 101))
    ax.legend(loc="upper left")
    return ax


def plot_coverage_density(coverage: Sequence[float], density: Sequence[float]) -> Axes:
    """Plot references' coverage (share of words inside copied fragments) against density (their mean squared length).

    One value each a document.
    """
    ax = style.new_axes()
    ax.scatter(coverage, density, s=10, lw=0, color=method_color("reference"), alpha=0.4)
    ax.set_yscale("symlog", linthresh=1)
    ax.yaxis.set_major_formatter("{x:g}")  # the usual one writes powers as TeX
    ax.set(xlabel="coverage: share of words copied", ylabel="density: squared length of copied runs")
    ax.set_xlim(-0.02, 1.02)
    return ax


def plot_intervals(rows: Sequence[Mapping]) -> Axes:
    """Plot mean and interval of every row, one group a ROUGE metric, the teacher's as a band behind its group.

    Rows are results rows: method, <metric>, <metric>_low, <metric>_high. Names stand beside the first group.
    """
    ax = style.new_axes()
    step, metrics = 0.72 / len(rows), ("rouge1", "rouge2", "rougeL", "rougeLsum")
    for i, metric in enumerate(metrics):
        for k, row in enumerate(rows):
            at, low, high = i + step * (k - (len(rows) - 1) / 2), row[f"{metric}_low"], row[f"{metric}_high"]
            is_teacher = row["method"] == "teacher"
            marker, size = ("*", 11) if is_teacher else (style.MARKERS[k % len(style.MARKERS)], 6)
            color = method_color("teacher") if is_teacher else "#8b949e"
            if is_teacher:
                ax.fill_betweenx([i - 0.45, i + 0.45], low, high, color=color, alpha=0.12, lw=0)
            ax.plot([low, high], [at, at], color=color, lw=1.6, zorder=3)
            ax.plot(row[metric], at, marker, color=color, ms=size, mec="white", mew=0.8, zorder=4)
            if i == 0:  # beyond the band
                text, edge = method_label(row["method"], row.get("student")), max(row[f"{metric}_high"] for row in rows)
                ax.annotate(text, (edge, at), (5, 0), textcoords="offset points", va="center", color="#586069")
    style.name_rows(ax, [HEADINGS[metric] for metric in metrics])
    ax.set(xlabel="F1 × 100", xlim=(min(0, ax.get_xlim()[0]), None))
    return ax


# ------------------------------------------------------------------------------------------------------------- layers


def plot_maps(maps: Mapping[str, Sequence[int]], teacher_layers: int) -> Axes:
    """Draw maps, one row each: a column for each teacher layer, filled with the student's layer number where kept.

    Maps of different sizes stand apart.
    """
    rows, size = {}, None
    for name, ids in maps.items():
        if size not in (None, len(ids)):
            rows[" " * len(rows)] = [None] * teacher_layers
        rows[name] = [str(list(ids).index(layer)) if layer in ids else "" for layer in range(teacher_layers)]
        size = len(ids)
    numbers = pd.DataFrame.from_dict(rows, orient="index")
    ax = plt.subplots(figsize=(style.FIGURE_SIZE[0], 0.27 * len(rows) + 0.55), layout="constrained")[1]
    sns.heatmap(
        numbers.ne(""), ax=ax, mask=numbers.isna(), annot=numbers, fmt="", cmap=["#eceff2", "#0072b2"], vmin=0, vmax=1,
        cbar=False, linewidths=2, annot_kws={"fontweight": "bold"},
    )  # fmt: skip
    ax.set_xlabel("teacher layer")
    ax.xaxis.set_label_position("top")
    ax.tick_params(length=0, rotation=0, labeltop=True, labelbottom=False)
    ax.grid(False)
    return ax


def plot_layers(rows: Sequence[Mapping], key: str, ylabel: str) -> Figure:
    """Plot one quantity of every layer as bars, encoder and decoder side by side on one scale.

    Rows have stack, layer, `key` and, where there is an interval, `key`_low and `key`_high.
    """
    stacks = pd.DataFrame(rows).groupby("stack", sort=False)
    figure, axes = plt.subplots(1, len(stacks), figsize=(6.5, 2.7), sharey=True, layout="constrained", squeeze=False)
    for ax, (stack, own) in zip(axes[0], stacks, strict=True):
        ax.bar(own["layer"], own[key], 0.7, color="#8b949e")
        if f"{key}_low" in own:
            style.error_bars(ax, own["layer"], own.to_dict("records"), key, fmt="none", color="#373e47")
        ax.axhline(0, color="#8b949e", lw=0.8)
        ax.set(title=stack, xlabel="teacher layer", xticks=own["layer"])
        ax.grid(False, axis="x")
        ax.tick_params(axis="x", length=0)
    axes[0][0].set_ylabel(ylabel)
    return figure


def plot_heatmaps(panels: Mapping[str, pd.DataFrame], limits: Sequence[float]) -> Figure:
    """Plot tables of numbers as shaded cells, side by side on one scale; darker is higher.

    The names of a table's index and columns label its axes. Up to twelve columns the cells carry their numbers.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(6.5, 6.5 / len(panels) + 0.4), squeeze=False)
    for ax, (title, frame) in zip(axes[0], panels.items(), strict=True):
        sns.heatmap(
            frame, ax=ax, cmap="Blues", vmin=limits[0], vmax=limits[1], annot=frame.shape[1] <= 12, fmt=".2f",
            cbar=False, square=True, linewidths=1, annot_kws={"size": 9 if frame.shape[1] <= 4 else 6.5},
        )  # fmt: skip
        ax.set_title(title)
        ax.tick_params(length=0, rotation=0)
    return figure


def plot_agreement(rows: Sequence[Mapping], x: str, y: str, xlabel: str, ylabel: str) -> Axes:
    """Plot one measured value against another, one point a row with its name above; `y`_low, `y`_high: its interval."""
    ax, color = style.new_axes(), METHOD_COLORS["sft"]
    style.error_bars(ax, [row[x] for row in rows], rows, y, color=color, ls="", marker="o")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_ylim(top=ax.get_ylim()[1])
    for row in rows:  # from its bar to its name
        ax.vlines(row[x], row[f"{y}_high"], ax.get_ylim()[1], color=color, lw=0.8, ls=":")
    # Above the axes and upright: neighbours are often close.
    look = {"transform": ax.get_xaxis_transform(), "color": color, "rotation": 90, "ha": "center", "fontsize": "small"}
    texts = [ax.text(row[x], 1.0, f" {row['name']}", **look) for row in rows]
    style.separate(ax, texts, "x")
    for text in texts:
        text.set(y=1.0, va="bottom")
    ax.get_figure().set_figheight(4.2)
    return ax


def plot_differences(rows: Sequence[Mapping]) -> Axes:
    """Plot paired differences with their intervals, one line a row from the top.

    Filled are those whose interval has no zero. Rows have name, difference, low, high.
    """
    ax = plt.subplots(figsize=(style.FIGURE_SIZE[0], 0.9 + 0.34 * len(rows)))[1]
    ax.axvline(0, color="#8b949e", lw=1)
    for at, row in enumerate(rows):
        real = row["low"] > 0 or row["high"] < 0
        color = method_color(str(row["name"]).split()[0])
        ax.plot([row["low"], row["high"]], [at, at], color=color, lw=2)
        ax.plot(row["difference"], at, "o", color=color, ms=7, mfc=color if real else "white", zorder=3)
    names = [" ".join(map(method_label, str(row["name"]).split(" "))) for row in rows]
    style.name_rows(ax, [name.replace(" versus ", "\nversus ") for name in names])
    ax.set_xlabel("difference in ROUGE-2 (right: the change helps)")
    return ax


def plot_trade_off(rows: Sequence[Mapping], x: str = "latency_ms", legend: str = "numbers: beams") -> Axes:
    """Plot ROUGE-2 against speed, one line a name through its settings by time; a setting is written beside its point.

    Rows have name, method, setting, `x`, rouge2, rouge2_low, rouge2_high. Names of one method share its colour, not the
    marker; where all are of one method, colours tell the names apart. What nothing else beats is joined by dashes.
    """
    ax, y = style.new_axes(), "rouge2"
    names = list(dict.fromkeys(row["name"] for row in rows))
    shades = sns.color_palette("crest_r", len(names) + 2).as_hex()  # the palest are left out
    mixed = len({row["method"] for row in rows} - {"teacher"}) > 1 or len(names) <= 2
    labels, best = [], [(row[x], row[y]) for row in pareto_front(rows, x, y)]
    segments = [((row[x], row[f"{y}_low"]), (row[x], row[f"{y}_high"])) for row in rows] + [*itertools.pairwise(best)]
    for number, name in enumerate(names):
        own = sorted((row for row in rows if row["name"] == name), key=lambda row: row[x])
        color = method_color(own[0]["method"]) if mixed else shades[number]
        look = {"color": color, "elinewidth": 0.7, "marker": style.MARKERS[number % len(style.MARKERS)]}
        style.error_bars(ax, [row[x] for row in own], own, y, label=name, **look)
        labels += [(row[x], row[y], row["setting"].removesuffix("s").removesuffix(" beam"), color) for row in own]
        segments += itertools.pairwise((row[x], row[y]) for row in own)
    ax.plot(*zip(*best, strict=True), color="#1c2127", lw=0.9, ls="--", zorder=1)
    ax.set(xlabel=style.axis_label(x), ylabel=style.axis_label(y), xlim=(0, None))
    ax.legend(title=legend, frameon=False)
    style.label_points(ax, labels, segments, fontsize="small")
    return ax


def plot_capacity_gap(rows: Sequence[Mapping], ylabel: str = "score") -> Axes:
    """Plot a student's score against its teacher's size, one line a name through its teachers, a lone one as a mark.

    The student is always of one size. Rows have name, method (its colour), teacher_parameters, score, score_low and
    score_high; those named "teacher" hold a teacher's own score and stand behind in grey, the interval may be missing.
    A student by way of an assistant has the size of the teacher that its assistant learned from.
    """
    ax = style.new_axes()
    rows = sorted(rows, key=lambda row: (row["name"] != "teacher", row["teacher_parameters"]))
    sizes = sorted({row["teacher_parameters"] / 1e6 for row in rows})
    names = list(dict.fromkeys(row["name"] for row in rows))
    students = [name for name in names if name != "teacher"]
    labels, right = [], sizes[-1]
    for name in names:
        own = [row for row in rows if row["name"] == name]
        at, values = np.array([row["teacher_parameters"] / 1e6 for row in own]), [row["score"] for row in own]
        color = method_color("teacher" if name == "teacher" else own[0]["method"])  # an assistant teaches, too
        labels.append((values[-1], name, color))
        if name == "teacher":
            ax.plot(at, values, color=color, lw=0.9, ls=":", marker="*", ms=9, zorder=2)
            continue
        number = students.index(name)
        # Intervals of one teacher's students must not hide each other; on a log axis steps sideways are factors.
        at = at * max(sizes[-1] / sizes[0], 2) ** (0.025 * (number - (len(students) - 1) / 2))
        look = {"ms": 9, "mec": "#1c2127"} if len(own) == 1 else {}
        look |= {"color": color, "lw": 1.4, "zorder": 4, "marker": style.MARKERS[number % len(style.MARKERS)]}
        style.error_bars(ax, at, own, "score", **look)
        right = max(right, at[-1])
    ax.set_xscale("log")
    ax.set_xticks(sizes, [f"{size:.3g}" for size in sizes])
    ax.minorticks_off()
    ax.set(xlabel="teacher parameters (M, log scale)", ylabel=ylabel)
    ax.margins(y=0.1)
    style.label_right(ax, labels, at=1.015 * right)  # beyond a large mark
    return ax


def plot_stacked(
    rows: Sequence[Mapping], parts: Sequence[str], xlabel: str, limit: float | None = None, limit_label: str = ""
) -> Axes:
    """Plot what a total is made of, one bar a row from the top, with the total behind it.

    Rows have `name` and a number for each of `parts`; parts too small to be seen are left out, and a unit that the
    axis has. `limit` is drawn as a line across all bars.
    """
    table = pd.DataFrame(rows).set_index("name").reindex(columns=list(parts)).fillna(0.0)
    totals = table.sum(axis=1)
    table = table.loc[:, table.max() > 0.003 * totals.max()].rename(columns=lambda part: part.removesuffix(" (GB)"))
    ax = plt.subplots(figsize=(style.FIGURE_SIZE[0], 1.3 + 0.45 * len(rows)))[1]
    colors = sns.color_palette("colorblind", table.shape[1])
    table.plot.barh(stacked=True, ax=ax, width=0.62, color=colors, edgecolor="white", lw=0.6)
    for at, total in enumerate(totals):
        ax.annotate(f" {total:.3g}", (total, at), va="center")
    if limit is not None:
        ax.axvline(limit, color="#1c2127", lw=1, ls="--")
        ax.annotate(limit_label, (limit, -0.55), ha="right", va="bottom", xytext=(-3, 0), textcoords="offset points")
    ax.set(xlabel=xlabel, ylabel="", xlim=(0, 1.15 * max(*totals, limit or 0.0)))
    style.name_rows(ax, list(table.index), room=0.0 if limit is None else 0.4)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=1.2)
    return ax


def plot_thresholds(table: pd.DataFrame) -> Figure:
    """Plot a histogram a measure of pseudo-labels, side by side; what the threshold removes is pale.

    One row a label: measure, value, removed, low, high (pseudo_labels.threshold_rows).
    """
    measures = table.groupby("measure", sort=False)
    figure, axes = plt.subplots(1, len(measures), figsize=(2.4 * len(measures) + 0.6, 2.4), sharey=True, squeeze=False)
    for ax, (name, own) in zip(axes[0], measures, strict=True):
        shades = {False: method_color("pl"), True: "#a5d9c8"}
        sns.histplot(own, x="value", hue="removed", bins=20, multiple="stack", palette=shades, legend=False, ax=ax)
        for bound in (own["low"].iloc[0], own["high"].iloc[0]):
            if math.isfinite(bound):
                ax.axvline(bound, color="#1c2127", lw=1.2)
        title = f"{100 * own['removed'].mean():.0f} % removed"
        ax.set(xlabel=style.axis_label(name), ylabel="pseudo-labels", title=title)
    return figure


# One that fails costs its figure and not the page.
globals().update({name: style.or_failure(plot) for name, plot in list(globals().items()) if name.startswith("plot_")})
