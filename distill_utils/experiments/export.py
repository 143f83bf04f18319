"""A finished student as a folder that others load: weights, tokenizer, settings, int8 for the CPU, proof and card.

Out of scope: finding a student by its name, and summarizing with one (use.py).
"""

import inspect
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
from distill_utils.models.loading import ASSETS, load_model, model_fingerprint, model_folder, save_model, shipped_models
from distill_utils.models.students import count_parameters, decoder_layers, encoder_layers
from distill_utils.report.names import method_label
from distill_utils.report.settings import check_writable

# What CTranslate2's weights may change, by their type: ROUGE-L of greedy summaries to ours at least, and the likelihood
# lost in nats per token at most. The first type that keeps to it is written. Rounding to int8 moves single tokens by
# 0.07 either way and rewords a third of summaries; 400 documents show no loss of ROUGE-2 (LOG.md, 2026-11-29).
PARITY = {"int8": (80.0, 0.02), "bfloat16": (90.0, 0.02), "float32": (checks.MIN_AGREEMENT, checks.MAX_SCORE_GAP)}
NUM_TEXTS, NUM_PROVED = 64, 16  # that types are compared on; of these, that a new process must write alike


def export(name: str | Path, folder: str | Path, push: str = "", replace: bool = False) -> Path:
    """Write a finished student to a folder, whole or not at all, and return it; `push` uploads it to the hub.

    The folder loads by `AutoModelForSeq2SeqLM.from_pretrained`. It is read again in a new process, which must give the
    same logits, summaries, settings and tokenizer (`checks.round_trip`). In ctranslate2/ lies the same model for the
    CPU, in int8 or in the first type that keeps to PARITY. `name` is what `use.find_model` knows. Raises InputError
    for a folder that exists, unless told to `replace` it, an unfinished run, and a hub that takes no upload, before
    anything is loaded.
    """
    folder = Path(folder).expanduser()
    check_target(folder, replace)
    source, run = use.find_model(name)
    if push:
        _check_hub(push)
    facts = _facts(source, run)
    print(f"exporting {facts['origin']}", flush=True)
    model, tokenizer = load_model(source, dtype="auto")
    length = facts["config"].get("max_source_length")
    if length:
        tokenizer.model_max_length = length
    own = use.own_prefix(model.config)
    prefix = facts["config"].get("prefix", own)  # a run's "" is how it was trained, whatever its teacher's config says
    if prefix or own:
        model.config.task_specific_params = {"summarization": {"prefix": prefix}}
    length = length or use.longest_source(tokenizer, getattr(model.config, "max_position_embeddings", None))
    settings = {"max_source_length": length, "prefix": prefix}
    with folder_atomic(folder) as temporary:
        save_model(model, tokenizer, temporary)
        for file in temporary.glob("*.safetensors"):  # written for its owner alone
            file.chmod((temporary / "config.json").stat().st_mode)
        model.to(device())
        documents = facts["documents"]
        proof = checks.round_trip(temporary, model, tokenizer, documents[:NUM_PROVED], convert=False, **settings)
        proof |= _convert(temporary, model, tokenizer, documents, settings)
        write_atomic(temporary / "README.md", str(card(push or folder.name, model, facts, settings, proof)))
    beside = "CTranslate2 in {quantization}" if proof["quantization"] else "no CTranslate2: {skipped}"
    print(f"wrote {folder}: reloaded with the same summaries, {beside.format_map(proof)}")
    if push:
        huggingface_hub.upload_folder(repo_id=push, folder_path=folder)
        print(f"uploaded to {push}")
    return folder


def check_target(folder: Path, replace: bool) -> None:
    """Reject a folder that cannot be written, or that exists; to be replaced it must be empty or an earlier export."""
    if folder.exists():
        found = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
        card = folder / "README.md"  # what an export says of itself; a teacher's folder has weights, too
        exported = card.is_file() and "from distill_utils import summarize" in card.read_text(encoding="utf-8")
        if not replace or not (found <= {"report"} or exported):
            raise InputError(f"{folder} exists: name a folder that is not there yet, or remove it")
    check_writable(folder.absolute().parent)


def _check_hub(name: str) -> None:
    """Make the empty repository now: an upload that is not allowed must not fail after minutes of work."""
    try:
        huggingface_hub.create_repo(name, exist_ok=True)
    except Exception as error:  # the hub client raises many kinds
        reason = str(error).strip().split("\n")[0][:150]
        raise InputError(f"cannot push to {name}: {reason}; log in by `hf auth login`, name it USER/NAME") from error


def _convert(folder: Path, model, tokenizer, documents: list[str], settings: dict) -> dict:
    """Write ctranslate2/ in the first type of PARITY that agrees with the model; return type, agreement and loss."""
    settings = settings | {"max_new_tokens": 32, "min_length": 0}
    model.float()
    expected = generation.summarize(model, tokenizer, documents, dtype=torch.float32, num_beams=1, **settings)
    for quantization, (least, most) in PARITY.items():
        try:
            converted = ctranslate.to_ctranslate2(folder, folder / use.CONVERTED, quantization)
        except InputError:  # a full disk
            raise
        except ValueError as error:
            return {"quantization": None, "skipped": str(error).partition(": use")[0]}
        agreement, gap, lost = checks.ctranslate2_agreement(converted, model, tokenizer, documents, expected, settings)
        if agreement >= least and (gap if quantization == "float32" else abs(lost)) <= most:
            return {"quantization": quantization, "agreement": agreement, "lost": lost, "compared": len(documents)}
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
        found["documents"] = [row["document"] for row in scoring.read_predictions(found["test"]["folder"])[:NUM_TEXTS]]
    else:  # texts that are always there
        functions = [value for value in vars(inspect).values() if inspect.isfunction(value)]
        found["documents"] = [text for value in functions if (text := inspect.getdoc(value))][:NUM_TEXTS]
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
    config, test, teacher, dataset = facts["config"], facts["test"], facts["teacher"], facts["dataset"]
    found = licences(teacher, dataset)
    mixed = len({*found.values()}) > 1
    scores = []
    if test and dataset:
        kinds = ("rouge1", "rouge2", "rougeL")
        scores = [EvalResult("summarization", dataset, dataset, kind, round(test[kind], 2)) for kind in kinds]
    data = ModelCardData(
        license="other" if mixed else next(iter(found.values()), None), license_name="see-below" if mixed else None,
        library_name="transformers", pipeline_tag="summarization", tags=["distillation"], model_name=name,
        base_model=teacher if _on_hub(teacher) else None, datasets=dataset if _on_hub(dataset) else None,
        eval_results=scores or None,
    )  # fmt: skip
    fixed = ("model", "data", "max_source_length", "prefix", "baseline", "num_speed", "quantization")
    shown = {
        "name": name, "model": model, "shape": f"{len(encoder_layers(model))}-{len(decoder_layers(model))}",
        "millions": count_parameters(model)["total"] / 1e6,
        "method": method_label(config.get("method") or config.get("path") or ""),
        "models": [each for each in (test, facts["teacher_test"]) if each], "licences": found, "few": FEW_DOCUMENTS,
        "decoding": ", ".join(f"{k}={v}" for k, v in test.get("settings", {}).items() if k not in fixed),
        "machine": lambda made: made["gpu"] or f"{made['processor']}, {made['threads']} threads",
    }  # fmt: skip
    shown = facts | settings | {"proof": proof, "teacher": _short(teacher)} | shown
    return ModelCard.from_template(data, template_path=str(ASSETS / "model_card.md.j2"), **shown)


def _short(name: str | None) -> str | None:
    """Return a name without the folders around it, which are those of somebody's machine."""
    path = Path(name or "")
    if path.name in use.SAVED and use.RUN_FOLDER.fullmatch(path.parent.name):
        return path.parent.name
    return path.name if path.is_absolute() or path.exists() or str(name)[:1] in (".", "~") else name
