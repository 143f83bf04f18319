"""The runner: parameters rejected before anything runs, every way a notebook can fail, progress from inside a cell."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_notebooks import PARAMETERS, REPOSITORY, SAVE, code, command, environment, run_report, write_notebook

from distill_utils.__main__ import main
from distill_utils.artifacts import InputError, runs_dir, write_json
from distill_utils.report import batch, pages, settings

# --------------------------------------------------------------------------------------------------------- parameters


def test_parameters_cell_gives_type_default_and_help():
    parameters = settings.parse_parameters(PARAMETERS, "x")
    assert list(parameters) == ["method", "learning_rate", "shapes", "num_train", "verbose", "seed"]
    assert parameters["learning_rate"] == settings.Parameter("learning_rate", "float", 3e-4, "peak")
    assert parameters["shapes"].default == ["6-3"]
    assert parameters["shapes"].help == "student shapes, encoder-decoder"
    (hash_inside,) = settings.parse_parameters('name: str = "a # b"  # the help', "x").values()
    assert (hash_inside.default, hash_inside.help) == ("a # b", "the help")


@pytest.mark.parametrize(
    "source",
    [
        "num_train = 5",  # no annotation
        "num_train: int = 2 * 5",  # not a literal
        "num_train: int = 5.0",  # default of another type
        "layers: tuple = (0, 2)",  # papermill turns tuples into strings
        "import os",
        "num_train: int = (",
        "num_train: int",
    ],
)
def test_parameters_cell_is_rejected_when_it_cannot_be_trusted(source):
    with pytest.raises(InputError, match="parameters cell"):
        settings.parse_parameters(source, "x")


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("int", "7", 7),
        ("float", "1e-4", 1e-4),
        ("float", "3", 3.0),
        ("bool", "true", True),
        ("bool", "False", False),
        ("str", "1e-4", "1e-4"),
        ("list[int]", "[0, 2, 5]", [0, 2, 5]),
        ("list[int]", "0,2", [0, 2]),
        ("list[str]", "6-3,6-1", ["6-3", "6-1"]),
        ("list[str]", "['6-3']", ["6-3"]),
        ("list[float]", "[]", []),
        ("list[str]", '["a, b", "6-3 \\u00e9"]', ["a, b", "6-3 é"]),
        ("list[str]", "[1, 2]", ["1", "2"]),
        ("list[float]", "[1, 2.5]", [1.0, 2.5]),
    ],
)
def test_command_line_values_take_the_annotated_type(kind, text, value):
    parameter = settings.Parameter("p", kind, settings.ELEMENTS.get(kind, list)(), "")
    parsed = settings.parsed_text(parameter, text, "x")
    assert parsed == value and type(parsed) is type(value)
    if kind == "float":  # PyYAML reads 1e-4 as a string
        assert settings.checked_value(parameter, text, "x") == value


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("int", 3.0),
        ("int", "3"),
        ("int", True),
        ("float", True),
        ("float", "fast"),
        ("float", "nan"),
        ("float", float("inf")),
        ("bool", 1),
        ("str", 5),
        ("list[int]", "0,2"),
        ("list[int]", [0, "2"]),
    ],
)
def test_yaml_values_of_another_type_are_rejected(kind, value):
    with pytest.raises(InputError, match="p must be"):
        settings.checked_value(settings.Parameter("p", kind, settings.ELEMENTS.get(kind, list)(), ""), value, "x")


# ----------------------------------------------------------------------------------------------------- what was asked


@pytest.fixture
def notebooks(tmp_path):
    folder = tmp_path / "notebooks"
    write_notebook(folder, "01_setup", [code("1")])
    write_notebook(folder, "03_kd_pl_sft", [code("1")])
    write_notebook(folder, "04_other", [code("1")], "epochs: int = 1  # passes")
    (folder / "profiles").mkdir()
    return folder


def test_notebooks_are_found_and_profile_and_override_are_applied_in_this_order(notebooks):
    for name in ("3", "03", "03_kd_pl_sft", "03_kd_pl_sft.ipynb", str(notebooks / "03_kd_pl_sft.ipynb")):
        assert settings.find_notebook(name, notebooks).stem == "03_kd_pl_sft"
    (notebooks / "profiles" / "small.yaml").write_text("03_kd_pl_sft: {num_train: 10, learning_rate: 1e-4, seed: 1}\n")
    (plan,) = settings.make_plans(["03"], "small", ["seed=2"], notebooks)
    assert plan.changed == {"num_train": 10, "learning_rate": 1e-4, "seed": 2}
    assert plan.values["method"] == "kd" and plan.name == "small/03_kd_pl_sft"
    (plan,) = settings.make_plans([], "small", [], notebooks, every=True)  # those that the profile speaks of
    assert plan.path.stem == "03_kd_pl_sft"
    assert len(settings.make_plans([], "demo", [], notebooks, every=True)) == 3


def test_cron_gets_one_line_or_one_object(notebooks, tmp_path, monkeypatch, capsys):
    plans = settings.make_plans([], "demo", [], notebooks, every=True)

    def made(plan, reports):
        print("what a person would read")
        if plan.path.stem == "03_kd_pl_sft":
            raise batch.RunFailed(4, "the kernel died\nits last words")
        page = reports / f"{plan.name}.html"
        write_json(page.with_suffix(".json"), {"headline": f"**Take** {plan.path.stem}"})
        return page

    monkeypatch.setattr(batch, "make_report", made)
    (tmp_path / "reports").mkdir()
    assert batch.run_reports(plans, tmp_path / "reports", "quiet") == 4
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("2 reports made, 1 failed: 03_kd_pl_sft")
    assert batch.run_reports(plans, tmp_path / "reports", "json") == 4
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert [Path(row["page"]).stem for row in found["made"]] == ["01_setup", "04_other"]
    assert found["made"][0]["headline"] == "**Take** 01_setup" and found["exit_code"] == 4
    assert found["failed"] == {"03_kd_pl_sft": "its last words"} and "the kernel died" in told.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["07"], "unknown notebook '07'"),
        (["²"], "unknown notebook '²'"),
        (["03_kd_pl"], "did you mean '03_kd_pl_sft'"),
        (["03", "--profile", "dmo"], "unknown profile 'dmo': did you mean 'demo'?"),
        (["03", "-p", "num_trian=5"], "unknown parameter 'num_trian' of 03_kd_pl_sft: did you mean 'num_train'?"),
        (["03", "-p", "num_train=many"], "num_train must be int, got 'many'"),
        (["03", "-p", "num_train"], "write -p name=value"),
        (["01", "04", "-p", "num_train=5"], "unknown parameter 'num_train' of 04_other"),
        (["01", "--profile", "type"], "'type' has no settings for 01_setup"),
        (["03", "--profile", "typo"], "unknown parameter 'epoch' of 03_kd_pl_sft"),
        (["03", "--profile", "type"], "profile type, 03_kd_pl_sft: seed must be int, got 'x'"),
        (["03", "--profile", "stem"], "unknown notebook '3_kd_pl_sft': did you mean '03_kd_pl_sft'?"),
        (["03", "--profile", "list"], "profiles/list.yaml must map notebook stems to parameter names and values"),
        (["03", "--profile", "value"], "profiles/value.yaml must map notebook stems to parameter names and values"),
        (["03", "--profile", "broken"], "profiles/broken.yaml, line 1: not valid YAML"),
        (["--all", "03"], "exclude each other"),
        (["--all", "--workers", "0"], "workers 0"),
        ([], "no notebook to run"),
        (["03", "--output", f"{REPOSITORY}/README.md/below"], "README.md is not a writable folder"),
        (["03", "--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(notebooks, tmp_path, monkeypatch, capsys, arguments, said):
    profiles = {"typo": "03_kd_pl_sft: {epoch: 1}", "type": "03_kd_pl_sft: {seed: x}", "stem": "3_kd_pl_sft: {}"}
    profiles |= {"list": "[3]", "value": "03_kd_pl_sft: 3", "broken": "03_kd_pl_sft: {seed: 1"}
    for name, text in profiles.items():
        (notebooks / "profiles" / f"{name}.yaml").write_text(text)
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(batch, "run_reports", pytest.fail)
    try:
        code = main(["report", "--notebooks", str(notebooks), *arguments])
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    assert code == 2
    assert said in captured.err and captured.err.count("\n") == 1
    assert not list((tmp_path / "runs").glob("*"))


def test_list_prints_parameters_and_runs_and_corpus_lie_where_one_types(notebooks, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTILL_RUNS", "mine")
    monkeypatch.setenv("DISTILL_CORPUS", "corpus")
    assert main(["report", "--list", "--notebooks", str(notebooks)]) == 0
    text = capsys.readouterr().out
    assert "03_kd_pl_sft  A title" in text and "num_train: int = 100" in text and "documents, 0 = all" in text
    monkeypatch.chdir(notebooks)  # where a kernel runs
    assert runs_dir() == tmp_path / "mine" and os.environ["DISTILL_CORPUS"] == str(tmp_path / "corpus")


def test_import_is_light():
    """The first line has to appear at once, so nothing heavy loads with the command line."""
    heavy = "('torch', 'papermill', 'matplotlib')"
    script = f"import distill_utils.__main__, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------ the runner for real


ENDS = {  # code cells, exit code, how its lines begin
    "input error": (
        ["class InputError(ValueError): pass\nraise InputError('decoder_layers 9 is above 6: lower it')"],
        batch.BAD_INPUT, "decoder_layers 9 is above 6: lower it\n",
    ),
    "no results": (["import sys\nsys.exit(0)"], batch.NO_RESULTS, "03_x ended without results.json"),
    "dead kernel": (
        ["1", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "2"],
        batch.KERNEL_DIED, "03_x: the kernel died in code cell 3 of 5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_a_notebook_that_does_not_finish_has_its_exit_code_and_no_page(tmp_path, name):
    cells, exit_code, said = ENDS[name]
    write_notebook(tmp_path / "notebooks", "03_x", [*map(code, cells), code(SAVE)])
    (plan,) = settings.make_plans(["03"], "demo", [], tmp_path / "notebooks")
    asked = {"notebook": "03_x", "parameters": plan.values}
    stale = tmp_path / "runs" / f"reports-03_x-demo-{batch.config_hash(asked)}" / "results.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    done = run_report(tmp_path, "03")
    assert done.returncode == exit_code and done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1 or name == "dead kernel"
    assert not stale.exists() and not (tmp_path / "reports").exists()


def test_a_failing_notebook_does_not_stop_the_next_and_gives_the_code(tmp_path):
    folder = tmp_path / "notebooks"
    write_notebook(folder, "01_raises", [code("print(1)"), code("def f(x):\n    return 1 / x\n\nf(0)"), code(SAVE)])
    check = f"import sys, os\nassert sys.executable == {sys.executable!r}\nassert os.getcwd() == {str(folder)!r}\n"
    check += "assert os.environ['TQDM_DISABLE'] == '1'\nassert num_train == 7 and learning_rate == 1e-3"
    write_notebook(folder, "02_works", [code(check), code(SAVE)])
    done = run_report(tmp_path, "01", "02", "-p", "num_train=7", "-p", "learning_rate=1e-3")
    assert done.returncode == 1
    assert "01_raises: code cell 3 of 4 raised ZeroDivisionError" in done.stderr
    assert done.stderr.rstrip().splitlines()[-2].strip() == "ZeroDivisionError: division by zero"
    assert {path.stem for path in (tmp_path / "reports").iterdir()} == {"02_works", "history", "index", "results"}
    changed = json.loads((tmp_path / "reports/02_works.json").read_text())["changed"]
    assert changed == {"num_train": 7, "learning_rate": 1e-3}


def test_progress_from_inside_a_cell_and_interrupt(tmp_path):
    train = """import time
from distill_utils import artifacts
folder = artifacts.runs_dir() / "kd-abc"
folder.mkdir(parents=True)
artifacts.report_progress(folder, "kd 6-3", 289, 1000)
time.sleep(1.0)
artifacts.report_progress(folder, "kd 6-3", 320, 1000)
time.sleep(300)"""
    write_notebook(tmp_path / "notebooks", "03_x", [code(train), code(SAVE)])
    write_notebook(tmp_path / "notebooks", "04_never", [code(SAVE)])
    process = subprocess.Popen(
        command(tmp_path, "--all"), cwd=REPOSITORY, env=environment(tmp_path), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
        # A shell lets what it starts in the background ignore Ctrl-C, and these tests may be started so.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout.readline().startswith("03_x  profile demo")
    # before it, a slow machine may show the start of the kernel
    line = next(line for line in process.stdout if "kd 6-3" in line)
    assert line.startswith("03_x  cell 2/3  kd 6-3  steps ")
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 130
    assert errors.count("\n") == 1 and "stopped" in errors
    assert not (tmp_path / "reports").exists()


# ----------------------------------------------------------------------------------------------------------- progress


def test_progress_of_earlier_cells_is_not_shown(tmp_path):
    assert batch.latest_progress(tmp_path, 0) is None
    (tmp_path / "progress.json").write_text(json.dumps({"stage": "kd", "time": 100.0}))
    assert batch.latest_progress(tmp_path, 99.0)["stage"] == "kd"
    assert batch.latest_progress(tmp_path, 101.0) is None


def test_a_terminal_gets_one_rewritten_line(monkeypatch, tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(batch, "latest_progress", lambda *_: None)
    with batch.live_progress("03_x", tmp_path):
        deadline = time.monotonic() + 20
        while "starting" not in terminal.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)
    text = terminal.getvalue()
    assert text.startswith("\r\x1b[K03_x  starting") and text.endswith("\r\x1b[K") and "\n" not in text


# ------------------------------------------------------------------------------------------------------------ sweeps


def write_grid(folder: Path, text: str) -> Path:
    (folder / "grid.yaml").write_text(text)
    return folder / "grid.yaml"


GRID = "notebook: 1\nfixed: {num_train: 5}\ngrid: {seed: [0, 1], shapes: [[6-3], [6-1, 3-1]]}"


def test_a_grid_is_every_combination_in_order(notebooks, tmp_path):
    plans = settings.read_grid(write_grid(tmp_path, GRID), notebooks)
    wanted = list(itertools.product([0, 1], [["6-3"], ["6-1", "3-1"]]))
    assert [(plan.values["seed"], plan.values["shapes"]) for plan in plans] == wanted
    assert all(plan.values["num_train"] == 5 and plan.values["method"] == "kd" for plan in plans)
    assert len({plan.name for plan in plans}) == 4 and all(plan.name.count("/") == 1 for plan in plans)


def test_long_combinations_have_names_of_their_own_and_strings_keep_their_commas(notebooks, tmp_path):
    shapes = ["a{'b': [0.5, 2.0]}" * 8]
    grid = write_grid(tmp_path, f"notebook: 1\ngrid: {{shapes: [{shapes}], seed: [0, 1]}}")
    plans = settings.read_grid(grid, notebooks)
    assert [plan.values["shapes"] for plan in plans] == [shapes, shapes]
    assert len({plan.name for plan in plans}) == 2 and all(len(plan.profile) <= settings.MAX_NAME for plan in plans)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("notebook: 1\ngrid: {}", "the grid is empty"),
        ("notebook: 1\ngrid: {seed: []}", "the grid is empty"),
        ("notebook: 1\ngrid: {seeds: [1]}", "unknown parameter 'seeds'"),
        ("notebook: 1\ngrid: {seed: [a]}", "seed must be int"),
        ("notebook: 1\ngrid: {seed: [1, 1]}", "two combinations are equal"),
        ("notebook: 1\nfixed: {seed: 1}\ngrid: {seed: [1]}", "in the grid and fixed"),
        ("notebook: 9\ngrid: {seed: [1]}", "unknown notebook"),
        ("grid: {seed: [1]}", "is not a grid"),
        ("notebook: [", "not a readable YAML"),
        ("notebook: 1\nprofile: 200\ngrid: {seed: [1]}", "unknown profile '200'"),
        (f"notebook: 1\ngrid: {{seed: {list(range(1001))}}}", "1,001 combinations"),
    ],
)
def test_a_bad_grid_is_rejected_before_anything_runs(notebooks, tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        settings.read_grid(write_grid(tmp_path, text), notebooks)


def test_relative_paths_of_lists_count_from_where_one_types(notebooks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data/set").mkdir(parents=True)
    (plan,) = settings.make_plans(["1"], "demo", ["shapes=data/set,6-3,data/none", "method=./data/set"], notebooks)
    first, *others = plan.values["shapes"]
    assert others == ["6-3", "data/none"] and plan.values["method"] == first
    assert (plan.path.parent / first).samefile(tmp_path / "data" / "set")
    Path("mine.csv").touch()
    Path("pydocs").touch()  # no file of data: a name
    (plan,) = settings.make_plans(["1"], "demo", ["shapes=pydocs,none.csv", "method=mine.csv"], notebooks)
    assert (plan.path.parent / plan.values["method"]).samefile("mine.csv")
    assert plan.values["shapes"] == ["pydocs", "none.csv"]
    write_notebook(notebooks, "05_data", [code("1")], 'teacher: str = ""\ndataset: str = ""\nmethod: str = ""')
    Path("mine").mkdir()
    Path("mine/config.json").touch()
    bare = [f"{name}={folder}" for name, folder in (("teacher", "mine"), ("dataset", "data"), ("method", "mine"))]
    (plan,) = settings.make_plans(["5"], "demo", bare, notebooks)  # folders of models and data need no slash
    assert list(plan.values.values()) == [*(os.path.relpath(name, notebooks) for name in ("mine", "data")), "mine"]
    (plan,) = settings.make_plans(["5"], "demo", ["teacher=data", "dataset=pydocs"], notebooks)
    assert plan.values["teacher"] == "data" and plan.values["dataset"] == "pydocs"


def test_a_sweep_goes_on_with_what_is_not_finished(notebooks, tmp_path, monkeypatch, capsys):
    grid = GRID.replace("5}", f"5, method: {Path.home()}/model}}")  # of which a page names no folder of this machine
    plans, ran = settings.read_grid(write_grid(tmp_path, grid), notebooks), []
    broken = {plans[1].name}

    def make(plan, reports):
        ran.append(plan.name)
        if plan.name in broken:
            raise batch.RunFailed(batch.KERNEL_DIED, "many lines\n  the last of them")
        page = reports / f"{plan.name}.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text("page")
        kept = pages.cleaned(plan.values, pages.scrubber(plan.path.parent))
        page.with_suffix(".json").write_text(json.dumps({"parameters": kept}))
        return page

    monkeypatch.setattr(batch, "make_report", make)
    assert batch.run_sweep(plans, tmp_path / "out") == batch.KERNEL_DIED
    assert ran == [plan.name for plan in plans]
    assert f"failed: {plans[1].name}: the last of them" in capsys.readouterr().err
    broken.clear()
    ran.clear()
    assert batch.run_sweep(plans, tmp_path / "out") == batch.OK and ran == [plans[1].name]
    with pytest.raises(InputError, match="workers 0 is too small"):
        batch.run_sweep(plans, tmp_path / "out", workers=0)
    with pytest.raises(InputError, match="cannot write"):  # before anything runs
        batch.run_sweep(plans, tmp_path / "grid.yaml" / "out")
    for left in ('{"parameters": {}}', "{", "[]"):  # of a notebook from before; damaged
        (tmp_path / "out" / f"{plans[2].name}.json").write_text(left)
        ran.clear()
        assert batch.run_sweep(plans, tmp_path / "out") == batch.OK and ran == [plans[2].name]


def test_workers_of_a_sweep_make_its_pages_and_one_index(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))
    cells = [code("assert seed != 1"), code(SAVE)]
    write_notebook(tmp_path / "notebooks", "01_first", cells)
    plans = settings.read_grid(write_grid(tmp_path, "notebook: 1\ngrid: {seed: [0, 1, 2]}"), tmp_path / "notebooks")
    assert batch.run_sweep(plans, tmp_path / "out", workers=3) == batch.NOTEBOOK_RAISED
    said = capsys.readouterr()
    assert "3 of 3" in said.out and "01_first: code cell 2 of 3 raised AssertionError" in said.err
    index = (tmp_path / "out" / "index.html").read_text()
    assert [f"seed%3D{seed}/01_first.html" in index for seed in range(3)] == [True, False, True]
    assert len((tmp_path / "out" / "history.csv").read_text().splitlines()) == 1 + 2
