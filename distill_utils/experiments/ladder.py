"""A ladder of teachers for one student: what a larger teacher, and an assistant on the way from it, is worth.

All are judged by their loss on the same windows of held-out text, corrupted in the same way, in nats per target token:
students differ there long before a task can tell them apart, and every window counts, so that tests are paired.

Out of scope: training (miniend.distill), the two rounds with an assistant (miniend.with_assistant).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from distill_utils.artifacts import InputError, artifact, config_hash, read_json, write_json
from distill_utils.device import device
from distill_utils.evaluation.statistics import bootstrap_interval, paired_test
from distill_utils.experiments import miniend
from distill_utils.models import students
from distill_utils.models.loading import load_model, model_fingerprint


def load_ladder(names: Sequence[str]) -> dict:
    """Return {name: (model on the device, tokenizer)}, smallest first.

    Raises InputError when a name stands twice, or when two models do not share one vocabulary: their students' losses
    would be of other tokens.
    """
    if not names or len(set(names)) < len(names):
        raise InputError(f"teachers {list(names)} are no ladder: name at least one, each once")
    loaded = {name: load_model(name) for name in names}
    first, (_, tokenizer) = next(iter(loaded.items()))
    for name, (_, own) in loaded.items():
        if own.get_vocab() != tokenizer.get_vocab():
            raise InputError(f"{name} has another vocabulary than {first}: give teachers that share one tokenizer")
    for model, _ in loaded.values():
        model.to(device())
    return dict(sorted(loaded.items(), key=lambda item: students.count_parameters(item[1][0])["total"]))


def test_text(name: str, place: str | Path, held_out: np.ndarray, num: int, source_length: int, denoising: str) -> Path:
    """Return the artifact of a model's test on corrupted held-out text: scores.json with one loss a window."""
    model, tokenizer = load_model(place)
    settings = {
        "model": model_fingerprint(str(place), model),
        "text": config_hash(held_out.tolist()),
        "windows": [num, source_length, denoising],
    }

    def build(folder: Path) -> dict:
        losses = miniend.window_losses(
            model.to(device()), tokenizer, held_out, num, source_length, denoising
        ).tolist()
        write_json(folder / "scores.json", {"loss": losses})
        return {"name": name, "parameters": students.count_parameters(model)["total"], "loss": float(np.mean(losses))}

    return artifact(f"text-{name}", settings, build)


def row(name: str, tested: Sequence[Path], **facts: object) -> dict:
    """Return one line of the ladder: loss on held-out text, mean over seeds, with an interval over windows."""
    losses = window_losses(tested).mean(0)
    mean, low, high = bootstrap_interval(losses)
    parameters = read_json(tested[0] / "results.json")["parameters"]
    found = {"name": name, "seeds": len(tested), "parameters": parameters}
    return found | {"loss": mean, "loss_low": low, "loss_high": high} | facts


def window_losses(tested: Sequence[Path]) -> np.ndarray:
    """Return the losses (seeds, windows)."""
    return np.array([read_json(folder / "scores.json")["loss"] for folder in tested])


def compare(name: str, tested: Sequence[Path], other: str, baseline: Sequence[Path]) -> dict:
    """Return the paired test of two students over the windows; a negative `difference` is the lower loss.

    Windows are many and seeds few, so that an interval over windows may hold a difference that another seed turns
    round. `seeds_agree` says whether the difference has one sign in every seed; both are given the same seeds.
    """
    ours, theirs = window_losses(tested), window_losses(baseline)
    signs = np.sign((ours - theirs).mean(1))
    agree = {"seeds_agree": bool((signs == signs[0]).all())}
    return {"name": name, "versus": other} | paired_test(ours.mean(0), theirs.mean(0)) | agree


def shown(test: Mapping) -> int:
    """Return 1 for a higher loss, -1 for a lower one, 0 where the interval holds 0 or seeds disagree on the sign."""
    if not test["seeds_agree"]:
        return 0
    return int(test["low"] > 0) - int(test["high"] < 0)


def told(test: Mapping) -> str:
    """Return a comparison in words, with its interval, and with the seeds where they disagree."""
    says = ("is better than", "cannot be told from", "is worse than")[shown(test) + 1]
    split = "" if test["seeds_agree"] else ", and seeds disagree"
    return (
        f"{test['name']} {says} {test['versus']} ({test['difference']:+.3f}, {test['low']:+.3f} to "
        f"{test['high']:+.3f}{split})"
    )


def gap_verdict(tests: Sequence[Mapping], num_seeds: int) -> str:
    """Return whether a capacity gap shows, from tests of the largest teacher's student against each smaller one's."""
    if not tests:
        return "**One teacher shows no gap**: name several."
    worse = [f"{test['versus'].removeprefix('by ')} by {test['difference']:.3f}" for test in tests if shown(test) > 0]
    if worse:
        seeds = "one seed" if num_seeds == 1 else f"{num_seeds} seeds"
        return f"**A capacity gap in {seeds}**: the largest teacher's student is worse than that of {', '.join(worse)}."
    if all(shown(test) < 0 for test in tests):
        return "**No capacity gap**: the larger the teacher, the better its student."
    return "**No capacity gap is shown**: no smaller teacher's student is better than the largest's."


def equal_cost_steps(direct: float, first: float, second: float, split: tuple[int, int]) -> int:
    """Return how many updates of direct distillation cost as much as two rounds of `split` updates.

    The others are floating-point operations an update: direct, of the assistant's round, and of the student's round.
    """
    return max(1, round((first * split[0] + second * split[1]) / direct))
