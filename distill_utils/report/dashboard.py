"""What all pages say together: students by quality and speed, which to take, and the papers' claims.

Out of scope: reading the entries and writing the index (index.py). Entries have passed `index.fault_of`.
"""

import csv
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median

from distill_utils.report.names import method_label, run_label

CLAIMS = Path(__file__).resolve().parents[1] / "assets" / "claims.csv"
ENOUGH_SEEDS, FEW_UPDATES = 3, 1000  # with fewer of either, what a page says of a student is a demonstration
MARGIN = 0.05  # a student that keeps more than all but this share of its teacher's ROUGE-2 is as good
FEW_DOCUMENTS = 50  # below, figures show that the code runs and nothing else
MAX_FACETS, MAX_LABELS, MAX_POINTS = 6, 8, 300
COSTS = ("train_seconds", "states_seconds", "label_seconds")
BUDGETS = {"10 minutes": 600, "an hour": 3600, "a night": 36000}  # seconds of training
DOCUMENTS, UPDATES = ("num_documents", "num_test", "num_windows"), ("steps", "max_steps", "distill_steps")
NUMBERS, SHARES = ("difference", "low", "high"), ("share", "share_low", "share_high")
KINDS = {"XSum": "abstractive", "CNN/DailyMail": "extractive"}
VERDICTS = {1: "confirmed", -1: "contradicted", 0: "not separable"}
IDENTITY = ("name", "method", "student", "variant", "task")  # what rows of several seeds have in common
INTERVAL = re.compile(r"([+-]?[\d.]+) \(([+-]?[\d.]+) to ([+-]?[\d.]+)\)")


def is_number(value) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def averaged(entry: Mapping) -> list[dict]:
    """Return an entry's rows as means over seeds; those that it does not give itself have no intervals."""
    if entry.get("means"):
        return entry["means"]
    groups: dict[tuple, list[dict]] = {}
    for row in entry["rows"]:
        groups.setdefault(tuple(row.get(key) for key in IDENTITY), []).append(row)
    means = []
    for rows in groups.values():
        mean = {"seeds": len(rows), **rows[0]}
        for key in [key for key, value in rows[0].items() if len(rows) > 1 and isinstance(value, float)]:
            known = [row[key] for row in rows if is_number(row.get(key))]
            mean[key] = None if key.endswith(("_low", "_high")) or not known else fmean(known)
        means.append(mean)
    return means


def facts(entry: Mapping) -> dict:
    """Return what an entry's figures rest on: data, teacher, seeds, documents, updates, and whether that is enough."""
    rows, given = averaged(entry), entry.get("parameters", {})
    data = entry.get("dataset") or given.get("dataset") or given.get("text") or ""
    if str(data).startswith((".", "/", "~")):  # where it lies is not its name
        data = data.rstrip("/").rpartition("/")[2]
    # Pages from before a fingerprint was written rest on other text of the same name.
    data = data if entry.get("fingerprint") or not data else f"{data}, earlier text"
    teacher = entry.get("teacher") or given.get("teacher") or given.get("teachers") or ""
    numbers = [[place.get(name) for place in (*rows, given) for name in names] for names in (DOCUMENTS, UPDATES)]
    documents, updates = (round(next((n for n in found if n and is_number(n)), 0)) for found in numbers)
    seeds = round(max((row.get("seeds") or 1 for row in rows), default=1))
    demo = seeds < ENOUGH_SEEDS or updates < FEW_UPDATES or "demonstration" in entry.get("headline", "").lower()
    return {
        "report": entry["report"], "data": str(data), "seeds": seeds, "documents": documents, "updates": updates,
        "teacher": ", ".join(map(run_label, map(str, teacher if isinstance(teacher, list) else [teacher]))),
        "demo": demo, "evidence": (documents >= FEW_DOCUMENTS, not demo, seeds >= ENOUGH_SEEDS),
    }  # fmt: skip


def label_of(row: Mapping) -> str:
    """Return the printed name of a row: method, shape, variant."""
    name = method_label(row.get("method") or "", row.get("student"))
    return row.get("name") or " ".join(filter(None, (name, row.get("variant"))))


def key_figure(entry: Mapping) -> dict:
    """Return the figure of an entry that is followed over time: its best row, the metric, value and interval."""
    rows = averaged(entry)
    rows = [row for row in rows if row.get("student")] or [row for row in rows if row.get("method") == "teacher"]
    ways = entry.get("ways", []), "share", "share of the gap", 1
    for found, key, figure, sign in (ways, (rows, "rouge2", "ROUGE-2", 1), (rows, "loss", "loss", -1)):
        known = [row for row in found if row.get(key) is not None]
        if known:
            row = max(known, key=lambda row: sign * row[key])
            ends = {end: row.get(end if key == "share" else f"{key}_{end}") for end in ("low", "high")}
            return {"best": row.get("path") or label_of(row), "figure": figure, "value": row[key], **ends}
    return {}


# ------------------------------------------------------------------------------------------------------------ students


def pareto_front(rows: Sequence[Mapping], x: str, y: str = "rouge2") -> list[Mapping]:
    """Return the rows that no other row matches or beats in both a lower `x` and a higher `y`, fastest first."""
    known = [row for row in rows if is_number(row.get(x)) and is_number(row.get(y))]
    front: list[Mapping] = []
    for row in sorted(known, key=lambda row: (row[x], -row[y])):
        if not front or row[y] > front[-1][y]:
            front.append(row)
    return front


def students(entry: Mapping) -> list[dict]:
    """Return the students of an entry that have quality and speed, both as ratios to the teacher of the same run."""
    rows = averaged(entry)
    teacher = next((row for row in rows if row.get("method") == "teacher"), {})
    score, basis, found = teacher.get("rouge2") or 0, facts(entry), []
    known = [row for row in rows if row.get("student") and row is not teacher and row.get("rouge2") is not None]
    for row in known if score > 0 else ():
        speed = row.get("speedup") or (teacher.get("ms_per_token") or 0) / (row.get("ms_per_token") or math.inf)
        share = row["rouge2"] / score
        if 0.001 < speed < 1000 and share < 10:  # else one of them was not measured as it should
            size = (row.get("parameters_m") or 0) / (teacher.get("parameters_m") or math.inf)
            found.append(basis | {
                "label": label_of(row), "method": row.get("method") or "", "speed": speed, "time": 1 / speed,
                "share": share, "low": row.get("share_low"), "high": row.get("share_high"), "size": max(size, 0),
                "band": [(teacher.get(f"rouge2_{end}") or score) / score for end in ("low", "high")],
                "parameters_m": row.get("parameters_m"), "latency_ms": row.get("latency_ms"),
                "shape": row["student"], "seconds": _seconds(entry, row),
            })  # fmt: skip
    return found


def _seconds(entry: Mapping, row: Mapping) -> float:
    """Return what a student cost, the median of its seeds: what holds the machine up counts in one of them only."""
    same = [[each.get(key) or "" for key in ("method", "student", "variant")] for each in (row, *entry["rows"])]
    own = [each for each, names in zip(entry["rows"], same[1:], strict=True) if names == same[0]]
    return median(sum(each.get(cost) or 0 for cost in COSTS) for each in own or [row])


def facets(entries: Sequence[Mapping]) -> list[dict]:
    """Return the students of each data set and teacher, their front and the one to take; the best evidence first.

    The front is of those with the best evidence: beside students of three seeds a lucky short run does not count.
    """
    groups: dict[tuple, list[dict]] = {}
    for each in (each for entry in entries for each in students(entry)):
        groups.setdefault((each["data"], each["teacher"]), []).append(each)
    made = []
    for found in groups.values():
        best = max(each["evidence"] for each in found)
        strongest = [each for each in found if each["evidence"] == best]
        front, chosen = pareto_front(strongest, x="time", y="share")[::-1], take(strongest)
        if chosen["good"] and not any(each is chosen["take"] for each in front):  # another is better and less sure
            front = sorted([chosen["take"], *front], key=lambda each: each["speed"])
        strength = (*best, max(each["documents"] for each in front))
        made.append({"students": found, "front": front, "strength": strength, "when": when(found), **chosen})
    return sorted(made, key=lambda facet: facet["strength"], reverse=True)


def take(students: Sequence[dict]) -> dict:
    """Return which of some students to `take`: the fastest that is shown to be as `good` as its teacher.

    Where there is none, it is the best that is faster than the teacher; None where no student is.
    """
    fast = [each for each in students if each["speed"] > 1.05]
    good = [each for each in fast if (each["low"] or 0) > 1 - MARGIN and each["documents"] >= FEW_DOCUMENTS]
    return {"good": bool(good), "take": max(good or fast, key=lambda e: e["speed" if good else "share"], default=None)}


def when(students: Sequence[dict]) -> list[dict]:
    """Return, for each shape that was trained for several budgets of time or by several methods, the one to take.

    `students` is one for each of BUDGETS: with the best evidence among those trained within it, the best; None where
    there is none. Fewer layers come first. Students of other layer maps are left out. [] where more time buys nothing.
    """
    plain = [each for each in students if re.fullmatch(r"\d+-\d+", each["shape"]) and each["seconds"]]
    rows = []
    for shape in sorted({each["shape"] for each in plain}, key=lambda shape: [*map(int, shape.split("-"))][::-1]):
        of = [each for each in plain if each["shape"] == shape]
        within = [[each for each in of if each["seconds"] <= most] for most in BUDGETS.values()]
        best = [max(found, key=lambda each: (each["evidence"], each["share"]), default=None) for found in within]
        rows += [{"shape": shape, "students": best}] if len(of) > 1 and any(best) else []
    return rows if any(row["students"].count(row["students"][0]) < len(BUDGETS) for row in rows) else []


def drawing(facet: Mapping) -> dict:
    """Return what places a facet's figure, in per cent of its width and height; the template draws it.

    Beyond MAX_POINTS those off the front are gathered in cells, each one point that says how `many` it stands for.
    """
    found, front = facet["students"], facet["front"]
    band = max(found, key=lambda each: each["documents"])["band"]
    xs = [each["speed"] for each in found] + [1, 1.2]
    ys = [each[key] for each in found for key in ("share", "low", "high") if each[key] is not None] + [*band, 1]
    left, bottom, top = min(xs) - 0.1, min(ys) - 0.04, max(ys) + 0.04
    right = max(xs) + 0.2 * (max(xs) - left)  # room for the label of the fastest

    def across(speed: float) -> float:
        return round(100 * (speed - left) / (right - left), 2)

    def down(share: float) -> float:
        return round(100 * (top - share) / (top - bottom), 2)

    def ticks(low: float, high: float, steps: Sequence[float]) -> list[float]:
        step = next((step for step in steps if high - low <= 7 * step), (high - low) / 7)
        return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]

    others, cells = [each for each in found if not any(each is other for other in front)], {}
    if len(others) > MAX_POINTS:
        for each in others:
            cells.setdefault((across(each["speed"]) // 4, down(each["share"]) // 6), []).append(each)
        others = [of[0] | {"many": len(of), "low": None} for of in cells.values()]
    labels: list[tuple] = []  # above and to the right of its point no student of the front can be
    for each in front[:: -math.ceil(len(front) / MAX_LABELS)]:  # from the bottom
        name, x, y = each["label"].partition(" (")[0], across(each["speed"]), down(each["share"]) - 3
        for _, other_x, other_y in labels:  # on a phone a label is a quarter of the width and 5 % of the height
            y = min(y, other_y - 5) if abs(x - other_x) < 25 and abs(y - other_y) < 5 else y
        labels.append((name, x, y))
    return {
        "across": across, "down": down, "others": others, "labels": labels, "band": band,
        "x_ticks": ticks(left, right, (0.1, 0.25, 0.5, 1, 2, 5, 10, 50)),
        "y_ticks": ticks(bottom, top, (0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)),
        "methods": list(dict.fromkeys(each["method"] for each in found))[:MAX_LABELS],
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- claims


def evidence(entry: Mapping) -> Iterator[tuple[str, str, Mapping, str, str]]:
    """Yield (one, other, test, on what, unit) of every comparison in an entry; a positive difference is for `one`."""
    shapes, compared = entry.get("parameters", {}).get("student_shapes"), set()
    for row in entry.get("versus", []):  # notebook 03: every two methods of a shape
        if row.get("student"):
            names = row.get("name"), row.get("versus") or method_label("sft")
            names = tuple(str(name).removesuffix(f" {row['student']}") for name in names)
            compared |= {names, names[::-1]}
            yield *names, row, row["student"], "ROUGE-2"
    for row in entry.get("claims", []):  # notebook 03: what else was trained of its first shape
        numbers, names = INTERVAL.fullmatch(row.get("ROUGE-2") or ""), (row.get("comparison") or "").split(" versus ")
        if numbers and len(names) == 2 and tuple(map(method_label, names)) not in compared:
            test = dict(zip(NUMBERS, map(float, numbers.groups()), strict=True))
            test["seeds_agree"] = row.get("here") != VERDICTS[0]
            test["seeds"] = int(row["seeds"]) if (row.get("seeds") or "").isdecimal() else None
            yield *names, test, str(shapes[0]) if shapes and isinstance(shapes, list) else "", "ROUGE-2"
    for row in entry.get("cuts", []):  # notebook 02
        name, rival = row.get("name") or "", row.get("rival") or ""
        if rival == "-".join(reversed(name.split("-"))):
            yield "decoder cut", "encoder cut", row, f"{name} and {rival}", "ROUGE-2"
        elif rival.startswith(f"{name} from layer"):
            yield "first layer", "last layer", row, name, "ROUGE-2"
    for row in averaged(entry):
        depths, shares = re.fullmatch(r"(\d+)-(\d+)", row.get("student") or ""), list(map(row.get, SHARES))
        if depths and int(depths[1]) == 2 * int(depths[2]) and None not in shares:
            points = dict(zip(NUMBERS, (100 * (share - 1 + MARGIN) for share in shares), strict=True))
            points["seeds"] = row.get("seeds")
            yield "half the decoder", "95 % of the teacher", points, label_of(row), "points above 95 %"
    tasks = [{"model": "", **row} for row in (*entry["rows"], *entry.get("controls", [])) if row.get("task")]
    teachers = [row for row in tasks if row.get("method") == "teacher" and _sign(row) > 0]
    judging = {(row["model"], row["task"]) for row in teachers}  # elsewhere the teacher itself does not beat scratch
    paths = {row.get("path") for row in entry.get("ways", [])}
    for row in tasks:  # notebook 04
        if (row["model"], row["task"]) in judging and (row["model"] or row.get("method") in paths):
            name, other = f"{row['model'] or ''} {row.get('method')}".strip(), row.get("untrained")
            read_nothing = isinstance(other, dict)  # the fair baseline on text that scratch was trained for
            yield name, "none" if read_nothing else "scratch", other if read_nothing else row, row["task"], ""
    for row in entry.get("interpolated", []):
        name, task = row.get("name") or "", row.get("task")
        if ("", task) in judging and (" by " in name or " mixed" in name):
            yield "assistant" if " by " in name else "mixed target", "direct", row, task, ""
    for row in entry.get("gap", []):  # notebook 05 compares losses: a positive difference is for the second
        names = f"{row.get('versus')} and {row.get('name')}".replace("by ", "")
        yield "smaller teacher", "larger teacher", row, names, "nats"
    for row in entry.get("routes", []):
        name, other = row.get("name") or "", str(row.get("versus"))
        if name.startswith("by assistant") and other.startswith("direct"):
            yield "direct", "assistant", row, f"{name.removeprefix('by ')} at equal cost", "nats"
        elif name == "mixed target":
            yield "direct", "mixed target", row, "", "nats"


def kind_of(entry: Mapping) -> str:
    """Return the kind of an entry's data, by the published data set whose references notebook 03 found nearest."""
    readings = " ".join(str(row.get("reading")) for row in entry.get("signals", []))
    return next((kind for name, kind in KINDS.items() if f"nearer to {name}," in readings), "")


def _sign(test: Mapping) -> int:
    return int((test.get("low") or 0) > 0) - int((test.get("high") or 0) < 0) if test.get("seeds_agree", True) else 0


def judged_claims(entries: Sequence[Mapping]) -> list[dict]:
    """Return the papers' claims with their evidence and the verdict of each piece, decided ones first.

    Of each data set and teacher (and start of the student) stands the run that carries most: of more seeds (up to
    ENOUGH_SEEDS), then one that is no demonstration, then of more documents, then the later one.
    """
    found: dict[tuple[str, str], list[dict]] = {}
    for entry in entries:
        basis, init = facts(entry), entry.get("parameters", {}).get("init")
        start, kind = f"{init} start" if init and isinstance(init, str) else "", kind_of(entry)
        for one, other, test, on, unit in evidence(entry):
            numbers = [test.get(key) for key in NUMBERS]
            if all(map(is_number, numbers)) and not 0 < basis["documents"] < FEW_DOCUMENTS:
                seeds = test["seeds"] if is_number(test.get("seeds")) else basis["seeds"]
                line = basis | {"kind": kind, "seeds": seeds, "on": ", ".join(filter(None, (on, start)))}
                line["unit"] = unit or test.get("metric") or ""
                line["group"] = basis["data"], basis["teacher"], start
                line["rank"] = min(seeds, ENOUGH_SEEDS), not basis["demo"], basis["documents"]
                line["rank"] += entry.get("date", ""), entry["report"]
                for pair, sign, order in (((one, other), 1, (0, 1, 2)), ((other, one), -1, (0, 2, 1))):
                    signed = dict(zip(NUMBERS, (sign * numbers[i] for i in order), strict=True))
                    signed["verdict"] = VERDICTS[sign * _sign(test)]
                    found.setdefault(tuple(map(method_label, pair)), []).append(line | signed)
    with open(CLAIMS, newline="", encoding="utf-8") as file:
        claims = list(csv.DictReader(file))
    for claim in claims:
        lines = found.get(tuple(map(method_label, claim["comparison"].split(" versus "))), [])
        lines = [line for line in lines if claim["data"] in ("", line["kind"])]
        best = {line["group"]: line["rank"] for line in sorted(lines, key=lambda line: line["rank"])}
        claim["evidence"] = [line for line in lines if line["rank"] == best[line["group"]]][: 2 * MAX_FACETS]
        verdicts = {line["verdict"] for line in claim["evidence"]} or {"not testable here"}
        claim["verdict"] = verdicts.pop() if len(verdicts) == 1 else "mixed"
    order = [VERDICTS[1], VERDICTS[-1], "mixed", VERDICTS[0], "not testable here"]
    return sorted(claims, key=lambda claim: order.index(claim["verdict"]))
