"""The embedded corpus: what is accepted, how splits are kept apart, and that nothing is ever imported."""

import ast
import random
import re
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest

from distill_utils.data import loading, pydocs, separation

VOCABULARY = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]
BODY = "The file is opened once, and its rows are kept in the order of the file."


def words(seed: int, count: int) -> list[str]:
    return random.Random(seed).choices(VOCABULARY, k=count)


def modules_in(split: str, count: int) -> list[str]:
    found = (f"planted.module{i}" for i in range(10**6))
    return [next(name for name in found if separation.split_of(name) == split) for _ in range(count)]


def make_row(module: str, seed: int, name: str = "f", **changes: str) -> dict:
    """A pair of random words that shares nothing with the pair of another seed."""
    summary = " ".join(words(2 * seed, 8)).capitalize() + "."
    document = f"function {name}() " + " ".join(words(2 * seed + 1, 40))
    row = {"id": f"{module}:{name}", "document": document, "summary": summary, "module": module, "name": name}
    return row | {"package": module.split(".")[0], "family": "planted"} | changes


# ------------------------------------------------------------------------------------------------------------ reading


def test_clean():
    cleaned = {
        "Use :class:`~torch.nn.Linear` and ``size`` here. ": "Use Linear and size here.",
        "See :py:func:`the loader <package.load>` or `other`_.": "See load or other.",
        "  A\ttab\n\nand a paragraph.\n": "A tab\n\nand a paragraph.",
        ":meth:`run`: starts `a` and ```b```": "run: starts a and b",
    }
    assert {docstring: pydocs.clean(docstring) for docstring in cleaned} == cleaned


def test_signature():
    signatures = {
        "def f(): ...": "()",
        "def f(self, a, /, b=1, *args, c, d='x', e=call(), **kw): ...": "(a, b=1, *args, c, d='x', e=..., **kw)",
        "async def f(cls, *, a=None, b=-1, c=True): ...": "(a=None, b=..., c=True)",
        f"def f(a='{'long' * 9}'): ...": "(a=...)",
        "class C:\n    x = 1\n    def __init__(self, size, name='n'): ...": "(size, name='n')",
        "class C:\n    def run(self, size): ...": "",
    }
    assert {source: pydocs._signature(ast.parse(source).body[0]) for source in signatures} == signatures


def test_make_pair_joins_name_signature_and_description():
    text = f"Read the rows\nof a file.\n\n{BODY}\n\nParameters\n----------\npath : str\n    Where it is."
    assert pydocs.make_pair("function", "load", "(path)", text) == {
        "document": f"function load(path) {BODY} Parameters path : str Where it is.",
        "summary": "Read the rows of a file.",
    }


ACCEPTED = [
    "Read all the rows.",
    " ".join(["word"] * 29) + " end.",
    "Read\nall the rows\nof a file.",
    "Return x, e.g. from a list, as 'text'.",
]
REJECTED = [
    "",
    "Read the rows.",
    " ".join(["word"] * 30) + " end.",
    "Read\nall\nthe\nrows of a file.",
    "Read all the rows of a file",
    "Read all the rows. Then close the file.",
    "7 rows are read from a file.",
    "Read a1 2b 3c 4d 5e 66 77 88 99.",
    "Read all the naïve rows of a file.",
    "Read all rows where size >= limit holds.",
    "TODO read all the rows of a file.",
    "Copyright of the authors of this file.",
    "See https://example.org for all of this.",
]


def test_make_pair_takes_one_whole_sentence_and_a_description():
    for summary in ACCEPTED:
        pair = pydocs.make_pair("function", "f", "()", f"{summary}\n\n{BODY}")
        assert pair == {"document": f"function f() {BODY}", "summary": " ".join(summary.split())}
    for summary in REJECTED:
        assert pydocs.make_pair("function", "f", "()", f"{summary}\n\n{BODY}") is None, summary
    for rest in ("", "\n\nOnly five words stand here.", "\n\n-----\n====="):
        assert pydocs.make_pair("function", "f", "()", f"Read all the rows of a file.{rest}") is None
    pair = pydocs.make_pair("class", "C", "", "Read all the rows of a file.\n\n" + "long " * 1000)
    assert len(pair["document"]) == 1500


TABLES = '''"""Tools that read planted tables for the tests of this package.

Nothing in here may ever run, because reading is no import.
"""
open({marker!r}, "w")
raise SystemExit("imported")

# This comment explains at length why a planted table is read one line after another.
# It goes on for a second line.


class Reader(Base):
    """Read :class:`planted.Table` objects from a folder of files.

    Each file is opened once, and its rows are kept in the order of the file.
    """

    def __init__(self, folder, encoding="utf-8"):
        pass

    async def rows(self, limit=10):
        """Return the rows of all planted files together.

        The rows come in the order of file names, at most the limit of them.
        """


def count(path):
    """Count the rows of one planted file quickly.

    The file is never parsed, only its line ends are counted by this function.
    """
    def inner():
        """Return what nobody outside could ever call.

        This docstring belongs to a function in a function, so it is left out.
        """
'''


def test_files_are_read_as_text_and_never_imported(tmp_path):
    marker = tmp_path / "marker"
    (tmp_path / "tables.py").write_text(TABLES.format(marker=str(marker)))
    before = set(sys.modules)
    pairs, texts = pydocs._read_file((str(tmp_path / "tables.py"), "planted.tables", "planted", "planted family"))
    assert not marker.exists() and set(sys.modules) == before
    common = {"module": "planted.tables", "package": "planted", "family": "planted family"}
    expected = [
        ("Reader", "class Reader(folder, encoding='utf-8')", "Read Table objects from a folder of files.",
         "Each file is opened once, and its rows are kept in the order of the file."),
        ("Reader.rows", "method Reader.rows(limit=10)", "Return the rows of all planted files together.",
         "The rows come in the order of file names, at most the limit of them."),
        ("count", "function count(path)", "Count the rows of one planted file quickly.",
         "The file is never parsed, only its line ends are counted by this function."),
    ]  # fmt: skip
    assert pairs == [
        common | {"id": f"planted.tables:{name}", "name": name, "document": f"{head} {body}", "summary": summary}
        for name, head, summary, body in expected
    ]
    assert {row["module"] for row in texts} == {"planted.tables"}
    starts = [row["text"].split("\n")[0] for row in texts]
    assert starts == [
        "Tools that read planted tables for the tests of this package.",
        "class Reader",
        "method Reader.rows",
        "function count",
        "This comment explains at length why a planted table is read one line after another. "
        "It goes on for a second line.",
    ]


def test_unreadable_files_are_skipped(tmp_path):
    (tmp_path / "nothing.py").write_bytes(b"x = 1\n")
    (tmp_path / "syntax.py").write_bytes(b'def f(:\n    """Read all the rows of a file."""\n')
    (tmp_path / "latin.py").write_bytes(b'"""Read all the rows of a file \xff\xfe."""\n')
    (tmp_path / "null.py").write_bytes(b'"""Null \x00 byte."""\n')
    for name in ("nothing", "syntax", "latin", "null", "missing"):
        assert pydocs._read_file((str(tmp_path / f"{name}.py"), "f", "p", "family")) == ([], [])


# ---------------------------------------------------------------------------------------------------------- separation


def test_splits_are_stable_and_have_their_shares():
    # printf '%s' MODULE | sha256sum | cut -c1-8, as a number modulo 1000: 465, 343, 18, 124, 120
    literals = {
        "torch.nn.modules.linear": "train",
        "pandas.core.frame": "train",
        "seaborn.axisgrid": "validation",
        "tornado.web": "test",
        "nbformat.v4": "test",
    }
    assert {module: separation.split_of(module) for module in literals} == literals
    counts = Counter(separation.split_of(f"package.module{i}") for i in range(20_000))
    # three standard deviations of a binomial share over 20,000 draws are at most 0.0072
    for split, share in (("train", 0.87), ("validation", 0.04), ("test", 0.09)):
        assert abs(counts[split] / 20_000 - share) < 0.0075


def change_words(text: str, places: list[int]) -> str:
    changed = text.split()
    for place in places:
        changed[place] = f"other{place}"
    return " ".join(changed)


def planted_items() -> tuple[list[dict], dict[str, list[str]]]:
    """Items with one leak of every kind, and the names that must survive in each split."""
    train, validation, test = (modules_in(split, 8) for split in ("train", "validation", "test"))
    a, b, c = (make_row(train[i], seed, name) for i, (seed, name) in enumerate([(1, "a"), (2, "b"), (3, "c")]))
    lone, near_validation = make_row(test[3], 13, "lone"), make_row(test[5], 15, "near")
    near_changed = {"document": change_words(near_validation["document"], [5, 30])}
    near_changed |= {"summary": change_words(near_validation["summary"], [0])}
    c_changed = {"document": change_words(c["document"], [9, 24, 33]), "summary": c["summary"] + " Too"}
    # half of the words of a training document, in order: similar, and below the threshold
    half = " ".join(b["document"].split()[:22] + words(99, 20))
    items = [
        *(a, b, c, lone, near_validation),
        make_row(train[4], 4, "copy", document=a["document"].upper()),
        make_row(test[0], 10, "exact", document=a["document"].replace(" ", ", ")),
        make_row(test[1], 11, "summary", summary=b["summary"].upper().rstrip(".") + "!"),
        make_row(test[2], 12, "changed", **c_changed),
        make_row(test[4], 14, "half", document=half),
        make_row(validation[0], 20, "summary_of_test", summary=lone["summary"]),
        make_row(validation[1], 21, "changed_from_test", **near_changed),
        make_row(validation[2], 22, "kept"),
        make_row(validation[3], 23, "summary_of_train", summary=a["summary"]),
    ]
    assert a["id"] < items[5]["id"]  # the first id of a repeated document stays
    return items, {"train": ["a", "b", "c"], "validation": ["kept"], "test": ["half", "lone", "near"]}


def test_planted_duplicates_are_removed_and_counted():
    items, survivors = planted_items()
    pairs, removed = separation.separate_splits(items)
    assert {split: sorted(row["name"] for row in rows) for split, rows in pairs.items()} == survivors
    assert removed == {
        "train: exact duplicate document": 1,
        "test: exact duplicate document": 1,
        "test: summary also in train": 1,
        "test: near duplicate of train": 1,
        "validation: summary also in train or test": 2,
        "validation: near duplicate of train or test": 1,
    }
    assert sum(removed.values()) + sum(map(len, pairs.values())) == len(items)
    for split, rows in pairs.items():
        assert all(separation.split_of(row["module"]) == split for row in rows)
    random.Random(5).shuffle(items)
    assert separation.separate_splits(items) == (pairs, removed)  # whatever the order of the items
    (module,) = modules_in("train", 1)
    pairs, removed = separation.separate_splits([make_row(module, 1), make_row(module, 2)])  # a repeated id
    assert len(pairs["train"]) == 1 and removed["train: exact duplicate document"] == 1


def test_near_duplicates_equal_every_pair_compared():
    generator = random.Random(0)
    references = [" ".join(generator.choices(VOCABULARY[:40], k=generator.randint(1, 30))) for _ in range(50)]
    held_out = ["", "Two words"]  # too short for a 3-gram
    for text in generator.sample(references, 40):
        changed = text.split()
        for place in generator.sample(range(len(changed)), generator.randint(0, len(changed) // 3)):
            changed[place] = generator.choice(VOCABULARY)
        held_out.append(" ".join(changed).upper() + ".")
    references.append("two, words")
    ours, sets = ([set(naive_grams(text, 3)) for text in texts] for texts in (held_out, references))
    expected = {
        i
        for i, values in enumerate(ours)
        if any(values and Fraction(len(values & other), len(values | other)) >= Fraction(1, 2) for other in sets)
    }
    assert separation.near_duplicates(held_out, references) == expected
    assert 5 < len(expected) < 38  # both outcomes are common


def test_held_out_summaries_are_in_no_training_text():
    train, test = modules_in("train", 6), modules_in("test", 2)
    row = make_row(test[0], 1)
    summary, other = row["summary"], " ".join(words(50, 12)).capitalize() + "."
    kept = [{"text": f"function g\n{other}", "module": train[0]}, {"text": " ".join(words(51, 30)), "module": train[1]}]
    leaks = [
        {"text": f"function f\n{summary}\n\n{other}", "module": train[2]},
        {"text": f"{other} {summary.upper()} {other}", "module": train[3]},
        {"text": f"class C\n{other}\n\n{summary.rstrip('.')}\n\nMore {other}", "module": train[4]},
    ]
    near = {"text": change_words(f"{summary} {row['document']}", [0, 25]), "module": train[5]}
    held_out = {"text": f"function f\n{summary}\n\n{row['document']}", "module": test[0]}
    again = {"text": f"FUNCTION f: {summary} {row['document']}", "module": test[1]}
    text, removed = separation.separate_text(
        [*leaks, held_out, *kept, near, again], {"train": [], "validation": [], "test": [row]}
    )
    assert sorted(r["text"] for r in text["train"]) == sorted(r["text"] for r in kept)
    assert len(text["test"]) == 1 and text["validation"] == []
    assert removed == {
        "text: exact duplicate": 1,
        "text: holds a held-out summary": 3,
        "text: near duplicate of a held-out pair": 1,
    }


def naive_grams(text: str, length: int) -> list[tuple]:
    found = re.findall(r"\w+", text.lower())
    return [tuple(found[i : i + length]) for i in range(len(found) - length + 1)]


def naive_leaks(pairs: dict, text: dict) -> Counter:
    """Count held-out pairs and texts that share text with training, by plain sets of word tuples."""
    held_out = {}  # what is looked for: (passage, length of its n-grams)
    for split in ("validation", "test"):
        held_out[split, "document"] = [(row["document"], 8) for row in pairs[split]]
        summaries = [row["summary"] for row in pairs[split]]
        held_out[split, "summary"] = [(one, min(len(re.findall(r"\w+", one)), 8)) for one in summaries]
        held_out[split, "text"] = [(row["text"], 8) for row in text[split]]
    wanted, seen = defaultdict(set), defaultdict(set)  # by length
    for passages in held_out.values():
        for passage, length in passages:
            wanted[length].update(naive_grams(passage, length) if length >= 4 else ())
    training = [row[key] for row in pairs["train"] for key in ("document", "summary")]
    for passage in training + [row["text"] for row in text["train"]]:
        for length, grams in wanted.items():
            seen[length].update(grams.intersection(naive_grams(passage, length)) if grams else ())
    leaks = Counter()
    for (split, kind), passages in held_out.items():
        for passage, length in passages:
            known = [gram in seen[length] for gram in naive_grams(passage, length)]
            leaks[split, kind] += any(known) and (kind == "summary" or 4 * sum(known) >= len(known))
    return leaks


def test_text_that_crosses_modules_is_removed_from_the_held_out_side():
    train, test, validation = modules_in("train", 3), modules_in("test", 7), modules_in("validation", 2)
    a, b = make_row(train[0], 1), make_row(train[1], 2, summary="Sort all rows by name.")
    raw = {"text": " ".join(words(70, 60)), "module": train[2]}
    half, fewer, raw_words = a["document"].split()[:15], a["document"].split()[5:14], raw["text"].split()
    alias = make_row(test[0], 10, document=a["document"].replace("function f()", "method Vendored.g()"))
    inherited = make_row(test[1], 11, document=" ".join(half + words(90, 20)))  # 8 of 28 8-grams
    scarce = make_row(test[2], 12, document=" ".join(fewer + words(91, 30)))  # 2 of 32
    copied = make_row(validation[0], 13, summary=" ".join([*words(92, 3), *raw_words[20:28]]).capitalize() + ".")
    short = make_row(test[3], 14, summary="Sort ALL rows, by name!")
    shorter = make_row(test[4], 15, summary="Sort all rows by size.")
    brief = make_row(test[5], 16, document="function f() of seven words in all")
    across = make_row(test[6], 17, summary=" ".join(a["summary"].split()[-4:] + b["document"].split()[:4]))
    vendored = {"text": "\n".join(raw_words[:40]), "module": test[0]}
    clean = {"text": " ".join(words(93, 40)), "module": validation[1]}
    pairs = {
        "train": [a, b], "validation": [copied], "test": [alias, inherited, scarce, short, shorter, brief, across],
    }  # fmt: skip
    text = {"train": [raw], "validation": [clean], "test": [vendored]}
    before = naive_leaks(pairs, text)
    assert before == {
        ("test", "document"): 2, ("test", "summary"): 1, ("validation", "document"): 0, ("validation", "summary"): 1,
        ("test", "text"): 1, ("validation", "text"): 0,
    }  # fmt: skip
    removed = separation.remove_leaks(pairs, text)
    assert pairs == {"train": [a, b], "validation": [], "test": [scarce, shorter, brief, across]}
    assert text == {"train": [raw], "validation": [clean], "test": []}
    assert sum(removed.values()) == 5 and not any(naive_leaks(pairs, text).values())
    assert removed["test: document shares text with train"] == 2
    assert not any(separation.remove_leaks({split: [] for split in pairs}, {split: [] for split in pairs}).values())


@pytest.mark.slow
def test_no_held_out_text_of_the_corpus_stands_in_training():
    pairs, text = ({s: loading._corpus_table(kind, s).to_list() for s in loading.SPLITS} for kind in ("pairs", "text"))
    assert len(pairs["test"]) > 1500 and len(text["train"]) > 50_000
    assert not any(naive_leaks(pairs, text).values())


# -------------------------------------------------------------------------------------------------------- whole corpus


def test_build_corpus(tmp_path, monkeypatch):
    """Of an installed distribution of 40 modules with three documented functions each, most of them distinct."""
    record = []

    def add(path, content):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
        record.append(f"{path},,")

    names = [*modules_in("train", 30), *modules_in("test", 10)]
    left_out = ["planted.tests.test_module", "planted._vendor.other"]
    for seed, name in enumerate([*names, *left_out], start=1):
        parts = ["raise SystemExit"]
        for i in range(3):
            summary, body = words(10 * seed + i, 8), words(10 * seed + i + 5, 40)
            parts.append(f'def f{i}(x):\n    """{" ".join(summary).capitalize()}.\n\n    {" ".join(body)}\n    """')
        add(f"{name.replace('.', '/')}.py", "\n\n".join(parts))
    add("planted/__init__.py", "")
    add("planted/data.txt", "no Python")
    (tmp_path / "planted-1.0.dist-info").mkdir()
    (tmp_path / "planted-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n")
    (tmp_path / "planted-1.0.dist-info" / "RECORD").write_text("\n".join(record))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(pydocs, "FAMILIES", {"planted family": ("planted", "not-installed-at-all")})
    monkeypatch.setattr(pydocs, "new_processes", lambda *_, **__: ThreadPoolExecutor(1))  # no process starts

    files = pydocs._source_files()
    assert [file[1] for file in files] == sorted([*names, "planted"])
    assert all(file[2:] == ("planted", "planted family") and file[0].startswith(str(tmp_path)) for file in files)
    assert pydocs.corpus_settings()["packages"] == {"planted": "1.0"}
    seen = []
    corpus = pydocs.build_corpus(lambda *row: seen.append(row))
    assert seen[-1] == ("removing duplicates", 3, 3) and ("reading docstrings", 41, 41) in seen
    everything = [row for rows in corpus["pairs"].values() for row in rows]
    assert len({row["id"] for row in everything}) == len(everything) == 3 * 40
    for split, rows in corpus["pairs"].items():
        assert {separation.split_of(row["module"]) for row in rows} <= {split}
        assert {row["module"] for row in corpus["text"][split]} >= {row["module"] for row in rows}
    steps = {"summary also in train", "holds a held-out summary", "raw text shares text with train"}
    assert steps <= {reason.partition(": ")[2] for reason in corpus["removed"]}
    assert pydocs.build_corpus() == corpus
    path = tmp_path / f"{names[0].replace('.', '/')}.py"
    path.write_text(path.read_text().replace(words(15, 1)[0], "altered"))
    assert pydocs.build_corpus()["fingerprint"] != corpus["fingerprint"]


# ------------------------------------------------------------------------------------------------- classification tasks


def test_belongs_task_takes_hard_negatives():
    rows = [make_row(f"one.module{i % 50}", i, f"f{i}") for i in range(1500)]
    same = {"summary": "Return The same thing twice."}
    rows += [make_row("two.same", 2000, "a", **same), make_row("two.same", 2001, "b", summary=same["summary"].upper())]
    rows += [make_row("two.alone", 2002, "c"), make_row("three.lonely", 2003, "d")]
    by_id = {row["id"]: row for row in rows}
    modules_of = defaultdict(set)
    for row in rows:
        modules_of[row["summary"]].add(row["module"])
    tasks = [pydocs.belongs_task(rows, seed) for seed in range(8)]
    assert pydocs.belongs_task(rows, 0) == tasks[0]  # deterministic
    assert [r["label"] for r in tasks[0]] != [r["label"] for r in tasks[1]]
    # of two objects that say the same, a negative comes from the package instead
    negatives_of = {"two.same": "two.alone", "two.alone": "two.same"}
    seen = set()
    for task in tasks:
        assert len({row["id"] for row in task}) == len(task) >= len(rows) - 1
        share = sum(row["label"] == "yes" for row in task) / len(task)
        assert abs(share - 0.5) < 0.05  # nearly four standard deviations
        for row in task:
            source = by_id[row["id"]]
            assert row["sentence2"] == source["document"] and row["label"] in ("yes", "no")
            if row["label"] == "yes":
                assert row["sentence1"] == source["summary"]
                continue
            assert row["sentence1"].lower() != source["summary"].lower()
            assert modules_of[row["sentence1"]] == {negatives_of.get(source["module"], source["module"])}
            seen.add(source["module"])
    assert {"two.same", "two.alone"} <= seen and "three.lonely" not in seen


def test_family_task_masks_the_package():
    rows = [
        make_row("torch.nn", 1, "a", summary="Torch builds a torch.Tensor here.", document="function a() A torch one."),
        make_row("PIL.Image", 2, "b", package="pillow", family="graphics", summary="Open a PIL image of Pillow."),
        *[make_row("numpy.fft", seed, f"f{seed}") for seed in range(3, 20)],
    ]
    task = pydocs.family_task(rows)
    assert sorted(row["id"] for row in task) == sorted(row["id"] for row in rows)
    assert pydocs.family_task(rows) == task
    assert [r["id"] for r in task] not in ([r["id"] for r in rows], [r["id"] for r in pydocs.family_task(rows, seed=1)])
    by_id = {row["id"]: row for row in task}
    texts = {"sentence1": "it builds a it.Tensor here. A it one.", "sentence2": ""}
    assert by_id["torch.nn:a"] == {"id": "torch.nn:a", "label": "planted"} | texts
    other = by_id["PIL.Image:b"]
    assert other["sentence1"].startswith("Open a it image of it.") and other["label"] == "graphics"
