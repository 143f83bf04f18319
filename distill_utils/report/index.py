"""What gathers all pages: the index, results.csv, history.csv and the README's tables.

Out of scope: one page (pages.py); what the index says (dashboard.py).
"""

import contextlib
import csv
import io
import json
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

from distill_utils.artifacts import REPOSITORY, read_json, write_atomic
from distill_utils.report import dashboard, names, pages

README_ROWS, INTERVAL = 12, "ROUGE-2 (95 % interval)"
README_FIGURES = {  # heading: key of a row, decimals
    "parameters (M)": ("parameters_m", 1), "ROUGE-1": ("rouge1", 2), INTERVAL: ("rouge2", 2), "ROUGE-L": ("rougeL", 2),
    "latency (ms)": ("latency_ms", 1), "ms/token": ("ms_per_token", 2), "words": ("words", 1),
}  # fmt: skip
FIRST_COLUMNS = ("report", "profile", "method", "student", "seed")
HISTORY = "date report profile commit data best figure value low high replaced before moved".split()
SHOWN_CHANGES = 12
# The types of what is read from an entry, and of what is read from its rows: see `fault_of`.
TYPES = {
    str: ("headline", "title", "question", "profile", "date"),
    dict: ("parameters", "changed", "provenance"),
    list: ("rows", "means", "versus", "claims", "cuts", "ways", "controls", "interpolated", "gap", "routes", "signals"),
}
KINDS = dict.fromkeys(("name", "method", "student", "variant", "task", "path", "model", "rival", "metric"), str)
NUMBERS = re.compile(r"(rouge\w+|share|loss|score|difference)(_low|_high)?|low|high|seeds?|steps|num_documents|speedup"
                     r"|\w+_(seconds|ms|m)|ms_per_token|words")  # fmt: skip


def gather(reports: Path) -> tuple[list[dict], list[str]]:
    """Return the entry of every page in a reports folder and its sub-folders, top folder first, and what is left out.

    Left out is a file that is damaged, or is not the results of a report: its name and the reason.
    """
    entries, skipped = [], []
    for path in [*sorted(reports.glob("*.json")), *sorted(reports.glob("*/*.json"))]:
        if path.with_suffix(".html").exists():
            try:
                entry = read_json(path)
                fault = fault_of(entry)
            except (OSError, ValueError, RecursionError) as error:
                fault = f"no readable JSON: {error}"
            name = path.relative_to(reports).with_suffix("").as_posix()
            if not fault:
                entries.append({"profile": "", **entry, "report": name})
            else:
                skipped.append(f"{name}.json: {fault}")
    return entries, skipped


def fault_of(entry: object) -> str:
    """Return why an object is not the results of a report, "" where every part that is read has its type."""
    if not isinstance(entry, dict) or "rows" not in entry:
        return "not the results of a report, which have rows"
    for kind, keys in TYPES.items():
        for key in keys:
            if not isinstance(entry.get(key, kind()), kind):
                return f"{key} is {str(entry[key])[:40]!r}"
    for name, row in [("the report", entry), *((key, row) for key in TYPES[list] for row in entry.get(key, []))]:
        if not isinstance(row, dict):
            return f"{name} has {str(row)[:40]!r}"
        for key, value in row.items():
            kind = str if name == "claims" else KINDS.get(key, object)
            is_figure = NUMBERS.fullmatch(key) and name != "claims"
            fits = dashboard.is_number(value) if is_figure else isinstance(value, kind)
            if value is not None and not fits:
                return f"{name}: {key} is {str(value)[:40]!r}"
    return ""


def write_index(reports: Path) -> None:
    """Write index.html: what to take, quality against speed, every run, the papers' claims, what changed.

    And results.csv: one line for every row of every report, lists and dictionaries as JSON.
    """
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    entries, skipped = gather(reports)
    rows = [{**row, "report": e["report"], "profile": e.get("profile", "")} for e in entries for row in e["rows"]]
    columns = dict.fromkeys([*FIRST_COLUMNS, *(name for row in rows for name in row)])
    write_atomic(reports / "results.csv", _csv_text(columns, rows))
    entries = [entry | {"means": dashboard.averaged(entry)} for entry in entries]
    folder = pages.TEMPLATES / "templates"
    facets = dashboard.facets(entries)
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    css, script = (Markup("".join((folder / name).read_text(encoding="utf-8") for name in files))
                   for files in (("page.css", "index.css"), ("index.js",)))  # fmt: skip
    page = environment.get_template("reports_index.html.j2").render(
        facets=[facet | {"drawing": dashboard.drawing(facet)} for facet in facets[: dashboard.MAX_FACETS]],
        left_out=[facet["students"][0] for facet in facets[dashboard.MAX_FACETS :]],
        runs=[e | dashboard.facts(e) | {"wall": wall_time(e), "verdict": verdict(e)} for e in entries],
        history=[line for line in read_history(reports, skipped) if line["moved"] != "0"][: -SHOWN_CHANGES - 1 : -1],
        claims=dashboard.judged_claims(entries), skipped=skipped, limits=dashboard, names=names,
        quote=quote, duration=duration, css=css, script=script,
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
    )  # fmt: skip
    write_atomic(reports / "index.html", re.sub(r"(?<=\d) %", "\u00a0%", page))  # no line break before a % sign


def verdict(entry: dict) -> str:
    """Return the first sentence of an entry's headline, as Markdown."""
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", entry.get("headline", "").partition("\n\n")[0])[0]


def append_history(reports: Path, name: str) -> None:
    """Append a line to history.csv: the figure of a report's best row, what it replaced, by how much it moved."""
    entry, path = {**read_json(reports / f"{name}.json"), "report": name}, reports / "history.csv"
    before = next((line for line in reversed(read_history(reports)) if line["report"] == name), None)
    line = {key: entry.get(key) for key in ("date", "report", "profile")} | dashboard.key_figure(entry)
    line |= {"commit": entry.get("provenance", {}).get("commit"), "data": dashboard.facts(entry)["data"]}
    line = {key: _csv_value(value) for key, value in line.items()}
    if before:
        line |= {"replaced": f"{before['date']} {before['commit']}".strip(), "before": before["value"]}
        with contextlib.suppress(ValueError, KeyError):  # one of the two has no figure
            moved = float(line["value"]) - float(before["value"])
            line["moved"] = _csv_value(moved) if line["figure"] == before["figure"] else ""
    old = path.read_bytes() if path.exists() else b""
    text = _csv_text(HISTORY, [line], heading=not old)
    write_atomic(path, old + (b"\n" if old[-1:] not in b"\n" else b"") + text.encode())


def read_history(reports: Path, skipped: list[str] | None = None) -> list[dict]:
    """Return the lines of history.csv, oldest first; none where it is missing, or damaged, which `skipped` gets."""
    try:
        with open(reports / "history.csv", newline="", encoding="utf-8") as file:
            return [{key: line.get(key) or "" for key in HISTORY} for line in csv.DictReader(file)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error) as error:
        skipped += [f"history.csv: {error}"] if skipped is not None else []
        return []


def _csv_text(columns: Sequence[str], rows: Sequence[dict], heading: bool = True) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if heading:
        writer.writeheader()
    writer.writerows({name: _csv_value(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


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

    Each is a line with the first sentence of its headline; the scores of some follow (`_scored`).
    """
    entries, _ = gather(reports)
    blocks, lines, timed = [], [], []
    for entry in entries:
        wall = wall_time(entry)
        # Those of other profiles lie in folders, and own parameters are no demo; their pages give the time.
        if wall and "/" not in entry["report"] and not entry.get("changed"):
            timed.append(f"{entry['report'].partition('_')[0]} {wall}")
        if any(row.get("student") for row in entry["rows"]):
            line = {"page": _link(entry), "profile": entry["profile"], "seeds": str(_seeds(entry))}
            lines.append(line | {"verdict": verdict(entry)})
    if lines:
        blocks.append(_markdown_table(lines))
    for entry, rows in _scored(entries):
        blocks += [f"{_basis(entry)}:", _markdown_table([_scores(row) for row in rows])]
    judged = Counter(claim["verdict"] for claim in dashboard.judged_claims(entries))
    if judged.keys() - {"not testable here"}:
        counts = ", ".join(f"{count} {verdict}" for verdict, count in judged.items())
        blocks.append(f"Claims of both papers and of published logs, judged from these pages: {counts} (in the index).")
    if timed:
        blocks.append(f"Wall time of `make reports`: {'; '.join(timed)}.")
    return "\n\n".join(blocks) + "\n" if blocks else "No report has been made yet.\n"


def _link(entry: dict) -> str:
    return f"[{entry.get('title') or entry['report']}](reports/{entry['report']}.html)"


def _basis(entry: dict) -> str:
    return f"{_link(entry)}, profile {entry['profile']}, mean of {_seeds(entry)} seed{'s' * (_seeds(entry) > 1)}"


def _scored(entries: Sequence[dict]) -> list[tuple[dict, list[dict]]]:
    """Return the entries whose scores the README shows, and these: means over seeds, or rows.

    Of a notebook's pages it is the one that carries most (`_weight`), of these the last. Left out are those of several
    tasks, without summaries, or with more than README_ROWS.
    """
    ranked = sorted(entries, key=lambda entry: (*_weight(entry), entry.get("date") or ""))
    found = []
    for entry in {entry["report"].rpartition("/")[2]: entry for entry in ranked}.values():
        rows = [row for row in entry.get("means") or entry["rows"] if row.get("rouge2") is not None]
        fits = len(rows) <= README_ROWS and not any({"task", "loss"} & row.keys() for row in rows)
        if fits and any(row.get("student") for row in rows):
            found.append((entry, rows))
    return found


def _weight(entry: dict) -> tuple:
    """Return what orders pages by how much their figures carry: no demonstration, seeds."""
    return not dashboard.facts(entry)["demo"], _seeds(entry)


def _seeds(entry: dict) -> int:
    return max((row.get("seeds") or 1 for row in dashboard.averaged(entry)), default=1)


def _scores(row: dict) -> dict[str, str]:
    """Return one line of the README's table by heading, empty where the row has no such figure."""
    line = {"method": row.get("method") or "", "student": row.get("student") or ""}
    for heading, (key, decimals) in README_FIGURES.items():
        line[heading] = "" if row.get(key) is None else f"{row[key]:.{decimals}f}"
    if None not in (row.get("rouge2_low"), row.get("rouge2_high")):
        line[INTERVAL] = names.row_with_interval(row, "rouge2")
    return line


def _markdown_table(rows: Sequence[dict[str, str]]) -> str:
    """Write rows of the same headings as a table; a column without any value is left out."""
    headings = [heading for heading in rows[0] if any(row[heading] for row in rows)]
    left = ("page", "profile", "verdict", "method", "student", "measured", "speed, relative to")
    rules = ["---" if heading in left else "---:" for heading in headings]
    lines = [headings, rules, *([row[heading].replace("|", "\\|") for heading in headings] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def benchmark_table(results: Path) -> str:
    """Return what the suites in a folder measured against a goal: a line a case, all its others beside one another."""
    found = [row for path in sorted(results.glob("*.json")) for row in read_json(path).get("rows", [])]
    found, lines = [row for row in found if row.get("ratio")], []
    cases = {row["case"]: [other for other in found if other["case"] == row["case"]] for row in found}
    for case, rows in cases.items():
        if not any(row.get("goal") or row.get("memory_goal") for row in rows):
            continue
        times = [f"{r['other']} {r['ratio']:.2f}" + (f" (goal {r['goal']:.3g})" if r.get("goal") else "") for r in rows]
        sizes = [f"{row['ours_peak_mb'] / row['other_peak_mb']:.2f}" for row in rows if row.get("other_peak_mb")]
        share = rows[0].get("ceiling_share")
        line = {"measured": case, "speed, relative to": "; ".join(times), "memory, relative": ", ".join(sizes)}
        lines.append(line | {"of the ceiling": f"{100 * share:.0f} %" if share else ""})
    return _markdown_table(lines) + "\n" if lines else "No suite has been measured yet.\n"


def readme_picture(reports: Path) -> str:
    """Draw quality_speed.svg of the report in the README that carries most, and return its caption."""
    scored = _scored(gather(reports)[0])
    if not scored:
        return "No report has been made yet.\n"
    from distill_utils.report import figures, style  # they load matplotlib

    entry, rows = max(scored, key=lambda found: _weight(found[0]))
    figures.use_style()
    write_atomic(reports / "quality_speed.svg", style.svg(figures.plot_quality_speed(rows).get_figure()))
    picture = "![ROUGE-2 of teacher and students against time per generated token](reports/quality_speed.svg)"
    return f"{picture}\n*Bars and band: 95 % intervals. {_basis(entry)}.*\n"


def update_readme(
    readme: Path = REPOSITORY / "README.md", reports: Path = REPOSITORY / "reports",
    results: Path = REPOSITORY / "benchmarks" / "results",
) -> None:  # fmt: skip
    """Write the tables of reports and of benchmarks between the README's markers, and its picture to the reports."""
    if not readme.exists():
        return
    text = readme.read_text(encoding="utf-8")
    written = readme_picture(reports), readme_table(reports), benchmark_table(results)
    for part, new in zip(("picture", "results", "benchmarks"), written, strict=True):
        start, end = f"<!-- {part}:start -->", f"<!-- {part}:end -->"
        between = re.compile(f"{start}.*?{end}", re.DOTALL)
        text = between.sub(lambda _, new=f"{start}\n\n{new}\n{end}": new, text, count=1)
    write_atomic(readme, text)
