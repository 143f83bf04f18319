"""One student, described by one dataclass, in a straight line: check, forecast, label, rows, cut, fit, save.

Each expensive step is an artifact under runs/. Out of scope: the objectives and the loop themselves, and testing what
was trained (comparison.py).
"""

import re
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset

from distill_utils.artifacts import artifact, config_hash, hashed, later, read_json, report_progress, runs_dir
from distill_utils.data import loading
from distill_utils.data.batches import batch_list, document_id, pair_stream, tokenize_pairs
from distill_utils.device import amp_dtype, device, seed_everything, to_device
from distill_utils.distillation import objectives, pseudo_labels
from distill_utils.distillation.pseudo_labels import filter_labels
from distill_utils.distillation.teacher_cache import teacher_states, with_states, with_targets, write_targets
from distill_utils.models import students
from distill_utils.models.frozen import frozen_in, own_trained
from distill_utils.models.loading import check_same_tokenizer, load_model, model_fingerprint, save_model
from distill_utils.training.checkpoints import FREE_SETTINGS
from distill_utils.training.loop import choose_attention, fit, fit_from_trunk, set_attention
from distill_utils.training.optimizers import Training, stop_facts

METHODS = ("sft", "kd", "pl", "pl_kl", "pl_gold", "on_policy", "kd_cached")
ON_PSEUDO_LABELS = ("pl", "pl_kl", "pl_gold")
CROSS_FIT = ("", "other", "own")
LABEL_SETTINGS = (*pseudo_labels.DECODING, *pseudo_labels.SAMPLING, "num_candidates", "seed", "engine", "quantization",
                  "batch_size")  # fmt: skip
HELD_OUT_METRICS = ("validation_ce", "validation_kl")
USABLE = {"repeating": 0}  # labels that every run trains on; empty ones are always dropped


@dataclass(frozen=True)
class StudentRun:
    """What determines one trained student; JSON-serialisable by `dataclasses.asdict`."""

    method: str  # one of METHODS
    shape: str  # "<encoder layers>-<decoder layers>"
    teacher: str  # shipped name, folder or hub name
    max_source_length: int  # tokens
    max_target_length: int  # tokens
    training: Training
    prefix: str = ""  # written before every document, for T5
    freeze_encoder: bool = True  # where the student keeps the whole encoder
    freeze_embeddings: bool = True
    ce_weight: float = 0.2  # KD: labels
    kl_weight: float = 0.8  # KD: the teacher's distribution
    hidden_weight: float = 3.0  # KD: the teacher's hidden states
    temperature: float = 2.0  # where the teacher's distribution is used: softens both
    divergence: str = "forward_kl"  # one of losses.DIVERGENCES
    jsd_beta: float = 0.5  # share of the teacher in the mixture of "jsd"
    match: str = "outputs"  # KD: compare what layers return, or "inputs", what they get, as published
    supervise_forward: bool = True  # KD: imitate the end of the block that a layer replaces, not the copied layer
    normalize_hidden: bool = True  # KD: bring every token's hidden state to mean 0 and variance 1 first
    teacher_dropout: bool = False  # KD: the teacher's dropout on, as in the published code
    on_policy_share: float = 0.5  # on-policy: share of a batch whose targets are the student's own samples
    top_k: int = 32  # cached KD: token ids kept of each of the teacher's distributions
    target_samples: int = 0  # cached KD: draws instead of the top ids, 0 = the top ids
    label_settings: dict = field(default_factory=dict)  # PL: decoding settings of the teacher
    label_filters: dict = field(default_factory=dict)  # PL: thresholds by measure (pseudo_labels.py)
    label_teachers: list[str] = field(default_factory=list)  # PL: further teachers that label the same documents
    cross_fit: str = ""  # PL: label a half by a teacher trained on the "other" half, or on its "own"
    cross_fit_base: str = ""  # the pre-trained model that both such teachers start from
    cross_fit_steps: int = 300  # updates of such a teacher
    encoder_layer_ids: list[int] | None = None  # the teacher's layers to copy; None = `models.students.layer_map`
    decoder_layer_ids: list[int] | None = None
    variant: str = ""  # what sets this run apart from another of its method and shape, in names and tables
    label_smoothing: float = later(0.0)  # share of the target that goes to all tokens alike, as in Pegasus's recipe
    cache_states: bool = later(False, "cache_encoder")  # read from disk what the frozen teacher makes of the rows

    @property
    def group(self) -> str:
        """Method, shape and variant: what runs that differ by seed alone share."""
        text = self.variant.replace("=-", "=minus")  # -1 and 1 are two runs
        variant = "-" + re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_") if text else ""
        return f"{self.method}-{self.shape}{variant}"

    @property
    def name(self) -> str:
        return f"{self.group}-s{self.training.seed}"

    @property
    def lengths(self) -> tuple[int, int, str]:
        """What `tokenize_pairs` needs: longest source and target in tokens, prefix."""
        return self.max_source_length, self.max_target_length, self.prefix


def with_seed(run: StudentRun, seed: int) -> StudentRun:
    """Return the same run with another data order and dropout."""
    return replace(run, training=replace(run.training, seed=seed))


def grid(base: StudentRun, methods: list[str], shapes: list[str], seeds: list[int]) -> list[StudentRun]:
    """Return one run for every method, shape and seed."""
    variants = [replace(base, method=method, shape=shape) for shape in shapes for method in methods]
    return [with_seed(run, seed) for run in variants for seed in seeds]


# ------------------------------------------------------------------------------------------------------------- cutting


def cut_student(run: StudentRun, teacher) -> tuple[torch.nn.Module, dict]:
    """Return the untrained student of a run, with its frozen parts, and the arguments its objective needs."""
    shape = students.parse_shape(run.shape, teacher)
    depths = len(students.encoder_layers(teacher)), len(students.decoder_layers(teacher))
    maps = run.encoder_layer_ids, run.decoder_layer_ids
    student, *copied = students.init_student(teacher, *shape, *maps, share_weights=True)
    # A cut encoder has to learn to close its gaps; only a whole one can stay as it is.
    own_trained(student, run.freeze_encoder and shape[0] == depths[0], run.freeze_embeddings)

    imitated = copied
    if run.method == "kd" and run.supervise_forward:
        imitated = [students.supervision_map(depth, layers) for depth, layers in zip(depths, shape, strict=True)]
    shared = students.has_teacher_encoder(student, teacher)
    weights, smoothing = _fields(run, "ce_weight", "kl_weight"), _fields(run, "label_smoothing")
    softened = _fields(run, "temperature", "divergence", "jsd_beta") | smoothing | {"shared_encoder": shared}
    hidden = _fields(run, "hidden_weight", "match", "normalize_hidden", "teacher_dropout")
    hidden |= {"encoder_layer_ids": imitated[0], "decoder_layer_ids": imitated[1]}
    sampled = {"share": run.on_policy_share, "max_new_tokens": run.max_target_length}
    options = {
        "kd": weights | softened | hidden,
        "pl_kl": softened,
        "on_policy": weights | softened | sampled,
        "kd_cached": weights,
    }.get(run.method, smoothing)
    facts = {"encoder_ids": copied[0], "decoder_ids": copied[1], "shared": shared}
    layers = [list(ids) for ids in imitated] if run.method == "kd" and run.hidden_weight else [[], []]
    stored = {"encoder": {}} if shared and run.method != "on_policy" else {}  # which takes batches apart
    if run.method == "pl_kl" or (run.method == "kd" and not run.teacher_dropout):
        stored["decoder"] = {"layer_ids": layers[1], "match": run.match if layers[1] else "outputs"}
        if layers[0] and not shared:
            stored["encoder_layers"] = {"layer_ids": layers[0], "match": run.match}
    return student, facts | {"options": options, "stored": stored if run.cache_states else {}}


def idle_parts(run: StudentRun, cut: dict, student, teacher) -> list[torch.nn.Module]:
    """Return the stacks that do not run in training, as what they would make is read from disk; `cut` as of the cut."""
    if not cut["stored"] or run.teacher_dropout:
        return []
    return [teacher.get_encoder(), teacher.get_decoder(), *([student.get_encoder()] if cut["shared"] else [])]


def _fields(run: StudentRun, *names: str) -> dict:
    return {name: getattr(run, name) for name in names}


def objective_of(method: str):
    """Return the objective function of a method; PL is SFT on the teacher's summaries."""
    return getattr(objectives, {"pl": "sft", "pl_gold": "sft"}.get(method, method))


# ------------------------------------------------------------------------------------------------ labels, rows, targets


def label(run: StudentRun, teacher, train: Dataset) -> Path:
    """Return the artifact with the teacher's summaries of the training documents (pseudo_labels.jsonl)."""
    decoding = {"max_source_length": run.max_source_length, "prefix": run.prefix, **run.label_settings}
    inputs = {"teacher": model_fingerprint(run.teacher, teacher), "data": loading.data_fingerprint(train)}

    def build(folder: Path) -> dict:
        labels = pseudo_labels.pseudo_labels(run.teacher, train, folder, **decoding)
        seconds = sum(map(float, (folder / "seconds.txt").read_text(encoding="utf-8").split()))
        _, counts = filter_labels(labels, USABLE)
        return {"counts": counts, "seconds": round(seconds, 2), "documents_per_second": round(len(train) / seconds, 2)}

    return artifact("pseudo-labels", inputs | decoding, build)


def labelled(folder: Path) -> Dataset:
    """Return the usable pseudo-labels of an artifact: id, document, summary (the teacher's), reference, score."""
    return filter_labels(pseudo_labels.read_labels(folder), USABLE)[0]


def training_rows(run: StudentRun, teacher, tokenizer, train: Dataset) -> Dataset:
    """Return what a run trains on: the references, or the teacher's summaries as its label settings ask for.

    A document whose labels are empty or repeating keeps its reference, so that every method has all documents; what
    `label_filters` drop is a gap, which `pair_stream` fills. With `cross_fit` every half of the data is labelled by a
    teacher that was trained on the other half, which cannot have memorized its references, or on its own half, which
    can; both are fine-tuned from `cross_fit_base`.
    """
    if run.method not in ON_PSEUDO_LABELS:
        return train
    if run.cross_fit:
        halves = pseudo_labels.cross_fit_halves(train, seed=0)
        tuned = [cross_fit_teacher(run, tokenizer, half) / "teacher" for half in halves]
        labellers = zip(halves, tuned[::-1] if run.cross_fit == "other" else tuned, strict=True)
        folders = [label(replace(run, teacher=str(path)), load_model(path)[0], half) for half, path in labellers]
    else:
        folders = [label(run, teacher, train)]
        for name in run.label_teachers:
            model, other = load_model(name)
            check_same_tokenizer(run.teacher, tokenizer, name, other)
            folders.append(label(replace(run, teacher=name), model, train))
    usable = [labelled(folder) for folder in folders]
    written = {document_id(name) for rows in usable for name in rows["id"]}
    rows = [filter_labels(each, run.label_filters)[0] for each in usable]
    unlabelled = train.select([i for i, name in enumerate(train["id"]) if name not in written])
    rest = train if run.method == "pl_gold" else unlabelled
    return pseudo_labels.join_labels([*rows, rest])[0] if len(rows) > 1 or len(rest) else rows[0]


def cross_fit_teacher(run: StudentRun, tokenizer, half: Dataset) -> Path:
    """Return the artifact of a teacher fine-tuned on one half of the training data: teacher/, history.csv."""
    training = replace(run.training, max_steps=run.cross_fit_steps, seed=0, eval_every=0, schedule="linear", patience=0)
    model, own = load_model(run.cross_fit_base)
    check_same_tokenizer(run.teacher, tokenizer, run.cross_fit_base, own)
    settings = {"training": hashed(training), "lengths": run.lengths, "data": loading.data_fingerprint(half)}
    decoding = load_model(run.teacher)[0].generation_config
    settings["decoding"] = {name: value for name, value in decoding.to_diff_dict().items() if name[0] != "_"}

    def build(folder: Path) -> dict:
        seed_everything(training.seed)
        model.to(device())
        choose_attention(model, run.max_source_length)
        batches = batches_of(replace(run, training=training), tokenizer, half)
        history = fit(
            model, lambda model, batch: objectives.sft(model, None, batch), batches, training, folder,
            stage="teacher of a half",
        )  # fmt: skip
        model.generation_config = decoding
        save_model(model.to("cpu"), tokenizer, folder / "teacher")
        return {"num_train": len(half), "final": history[-1]}

    return artifact("half-teacher", settings | {"base": model_fingerprint(run.cross_fit_base, model)}, build)


def batches_of(run: StudentRun, tokenizer, rows: Dataset, documents: Dataset | None = None):
    """Return the run's stream of batches, a function of the step, in the order of all `documents` (the rows')."""
    training = run.training
    tokenized = tokenize_pairs(rows, tokenizer, *run.lengths)
    documents = None if documents is rows else documents
    order = documents and tokenize_pairs(documents, tokenizer, *run.lengths)
    sizes = training.batch_size, training.seed, training.micro_batch_size
    return pair_stream(tokenized, tokenizer.pad_token_id, *sizes, order)


def cache_targets(run: StudentRun, teacher, tokenizer, train: Dataset) -> Path:
    """Return the artifact with the teacher's distributions over the references' tokens (targets/)."""
    kept, dtype = kept_targets(run), amp_dtype(precision=run.training.precision)
    inputs = {"teacher": model_fingerprint(run.teacher, teacher), "data": loading.data_fingerprint(train)}
    inputs |= {"lengths": list(run.lengths), **kept, "dtype": str(dtype)}

    def build(folder: Path) -> dict:
        return write_targets(
            folder / "targets", teacher, tokenize_pairs(train, tokenizer, *run.lengths),
            pad_token_id=tokenizer.pad_token_id, batch_size=run.training.batch_size, dtype=dtype, **kept,
            progress=lambda done, total: report_progress(folder, "teacher targets", done, total, "documents"),
        )  # fmt: skip

    return artifact("teacher-targets", inputs, build)


def stored_states(run: StudentRun, stored: dict, teacher, tokenizer, documents: Dataset, rows: Dataset) -> list[Path]:
    """Return the folders of states that a student reads (`cut_student`); `rows` are the documents with its targets."""
    dtype, made = amp_dtype(precision=run.training.precision), {}
    for side, which in stored.items():  # the encoder's first, which the decoder's are made from
        made_of = rows if side == "decoder" else documents
        given = side, run.teacher, teacher, tokenizer, made_of, run.lengths, dtype, made.get("encoder")
        made[side] = teacher_states(*given, **which)
    return list(made.values())


def kept_targets(run: StudentRun) -> dict:
    """Return which part of the teacher's distributions is kept: the top ids or draws, at which temperature."""
    top_k = 0 if run.target_samples else run.top_k
    return {"top_k": top_k, "samples": run.target_samples, "temperature": run.temperature}


# ------------------------------------------------------------------------------------------------------------ training


def train_student(run: StudentRun, teacher, tokenizer, train: Dataset, validation: Dataset) -> Path:
    """Return the artifact of one trained student: student/, history.csv, results.json with costs.

    `train` holds the references; methods on pseudo-labels replace them by the teacher's summaries. `validation` is
    the same for every method: cross-entropy of the references and KL to the teacher at temperature 1.
    """
    settings = {
        **hashed(run),
        "teacher": model_fingerprint(run.teacher, teacher),
        "data": loading.data_fingerprint(train),
        "validation": loading.data_fingerprint(validation),
    }
    if run.method in ON_PSEUDO_LABELS:
        settings["order"] = "documents"  # that of the labels, in results from before
    if others := [*run.label_teachers, *([run.cross_fit_base] if run.cross_fit else [])]:
        settings["others"] = [model_fingerprint(name, load_model(name)[0]) for name in others]

    def build(folder: Path) -> dict:
        rows = training_rows(run, teacher, tokenizer, train)
        began = time.monotonic()
        seed_everything(run.training.seed)
        student, cut = cut_student(run, teacher)
        choose_attention(student.to(device()), run.max_source_length)
        batches = batches_of(run, tokenizer, rows, train)
        if run.method == "kd_cached":
            batches = with_targets(batches, cache_targets(run, teacher, tokenizer, train) / "targets")
        held_out = batch_list(tokenize_pairs(validation, tokenizer, *run.lengths), tokenizer.pad_token_id, 32)
        prepared = time.monotonic() - began
        read, judged = stored_states(run, cut["stored"], teacher, tokenizer, train, rows), []
        if read:
            batches = with_states(batches, *read)
            last = {"encoder": {}} if cut["shared"] else {}
            last |= {"decoder": {"layer_ids": [], "match": "outputs"}}
            judged = stored_states(run, last, teacher, tokenizer, validation, validation)
            held_out = with_states(lambda step, own=held_out: own, *judged)(0)
        objective, cools = partial(objective_of(run.method), **cut["options"]), run.training.schedule == "cooldown"

        began = time.monotonic()
        arguments = {
            "model": student, "loss_fn": lambda model, batch: objective(model, teacher, batch), "batches": batches,
            "settings": run.training, "folder": folder, "stage": run.name,
            "evaluate": partial(held_out_losses, teacher=teacher, batches=held_out, shared_encoder=cut["shared"]),
        }  # fmt: skip
        dtype = amp_dtype(precision=run.training.precision)
        with frozen_in(dtype, student, teacher, idle_parts(run, cut, student, teacher)):
            history = fit_from_trunk(**arguments, trunk=trunk_of(run.name, settings)) if cools else fit(**arguments)
        set_attention(student, "sdpa")  # what generation is fastest with; nothing of it is saved
        save_model(student.to("cpu"), tokenizer, folder / "student")
        return {
            "name": run.name,
            "made_from": {"teacher": run.teacher, "dataset": train.info.dataset_name},
            "parameters": students.count_parameters(student),
            "encoder_layer_ids": cut["encoder_ids"],
            "decoder_layer_ids": cut["decoder_ids"],
            "shared_encoder": cut["shared"],
            "num_train": len(rows),
            "prepare_seconds": round(prepared, 2),
            "seconds": round(time.monotonic() - began, 2),
            "stored": sorted(cut["stored"]),
            "states_seconds": sum(read_json(made.parent / "results.json")["seconds"] for made in read),
            "states": [made.parent.name for made in (*read, *judged)],
            "final": history[-1],
            **stop_facts(history, run.training),
        }

    return artifact(run.name, settings, build)


def trunk_of(name: str, settings: dict) -> Path:
    """Return the folder of the trunk of runs that differ in length alone; it is extended, never finished."""
    shared = {key: value for key, value in settings["training"].items() if key not in FREE_SETTINGS}
    return runs_dir() / f"{name}-trunk-{config_hash(settings | {'training': shared})}"


@torch.no_grad()
def held_out_losses(student, teacher, batches: list[dict], shared_encoder: bool = False) -> dict:
    """Return validation_ce (nats per reference token) and validation_kl (KL(teacher || student), nats) over batches."""
    sums, tokens = {"ce_loss": 0.0, "kl_loss": 0.0}, 0
    for batch in batches:
        count = int((batch["labels"] != objectives.IGNORED).sum())
        moved = to_device(batch, student.device)
        losses = objectives.pl_kl(student, teacher, moved, temperature=1.0, shared_encoder=shared_encoder)
        for name in sums:
            sums[name] += float(losses[name]) * count
        tokens += count
    return {"validation_ce": sums["ce_loss"] / tokens, "validation_kl": sums["kl_loss"] / tokens}
