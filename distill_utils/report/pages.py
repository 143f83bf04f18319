"""Report pages: an executed notebook as one offline HTML file.

Out of scope: running notebooks (batch.py), drawing (figures.py), what gathers all pages (index.py).
"""

import base64
import itertools
import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from html import escape
from pathlib import Path
from urllib.parse import quote, urlsplit

from distill_utils.artifacts import REPOSITORY, runs_dir

TEMPLATES = Path(__file__).resolve().parent
HEADINGS = re.compile(r"^h[1-6]$")
READ_ON = """<p class="note">The sections below give the evidence, figure by figure; the code of each step is
folded. <a href="#contents">Contents</a>, <a href="#cite">how to cite, and the results as a file</a>.</p>"""


# ---------------------------------------------------------------------------------------------------------- cleaning


def scrubber(notebooks: Path) -> Callable[[str], str]:
    """Return a function that takes this machine's folders out of a text."""
    named = [(runs_dir(), "runs"), (notebooks, "notebooks"), (Path(sys.prefix), ".venv"), (REPOSITORY, ".")]
    named.append((Path.home(), "~"))
    places = {str(path): name for folder, name in named for path in (folder.absolute(), folder.resolve())}
    places.pop("/", None)  # a home of "/" would match everything
    rules = [(r"(?<!\w)/[^\s'\"<>:]*/ipykernel_\d+/\d+\.py", "cell"), (r"(?<!\w)/[^\s'\"<>:]*/(?=site-packages/)", "")]
    # Longest path first: runs/ and notebooks/ may lie in the repository, and the repository in the home folder.
    for path in sorted(places, key=len, reverse=True):
        rules.append((rf"(?<![\w.~-]){re.escape(path)}(?![\w-])", places[path]))

    def scrub(text: str) -> str:
        for pattern, name in rules:
            text = re.sub(pattern, name, text)
        return text

    return scrub


def cleaned(value, scrub: Callable[[str], str]):
    """Scrub every string of nested lists and dictionaries, except pictures, and turn NaN and infinities into None."""
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, float):  # so that every JSON reader can parse what is saved beside the page
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: v if k in ("image/png", "image/jpeg") else cleaned(v, scrub) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [cleaned(item, scrub) for item in value]
    return value


# --------------------------------------------------------------------------------------------------------- one page


def tex_to_mathml(tex: str, display: str = "inline") -> str:
    """Convert TeX to MathML; what the converter does not know is shown as TeX in a code element."""
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


def title_and_question(notebook) -> tuple[str, str]:
    """Return the first heading and the first block quote of a notebook (its question), as plain Markdown."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    heading = re.search(r"^# +(.+?)\s*#*$", text, re.MULTILINE)
    quoted = re.search(r"(?:^>.*\n?)+", text, re.MULTILINE)
    question = re.sub(r"^> ?", "", quoted.group(0), flags=re.MULTILINE).strip() if quoted else ""
    return (re.sub(r"[*`]", "", heading.group(1)) if heading else ""), question


def code_label(notebook) -> Callable:
    """Return a function that names what a cell does, for the line that its folded code opens by.

    That is its first line where it is a comment, else what the cell calls of this project, else its first line.
    """
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    lines = re.findall(r"^from distill_utils[\w.]* import ([\w, ]+)$", text, re.MULTILINE)
    names = [name.split(" as ")[-1].strip() for line in lines for name in line.split(",")]
    names = "|".join(["run", *(name for name in names if not name.startswith("show_"))])
    called = re.compile(rf"(?<![\w.])(?:(?:{names})\.)?((?<=\.)(?!show|use_|start_|lap)[a-z]\w+|(?:{names}))(?=\()")

    def label(cell) -> str:
        tags, first = cell.metadata.get("tags", []), cell.source.partition("\n")[0]
        if "injected-parameters" in tags:
            return "Parameters changed for this run: " + ", ".join(re.findall(r"^(\w+) =", cell.source, re.MULTILINE))
        if "parameters" in tags:
            return "Parameters"
        calls = list(dict.fromkeys(called.findall(cell.source)))
        if first.startswith("#") or not calls:
            return "Code: " + ("imports" if re.match("import |from ", first) else re.sub("^#+ *| = .*", "", first)[:60])
        return f"Code: {', '.join(calls[:3])}{' …' * (len(calls) > 3)}"

    return label


def export_page(notebook, report: dict) -> tuple[str, list[str]]:
    """Render an executed notebook as one HTML page that loads nothing; return it and warnings for the author.

    `report` gives `title`, `folder` (of the page), `root` (path back to the reports folder), `facts` (name and value
    pairs for the footer) and `results` (name and text of the file to download). Code and tables are folded. Cell tags:
    below the title stand the output of `verdict` and, after its first part, the first figure of `answer`; `fold` on a
    heading's cell folds its section; remove-cell leaves a cell out.
    """
    from bs4 import BeautifulSoup
    from nbconvert.exporters import HTMLExporter
    from traitlets.config import Config

    removed = {"enabled": True, "remove_cell_tags": {"remove-cell"}}
    filters = {"markdown_cell": markdown_cell, "markdown_output": markdown_output, "code_label": code_label(notebook)}
    exporter = HTMLExporter(
        config=Config(TagRemovePreprocessor=removed, CoalesceStreamsPreprocessor={"enabled": True}),
        template_name="templates",
        extra_template_basedirs=[str(TEMPLATES)],
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        filters=filters,
    )
    html, _ = exporter.from_notebook_node(notebook, resources={"report": report})
    soup = BeautifulSoup(html, "html.parser")
    warnings = _drop_active_content(soup) + [note.get_text(" ", strip=True) for note in soup.select(".failed")]
    _number_headings(soup)
    warnings += _describe_images(soup)
    _lift_answer(soup)
    _frame_tables(soup)
    _frame_code(soup)
    _rewrite_links(soup, report)
    _write_contents(soup)
    _fold_sections(soup)
    name, text = report["results"]
    link = soup.find(id="results")  # filled last: no other link may hold data
    link.attrs |= {"download": name, "href": f"data:application/json;base64,{base64.b64encode(text.encode()).decode()}"}
    return str(soup), warnings


def _drop_active_content(soup) -> list[str]:
    """Remove what runs or loads anything; the page's content policy forbids it too."""
    warnings = []
    # pandas writes a scoped style with each frame, and browsers apply it to the whole page
    for tag in soup.select("script, link, iframe, object, embed, base, form, video, audio, style[scoped]"):
        tag.decompose()
    for tag in soup.select("[src], [srcset], [background]"):
        if tag.name != "img" or not tag.get("src", "").startswith("data:"):
            warnings.append(f"left out {tag.name} {tag.get('src', '')[:80]!r}: a page holds its pictures itself")
            tag.decompose()
    for tag in soup.find_all(True):
        tag.attrs = {name: value for name, value in tag.attrs.items() if not name.startswith("on")}
    for link in soup.select("a[href]"):
        if urlsplit(link["href"]).scheme not in ("", "http", "https", "mailto"):
            del link["href"]
    return warnings


def _lift_answer(soup) -> None:
    """Move the output of `verdict` below title and question, and the first figure of `answer` below its first part.

    Their code stays, with a link to the top.
    """
    title, output = soup.select_one("main > .prose"), soup.select_one(".celltag_verdict .jp-OutputArea")
    if not (title and output):
        return
    verdict = soup.new_tag("section", attrs={"class": "verdict", "aria-label": "Verdict", "id": "in-short"})
    figure = soup.select_one(".celltag_answer :is(figure, .failed)")
    for part, name in ((output, "verdict"), (figure, "figure")):
        if part:
            part.insert_before(_tag(soup, f'<p class="note"><a href="#in-short">This {name} is at the top.</a></p>'))
    verdict.append(output.extract())
    if figure:
        output.find(class_="jp-OutputArea-child").insert_after(figure.extract())
    title.insert_after(verdict, _tag(soup, READ_ON))


def _tag(soup, html: str):
    return type(soup)(html, "html.parser").contents[0].extract()


def _number_headings(soup) -> None:
    """Leave one h1 and give every heading an id of its own."""
    for extra in soup.select("main h1")[1:]:
        extra.name = "h2"
    seen = Counter()
    for heading in soup.main.find_all(HEADINGS):
        name = re.sub(r"\s+", "-", heading.get_text().strip()) or "section"  # the ids JupyterLab gives
        seen[name] += 1
        heading["id"] = name if seen[name] == 1 else f"{name}-{seen[name]}"


def _describe_images(soup) -> list[str]:
    """Join pictures with their captions, and see that each has an alternative text."""
    warnings = []
    for caption in soup.select(".jp-OutputArea .figcaption"):
        image = caption.find_previous("img")
        area = caption.find_parent(class_="jp-OutputArea")
        if image is None or area not in image.parents or image.find_parent("figure"):
            continue
        figure = image.parent.wrap(soup.new_tag("figure"))
        image.parent.unwrap()
        caption.name, caption.attrs = "figcaption", {}
        figure.append(caption.extract())
    for picture in soup.select("img, svg:not(svg svg)"):
        name = "alt" if picture.name == "img" else "aria-label"
        if picture.get(name):
            continue
        section = picture.find_previous(HEADINGS).get_text().strip()
        caption = picture.find_parent("figure") and picture.find_parent("figure").find("figcaption")
        picture[name] = caption.get_text().strip() if caption else f"Picture in the section {section}"
        if picture.name == "svg":
            picture["role"] = "img"
        warnings.append(f"a picture in {section!r} has no alternative text: use figures.show(figure, alt, caption)")
    return warnings


def _frame_tables(soup) -> None:
    """Let wide tables scroll by keyboard; fold what code shows, but for the verdict's, and what has no headings."""
    for table in soup.find_all("table"):
        table.attrs.pop("border", None)
        for cell in table.select("thead th"):
            if not cell.get_text(strip=True):  # an empty corner is no heading
                cell.name = "td"
        if all(len(cell.get_text()) <= 32 for cell in table.select("th, td")):  # no line breaks inside short cells
            table["class"] = [*table.get("class", []), "compact"]
        label = table.caption.get_text(" ", strip=True) if table.caption else "table"
        frame = {"class": "table", "tabindex": "0", "role": "region", "aria-label": label}
        frame = table.wrap(soup.new_tag("div", attrs=frame))
        if table.thead and not table.thead.get_text(strip=True):
            table.thead.decompose()
            _fold(soup, frame, ", ".join(row.td.get_text() for row in table.find_all("tr")), "data")
        elif table.find_parent(class_="jp-OutputArea") and not table.find_parent(class_="verdict"):
            _fold(soup, frame, f"Table: {re.split(r'[.:;](?: |$)', label)[0]}", "data")


def _frame_code(soup) -> None:
    """Fold listings and long prints among the outputs, and let wide code scroll by keyboard too."""
    for formula in soup.select('p:has(> math[display="block"])'):
        formula["tabindex"] = "0"
    for block in soup.find_all("pre"):
        lines = block.get_text().splitlines()
        if "text" in block.get("class", []):  # printed text is wrapped
            if len(lines) > 12:
                _fold(soup, block, f"{len(lines)} printed lines")
            continue
        block["tabindex"] = "0"
        if block.find_parent(class_="jp-OutputArea"):
            _fold(soup, block, f"Source: {re.sub(r'^def |[(:].*', '', lines[0])}")


def _fold(soup, tag, label: str, kind: str = "code") -> None:
    tag.wrap(soup.new_tag("details", attrs={"class": kind})).insert(0, soup.new_tag("summary", string=label))


def _rewrite_links(soup, report: dict) -> None:
    """Point links to notebooks at their pages, and links out of notebooks/ at the same place from the page."""
    for link in soup.select("main a[href]"):
        parts = urlsplit(link["href"])
        if re.fullmatch(r"[^/]+\.ipynb", parts.path) and not parts.scheme:
            page = parts.path.removesuffix("ipynb") + "html"
            beside = (report["folder"] / page).exists()
            link["href"] = parts._replace(path=page if beside else report["root"] + page).geturl()
        elif parts.path.startswith("../"):
            link["href"] = report["root"] + link["href"]


def _write_contents(soup) -> None:
    """Fill the contents list from the headings of Markdown cells and the footer, and give each heading its link."""
    top = soup.new_tag("ul")
    for heading in soup.select("main h2, main h3"):
        if heading.find_parent(class_="jp-OutputArea"):
            continue
        item = soup.new_tag("li")
        item.append(soup.new_tag("a", href="#" + quote(heading["id"]), string=heading.get_text().strip()))
        section = top.contents[-1] if top.contents and heading.name == "h3" else None
        if section and not section.ul:
            section.append(soup.new_tag("ul"))
        (section.ul if section else top).append(item)
    soup.find(id="contents").append(top)
    for heading in soup.main.find_all(HEADINGS)[1:]:
        named = {"class": "anchor", "aria-label": f"Link to the section {heading.get_text().strip()}"}
        heading.extend([" ", soup.new_tag("a", href="#" + quote(heading["id"]), attrs=named, string="#")])


def _fold_sections(soup) -> None:
    """Close every section whose heading's cell is tagged `fold`: all up to a heading of its level or above."""

    def level(cell) -> int:  # 7, below every heading, where the cell has none
        is_text = cell.name == "footer" or "prose" in cell.get("class", [])
        return min([int(heading.name[1]) for heading in cell.find_all(HEADINGS)], default=7) if is_text else 7

    for cell in soup.select("main .prose.celltag_fold:has(h1, h2, h3, h4, h5, h6)"):
        heading, own = cell.find(HEADINGS), int(cell.find(HEADINGS).name[1])
        inside = list(itertools.takewhile(lambda other, own=own: level(other) > own, cell.find_next_siblings()))
        section, summary = soup.new_tag("details", attrs={"class": "fold"}), soup.new_tag("summary")
        cell.insert_before(section)
        if link := heading.find(class_="anchor"):  # a summary must not hold a link
            section.wrap(soup.new_tag("div", attrs={"class": "folded"})).insert(0, link.extract())
        summary.append(heading.extract())
        section.extend([summary, cell.extract(), *(other.extract() for other in inside)])
