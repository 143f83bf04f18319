"""Where names and points of a figure go so that none hides another.

Not here: what is drawn (figures.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.transforms import Bbox


def label_right(ax: Axes, labels: Sequence[tuple[float, str, str]], at: float | None = None) -> None:
    """Write (value, text, colour) labels at x = `at`, else at the right edge, pushed apart where they would touch."""
    low, high = ax.get_ylim()
    gap = (high - low) * 0.07  # one line of text in a figure of the one size
    labels = sorted(labels)
    places = spread([value for value, *_ in labels], gap)
    for (_, text, color), y in zip(labels, places, strict=True):
        if at is None:
            ax.text(1.01, y, text, transform=ax.get_yaxis_transform(), va="center", color=color)
        else:
            ax.annotate(
                text, (at, y), (6, 0), textcoords="offset points", va="center", color=color, annotation_clip=False
            )
    ax.set_ylim(low, high)


def label_points(ax: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Write the names of points beside them: one column of text for each group of neighbours, in their order."""
    figure = ax.get_figure()
    figure.draw_without_rendering()  # places need the final layout
    renderer = figure.canvas.get_renderer()
    unit = figure.dpi / 72
    line = 11.5 * unit
    inside = ax.get_window_extent(renderer)
    box = Bbox.from_bounds
    placed = [(*ax.transData.transform((px, py)), text, color) for px, py, text, color in points]
    groups: list[list[tuple[float, float, str, str]]] = []
    for point in sorted(placed):
        if groups and point[0] - groups[-1][-1][0] < 20 * unit:
            groups[-1].append(point)
        else:
            groups.append([point])
    bars = [bar.get_window_extent(renderer) for container in ax.containers for bar in container.lines[2]]
    marks = [box(cx - 5 * unit, cy - 5 * unit, 10 * unit, 10 * unit) for cx, cy, *_ in placed]
    taken = [*marks, *(bar.padded(1.5 * unit) for bar in bars)]
    for group in groups:
        group.sort(key=lambda point: point[1])
        places = spread([point[1] for point in group], line)
        columns = []
        for side, edge in (
            ("left", max(p[0] for p in group) + 9 * unit),
            ("right", min(p[0] for p in group) - 9 * unit),
        ):
            texts = [
                ax.text(
                    *ax.transData.inverted().transform((edge, cy)), name, color=color, ha=side, va="center", zorder=5
                )
                for (_, _, name, color), cy in zip(group, places, strict=True)
            ]
            boxes = [text.get_window_extent(renderer) for text in texts]
            cost = sum(overlap(one, other) for one in boxes for other in taken)
            cost += sum(one.width * one.height - overlap(one, inside) for one in boxes)
            columns.append((cost, side != "left", texts, boxes))
        columns.sort(key=lambda column: column[:2])
        for text in columns[1][2]:
            text.remove()
        taken += columns[0][3]


def move_apart(values: Sequence[float | None], close: float = 0.03, step: float = 0.022) -> list[float | None]:
    """Move values that lie within `close` of the whole range apart by `step` of it, keeping each group's middle."""
    known = sorted((value, i) for i, value in enumerate(values) if value is not None)
    whole = (known[-1][0] - known[0][0]) if known else 0
    moved = list(values)
    groups: list[list[tuple[float, int]]] = []
    for value, i in known:
        if groups and whole and value - groups[-1][-1][0] <= close * whole:
            groups[-1].append((value, i))
        else:
            groups.append([(value, i)])
    for group in groups:
        middle = sum(value for value, _ in group) / len(group)
        for rank, i in enumerate(sorted(i for _, i in group)):  # in the order of the rows, the same in every group
            if len(group) > 1:
                moved[i] = middle + (rank - (len(group) - 1) / 2) * step * whole
    return moved


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Move sorted values apart to at least `gap`; those that touch share one block around their mean."""
    blocks = [[value, 1] for value in values]
    position = 0
    while position + 1 < len(blocks):
        (one, n), (two, m) = blocks[position], blocks[position + 1]
        if two - one < gap * (n + m) / 2:
            blocks[position : position + 2] = [[(one * n + two * m) / (n + m), n + m]]
            position = max(position - 1, 0)
        else:
            position += 1
    return [centre + gap * (i - (count - 1) / 2) for centre, count in blocks for i in range(count)]


def overlap(one, other) -> float:
    """Area that two boxes share, in square pixels."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(width, 0) * max(height, 0)
