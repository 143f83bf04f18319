"""The embedded teacher: tokenizer, denoising, fine-tuning, evaluation and model card, from nothing.

`python -m distill_utils teachers` rebuilds `assets/pydocs-bart`. Every stage is an artifact and resumes where it was.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jinja2 import Template
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from distill_utils.artifacts import artifact, git_state, hashed, provenance, read_json, write_atomic, write_json
from distill_utils.data.batches import batch_list, pair_stream, tokenize_pairs
from distill_utils.data.denoising import denoising_stream, gap_pairs, pack_text
from distill_utils.data.loading import corpus_facts, load_pairs, load_text
from distill_utils.device import device, seed_everything
from distill_utils.distillation.objectives import sft
from distill_utils.evaluation import scoring
from distill_utils.evaluation.metrics import METRICS
from distill_utils.experiments import miniend
from distill_utils.models import students
from distill_utils.models.loading import ASSETS, load_model, model_fingerprint, save_model
from distill_utils.training.loop import Training, choose_attention, fit

VOCABULARY = 8000
WIDTH, HEADS, LAYERS = 192, 4, 6
INIT_STD = 0.06  # about 1 / sqrt(width); at the usual 0.02, made for width 1,024, attention starts almost uniform
MAX_SOURCE_LENGTH, MAX_TARGET_LENGTH = 128, 40  # tokens
WINDOW = 64  # tokens of packed text in one infilling example
ALIGNED_STEPS = 600  # steps of masking without collapsing spans, and without gap sentences, to learn to copy
CHECKED = 64  # test documents whose score a test of the shipped files repeats
DENOISING = Training(
    max_steps=6000, batch_size=32, optimizer="muon", learning_rate=1e-3, warmup_steps=300, weight_decay=0.01,
    eval_every=500, checkpoint_every=250, log_every=50, seed=11,
)  # fmt: skip
FINE_TUNING = replace(DENOISING, max_steps=2000, learning_rate=5e-4, warmup_steps=100, seed=12)
GENERATION = {
    "num_beams": 4,
    "max_new_tokens": 40,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 3,
    "early_stopping": True,
}


BASE_CARD = """# pydocs-bart-base

What `pydocs-bart` was before fine-tuning: pre-trained on raw text by `make teachers`, no summarizer yet. It is the
start of teachers that see only part of the pairs (cross-fitted pseudo-labels). The card of `pydocs-bart` describes its
training under "denoising".
"""


def without_teacher(model, batch: dict) -> dict:
    """Return the cross-entropy of the labels: what a model is trained on that nobody teaches."""
    return sft(model, None, batch)


def train_tokenizer() -> Path:
    """Return the folder of a byte-level BPE tokenizer trained on the training text."""

    def build(folder: Path) -> dict:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator(
            load_text("pydocs", "train"),
            trainers.BpeTrainer(
                vocab_size=VOCABULARY,
                special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
            mask_token="<mask>", model_max_length=MAX_SOURCE_LENGTH, clean_up_tokenization_spaces=False,
        ).save_pretrained(folder)  # fmt: skip
        return {"vocabulary": tokenizer.get_vocab_size()}

    return artifact("tokenizer", {"corpus": corpus_facts()["fingerprint"], "vocabulary": VOCABULARY}, build)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load the teacher's tokenizer from a folder."""
    return PreTrainedTokenizerFast.from_pretrained(folder)


def token_stream(split: str, tokenizer, tokenizer_folder: Path) -> np.ndarray:
    """Return the raw text of a split as one flat array of token ids."""

    def build(folder: Path) -> dict:
        texts = load_text("pydocs", split)
        order = np.random.default_rng(0).permutation(len(texts))
        flat = pack_text([texts[i] for i in order], tokenizer)
        np.save(folder / "tokens.npy", flat)
        return {"tokens": len(flat)}

    folder = artifact("token-stream", {"tokenizer": tokenizer_folder.name, "split": split}, build)
    return np.load(folder / "tokens.npy")


def new_model() -> BartForConditionalGeneration:
    """Return a randomly initialised model of the teacher's shape."""
    config = BartConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=4 * WIDTH,
        decoder_ffn_dim=4 * WIDTH, max_position_embeddings=MAX_SOURCE_LENGTH, dropout=0.0, attention_dropout=0.0,
        activation_dropout=0.0, init_std=INIT_STD,
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
        # Read by the CTranslate2 converter; public BART checkpoints carry them too.
        normalize_before=False, normalize_embedding=True, add_final_layer_norm=False, add_bias_logits=False,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


def train_stage(
    name: str, stage: str, settings: dict, training: Training, tokenizer, length: int,
    start: Callable[[], PreTrainedModel], data: Callable[[], tuple[Callable, Callable, dict]],
) -> Path:  # fmt: skip
    """Return the artifact of one stage of training: model/ with its tokenizer, history.csv.

    `start()` returns the model that the stage begins with, `data()` batches, how to evaluate, and facts to be kept.
    """

    def build(folder: Path) -> dict:
        seed_everything(training.seed)
        model = start()
        choose_attention(model, length)
        batches, evaluate, facts = data()
        history = fit(model, without_teacher, batches, training, folder, evaluate, stage=stage)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        return facts | {"final": history[-1]}

    return artifact(name, settings | {"training": hashed(training)}, build)


def denoise() -> Path:
    """Pre-train on the raw text: two steps of text infilling, one of gap sentences, in turn; return the run folder."""
    tokenizer_folder = train_tokenizer()
    tokenizer = load_tokenizer(tokenizer_folder)
    shape = {"width": WIDTH, "heads": HEADS, "layers": LAYERS, "init_std": INIT_STD, "window": WINDOW,
             "source": MAX_SOURCE_LENGTH, "aligned_steps": ALIGNED_STEPS}  # fmt: skip

    def data() -> tuple[Callable, Callable, dict]:
        tokens = token_stream("train", tokenizer, tokenizer_folder)
        size, seed = DENOISING.batch_size, DENOISING.seed
        infilling = denoising_stream(
            tokens, tokenizer, "text_infilling", WINDOW, size, seed, aligned_steps=ALIGNED_STEPS
        )
        gaps, held_out = (
            tokenize_pairs(gap_pairs(load_text("pydocs", split)), tokenizer, MAX_SOURCE_LENGTH, MAX_TARGET_LENGTH)
            for split in ("train", "validation")
        )
        gap_sentences = pair_stream(gaps, tokenizer.pad_token_id, size, seed)

        def batches(step: int) -> list[dict]:
            return gap_sentences(step // 3) if step >= ALIGNED_STEPS and step % 3 == 2 else infilling(step)

        checks = batch_list(held_out.select(range(512)), tokenizer.pad_token_id, 32)
        evaluate = partial(miniend.held_out_loss, batches=checks)
        return batches, evaluate, {"tokens": len(tokens), "gap_pairs": len(gaps)}

    settings = {"tokenizer": tokenizer_folder.name, "shape": shape}
    given = settings, DENOISING, tokenizer, MAX_SOURCE_LENGTH
    return train_stage("teacher-denoised", "denoising", *given, new_model, data)


def fine_tune(denoised: Path) -> Path:
    """Fine-tune the denoised model on the corpus's pairs; return the run folder."""
    tokenizer = load_tokenizer(train_tokenizer())

    def start() -> BartForConditionalGeneration:
        model = BartForConditionalGeneration.from_pretrained(denoised / "model", dropout=0.1)
        ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
        model.generation_config = GenerationConfig(**ids, **GENERATION)
        return model

    def data() -> tuple[Callable, Callable, dict]:
        train, validation = (
            tokenize_pairs(load_pairs("pydocs", split), tokenizer, MAX_SOURCE_LENGTH, MAX_TARGET_LENGTH)
            for split in ("train", "validation")
        )
        batches = pair_stream(train, tokenizer.pad_token_id, FINE_TUNING.batch_size, FINE_TUNING.seed)
        evaluate = partial(miniend.held_out_loss, batches=batch_list(validation, tokenizer.pad_token_id, 32))
        return batches, evaluate, {"pairs": len(train)}

    given = {"start": denoised.name}, FINE_TUNING, tokenizer, MAX_SOURCE_LENGTH
    return train_stage("teacher-fine-tuned", "fine-tuning", *given, start, data)


def build() -> Path:
    """Train the teacher, write it to assets/pydocs-bart in bf16 with its card, and return that folder.

    Beside it goes pydocs-bart-base, the model before fine-tuning, for experiments that fine-tune a teacher anew.

    The card's figures are measured on the files as written, with the generation settings they carry.
    """
    trained_by = git_state()  # before the files below make the working tree differ
    denoised = denoise()
    base = BartForConditionalGeneration.from_pretrained(denoised / "model")
    folder = ASSETS / "pydocs-bart-base"
    save_model(base.to(torch.bfloat16), load_tokenizer(train_tokenizer()), folder)
    write_atomic(folder / "README.md", BASE_CARD)
    tuned = fine_tune(denoised)
    folder = ASSETS / "pydocs-bart"
    model, tokenizer = load_model(tuned / "model")
    save_model(model.to(torch.bfloat16), tokenizer, folder)

    stages = [stage_facts("denoising", denoised, DENOISING), stage_facts("fine-tuning", tuned, FINE_TUNING)]
    write_card(folder, {**trained_by, **origin(tuned), "stages": stages, **measure()})
    return folder


def measure() -> dict:
    """Return what the card says of pydocs-bart's files: their size, decoding, and ROUGE on the whole test split."""
    model, tokenizer = load_model("pydocs-bart")
    model.to(device())
    test = load_pairs("pydocs", "test")
    fingerprint = model_fingerprint("pydocs-bart", model)
    options = {"max_source_length": MAX_SOURCE_LENGTH}
    tested = scoring.evaluate_model("teacher", model, tokenizer, fingerprint, test, **options)
    few = scoring.evaluate_model("teacher", model, tokenizer, fingerprint, test.select(range(CHECKED)), **options)
    return {
        "parameters": students.count_parameters(model),
        "decoding": GENERATION,
        "max_source_length": MAX_SOURCE_LENGTH,
        "num_test": len(test),
        "rouge": rouge_of(tested),
        "num_checked": CHECKED,
        "rouge_checked": rouge_of(few),
    }


def origin(trained: Path) -> dict:
    """Return what a card says of where training took place: command, corpus and machine."""
    made = read_json(trained / "results.json")["provenance"]
    machine = {key: made[key] for key in ("processor", "threads", "gpu")}
    return {"command": "make teachers", "training_corpus": corpus_facts()["fingerprint"], "machine": machine}


def write_card(folder: Path, facts: dict) -> None:
    """Write card.json and README.md, which say the same; `facts` come from training and from measuring the files."""
    corpus = corpus_facts()["fingerprint"]  # that of the measurements
    card = {"name": folder.name, **facts, "corpus_fingerprint": corpus, "packages": provenance()["packages"]}
    write_json(folder / "card.json", card)
    template = ASSETS / ("teacher_card.md.j2" if "rouge" in card else "t5_teacher_card.md.j2")
    written = Template(template.read_text(encoding="utf-8"), trim_blocks=True, keep_trailing_newline=True)
    write_atomic(folder / "README.md", written.render(card))


def stage_facts(stage: str, folder: Path, settings: Training) -> dict:
    """Return what a card says of one stage of training."""
    final = read_json(folder / "results.json")["final"]
    return {
        "stage": stage,
        "steps": settings.max_steps,
        "examples": settings.max_steps * settings.batch_size,
        "seconds": round(final["seconds"]),
        "loss": round(final["loss"], 4),
        "validation_loss": round(final["validation_loss"], 4),
        "settings": hashed(settings),
    }


def rouge_of(tested: Path) -> dict[str, list[float]]:
    """Return {metric: [mean, low, high]} of a test artifact."""
    row = read_json(tested / "results.json")
    return {name: [round(row[f"{name}{end}"], 4) for end in ("", "_low", "_high")] for name in METRICS}
