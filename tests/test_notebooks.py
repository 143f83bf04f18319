"""Every notebook as it stands in git: no outputs, honest parameters, the anatomy that the runner relies on."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import nbformat
import pytest

from distill_utils.report import settings

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))
# A measured result in prose grows old; "95 % interval" names a method, and published figures are marked as such.
RESULT_IN_PROSE = re.compile(
    r"(?<![\w.-])(?!95\s*(?:%|per cent))\d+(?:[.,]\d+)?\s*(?:%|per cent\b|percent\b|ms\b|points?\b)"
)
WIDGETS = re.compile("sample_browser|metric_picker")

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def code_cells(path: Path, executed: bool = False) -> list:
    """Return the code cells of a notebook, or those that a batch run executes."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    return [cell for cell in cells if not (executed and "skip-execution" in cell.metadata.get("tags", []))]


def test_notebook_is_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert re.fullmatch(r"\d\d_[a-z0-9_]+|distill", path.stem)
    assert notebook.metadata.kernelspec.name == "python3" and not {"papermill", "widgets"} & notebook.metadata.keys()
    assert "version" not in notebook.metadata.get("language_info", {})
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in notebook.cells:
        assert cell.source.strip() and not {"papermill", "execution"} & cell.metadata.keys()
    for cell in code_cells(path):
        tags = cell.metadata.get("tags", [])
        assert not cell.outputs and cell.execution_count is None, cell.id
        assert not re.search(r"^\s*[!%]", cell.source, re.MULTILINE), f"a shell or magic command in {cell.id}"
        assert "skip-execution" not in tags or "remove-cell" in tags, f"{cell.id} is skipped but on the page"
        assert "skip-execution" in tags or not WIDGETS.search(cell.source), f"{cell.id} has widgets in a batch run"
    assert "run.save(" in code_cells(path, executed=True)[-1].source
    assert all(parameter.help for parameter in settings.notebook_parameters(path).values())


def test_notebook_reads_like_a_paper(path):
    code = code_cells(path)
    prose = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    assert len(code) <= 20 and len(prose) >= len(code)
    text = re.sub(r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$", "", "\n\n".join(prose), flags=re.DOTALL)
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1
    lines = [line for line in text.splitlines() if "published" not in line.lower()]
    assert [line for line in lines if RESULT_IN_PROSE.search(line)] == []
    described = [cell for cell in code if "parameters" not in cell.metadata.get("tags", [])]  # a line each
    assert max(len(cell.source.splitlines()) for cell in described) <= 30
    for tag, what in (("verdict", "display(Markdown("), ("answer", "figures.show(")):  # what a page opens with
        (cell,) = (cell for cell in code if tag in cell.metadata.get("tags", []))
        assert what in cell.source
    for cell in code_cells(path, executed=True):  # a value at a cell's end is printed on the page
        last = ast.parse(cell.source).body[-1]
        shown = ast.unparse(last.value) if isinstance(last, ast.Expr) else "print("
        assert re.match(r"[\w.]*(show\w*|display|print|lap|save|use_style)\(", shown), shown


def test_notebook_names_what_the_package_has(path):
    """Cells that papermill skips as well: nothing else runs them without a browser."""
    modules, named = {}, []
    for node in (node for cell in code_cells(path) for node in ast.walk(ast.parse(cell.source))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("distill_utils"):
            package = importlib.import_module(node.module)
            for alias in node.names:
                found = getattr(package, alias.name, None) or importlib.import_module(f"{node.module}.{alias.name}")
                if inspect.ismodule(found):
                    modules[alias.asname or alias.name] = found
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            named.append((node.value.id, node.attr))
    assert modules
    assert [(name, part) for name, part in named if name in modules and not hasattr(modules[name], part)] == []
