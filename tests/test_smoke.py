"""Every notebook in its smoke profile, by the same command that makes the reports."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from distill_utils.artifacts import read_json
from distill_utils.data import loading

pytestmark = pytest.mark.usefixtures("corpus")
REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(path.stem for path in (REPOSITORY / "notebooks").glob("*.ipynb"))
QUICK = ("01_teacher_setup", "03_kd_pl_sft")  # `make test` runs the data's and the methods', `make test-all` all


@pytest.mark.parametrize(
    "notebook", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NOTEBOOKS]
)
def test_smoke_profile_makes_a_report(notebook, tmp_path):
    command = [sys.executable, "-m", "distill_utils", "report", notebook, "--profile", "smoke", "--output", tmp_path]
    # Teacher and students of the notebooks before are reused, as a user's are.
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    page = BeautifulSoup((tmp_path / "smoke" / f"{notebook}.html").read_text(encoding="utf-8"), "html.parser")
    assert len(page.find_all("h1")) == 1 and "Smoke run" in page.get_text()
    assert all(picture.get("alt") or picture.get("aria-label") for picture in page.find_all(["img", "svg"]))
    results = read_json(tmp_path / "smoke" / f"{notebook}.json")
    assert results["rows"] and all("method" in row for row in results["rows"])
    measured = [{name, f"{name}_low", f"{name}_high"} for name in ("rouge2", "loss")]  # not every row has the same
    assert any(names <= row.keys() for names in measured for row in results["rows"])
    with open(tmp_path / "results.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(results["rows"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student_shapes=6-0", "is 0"),
        ("student_shapes=6-7", "is 7"),
        ("dataset=no-such-data.jsonl", "does not exist"),
        ("teacher=./no-such-folder", "no model folder"),
    ],
)
def test_bad_input_of_a_notebook_ends_in_one_line_before_training(override, message, tmp_path):
    command = [sys.executable, "-m", "distill_utils", "report", "03", "--profile", "smoke", "-p", override]
    done = subprocess.run([*command, "--output", tmp_path], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and message in done.stderr, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.html"))


@pytest.mark.slow
def test_from_a_file_and_a_pretrained_model_to_a_teacher_and_its_students(tmp_path):
    rows = loading.load_pairs("pydocs", "test", 160).select_columns(["document", "summary"])
    rows.to_csv(tmp_path / "articles.csv")
    common = ["--profile", "smoke", "-p", f"dataset={tmp_path / 'articles.csv'}", "--output", tmp_path]
    start = ["01", "-p", "teacher=pydocs-bart-base", "-p", "train_teacher=true"]
    start += ["-p", "max_steps=12", "-p", "warmup_steps=1"]
    light = ["-p", 'methods=["sft"]', "-p", "ablation_list=[]", "-p", "beams=[1]"]
    for arguments in (start, ["03", "-p", "teacher=sft-6-6-articles-s0", *light]):
        command = [sys.executable, "-m", "distill_utils", "report", *arguments, *common]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    taught, students = (read_json(path) for path in sorted((tmp_path / "smoke").glob("*.json")))
    # The teacher of the second page is the one that the first made.
    assert taught["rows"][0]["rouge2"] == students["rows"][0]["rouge2"]
    assert taught["rows"][0]["parameters_m"] == students["rows"][0]["parameters_m"]
