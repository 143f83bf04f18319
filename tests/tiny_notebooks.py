"""Small notebooks, and the real runner in a process of its own, for tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

REPOSITORY = Path(__file__).resolve().parent.parent
PARAMETERS = """# method
method: str = "kd"              # one of sft, kd
learning_rate: float = 3e-4     # peak
shapes: list[str] = ["6-3"]     # student shapes, encoder-decoder

# run
num_train: int = 100            # documents, 0 = all
verbose: bool = False           # more lines
seed: int = 0                   # data order
"""
SAVE = """import json, os, pathlib
folder = pathlib.Path(os.environ["DISTILL_NOTEBOOK_RUN"])
rows = [
    {"method": "teacher", "student": "6-6", "seed": 0, "rouge2": 10.5, "rouge2_low": 9.5, "rouge2_high": 11.5,
     "parameters_m": 8.1, "latency_ms": 61.25, "words": 9.0},
    {"method": "kd", "student": "6-3", "seed": 0, "rouge2": 9.25, "rouge2_low": 8.0, "rouge2_high": 10.0,
     "parameters_m": 6.3, "latency_ms": float("nan"), "layers": [0, 2, 5]},
]
provenance = {"commit": "abc123", "dirty": False, "packages": {"torch": "2.13.0"}, "processor": "a processor"}
results = {"notebook": "x", "parameters": {}, "rows": rows, "headline": "**KD** costs $5 or $6, <b>not</b> less.",
           "seconds": {"corpus": 1.5, "training": 75.0}, "provenance": provenance}
# results.json of the real helper is written whole; so is this one
(folder / "results.json").write_text(json.dumps(results))
"""


def code(source: str, *tags: str):
    return new_code_cell(source, metadata={"tags": list(tags)} if tags else {})


def markdown(source: str, *tags: str):
    return new_markdown_cell(source, metadata={"tags": list(tags)} if tags else {})


def write_notebook(
    folder: Path, stem: str, cells: list, parameters: str = PARAMETERS, title: str = "# A title"
) -> Path:
    """Write a notebook of a title, a parameters cell and the cells given."""
    folder.mkdir(parents=True, exist_ok=True)
    notebook = new_notebook(cells=[markdown(title), code(parameters, "parameters"), *cells])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = folder / f"{stem}.ipynb"
    nbformat.write(notebook, path)
    return path


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a runner whose runs stay in `folder`, with a broken kernelspec python3 installed."""
    decoy = folder / "jupyter" / "kernels" / "python3"
    decoy.mkdir(parents=True, exist_ok=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "decoy", "language": "python"}
    (decoy / "kernel.json").write_text(json.dumps(spec))
    return {**os.environ, "DISTILL_RUNS": str(folder / "runs"), "JUPYTER_DATA_DIR": str(folder / "jupyter")}


def command(folder: Path, *arguments: str) -> list[str]:
    """Return the command line of the runner with notebooks, runs and reports under `folder`."""
    places = ["--notebooks", str(folder / "notebooks"), "--output", str(folder / "reports")]
    return [sys.executable, "-m", "distill_utils", "report", *arguments, *places]


def run_report(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run `python -m distill_utils report` to its end."""
    return subprocess.run(
        command(folder, *arguments), cwd=REPOSITORY, env=environment(folder), capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
