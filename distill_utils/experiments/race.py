"""Synchronous halving by prices: which candidates the time pays for, who is dropped and why, who wins.

Pure functions of prices, scores and hours, so that a race that was killed makes the same choices again. Out of scope:
what is trained (distill.py).

Prices are a dictionary of seconds: "candidates" by name with "update", "score" (one score, with all but updates that a
student of a rung costs), "labels" (whether it needs them) and "parameters"; "labels" for all; "measured", spent before
the race, with its parts "teacher", to fine-tune one, and "states", to write the teacher's; "end", to be kept for test
and export; and "first_rung", "cooldown_share" and "max_rungs" (0 = any) of trunks.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from distill_utils.artifacts import InputError
from distill_utils.evaluation import statistics


def updates_at(prices: Mapping, rung: int) -> int:
    """Return the number of updates of a rung's student, its cooldown included; rungs count from 0."""
    return prices["first_rung"] * 2**rung


def rung_seconds(prices: Mapping, name: str, rung: int) -> float:
    """Return the price of one candidate's rung: the trunk from where it stands, a cooldown, a score."""
    cooldowns = [max(1, round(prices["cooldown_share"] * updates_at(prices, r))) for r in (rung - 1, rung)]
    stands = updates_at(prices, rung - 1) - cooldowns[0] if rung else 0
    price = prices["candidates"][name]
    return (updates_at(prices, rung) - stands) * price["update"] + price["score"]


def labels_seconds(prices: Mapping, names: Sequence[str]) -> float:
    """Return the price of the labels, which are written once for all that need them."""
    return prices["labels"] * any(prices["candidates"][name]["labels"] for name in names)


def paid(prices: Mapping, names: Sequence[str], rung: int) -> float:
    """Return the price of a rung of several candidates; labels are paid for at the first."""
    labels = 0.0 if rung else labels_seconds(prices, names)
    return labels + sum(rung_seconds(prices, name, rung) for name in names)


def seed_seconds(prices: Mapping, name: str, updates: int) -> float:
    """Return the price of the same student with another seed, from nothing."""
    return updates * prices["candidates"][name]["update"] + prices["candidates"][name]["score"]


def next_rung(prices: Mapping, ranked: Sequence[str], rung: int, spent: float, seconds: float) -> list[str]:
    """Return the candidates that the remaining time lets into the next rung, best first; none ends the race.

    `ranked` are those still in it, best first. Each rung has half as many places as the one before, two at least. From
    the second on a second seed of two finalists must stay payable, and always the end.
    """
    if prices["max_rungs"] and rung == prices["max_rungs"]:
        return []
    places = max(2, math.ceil(len(prices["candidates"]) / 2**rung))
    # Of two that cannot be separated none is dropped to train the other for longer.
    fewest = min(2, len(ranked)) if rung else 1
    for size in range(min(places, len(ranked)), fewest - 1, -1):
        kept = list(ranked[:size])
        seeds = sorted(seed_seconds(prices, name, updates_at(prices, rung)) for name in kept)[-2:]
        needed = paid(prices, kept, rung) + (sum(seeds) if rung and size > 1 else 0.0)
        if spent + needed + prices["end"] <= seconds:
            return kept
    return []


def planned_rungs(prices: Mapping, seconds: float) -> list[dict]:
    """Return the rungs that fit into the time if no candidate is worse: updates, candidates, price."""
    rows, ranked, spent = [], list(prices["candidates"]), prices["measured"]
    while ranked := next_rung(prices, ranked, len(rows), spent, seconds):
        cost = paid(prices, ranked, len(rows))
        spent += cost
        rows.append({"updates": updates_at(prices, len(rows)), "candidates": len(ranked), "seconds": cost})
    return rows


def check_hours(prices: Mapping, seconds: float) -> None:
    """Raise InputError when not even one candidate can be trained for one rung, naming the hours that it needs."""
    names = list(prices["candidates"])
    if next_rung(prices, names, 0, prices["measured"], seconds):
        return
    teacher = prices.get("teacher", 0.0)  # takes its share of more hours too
    fixed, left = prices["measured"] - teacher + prices["end"], 1 - teacher / seconds
    # Rounded up: what is named must suffice.
    one, every = (math.ceil((fixed + paid(prices, chosen, 0)) / left / 36) / 100 for chosen in (names[:1], names))
    raise InputError(
        f"hours {seconds / 3600:g} are too few for one rung of {prices['first_rung']} updates: one candidate needs "
        f"{one:.2f} h, all {len(names)} need {every:.2f} h; raise hours, or lower first_rung, num_train or num_test"
    )


def run_race(
    prices: Mapping, seconds: float, score: Callable[[list[tuple[str, int, int]]], Sequence[np.ndarray]]
) -> dict:
    """Race the candidates; return the winner, how it won, and what happened to the others.

    `score` gets students as (name, updates, seed), trains them and returns the scores of each, one per validation
    document; seed 0 is the race's, 1 the finalists' second. Only what a 95 % interval separates from the best of its
    rung is "worse"; what the time does not pay for is "dropped for time". The race ends when the time does, or when
    nobody gained from twice the updates. A candidate stands for its best rung. The time is that of one worker: with
    several a race makes the same choices and is over sooner.
    """
    check_hours(prices, seconds)
    scores: dict[str, dict[int, np.ndarray]] = {name: {} for name in prices["candidates"]}
    ranked, spent, rung, rows, fates = list(scores), prices["measured"], 0, [], {}
    ended = "the time or the rungs were used up"
    while kept := next_rung(prices, ranked, rung, spent, seconds):
        updates = updates_at(prices, rung)
        fates |= {name: f"dropped for time before {updates} updates" for name in ranked if name not in kept}
        for name, values in zip(kept, score([(name, updates, 0) for name in kept]), strict=True):
            scores[name][updates] = values
        spent += paid(prices, kept, rung)
        ranked = sorted(kept, key=lambda name: -scores[name][updates].mean())
        for name in ranked:
            row = _score_row(name, rung, updates, scores[name][updates], scores[ranked[0]][updates])
            rows.append(row | {"priced_s": rung_seconds(prices, name, rung)})
            if statistics.effect_sign(row) < 0:
                fates[name] = f"worse after {updates} updates"
        ranked = [name for name in ranked if name not in fates]
        if rung and all(scores[name][updates].mean() <= scores[name][updates // 2].mean() for name in ranked):
            ended = "no student gained from twice the updates"
            break
        rung += 1

    best = {name: max(scores[name], key=lambda updates: scores[name][updates].mean()) for name in ranked}
    ranked = sorted(ranked, key=lambda name: -scores[name][best[name]].mean())
    found = {name: [scores[name][best[name]]] for name in ranked}
    finalists = ranked[:2]
    again = sum(seed_seconds(prices, name, best[name]) for name in finalists)
    if len(finalists) > 1 and spent + again + prices["end"] <= seconds:
        spent += again
        for name, values in zip(finalists, score([(name, best[name], 1) for name in finalists]), strict=True):
            found[name].append(values)
    winner = max(finalists, key=lambda name: np.mean(found[name]))
    tests = {name: statistics.compare(np.array(found[name]), np.array(found[winner])) for name in ranked}
    near = [name for name in ranked if statistics.effect_sign(tests[name]) >= 0]
    fates |= {name: "not separated from the winner" if name in near else "worse than the winner" for name in ranked}
    fates[winner] = "winner"
    # The smallest that no interval separates from the winner, maybe that itself.
    simplest = min(near, key=lambda name: (prices["candidates"][name]["parameters"], name != winner))
    seeds = [float(values.mean()) for values in found[winner]]
    return {
        "winner": winner, "updates": best[winner], "best": best, "seed": int(np.argmax(seeds)), "seed_scores": seeds,
        "finalists": {name: len(found[name]) for name in finalists}, "simplest": simplest,
        "rows": rows, "fates": fates, "ended": ended, "seconds": spent + prices["end"],
    }  # fmt: skip


def _score_row(name: str, rung: int, updates: int, scores: np.ndarray, best: np.ndarray) -> dict:
    mean, low, high = statistics.bootstrap_interval(scores)
    row = {"name": name, "rung": rung + 1, "updates": updates, "score": mean, "score_low": low, "score_high": high}
    return row | statistics.compare(scores, best)
