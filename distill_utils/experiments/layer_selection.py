"""Which layers to keep: evidence before training, on training documents, and what it says about students after it.

Not here: the maps that need no data and the cut itself (students.py), training (runs.py). A student is judged by a
`score` function of a model, so the same sweep serves the loss and ROUGE. A *view* is a student on the teacher's own
weights (`init_student(..., share_weights=True)`): a layer is left out without copying or loading anything.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from scipy import stats
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill_utils.artifacts import InputError
from distill_utils.data.batches import batch_list
from distill_utils.device import amp_dtype
from distill_utils.distillation.losses import IGNORED, chunked_token_losses
from distill_utils.distillation.objectives import decode, encode
from distill_utils.evaluation import generation, metrics, scoring, statistics
from distill_utils.experiments import runs
from distill_utils.experiments.comparison import FEW_DOCUMENTS
from distill_utils.models import students

STACKS = ("encoder", "decoder")
FASTER = 0.9  # a student's time per token over its teacher's, at most; closer ones differ by the machine's noise

# ----------------------------------------------------------------------------------------------------- what is scored


def calibration_batches(rows: Dataset, pad_token_id: int, batch_size: int, device) -> list[dict]:
    """Return tokenized training pairs as batches on the device; refuse fewer documents than one batch holds."""
    if not 1 <= batch_size <= len(rows):
        raise InputError(f"{len(rows)} calibration documents for batches of {batch_size}: give at least one full batch")
    batches = batch_list(rows, pad_token_id, batch_size)
    return [{k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()} for batch in batches]


@torch.no_grad()
def encode_all(teacher: PreTrainedModel, batches: Sequence[dict]) -> list[Tensor]:
    """Return the teacher's encoder outputs, (batch, source, dim) each: a sweep over decoder layers reuses them."""
    with _autocast(teacher):
        return [encode(teacher, batch)[0] for batch in batches]


@torch.no_grad()
def calibration_loss(model: PreTrainedModel, batches: Sequence[dict], encoded: Sequence[Tensor] | None = None) -> float:
    """Return the mean cross-entropy of the references, nats per token; with `encoded` only the decoder runs."""
    total, tokens = 0.0, 0
    for i, batch in enumerate(batches):
        count = int((batch["labels"] != IGNORED).sum())
        with _autocast(model):
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


def _autocast(model: PreTrainedModel):
    half = amp_dtype(model.device)
    return torch.autocast(model.device.type, half, enabled=half is not None)


@contextmanager
def measured(teacher: PreTrainedModel) -> Iterator[dict]:
    """Fill {"seconds", "passes"} with what the block cost.

    A pass is one batch through as many layers as the whole teacher has, encoder and decoder together; half of the
    layers are half a pass, and so is, of a batch that is written, every token's way through the decoder.
    """
    cost, calls = {}, [0]
    kinds = tuple({type(layer) for stack in STACKS for layer in _layers(teacher, stack)})

    def count(module: nn.Module, inputs: tuple) -> None:
        calls[0] += isinstance(module, kinds)

    hook, began = nn.modules.module.register_module_forward_pre_hook(count), time.perf_counter()
    try:
        yield cost
    finally:
        hook.remove()
        whole = sum(len(_layers(teacher, stack)) for stack in STACKS)
        cost |= {"seconds": round(time.perf_counter() - began, 2), "passes": round(calls[0] / whole, 1)}


# --------------------------------------------------------------------------------------- leaving layers out, and search


def view(teacher: PreTrainedModel, stack: str, layer_ids: Sequence[int]) -> PreTrainedModel:
    """Return the teacher with only the given layers of one stack, on the teacher's own weights."""
    kept = {name: list(range(len(_layers(teacher, name)))) for name in STACKS} | {stack: list(layer_ids)}
    encoder, decoder = kept["encoder"], kept["decoder"]
    return students.init_student(teacher, len(encoder), len(decoder), encoder, decoder, share_weights=True)[0]


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
    ids = range(len(_layers(teacher, stack)))
    return [score(view(teacher, stack, [i for i in ids if i != left_out])) for left_out in ids]


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
    kept, used, complete = list(range(len(_layers(teacher, stack)))), 0, True
    students.layer_map(len(kept), size)  # refuses impossible sizes
    known: dict[int, float] = {}
    steps = []
    while len(kept) > size:
        order = sorted(kept, key=lambda layer: known.get(layer, 0.0))[: max_evaluations - used]
        found = {layer: score(view(teacher, stack, [i for i in kept if i != layer])) for layer in order}
        used, complete, known = used + len(found), complete and len(found) == len(kept), known | found
        out = min(found or kept, key=lambda layer: known.get(layer, np.inf))
        kept.remove(out)
        steps.append({"left_out": out, "score": found.get(out)})
    last = steps[-1]["score"] if steps else None
    return {"layer_ids": kept, "score": last, "evaluations": used, "complete": complete, "steps": steps}


def _layers(model: PreTrainedModel, stack: str) -> nn.ModuleList:
    return students.encoder_layers(model) if stack == "encoder" else students.decoder_layers(model)


# ------------------------------------------------------------------------------------------------- what layers compute


@torch.no_grad()
def layer_states(teacher: PreTrainedModel, batches: Sequence[dict], max_tokens: int = 8192) -> dict[str, list[Tensor]]:
    """Return {stack: [input of layer 0, output of layer 0, output of layer 1, ...]}, each (tokens, dim) in float32.

    Of valid tokens only; where a batch has more than its share of `max_tokens`, evenly spaced ones of it.
    """
    states = {stack: [[] for _ in range(len(_layers(teacher, stack)) + 1)] for stack in STACKS}
    every = {stack: range(len(_layers(teacher, stack))) for stack in STACKS}
    first: dict[str, Tensor] = {}

    def keep_input(stack: str, layer: nn.Module, inputs: tuple) -> None:
        first[stack] = inputs[0]

    hooks = [_layers(teacher, stack)[0].register_forward_pre_hook(partial(keep_input, stack)) for stack in STACKS]
    try:
        for batch in batches:
            with _autocast(teacher):
                encoded, outputs = encode(teacher, batch, every["encoder"])
                found = {"encoder": outputs, "decoder": decode(teacher, batch, encoded, every["decoder"])[1]}
            valid = {"encoder": batch["attention_mask"] == 1, "decoder": batch["labels"] != IGNORED}
            for stack in STACKS:
                at = valid[stack].nonzero()
                share = max(1, max_tokens // len(batches))
                at = at[torch.linspace(0, len(at) - 1, min(len(at), share)).long()]
                for kept, output in zip(states[stack], [first[stack], *found[stack]], strict=True):
                    kept.append(output[at[:, 0], at[:, 1]].float())
    finally:
        for hook in hooks:
            hook.remove()
    return {stack: [torch.cat(parts) for parts in kept] for stack, kept in states.items()}


def input_output_similarity(states: Sequence[Tensor]) -> list[float]:
    """Return of each layer the mean cosine between its input and its output; near 1, the layer changes little."""
    pairs = zip(states[:-1], states[1:], strict=True)
    return [torch.cosine_similarity(before, after, dim=-1).mean().item() for before, after in pairs]


def cka(states: Sequence[Tensor]) -> np.ndarray:
    """Return the linear CKA between all pairs of states, debiased; 1 on the diagonal, about 0 when unrelated.

    Kornblith et al. 2019, with the unbiased estimator of HSIC (Song et al. 2012), which does not grow with the width
    where tokens are few. It is computed from (dim, dim) products: no (tokens, tokens) matrix is built. Unchanged by
    rotations and by scaling. Raises InputError for fewer than four tokens.
    """
    num = len(states[0])
    if num < 4:
        raise InputError(f"{num} tokens are too few to compare layers: give at least 4")
    centred = [state.double() - state.double().mean(0) for state in states]  # (tokens, dim); HSIC ignores the mean
    squares = [state.square().sum(1) for state in centred]  # the kernel's diagonal, which the estimator leaves out
    hsic = np.zeros((len(states), len(states)))
    for i, (one, a) in enumerate(zip(centred, squares, strict=True)):
        for j, (two, b) in enumerate(zip(centred[: i + 1], squares[: i + 1], strict=True)):
            # Centred, every row of a kernel sums to 0, so without its diagonal to -a.
            value = (one.T @ two).square().sum() - (a * b).sum()
            value += a.sum() * b.sum() / ((num - 1) * (num - 2)) - 2 * (a * b).sum() / (num - 2)
            hsic[i, j] = hsic[j, i] = value.item()
    own = np.sqrt(np.clip(np.diag(hsic), 1e-30, None))
    return hsic / np.outer(own, own)


# ------------------------------------------------------------------------------------------------ what it is worth


def rank_correlation(
    scores: Sequence[float], outcomes: Sequence[float], num_samples: int = 2000, seed: int = 0
) -> dict[str, float | None]:
    """Return Spearman's `rho` of two values a map, its 95 % bootstrap interval over maps, and a permutation `p_value`.

    All None with fewer than four maps or where one side does not vary: then nothing can be told.
    """
    x, y = np.asarray(scores, dtype=float), np.asarray(outcomes, dtype=float)
    if len(x) < 4 or not np.ptp(x) or not np.ptp(y):
        return {"maps": len(x), "rho": None, "low": None, "high": None, "p_value": None}
    drawn = np.random.default_rng(seed).integers(len(x), size=(num_samples, len(x)))
    low, high = np.nanquantile(_spearman(x[drawn], y[drawn]), [0.025, 0.975])
    test = stats.permutation_test(
        (x,), lambda x, axis: _spearman(x, y), vectorized=True, permutation_type="pairings", n_resamples=num_samples,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    values = {"rho": _spearman(x, y), "low": low, "high": high, "p_value": test.pvalue}
    return {"maps": len(x), **{name: float(value) for name, value in values.items()}}


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = stats.rankdata(x, axis=-1), stats.rankdata(y, axis=-1)
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore"):  # a draw of one map only has no ranks
        return (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))


def run_of(
    base: runs.StudentRun, teacher: PreTrainedModel, encoder_ids: Sequence[int], decoder_ids: Sequence[int], seed: int
) -> runs.StudentRun:
    """Return `base` for these layers and this seed; its variant names the layers of each stack that is cut."""
    kept = {"encoder": list(encoder_ids), "decoder": list(decoder_ids)}
    cut = {stack: ids for stack, ids in kept.items() if ids != list(range(len(_layers(teacher, stack))))}
    return replace(
        base, shape="-".join(str(len(ids)) for ids in kept.values()), encoder_layer_ids=cut.get("encoder"),
        decoder_layer_ids=cut.get("decoder"), training=replace(base.training, seed=seed),
        variant=", ".join(f"{stack} {' '.join(map(str, ids))}" for stack, ids in cut.items()),
    )  # fmt: skip


def mean_scores(plan: Sequence[runs.StudentRun], tested: Mapping[str, Path]) -> dict[tuple[str, str], np.ndarray]:
    """Return ROUGE-2 of every (shape, variant), one value a test document, averaged over seeds."""
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    for run in plan:
        found.setdefault((run.shape, run.variant), []).append(scoring.read_scores(tested[run.name])["rouge2"])
    return {key: np.mean(values, axis=0) for key, values in found.items()}


def compare(name: str, values: np.ndarray, rival: str, others: np.ndarray) -> dict:
    """Return the paired difference of two students on the same documents; of a student with itself it is 0."""
    if values is others:
        return {"name": name, "rival": rival, "same": True, "difference": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0}
    return {"name": name, "rival": rival, "same": False, **statistics.paired_test(values, others)}


# ------------------------------------------------------------------------------------------------------- computed text


def verdict(test: Mapping) -> str:
    """Return in words what a paired difference of ROUGE-2 says, or that it cannot tell."""
    if test["same"]:
        return f"is the same map as {test['rival']}"
    return statistics.format_comparison("", test, test["rival"]).strip()


def describe_correlation(found: Mapping, score: str) -> str:
    """Return in words whether a cheap score, lower being better, ranks maps as training does."""
    if found["rho"] is None:
        return f"{found['maps']} maps are too few, or too equal, to say whether {score} predicts the trained ROUGE-2."
    says = "ranks the maps as training does" if found["high"] < 0 else "ranks the maps the wrong way round"
    if found["low"] <= 0 <= found["high"] or found["p_value"] >= 0.05:
        says = "cannot be shown to rank the maps as training does"
    return (
        f"{score[0].upper()}{score[1:]} {says}: Spearman {found['rho']:+.2f} ({found['low']:+.2f} to "
        f"{found['high']:+.2f}; permutation p = {found['p_value']:.3f}) over {found['maps']} maps."
    )


def headline(
    searched: Sequence[int], versus: Sequence[Mapping], correlation: Mapping, cuts: Sequence[Mapping],
    take: Mapping | None, keep_share: float, num_test: int, seeds: int, max_steps: int,
) -> str:  # fmt: skip
    """Return what the notebook found as Markdown, computed; it says so where the run cannot tell.

    `versus`: the searched map against its rivals; `cuts`: further paired comparisons; both rows of `compare`. `take`:
    the results row of the fastest student not shown to fall short of `keep_share` of the teacher's ROUGE-2, if any is
    faster than the teacher.
    """
    lines = []
    if num_test < FEW_DOCUMENTS:
        lines.append(f"**Smoke run:** {num_test} test documents show that the code runs, nothing else.")
    found = " and ".join(verdict(test) for test in versus)
    lines.append(
        f"**The search** by loss before training keeps decoder layers {', '.join(map(str, searched))}: it {found}."
    )
    lines.append(describe_correlation(correlation, "the loss before training"))
    lines += [f"{test['name'][0].upper()}{test['name'][1:]} {verdict(test)}." for test in cuts]
    if take:
        lines.append(
            f"**Take {take['label']}**: the fastest student here that is not shown to fall short of "
            f"{100 * keep_share:.0f} % of the teacher's ROUGE-2 ({take['rouge2']:.2f}, {take['rouge2_low']:.2f} to "
            f"{take['rouge2_high']:.2f}), at {take['ms_per_token']:.2f} ms a token and {take['latency_ms']:.0f} ms a "
            "document."
        )
    else:
        lines.append(
            "**No student to take here**: each is as slow as the teacher or falls short of "
            f"{100 * keep_share:.0f} % of its ROUGE-2."
        )
    lines.append(
        f"{num_test} test documents, {seeds} seed(s), {max_steps} updates a student; intervals over documents."
    )
    return "\n\n".join(lines)


def describe_layers(rows: Sequence[Mapping], key: str, quantity: str) -> str:
    """Return one sentence on which layers of each stack have the most and the least of something."""
    parts = []
    for stack in dict.fromkeys(row["stack"] for row in rows):
        own = sorted((row for row in rows if row["stack"] == stack), key=lambda row: row[key])
        low, high = own[0], own[-1]
        parts.append(
            f"{stack}: highest {high[key]:.2f} at layer {high['layer']}, lowest {low[key]:.2f} at {low['layer']}"
        )
    return f"{quantity} of every layer; {'; '.join(parts)}."
