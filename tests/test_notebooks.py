"""Every notebook as it stands in git: no outputs, honest parameters, the anatomy that the runner relies on."""

import ast
import copy
import importlib
import inspect
import json
import re
from pathlib import Path

import nbformat
import pytest

from distill_utils.artifacts import InputError
from distill_utils.report import settings

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))
# A measured result in prose grows old; "95 % interval" names a method, and published figures are marked as such.
RESULT_IN_PROSE = re.compile(
    r"(?<![\w.-])(?!95\s*(?:%|per cent))\d+(?:[.,]\d+)?\s*(?:%|per cent\b|percent\b|ms\b|points?\b)"
)


def problems(path: Path) -> list[str]:
    """Return what is wrong with a notebook's file, one line each."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    found = []
    if not re.fullmatch(r"\d\d_[a-z0-9_]+|distill", path.stem):
        found.append(f"name {path.stem!r} is not NN_topic")
    kernel = notebook["metadata"].get("kernelspec", {}).get("name")
    if kernel != "python3":
        found.append(f"kernel {kernel!r} is not python3")
    found += [f"notebook metadata holds {key!r}" for key in ("papermill", "widgets") if key in notebook["metadata"]]
    if "version" in notebook["metadata"].get("language_info", {}):
        found.append("notebook metadata holds the Python version")
    headings = 0
    ids = [cell.get("id") for cell in notebook["cells"]]
    if None in ids or len(set(ids)) < len(ids):
        found.append("cell ids are missing or repeated")
    for number, cell in enumerate(notebook["cells"], 1):
        source, metadata = "".join(cell["source"]), cell["metadata"]
        tags = metadata.get("tags", [])
        where = f"cell {number}"
        if not source.strip():
            found.append(f"{where} is empty")
        if "papermill" in metadata or "execution" in metadata:
            found.append(f"{where} holds metadata of a run")
        if cell["cell_type"] == "code":
            if cell["outputs"]:
                found.append(f"{where} has outputs")
            if cell["execution_count"] is not None:
                found.append(f"{where} has an execution count")
            if re.search(r"^\s*[!%]", source, re.MULTILINE):
                found.append(f"{where} has a shell or magic command")
            if "skip-execution" in tags and "remove-cell" not in tags:
                found.append(f"{where} is skipped in batch runs but not removed from the page")
            if re.search(r"sample_browser|metric_picker", source) and "skip-execution" not in tags:
                found.append(f"{where} uses widgets in a cell that batch runs execute")
        else:
            prose = re.sub(r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$", "", source, flags=re.DOTALL)
            headings += len(re.findall(r"^# ", prose, re.MULTILINE))
            for line in prose.splitlines():
                if "published" not in line.lower() and RESULT_IN_PROSE.search(line):
                    found.append(f"{where} has a result in prose: {RESULT_IN_PROSE.search(line).group(0)!r}")
    if headings != 1:
        found.append(f"{headings} first-level headings instead of one")
    try:
        parameters = settings.notebook_parameters(path)
        found += [f"parameter {name!r} has no comment" for name, p in parameters.items() if not p.help]
    except InputError as error:
        found.append(str(error))
    executed = [
        "".join(cell["source"])
        for cell in notebook["cells"]
        if cell["cell_type"] == "code" and "skip-execution" not in cell["metadata"].get("tags", [])
    ]
    if not executed or "run.save(" not in executed[-1]:
        found.append("the last executed cell does not call run.save")
    nbformat.validate(nbformat.from_dict(copy.deepcopy(notebook)))
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_notebook_is_clean(path):
    assert problems(path) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_notebook_reads_like_a_paper(path):
    cells = nbformat.read(path, as_version=4).cells
    code_cells = [cell for cell in cells if cell.cell_type == "code"]
    assert len(code_cells) <= 20, f"{len(code_cells)} code cells"
    described = [cell for cell in code_cells if "parameters" not in cell.metadata.get("tags", [])]  # a line each
    longest = max(len(cell.source.splitlines()) for cell in described)
    assert longest <= 30, f"a cell of {longest} lines"
    assert len(cells) - len(code_cells) >= len(code_cells), "fewer prose cells than code cells"
    for tag, what in (("verdict", "display(Markdown("), ("answer", "figures.show(")):  # what a page opens with
        (cell,) = (cell for cell in code_cells if tag in cell.metadata.get("tags", []))
        assert what in cell.source
    for cell in code_cells:  # a value at a cell's end is printed on the page
        if "skip-execution" not in cell.metadata.get("tags", []):
            last = ast.parse(cell.source).body[-1]
            shown = ast.unparse(last.value) if isinstance(last, ast.Expr) else "print("
            assert re.match(r"[\w.]*(show\w*|display|print|lap|save|use_style)\(", shown), shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_notebook_names_what_the_package_has(path):
    """Cells that papermill skips as well: nothing else runs them without a browser."""
    modules, missing = {}, []
    for cell in nbformat.read(path, as_version=4).cells:
        tree = ast.parse(cell.source if cell.cell_type == "code" else "")
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("distill_utils"):
                package = importlib.import_module(node.module)
                for alias in node.names:
                    found = getattr(package, alias.name, None) or importlib.import_module(f"{node.module}.{alias.name}")
                    if inspect.ismodule(found):
                        modules[alias.asname or alias.name] = found
        named = [
            node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        ]
        missing += [f"{node.value.id}.{node.attr}" for node in named
                    if node.value.id in modules and not hasattr(modules[node.value.id], node.attr)]  # fmt: skip
    assert modules and missing == []
