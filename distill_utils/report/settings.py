"""The request of a batch run, checked before anything runs: parameters cells, profiles, overrides.

Out of scope: running it (batch.py).
"""

import ast
import contextlib
import difflib
import itertools
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distill_utils.artifacts import REPOSITORY, InputError, config_hash
from distill_utils.report import pages

NOTEBOOKS = REPOSITORY / "notebooks"
DEFAULT_PROFILE = "demo"
GRID_KEYS = ("notebook", "profile", "fixed", "grid")
MAX_RUNS = 1000  # more is a mistake in the grid
MAX_NAME = 120  # characters of a sweep's folder; longer ones end in a hash


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell: `name: type = default  # help`."""

    name: str
    type: str
    default: object
    help: str


ELEMENTS = {"int": int, "float": float, "bool": bool, "str": str}
TYPES = (*ELEMENTS, "list[int]", "list[float]", "list[str]")


def notebook_parameters(path: Path) -> dict[str, Parameter]:
    """Read the parameters cell of a notebook without running it; InputError when it cannot be trusted."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = type(error).__name__
        raise InputError(f"{path.name} is not a readable notebook ({reason}): restore it from git") from error
    tagged = [cell for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise InputError(f"{path.name} has {len(tagged)} cells tagged 'parameters': it needs exactly one")
    return parse_parameters("".join(tagged[0]["source"]), path.name)


def parse_parameters(source: str, where: str) -> dict[str, Parameter]:
    """Parse annotated literals with trailing comments; nothing is executed."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise InputError(f"{where}: the parameters cell does not parse, line {error.lineno}: {error.msg}") from error
    lines, parameters = source.encode().splitlines(), {}  # ast counts bytes
    for node in tree.body:
        comment = lines[node.end_lineno - 1][node.end_col_offset :].decode().lstrip("# ").strip()
        try:
            name, kind = node.target.id, ast.unparse(node.annotation)
            parameter = Parameter(name, kind, ast.literal_eval(node.value), comment)
            if kind not in TYPES:
                raise ValueError(kind)
            parameters[name] = replace(parameter, default=checked_value(parameter, parameter.default, where))
        except (AttributeError, TypeError, ValueError):
            raise InputError(
                f"{where}: parameters cell, line {node.lineno}: {ast.unparse(node).splitlines()[0]!r} is not "
                f"`name: type = literal  # help` with a value of its type, one of {', '.join(TYPES)}"
            ) from None
    return parameters


def checked_value(parameter: Parameter, value: object, where: str) -> object:
    """Return a YAML or Python value as the parameter's type; InputError when it does not fit.

    An int is taken for a float. So is a string that reads as a number: YAML 1.1 calls 1e-4 a string.
    """
    is_list, element = parameter.type.startswith("list["), _element_type(parameter)
    values = value if is_list else [value]
    fits = isinstance(values, list)
    if fits and element is float:
        with contextlib.suppress(ValueError, OverflowError):
            values = [float(item) if type(item) in (int, str) else item for item in values]
    if not fits or any(type(item) is not element or (element is float and not math.isfinite(item)) for item in values):
        raise InputError(
            f"{where}: {parameter.name} must be {parameter.type}, got {value!r} ({type(value).__name__}); "
            f"write for example {parameter.name}={as_text(parameter.default)}"
        )
    return values if is_list else values[0]


def parsed_text(parameter: Parameter, text: str, where: str) -> object:
    """Read a command-line value as the parameter's type. Lists: `6,3` or `[6, 3]`."""
    if parameter.type == "str":
        return text
    element = _element_type(parameter)

    def converted(item: str) -> object:
        with contextlib.suppress(KeyError, ValueError):
            return {"true": True, "false": False}[item.lower()] if element is bool else element(item)
        return item  # rejected below, as it was typed

    if not parameter.type.startswith("list["):
        return checked_value(parameter, converted(text.strip()), where)
    with contextlib.suppress(ValueError):  # as `as_text` writes it: strings may hold commas
        found = json.loads(text)
        if isinstance(found, list) and (element is not str or all(isinstance(item, str) for item in found)):
            return checked_value(parameter, found, where)
    inner = text.strip().removeprefix("[").removesuffix("]").strip()
    items = [item.strip(" '\"") for item in inner.split(",")] if inner else []
    return checked_value(parameter, [converted(item) for item in items], where)


def _element_type(parameter: Parameter) -> type:
    return ELEMENTS[parameter.type.removeprefix("list[").removesuffix("]")]


def as_text(value: object) -> str:
    """Write a value as the command line takes it."""
    return json.dumps(value) if isinstance(value, list | bool) else str(value)


def closest(name: str, known: Sequence[str]) -> str:
    """Return the fix for an unknown name: the nearest known one, else all of them."""
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"


# -------------------------------------------------------------------------------------------- what was asked, checked


@dataclass(frozen=True)
class Plan:
    """One notebook to run: every parameter's value, and those that differ from the defaults."""

    path: Path
    profile: str
    values: dict[str, object]
    changed: dict[str, object]

    @property
    def name(self) -> str:
        """Path of the page below the reports folder, without suffix."""
        return self.path.stem if self.profile == DEFAULT_PROFILE else f"{self.profile}/{self.path.stem}"


def find_notebook(name: str, folder: Path) -> Path:
    """Find a notebook by number (3 or 03), stem or path."""
    known = _stems(folder)
    if name.isdecimal():
        numbered = [stem for stem in known if re.match(rf"0*{int(name)}_", stem)]
        name = numbered[0] if len(numbered) == 1 else name
    for path in (folder / f"{name}.ipynb", folder / name, Path(name)):
        if path.suffix == ".ipynb" and path.is_file():
            return path.resolve()
    raise InputError(f"unknown notebook {name!r}: {closest(Path(name).stem, known)}")


def _stems(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.ipynb"))


def read_profile(name: str, folder: Path) -> dict[str, dict]:
    """Read profiles/NAME.yaml: parameters by notebook stem."""
    import yaml

    path = folder / "profiles" / f"{name}.yaml"
    known = sorted({DEFAULT_PROFILE, *(file.stem for file in path.parent.glob("*.yaml"))})
    if name not in known:
        raise InputError(f"unknown profile {name!r}: {closest(name, known)}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        raise InputError(f"profiles/{path.name}, line {line}: not valid YAML; fix that line") from error
    content = {} if content is None else content
    if not isinstance(content, dict) or not all(isinstance(values, dict | None) for values in content.values()):
        raise InputError(f"profiles/{path.name} must map notebook stems to parameter names and values")
    for stem in content:
        if stem not in _stems(folder):
            raise InputError(f"profiles/{path.name}: unknown notebook {stem!r}: {closest(str(stem), _stems(folder))}")
    return {stem: values or {} for stem, values in content.items()}


def make_plans(
    names: Sequence[str], profile: str, overrides: Sequence[str], folder: Path = NOTEBOOKS, every: bool = False
) -> list[Plan]:
    """Check notebooks, profile and `name=value` overrides; InputError before anything runs.

    An override must be a parameter of each notebook named. With `every`, all numbered notebooks in the profile:
    the others have commands of their own.
    """
    settings = read_profile(profile, folder)
    if profile == DEFAULT_PROFILE:
        settings = {stem: {} for stem in _stems(folder)} | settings
    if every:
        names = [stem for stem in _stems(folder) if stem in settings and stem[0].isdigit()]
    if not names:
        raise InputError("no notebook to run: name one (03), or use --all")
    plans = []
    for path in dict.fromkeys(find_notebook(name, folder) for name in names):
        parameters = notebook_parameters(path)
        values = {name: parameter.default for name, parameter in parameters.items()}
        if profile != DEFAULT_PROFILE and path.stem not in settings:
            raise InputError(f"profile {profile!r} has no settings for {path.stem}: add it to profiles/{profile}.yaml")
        for name, value in settings.get(path.stem, {}).items():
            values[name] = checked_value(_known(name, parameters, path), value, f"profile {profile}, {path.stem}")
        for override in overrides:
            name, equals, text = override.partition("=")
            if not equals:
                raise InputError(f"-p {override!r} has no value: write -p name=value")
            value = parsed_text(_known(name, parameters, path), text, path.stem)
            values[name] = _seen_from(path.parent, name, value)
        changed = {name: value for name, value in values.items() if value != parameters[name].default}
        plans.append(Plan(path, profile, values, changed))
    return plans


def _seen_from(folder: Path, name: str, value: object) -> object:
    """Return relative paths that exist where the user typed them as the notebook, run in its own folder, sees them.

    Without a slash: files with an ending, and folders where the parameter names a teacher or a data set.
    """
    if isinstance(value, list):
        return [_seen_from(folder, name, item) for item in value]
    path = Path(value if isinstance(value, str) else "")
    bare = path.suffix and path.is_file() or name == "dataset" and value != "pydocs" and path.is_dir()
    bare = bare or name.startswith("teacher") and (path / "config.json").is_file()
    relative = not path.is_absolute() and (path.exists() if "/" in str(value) else bare)
    return os.path.relpath(value, folder) if relative else value


def check_writable(path: Path) -> None:
    """Raise InputError where no folder can be created or written to."""
    place = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise InputError(f"cannot write to {path}: {place.name or place} is not a writable folder")


def _known(name: str, parameters: dict[str, Parameter], path: Path) -> Parameter:
    if name not in parameters:
        raise InputError(f"unknown parameter {name!r} of {path.stem}: {closest(str(name), list(parameters))}")
    return parameters[name]


def read_grid(path: Path, folder: Path = NOTEBOOKS) -> list[Plan]:
    """Return a plan for every combination of a grid, in the order of its lists; InputError before anything runs.

    The YAML file names a `notebook` as `report` does, a `profile` to start from (its defaults if not given), `fixed`
    parameters, and the `grid`: parameter names and lists of values.
    """
    import yaml

    try:
        asked = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        reason = type(error).__name__
        raise InputError(f"{path.name} is not a readable YAML file ({reason}): see `sweep --help`") from error
    if not isinstance(asked, dict) or not set(asked) <= set(GRID_KEYS) or "notebook" not in asked:
        raise InputError(f"{path.name} is not a grid: give notebook, grid and optionally {', '.join(GRID_KEYS[1:3])}")
    grid, fixed = asked.get("grid") or {}, asked.get("fixed") or {}
    if not isinstance(grid, dict) or not isinstance(fixed, dict):
        raise InputError(f"{path.name}: grid and fixed must map names of parameters to values")
    if not grid or not all(isinstance(values, list) and values for values in grid.values()):
        raise InputError(f"{path.name}: the grid is empty: give each of its parameters a list of at least one value")
    if twice := set(grid) & set(fixed):
        raise InputError(f"{path.name}: {min(twice)} is in the grid and fixed: leave one out")
    if (number := math.prod(len(values) for values in grid.values())) > MAX_RUNS:
        raise InputError(f"{path.name} has {number:,} combinations: give at most {MAX_RUNS:,}")
    named, plans = [str(asked["notebook"])], []
    for values in itertools.product(*grid.values()):
        chosen = {name: as_text(value) for name, value in zip(grid, values, strict=True)}
        given = [f"{name}={text}" for name, text in {**{k: as_text(v) for k, v in fixed.items()}, **chosen}.items()]
        (plan,) = make_plans(named, str(asked.get("profile") or DEFAULT_PROFILE), given, folder)
        label = ",".join(f"{name}={text}" for name, text in chosen.items())
        folder_name = re.sub(r"[^A-Za-z0-9.,=-]+", "_", label).strip("_")
        if len(folder_name) > MAX_NAME:
            folder_name = f"{folder_name[: MAX_NAME - 11]}-{config_hash(label)}"
        plans.append(replace(plan, profile=folder_name))
    if len({plan.name for plan in plans}) < number:
        raise InputError(f"{path.name}: two combinations are equal: give each value once")
    return plans


def list_notebooks(folder: Path = NOTEBOOKS) -> str:
    """Describe every notebook's parameters: name, type, default, help."""
    import nbformat

    blocks = []
    for path in sorted(folder.glob("*.ipynb")):
        title, _ = pages.title_and_question(nbformat.read(path, as_version=4))
        lines = [f"{path.stem}  {title}"]
        for p in notebook_parameters(path).values():
            lines.append(f"  {f'{p.name}: {p.type} = {p.default!r}':<46}  {p.help}".rstrip())
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) or f"no notebooks in {folder}"
