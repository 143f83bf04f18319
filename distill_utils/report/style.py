"""One look for every figure and table: names and colours, labels that do not overlap, captions, alternative texts."""

import functools
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.transforms import offset_copy

from distill_utils.report.names import METHOD_COLORS

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
FIGURE_SIZE = (6.5, 3.5)  # inches
MAX_SVG_BYTES = 240_000
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
    "p_value": "p-value",
    "peak_memory_gb": "peak memory (GB)",
    "kl_loss": "KL (nats/token)",
}
AXIS_LABELS = HEADINGS | {
    "ms_per_token": "time per generated token (ms)",
    "latency_ms": "latency of one summary (ms)",
    "words": "words per summary",
    "speedup": "speed-up over the teacher",
    "ce_loss": "cross-entropy (nats per token)",
    "kl_loss": "KL from teacher (nats per token)",
    "own_kl_loss": "KL on the student's own samples (nats per token)",
    "hidden_loss": "hidden-state error",
}


def heading(key: str) -> str:
    """Return the heading of a results key in a table: rouge2_low is "ROUGE-2 low"."""
    return HEADINGS.get(key) or " ".join(HEADINGS.get(word, word) for word in key.split("_"))


def axis_label(key: str) -> str:
    """Return the text beside an axis for a results key."""
    return AXIS_LABELS.get(key) or heading(key)


def use_style() -> None:
    """Set the style of all figures: white, light grid, no frame at the top and right."""
    sns.set_theme(style="ticks", palette=list(METHOD_COLORS.values()), font_scale=0.95)
    plt.style.use(Path(__file__).with_name("templates") / "figures.mplstyle")


def new_axes() -> Axes:
    """Return the axes of a new figure of the one size."""
    return plt.subplots(figsize=FIGURE_SIZE, layout="constrained")[1]


def name_rows(ax: Axes, names: Sequence[str], room: float = 0.0) -> None:
    """Write the names of rows that stand at 0, 1, ... from the top; `room` above them is in rows."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5 - room)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")


def text_color(color: str) -> tuple[float, ...]:
    """Return a colour darkened until text in it is legible on white (a contrast of 4.5)."""
    rgb = np.array(to_rgb(color))
    return tuple(rgb * min(1.0, (0.17 / max(rgb**2.2 @ (0.2126, 0.7152, 0.0722), 1e-9)) ** (1 / 2.2)))


def separate(ax: Axes, texts: Sequence, move: str) -> None:
    """Move texts along `move` ("x" or "y") until none hides another; the same figure gives the same places."""
    if texts:
        ax.get_figure().draw_without_rendering()  # places need the final layout
        adjust_text(texts, ax=ax, only_move=move, iter_lim=300, avoid_self=False, ensure_inside_axes=False)


def label_right(ax: Axes, labels: Sequence[tuple[float, str, str]], at: float | None = None) -> None:
    """Write (value, text, colour) labels at x = `at`, else at the right edge, pushed apart where they would touch."""
    x, transform = (1.0, ax.get_yaxis_transform()) if at is None else (at, ax.transData)
    beside = offset_copy(transform, ax.get_figure(), 6, 0, units="points")
    look = {"transform": beside, "va": "center"}
    texts = [ax.text(x, y, text, color=text_color(color), **look) for y, text, color in sorted(labels)]
    separate(ax, texts, "y")
    for text in texts:
        text.set(x=x, ha="left")


def error_bars(ax: Axes, at: Sequence[float], rows: Sequence[Mapping], key: str, **look) -> None:
    """Plot `key` of the rows, `key`_low and `key`_high as error bars, at the x of `at`."""
    values, low, high = ([row[f"{key}{end}"] for row in rows] for end in ("", "_low", "_high"))
    lengths = np.maximum([np.subtract(values, low), np.subtract(high, values)], 0)
    ax.errorbar(at, values, lengths, **{"lw": 1.1, "elinewidth": 1.1, "capsize": 2, "ms": 7, "mec": "white"} | look)


def label_points(
    ax: Axes, points: Sequence[tuple[float, float, str, str]], segments: Sequence[tuple], fontsize: str = "medium"
) -> None:  # fmt: skip
    """Write each (x, y, text, colour) beside its point, where it hides least of the points and of `segments`.

    A segment is two ends (x, y). A place that is nearer to another point than to its own would name that one.
    """
    if not points:
        return
    ax.get_figure().draw_without_rendering()  # places need the final layout; from here on all is in pixels
    dots = ax.transData.transform([point[:2] for point in points])
    drawn = np.vstack([dots, *(np.linspace(*ax.transData.transform(ends), 50) for ends in segments)])
    taken = [other.get_window_extent().get_points() for other in (*ax.texts, ax.get_legend()) if other]
    sides, heights = (7, -7, 16, -16, 25, -25, 34, -34), (0, 6, -6, 12, -12, 18, -18, 24, -24, 30, -30)
    places = np.array(list(itertools.product(sides, heights)))
    anchors = np.where(places < 0, (1, 0.5), (0, 0.5))
    for number, (x, y, name, color) in enumerate(points):
        look = {"color": text_color(color), "fontsize": fontsize, "va": "center", "zorder": 5}
        text = ax.annotate(name, (x, y), (0, 0), textcoords="offset points", **look)
        size = text.get_window_extent().padded(2).size
        low = (dots[number] + ax.get_figure().dpi / 72 * places - size * anchors)[:, None]
        high = low + size  # corners of the text at each place, to be compared with all that could lie between
        away = np.linalg.norm(dots - dots.clip(low, high), axis=2)
        cost = np.abs(places).sum(axis=1) / 15 + ((drawn > low) & (drawn < high)).all(axis=2).sum(axis=1)
        cost += 8 * (away < away[:, [number]]).sum(axis=1) + 100 * (low[:, 0] < ax.bbox.min).sum(axis=1)
        starts, ends = np.reshape(taken, (-1, 2, 2)).swapaxes(0, 1)
        cost += 100 * ((starts < high) & (ends > low)).all(axis=2).sum(axis=1)
        best = cost.argmin()
        text.set(position=places[best], ha="left" if places[best][0] > 0 else "right")
        taken.append(text.get_window_extent().get_points())


def or_failure(plot: Callable) -> Callable:
    """Decorate a `plot_*` function: instead of an exception it returns axes that `show` replaces by the reason.

    A page whose figure fails has cost hours and still has its tables.
    """

    @functools.wraps(plot)
    def plotted(*arguments, **options):
        before = plt.get_fignums()
        try:
            return plot(*arguments, **options)
        except Exception as error:  # drawing and layout raise many kinds
            for number in set(plt.get_fignums()) - set(before):  # half drawn; a notebook would show it
                plt.close(number)
            ax = new_axes()
            ax.get_figure().failure = error
            return ax

    return plotted


def show(figure_or_axes: Figure | Axes, alt: str, caption: str) -> None:
    """Display a figure with its alternative text and a caption below, and close it.

    It is an SVG, or a PNG at 150 dpi where the SVG would be large. `alt` says in a clause what the pattern is and
    `caption` what is drawn, of how many, and what the intervals mean. Raises ValueError when one is empty.
    """
    from IPython.display import HTML, display

    if not alt.strip() or not caption.strip():
        raise ValueError(f"alt {alt!r} and caption {caption!r} must both say something about the figure")
    figure = figure_or_axes if isinstance(figure_or_axes, Figure) else figure_or_axes.get_figure()
    try:
        if failure := getattr(figure, "failure", None):
            raise failure
        picture = svg(figure)
    except Exception as error:  # of `or_failure`, or of the layout, which is computed only here
        plt.close(figure)
        reason = escape(f"{type(error).__name__}: {error}")
        display(HTML(f'<div class="failed">No figure could be drawn of: {escape(alt)} {reason}</div>'))
        return
    if len(picture) <= MAX_SVG_BYTES:
        mime, data, size = "image/svg+xml", picture.decode(), {}
    else:
        mime, data = "image/png", _drawn(figure, format="png", dpi=150)
        size = {"width": round(figure.get_figwidth() * 96)}
    display({mime: data, "text/plain": alt}, metadata={mime: {"alt": alt, **size}}, raw=True)
    display(HTML(f'<div class="figcaption">{escape(caption)}</div>'))


def svg(figure: Figure) -> bytes:
    """Return a figure as SVG and close it; the same figure gives the same bytes."""
    picture = _drawn(figure, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return picture


def _drawn(figure: Figure, **options) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, bbox_inches="tight", pad_inches=0.05, **options)
    return buffer.getvalue()
