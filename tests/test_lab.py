"""Notebooks in a real JupyterLab with headless Chromium: Run All, every control moved, a long cell interrupted."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import papermill
import pytest
from browser import CHROMIUM, chromium
from papermill.parameterize import parameterize_notebook

from distill_utils.artifacts import read_json
from distill_utils.report.settings import read_profile

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("corpus"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt install chromium)"),
]
NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
WIDGET = "window.jupyterapp.shell.currentWidget"
IDLE = "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
# In each of the boxes that `interact` made: turn its first knob that is a slider, a list, a text or a button.
TURN = """(box) => {
    const [slider, list, button] = ['.noUi-handle', 'select', 'button'].map((kind) => box.querySelector(kind));
    if (button) { button.click(); return 'button'; }
    if (slider) {
        slider.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}));
        return 'slider';
    }
    list.selectedIndex = (list.selectedIndex + 1) % list.options.length;
    list.dispatchEvent(new Event('change', {bubbles: true}));
    return 'list';
}"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab without network and its own settings; the address and the folder that it shows."""
    root = tmp_path_factory.mktemp("lab")
    settings = root / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')  # every cell is in the page
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (root / "notebooks").mkdir()
    options = ["--no-browser", "--allow-root", "--expose-app-in-browser", "--IdentityProvider.token=",
               f"--ServerApp.port={port}", f"--ServerApp.root_dir={root / 'notebooks'}", "--LabApp.news_url=None",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]  # fmt: skip
    own = {f"JUPYTER_{name}_DIR": str(root / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    environment = os.environ | own | {"JUPYTERLAB_SETTINGS_DIR": str(root / "settings")}
    environment.pop("MPLBACKEND", None)  # a user's kernel draws in the notebook
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    with open(root / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env=environment, stdout=log, stderr=log
        )
    try:
        wait(lambda: answers(f"http://127.0.0.1:{port}/api"), 90, lambda: (root / "log").read_text()[-2000:])
        yield f"http://127.0.0.1:{port}", root / "notebooks"
    finally:
        process.terminate()
        process.wait(timeout=60)


def answers(address: str) -> bool:
    with contextlib.suppress(urllib.error.URLError, ConnectionError):
        return urllib.request.urlopen(address, timeout=5).status == 200
    return False


def wait(ready, seconds: float, why=lambda: "nothing") -> None:
    until = time.time() + seconds
    while not ready():
        assert time.time() < until, why()
        time.sleep(0.5)


@contextlib.contextmanager
def opened(lab, name: str, parameters: dict, profile: Path):
    """Open a notebook with parameters in JupyterLab; yields the page when its kernel waits."""
    address, folder = lab
    notebook = parameterize_notebook(papermill.iorw.load_notebook_node(str(NOTEBOOKS / f"{name}.ipynb")), parameters)
    papermill.iorw.write_ipynb(notebook, str(folder / f"{name}.ipynb"))
    with chromium(profile) as page:
        page.call("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)
        page.call("Emulation.setFocusEmulationEnabled", enabled=True)  # JupyterLab runs what has the focus
        page.call("Page.navigate", url=f"{address}/lab/tree/{name}.ipynb")
        wait(lambda: page.run(IDLE), 120, page.complaints)
        yield page
        page.run(f"{WIDGET}.sessionContext.shutdown().then(() => 1)")


def run_all(page) -> None:
    page.run("window.ran = false; "
             "jupyterapp.commands.execute('notebook:run-all-cells').then(() => window.ran = true); 1")  # fmt: skip


def outputs(page) -> list[dict]:
    """Return what all cells have printed, shown and raised."""
    script = f"""JSON.stringify([...Array({WIDGET}.content.model.cells.length).keys()]
        .map((i) => {WIDGET}.content.model.cells.get(i).toJSON()).flatMap((cell) => cell.outputs || []))"""
    return json.loads(page.run(script))


def errors(page) -> list[str]:
    return [f"{o['ename']}: {o['evalue']}" for o in outputs(page) if o["output_type"] == "error"]


@pytest.mark.parametrize(
    ("name", "controls"),
    [("01_teacher_setup", 3), ("02_layer_selection", 2), ("03_kd_pl_sft", 5), ("04_miniend", 1),
     ("05_scaling_3b", 0), ("distill", 0)],
)  # fmt: skip
def test_run_all_shows_no_error_and_every_control_changes_what_it_draws(lab, tmp_path, name, controls):
    parameters = read_profile("smoke", NOTEBOOKS)[name]
    with opened(lab, name, parameters, tmp_path / "profile") as page:
        run_all(page)
        wait(lambda: page.run("window.ran") or errors(page), 900, lambda: str(outputs(page)[-1])[:2000])
        assert errors(page) == []
        boxes = "[...document.querySelectorAll('.widget-interact')]"
        wait(lambda: page.run(f"{boxes}.length") >= controls, 60)
        assert page.run(f"{boxes}.length") == controls
        for number in range(controls):
            box = f"{boxes}[{number}]"
            wait(lambda: page.run(IDLE), 60)
            time.sleep(2)  # what the last control drew has arrived
            seen = page.run(f"{box}.querySelector('.jp-OutputArea')?.innerHTML || ''")
            turned = page.run(f"({TURN})({box})")
            changed = f"({box}.querySelector('.jp-OutputArea')?.innerHTML || '')"
            wait(lambda: page.run(changed) not in ("", seen), 90, lambda: f"{turned} of control {number}")  # noqa: B023
            assert "Traceback" not in page.run(changed)


def test_an_interrupted_cell_goes_on_where_it_stopped(lab, tmp_path):
    parameters = read_profile("smoke", NOTEBOOKS)["03_kd_pl_sft"]
    parameters |= {"methods": ["sft"], "ablation_list": [], "max_steps": 400, "seeds": [7], "num_decoding": 2}
    made = Path(os.environ["DISTILL_RUNS"])
    with opened(lab, "03_kd_pl_sft", parameters, tmp_path / "profile") as page:
        run_all(page)
        wait(lambda: any(_steps(folder) > 30 for folder in made.glob("sft-6-1-s7-*")), 600, lambda: errors(page))
        page.run("jupyterapp.commands.execute('notebook:interrupt-kernel'); 1")
        wait(lambda: page.run("window.ran"), 120)
        assert errors(page) and errors(page)[0].startswith("KeyboardInterrupt")
        stopped = max(_steps(folder) for folder in made.glob("sft-6-1-s7-*"))
        run_all(page)
        wait(lambda: page.run("window.ran"), 900)
        assert errors(page) == []
        printed = "".join("".join(o["text"]) for o in outputs(page) if o["output_type"] == "stream")
        # Progress is told now and then: the checkpoint may be a few updates later.
        assert any(stopped <= int(step) < 400 for step in re.findall(r"continuing from checkpoint-(\d+)", printed))


def _steps(folder: Path) -> int:
    """Return how many updates a run says it has made."""
    return read_json(folder / "progress.json").get("step", 0) if (folder / "progress.json").exists() else 0
