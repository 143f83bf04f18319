"""Widgets for JupyterLab; batch runs skip the cells that use them.

Out of scope: anything a report shows. A view that matters is drawn without widgets first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from ipywidgets import Dropdown, IntSlider, interact

from distill_utils.report import figures, tables

WIDE = {"description_width": "7rem"}


def sample_browser(rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None) -> None:
    """Step through documents with a slider: one row of texts side by side, in full.

    `columns` chooses and orders the texts; without it all string columns of the first row.
    """
    if not rows:
        raise ValueError("no rows to browse: pass at least one sample")
    names = list(columns or [name for name, value in rows[0].items() if isinstance(value, str) and name != "id"])

    def show_row(index: int) -> None:
        tables.show_samples([rows[index]], names, clip=5000)

    slider = IntSlider(min=0, max=len(rows) - 1, description="document", continuous_update=False, style=WIDE)
    interact(show_row, index=slider)


def metric_picker(results: Sequence[Mapping[str, object]]) -> None:
    """Choose two quantities of the results rows and see one against the other."""
    columns = pd.DataFrame(list(results)).select_dtypes("number").columns
    numeric = [name for name in columns if name != "seed" and not name.endswith(("_low", "_high"))]
    if len(numeric) < 2:
        raise ValueError(f"results have {len(numeric)} numeric columns, two are needed to draw one against the other")

    def draw(x: str, y: str) -> None:
        from IPython.display import display

        ax = figures.plot_quality_speed(results, x=x, y=y)
        display(ax.get_figure())
        figures.plt.close(ax.get_figure())

    def choice(name: str, wanted: str, other: int) -> Dropdown:
        value = wanted if wanted in numeric else numeric[other]
        return Dropdown(options=numeric, value=value, description=name, style=WIDE)

    interact(draw, x=choice("across", "ms_per_token", 0), y=choice("up", "rouge2", 1))
