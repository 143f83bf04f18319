"""Pages in a real browser: nothing is asked of the network, nothing runs, and everybody can read them.

Skipped where no Chromium is installed (Debian: chromium). What the builder writes is in test_report.py.
"""

import importlib.util
import shutil
from pathlib import Path

import nbformat
import pytest
from browser import CHROMIUM, chromium
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from distill_utils.report import batch, figures, index, pages, tables

REPORTS = Path(__file__).resolve().parent.parent / "reports"
PAGES = sorted(path for path in REPORTS.rglob("*.html") if path.name != "index.html")
every_page = pytest.mark.parametrize("path", PAGES, ids=[path.relative_to(REPORTS).as_posix() for path in PAGES])
AXE = importlib.util.find_spec("axe_core_python")
ATTACKS = [
    "<script>window.attacked = 1</script>", "<img src=x onerror='window.attacked = 1'>", '"><svg onload=alert(1)>',
    "</pre></td></table></details><h1>x", "[x](javascript:window.attacked=1)", "![x](https://x.example/a.png)",
    r"$\frac{", "\u202egnp.exe", "{{ 7 * 7 }} {% raw %}", "--><!--", "a" * 300,
]  # fmt: skip

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("browser")) as page:
        yield page


def serious(tab) -> list[str]:
    """Return the serious and critical findings of axe-core on what the tab shows."""
    if AXE is None:
        pytest.skip("axe-core-python is not installed")
    tab.run((Path(AXE.origin).parent / "axe.min.js").read_text(encoding="utf-8") + ";1")
    # The parts of a figure are left out: it is one picture with an alternative text, and most of the time.
    run = "axe.run({exclude: [['svg *']]}, {resultTypes: ['violations']})"
    found = tab.run(f"{run}.then(found => found.violations.map(v => [v.impact, v.id, v.nodes[0].html]))")
    return [f"{name}: {html[:120]}" for impact, name, html in found if impact in ("serious", "critical")]


def skip_old(tab) -> None:
    """Skip what pages of an earlier builder do not meet: they have to be made again, which takes a GPU."""
    if not tab.run("!!document.getElementById('results')"):
        pytest.skip("an earlier version of distill_utils made this page")


def fits(tab) -> bool:
    return tab.run("document.documentElement.scrollWidth <= window.innerWidth")


@every_page
def test_page_on_a_phone(tab, path):
    tab.open(path, width=390)
    assert (tab.requests(), tab.complaints()) == ([], [])
    links = "[...document.querySelectorAll('a[href^=\"#\"]')].map(link => link.getAttribute('href').slice(1))"
    assert tab.run(f"{links}.filter(name => !document.getElementById(decodeURIComponent(name)))") == []
    skip_old(tab)
    assert fits(tab) and serious(tab) == []


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@every_page
def test_page_with_everything_open(tab, path, width, dark):
    tab.open(path, width=width, dark=dark)
    skip_old(tab)
    closed = tab.run("document.documentElement.scrollHeight")
    tab.run("document.querySelectorAll('details').forEach(part => part.open = true); 1")
    assert tab.run("document.documentElement.scrollHeight") > closed
    assert fits(tab) and serious(tab) == []
    assert (tab.requests(), tab.complaints()) == ([], [])


@pytest.mark.slow
@every_page
def test_page_on_paper(tab, path):
    tab.open(path, width=673)  # A4 without its margins
    skip_old(tab)
    tab.call("Emulation.setEmulatedMedia", media="print")
    tab.run("document.querySelectorAll('details.code').forEach(part => part.open = true); 1")
    cut = "[...document.querySelectorAll('.table, pre')].filter(part => part.scrollWidth > part.clientWidth + 1)"
    assert fits(tab) and tab.run(f"{cut}.map(part => part.innerText.slice(0, 80))") == []
    assert tab.run("[...document.querySelectorAll('details.data table')].every(table => table.offsetHeight > 0)")
    tab.call("Emulation.setEmulatedMedia", media="")


@pytest.mark.parametrize(("width", "dark"), [(390, False), pytest.param(1280, True, marks=pytest.mark.slow)])
def test_index_is_read_and_moved(tab, tmp_path, width, dark):
    shutil.copytree(REPORTS, tmp_path / "reports", ignore=shutil.ignore_patterns("*.html"))
    for page in PAGES:
        (tmp_path / "reports" / page.relative_to(REPORTS)).write_text("<p>")
    index.write_index(tmp_path / "reports")
    tab.open(tmp_path / "reports" / "index.html", width=width, dark=dark)
    assert fits(tab) and serious(tab) == []
    tab.run("slider = document.querySelector('.budget input'); slider.value = slider.max; slider.oninput()")
    chosen = "[...document.querySelector('.facet').querySelectorAll('.chosen')].map(part => part.textContent)"
    point, row = tab.run(chosen)
    assert row.split("×")[0] in point and tab.run("document.querySelector('.budget output').textContent")
    first = "document.querySelector('.sortable tbody').innerText"
    before = tab.run(first)
    tab.run("document.querySelectorAll('.sortable button')[3].click()")
    assert tab.run(first) != before and (tab.requests(), tab.complaints()) == ([], [])
    tab.open(tmp_path / "reports" / "index.html", width=673)  # A4 without its margins
    tab.call("Emulation.setEmulatedMedia", media="print")
    assert fits(tab) and tab.run("[...document.querySelectorAll('.note')].every(note => note.offsetHeight > 0)")
    assert tab.run("document.querySelector('.up').getBoundingClientRect().left") >= 0
    tab.call("Emulation.setEmulatedMedia", media="")


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """A page whose texts, names and parameters are attack strings, with a figure that could not be drawn."""
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("IPython.display.display", lambda *objects, **_: shown.extend(objects))
        tables.show_samples([{"source": text, "kd": text} for text in ATTACKS], ["source", "kd"], ATTACKS[0])
        figures.show(figures.plot_differences([{"name": ATTACKS[0]}]), ATTACKS[1], "caption")
        points = [{"method": "kd", "student": text, "ms_per_token": i + 1.0, "rouge2": i} for i, text in
                  enumerate(ATTACKS[:8])]  # fmt: skip
        figures.show(figures.plot_quality_speed(points), ATTACKS[2], ATTACKS[6])
    outputs = [new_output("display_data", {"text/html": item.data} if hasattr(item, "data") else item)
               for item in shown]  # fmt: skip
    outputs += [new_output("display_data", {"text/markdown": text}) for text in ATTACKS]
    outputs.append(new_output("stream", name="stdout", text="\n".join(ATTACKS)))
    cells = [new_markdown_cell("# Attacks"), new_code_cell("\n".join(ATTACKS), outputs=outputs)]
    cells.append(new_code_cell(ATTACKS[0], outputs=outputs[-2:], metadata={"tags": ["verdict"]}))
    text = "".join(ATTACKS[:3])
    entry = {"title": text, "notebook": text, "profile": text, "changed": {"run_name": text}, "date": text,
             "provenance": {"commit": text, "gpu": text}, "fingerprint": text, "wall_seconds": 1.0}  # fmt: skip
    folder = tmp_path_factory.mktemp("attacked")
    report = {"title": text, "root": "", "folder": folder, "facts": batch.page_facts(entry)}
    report["results"] = ("x.json", str(ATTACKS))
    notebook = nbformat.from_dict(new_notebook(cells=cells))
    html, warnings = pages.export_page(notebook, report)
    (folder / "attacked.html").write_text(html, encoding="utf-8")
    return folder / "attacked.html", warnings


def test_attack_strings_stay_text_and_a_figure_that_fails_is_named(tab, attacked, tmp_path):
    path, warnings = attacked
    tab.open(path)
    assert not tab.run("window.attacked") and not tab.requests() and not tab.complaints()
    assert tab.run("document.querySelectorAll('h1').length") == 1
    text = tab.run("document.querySelector('main').textContent")
    assert all(attack in text for attack in ATTACKS[:1] + ATTACKS[6:9])
    assert fits(tab) and tab.run("document.title").startswith(ATTACKS[0])
    notes = tab.run("[...document.querySelectorAll('.failed')].map(note => note.textContent)")
    assert len(notes) == 1 and "KeyError" in notes[0] and ATTACKS[1] in notes[0] and "KeyError" in str(warnings)
    assert tab.run("document.querySelectorAll('figure img').length") == 1  # names that look like formulas are drawn
    # the results can be taken from inside the page
    tab.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    tab.run("document.querySelector('a[download]').click()")
    for _ in range(100):
        if (tmp_path / "x.json").exists() and (tmp_path / "x.json").stat().st_size:
            break
        tab.run("new Promise(done => setTimeout(done, 100))")
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == str(ATTACKS)
