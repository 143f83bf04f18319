"""A ladder of teachers for one student: what a larger teacher, and an assistant on the way from it, is worth.

All are judged by their loss on the same windows of held-out text, corrupted in the same way, in nats per target token:
students differ there long before a task can tell them apart, and every window counts, so that tests are paired.

Out of scope: training (miniend.distill), the two rounds with an assistant (interpolation.with_assistant).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from distill_utils.artifacts import InputError, artifact, read_json, write_json
from distill_utils.data.denoising import tokens_hash
from distill_utils.device import device
from distill_utils.distillation import objectives
from distill_utils.evaluation import statistics
from distill_utils.experiments import miniend
from distill_utils.experiments.comparison import FEW_DOCUMENTS, smoke_note
from distill_utils.models import students
from distill_utils.models.loading import check_same_tokenizer, load_model, model_fingerprint
from distill_utils.planning import measure, plan, step


def load_ladder(names: Sequence[str]) -> dict:
    """Return {name: (model on the device, tokenizer)}, smallest first.

    Raises InputError for a repeated name or different tokenizers: the losses would count different tokens.
    """
    if not names or len(set(names)) < len(names):
        raise InputError(f"teachers {list(names)} are not a ladder: name at least one, each only once")
    loaded = {name: load_model(name) for name in names}
    first, (_, tokenizer) = next(iter(loaded.items()))
    for name, (_, own) in loaded.items():
        check_same_tokenizer(first, tokenizer, name, own)
    for model, _ in loaded.values():
        model.to(device())
    return dict(sorted(loaded.items(), key=lambda item: students.count_parameters(item[1][0])["total"]))


def test_text(name: str, place: str | Path, held_out: np.ndarray, num: int, source_length: int, denoising: str) -> Path:
    """Return the artifact of a model's test on corrupted held-out text: scores.json with one loss a window."""
    model, tokenizer = load_model(place)
    settings = {
        "model": model_fingerprint(str(place), model),
        "text": tokens_hash(held_out),
        "windows": [num, source_length, denoising],
    }

    def build(folder: Path) -> dict:
        losses = miniend.window_losses(model.to(device()), tokenizer, held_out, num, source_length, denoising).tolist()
        write_json(folder / "scores.json", {"loss": losses})
        return {"name": name, "parameters": students.count_parameters(model)["total"], "loss": float(np.mean(losses))}

    return artifact(f"text-{name.replace('/', '_')}", settings, build)  # a hub name is no folder in a folder


def row(name: str, tested: Sequence[Path], **facts: object) -> dict:
    """Return one line of the ladder: loss on held-out text, mean over seeds, with its interval."""
    mean, low, high = statistics.bootstrap_interval(miniend.document_scores(tested))
    parameters = read_json(tested[0] / "results.json")["parameters"]
    found = {"name": name, "seeds": len(tested), "parameters": parameters}
    return found | {"loss": mean, "loss_low": low, "loss_high": high} | facts


def compare(name: str, tested: Sequence[Path], other: str, baseline: Sequence[Path]) -> dict:
    """Return the paired test of two students of the same seeds; a negative `difference` is the lower loss."""
    losses = [miniend.document_scores(folders) for folders in (tested, baseline)]
    return {"name": name, "versus": other} | statistics.compare(*losses)


def in_words(test: Mapping) -> str:
    """Return a comparison of losses in words, with its interval."""
    return statistics.format_comparison(test["name"], test, test["versus"], decimals=3, lower_is_better=True)


def gap_verdict(tests: Sequence[Mapping], num_seeds: int) -> str:
    """Return whether a capacity gap shows, from tests of the largest teacher's student against each smaller one's."""
    if not tests:
        return "**One teacher shows no gap**: name several"
    signs = [statistics.effect_sign(test) for test in tests]
    worse = [test for test, sign in zip(tests, signs, strict=True) if sign > 0]
    if worse:
        best = max(worse, key=lambda test: test["difference"])
        name, seeds = best["versus"].removeprefix("by "), statistics.seeds_in_words(num_seeds)
        less = f"{best['difference']:.3f} ({best['low']:.3f} to {best['high']:.3f})"
        lower = f"its student's loss is {less} nats per token below the largest's"
        return f"**Take {name}, a smaller teacher**: in {seeds} {lower}"
    if max(signs) < 0:
        return "**Take the largest teacher**: there is no capacity gap, its student beats that of every smaller one"
    return "**Keep the largest teacher**: no capacity gap is shown, no smaller one's student is better"


def equal_cost_steps(direct: float, first: float, second: float, split: tuple[int, int]) -> int:
    """Return how many updates of direct distillation cost as much as two rounds of `split` updates.

    The others are floating-point operations per update: direct, of the assistant's round, and of the student's round.
    """
    return max(1, round((first * split[0] + second * split[1]) / direct))


def check_plan(
    models: Sequence[str], devices: Sequence[int], batch_size: int, micro_batch_size: int, steps: int
) -> None:
    """Reject a plan without devices, updates or windows, or with only one model, before anything is computed."""
    if len(models) < 2:
        raise InputError(f"plan_models {list(models)} has no student: name a teacher and its student")
    sizes = {"batch_size": batch_size, "micro_batch_size": micro_batch_size, "steps": steps}
    sizes["devices"] = min(devices, default=1)
    for name, value in sizes.items():
        if value < 1:
            raise InputError(f"plan_{name} {value} is too small: use at least 1")
    for number in devices:
        share, rest = divmod(batch_size, number)
        if rest or share % min(micro_batch_size, share):
            passes = f"passes of plan_micro_batch_size {micro_batch_size}: use a multiple of both"
            raise InputError(f"{number} devices do not divide plan_batch_size {batch_size} into {passes}")


def plan_rounds(
    names: Sequence[str], configs: Sequence, devices: int, batch_size: int, micro_batch_size: int, steps: int
) -> list[dict]:
    """Return the rounds to plan for so many devices: the direct way, then one for each link of the chain.

    The chain's rounds share the updates of the direct way; without assistants the first is all there is.
    """
    last = len(configs) - 1
    pairs = list(dict.fromkeys([(0, last), *((i, i + 1) for i in range(last))]))
    return [
        {
            "run": f"{names[a]} > {names[b]}",
            "teacher": configs[a],
            "student": configs[b],
            "devices": devices,
            "micro_batch_size": min(micro_batch_size, batch_size // devices),
            "max_steps": steps if number == 0 else steps // max(len(pairs) - 1, 1),
        }
        for number, (a, b) in enumerate(pairs)
    ]


def written_rows(
    names: Sequence[str], configs: Sequence, documents: int, lengths: Sequence[int], batch_size: int,
    beams: Sequence[int], top_k: int, assumed: Mapping,
) -> list[dict]:  # fmt: skip
    """Return one row a teacher: hours that its labels take by beams, and the disk of its cached probabilities."""
    rows = []
    for name, config in zip(names, configs, strict=False) if documents else ():
        row = {"written by": name}
        for num_beams in beams:
            seconds = plan.label_seconds(
                config, documents, *lengths, batch_size, assumed["ceilings"], num_beams=num_beams,
                utilization=assumed["utilization"],
            )  # fmt: skip
            row[f"labels, beams: {num_beams} (h)"] = seconds / 3600
        size = plan.target_cache_bytes(documents * lengths[1], top_k, config.vocab_size)
        rows.append(row | {f"top {top_k} probabilities (GB)": size / 1e9})
    return rows


def check_step(pair: str, run: miniend.AgnosticRun, batch_size: int, dtype: str, lengths: Mapping[str, int]) -> dict:
    """Return the plan and the measurement of one step of "teacher > student", in a process of its own."""
    configs = [measure.model_config(name.strip()) for name in pair.split(">")[::-1]]
    configs[0].vocab_size = configs[1].vocab_size
    weights = replace(run, num_relation_heads=measure.relation_heads(*configs)).weights
    taken = measure.measure_step(
        partial(objectives.miniend, **weights), *configs, **lengths, batch_size=batch_size,
        micro_batch_size=batch_size, precision=dtype, teacher_dtype=dtype,
    )  # fmt: skip
    return {"run": pair, "path": run.path} | taken


def operations(run: miniend.AgnosticRun, teacher, student, lengths: Mapping[str, int], batch_size: int) -> float:
    """Return the floating-point operations of one update of a run, of two configs."""
    planned = step.plan_step(
        partial(objectives.miniend, **run.weights), student, teacher, **lengths, batch_size=batch_size,
        optimizer="muon", on=device().type,
    )  # fmt: skip
    return sum(planned["flops"].values())


def route_rows(label: str, taught: str, each: Sequence[float], updates: Sequence[int], longer: int) -> list[dict]:
    """Return what is compared for one assistant: its student, and direct distillation at equal updates and cost."""
    direct, way = f"direct, cost of {label}", {"updates": f"{updates[0]} + {updates[1]}"}
    way["TFLOP"] = (each[1] * updates[0] + each[2] * updates[1]) / 1e12
    rows = [{"name": f"by assistant {label}", "versus": other, **way} for other in (taught, direct)]
    return [*rows, {"name": direct, "versus": taught, "updates": str(longer), "TFLOP": each[0] * longer / 1e12}]


def cost_row(route: str, rounds: Sequence[Mapping], price: float, watts: float) -> dict:
    """Return what a route of planned rounds costs: hours, device-hours, price, energy, memory, communication."""
    hours = sum(row["device_hours"] for row in rounds)
    return {
        "route": route,
        "hours": sum(row["hours"] for row in rounds),
        "device-hours": hours,
        "price": hours * price,
        "energy (kWh)": hours * watts / 1e3,
        "peak_memory_gb": max(row["peak_memory_gb"] for row in rounds),
        "GB sent per step": max(row["communication (GB/step)"] for row in rounds),
    }


def verdict(
    gap: Sequence[Mapping], rows: Sequence[Mapping], routes: Sequence[Mapping], checks: Sequence[Mapping],
    num_windows: int, num_seeds: int, max_steps: int,
) -> str:  # fmt: skip
    """Return which teacher to take, whether assistants help and the plan holds, as one paragraph of Markdown."""
    lines = [smoke_note(num_windows, "windows").removesuffix(".")]
    if num_windows >= FEW_DOCUMENTS:
        best = min((row for row in rows if row["name"].startswith("by ")), key=lambda row: row["loss"])
        scratch = next(row for row in rows if row["name"] == "scratch")
        says = gap_verdict(gap, num_seeds)
        if best["loss"] >= scratch["loss"]:
            says = "**Train on the text alone**: no teacher's student has a lower loss than the one without a teacher"
        lines = [f"{says} (lowest loss {best['loss']:.3f}, {best['name']}; without a teacher "
                 f"{scratch['loss']:.3f})"]  # fmt: skip
        helped = [row for row in routes if row["name"].startswith("by assistant")]
        said = [in_words(row | {"versus": f"the one {row['versus']}"}) for row in helped]
        lines += [f"At equal tokens, the student {said[0]}"] if said else []
    if checks:
        ratios = [row["planned_over_measured"] for row in checks]
        said = f"{min(ratios):.2f} to {max(ratios):.2f} times what {len(ratios)} real steps used"
        lines.append(f"The planned memory is {said}")
    lines.append(statistics.budget_in_words(max_steps, num_seeds, f"{num_windows:,} windows"))
    return f"{'. '.join(lines)}."
