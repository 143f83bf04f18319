"""Early checks: of runs and of students before training, the forecast, the round trip of a saved student.

Out of scope: plans of models that are not loaded (planning/), what a run did cost (comparison.py).
"""

import json
import math
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from distill_utils.artifacts import InputError, config_hash
from distill_utils.data.batches import tokenize_pairs
from distill_utils.device import amp_dtype, device, eval_mode, mixed_precision, timed, to_device
from distill_utils.distillation import objectives, pseudo_labels
from distill_utils.distillation.losses import hidden_loss
from distill_utils.distillation.objectives import teacher_mode
from distill_utils.distillation.teacher_cache import states_of, with_targets, write_targets
from distill_utils.evaluation import ctranslate, generation
from distill_utils.evaluation.metrics import rouge_scores
from distill_utils.experiments import runs
from distill_utils.models import students
from distill_utils.models.frozen import frozen_in
from distill_utils.models.loading import entries_beyond, load_model
from distill_utils.training.loop import choose_attention, train_mode
from distill_utils.training.optimizers import MIN_VALIDATION, check_early_stopping, check_training
from distill_utils.workers import new_processes

TYPICAL = 256  # training pairs, sorted by length, from which a batch of typical length is taken
LOGITS_TOLERANCE = 1e-3  # of a reloaded student, in standard deviations of the logits, or absolute where that is more
MIN_AGREEMENT = 95.0  # mean ROUGE-L of CTranslate2's summaries against the student's own
MAX_SCORE_GAP = 0.01  # nats per token between their log-probabilities of the same texts

# ------------------------------------------------------------------------------------------------------------ checking


def check_runs(plan: Sequence[runs.StudentRun], teacher, num_validation: int = MIN_VALIDATION) -> None:
    """Reject unknown methods, impossible shapes, lengths and training settings before anything is computed."""
    if not plan:
        raise InputError("there is nothing to train: name at least one method, one student shape and one seed")
    for run in plan:
        _check_run(run, teacher)
        check_early_stopping(run.training, runs.HELD_OUT_METRICS, num_validation)
    if len({run.name for run in plan}) < len(plan):
        raise InputError("a method, student shape or seed is named twice: name each once")


def _check_run(run: runs.StudentRun, teacher) -> None:
    if run.method not in runs.METHODS:
        raise InputError(f"method {run.method!r} is unknown: use {', '.join(runs.METHODS)}")
    check_training(run.training)
    objectives.check_options(run.divergence, run.jsd_beta, run.match, run.on_policy_share)
    pseudo_labels.bounds_of(run.label_filters)
    if unknown := set(run.label_settings) - set(runs.LABEL_SETTINGS):
        raise InputError(f"label_{min(unknown)} is unknown: after label_ give one of {', '.join(runs.LABEL_SETTINGS)}")
    if run.method in runs.ON_PSEUDO_LABELS:
        decoding = {name: value for name, value in run.label_settings.items() if name in runs.LABEL_SETTINGS[:-4]}
        pseudo_labels.checked_decoding(teacher.generation_config, teacher.config.to_dict(), **decoding)
    if not 0 <= run.label_smoothing < 1 or (run.label_smoothing and run.method == "kd_cached"):
        reason = "is not between 0 and 1" if run.method != "kd_cached" else "is not for cached targets"
        raise InputError(f"label_smoothing {run.label_smoothing} {reason}: use 0, or 0.1 with another method")
    if run.cross_fit not in runs.CROSS_FIT:
        raise InputError(f"cross_fit {run.cross_fit!r} is unknown: use other, own or leave it empty")
    if run.cross_fit and not run.cross_fit_base:
        raise InputError("cross_fit needs cross_fit_base: name the model that the teacher was fine-tuned from")
    if not run.temperature > 0:
        raise InputError(f"temperature {run.temperature} is not positive: use for example 2.0")
    rows = run.training.micro_batch_size or run.training.batch_size
    if run.method == "on_policy" and run.on_policy_share * rows < 1:
        raise InputError(f"on_policy_share {run.on_policy_share} is less than one row of {rows}: raise it or the batch")
    if not 1 <= run.top_k <= teacher.config.vocab_size:
        raise InputError(f"top_k {run.top_k} is impossible: give 1 to the vocabulary's {teacher.config.vocab_size}")

    encoder, decoder = students.parse_shape(run.shape, teacher)
    for name, ids, layers, stack in (
        ("encoder_layer_ids", run.encoder_layer_ids, encoder, students.encoder_layers(teacher)),
        ("decoder_layer_ids", run.decoder_layer_ids, decoder, students.decoder_layers(teacher)),
    ):
        if ids is not None:
            students.check_layer_ids(name, ids, layers, len(stack))

    for name, length in zip(("max_source_length", "max_target_length"), run.lengths[:2], strict=True):
        if length < 2:  # the end token alone
            raise InputError(f"{name} {length} leaves no room for text: give at least 2")
    positions = getattr(teacher.config, "max_position_embeddings", None)
    longest = max(run.max_source_length, run.max_target_length)
    if positions and -(-longest // 8) * 8 > positions:  # batches are padded to multiples of 8
        raise InputError(
            f"length {longest} exceeds the teacher's {positions} positions: lower max_source_length or "
            "max_target_length"
        )


# ------------------------------------------------------------------------------------------------------------- forecast


def forecast(plan: Sequence[runs.StudentRun], teacher, tokenizer, train: Dataset) -> list[dict]:
    """Predict time, memory and disk of each method, shape and variant.

    Seconds are the better of two forward and backward passes, after one that warms up, on a micro-batch of typical
    length. `memory (MB)` counts both models as training holds them, gradients and two moments in float32,
    `activations (MB)` what the forward pass keeps for the backward pass, `disk (MB)` the student, one checkpoint, and
    frozen weights that wait on disk while it trains.
    """
    return [_predict(run, teacher, tokenizer, train) for run in {run.group: run for run in plan}.values()]


def _predict(run: runs.StudentRun, teacher, tokenizer, train: Dataset) -> dict:
    student, cut = runs.cut_student(run, teacher)
    student.to(device())
    choose_attention(student, run.max_source_length)
    train_mode(student)
    batch, passes = typical_batch(run, teacher, tokenizer, train)
    objective, kept = runs.objective_of(run.method), {}
    dtype = amp_dtype(precision=run.training.precision)
    with teacher_mode(teacher), mixed_precision(student.device, dtype):
        batch |= {f"{side}_states": states_of(teacher, batch, side, **own) for side, own in cut["stored"].items()}

    def step(watch) -> None:
        with mixed_precision(student.device, dtype), watch:
            loss = objective(student, teacher, batch, **cut["options"])["loss"]
        loss.backward()

    with frozen_in(dtype, student, teacher, runs.idle_parts(run, cut, student, teacher)) as waiting:
        weights = {weight.data_ptr(): weight.nbytes for each in (student, teacher) for weight in each.parameters()}
        step(kept_for_backward(student, kept))
        seconds = passes * min(timed(partial(step, nullcontext()), student.device) for _ in range(2))
    counts = students.count_parameters(student)
    return {
        "student": run.group,
        "learning rate": f"{run.training.learning_rate:g}",
        "steps": run.training.max_steps,
        "ms/step": 1000 * seconds,
        "predicted_seconds": seconds * run.training.max_steps,
        "memory (MB)": (sum(weights.values()) + 12 * counts["trainable"]) / 2**20,
        "activations (MB)": sum(kept.values()) / 2**20,
        "disk (MB)": (4 * counts["total"] + 12 * counts["trainable"] + waiting) / 2**20,
    }


def typical_batch(run: runs.StudentRun, teacher, tokenizer, train: Dataset) -> tuple[dict, int]:
    """Return one micro-batch of the references on the device, with cached targets where needed, and how many a step."""
    sample = train.select(range(min(TYPICAL, len(train))))
    batches = runs.batches_of(runs.with_seed(run, 0), tokenizer, sample)
    if run.method == "kd_cached":
        with tempfile.TemporaryDirectory() as folder:
            targets = Path(folder) / "targets"
            write_targets(
                targets, teacher, tokenize_pairs(sample, tokenizer, *run.lengths),
                pad_token_id=tokenizer.pad_token_id, **runs.kept_targets(run),
                batch_size=run.training.micro_batch_size or run.training.batch_size,
            )  # fmt: skip
            micro_batches = with_targets(batches, targets)(0)
    else:
        micro_batches = batches(0)
    return to_device(micro_batches[0], device()), len(micro_batches)


def kept_for_backward(model, found: dict[int, int]):
    """Return a context that fills {address: bytes} of the storages a forward pass keeps, without the weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)


# ------------------------------------------------------------------------------------------------------ before training


@torch.no_grad()
def check_initial_student(
    student, teacher, tokenizer, batch: dict[str, torch.Tensor], documents: Sequence[str], references: Sequence[str], *,
    max_source_length: int, max_new_tokens: int = 32, prefix: str = "",
) -> dict[str, float | None]:  # fmt: skip
    """Measure a student before any update, and reject one that cannot work.

    Returns its greedy ROUGE, `kl_loss` to the teacher per token of the batch's labels, `encoder_gap` and `decoder_gap`
    (`hidden_loss` between the last layers; None where the widths differ), and the share of `empty` summaries. A low
    ROUGE is not rejected. Raises InputError with the likely cause: different vocabularies, weights or logits that are
    not finite, cached generation that differs from uncached, only empty summaries while `kl_loss` is above that of
    guessing evenly.
    """
    sizes = student.config.vocab_size, teacher.config.vocab_size
    if sizes[0] != sizes[1] or entries_beyond(tokenizer, sizes[0]):
        raise InputError(
            f"vocabularies differ: student {sizes[0]}, teacher {sizes[1]}, tokenizer {len(tokenizer)} entries; "
            "cut the student from this teacher and use its tokenizer"
        )
    with eval_mode(student, teacher):
        theirs, ours = _forward("teacher", teacher, batch), _forward("student", student, batch)
        row: dict[str, float | None] = {
            "kl_loss": runs.held_out_losses(student, teacher, [batch])["validation_kl"],
            "encoder_gap": _gap(ours, theirs, "encoder", batch["attention_mask"]),
            "decoder_gap": _gap(ours, theirs, "decoder", batch["labels"] != -100),
        }
        _check_cache(student, batch, max_new_tokens=min(16, max_new_tokens))
        predictions = generation.summarize(
            student, tokenizer, documents, max_source_length=max_source_length, max_new_tokens=max_new_tokens,
            prefix=prefix, num_beams=1, min_length=0,  # the model's own may be beyond max_new_tokens
        )  # fmt: skip
    row["empty"] = sum(map(generation.is_empty, predictions)) / len(predictions)
    # A decoder cut to a layer or two may stop at once and still learn; one that is worse than guessing is broken.
    if row["empty"] == 1 and row["kl_loss"] > math.log(student.config.vocab_size):
        raise InputError(
            f"the student writes nothing for all {len(predictions)} documents: its first token is the end token; "
            "check decoder_start_token_id and the special tokens, or keep more decoder layers"
        )
    return row | {metric: float(values.mean()) for metric, values in rouge_scores(predictions, references).items()}


def _forward(name: str, model, batch: dict[str, torch.Tensor]):
    moved = to_device(batch, model.device)
    inputs = {key: moved[key] for key in ("input_ids", "attention_mask", "labels")}
    out = model(**inputs, output_hidden_states=True)
    if torch.isfinite(out.logits).all():
        return out
    broken = [key for key, weight in model.state_dict().items() if not torch.isfinite(weight).all()]
    if broken:
        raise InputError(f"{name} weights are not finite, first {broken[0]}: save the model, or copy its layers, again")
    raise InputError(
        f"{name} logits are not finite though its weights are: activations overflow in {model.dtype}; load it in "
        "float32 or bfloat16"
    )


def _gap(student_out, teacher_out, stack: str, mask: torch.Tensor) -> float | None:
    pair = [getattr(out, f"{stack}_hidden_states")[-1].cpu() for out in (student_out, teacher_out)]
    return hidden_loss(*pair, mask).item() if pair[0].shape == pair[1].shape else None


def _check_cache(student, batch: dict[str, torch.Tensor], max_new_tokens: int) -> None:
    """Raise InputError when cached greedy generation chooses other tokens than uncached, ties aside."""
    inputs = {name: batch[name][:4].to(student.device) for name in ("input_ids", "attention_mask")}
    settings = {"num_beams": 1, "min_length": 0, "max_new_tokens": max_new_tokens}
    settings = generation.complete_settings(student.generation_config, settings)
    try:
        cached = student.generate(**inputs, **settings, use_cache=True)
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError) as error:
        raise InputError(
            f"cached generation fails ({type(error).__name__}: {' '.join(str(error).split())[:120]}): the layers keep "
            "the layer_idx of the teacher, or the decoder is deeper than the cache; build it with init_student"
        ) from error
    plain = student.generate(**inputs, **settings, use_cache=False)
    width = min(cached.shape[1], plain.shape[1])
    for row in range(len(plain)):
        different = (cached[row, :width] != plain[row, :width]).nonzero()
        if not len(different):
            continue
        at, own = different[0].item(), {name: values[row : row + 1] for name, values in inputs.items()}
        logits = student(**own, decoder_input_ids=plain[row : row + 1, :at]).logits[0, -1]
        gap = (logits[plain[row, at]] - logits[cached[row, at]]).abs().item()
        if gap > (1e-3 if logits.dtype == torch.float32 else 0.1) * max(1.0, logits.float().std().item()):
            raise InputError(
                f"cached generation differs from uncached at token {at} (logits {gap:.3g} apart): the layers keep the "
                "layer_idx of the teacher; build the student with init_student"
            )


# ------------------------------------------------------------------------------------------------------- after training


def round_trip(
    folder: Path | str, model, tokenizer, documents: Sequence[str], *, max_source_length: int, max_new_tokens: int = 32,
    prefix: str = "", convert: bool = True,
) -> dict[str, float | str | None]:  # fmt: skip
    """Prove that the saved student is the student in memory: reload it in a new process, then convert it.

    The new process must give the same generation settings, tokenizer, logits (within LOGITS_TOLERANCE) and greedy
    summaries. The CTranslate2 model must write summaries that agree (MIN_AGREEMENT) and give fixed texts the same
    log-probabilities (MAX_SCORE_GAP); architectures it does not know are skipped and named, all are without `convert`.
    Returns the measured numbers. Raises ValueError naming what differs.
    """
    folder, documents = Path(folder), list(documents)
    settings = {"max_source_length": max_source_length, "max_new_tokens": max_new_tokens, "prefix": prefix}
    settings["min_length"] = 0  # the model's own may be beyond max_new_tokens, which CTranslate2 rejects
    with eval_mode(model):
        expected = _observe(model, tokenizer, documents, settings)
        difference = _compare(expected, _observe_in_new_process(folder, model, documents, settings))
        row = {"logits_difference": difference, "same_summaries": len(documents)}
        summaries = [expected[f"summary {i}"] for i in range(len(documents))]
        return row | (_converted(folder, model, tokenizer, documents, summaries, settings) if convert else {})


def _compare(expected: dict, found: dict) -> float:
    """Raise ValueError naming the first thing that differs; return the largest difference of logits."""
    for name in dict.fromkeys([*expected, *found]):
        before, after = expected.get(name), found.get(name)
        if name == "logits":
            before, after = np.array(before), np.array(after)
            difference = float(np.abs(before - after).max()) if before.shape == after.shape else math.inf
            if not difference <= LOGITS_TOLERANCE * max(1.0, float(before.std())):  # NaN fails as well
                raise ValueError(f"the saved student differs in logits by {difference:.3g}: save its weights as is")
        elif before != after:
            raise ValueError(
                f"the saved student differs in {name}: {str(before)[:60]!r} in memory, {str(after)[:60]!r} reloaded"
            )
    return difference


@torch.inference_mode()
def _observe(model, tokenizer, documents: list[str], settings: dict) -> dict:
    """Return everything of a model in eval mode that must survive saving, as plain values."""
    source = [settings["prefix"] + text for text in documents if text.strip()][:4]
    if not source:
        raise ValueError("no document with text to compare on: give at least one")
    ids = tokenizer(source, truncation=True, max_length=settings["max_source_length"])["input_ids"]
    inputs = generation.pad(ids, tokenizer.pad_token_id, model.device)
    logits = model(**inputs, decoder_input_ids=inputs["input_ids"][:, :8]).logits  # any decoder input will do
    kept = {key: value for key, value in model.generation_config.to_dict().items() if key != "transformers_version"}
    summaries = generation.summarize(model, tokenizer, documents, dtype=torch.float32, num_beams=1, **settings)
    return {
        **{f"generation settings, {key}": value for key, value in json.loads(json.dumps(kept, default=str)).items()},
        "tokenizer, entries": len(tokenizer),
        "tokenizer, vocabulary": config_hash(tokenizer.get_vocab()),
        **{f"tokenizer, {key}": str(value) for key, value in tokenizer.special_tokens_map.items()},
        "tokenizer, ids": tokenizer(documents, truncation=True, max_length=settings["max_source_length"])["input_ids"],
        "logits": logits.float().cpu().tolist(),
        **{f"summary {i}": text for i, text in enumerate(summaries)},
    }


def _observe_in_new_process(folder: Path, model, documents: list[str], settings: dict) -> dict:
    where = (folder.resolve(), model.device, model.dtype, torch.get_num_threads())
    try:
        with new_processes() as pool:
            return pool.submit(_observe_saved, *where, documents, settings).result()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:300]
        raise ValueError(f"the saved student cannot be loaded in a new process: {reason}") from error


def _observe_saved(folder: Path, device, dtype, num_threads: int, documents: list[str], settings: dict) -> dict:
    torch.set_num_threads(num_threads)
    model, tokenizer = load_model(str(folder), dtype=dtype)
    return _observe(model.to(device), tokenizer, documents, settings)


def _converted(folder: Path, model, tokenizer, documents, expected: list[str], settings: dict) -> dict:
    with tempfile.TemporaryDirectory() as temporary:
        try:
            converted = ctranslate.to_ctranslate2(folder, Path(temporary) / "converted")
        except (ValueError, ImportError) as error:  # without a CPU to serve, the engine may be missing
            return {"ctranslate2_rougeL": None, "ctranslate2_score_gap": None, "ctranslate2_skipped": str(error)}
        agreement, gap, _ = ctranslate2_agreement(converted, model, tokenizer, documents, expected, settings)
    if agreement < MIN_AGREEMENT:
        raise ValueError(f"CTranslate2 writes other summaries: ROUGE-L {agreement:.1f} to ours, not {MIN_AGREEMENT}")
    if not gap <= MAX_SCORE_GAP:  # NaN fails as well
        raise ValueError(
            f"CTranslate2 scores are {gap:.3g} nats per token off, at most {MAX_SCORE_GAP} allowed: the converted "
            "weights or their scaling are wrong"
        )
    return {"ctranslate2_rougeL": agreement, "ctranslate2_score_gap": gap}


@torch.inference_mode()
def ctranslate2_agreement(
    converted: Path, model, tokenizer, documents: Sequence[str], expected: list[str], settings: dict
) -> tuple[float, float, float]:
    """Return how a converted model agrees with `model`: ROUGE-L of greedy summaries, gap of scores, likelihood lost.

    `expected` are the model's own greedy summaries. Of the same texts, in nats per token: the gap is how far a
    token's log-probability lies from the model's, either way (a wrong output scale shows in scores alone); what is
    lost is their mean difference, which rounding hardly moves.
    """
    pairs = [pair for pair in zip(documents, expected, strict=True) if pair[0].strip()]
    rows = Dataset.from_list([{"id": "", "document": text, "summary": own or "-"} for text, own in pairs])
    lengths = [settings["max_source_length"]] * 2
    tokenized = tokenize_pairs(rows, tokenizer, *lengths, settings["prefix"])
    ends = generation.as_list(model.generation_config.eos_token_id or model.config.eos_token_id)
    # mBART writes its language behind the end token, which the engine cannot score.
    last = [next((i for i, token in enumerate(ids) if token in ends), len(ids)) for ids in tokenized["labels"]]
    targets = [ids[: 1 + end] for ids, end in zip(tokenized["labels"], last, strict=True)]
    summaries, _ = ctranslate.summarize_ctranslate2(converted, tokenizer, documents, num_beams=1, **settings)
    scores = ctranslate.score_ctranslate2(converted, list(tokenized["input_ids"]), targets, tokenizer)
    rouge = rouge_scores(summaries, expected)["rougeL"]
    rouge = [100.0 if a == b else score for a, b, score in zip(summaries, expected, rouge, strict=True)]  # "" == ""
    starts = model.generation_config.decoder_start_token_id, model.config.decoder_start_token_id
    start = next(token for token in starts if token is not None)
    gaps, lost = [], []
    for source, target, found in zip(tokenized["input_ids"], targets, scores, strict=True):
        ids = [torch.tensor([row], device=model.device) for row in (source, [start, *target[:-1]], target)]
        log_probs = model(input_ids=ids[0], decoder_input_ids=ids[1]).logits.float().log_softmax(-1)
        own = log_probs[0].gather(1, ids[2][0, :, None])[:, 0].cpu().numpy()
        gaps.append(np.abs(own - found).mean())
        lost.append((own - found).mean())
    return float(np.mean(rouge)), float(np.mean(gaps)), float(np.mean(lost))
