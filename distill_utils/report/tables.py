"""Tables and samples of texts, as pages show them: captions, fixed decimals, everything escaped.

Out of scope: figures (figures.py) and controls (widgets.py).
"""

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from html import escape

import pandas as pd

from distill_utils.report.names import method_label, run_label
from distill_utils.report.style import heading

DECIMALS = {"rouge": 2, "parameters": 1, "ms_per_token": 2, "latency": 1, "words": 1, "_seconds": 1, "ms/step": 1,
            "speedup": 2, "p_value": 3}  # fmt: skip
LOOP = re.compile(r"(?<!\S)(\S+(?: \S+){0,3}?)(?: \1){3,}(?!\S)")  # one to four words, four times or more


def show_table(
    frame: pd.DataFrame, caption: str, best_high: Sequence[str] = (), best_low: Sequence[str] = (),
    decimals: Mapping[str, int] | None = None, best_among: Sequence[str] = (),
) -> None:  # fmt: skip
    """Display a table: first column as row heading, numbers right-aligned with fixed decimals, all text escaped.

    The best value is bold in the columns of `best_high` (highest) and `best_low` (lowest), sought among all rows or
    those whose heading is in `best_among` (the students). `decimals` overrides a column's usual number of decimals.
    Names of results keys get readable headings, runs their printed names; of "9.09 (8.00 to 10.26)" the first counts.
    """
    from IPython.display import HTML, display

    decimals = decimals or {}
    for name in (*best_high, *best_low, *decimals):
        if name not in frame.columns:
            raise ValueError(f"no column {name!r}; columns are {list(frame.columns)}")
    first = escape(heading(str(frame.columns[0])))  # pandas does not escape this one
    table = frame.set_index(frame.columns[0])
    # The name of the row headings goes where pandas writes the columns' name: one header row, no empty corner.
    table = table.rename_axis(index=None, columns=first)
    if not table.index.is_unique or not table.columns.is_unique:
        raise ValueError(f"the first column {first!r} must be unique to serve as row heading")
    digits = {name: decimals.get(name, _usual_decimals(str(name))) for name in table.select_dtypes("floating").columns}
    formats = {name: f"{{:,.{count}f}}" for name, count in digits.items()}
    formats |= dict.fromkeys(table.select_dtypes("integer").columns, "{:,}")
    competing = table.index.isin(list(best_among)) if best_among else [True] * len(table)
    table = table.rename(index=run_label)
    styler = table.style.format(formats, escape="html", na_rep="–").format_index(escape="html", axis=0)
    styler = styler.format_index(lambda name: escape(heading(str(name))), axis=1)
    left = [{"selector": "", "props": [("text-align", "left")]}]
    texts = {name: left for name in table.columns if not pd.api.types.is_numeric_dtype(table[name])}
    styler = styler.set_table_styles(texts, overwrite=False)
    for names, extreme in ((best_high, "max"), (best_low, "min")):
        for name in names:
            # Ties as printed are all best: compare what is shown.
            values = table[name].map(lambda value: value.partition(" (")[0] if isinstance(value, str) else value)
            rounded = pd.to_numeric(values).round(digits.get(name, 9)).where(competing)
            best = rounded == getattr(rounded, extreme)()
            styler = styler.apply(lambda _, best=best: ["font-weight: bold" if b else "" for b in best], subset=[name])
    styler = styler.set_caption(escape(caption)).set_table_attributes('class="dataframe"')
    # Same table, same bytes: the id is derived, not drawn.
    styler = styler.set_uuid(hashlib.sha256(caption.encode()).hexdigest()[:8])
    display(HTML(styler.to_html()))


def _usual_decimals(column: str) -> int:
    name = column.lower().replace("-", "").replace(" ", "_")
    return next((count for part, count in DECIMALS.items() if part in name), 2)


def show_samples(
    rows: Sequence[Mapping[str, object]], columns: Sequence[str], caption: str = "", clip: int = 400,
    shown: bool = True,
) -> None:  # fmt: skip
    """Display texts side by side, one row a document; escaped, clipped after `clip` characters.

    Of up to four words that a broken model repeats without end the first are shown, and how often: "given … (×37)".
    A row's `marks`, {column: {"unsupported" or "differs": [(start, end)]}}, are set off. `shown=False` leaves all out.
    """
    from IPython.display import HTML, display

    if not shown:
        print(f"{len(rows)} texts are left out of this page: samples=false.")
        return

    labels = [escape(method_label(str(name)), quote=True) for name in columns]
    head, body = "".join(f'<th scope="col">{label}</th>' for label in labels), ""
    for row in rows:
        texts = [_marked(str(row.get(name, "")), row.get("marks", {}).get(name, {}), clip) for name in columns]
        cells = zip(labels, texts, strict=True)  # a phone shows them one below the other, each with its label
        body += "<tr>" + "".join(f'<td data-label="{label}">{text}</td>' for label, text in cells) + "</tr>"
    if any(row.get("marks") for row in rows):
        caption += " Bold: words that the teacher's text lacks. Marked: numbers and names that the document lacks."
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    # Jupyter right-aligns table cells by default.
    style = "<style>table.samples td, table.samples th { text-align: left !important; vertical-align: top; }</style>"
    table = f'<table class="samples">{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    display(HTML(style + table))


def _marked(text: str, marks: Mapping[str, Sequence[tuple[int, int]]], clip: int) -> str:
    """Return a text as HTML: loops folded, clipped, and its marks set off where no loop moved them."""
    folded = LOOP.sub(lambda loop: f"{loop[1]} … (×{(len(loop[0]) + 1) // (len(loop[1]) + 1)})", text)
    ending = " …" if len(folded) > clip else ""
    folded = folded[:clip].rstrip() if ending else folded
    if not text.startswith(folded):
        return escape(folded + ending)
    html, edges = "", sorted({0, len(folded), *(min(place, len(folded)) for spans in marks.values()
                                                for span in spans for place in span)})  # fmt: skip
    for start, end in itertools.pairwise(edges):
        part = escape(folded[start:end])
        for kind, tag in (("differs", "b"), ("unsupported", "mark")):
            if any(first <= start < last for first, last in marks.get(kind, ())):
                part = f"<{tag}>{part}</{tag}>"
        html += part
    return html + ending
