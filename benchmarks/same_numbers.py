"""Compare the results of two sets of reports, number by number: a refactoring must change none of them.

Run the same notebooks with the same profile before and after a change, then

    python benchmarks/same_numbers.py BEFORE/smoke AFTER/smoke

It prints each value that differs and ends with 1 if there is any. Left out is what no two runs share: times and speeds,
memory of the process, provenance. What only one side has, a key or a file, is a difference.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

MEASURED = re.compile(
    r"second|latency|ms_per|throughput|speed|^ms|_ms$|/s$|/step|gflops|ceiling|bandwidth|resident|utilization|efficiency|"
    r"bound_over|build_|provenance|date|commit|changed|hours|energy|price|reused|wall|peak_memory|runs/|machine",
    re.IGNORECASE,
)
TEXTS = ("headline", "advice", "title", "question", "reading")  # reworded without a change of results


def values(node: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield (path, leaf) of nested JSON, without what is measured and what is prose."""
    if isinstance(node, dict):
        for key, value in node.items():
            if not MEASURED.search(key) and key not in TEXTS:
                yield from values(value, f"{path}/{key}")
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from values(value, f"{path}[{number}]")
    else:
        yield path, node


def compare(before: Path, after: Path) -> list[str]:
    """Return one line per value that differs between two results files."""
    ours, theirs = (dict(values(json.loads(path.read_text(encoding="utf-8")))) for path in (before, after))
    pairs = {path: (ours.get(path, "absent"), theirs.get(path, "absent")) for path in ours | theirs}
    return sorted(f"{path}: {old!r} before, {new!r} after" for path, (old, new) in pairs.items() if old != new)


def main() -> int:
    """Compare every results file that both folders have."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    arguments = parser.parse_args()
    before, after = ({path.name for path in folder.glob("*.json")} for folder in (arguments.before, arguments.after))
    if not before & after:
        shown = f"{arguments.before} and {arguments.after}"
        print(f"{shown} share no results: give two folders of reports", file=sys.stderr)
        return 2
    differences = len(before ^ after)
    print("".join(f"{name}: only on one side\n" for name in sorted(before ^ after)), end="")
    for name in sorted(before & after):
        lines = compare(arguments.before / name, arguments.after / name)
        differences += len(lines)
        print(f"{name}: {len(lines)} differences")
        print("".join(f"  {line}\n" for line in lines), end="")
    return int(differences > 0)


if __name__ == "__main__":
    sys.exit(main())
