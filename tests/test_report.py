"""The page that the runner makes, read as a DOM; the index, results.csv and the README's tables."""

import base64
import csv
import io
import json
import re
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup
from tiny_notebooks import REPOSITORY, SAVE, code, markdown, run_report, write_notebook

from distill_utils.report import batch, dashboard, index, pages, settings

TITLE = """# 3. Distillation & friends

> Which *signal* gives the best student for $x^2$ updates?"""
DATA = r"""## 3.1 Data

Forward KL is $\mathrm{KL}(p\,\|\,q)$, and

$$L = \sum_v p_v \log \frac{p_v}{q_v}$$"""
STEPS = """### Steps

See [setup](01_setup.ipynb) and [the code](../distill_utils/distillation/losses.py).

## 3.1 Data

| a | b |
| --- | --- |
| 1 | 2 |"""
PATHS = f"""import pathlib, sys, warnings
print("home", pathlib.Path.home() / "data", "repository", {str(REPOSITORY)!r} + "/distill_utils/x.py", sys.prefix)
print("here", pathlib.Path.cwd(), "run", __import__("os").environ["DISTILL_NOTEBOOK_RUN"])
warnings.warn("look at the path of this warning")"""
FIGURE = """from distill_utils.report import figures
rows = [{"method": "teacher", "ms_per_token": 2.0, "rouge2": 9.9}, {"method": "kd", "ms_per_token": 1.0, "rouge2": 9.0}]
ax = figures.plot_quality_speed(rows) if rows else figures.NoSuchError("none")
figures.show(ax, "The student is twice as fast & <nearly> as good.", "Two points; <b>no</b> intervals.")"""
BARE = """from IPython.display import HTML, Image, Markdown, SVG, display
import base64
dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
display(Image(base64.b64decode(dot)))
display(HTML('<svg width="5" height="5"><rect width="5" height="5"/></svg>'))
display(HTML('<h1>Loud</h1><script src="https://x.example/a.js"></script>'))
display(HTML('<img src="https://x.example/a.png" onerror="alert(1)"><a href="javascript:alert(1)">click</a>'))
display({"application/vnd.jupyter.widget-view+json": {"model_id": "0" * 32}, "text/plain": "Box()"}, raw=True)"""
MODEL_TEXT = """from distill_utils.report import tables
display(Markdown("A model wrote <b>bold</b> and $a_b$ for $5 to $6."))
tables.show_samples([{"source": "<b>bold</b> text with $math$", "kd": "<script>alert(1)</script>"}], ["source", "kd"])
print("printed <b>bold</b> and $a_b$")"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One notebook with everything in it, run once with a profile that changes two parameters."""
    folder = tmp_path_factory.mktemp("report")
    cells = [
        code("# one thing first\nhidden_by_fold = 1"),
        markdown(DATA),
        markdown(STEPS),
        code(PATHS),
        code(FIGURE, "answer"),
        code(BARE),
        code(MODEL_TEXT),
        markdown("## Appendix\n\nOnly for the *curious*.", "fold"),
        code("rows = [{'a': 'folded output'}]\nprint(rows)"),
        markdown("### Deeper"),
        markdown("## Verdict\n\nComputed from the rows."),
        code("display(Markdown('# Keep **6-3**'))\nprint('one printed line')", "verdict", "hide-input"),
        markdown("## Explore: secret words", "remove-cell"),
        code("1 / 0", "remove-cell", "skip-execution"),
        code(SAVE),
    ]
    write_notebook(folder / "notebooks", "03_kd_pl_sft", cells, title=TITLE)
    (folder / "notebooks" / "profiles").mkdir()
    (folder / "notebooks" / "profiles" / "small.yaml").write_text("03_kd_pl_sft: {num_train: 5, learning_rate: 1e-4}\n")
    done = run_report(folder, "03", "--profile", "small")
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "reports", done.stdout


@pytest.fixture(scope="module")
def html(made):
    return (made[0] / "small" / "03_kd_pl_sft.html").read_text()


@pytest.fixture(scope="module")
def page(html):
    return BeautifulSoup(html, "html.parser")


@pytest.fixture(scope="module")
def saved(made):
    return json.loads((made[0] / "small" / "03_kd_pl_sft.json").read_text(), parse_constant=pytest.fail)


def test_files_beside_and_inside_the_page(made, saved, page):
    names = {path.relative_to(made[0]).as_posix() for path in made[0].rglob("*") if path.is_file()}
    gathered = {"index.html", "results.csv", "history.csv"}
    assert names == {"small/03_kd_pl_sft.html", "small/03_kd_pl_sft.json"} | gathered
    (line,) = csv.DictReader((made[0] / "history.csv").open())
    assert line["report"] == "small/03_kd_pl_sft" and line["profile"] == "small"
    assert saved["rows"][1]["latency_ms"] is None  # not a number, which JSON lacks
    assert saved["question"] == "Which *signal* gives the best student for $x^2$ updates?"
    assert saved["seconds"] == {"corpus": 1.5, "training": 75.0}
    (link,) = page.select("a[download]")
    kind, _, data = link["href"].partition(";base64,")
    assert kind == "data:application/json" and json.loads(base64.b64decode(data)) == saved


def test_one_title_and_headings_that_can_be_linked(page):
    assert page.html["lang"] == "en" and page.title.string == "3. Distillation & friends"
    assert [heading.get_text() for heading in page.find_all("h1")] == ["3. Distillation & friends"]
    ids = [tag["id"] for tag in page.select("[id]")]
    assert len(ids) == len(set(ids))
    links = page.nav.select('a[href^="#"]')
    sections = ["3.1 Data", "Steps", "3.1 Data", "Appendix", "Deeper", "Verdict"]
    sections += ["Cite this", "How this report was made"]
    assert [link.get_text() for link in links] == sections
    assert all(unquote(link["href"][1:]) in ids for link in links)
    assert links[1].find_parent("ul").find_parent("li").a is links[0]
    anchors = {unquote(link["href"][1:]) for link in page.select("a.anchor")}
    assert anchors == {heading["id"] for heading in page.main.find_all(pages.HEADINGS)[1:]}
    assert not page.select("summary a")


def test_tables_can_be_scrolled_and_nothing_is_loaded_or_run(page, html):
    assert page.select("table") and all(cell.get_text(strip=True) for cell in page.select("th"))
    assert all(table.parent["class"] == ["table"] and table.parent["aria-label"] for table in page.select("table"))
    assert not page.select("script, link, iframe, object, embed, base, form")
    assert all(image["src"].startswith("data:image/") for image in page.select("img"))
    assert not [tag for tag in page.find_all(True) if any(name.startswith("on") for name in tag.attrs)]
    links = page.select("a[href]:not([download])")
    assert {urlsplit(a["href"]).scheme for a in links} <= {"", "http", "https"}
    assert not re.search(r"url\(\s*['\"]?https?:|@import", html)
    assert "default-src 'none'" in page.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
    assert not page.select(".jupyter-widgets, .widget-area")
    assert "Interactive view: open the notebook in JupyterLab." in page.main.get_text()


def test_every_picture_has_an_alternative_text_and_its_caption(page, made):
    pictures = page.select("main img, main svg")
    texts = [picture.get("alt") or picture.get("aria-label") for picture in pictures]
    assert len(texts) == 3 and all(texts)
    assert texts[0] == "The student is twice as fast & <nearly> as good."
    assert made[1].count("has no alternative text") == 2  # the bare PNG and SVG: the author is warned
    (figure,) = page.select("figure")
    assert figure.find("img") and figure.find("figcaption").get_text() == "Two points; <b>no</b> intervals."


def test_markdown_math_is_mathml_and_no_dollar_is_left(page):
    prose = [tag for tag in page.select(".prose") if not tag.find_parent(class_="jp-OutputArea")]
    assert not [tag for tag in prose if "$" in tag.get_text()]
    assert [math["display"] for math in page.find_all("math")] == ["inline", "inline", "block"]
    assert page.find("math", display="block").find("mfrac")
    # what the converter does not know stays readable
    assert pages.tex_to_mathml(r"\nosuchcommand{x} < 1") == r"<code>\nosuchcommand{x} &lt; 1</code>"
    assert pages.tex_to_mathml(r"\frac{").startswith("<code>")
    assert "<mtable" in pages.tex_to_mathml(r"\begin{aligned} a &= b \\ c &= d \end{aligned}", "block")


def test_model_text_is_escaped_and_its_dollars_are_left_alone(page):
    text = page.main.get_text()
    assert "A model wrote <b>bold</b> and $a_b$ for $5 to $6." in text
    assert "printed <b>bold</b> and $a_b$" in text
    assert "<b>bold</b> text with $math$" in text and "<script>alert(1)</script>" in text
    assert not page.main.find_all("b")


def test_all_code_is_folded_and_named_and_removed_cells_are_out(page):
    folded = page.select("details.code:has(.source)")
    assert [source.find_parent("details") for source in page.select(".source")] == folded
    assert not any(details.has_attr("open") for details in page.find_all("details"))
    lines = [details.summary.get_text() for details in folded]
    assert lines[:2] == ["Parameters", "Parameters changed for this run: learning_rate, num_train"]
    assert "Code: one thing first" in lines and "Code: imports" in lines and "Code: plot_quality_speed" in lines
    assert "Code: rows" in lines
    assert "secret words" not in page.get_text() and "1 / 0" not in page.get_text()


def test_verdict_and_figure_stand_below_the_title_and_their_code_stays(page):
    title, verdict = page.main.find_all(recursive=False)[:2]
    assert title.h1 and title.blockquote and verdict["class"] == ["verdict"]
    first, figure, printed = verdict.select(".jp-OutputArea > *")
    assert first.strong.get_text() == "6-3" and figure.name == "figure" and figure.find("img")["alt"]
    assert "one printed line" in printed.get_text() and page.get_text().count("one printed line") == 2
    assert "Markdown" in page.select_one(".celltag_verdict details.code").get_text()
    for cell in page.select(".celltag_verdict, .celltag_answer"):
        assert cell.select_one(f'a[href="#{verdict["id"]}"]') and not cell.find("figure")


def test_tagged_sections_are_closed_up_to_the_next_heading_of_their_level(page):
    section, made_how = page.select("details.fold")
    assert made_how.dl and not section.has_attr("open") and section.summary.h2.get_text().strip() == "Appendix"
    assert all(text in section.get_text() for text in ("curious", "folded output", "Deeper"))
    assert "Computed from the rows" not in section.get_text() and not section.find("footer")
    assert section.parent.find_next_sibling().h2.get_text() == "Verdict #"


def test_folders_of_this_machine_are_taken_out(html, made):
    text = html + (made[0] / "small" / "03_kd_pl_sft.json").read_text() + (made[0] / "index.html").read_text()
    for folder in (Path.home(), REPOSITORY, Path(sys.prefix), made[0].parent):
        assert str(folder) not in text, folder
    assert "home ~/data repository ./distill_utils/x.py .venv" in html
    assert "here notebooks run runs/reports-03_kd_pl_sft-small-" in html
    assert "ipykernel_" not in html and "look at the path of this warning" in html


def test_scrubbing_respects_word_boundaries(monkeypatch, tmp_path):
    home = tmp_path / "ada"
    monkeypatch.setattr(pages.Path, "home", lambda: home)
    scrub = pages.scrubber(Path("/elsewhere/notebooks"))
    assert scrub(f"{home}/x and file://{home}.") == "~/x and file://~."
    assert scrub(f"{home}lbert/x some{home}/x") == f"{home}lbert/x some{home}/x"
    assert scrub("/opt/py/lib/site-packages/torch/x.py:3") == "site-packages/torch/x.py:3"


def test_footer_tells_how_the_page_was_made_and_links_lead_to_pages(page, saved):
    facts = {name.get_text(): name.find_next("dd").get_text() for name in page.footer.find_all("dt")}
    assert facts["notebook"] == "03_kd_pl_sft.ipynb" and facts["profile"] == "small"
    assert set(facts["parameters changed"].split(", ")) == {"num_train = 5", "learning_rate = 0.0001"}
    assert facts["commit"] == "abc123" and facts["packages"] == "torch 2.13.0" and facts["processor"] == "a processor"
    assert facts["date"].endswith("UTC") and facts["duration"]
    cited = page.find(id="cite").get_text()
    assert all(part in cited for part in ("3. Distillation & friends", "abc123", saved["date"]))
    links = {link.get_text(): link["href"] for link in page.select("main a[href]")}
    assert links["setup"] == "../01_setup.html"  # no page of it beside this one
    assert links["the code"] == "../../distill_utils/distillation/losses.py"
    assert page.nav.a["href"] == "../index.html"


def test_a_page_above_the_limit_is_rejected_and_nothing_is_written(made, tmp_path, monkeypatch):
    (run,) = (made[0].parent / "runs").glob("reports-03*")
    (plan,) = settings.make_plans(["03"], "small", [], made[0].parent / "notebooks")
    monkeypatch.setattr(batch, "MAX_PAGE_BYTES", 1000)
    with pytest.raises(batch.RunFailed, match="03_kd_pl_sft.html") as failed:
        batch.publish(plan, run, 1.0, tmp_path)
    assert failed.value.code == batch.PAGE_REJECTED and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- index, CSV, README


def entry(reports: Path, name: str, **values) -> None:
    path = reports / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"profile": "demo", "date": "2026-01-02 03:04 UTC", "rows": [], **values}))
    path.with_suffix(".html").write_text("<p>")


def row(method, student="", seed=0, **values) -> dict:
    return {"method": method, "student": student, "seed": seed, **values}


@pytest.fixture
def reports(tmp_path):
    scores = {"rouge2_low": 8.0, "rouge2_high": 10.0, "parameters_m": 6.34}
    entry(tmp_path, "01_setup", title="1. Teacher", rows=[row("teacher", rouge2=10.0)], wall_seconds=61.0)
    rows = [row("lead", rouge2=4.0), row("kd", "6-3", rouge2=9.126, latency_ms=None, layers=[0, 5], **scores)]
    headline = "Take **6-3**; it costs $5 to $6 <b>x</b>"
    texts = {"title": "3. KD | PL", "question": "Which $x$?", "headline": headline}
    entry(tmp_path, "03_kd", **texts, rows=rows, seconds={"data": 2.0})
    seeds = [row("kd", "6-3", seed, rouge2=value, **scores) for seed, value in ((0, 9.0), (1, 10.0), (2, 11.0))]
    further = {"title": "3. KD", "profile": "full", "changed": {"num_train": 0}, "rows": seeds, "wall_seconds": 4000.0}
    entry(tmp_path, "full/03_kd", **further, means=[row("kd", "6-3", rouge2=10.0, seeds=3, **scores)])
    (tmp_path / "stale.json").write_text("{}")  # its page is gone
    return tmp_path


def test_index_and_csv(reports):
    index.write_index(reports)
    page = BeautifulSoup((reports / "index.html").read_text(), "html.parser")
    assert [heading.get_text() for heading in page.find_all("h1")] == ["Reports"]
    runs = page.select(".runs tbody tr")
    assert [run.a["href"] for run in runs] == ["01_setup.html", "03_kd.html", "full/03_kd.html"]
    assert "Take 6-3; it costs $5 to $6 <b>x</b>" in runs[1].get_text() and not runs[1].b
    assert all(part in runs[2].get_text() for part in ("full", "num_train = 0", "2026-01-02", "1 h 06 min"))
    assert not page.select("link, img, iframe, [src], [style]") and "http" not in page.get_text()
    assert all((reports / link["href"]).exists() for link in page.select("a[href]"))
    table = list(csv.DictReader(io.StringIO((reports / "results.csv").read_text())))
    assert list(table[0])[:5] == ["report", "profile", "method", "student", "seed"]
    assert [line["report"] for line in table] == ["01_setup", "03_kd", "03_kd", *["full/03_kd"] * 3]
    assert table[2]["rouge2"] == "9.126" and table[2]["layers"] == "[0, 5]" and table[2]["latency_ms"] == ""


def test_readme_table(reports):
    text = index.readme_table(reports)
    assert r"| [3. KD \| PL](reports/03_kd.html) | demo | 1 |" in text
    assert "| method | student | parameters (M) | ROUGE-2 (95 % interval) |" in text  # empty columns are left out
    assert "| kd | 6-3 | 6.3 | 9.13 (8.00 to 10.00) |" not in text  # another page of the notebook has more seeds
    assert "(reports/full/03_kd.html), profile full, mean of 3 seeds:" in text
    assert "| kd | 6-3 | 6.3 | 10.00 (8.00 to 10.00) |" in text
    assert "`make reports`: 01 1 min 01 s" in text
    assert "1 h 06 min" not in text  # what other profiles took stands on their pages
    assert "1. Teacher" not in text  # the headline tables are those with students
    assert "Take **6-3**; it costs" in text
    path = reports / "03_kd.json"  # own parameters are not the demo
    entry = json.loads(path.read_text())
    path.write_text(json.dumps(entry | {"changed": {"dataset": "mine"}, "wall_seconds": 9.0}))
    assert "`make reports`: 01 1 min 01 s." in index.readme_table(reports)
    path.write_text(json.dumps(entry))
    assert index.readme_table(reports / "none") == "No report has been made yet.\n"


def test_readme_shows_the_page_that_carries_most(tmp_path):
    for profile, steps in (("long", 2400), ("short", 800)):  # the last one is a demonstration
        rows = [row("kd", "6-3", rouge2=9.0, seeds=3)]
        entry(tmp_path, f"{profile}/03_kd", title="3. KD", profile=profile, rows=rows, date=f"{3000 - steps}",
              parameters={"max_steps": steps, "dataset": "../data/news"})  # fmt: skip
    assert "(reports/long/03_kd.html), profile long, mean of 3 seeds:" in index.readme_table(tmp_path)
    entries, _ = index.gather(tmp_path)
    assert {dashboard.facts(made | {"fingerprint": "f"})["data"] for made in entries} == {"news"}


def test_readme_leaves_the_scores_of_several_tasks_and_of_many_rows_to_the_page(tmp_path):
    tasks = [row("miniend", "3-3", task="summaries", rouge2=5.0), row("miniend", "3-3", task="belongs", score=70.0)]
    many = [row("kd", f"6-{n}", rouge2=5.0) for n in range(index.README_ROWS + 1)]
    losses = [row("logits", "4-4", loss=4.1)]
    for name, rows in (("04_miniend", tasks), ("05_scaling", losses), ("03_kd", many)):
        entry(tmp_path, name, title=f"Page {name}", headline=f"**{name}** is best", rows=rows)
        text = index.readme_table(tmp_path)
        assert f"| [Page {name}](reports/{name}.html) | demo | 1 | **{name}** is best |" in text
        assert f"| {rows[0]['method']} |" not in text


def test_readme_is_changed_between_its_markers_only(reports, tmp_path):
    assert index.benchmark_table(tmp_path) == "No suite has been measured yet.\n"
    case = {"case": "step", "ours_peak_mb": 10.0, "other_peak_mb": 40.0, "ceiling_share": 0.5}
    rows = [case | {"other": name, "ratio": ratio, "goal": goal} for name, ratio, goal in
            (("plain", 3.125, 2.0), ("expert", 1.5, 1.6), ("unasked", 9.0, None), ("failed", None, 2.0))]  # fmt: skip
    rows.append(rows[2] | {"case": "no goal"})
    results, readme = tmp_path / "measured", tmp_path / "README.md"
    results.mkdir()
    (results / "suite.json").write_text(json.dumps({"rows": rows}))
    index.update_readme(readme, reports, results)
    assert not readme.exists() and not (reports / "quality_speed.svg").exists()
    marks = [f"<!-- {part}:{end} -->" for part in ("picture", "results", "benchmarks") for end in ("start", "end")]
    readme.write_text("before\n{}\nold\n{}\nbetween\n{}\nold\n{}\n{}\nold\n{}\nafter\n".format(*marks))
    for _ in range(2):
        index.update_readme(readme, reports, results)
        text = readme.read_text()
        assert text.startswith(f"before\n{marks[0]}\n\n![ROUGE-2") and text.endswith(f"{marks[5]}\nafter\n")
        assert "full/03_kd.html), profile full, mean of 3 seeds.*" in text.partition(marks[1])[0]
        assert f"{marks[1]}\nbetween\n{marks[2]}\n\n| page |" in text and "old" not in text and "no goal" not in text
        line = "| step | plain 3.12 (goal 2); expert 1.50 (goal 1.6); unasked 9.00 | 0.25, 0.25, 0.25 | 50 % |"
        assert line in text.splitlines()
    assert b"<svg" in (reports / "quality_speed.svg").read_bytes()


@pytest.mark.parametrize(("wall", "reused", "text"), [
    (8.44, 0.2, "8.4 s"), (59.96, None, "1 min 00 s"), (61, 3600, "1 min 01 s, reused results 1 h 00 min"),
    (None, 9, ""),
])  # fmt: skip
def test_wall_time_names_what_was_reused(wall, reused, text):
    assert index.wall_time({"wall_seconds": wall, "reused_seconds": reused}) == text
