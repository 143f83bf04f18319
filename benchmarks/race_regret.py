"""Measure what halving costs in quality: `distill`'s winner beside every candidate trained to the end, and beside SFT.

    python benchmarks/race_regret.py --seeds 0 1 2 --hours 1 --speedup 2.6

One race a seed, on a budget that only small shapes meet. Then every candidate gets as many updates as the longest
student of the race and is scored on the same validation documents, as a patient user would do; the grid's choice is the
best of these and of the race's own. Regret is that choice minus the winner, in ROUGE-2 on test documents, paired.
`sft by hand` is one student of the largest fitting shape at the usual learning rate, for all updates that the hours
pay for. All of it are artifacts: after a kill the same command goes on. Prices are measured at the first start, on a
quiet machine.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np

from distill_utils.artifacts import read_json, write_json
from distill_utils.evaluation import scoring, statistics
from distill_utils.experiments import budget, distill, race
from distill_utils.report.settings import NOTEBOOKS, notebook_parameters

RESULTS = Path(__file__).parent / "results" / "race_regret.json"


def raced(given: dict) -> dict:
    """Run one race, its grid and SFT by hand; return names and test scores, one per document, of all three."""
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

    by_hand = next(name for name, run in plan.items() if run.method == "sft")
    price = prices["candidates"][by_hand]
    pays = int((seconds - prices["measured"] - prices["end"] - price["score"]) / price["update"])
    score([(by_hand, pays, 0)])
    chosen = {
        "race": (found["winner"], found["updates"], found["seed"]),
        "grid": (*max(validation, key=validation.get), 0),
        "sft by hand": (by_hand, pays, 0),
    }
    tests = {"teacher": distill.tested_on(asked, "test")}
    for kind, key in chosen.items():
        tests[kind] = distill.tested_on(asked, "test", "-".join(map(str, key)), asked.made[key][0])
    return {
        "chosen": {kind: " ".join(map(str, key)) for kind, key in chosen.items()}, "updates": last,
        "candidates": {name: round(float(validation[name, last]), 3) for name in plan}, "ended": found["ended"],
        "scores": {kind: scoring.read_scores(path)[given["metric"]] for kind, path in tests.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--speedup", type=float, default=2.6)
    parser.add_argument("--num-train", type=int, default=6000)
    parser.add_argument("--num-test", type=int, default=1000)
    given = vars(parser.parse_args())
    seeds = given.pop("seeds")
    defaults = {name: each.default for name, each in notebook_parameters(NOTEBOOKS / "distill.ipynb").items()}
    races = []
    for seed in seeds:
        races.append(raced(defaults | given | {"seed": seed}))
        print(seed, {key: value for key, value in races[-1].items() if key != "scores"}, flush=True)
        scores = {kind: np.stack([each["scores"][kind] for each in races]) for kind in races[0]["scores"]}
        rows = {
            "regret": statistics.compare(scores["grid"], scores["race"]),
            "race, share of the grid's choice": statistics.share_of(scores["race"], scores["grid"]),
            "race minus sft by hand": statistics.compare(scores["race"], scores["sft by hand"]),
            "race, share of the teacher": statistics.share_of(scores["race"], scores["teacher"]),
        }
        means = {kind: [round(float(value), 3) for value in values.mean(1)] for kind, values in scores.items()}
        kept = [{key: value for key, value in each.items() if key != "scores"} for each in races]
        write_json(RESULTS, {"asked": given, "seeds": seeds[: len(races)], "means": means, **rows, "races": kept})
        print(rows, means, flush=True)


if __name__ == "__main__":
    main()
