"""Report pages: an executed notebook as one offline HTML file, the index, results.csv and the README's tables.

Not here: running notebooks (batch.py) and drawing (plotting.py).
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote, urlsplit

from distill_utils.artifacts import REPOSITORY, read_json, runs_dir, write_atomic, write_json

MAX_PAGE_BYTES = 2_000_000
TEMPLATES = Path(__file__).resolve().parent
NO_ALT = "No description has been provided for this image"  # what nbconvert writes when alt is missing
FIRST_COLUMNS = ("report", "profile", "method", "student", "seed")
RESULTS_START, RESULTS_END = "<!-- results:start -->", "<!-- results:end -->"


class PageError(Exception):
    """A page that must not be published, with the reason in one line."""


# --------------------------------------------------------------------------------------------------------- scrubbing


def scrubber(notebooks: Path) -> Callable[[str], str]:
    """Return a function that takes this machine's folders out of a text."""
    named = [(runs_dir(), "runs"), (notebooks, "notebooks"), (Path(sys.prefix), ".venv"), (Path.home(), "~")]
    named += [(path.resolve(), name) for path, name in named]
    rules = []
    for path, name in sorted(named, key=lambda pair: -len(str(pair[0]))):
        if len(path.parts) > 1:  # a home of "/" would match everything
            rules.append((re.compile(rf"(?<![\w.~-]){re.escape(str(path))}(?![\w-])"), name))
    repository = re.escape(str(REPOSITORY))
    inside = [(re.compile(rf"(?<![\w.~-]){repository}/"), ""), (re.compile(rf"(?<![\w.~-]){repository}(?![\w-])"), ".")]
    general = [
        (re.compile(r"(?<!\w)/[^\s'\"<>:]*/(?:ipykernel_\d+)/\d+\.py"), "cell"),
        (re.compile(r"(?<!\w)/[^\s'\"<>:]*/(?=site-packages/)"), ""),
    ]
    # Longest path first: runs/ and notebooks/ may lie in the repository, and the repository in the home folder.
    rules = general + [rule for rule in rules if rule[1] != "~"] + inside + [rule for rule in rules if rule[1] == "~"]

    def scrub(text: str) -> str:
        for pattern, name in rules:
            text = pattern.sub(name, text)
        return text

    return scrub


def scrub_all(value, scrub: Callable[[str], str]):
    """Apply `scrub` to every string of nested lists and dictionaries; pictures' bytes are left alone."""
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, dict):
        return {k: v if k in ("image/png", "image/jpeg") else scrub_all(v, scrub) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [scrub_all(item, scrub) for item in value]
    return value


# --------------------------------------------------------------------------------------------------------- one page


def tex_to_mathml(tex: str, display: str = "inline") -> str:
    """Convert TeX to MathML; what the converter does not know is shown as TeX in a code element."""
    from html import escape

    from latex2mathml.converter import convert

    try:
        mathml = convert(re.sub(r"\{aligned\}", "{split}", tex.strip()), display=display)
    except Exception:  # the converter raises many kinds for broken TeX
        mathml = "\\"
    if "\\" in mathml or "<mi>&</mi>" in mathml:  # an unknown command or alignment mark was passed through
        return f"<code>{escape(tex)}</code>"
    return mathml


def markdown_cell(source: str) -> str:
    """Render the Markdown of a notebook cell: HTML allowed, $...$ becomes MathML."""
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def block_math(self, body):
            return tex_to_mathml(body, "block")

        def inline_math(self, body):
            return tex_to_mathml(body)

        def latex_environment(self, name, body):
            return tex_to_mathml(f"\\begin{{{name}}}{body}\\end{{{name}}}", "block")

    return MarkdownWithMath(renderer=Renderer(escape=False, exclude_anchor_links=True)).render(source)


def markdown_output(source: str) -> str:
    """Render Markdown that code wrote: HTML is escaped and dollar signs stay, since model text may be in it."""
    import mistune

    return str(mistune.create_markdown(escape=True, plugins=["table", "strikethrough"])(source))


def image_alt(output: dict, mime: str) -> str:
    """Return the alternative text that `plotting.show` stored with a picture."""
    metadata = output.get("metadata", {})
    return metadata.get(mime, {}).get("alt") or metadata.get("alt") or NO_ALT


def title_and_question(notebook) -> tuple[str, str]:
    """Return the first heading and the first block quote of a notebook (its question), as plain Markdown."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    heading = re.search(r"^# +(.+?)\s*#*$", text, re.MULTILINE)
    quoted = re.search(r"(?:^>.*\n?)+", text, re.MULTILINE)
    question = re.sub(r"^> ?", "", quoted.group(0), flags=re.MULTILINE).strip() if quoted else ""
    return (re.sub(r"[*`]", "", heading.group(1)) if heading else ""), question


def export_page(notebook, report: dict) -> tuple[str, list[str]]:
    """Render an executed notebook as one HTML page that loads nothing.

    `report` gives `name` (path below the reports folder, no suffix), `title`, `root` (path back to the reports
    folder), `facts` (name and value pairs) and `parameters` (rows of name, value, default, help, changed) for the
    footer. Returns the page and warnings for the author. Cell tags: hide-input folds the code, remove-input,
    remove-output and remove-cell leave parts out.
    """
    from bs4 import BeautifulSoup
    from nbconvert.exporters import HTMLExporter
    from traitlets.config import Config

    config = Config()
    config.TagRemovePreprocessor.enabled = True
    config.TagRemovePreprocessor.remove_cell_tags = {"remove-cell"}
    config.TagRemovePreprocessor.remove_input_tags = {"remove-input"}
    config.TagRemovePreprocessor.remove_all_outputs_tags = {"remove-output"}
    config.NbConvertBase.display_data_priority = [
        "application/vnd.jupyter.widget-view+json",
        "text/html",
        "text/markdown",
        "image/svg+xml",
        "image/png",
        "image/jpeg",
        "text/latex",
        "text/plain",
    ]
    exporter = HTMLExporter(
        config=config,
        template_name="report_template",
        extra_template_basedirs=[str(TEMPLATES)],
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    exporter.register_preprocessor("nbconvert.preprocessors.TagRemovePreprocessor", enabled=True)
    exporter.register_preprocessor("nbconvert.preprocessors.CoalesceStreamsPreprocessor", enabled=True)
    exporter.register_filter("markdown_cell", markdown_cell)
    exporter.register_filter("markdown_output", markdown_output)
    exporter.register_filter("image_alt", image_alt)
    html, _ = exporter.from_notebook_node(notebook, resources={"report": report, "metadata": {"name": report["name"]}})
    soup = BeautifulSoup(html, "html.parser")
    warnings = _drop_active_content(soup)
    _tidy_headings(soup, report["title"])
    warnings += _describe_images(soup)
    _frame_tables(soup)
    _rewrite_links(soup, report)
    _write_contents(soup)
    return str(soup), warnings


def _drop_active_content(soup) -> list[str]:
    """Remove what runs or loads anything; the page's content policy forbids it too."""
    warnings = []
    for tag in soup.select("script, link, iframe, object, embed, base, form, video, audio"):
        tag.decompose()
    for tag in soup.select("style[scoped]"):  # pandas writes one with each frame; browsers apply it to the whole page
        tag.decompose()
    for tag in soup.select("[src], [srcset], [background]"):
        if tag.name != "img" or not tag.get("src", "").startswith("data:"):
            warnings.append(f"left out {tag.name} {tag.get('src', '')[:80]!r}: a page holds its pictures itself")
            tag.decompose()
    for tag in soup.find_all(True):
        for name in [name for name in tag.attrs if name.startswith("on")]:
            del tag[name]
    for link in soup.select("a[href]"):
        if urlsplit(link["href"]).scheme not in ("", "http", "https", "mailto"):
            del link["href"]
    return warnings


def _tidy_headings(soup, title: str) -> None:
    """Leave one h1 and give every heading an id of its own."""
    main = soup.find("main")
    for extra in main.find_all("h1")[1:]:
        extra.name = "h2"
    if not main.find("h1"):
        heading = soup.new_tag("h1")
        heading.string = title
        main.insert(0, heading)
    taken = {tag["id"] for tag in soup.select("[id]") if not re.fullmatch(r"h[1-6]", tag.name)}
    for heading in main.find_all(re.compile(r"^h[1-6]$")):
        base = re.sub(r"\s+", "-", heading.get_text().strip()) or "section"  # the ids JupyterLab gives
        name, number = base, 2
        while name in taken:
            name, number = f"{base}-{number}", number + 1
        heading["id"] = name
        taken.add(name)


def _describe_images(soup) -> list[str]:
    """Join pictures with their captions, and see that each has an alternative text."""
    warnings = []
    for caption in soup.select(".figcaption"):
        area = caption.find_parent(class_="jp-OutputArea")
        image = caption.find_previous("img")
        if area is None or image is None or area not in image.parents or image.find_parent("figure"):
            continue
        figure = image.parent.wrap(soup.new_tag("figure"))
        image.parent.unwrap()
        caption.name, caption.attrs = "figcaption", {}
        figure.append(caption.extract())
    for picture in [*soup.find_all("img"), *soup.find_all("svg")]:
        name = "alt" if picture.name == "img" else "aria-label"
        if picture.find_parent("svg") or (picture.get(name) and picture[name] != NO_ALT):
            continue
        caption = picture.find_parent("figure") and picture.find_parent("figure").find("figcaption")
        heading = picture.find_previous(re.compile(r"^h[1-6]$"))
        section = heading.get_text().strip() if heading else "this page"
        picture[name] = caption.get_text().strip() if caption else f"Picture in the section {section}"
        if picture.name == "svg":
            picture["role"] = "img"
        warnings.append(f"a picture in {section!r} has no alternative text: use plotting.show(figure, alt, caption)")
    return warnings


def _frame_tables(soup) -> None:
    """Let wide tables and long code scroll by keyboard too; an empty corner is no heading."""
    for table in soup.find_all("table"):
        for attribute in ("border", "width", "style"):
            table.attrs.pop(attribute, None)
        for cell in table.select("thead th"):
            if not cell.get_text(strip=True):
                cell.name = "td"
        texts = [cell.get_text() for cell in table.select("th, td")]
        if max(map(len, texts), default=0) <= 32:  # no line breaks inside short cells
            table["class"] = [*table.get("class", []), "compact"]
        caption = table.find("caption")
        label = (caption.get_text(" ", strip=True) if caption else "") or "table"
        table.wrap(
            soup.new_tag("div", attrs={"class": "table", "tabindex": "0", "role": "region", "aria-label": label})
        )
    for block in soup.find_all("pre"):
        lines = block.get_text().splitlines()
        if len(lines) > 24 or any(len(line) > 88 for line in lines):
            block["tabindex"] = "0"


def _rewrite_links(soup, report: dict) -> None:
    """Point links to notebooks at their pages, and links out of notebooks/ at the same place from the page."""
    for link in soup.select("main a[href]"):
        parts = urlsplit(link["href"])
        if parts.scheme or not parts.path:
            continue
        if parts.path.endswith(".ipynb") and "/" not in parts.path:
            page = parts.path.removesuffix(".ipynb") + ".html"
            beside = report.get("folder") and (Path(report["folder"]) / page).exists()
            link["href"] = (page if beside else report["root"] + page) + (
                f"#{parts.fragment}" if parts.fragment else ""
            )
        elif parts.path.startswith("../"):
            link["href"] = report["root"] + link["href"]


def _write_contents(soup) -> None:
    """Fill the contents list from the headings of Markdown cells and the footer."""
    contents = soup.find(id="contents")
    top = soup.new_tag("ul")
    current = None
    for heading in soup.find("main").find_all(["h2", "h3"]):
        if heading.find_parent(class_="jp-OutputArea"):
            continue
        link = soup.new_tag("a", href="#" + quote(heading["id"], safe="/:;=@!$&'()*+,~"))
        link.append(heading.get_text().strip())
        item = soup.new_tag("li")
        item.append(link)
        if heading.name == "h2" or current is None:
            top.append(item)
            current = item if heading.name == "h2" else current
        else:
            inner = current.find("ul") or current.append(soup.new_tag("ul")) or current.find("ul")
            inner.append(item)
    contents.append(top)


def write_page(reports: Path, name: str, html: str, entry: dict) -> Path:
    """Write a page and, beside it, what the index and results.csv need; refuse a page above the limit."""
    size = len(html.encode())
    if size > MAX_PAGE_BYTES:
        raise PageError(
            f"{name}.html would be {size / 1e6:.1f} MB, the limit is {MAX_PAGE_BYTES / 1e6:.0f} MB: "
            "print less, or draw figures with many marks as PNG (plotting.show does)"
        )
    page = reports / f"{name}.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(page, html)
    write_json(page.with_suffix(".json"), _finite(entry))
    return page


def _finite(value):
    """Replace NaN and infinities by None, so that every JSON reader can parse the file."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


# ------------------------------------------------------------------------------------------------- index and tables


def gather(reports: Path) -> list[dict]:
    """Return the entry of every page in a reports folder and its sub-folders, top folder first."""
    entries = []
    for path in [*sorted(Path(reports).glob("*.json")), *sorted(Path(reports).glob("*/*.json"))]:
        if path.with_suffix(".html").exists():
            report = path.relative_to(reports).with_suffix("").as_posix()
            entries.append({"rows": [], **read_json(path), "report": report})
    return entries


def write_index(reports: Path) -> None:
    """Write index.html: what each report answers, its headline, when and how it was made."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    sections: dict[str, dict] = {}
    for entry in gather(reports):
        folder, _, short = entry["report"].rpartition("/")
        title = "Further runs: " + folder if folder else "Notebooks at their default settings"
        note = f"Same notebooks, other settings, kept in {folder}/." if folder else ""
        section = sections.setdefault(folder, {"id": f"runs-{folder or 'default'}", "title": title, "note": note})
        meta = [f"profile {entry.get('profile', '?')}"]
        if entry.get("changed"):
            meta.append("changed: " + ", ".join(f"{name} = {value}" for name, value in entry["changed"].items()))
        meta += [text for text in (entry.get("date"), duration(entry.get("wall_seconds"))) if text]
        section.setdefault("reports", []).append(
            {
                "short": short,
                "title": entry.get("title") or short,
                "href": f"{entry['report']}.html",
                "question": Markup(markdown_cell(entry.get("question", ""))),
                "headline": Markup(markdown_output(entry.get("headline", ""))),
                "meta": meta,
            }
        )
    folder = TEMPLATES / "report_template"
    template = Environment(loader=FileSystemLoader(folder), autoescape=True).get_template("reports_index.html.j2")
    page = template.render(sections=list(sections.values()), css=Markup((folder / "page.css").read_text()))
    write_atomic(Path(reports) / "index.html", page)


def write_csv(reports: Path) -> None:
    """Write results.csv: one line for every row of every report, lists and dictionaries as JSON."""
    rows = []
    for entry in gather(reports):
        for row in entry["rows"]:
            rows.append({**row, "report": entry["report"], "profile": entry.get("profile", "")})
    columns = [*FIRST_COLUMNS, *dict.fromkeys(name for row in rows for name in row if name not in FIRST_COLUMNS)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_csv_value(row.get(name)) for name in columns] for row in rows)
    write_atomic(Path(reports) / "results.csv", text.getvalue())


def _csv_value(value):
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def duration(seconds: float | None) -> str:
    """Format seconds for readers: 8.4 s, 3 min 12 s, 2 h 05 min."""
    if seconds is None:
        return ""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def readme_table(reports: Path) -> str:
    """Return the README's results: scores of the reports that train students, and the wall time of every notebook.

    Rows of one method and student that differ only in the seed become their mean.
    """
    entries = gather(reports)
    scored = [entry for entry in entries if any(row.get("rouge2") is not None for row in entry["rows"])]
    trained = [entry for entry in scored if any(row.get("student") for row in entry["rows"])]
    blocks = []
    for entry in trained or scored:
        rows, seeds = _mean_over_seeds([row for row in entry["rows"] if row.get("rouge2") is not None])
        commit = (entry.get("provenance") or {}).get("commit")
        origin = ", ".join(text for text in (f"profile {entry.get('profile')}", entry.get("date"), commit) if text)
        note = f"; mean of {seeds} seeds, intervals averaged" if seeds > 1 else ""
        columns = [
            ("method", lambda row: row.get("method", "")),
            ("student", lambda row: row.get("student") or ""),
            ("parameters (M)", lambda row: _number(row.get("parameters_m"), 1)),
            ("ROUGE-1", lambda row: _number(row.get("rouge1"), 2)),
            ("ROUGE-2 [95 % interval]", _rouge2),
            ("ROUGE-L", lambda row: _number(row.get("rougeL"), 2)),
            ("latency (ms)", lambda row: _number(row.get("latency_ms"), 1)),
            ("ms/token", lambda row: _number(row.get("ms_per_token"), 2)),
            ("words", lambda row: _number(row.get("words"), 1)),
        ]
        title = entry.get("title") or entry["report"]
        blocks.append(
            f"**[{_pipe(title)}](reports/{entry['report']}.html)** ({origin}{note})\n\n{_markdown_table(columns, rows)}"
        )
    timed = [
        {
            "report": f"[{entry['report']}](reports/{entry['report']}.html)",
            "wall": duration(entry["wall_seconds"]),
            "parts": ", ".join(f"{name} {duration(value)}" for name, value in (entry.get("seconds") or {}).items()),
        }
        for entry in entries
        if entry.get("wall_seconds") is not None
    ]
    if timed:
        columns = [("report", lambda row: row["report"]), ("wall time", lambda row: row["wall"])]
        blocks.append(_markdown_table([*columns, ("of which", lambda row: row["parts"])], timed))
    return "\n\n".join(blocks) + "\n" if blocks else "No report has been made yet.\n"


def _mean_over_seeds(rows: Sequence[dict]) -> tuple[list[dict], int]:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row.get("method"), row.get("student")), []).append(row)
    means, most = [], 1
    for group in groups.values():
        if len({row.get("seed") for row in group}) < len(group):  # not seeds of one thing: keep them apart
            means.extend(group)
            continue
        most = max(most, len(group))
        mean = dict(group[0])
        for name in mean:
            values = [row.get(name) for row in group]
            if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
                mean[name] = sum(values) / len(values)
        means.append(mean)
    return means, most


def _number(value, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) and math.isfinite(value) else ""


def _rouge2(row: dict) -> str:
    low, high = _number(row.get("rouge2_low"), 2), _number(row.get("rouge2_high"), 2)
    return _number(row["rouge2"], 2) + (f" [{low}, {high}]" if low and high else "")


def _pipe(value) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _markdown_table(columns, rows) -> str:
    """Columns are (heading, function of a row); a column without any value is left out."""
    cells = [(heading, [_pipe(value(row)) for row in rows]) for heading, value in columns]
    cells = [(heading, values) for heading, values in cells if any(values)]
    left = ("method", "student", "report", "of which")
    lines = ["| " + " | ".join(heading for heading, _ in cells) + " |"]
    lines.append("| " + " | ".join("---" if heading in left else "---:" for heading, _ in cells) + " |")
    lines += ["| " + " | ".join(values[index] for _, values in cells) + " |" for index in range(len(rows))]
    return "\n".join(lines)


def update_readme(readme: Path = REPOSITORY / "README.md", reports: Path = REPOSITORY / "reports") -> bool:
    """Write the results tables between the README's two markers; return whether it has them."""
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    before, start, rest = text.partition(RESULTS_START)
    _, end, after = rest.partition(RESULTS_END)
    if not (start and end):
        return False
    updated = f"{before}{start}\n\n{readme_table(reports)}\n{end}{after}"
    if updated != text:
        write_atomic(readme, updated)
    return True
