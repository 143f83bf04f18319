"""Measure what halving costs in quality: `distill`'s winner beside every candidate trained to the end, and beside SFT.

    python benchmarks/race_regret.py --seeds 0 1 2 --hours 1 --speedup 2.1 --max-rungs 3 --workers 2

One race a seed, on a budget that only small shapes meet. Then every candidate gets as many updates as the longest
student of the race and is scored on the same validation documents, as a patient user would do; the grid's choice is the
best of these and of the race's own. Regret is that choice minus the winner, in ROUGE-2 on test documents, paired.
`sft by hand`, trained after all races, is one student of the largest fitting shape at the usual learning rate, for all
updates that the hours pay for. All of it are artifacts: after a kill the same command goes on, and results are written
after each part. Prices are those of one worker, measured at the first start, on a quiet machine; more workers train
the same updates in less time. Without `--max-rungs` a race that drops early goes on with one student, and the grid of
nine at its updates takes many hours.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from distill_utils.artifacts import read_json, write_json
from distill_utils.evaluation import scoring, statistics
from distill_utils.experiments import budget, distill, race
from distill_utils.report.settings import NOTEBOOKS, notebook_parameters

RESULTS = Path(__file__).parent / "results" / "race_regret.json"


def raced(given: dict) -> tuple[dict, Callable[[], None]]:
    """Run one race and its grid; return names and test scores, one per document, and what adds SFT by hand."""
    asked, seconds = distill.prepare(given), 3600 * given["hours"]
    shapes = distill.measured_shapes(asked)
    plan = distill.candidates(asked, budget.choose_shapes(read_json(shapes / "results.json")["rows"], asked.limits))
    prices = distill.race_prices(asked, plan, shapes, distill.measured_prices(asked, plan))
    score = partial(distill.trained_and_scored, asked, plan)
    found = race.run_race(prices, seconds, score)
    last = max(row["updates"] for row in found["rows"])
    scored = score([(name, last, 0) for name in plan])
    validation = {(row["name"], row["updates"]): row["score"] for row in found["rows"]}
    validation |= {(name, last): values.mean() for name, values in zip(plan, scored, strict=True)}
    chosen = {
        "race": (found["winner"], found["updates"], found["seed"]),
        "grid": (*max(validation, key=validation.get), 0),
    }
    kept = {
        "chosen": {kind: " ".join(map(str, key)) for kind, key in chosen.items()}, "updates": last,
        "candidates": {name: round(float(validation[name, last]), 3) for name in plan}, "ended": found["ended"],
        "scores": {"teacher": test_scores(asked)} | {kind: test_scores(asked, key) for kind, key in chosen.items()},
    }  # fmt: skip

    def by_hand() -> None:
        name = next(name for name, run in plan.items() if run.method == "sft")
        price = prices["candidates"][name]
        pays = int((seconds - prices["measured"] - prices["end"] - price["score"]) / price["update"])
        score([(name, pays, 0)])
        kept["chosen"]["sft by hand"] = f"{name} {pays} 0"
        kept["scores"]["sft by hand"] = test_scores(asked, (name, pays, 0))

    return kept, by_hand


def test_scores(asked, key: tuple | None = None) -> np.ndarray:
    """Return the test scores of the teacher, or of a student that was trained before, one per document."""
    student = ("-".join(map(str, key)), asked.made[key][0]) if key else ()
    return scoring.read_scores(distill.tested_on(asked, "test", *student))[asked.given["metric"]]


def write_results(output: Path, given: dict, seeds: list[int], races: list[dict]) -> None:
    """Write means of every race and their pooled comparisons; SFT by hand of the races that have it."""
    hand = [each["scores"] for each in races if "sft by hand" in each["scores"]]
    scores = {kind: np.stack([each["scores"][kind] for each in races]) for kind in ("teacher", "race", "grid")}
    rows = {
        "regret": statistics.compare(scores["grid"], scores["race"]),
        "race, share of the grid's choice": statistics.share_of(scores["race"], scores["grid"]),
        "race, share of the teacher": statistics.share_of(scores["race"], scores["teacher"]),
    }
    if hand:
        ours, other = (np.stack([each[kind] for each in hand]) for kind in ("race", "sft by hand"))
        rows["race minus sft by hand"] = statistics.compare(ours, other) | {"races": len(hand)}
    for each in races:
        each["means"] = {kind: round(float(values.mean()), 3) for kind, values in each["scores"].items()}
    kept = [{key: value for key, value in each.items() if key != "scores"} for each in races]
    write_json(output, {"asked": given, "seeds": seeds, **rows, "races": kept})
    print(kept[-1], rows, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--speedup", type=float, default=2.1)
    parser.add_argument("--num-train", type=int, default=6000)
    parser.add_argument("--num-test", type=int, default=1000)
    parser.add_argument("--max-rungs", type=int, default=0, help="0 = as many as the hours pay for")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = vars(parser.parse_args())
    seeds, output = given.pop("seeds"), given.pop("output")
    defaults = {name: each.default for name, each in notebook_parameters(NOTEBOOKS / "distill.ipynb").items()}
    races, by_hand = [], []
    for seed in seeds:
        kept, add = raced(defaults | given | {"seed": seed})
        races.append(kept)
        by_hand.append(add)
        write_results(output, given, seeds[: len(races)], races)
    for add in by_hand:
        add()
        write_results(output, given, seeds, races)


if __name__ == "__main__":
    main()
