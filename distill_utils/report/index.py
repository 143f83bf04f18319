"""What gathers all pages: the index, results.csv and the README's tables.

Out of scope: one page (pages.py).
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from distill_utils.artifacts import REPOSITORY, read_json, write_atomic
from distill_utils.report import pages

README_ROWS = 12
FIRST_COLUMNS = ("report", "profile", "method", "student", "seed")
RESULTS_START, RESULTS_END = "<!-- results:start -->", "<!-- results:end -->"
SPEED_START, SPEED_END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"


def gather(reports: Path) -> list[dict]:
    """Return the entry of every page in a reports folder and its sub-folders, top folder first."""
    paths = [*sorted(reports.glob("*.json")), *sorted(reports.glob("*/*.json"))]
    return [
        {"rows": [], **read_json(path), "report": path.relative_to(reports).with_suffix("").as_posix()}
        for path in paths
        if path.with_suffix(".html").exists()
    ]


def write_index(reports: Path) -> None:
    """Write index.html: what each report answers, its headline, when and how it was made."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    sections: dict[str, list[dict]] = {}
    for entry in gather(reports):
        changed = ", ".join(f"{name} = {value}" for name, value in entry.get("changed", {}).items())
        meta = [f"profile {entry.get('profile', '?')}", f"changed: {changed}" if changed else "", entry.get("date")]
        meta.append(wall_time(entry))
        folder, _, short = entry["report"].rpartition("/")
        sections.setdefault(folder, []).append(
            {
                "short": short,
                "title": entry.get("title") or short,
                "href": f"{entry['report']}.html",
                "question": Markup(pages.markdown_cell(entry.get("question", ""))),
                "headline": Markup(pages.markdown_output(entry.get("headline", ""))),
                "meta": " · ".join(filter(None, meta)),
            }
        )
    folder = pages.TEMPLATES / "templates"
    template = Environment(loader=FileSystemLoader(folder), autoescape=True).get_template("reports_index.html.j2")
    page = template.render(sections=sections, css=Markup((folder / "page.css").read_text()))
    write_atomic(reports / "index.html", page)


def write_csv(reports: Path) -> None:
    """Write results.csv: one line for every row of every report, lists and dictionaries as JSON."""
    entries = gather(reports)
    rows = [{**row, "report": e["report"], "profile": e.get("profile", "")} for e in entries for row in e["rows"]]
    text = io.StringIO()
    columns = dict.fromkeys([*FIRST_COLUMNS, *(name for row in rows for name in row)])
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _csv_value(value) for name, value in row.items()} for row in rows)
    write_atomic(reports / "results.csv", text.getvalue())


def _csv_value(value):
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def duration(seconds: float | None) -> str:
    """Format seconds: 8.4 s, 3 min 12 s, 2 h 05 min."""
    if seconds is None:
        return ""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def wall_time(entry: dict) -> str:
    """Return how long a report took, and what the results that it reused had taken before."""
    reused = entry.get("reused_seconds") or 0.0
    wall = duration(entry.get("wall_seconds"))
    return f"{wall}, reused results {duration(reused)}" if wall and reused >= 1 else wall


def readme_table(reports: Path) -> str:
    """Return the README's results: what the reports that train students found, and what `make reports` takes.

    Each is shown by the start of its headline and by its `means` over seeds, or its rows; above `README_ROWS` of them
    by its headline alone.
    """
    blocks, timed = [], []
    for entry in gather(reports):
        link, wall = f"reports/{entry['report']}.html", wall_time(entry)
        if wall and "/" not in entry["report"]:  # those of other profiles lie in folders; their pages give the time
            timed.append(f"{entry['report'].partition('_')[0]} {wall}")
        rows = entry.get("means") or entry["rows"]
        rows = [row for row in rows if row.get("rouge2") is not None or row.get("loss") is not None]
        grid = any({"task", "loss"} & row.keys() for row in rows)  # several tasks, or no summaries: see the page
        if any(row.get("student") for row in rows):
            seeds = max(row.get("seeds", 1) for row in rows)
            origin = [f"profile {entry['profile']}", entry.get("date"), (entry.get("provenance") or {}).get("commit")]
            origin.append(f"mean of {seeds} seeds" if seeds > 1 else None)
            title = f"**[{entry.get('title') or entry['report']}]({link})** ({', '.join(filter(None, origin))})"
            blocks.append(": ".join(filter(None, [title, entry.get("headline", "").partition("\n\n")[0]])))
            if len(rows) <= README_ROWS and not grid:
                blocks.append(_markdown_table([_scores(row) for row in rows]))
    if timed:
        blocks.append(f"Wall time of `make reports`: {'; '.join(timed)}.")
    return "\n\n".join(blocks) + "\n" if blocks else "No report has been made yet.\n"


def _scores(row: dict) -> dict[str, str]:
    """Return one line of the README's table by heading, empty where the row has no such figure."""

    def number(key: str, decimals: int) -> str:
        return "" if row.get(key) is None else f"{row[key]:.{decimals}f}"

    interval = f" [{number('rouge2_low', 2)}, {number('rouge2_high', 2)}]" if number("rouge2_low", 2) else ""
    return {
        "method": row.get("method", ""),
        "student": row.get("student") or "",
        "parameters (M)": number("parameters_m", 1),
        "ROUGE-1": number("rouge1", 2),
        "ROUGE-2 [95 % interval]": number("rouge2", 2) + interval,
        "ROUGE-L": number("rougeL", 2),
        "latency (ms)": number("latency_ms", 1),
        "ms/token": number("ms_per_token", 2),
        "words": number("words", 1),
    }


def _markdown_table(rows: Sequence[dict[str, str]]) -> str:
    """Write rows of the same headings as a table; a column without any value is left out."""
    headings = [heading for heading in rows[0] if any(row[heading] for row in rows)]
    left = ("method", "student", "report", "of which", "measured", "times faster than")
    rules = ["---" if heading in left else "---:" for heading in headings]
    lines = [headings, rules, *([row[heading] for heading in headings] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def benchmark_table(results: Path) -> str:
    """Return what the suites in a folder measured against a goal: a line a case, its others beside one another."""
    found = [row for path in sorted(results.glob("*.json")) for row in read_json(path).get("rows", [])]
    cases: dict[str, list[dict]] = {}
    for row in found:
        if row.get("ratio") and (row.get("goal") or row.get("memory_goal")):
            cases.setdefault(row["case"], []).append(row)
    lines = []
    for case, rows in cases.items():
        goals = [f" (goal {row['goal']:.3g})" if row.get("goal") else "" for row in rows]
        times = [f"{row['other']} {row['ratio']:.2f}{goal}" for row, goal in zip(rows, goals, strict=True)]
        sizes = [f"{row['ours_peak_mb'] / row['other_peak_mb']:.2f}" for row in rows if row.get("other_peak_mb")]
        share = rows[0].get("ceiling_share")
        line = {"measured": case, "times faster than": "; ".join(times), "memory, of theirs": ", ".join(sizes)}
        lines.append(line | {"of the ceiling": f"{100 * share:.0f} %" if share else ""})
    return _markdown_table(lines) + "\n" if lines else "No suite has been measured yet.\n"


def update_readme(
    readme: Path = REPOSITORY / "README.md", reports: Path = REPOSITORY / "reports",
    results: Path = REPOSITORY / "benchmarks" / "results",
) -> None:  # fmt: skip
    """Write the tables of reports and of benchmarks between the README's markers, where it has them."""
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    parts = ((RESULTS_START, RESULTS_END, readme_table(reports)), (SPEED_START, SPEED_END, benchmark_table(results)))
    new = text
    for start, end, table in parts:
        before, found, rest = new.partition(start)
        _, closed, after = rest.partition(end)
        new = f"{before}{start}\n\n{table}\n{end}{after}" if found and closed else new
    if new:
        write_atomic(readme, new)
