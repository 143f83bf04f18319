"""A finished student as a folder that others load: weights, tokenizer, settings, int8 for the CPU, proof and card.

Out of scope: finding a student by its name, and summarizing with one (use.py).
"""

from __future__ import annotations

import inspect
import os
from contextlib import suppress
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from distill_utils.artifacts import InputError, folder_atomic, read_json, runs_dir, write_atomic
from distill_utils.device import device
from distill_utils.evaluation import ctranslate, generation, scoring
from distill_utils.experiments import checks, use
from distill_utils.experiments.comparison import FEW_DOCUMENTS
from distill_utils.models.loading import load_model, model_fingerprint, model_folder, save_model, shipped_models
from distill_utils.models.students import count_parameters, decoder_layers, encoder_layers

# What CTranslate2's weights may change, by their type: ROUGE-L of greedy summaries to ours at least, and nats per token
# at most. The first type that keeps to it is written.
PARITY = {"int8": (85.0, 0.05), "bfloat16": (90.0, 0.02), "float32": (checks.MIN_AGREEMENT, checks.MAX_SCORE_GAP)}
USAGE = """\
```python
from distill_utils import summarize

summarize(["a long text"], model="{name}")
```

Or without that package:

```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForSeq2SeqLM.from_pretrained("{name}")
inputs = tokenizer(["{prefix}a long text"], truncation=True, max_length={max_source_length}, return_tensors="pt")
inputs = {{name: inputs[name] for name in ("input_ids", "attention_mask")}}
print(tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True))
```"""
METHODS = {
    "sft": "shrink and fine-tune (SFT)",
    "kd": "knowledge distillation (KD)",
    "kd_cached": "knowledge distillation (KD) from cached distributions",
    "pl": "fine-tuning on pseudo-labels (PL)",
    "pl_kl": "pseudo-labels (PL) with the teacher's distribution",
    "pl_gold": "fine-tuning on pseudo-labels (PL) and references",
    "on_policy": "on-policy distillation",
}


def export(name: str | Path, folder: str | Path, push: str = "") -> Path:
    """Write a finished student to a new folder, whole or not at all, and return it; `push` uploads it to the hub.

    The folder loads by `AutoModelForSeq2SeqLM.from_pretrained`. It is read again in a new process, which must give the
    same logits, summaries, settings and tokenizer (`checks.round_trip`). In ctranslate2/ lies the same model for the
    CPU, in int8 or in the first type that keeps to PARITY. `name` is what `use.find_model` knows. Raises InputError
    for a folder that exists, an unfinished run, and a hub that takes no upload, before anything is loaded.
    """
    folder = Path(folder).expanduser()
    _check_target(folder)
    source, run = use.find_model(name)
    if push:
        _check_hub(push)
    facts = _facts(source, run)
    print(f"exporting {facts['origin']}", flush=True)
    model, tokenizer = load_model(source, dtype="auto")
    length = facts["config"].get("max_source_length")
    if length:
        tokenizer.model_max_length = length
    if prefix := facts["config"].get("prefix") or use.own_prefix(model.config):
        model.config.task_specific_params = {"summarization": {"prefix": prefix}}
    length = length or use.longest_source(tokenizer, getattr(model.config, "max_position_embeddings", None))
    settings = {"max_source_length": length, "prefix": prefix}
    with folder_atomic(folder) as temporary:
        save_model(model, tokenizer, temporary)
        for file in temporary.glob("*.safetensors"):  # written for its owner alone
            file.chmod((temporary / "config.json").stat().st_mode)
        model.to(device())
        proof = checks.round_trip(temporary, model, tokenizer, facts["documents"], convert=False, **settings)
        proof |= _convert(temporary, model, tokenizer, facts["documents"], settings)
        write_atomic(temporary / "README.md", str(card(push or folder.name, model, facts, settings, proof)))
    beside = "CTranslate2 in {quantization}" if proof["quantization"] else "no CTranslate2: {skipped}"
    print(f"wrote {folder}: reloaded with the same summaries, {beside.format_map(proof)}")
    if push:
        huggingface_hub.upload_folder(repo_id=push, folder_path=folder)
        print(f"uploaded to {push}")
    return folder


def _check_target(folder: Path) -> None:
    if folder.exists():
        raise InputError(f"{folder} exists: name a folder that is not there yet, or remove it")
    parent = next(place for place in folder.absolute().parents if place.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"cannot write {folder}: {parent.name or parent} is no folder or not yours to write to")


def _check_hub(name: str) -> None:
    """Make the empty repository now: an upload that is not allowed must not fail after minutes of work."""
    try:
        huggingface_hub.create_repo(name, exist_ok=True)
    except Exception as error:  # the hub client raises many kinds
        reason = str(error).strip().split("\n")[0][:150]
        raise InputError(f"cannot push to {name}: {reason}; log in by `hf auth login`, name it USER/NAME") from error


def _convert(folder: Path, model, tokenizer, documents: list[str], settings: dict) -> dict:
    """Write ctranslate2/ in the first type of PARITY that agrees with the model; return type, agreement and gap."""
    import ctranslate2  # what only the CPU needs may be missing elsewhere

    settings = settings | {"max_new_tokens": 32, "min_length": 0}
    model.float()
    expected = generation.summarize(model, tokenizer, documents, dtype=torch.float32, num_beams=1, **settings)
    ctranslate2.set_log_level(40)  # logging.ERROR: that bf16 is computed in float32 here is no news
    for quantization, (least, most) in PARITY.items():
        try:
            converted = ctranslate.to_ctranslate2(folder, folder / use.CONVERTED, quantization)
        except InputError:  # a full disk
            raise
        except ValueError as error:
            return {"quantization": None, "skipped": str(error).partition(": use")[0]}
        agreement, gap = checks.ctranslate2_agreement(converted, model, tokenizer, documents, expected, settings)
        if agreement >= least and gap <= most:
            return {"quantization": quantization, "agreement": agreement, "gap": gap}
    raise ValueError(f"CTranslate2 differs by {gap:.3g} nats per token even in float32: the conversion is wrong")


# -------------------------------------------------------------------------------------------------------------- facts


def _facts(source: str, run: Path | None) -> dict:
    """Return what is known of a model: its run's config, results and test, the teacher's test, texts to compare on."""
    found = {"origin": f"runs/{run.name}" if run else Path(source).name, "config": {}, "results": {}, "test": {}}
    if run:
        found |= {"config": _read(run / "config.json"), "results": _read(run / "results.json")}
        found["test"] = use.tests_of_runs().get(run.name, {})
    baseline = found["test"].get("settings", {}).get("baseline")
    found["teacher_test"] = _read(runs_dir() / baseline / "results.json") if baseline else {}
    made_from = found["results"].get("made_from", {})
    known = {model_fingerprint(name, None): name for name in shipped_models()}  # runs from before wrote no name
    found["teacher"] = made_from.get("teacher") or known.get(found["config"].get("teacher"))
    found["dataset"] = made_from.get("dataset")
    if found["test"]:
        found["documents"] = [row["document"] for row in scoring.read_predictions(found["test"]["folder"])[:16]]
    else:  # texts that are always there
        functions = [value for value in vars(inspect).values() if inspect.isfunction(value)]
        found["documents"] = [text for value in functions if (text := inspect.getdoc(value))][:16]
    return found


def _read(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}


def licences(teacher: str | None, dataset: str | None) -> dict[str, str]:
    """Return the known licences: of the teacher by its card, of the data by theirs where it is a hub name."""
    found = {"teacher": "apache-2.0" if teacher in shipped_models() else None, "data": None}
    with suppress(Exception):  # no card, no network, or a card without a licence
        if teacher and (local := model_folder(teacher) / "README.md").is_file() and not found["teacher"]:
            found["teacher"] = ModelCard.load(local).data.license
        elif _on_hub(teacher):
            found["teacher"] = huggingface_hub.model_info(teacher, timeout=5).card_data.license
    with suppress(Exception):
        if _on_hub(dataset):
            found["data"] = huggingface_hub.dataset_info(dataset, timeout=5).card_data.license
    return {of: licence for of, licence in found.items() if licence}


def _on_hub(name: str | None) -> bool:
    return bool(use.HUB_NAME.fullmatch(name or "")) and not Path(name).exists()


# --------------------------------------------------------------------------------------------------------------- card


def card(name: str, model, facts: dict, settings: dict, proof: dict) -> ModelCard:
    """Return the model card: what the run, its test and the proof recorded; what is not known is not said."""
    config, results, test = facts["config"], facts["results"], facts["test"]
    teacher, dataset, found = facts["teacher"], facts["dataset"], licences(facts["teacher"], facts["dataset"])
    hub_names = [each if _on_hub(each) else None for each in (teacher, dataset)]
    scores = []
    if test and dataset:
        metrics = {metric: round(test[metric], 2) for metric in ("rouge1", "rouge2", "rougeL")}
        scores = [EvalResult("summarization", dataset, dataset, kind, value) for kind, value in metrics.items()]
    data = ModelCardData(
        license=None if not found else found["teacher"] if len({*found.values()}) == 1 else "other",
        license_name="see-below" if len({*found.values()}) > 1 else None, library_name="transformers",
        pipeline_tag="summarization", tags=["distillation"], base_model=hub_names[0], datasets=hub_names[1],
        model_name=name, eval_results=scores or None,
    )  # fmt: skip
    shape = f"{len(encoder_layers(model))}-{len(decoder_layers(model))}"
    method = config.get("method") or config.get("path")
    made = f" made from {_short(teacher)}" if teacher else ""
    made += f" by {METHODS.get(method, method)}" if method else ""
    sections = [
        f"# {name}",
        f"A {model.config.model_type} model of {shape} encoder-decoder layers and "
        f"{count_parameters(model)['total'] / 1e6:.1f} M parameters{made}.",
        USAGE.format(name=name, **settings),
        "## Training\n\n" + _training(config, results, teacher, dataset),
        "## Results\n\n" + _results(test, facts["teacher_test"]),
        "## Checked\n\n" + _checked(proof, len(facts["documents"])),
        "## Limits\n\n" + _limits(test, settings["max_source_length"]),
        "## Licence\n\n" + _licence_text(found, dataset),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _short(name: str) -> str:
    """Return a name without the folders around it, which are those of somebody's machine."""
    path = Path(name)
    return path.parent.name if path.name in use.SAVED else path.name if path.is_absolute() or path.exists() else name


def _table(rows: list[tuple]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def _training(config: dict, results: dict, teacher: str | None, dataset: str | None) -> str:
    """Return the table of what determines the weights."""
    if not results:
        return "Nothing is recorded: the model was exported from a folder without its run."
    training, origin = config.get("training", {}), results["provenance"]
    rows = {
        "teacher": _short(teacher or "not recorded"),
        "teacher's layers copied": "encoder {encoder_layer_ids}, decoder {decoder_layer_ids}".format_map(results)
        if "decoder_layer_ids" in results else None,
        "data": f"{dataset or 'not recorded'}, {results.get('num_train', '?')} pairs, fingerprint {config.get('data')}",
        "updates": results.get("trained_steps", training.get("max_steps")),
        **{name.replace("_", " "): training.get(name) for name in ("batch_size", "optimizer", "learning_rate", "seed")},
        "source and target tokens": "{max_source_length}, {max_target_length}".format_map(config)
        if "max_target_length" in config else None,
        "seconds": results.get("seconds"),
        "machine": origin["gpu"] or f"{origin['processor']}, {origin['threads']} threads",
        "code": f"distill_utils at commit {origin['commit'] or 'not recorded'}, {origin['date']}",
    }  # fmt: skip
    return _table([("what", "value"), *((name, value) for name, value in rows.items() if value is not None)])


def _results(test: dict, teacher: dict) -> str:
    """Return the scores of the run's test beside the teacher's, with intervals, and the speed with its machine."""
    if not test:
        return "No test of this model is recorded."
    models = [("this model", test), *([("teacher", teacher)] if teacher else [])]
    rows = [("", *(name for name, _ in models))]
    for metric, label in (("rouge1", "ROUGE-1"), ("rouge2", "ROUGE-2"), ("rougeL", "ROUGE-L")):
        interval = f"{{{metric}:.2f}} ({{{metric}_low:.2f}} to {{{metric}_high:.2f}})"
        rows.append((label, *(interval.format_map(found) for _, found in models)))
    for key, label in (("words", "words per summary"), ("latency_ms", "ms per document"), ("ms_per_token", "ms/token")):
        rows.append((label, *(f"{found[key]:.2f}" for _, found in models)))
    fixed = ("model", "data", "max_source_length", "prefix", "baseline", "num_speed")
    decoding = ", ".join(f"{key}={value}" for key, value in test["settings"].items() if key not in fixed)
    origin = test["provenance"]
    text = f"{test['num_documents']} test documents (fingerprint {test['settings']['data']}), one seed, "
    text += f"decoded with {decoding or 'the generation settings stored here'}. ROUGE is F1 x 100 with 95 % bootstrap "
    text += "intervals over documents."
    if "rouge2_difference" in test:
        difference = "{rouge2_difference:+.2f} ({rouge2_difference_low:+.2f} to {rouge2_difference_high:+.2f})"
        text += f" ROUGE-2 minus the teacher's, paired: {difference.format_map(test)}."
    machine = origin["gpu"] or f"{origin['processor']}, {origin['threads']} threads"
    text += f" Speed: `generate` in PyTorch {origin['packages']['torch']}, one document at a time, {machine}."
    return f"{_table(rows)}\n\n{text}"


def _checked(proof: dict, num: int) -> str:
    text = f"Read again in a new process, the folder gives the same settings, tokenizer and greedy summaries of {num} "
    text += f"texts; logits differ by at most {proof['logits_difference']:.2g}. "
    if not proof["quantization"]:
        return f"{text}No CTranslate2 model: {proof['skipped']}."
    text += f"`{use.CONVERTED}/` holds the model in {proof['quantization']} for CTranslate2: its greedy summaries have "
    text += f"ROUGE-L {proof['agreement']:.1f} to those of the weights here, its scores differ by {proof['gap']:.2g} "
    return text + "nats per token."


def _limits(test: dict, length: int) -> str:
    lines = [
        f"Of a text longer than {length} tokens only the beginning is read.",
        "It writes what its training data taught, in that style and language; on other text nothing was measured.",
        "Summaries can be wrong: check numbers, names and claims against the text.",
    ]
    if test.get("numbers_supported") is not None and test.get("names_supported") is not None:
        shares = "{numbers_supported:.0%} of numbers and {names_supported:.0%} of names in its test summaries stand in"
        lines.append(f"{shares.format_map(test)} the text; {test['repeating']:.0%} of the summaries repeat themselves.")
    if 0 < test.get("num_documents", 0) < FEW_DOCUMENTS:
        lines.append("The test is too small to judge the model by: it shows that the code runs.")
    return "\n".join(f"- {line}" for line in lines)


def _licence_text(found: dict[str, str], dataset: str | None) -> str:
    lines = [f"The {of}: {licence}." for of, licence in found.items()]
    if dataset == "pydocs":
        lines.append("The data: docstrings of installed packages, each under the licence of its package.")
    missing = [of for of in ("teacher", "data") if of not in found and not (of == "data" and dataset == "pydocs")]
    if missing:
        lines.append(f"Not known here: that of the {' and of the '.join(missing)}. Look it up before you share this.")
    return " ".join(lines)
