"""The files that describe the environment agree with each other, and the package keeps to its floors."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from distill_utils.data import pydocs

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "distill_utils"
PYTHONS = ("3.11.0", "3.12.0", "3.13.0")
SYSTEMS = {"linux": "Linux", "darwin": "Darwin"}

# A folder imports only from folders on lower floors, or from itself (DESIGN, section 2). "" is the root.
FLOORS = {
    "": 1, "report": 2, "data": 2, "models": 2, "training": 2, "evaluation": 3, "distillation": 4, "planning": 5,
    "experiments": 6, "__main__": 7,
}  # fmt: skip
# Heavy or special packages, and the only files that may import them.
ONLY_IN = {
    "ipywidgets": {"widgets"},
    "matplotlib": {"figures", "style"},
    "adjustText": {"style"},
    "seaborn": {"figures", "style"},
    "papermill": {"batch"},
    "nbconvert": {"pages"},
    "nbformat": {"batch", "settings"},
    "nbclient": {"batch"},
    "submitit": {"workers"},
}


def lock_lines() -> list[str]:
    lines = (REPOSITORY / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def lock() -> dict[str, Requirement]:
    return {canonicalize_name(pin.name): pin for pin in map(Requirement, lock_lines())}


def project() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


def requirements() -> list[Requirement]:
    """Everything that pyproject.toml asks for: to run, to test, to build."""
    table = project()
    extras = [line for lines in table["project"]["optional-dependencies"].values() for line in lines]
    lines = [*table["project"]["dependencies"], *extras, *table["build-system"]["requires"]]
    return [Requirement(line) for line in lines]


def environments() -> list[dict[str, str]]:
    """The marker environments that the lock has to serve."""
    return [
        {
            "python_version": python.rpartition(".")[0],
            "python_full_version": python,
            "sys_platform": platform,
            "platform_system": system,
            "platform_machine": "arm64" if system == "Darwin" else "x86_64",
            "platform_python_implementation": "CPython",
            "implementation_name": "cpython",
            "os_name": "posix",
        }
        for python in PYTHONS
        for platform, system in SYSTEMS.items()
    ]


def needs(environment: dict[str, str]) -> list[tuple[str, Requirement]]:
    """Return (who asks, requirement) for pyproject.toml and what the installed packages need in turn, with extras."""
    found, done = [("pyproject.toml", requirement) for requirement in requirements()], set()
    frontier = [(canonicalize_name(r.name), extra) for _, r in found for extra in ("", *r.extras)]
    while frontier:
        name, extra = frontier.pop()
        if (name, extra) in done:
            continue
        done.add((name, extra))
        try:
            lines = importlib.metadata.distribution(name).requires or []
        except importlib.metadata.PackageNotFoundError:  # for another Python or system
            continue
        for requirement in map(Requirement, lines):
            other = canonicalize_name(requirement.name)
            if requirement.marker and not requirement.marker.evaluate({**environment, "extra": extra}):
                continue
            if name == "torch" and re.match(r"nvidia|cuda|triton", other):
                continue  # these follow torch's wheel
            found.append((name, requirement))
            frontier += [(other, each) for each in ("", *requirement.extras)]
    return found


def imports(path: Path) -> set[str]:
    """Full names of everything a file imports, also inside functions: `from a import b` gives a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}, line {node.lineno}: write the full name instead of a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def package_files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


# ---------------------------------------------------------------------------------------------------------- the lock


def test_lock_holds_plain_exact_pins():
    for line in lock_lines():
        plain = re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*( ; .+)?", line)
        assert plain, f"{line!r} is no plain pin `name==version ; marker`"
    names = [line.partition("==")[0] for line in lock_lines()]
    assert names == sorted(set(names)), "sort the pins, and pin nothing twice"
    assert not [name for name in names if re.match(r"nvidia|cuda|triton|distill", name)], "torch itself asks for these"


@pytest.mark.parametrize("environment", environments(), ids=lambda e: f"{e['python_version']}-{e['sys_platform']}")
def test_lock_is_complete(environment):
    """Each package has its dependencies pinned within its ranges, and nothing is pinned that nobody asks for."""
    pins = {name: pin for name, pin in lock().items() if pin.marker is None or pin.marker.evaluate(environment)}
    asked = set()
    for by, requirement in needs(environment):
        name = canonicalize_name(requirement.name)
        asked.add(name)
        assert name in pins, f"{by} needs {requirement}, which requirements.lock does not give here"
        (pin,) = pins[name].specifier
        fits = requirement.specifier.contains(pin.version, prereleases=True)
        assert fits, f"{by} needs {requirement}, requirements.lock has {pins[name]}"
    # A package with a marker may not be installed here, and then what it needs in turn cannot be read.
    unasked = [name for name, pin in pins.items() if name not in asked and pin.marker is None]
    assert not unasked, f"nothing needs {unasked}: remove them from requirements.lock"


def test_pins_allow_every_python():
    for distribution in importlib.metadata.distributions():
        pin, allowed = lock().get(canonicalize_name(distribution.name)), distribution.metadata.get("Requires-Python")
        if pin and allowed and pin.specifier.contains(distribution.version):  # else the pinned one's range is unknown
            fits = all(SpecifierSet(allowed).contains(python) for python in PYTHONS)
            assert fits, f"{distribution.name} {distribution.version} needs Python {allowed}"


def test_python_range_is_the_same_everywhere():
    allowed = SpecifierSet(project()["project"]["requires-python"])
    assert all(allowed.contains(version) for version in PYTHONS)
    assert not allowed.contains("3.10.14") and not allowed.contains("3.14.0")
    assert "(3, 11) <= sys.version_info[:2] <= (3, 13)" in (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    conda = yaml.safe_load((REPOSITORY / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    python, *others = conda
    assert python.startswith("python=") and allowed.contains(python.partition("=")[2] + ".0")
    assert others == ["pip", {"pip": ["-r requirements.lock", "-e ."]}], "versions stand in requirements.lock only"


# -------------------------------------------------------------------------------------------------------- the corpus


def test_corpus_packages_are_pinned_everywhere():
    """Only then is the corpus the same on each Python and system."""
    everywhere = {name for name, pin in lock().items() if pin.marker is None}
    missing = {canonicalize_name(name) for names in pydocs.FAMILIES.values() for name in names} - everywhere
    assert not missing, f"{missing} are not pinned for every Python and system: take them out of pydocs.FAMILIES"


# ------------------------------------------------------------------------------------------------------- the package


def room_of(name: str) -> str:
    """Return the folder of an imported name such as `distill_utils.data.loading`; "" for a file in the root."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and (PACKAGE / parts[1]).is_dir() else ""


@pytest.mark.parametrize("path", package_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_from_lower_floors(path):
    own = path.stem if path.stem == "__main__" else room_of(f"distill_utils.{path.relative_to(PACKAGE).parts[0]}")
    for name in imports(path):
        if name.split(".")[0] == "distill_utils":
            room = room_of(name)
            message = f"{path.relative_to(PACKAGE)} (floor {FLOORS[own]}) imports {name} (floor {FLOORS[room]})"
            assert room == own or FLOORS[room] < FLOORS[own], f"{message}: import from below only"


def test_imported_packages_are_declared_and_special_ones_stay_in_their_files():
    """Nothing works only because another package happens to bring it."""
    table = project()["project"]
    lines = [*table["dependencies"], *table["optional-dependencies"]["slurm"]]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    providers = importlib.metadata.packages_distributions()
    for path in package_files():
        roots = {name.partition(".")[0] for name in imports(path)}
        for root in roots - sys.stdlib_module_names - {"distill_utils"}:
            found = {canonicalize_name(name) for name in providers.get(root, [])}
            assert found & declared, f"{path.name} imports {root}: add {sorted(found) or root} to pyproject.toml"
            files = ONLY_IN.get(root, {path.stem})
            assert path.stem in files, f"{path.name} imports {root}: only {sorted(files)} may"


def test_public_names_load_on_use():
    """Importing the package is instant; each of its names leads to what its module holds."""
    script = """
import sys, time
start = time.perf_counter()
import distill_utils
assert time.perf_counter() - start < 0.3 and "torch" not in sys.modules
assert {"kd", "load_pairs", "init_student"} <= set(dir(distill_utils)) and not hasattr(distill_utils, "nothing")
print(*{type(getattr(distill_utils, name)).__name__ for name in distill_utils.__all__})
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and set(done.stdout.split()) == {"str", "type", "function"}, done.stdout + done.stderr


@pytest.mark.slow
def test_wheel_holds_what_the_package_needs(tmp_path):
    """Build it from a copy, unpack it, and use it from there, outside the checkout."""
    source, unpacked = tmp_path / "source", tmp_path / "unpacked"
    shutil.copytree(PACKAGE, source / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path]
    done = subprocess.run([*command, source], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(unpacked)
    expected = {path.relative_to(source) for path in (source / PACKAGE.name).rglob("*") if path.is_file()}
    found = {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()}
    assert expected - found == set() and any(path.suffix == ".css" for path in found)
    script = (
        "import distill_utils, distill_utils.__main__ as main; print(distill_utils.__file__); main.main(['--help'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    del environment["DISTILL_RUNS"]
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(str(unpacked)), done.stdout + done.stderr
    text = "Return the mean of an array along an axis. The axis is an integer or a tuple of integers.\n"
    for arguments in (["list"], ["export", "pydocs-t5-tiny", "mine"], ["summarize", "-", "--model", "mine"]):
        command = [sys.executable, "-m", "distill_utils", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, input=text, capture_output=True, text=True)
        assert done.returncode == 0 and len(done.stdout.splitlines()) in (1, 2), done.stdout + done.stderr
    assert (tmp_path / "runs").is_dir() and not (unpacked / "runs").exists()


# -------------------------------------------------------------------------------------------------- the other files


TARGETS = {
    "help": "make reports",
    "reports": "-m distill_utils report --all",
    "test": '-m "not slow"',
    "test-all": "-m pytest",
    "bench": "benchmarks/$suite.py",
    "lab": "-m jupyterlab notebooks",
    "teachers": "-m distill_utils teachers",
}


@pytest.mark.parametrize("target", TARGETS)
def test_makefile_targets_parse(target):
    """A dry run; an environment that is up to date is taken as given."""
    command = ["make", "--dry-run", "--old-file=.venv/installed.lock", target]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert TARGETS[target] in done.stdout


def test_readme_has_its_markers_and_links_lead_somewhere():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert text.count("<!-- results:start -->") == text.count("<!-- results:end -->") == 1
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (REPOSITORY / target).exists(), f"README.md links to {target}, which does not exist"
