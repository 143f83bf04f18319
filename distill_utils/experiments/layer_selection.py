"""Which layers to keep: evidence before training, on training documents, and what it says about students after it.

Out of scope: the maps that need no data and the cut itself (students.py), training (runs.py). A student is judged by a
`score` function of a model, so the same sweep serves the loss and ROUGE. A *view* is a student on the teacher's own
weights (`init_student(..., share_weights=True)`): a layer is left out without copying or loading anything.
"""

import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill_utils.artifacts import InputError
from distill_utils.data.batches import batch_list
from distill_utils.device import mixed_precision, to_device
from distill_utils.distillation.losses import IGNORED, chunked_token_losses
from distill_utils.distillation.objectives import decode, encode, layer_outputs
from distill_utils.evaluation import generation, metrics, scoring, statistics
from distill_utils.experiments import fine_tuning, runs
from distill_utils.experiments.comparison import FEW_DOCUMENTS, scores_over_seeds, smoke_note
from distill_utils.models import students

LAYERS = {"encoder": students.encoder_layers, "decoder": students.decoder_layers}
STACKS = tuple(LAYERS)
FASTER = 0.9  # a student's time per token over its teacher's, at most; closer ones differ by the machine's noise

# ----------------------------------------------------------------------------------------------------- what is scored


def calibration_batches(rows: Dataset, pad_token_id: int, batch_size: int, device) -> list[dict]:
    """Return tokenized training pairs as batches on the device; reject fewer documents than one batch holds."""
    if not 1 <= batch_size <= len(rows):
        raise InputError(f"{len(rows)} calibration documents for batches of {batch_size}: give at least one full batch")
    batches = batch_list(rows, pad_token_id, batch_size)
    return [to_device(batch, device) for batch in batches]


@torch.no_grad()
def encode_all(teacher: PreTrainedModel, batches: Sequence[dict]) -> list[Tensor]:
    """Return the teacher's encoder outputs, (batch, source, dim) each: a sweep over decoder layers reuses them."""
    with mixed_precision(teacher.device):
        return [encode(teacher, batch)[0] for batch in batches]


@torch.no_grad()
def calibration_loss(model: PreTrainedModel, batches: Sequence[dict], encoded: Sequence[Tensor] | None = None) -> float:
    """Return the mean cross-entropy of the references, nats per token; with `encoded` only the decoder runs."""
    total, tokens = 0.0, 0
    for i, batch in enumerate(batches):
        count = int((batch["labels"] != IGNORED).sum())
        with mixed_precision(model.device):
            hidden, _ = decode(model, batch, encode(model, batch)[0] if encoded is None else encoded[i])
            loss = chunked_token_losses(hidden, partial(students.project, model), batch["labels"])["ce_loss"]
        total += float(loss) * count
        tokens += count
    return total / tokens


def greedy_rouge2(model: PreTrainedModel, tokenizer, documents: Sequence[str], references: Sequence[str], **options):
    """Return ROUGE-2 of greedy summaries, one value a document; options are those of `generation.summarize`."""
    if not documents:
        raise InputError("no documents to summarize: give at least 1")
    predictions = generation.summarize(model, tokenizer, documents, num_beams=1, **options)
    return metrics.rouge_scores(predictions, references)["rouge2"]


@contextmanager
def measured(teacher: PreTrainedModel, rows: list[dict], evidence: str, candidates: int = 0) -> Iterator[dict]:
    """Add a row with what the block cost: its `evidence`, how many `candidates` it scored, seconds and passes.

    A pass is one batch through as many layers as the whole teacher has, encoder and decoder together; half of the
    layers are half a pass, and so is, of a batch that is written, every token's way through the decoder.
    """
    row, calls = {"evidence": evidence, "candidates": candidates or None}, [0]
    kinds = tuple({type(layer) for stack in STACKS for layer in LAYERS[stack](teacher)})

    def count(module: nn.Module, inputs: tuple) -> None:
        calls[0] += isinstance(module, kinds)

    began = time.perf_counter()
    with nn.modules.module.register_module_forward_pre_hook(count):
        yield row
    whole = sum(len(LAYERS[stack](teacher)) for stack in STACKS)
    rows.append(row | {"seconds": round(time.perf_counter() - began, 2), "passes": round(calls[0] / whole, 1)})


# --------------------------------------------------------------------------------------- leaving layers out, and search


def view(teacher: PreTrainedModel, **kept: Sequence[int]) -> PreTrainedModel:
    """Return the teacher with only the kept layers of each stack named, on the teacher's own weights."""
    ids = [list(kept.get(stack, range(len(LAYERS[stack](teacher))))) for stack in STACKS]
    return students.init_student(teacher, *map(len, ids), *ids, share_weights=True)[0]


def untrained_row(
    teacher: PreTrainedModel, tokenizer, batches: Sequence[dict], documents: Sequence[str], kept: Mapping, **options
) -> dict:
    """Return size, speed and loss of the student that the kept layers of each stack make, before any training."""
    student = view(teacher, **kept)
    speed = scoring.measure_speed(student, tokenizer, documents, repeats=1, **options)
    return {
        "parameters_m": students.count_parameters(student)["total"] / 1e6,
        "ms_per_token": speed["ms_per_token"],
        "loss": calibration_loss(student, batches),
    }


def drawn_maps(teacher_layers: int, student_layers: int, num: int, seed: int) -> dict[str, list[int]]:
    """Return up to `num` maps drawn at random, {name: ids}, all different."""
    every = list(itertools.combinations(range(teacher_layers), student_layers))
    drawn = random.Random(seed).sample(every, min(num, len(every)))
    return {f"drawn {i}": list(ids) for i, ids in enumerate(drawn, 1)}


def distinct_maps(named: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Return every map once, its names joined; what was drawn counts only where no other name has it."""
    names: dict[tuple, list[str]] = {}
    for name, ids in named.items():
        names.setdefault(tuple(ids), []).append(name)
    return {
        " = ".join([name for name in found if not name.startswith("drawn")] or found[:1]): list(ids)
        for ids, found in names.items()
    }


def leave_one_out(teacher: PreTrainedModel, stack: str, score: Callable) -> list:
    """Return `score` of the teacher without layer 0, without layer 1, ... of one stack."""
    ids = range(len(LAYERS[stack](teacher)))
    return [score(view(teacher, **{stack: [i for i in ids if i != left_out]})) for left_out in ids]


def search_layers(
    teacher: PreTrainedModel, stack: str, size: int, score: Callable[[PreTrainedModel], float], max_evaluations: int
) -> dict:
    """Search the `size` layers of one stack with the lowest score, by leaving out the least missed layer in turn.

    At most `max_evaluations` candidates are scored. A round tries the layers first that were least missed before, so
    that a budget which ends early still decides between the best of them; the rest follows that order unseen.

    Returns `layer_ids`, their `score` (None where it was not computed), `evaluations`, `complete`, and `steps`: the
    layer left out in each round, with the score.
    """
    if max_evaluations < 1:
        raise InputError(f"search budget {max_evaluations} allows no evaluation: give at least 1")
    kept, used, complete = list(range(len(LAYERS[stack](teacher)))), 0, True
    students.layer_map(len(kept), size)  # rejects impossible sizes
    known: dict[int, float] = {}
    steps = []
    while len(kept) > size:
        order = sorted(kept, key=lambda layer: known.get(layer, 0.0))[: max_evaluations - used]
        found = {layer: score(view(teacher, **{stack: [i for i in kept if i != layer]})) for layer in order}
        used, complete, known = used + len(found), complete and len(found) == len(kept), known | found
        out = min(found or kept, key=lambda layer: known.get(layer, np.inf))
        kept.remove(out)
        steps.append({"left_out": out, "score": found.get(out)})
    last = steps[-1]["score"] if steps else None
    return {"layer_ids": kept, "score": last, "evaluations": used, "complete": complete, "steps": steps}


# ------------------------------------------------------------------------------------------------- what layers compute


@torch.no_grad()
def layer_states(teacher: PreTrainedModel, batches: Sequence[dict], max_tokens: int = 8192) -> dict[str, list[Tensor]]:
    """Return {stack: [input of layer 0, output of layer 0, output of layer 1, ...]}, each (tokens, dim) in float32.

    Of valid tokens only; where a batch has more than its share of `max_tokens`, evenly spaced ones of it.
    """
    layers = {stack: LAYERS[stack](teacher) for stack in STACKS}
    states = {stack: [[] for _ in range(len(layers[stack]) + 1)] for stack in STACKS}
    for batch in batches:
        with (
            layer_outputs(layers["encoder"], [0], "inputs") as encoder_input,
            layer_outputs(layers["decoder"], [0], "inputs") as decoder_input,
            mixed_precision(teacher.device),
        ):
            encoded, encoder = encode(teacher, batch, range(len(layers["encoder"])))
            _, decoder = decode(teacher, batch, encoded, range(len(layers["decoder"])))
        found = {"encoder": [encoder_input[0], *encoder], "decoder": [decoder_input[0], *decoder]}
        valid = {"encoder": batch["attention_mask"] == 1, "decoder": batch["labels"] != IGNORED}
        for stack in STACKS:
            at = valid[stack].nonzero()
            share = max(1, max_tokens // len(batches))
            at = at[torch.linspace(0, len(at) - 1, min(len(at), share)).long()]
            for kept, output in zip(states[stack], found[stack], strict=True):
                kept.append(output[at[:, 0], at[:, 1]].float())
    return {stack: [torch.cat(parts) for parts in kept] for stack, kept in states.items()}


# ------------------------------------------------------------------------------------------------------- all evidence


def gather_evidence(
    teacher: PreTrainedModel, batches: list[dict], rouge2: Callable, kept_layers: int, search_budget: int
) -> dict:
    """Return all evidence on the layers before training: `rows` by layer, `search`, `cka`, `loss`, and what each cost.

    `rouge2(model)` scores the teacher's own summaries, per document.
    """
    rows, cost, search = [], [], {}
    for stack in STACKS:
        depth = len(LAYERS[stack](teacher))
        with measured(teacher, cost, f"search, {stack}") as row:
            encoded = encode_all(teacher, batches) if stack == "decoder" else None
            loss = partial(calibration_loss, batches=batches, encoded=encoded)
            search[stack] = search_layers(teacher, stack, kept_layers, loss, search_budget)
            row["candidates"] = search[stack]["evaluations"]
        with measured(teacher, cost, f"leave one out, loss, {stack}", depth):
            before = loss(teacher)
            losses = leave_one_out(teacher, stack, loss)
        with measured(teacher, cost, f"leave one out, ROUGE-2, {stack}", depth):
            own = rouge2(teacher)
            scores = leave_one_out(teacher, stack, rouge2)
        for layer, (left, values) in enumerate(zip(losses, scores, strict=True)):
            change = statistics.compare(values, own)
            ends = {"rouge2": change["difference"], "rouge2_low": change["low"], "rouge2_high": change["high"]}
            rows.append({"stack": stack, "layer": layer, "loss_change": left - before, **ends})
    with measured(teacher, cost, "similarity and CKA"):
        states = layer_states(teacher, batches)
        similarity = [value for stack in STACKS for value in statistics.input_output_similarity(states[stack])]
        alike = {stack: statistics.cka(states[stack][1:]).tolist() for stack in STACKS}
    rows = [{**row, "similarity": value} for row, value in zip(rows, similarity, strict=True)]
    return {"rows": rows, "cost": cost, "search": search, "cka": alike, "loss": before}


# ------------------------------------------------------------------------------------------------ what it is worth


def run_of(
    base: runs.StudentRun, teacher: PreTrainedModel, encoder_ids: Sequence[int], decoder_ids: Sequence[int], seed: int
) -> runs.StudentRun:
    """Return `base` for these layers and this seed; its variant names the layers of each stack that is cut.

    A learning rate of 0 becomes the usual one of the shape.
    """
    kept = {"encoder": list(encoder_ids), "decoder": list(decoder_ids)}
    cut = {stack: ids for stack, ids in kept.items() if ids != list(range(len(LAYERS[stack](teacher))))}
    run = replace(
        base, shape="-".join(str(len(ids)) for ids in kept.values()), encoder_layer_ids=cut.get("encoder"),
        decoder_layer_ids=cut.get("decoder"), training=replace(base.training, seed=seed),
        variant=", ".join(f"{stack} {' '.join(map(str, ids))}" for stack, ids in cut.items()),
    )  # fmt: skip
    return fine_tuning.at_usual_rate(run, teacher)


def seed_scores(plan: Sequence[runs.StudentRun], tested: Mapping[str, Path]) -> dict[tuple[str, str], np.ndarray]:
    """Return ROUGE-2 of every (shape, variant), (seeds, documents)."""
    folders: dict[tuple[str, str], list[Path]] = {}
    for run in plan:
        folders.setdefault((run.shape, run.variant), []).append(tested[run.name])
    return {key: scores_over_seeds(found) for key, found in folders.items()}


def compare(name: str, values: np.ndarray, rival: str, others: np.ndarray) -> dict:
    """Return the paired difference of two students, scores (seeds, documents); of a student with itself it is 0."""
    return {"name": name, "rival": rival, "same": values is others, **statistics.compare(values, others)}


def judge_maps(
    teacher: PreTrainedModel, batches: list[dict], maps: Mapping[str, Sequence[int]], plan: Sequence[runs.StudentRun],
    layers: Sequence[Mapping], means: Sequence[Mapping],
) -> list[dict]:  # fmt: skip
    """Return one row a decoder map: what was known before training, beside what training made of it.

    `plan` holds one run for each map, `layers` the evidence by layer, `means` the results rows.
    """
    encoded = encode_all(teacher, batches)
    evidence = pd.DataFrame(layers).query("stack == 'decoder'").set_index("layer")
    by_variant = {row.get("variant"): row for row in means}
    rows = []
    for (name, ids), run in zip(maps.items(), plan, strict=True):
        gone, after = evidence.drop(index=ids), by_variant[run.variant]
        rows.append(
            {
                "map": name,
                "layers": ids,
                "loss before": calibration_loss(view(teacher, decoder=ids), batches, encoded),
                "sum left out": sum(gone["loss_change"]),
                "change left out": sum(1 - gone["similarity"]),
                **{key: after[key] for key in ("validation_ce", "rouge2", "rouge2_low", "rouge2_high")},
            }
        )
    return rows


def grid_rows(means: Sequence[Mapping], grid: Sequence[runs.StudentRun], last: str, whole: str) -> list[dict]:
    """Return the results rows of the teacher and of the grid's students, for tables and `plot_trade_off`.

    Each has a `label`, the `name` of its line (an encoder) and its `setting` there (a decoder). `last` is the variant
    of the one-layer decoder that is made of the last layer, `whole` the teacher's shape.
    """
    chosen = {(run.shape, run.variant) for run in grid}
    rows = [{**means[0], "student": whole, "label": f"{whole} (teacher)"}]
    rows += [{**row, "label": row["student"]} for row in means[1:] if (row["student"], row["variant"]) in chosen]
    for row in rows:
        row |= {"name": f"{row['student'].partition('-')[0]} encoder layers", "setting": row["label"]}
        if row.get("variant") == last:
            row["label"] = row["name"] = f"{row['student']} from layer {last.rpartition(' ')[2]}"
    return sorted(rows, key=lambda row: (row["label"] == row["name"], -int(row["student"].partition("-")[0])))


def pairs_of_cuts(
    labels: Sequence[str], depths: Mapping[str, int], encoders: Sequence[int], decoders: Sequence[int], last: int
) -> list[tuple[str, str]]:
    """Return pairs of students there are to compare: cut decoder and cut encoder; one layer of the first and last."""
    both = [depth for depth in encoders if depth in decoders and depth < min(depths.values())]
    pairs = [(f"{depths['encoder']}-{depth}", f"{depth}-{depths['decoder']}") for depth in both]
    pairs.append((f"{depths['encoder']}-1", f"{depths['encoder']}-1 from layer {last}"))
    return [pair for pair in pairs if set(pair) <= set(labels)]


# ------------------------------------------------------------------------------------------------------------- verdict


def student_to_take(
    rows: Sequence[dict], scores: Mapping[str, np.ndarray], goal: np.ndarray, teacher_ms: float
) -> dict | None:
    """Return the fastest row, if faster than the teacher, whose scores, by `label`, are not shown to miss the goal.

    Of one shape, whose students take one time per token, it is the best: latency would choose who writes least.
    """
    useful = [row for row in rows if row["ms_per_token"] < FASTER * teacher_ms
              and statistics.compare(scores[row["label"]], goal)["high"] >= 0]  # fmt: skip
    return min(useful, key=lambda row: (row["ms_per_token"], -row["rouge2"]), default=None)


def rivals_to_name(versus: Sequence[Mapping], layers: Sequence[Sequence[int]]) -> list[Mapping]:
    """Return the tests of the searched map that a verdict names, each with its rival's `layers`.

    They are those against the published table and even spacing, and all that it loses; of equal rivals the first.
    """
    found: dict[tuple, Mapping] = {}
    for test, ids in zip(versus, layers, strict=True):
        if test["rival"] in ("the published table", "even spacing") or statistics.effect_sign(test) < 0:
            found.setdefault(tuple(ids), test)
    return list(found.values())


def verdict(
    searched: Sequence[int], versus: Sequence[Mapping], correlation: Mapping, cuts: Sequence[Mapping],
    take: Mapping | None, keep_share: float, num_test: int, num_seeds: int, max_steps: int,
) -> str:  # fmt: skip
    """Return what to take, whether evidence before training helps and what to cut, as one paragraph of Markdown.

    `versus`: the searched map against its rivals; `cuts`: further paired comparisons; both rows of `compare`. `take`:
    the results row of the fastest student not shown to fall short of `keep_share` of the teacher's ROUGE-2, if any is
    faster than the teacher.
    """
    if num_test < FEW_DOCUMENTS:
        return smoke_note(num_test)
    share = f"{100 * keep_share:.0f} % of the teacher's ROUGE-2"
    if take:
        said = f"**Take {take['label']}**: {take['speedup']:.2f} times as fast per token, the fastest student that is "
        said += f"not shown to fall short of {share}; it keeps {statistics.format_share(take)[0]}"
    else:
        said = f"**Take none of these students**: each is no faster than the teacher or falls short of {share}"
    found = " and ".join(_in_words(test) for test in versus)
    kept = ", ".join(map(str, searched))
    layers = f"decoder layer{'s' * (len(searched) > 1)} {kept}"
    lines = [said, f"The search before training keeps {layers}: it {found}; {_ranking(correlation)}"]
    said = [f"{test['name']} {_in_words(test)}" for test in cuts if "from layer" not in test["rival"]]
    lines += [f"In quality, {', '.join(said)}"] if said else []
    lines.append(statistics.budget_in_words(max_steps, num_seeds, f"{num_test:,} test documents"))
    return f"{'. '.join(lines)}."


def _in_words(test: Mapping) -> str:
    if test["same"]:
        return f"is the same map as {test['rival']}"
    return statistics.format_comparison("", test, test["rival"])


def _ranking(found: Mapping) -> str:
    if found["rho"] is None:
        return f"{found['maps']} maps are too few, or too equal, to say whether the loss before training ranks them"
    says = "ranks the maps as training does" if found["high"] < 0 else "ranks the maps the wrong way round"
    if found["low"] <= 0 <= found["high"] or found["p_value"] >= 0.05:
        says = "is not shown to rank the maps as training does"
    return f"the loss before training {says} (Spearman {found['rho']:+.2f}, {found['maps']} maps)"
