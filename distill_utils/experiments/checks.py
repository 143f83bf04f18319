"""Two gates that save a wasted day: a student that works before training, a saved student that is the trained one.

Not here: the scores themselves (evaluation/speed), generation (generation.py, ctranslate.py).
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from distill_utils import artifacts
from distill_utils.artifacts import InputError
from distill_utils.distillation import losses
from distill_utils.evaluation import ctranslate, generation
from distill_utils.evaluation.metrics import rouge_scores
from distill_utils.models.loading import load_model

# ------------------------------------------------------------------------------------------------------ before training


@torch.no_grad()
def check_initial_student(
    student, teacher, tokenizer, batch: dict[str, torch.Tensor], documents: Sequence[str], references: Sequence[str], *,
    max_source_length: int, max_new_tokens: int = 32, batch_size: int = 32, prefix: str = "",
    teacher_rouge2: float | None = None,
) -> dict[str, float | None]:  # fmt: skip
    """Measure a student before any update, and refuse one that is broken at birth.

    Returns its greedy ROUGE, `teacher_rouge2` and `rouge2_kept` (their ratio, when the teacher's is given), `kl_loss`
    to the teacher per token of the batch's labels, `encoder_gap` and `decoder_gap` (`hidden_loss` between the last
    layers; None where the widths differ), and the share of `empty` summaries. A low ROUGE is not refused. Raises
    InputError with the likely cause: different vocabularies, weights or logits that are not finite, cached generation
    that differs from uncached, only empty summaries while `kl_loss` is above that of guessing evenly.
    """
    sizes = student.config.vocab_size, teacher.config.vocab_size, len(tokenizer)
    if sizes[0] != sizes[1] or sizes[2] > sizes[0]:
        raise InputError(
            f"vocabularies differ: student {sizes[0]}, teacher {sizes[1]}, tokenizer {sizes[2]} entries; "
            "cut the student from this teacher and use its tokenizer"
        )
    modes = student.training, teacher.training
    student.eval(), teacher.eval()
    options = {"max_source_length": max_source_length, "batch_size": batch_size, "prefix": prefix, "num_beams": 1}
    options["min_length"] = 0  # the model's own may be beyond max_new_tokens
    try:
        teacher_out, student_out = _forward("teacher", teacher, batch), _forward("student", student, batch)
        labels = batch["labels"].to(student.device)
        row: dict[str, float | None] = {
            "kl_loss": losses.kl_loss(student_out.logits, teacher_out.logits.to(student.device), labels).item(),
            "encoder_gap": _gap(student_out, teacher_out, "encoder", batch["attention_mask"]),
            "decoder_gap": _gap(student_out, teacher_out, "decoder", labels != -100),
        }
        _check_cache(student, batch, max_new_tokens=min(16, max_new_tokens))
        predictions = generation.summarize(student, tokenizer, documents, max_new_tokens=max_new_tokens, **options)
    finally:
        student.train(modes[0]), teacher.train(modes[1])
    row["empty"] = sum(map(generation.is_empty, predictions)) / len(predictions)
    # A decoder cut to a layer or two may stop at once and still learn; one that is worse than guessing is broken.
    if row["empty"] == 1 and row["kl_loss"] > math.log(student.config.vocab_size):
        raise InputError(
            f"the student writes nothing for all {len(predictions)} documents: its first token is the end token; "
            "check decoder_start_token_id and the special tokens, or keep more decoder layers"
        )
    row |= {metric: float(values.mean()) for metric, values in rouge_scores(predictions, references).items()}
    if teacher_rouge2 is not None:
        kept = row["rouge2"] / teacher_rouge2 if teacher_rouge2 else None
        row |= {"teacher_rouge2": teacher_rouge2, "rouge2_kept": kept}
    return row


def _forward(name: str, model, batch: dict[str, torch.Tensor]):
    inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask", "labels")}
    out = model(**inputs, output_hidden_states=True)
    if torch.isfinite(out.logits).all():
        return out
    broken = [key for key, weight in model.state_dict().items() if not torch.isfinite(weight).all()]
    if broken:
        cause = "the saved model is broken, or layers were copied wrong"
        raise InputError(f"{name} weights are not finite, first {broken[0]}: {cause}")
    cause = f"though its weights are: activations overflow in {model.dtype}; load it in float32 or bfloat16"
    raise InputError(f"{name} logits are not finite {cause}")


def _gap(student_out, teacher_out, stack: str, mask: torch.Tensor) -> float | None:
    pair = [getattr(out, f"{stack}_hidden_states")[-1].to(mask.device) for out in (student_out, teacher_out)]
    return losses.hidden_loss(*pair, mask).item() if pair[0].shape == pair[1].shape else None


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
    prefix: str = "", logits_tolerance: float = 1e-3, ct2: bool = True, min_agreement: float = 95.0,
    max_score_gap: float = 0.01,
) -> dict[str, float | str | None]:  # fmt: skip
    """Prove that the saved student is the student in memory: reload it in a new process, then convert it.

    The new process must give the same generation settings, tokenizer, logits (largest difference within
    `logits_tolerance` times their standard deviation, or times 1 where that is smaller) and greedy summaries. The
    CTranslate2 model must write greedy summaries whose mean ROUGE-L against these is at least `min_agreement`, and give
    fixed texts log-probabilities at most `max_score_gap` nats a token away on average; architectures it does not know
    are skipped and named. Returns the measured numbers. Raises ValueError naming what differs.
    """
    folder, documents = Path(folder), list(documents)
    settings = {"max_source_length": max_source_length, "max_new_tokens": max_new_tokens, "prefix": prefix}
    settings["min_length"] = 0  # the model's own may be beyond max_new_tokens, which CTranslate2 refuses
    was_training = model.training
    model.eval()
    try:
        expected = _observe(model, tokenizer, documents, settings)
        found = _observe_in_new_process(folder, model, documents, settings)
        row = _compare(expected, found, logits_tolerance)
        if ct2:
            row |= _ctranslate2_agreement(folder, model, tokenizer, documents, expected["summaries"], settings)
    finally:
        model.train(was_training)
    rouge, gap = row.get("ctranslate2_rougeL"), row.get("ctranslate2_score_gap")
    if rouge is not None and rouge < min_agreement:
        shown = f"ROUGE-L {rouge:.1f} against the student's own, at least {min_agreement} wanted"
        raise ValueError(f"CTranslate2 writes other summaries: {shown}")
    if gap is not None and not gap <= max_score_gap:  # NaN fails as well
        shown = f"{gap:.3g} nats a token off, at most {max_score_gap} allowed"
        raise ValueError(f"CTranslate2 scores are {shown}: the converted weights or their scaling are wrong")
    return row


def _compare(expected: dict, found: dict, logits_tolerance: float) -> dict[str, float]:
    """Raise ValueError naming the first thing that differs between two observations; return the measured numbers."""
    for name in ("generation settings", "tokenizer"):
        for key in sorted(expected[name].keys() | found[name].keys()):
            before, after = expected[name].get(key), found[name].get(key)
            if before != after:
                shown = f"{str(before)[:60]!r} in memory, {str(after)[:60]!r} reloaded"
                raise ValueError(f"the saved student differs in {name}: {key} is {shown}")
    before, after = np.array(expected["logits"]), np.array(found["logits"])
    if before.shape != after.shape:
        raise ValueError(f"the saved student differs in logits: shape {before.shape} in memory, {after.shape} reloaded")
    difference = float(np.abs(before - after).max())
    if not difference <= logits_tolerance * max(1.0, float(before.std())):  # NaN fails as well
        raise ValueError(f"the saved student differs in logits by {difference:.3g}: its weights were not saved as is")
    summaries = list(zip(expected["summaries"], found["summaries"], strict=True))
    other = [f"{before[:60]!r} in memory, {after[:60]!r} reloaded" for before, after in summaries if before != after]
    if other:
        raise ValueError(f"the saved student writes {len(other)} of {len(summaries)} other summaries, first {other[0]}")
    return {"logits_difference": difference, "same_summaries": len(summaries)}


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
    return {
        "logits": logits.float().cpu().tolist(),
        "summaries": generation.summarize(model, tokenizer, documents, dtype=torch.float32, num_beams=1, **settings),
        "generation settings": json.loads(json.dumps(kept, default=str)),
        "tokenizer": {
            "entries": len(tokenizer),
            "vocabulary": artifacts.config_hash(tokenizer.get_vocab()),
            "special tokens": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
            "token ids": tokenizer(documents, truncation=True, max_length=settings["max_source_length"])["input_ids"],
        },
    }


def _observe_in_new_process(folder: Path, model, documents: list[str], settings: dict) -> dict:
    with tempfile.TemporaryDirectory() as temporary:
        request, answer = Path(temporary) / "request.json", Path(temporary) / "answer.json"
        values = {"folder": str(folder.resolve()), "device": str(model.device), "documents": documents}
        values |= {"dtype": str(model.dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
        artifacts.write_json(request, values | {"settings": settings})
        code = "import sys; from distill_utils.experiments.checks import _answer; _answer(*sys.argv[1:])"
        paths = filter(None, [str(artifacts.REPOSITORY), os.environ.get("PYTHONPATH")])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", code, str(request), str(answer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"the saved student cannot be loaded in a new process: {reason[:300]}")
        return artifacts.read_json(answer)


def _answer(request: str, answer: str) -> None:
    """Run in the new process: load the saved model and write down what it does."""
    values = artifacts.read_json(request)
    torch.set_num_threads(values["threads"])
    model, tokenizer = load_model(values["folder"], dtype=getattr(torch, values["dtype"]))
    artifacts.write_json(
        answer, _observe(model.to(values["device"]), tokenizer, values["documents"], values["settings"])
    )


@torch.inference_mode()
def _ctranslate2_agreement(folder: Path, model, tokenizer, documents, expected: list[str], settings: dict) -> dict:
    """Compare greedy summaries, and the scores of the same fixed texts: a wrong output scale shows in scores alone."""
    pairs = [pair for pair in zip(documents, expected, strict=True) if pair[0].strip()][:16]
    cut = {"truncation": True, "max_length": settings["max_source_length"]}
    sources = tokenizer([settings["prefix"] + document for document, _ in pairs], **cut)["input_ids"]
    targets = tokenizer(text_target=[text or "-" for _, text in pairs], **cut)["input_ids"]
    with tempfile.TemporaryDirectory() as temporary:
        try:
            converted = ctranslate.to_ctranslate2(folder, Path(temporary) / "converted")
        except ValueError as error:
            return {"ctranslate2_rougeL": None, "ctranslate2_score_gap": None, "ctranslate2_skipped": str(error)}
        summaries, _ = ctranslate.summarize_ctranslate2(converted, tokenizer, documents, num_beams=1, **settings)
        scores = ctranslate.score_ctranslate2(converted, sources, targets, tokenizer)
    rouge = rouge_scores(summaries, expected)["rougeL"]
    rouge = [100.0 if a == b else score for a, b, score in zip(summaries, expected, rouge, strict=True)]  # "" == ""
    starts = model.generation_config.decoder_start_token_id, model.config.decoder_start_token_id
    start = next(token for token in starts if token is not None)
    gaps = []
    for source, target, found in zip(sources, targets, scores, strict=True):
        ids = [torch.tensor([row], device=model.device) for row in (source, [start, *target[:-1]], target)]
        log_probs = model(input_ids=ids[0], decoder_input_ids=ids[1]).logits.float().log_softmax(-1)
        own = log_probs[0].gather(1, ids[2][0, :, None])[:, 0].cpu().numpy()
        gaps.append(np.abs(own - found).mean())
    return {"ctranslate2_rougeL": float(np.mean(rouge)), "ctranslate2_score_gap": float(np.mean(gaps))}
