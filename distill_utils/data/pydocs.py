"""The embedded corpus `pydocs`: documents and one-line summaries from installed packages' docstrings.

Source files are read as text and never imported. A docstring's first paragraph is the summary its author wrote; the
object's kind, name, signature and the remaining text are the document. How splits are kept apart: separation.py.
"""

import ast
import gc
import hashlib
import importlib.metadata
import platform
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from distill_utils.data import separation
from distill_utils.data.separation import SPLITS, normalise
from distill_utils.workers import new_processes

# Package family -> distributions; the family is the label of the topic task. All are pinned in requirements.lock.
FAMILIES = {
    "deep learning": ("torch", "transformers", "accelerate", "datasets", "huggingface_hub"),
    "mathematics": ("sympy", "mpmath", "networkx"),
    "numerics": ("numpy", "scipy"),
    "tables": ("pandas", "pyarrow", "narwhals", "fsspec"),
    "machine learning": ("scikit-learn", "nltk", "joblib"),
    "graphics": ("matplotlib", "seaborn", "pillow", "fonttools", "rich", "pygments", "prompt_toolkit"),
    "notebooks": (
        "ipython", "jupyter_server", "jupyter_client", "jupyter_core", "jupyterlab", "jupyterlab_server", "nbclient",
        "nbconvert", "nbformat", "ipykernel", "ipywidgets", "papermill", "traitlets", "jedi", "parso",
    ),
    "services": (
        "tornado", "pydantic", "anyio", "httpx", "requests", "urllib3", "click", "typer", "jinja2", "attrs",
        "jsonschema", "pyzmq", "babel", "beautifulsoup4", "packaging", "filelock", "psutil", "tqdm", "pyparsing",
        "python-dateutil", "multiprocess", "dill", "absl-py", "cffi", "bleach", "nest-asyncio2", "tenacity",
    ),
}  # fmt: skip
MAX_DOCUMENT_CHARACTERS = 1500
MIN_RAW_WORDS = 8

_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
_ROLE = re.compile(r":[\w:+-]+:`(?:[^`<]*<)?~?([^`>]+)>?`")
_BACKQUOTED = re.compile(r"`+([^`\n]+?)`+_*")
_SKIPPED_FOLDERS = re.compile(
    r"(^|/)(tests?|testing|_vendor|vendored|externals|third_party|site)(/|$)|(^|/)(test_|conftest)"
)
_HEADER = re.compile(r"^\w+ [\w.]+(\(.*?\) )?")  # "method Series.head(n=5) " before the text
_WORD = re.compile(r"\w+")
_NOT_PROSE = re.compile(r"[|{}<>=\\]{2,}|>>>|\.\. |https?://|^[-=~*#:@.]|\bTODO\b|Copyright|License")


def corpus_settings() -> dict:
    """Return what the corpus depends on: its code, Python's parser and the installed version of every package."""
    code = (__file__, separation.__file__)
    return {
        "code": hashlib.sha256(b"".join(Path(file).read_bytes() for file in code)).hexdigest()[:12],
        "python": ".".join(platform.python_version_tuple()[:2]),
        "packages": {package: distribution.version for package, _, distribution in _installed()},
    }


def build_corpus(progress: Callable[[str, int, int], None] = lambda *_: None, num_processes: int = 2) -> dict:
    """Read the installed packages and return {"pairs", "text", "removed", "fingerprint"}.

    pairs: split -> list of {"id", "document", "summary", "module", "name", "package", "family"};
    text: split -> list of {"text", "module"}, all docstrings and comments, held-out modules kept apart;
    removed: what was dropped and why, as counts; fingerprint: hash of all pairs and text.
    `progress(stage, done, total)` is called now and then.
    """
    files = _source_files()
    items, texts = [], []
    # Large chunks: a file takes a millisecond or two, so that passing it alone would cost more than reading it.
    # Without the garbage collector, which a file's syntax tree wakes again and again, reading takes a fifth less.
    with new_processes(num_processes, initializer=gc.disable) as pool:
        for done, (found, raw) in enumerate(pool.map(_read_file, files, chunksize=64), start=1):
            items += found
            texts += raw
            if done % 64 == 0 or done == len(files):
                progress("reading docstrings", done, len(files))
    pairs, removed = separation.separate_splits(items)
    progress("removing duplicates", 1, 3)
    text, removed_text = separation.separate_text(texts, pairs)
    progress("removing duplicates", 2, 3)
    leaked = separation.remove_leaks(pairs, text)
    progress("removing duplicates", 3, 3)
    content = hashlib.sha256()
    for split in SPLITS:
        for row in pairs[split]:
            content.update(f"{row['id']}\0{row['document']}\0{row['summary']}\1".encode())
        for row in text[split]:
            content.update(f"{row['text']}\1".encode())
    removed |= removed_text | leaked
    return {"pairs": pairs, "text": text, "removed": removed, "fingerprint": content.hexdigest()[:12]}


# ------------------------------------------------------------------------------------------------------------ reading


def _installed() -> Iterable[tuple[str, str, importlib.metadata.Distribution]]:
    """Yield (package, family, distribution) of the listed packages that are installed."""
    for family, packages in FAMILIES.items():
        for package in packages:
            try:
                yield package, family, importlib.metadata.distribution(package)
            except importlib.metadata.PackageNotFoundError:
                continue


def _source_files() -> list[tuple[str, str, str, str]]:
    """Return (path, module, package, family) of every Python file of the installed packages, in stable order."""
    found = {}
    for package, family, distribution in _installed():
        for entry in distribution.files or []:
            name = entry.as_posix()
            if name.endswith(".py") and ".." not in name and not _SKIPPED_FOLDERS.search(name):
                module = name[:-3].removesuffix("/__init__").replace("/", ".")
                found[module] = (str(entry.locate()), module, package, family)
    return [found[module] for module in sorted(found)]


def _read_file(file: tuple[str, str, str, str]) -> tuple[list[dict], list[dict]]:
    path, module, package, family = file
    try:
        source = Path(path).read_bytes().decode()
        if not any(mark in source for mark in ('"""', "'''", "# ")):  # cheaper than parsing
            return [], []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):  # bytes that are not UTF-8 are a ValueError too
        return [], []
    pairs, texts = [], []
    for kind, name, node, docstring in _documented(tree):
        text = clean(docstring)
        if len(text.split()) >= MIN_RAW_WORDS:
            texts.append({"text": f"{kind} {name}\n{text}" if name else text, "module": module})
        pair = make_pair(kind, name, _signature(node), text) if name else None
        if pair:
            found = {"module": module, "name": name, "package": package, "family": family}
            pairs.append({"id": f"{module}:{name}"} | pair | found)
    return pairs, texts + [{"text": block, "module": module} for block in _comments(source)]


def _documented(node: ast.AST, kind: str = "module", name: str = "") -> Iterable[tuple[str, str, ast.AST, str]]:
    """Yield (kind, qualified name, node, docstring) of the module, its classes, methods and functions."""
    if docstring := ast.get_docstring(node, clean=True):
        yield kind, name, node, docstring
    inside = f"{name}." if name else ""
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _documented(child, "class", inside + child.name)
        elif isinstance(child, _FUNCTION) and not isinstance(node, ast.FunctionDef):
            yield from _documented(child, "method" if kind == "class" else "function", inside + child.name)


def _signature(node: ast.AST) -> str:
    """Return "(a, b=1, *args)" of a function or of a class's __init__; only plain defaults are written out."""
    if isinstance(node, ast.ClassDef):
        node = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if not isinstance(node, _FUNCTION):
        return ""
    given = node.args
    positional = given.posonlyargs + given.args
    defaults = [None] * (len(positional) - len(given.defaults)) + list(given.defaults)
    parts = [_argument(a, d) for a, d in zip(positional, defaults, strict=True) if a.arg not in ("self", "cls")]
    if given.vararg:
        parts.append(f"*{given.vararg.arg}")
    parts += [_argument(a, d) for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    if given.kwarg:
        parts.append(f"**{given.kwarg.arg}")
    return f"({', '.join(parts)})"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    if default is None:
        return argument.arg
    plain = isinstance(default, ast.Constant) and len(repr(default.value)) <= 20
    return f"{argument.arg}={default.value!r}" if plain else f"{argument.arg}=..."


def _comments(source: str) -> Iterable[str]:
    """Yield blocks of consecutive comment lines that read as prose."""
    block: list[str] = []
    for line in [*source.split("\n"), ""]:
        line = line.strip()
        if line.startswith("# ") and not _NOT_PROSE.search(line[2:]):
            block.append(line[2:].strip())
            continue
        text = " ".join(block)
        block = []
        if len(text.split()) >= MIN_RAW_WORDS and sum(map(str.isalpha, text)) > 0.7 * len(text.replace(" ", "")):
            yield text


def clean(docstring: str) -> str:
    """Return a docstring without reStructuredText roles and quotes, each paragraph on its own lines."""
    text = _ROLE.sub(lambda match: match.group(1).rsplit(".", 1)[-1], docstring)
    text = _BACKQUOTED.sub(r"\1", text)
    return text.replace("\t", " ").strip()


def make_pair(kind: str, name: str, signature: str, text: str) -> dict | None:
    """Return {"document", "summary"} of one cleaned docstring, or None when it is no good example.

    The summary is the first paragraph, one sentence of 4 to 30 words in at most three lines; the rest needs 6 words.
    """
    first, _, rest = text.partition("\n\n")
    if first.count("\n") > 2:
        return None
    summary = " ".join(first.split())
    words = summary.split()
    if not 4 <= len(words) <= 30 or not summary[0].isalpha() or _NOT_PROSE.search(summary):
        return None
    if not summary.endswith(".") or re.search(r"[.!?]\s+[A-Z]", summary):  # one whole sentence
        return None
    letters = sum(character.isalpha() or character.isspace() for character in summary)
    if letters < 0.8 * len(summary) or not summary.isascii():
        return None
    body = " ".join(line.strip() for line in rest.split("\n") if line.strip(" -=~^*"))
    if len(_WORD.findall(body)) < 6:
        return None
    document = f"{kind} {name}{signature} {body}"[:MAX_DOCUMENT_CHARACTERS]
    return {"document": document, "summary": summary}


# ------------------------------------------------------------------------------------------------- classification tasks


def belongs_task(pairs: list[dict], seed: int = 0) -> list[dict]:
    """Return rows {"id", "sentence1" (summary), "sentence2" (document), "label"}: does this summary belong to it?

    Half are negatives whose summary comes from another object of the same module (hard), or of the same package where
    the module has no other. Labels: "yes" and "no".
    """
    by_module, by_package = defaultdict(list), defaultdict(list)
    for row in pairs:
        by_module[row["module"]].append(row)
        by_package[row["package"]].append(row)
    rows = []
    for row in pairs:
        draw = _draw(seed, row["id"])
        label = "yes" if draw % 2 else "no"
        summary = row["summary"]
        if label == "no":
            others = [r for r in by_module[row["module"]] if normalise(r["summary"]) != normalise(summary)]
            others = others or [r for r in by_package[row["package"]] if normalise(r["summary"]) != normalise(summary)]
            if not others:
                continue
            summary = others[(draw >> 1) % len(others)]["summary"]
        rows.append({"id": row["id"], "sentence1": summary, "sentence2": row["document"], "label": label})
    return rows


def family_task(pairs: list[dict], seed: int = 0) -> list[dict]:
    """Return rows {"id", "sentence1", "sentence2" (empty), "label"}: which package family is this text from?

    The text is the summary and the description without the signature, and words that name the package are masked.
    """
    rows = []
    for row in pairs:
        body = _HEADER.sub("", row["document"], count=1)
        named = re.compile(rf"\b({re.escape(row['package'])}|{row['module'].split('.')[0]})\b", re.IGNORECASE)
        text = named.sub("it", f"{row['summary']} {body}")
        rows.append({"id": row["id"], "sentence1": text, "sentence2": "", "label": row["family"]})
    return sorted(rows, key=lambda row: _draw(seed, row["id"]))


def _draw(seed: int, text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:8], "big")
