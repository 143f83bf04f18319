"""Controls for JupyterLab: turn a knob and a table or figure follows. What computes is handed in as a function.

Batch runs skip the cells that use them: what a control shows at first also stands in the page.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from distill_utils.report import figures
from distill_utils.report.dashboard import is_number
from distill_utils.report.names import method_label
from distill_utils.report.style import axis_label
from distill_utils.report.tables import show_samples, show_table

WIDE = {"description_width": "7rem"}
FULL = {"width": "95%"}
LONG = {"continuous_update": False, "style": {"description_width": "initial"}, "layout": FULL}


def sample_browser(rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None) -> None:
    """Step through documents, or through those that hold a word: one row of texts side by side, in full.

    `columns` chooses and orders the texts; without it all string columns of the first row.
    """
    from ipywidgets import IntSlider, Text, interact

    if not rows:
        raise ValueError("no rows to browse: pass at least one sample")
    names = list(columns or [name for name, value in rows[0].items() if isinstance(value, str) and name != "id"])

    def draw(index: int, word: str) -> None:
        found = [row for row in rows if word.lower() in " ".join(str(row.get(name, "")) for name in names).lower()]
        slider.max = max(len(found) - 1, 0)
        if found:
            place = min(index, len(found) - 1)
            show_samples([found[place]], names, f"{place + 1} of {len(found)}.", clip=5000)
        else:
            print(f"No document holds {word!r}.")

    slider = IntSlider(min=0, max=len(rows) - 1, description="document", continuous_update=False, style=WIDE)
    search = Text(description="with the word", continuous_update=False, style=WIDE)
    interact(draw, index=slider, word=search)


def metric_picker(results: Sequence[Mapping[str, object]]) -> None:
    """Choose two quantities of the results rows and see one against the other."""
    from ipywidgets import Dropdown, interact

    columns = pd.DataFrame(list(results)).select_dtypes("number").columns
    numeric = [name for name in columns if name != "seed" and not name.endswith(("_low", "_high"))]
    if len(numeric) < 2:
        raise ValueError(f"results have {len(numeric)} numeric columns, two are needed to draw one against the other")

    def draw(x: str, y: str) -> None:
        _draw(figures.plot_quality_speed(results, x=x, y=y))

    first, second = (wanted if wanted in numeric else numeric[i] for i, wanted in enumerate(("ms_per_token", "rouge2")))
    x = Dropdown(options=numeric, value=first, description="across", style=WIDE)
    interact(draw, x=x, y=Dropdown(options=numeric, value=second, description="up", style=WIDE))


def budget_explorer(means: Sequence[Mapping[str, object]]) -> None:
    """Move a budget of time per token and see which model has the best ROUGE-2 (rows of `plot_quality_speed`)."""
    from ipywidgets import FloatSlider, interact

    x, y = "ms_per_token", "rouge2"
    timed = [row for row in means if is_number(row.get(x)) and is_number(row.get(y))]
    if not timed:
        raise ValueError(f"no row has {x} and {y}: nothing can be chosen by a budget")
    slowest, fastest = max(row[x] for row in timed), min(row[x] for row in timed)

    def draw(budget: float) -> None:
        within = [row for row in timed if row[x] <= budget]
        ax = figures.plot_quality_speed(means, x=x, y=y)
        ax.axvline(budget, color="#1c2127", lw=1.0, ls="--")
        _draw(ax)
        if within:
            best = max(within, key=lambda row: row[y])
            name = method_label(best.get("method", ""), best.get("student"))
            print(f"Best within {budget:.2f}: {name}, {axis_label(y)} {best[y]:.2f} at {best[x]:.2f}.")
        else:
            print(f"Nothing is as fast as {budget:.2f}; the fastest takes {fastest:.2f}.")

    low, high = math.floor(90 * fastest) / 100, math.ceil(105 * slowest) / 100
    interact(draw, budget=FloatSlider(min=low, max=high, value=slowest, step=0.01, description=axis_label(x), **LONG))


def decoding_playground(
    decoders: Mapping[str, Callable[..., str]], mark: Callable[[str, str, str], dict], document: str
) -> None:
    """Summarize a text of your own with several models at once, by any number of beams and length penalty.

    `decoders` write a summary of (document, num_beams=, length_penalty=), the teacher's is the first; `mark` returns
    what to set off in (document, summary, the teacher's summary), as evaluation.metrics.spans_to_mark.
    """
    from ipywidgets import FloatSlider, IntSlider, Textarea, interact_manual

    def draw(document: str, num_beams: int, length_penalty: float) -> None:
        if not document.strip():
            print("There is no text to summarize: write or paste one.")
            return
        settings = {"num_beams": num_beams} | ({"length_penalty": length_penalty} if num_beams > 1 else {})
        row = {name: decode(document, **settings) for name, decode in decoders.items()}
        first = row[next(iter(row))]
        show_samples([row | {"marks": {name: mark(document, row[name], first) for name in row}}], list(row), clip=5000)

    manual = interact_manual.options(manual_name="Summarize")
    manual(
        draw, document=Textarea(value=document, description="text", rows=6, style=WIDE, layout=FULL),
        num_beams=IntSlider(value=4, min=1, max=8, description="beams", style=WIDE),
        length_penalty=FloatSlider(value=1.0, min=0.0, max=2.0, step=0.1, description="length penalty", style=WIDE),
    )  # fmt: skip


def label_filter(table: pd.DataFrame) -> None:
    """Move the threshold of a measure of pseudo-labels and see what it removes (rows of `plot_thresholds`)."""
    from ipywidgets import FloatSlider, interact

    def drawn(before: pd.DataFrame) -> Callable[[float], None]:
        side = "low" if math.isfinite(before["low"].iloc[0]) else "high"

        def draw(threshold: float) -> None:
            own = before.assign(**{side: threshold})
            own["removed"] = ~own["value"].between(own["low"], own["high"])
            _draw(figures.plot_thresholds(own))
            print(f"{len(own) - own['removed'].sum()} of {len(own)} labels stay.")

        return draw

    for measure, own in table.groupby("measure", sort=False):
        threshold = next(filter(math.isfinite, own[["low", "high"]].iloc[0]))
        low, high = min(own["value"].min(), threshold), max(own["value"].max(), threshold)
        step = (high - low) / 100 or 0.01
        bounds = {"min": low - step, "max": high + step, "value": threshold, "step": step}
        interact(drawn(own), threshold=FloatSlider(**bounds, description=axis_label(measure), **LONG))


def layer_picker(depths: Mapping[str, int], measure: Callable[[dict[str, list[int]]], Mapping[str, object]]) -> None:
    """Choose the layers to keep in each stack; `measure` returns a row on the student that they make."""
    from ipywidgets import SelectMultiple, interact_manual

    measured: list[dict] = []

    def draw(**chosen: Sequence[int]) -> None:
        kept = {stack: sorted(ids) for stack, ids in chosen.items()}
        if not all(kept.values()):
            print("Choose at least one layer of each stack (Ctrl or Cmd adds one).")
            return
        name = " | ".join(f"{stack} {', '.join(map(str, ids))}" for stack, ids in kept.items())
        if name not in [row["layers"] for row in measured]:
            print("measuring …")
            measured.append({"layers": name, **measure(kept)})
        show_table(pd.DataFrame(measured[::-1]), "Students before any training, the last chosen first.")

    stacks = {
        stack: SelectMultiple(
            options=range(depth), value=tuple(range(depth)), rows=depth, description=f"{stack} layers", style=WIDE
        )
        for stack, depth in depths.items()
    }
    interact_manual.options(manual_name="Measure")(draw, **stacks)


def _draw(ax_or_figure) -> None:
    from IPython.display import display

    figure = ax_or_figure if hasattr(ax_or_figure, "savefig") else ax_or_figure.get_figure()
    display(figure)
    figures.plt.close(figure)
