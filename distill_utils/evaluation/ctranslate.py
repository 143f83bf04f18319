"""CTranslate2, the fast engine on the CPU: conversion of a saved model, summaries with scores, scores of given texts.

Out of scope: `generate` and what both engines share (generation.py, which knows nothing of this file).

CTranslate2 renormalises over the allowed tokens when a setting forbids some (minimum length, repeated n-grams).
"""

import logging
import shutil
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from transformers import GenerationConfig

from distill_utils import artifacts
from distill_utils.artifacts import InputError
from distill_utils.device import timed
from distill_utils.evaluation import generation
from distill_utils.models.loading import save_model

# What CTranslate2 reads from old configuration files: (normalize_before, normalize_embedding), as the classes compute.
# Marian is left out: the converter takes the start token's embedding for zero, which fine-tuning changes (tied head).
LEGACY_NORM_FIELDS = {"bart": (False, True), "mbart": (True, True), "pegasus": (True, False)}
T5_TYPES = ("t5", "mt5")
# Generation settings that change the output and that CTranslate2 has no counterpart for, with their neutral values.
UNSUPPORTED_SETTINGS = {
    "do_sample": False,
    "bad_words_ids": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "min_new_tokens": 0,
    "penalty_alpha": 0.0,
    "guidance_scale": 1.0,
}


# --------------------------------------------------------------------------------------------------------- conversion


def to_ctranslate2(model_folder: Path | str, output_folder: Path | str, quantization: str = "float32") -> Path:
    """Convert a saved model for CTranslate2, atomically, with its generation settings beside it.

    Fixes what the converter reads from old configuration files: output scaling of T5 v1.1 and Flan (it must follow
    `scale_decoder_outputs`, not the tied embeddings), BART-style norm positions, vocabularies larger than the
    tokenizer, and the decoder's start token. Raises ValueError for what CTranslate2 cannot express.
    """
    model_folder, output_folder = Path(model_folder), Path(output_folder)
    if not (model_folder / "config.json").is_file():
        raise InputError(f"{model_folder} holds no saved model (config.json is missing): give a folder of save_model")
    check_convertible(model_folder)
    converter = _converter(model_folder, quantization)
    with artifacts.folder_atomic(output_folder) as temporary:
        converter.convert(str(temporary), quantization=quantization, force=True)
        read_generation_config(model_folder).save_pretrained(temporary)
    return output_folder


def _converter(model_folder: Path, quantization: str):
    from ctranslate2.converters import TransformersConverter

    class FixedConverter(TransformersConverter):
        def load_model(self, model_class, name, **kwargs):
            if quantization not in ("float16", "bfloat16"):  # these keep a half-precision model at half the memory
                kwargs["dtype"] = torch.float32
            model = model_class.from_pretrained(name, use_safetensors=True, **kwargs)
            config = model.config
            if config.model_type in T5_TYPES:
                config.tie_word_embeddings = bool(getattr(config, "scale_decoder_outputs", config.tie_word_embeddings))
            else:
                config.normalize_before, config.normalize_embedding = LEGACY_NORM_FIELDS[config.model_type]
            self.vocab_size = config.vocab_size
            return model

        def load_tokenizer(self, tokenizer_class, name, **kwargs):
            tokenizer = tokenizer_class.from_pretrained(name, **kwargs)
            tokens = {index: token for token, index in tokenizer.get_vocab().items()}
            complete = {tokens.get(index, f"<unused_{index}>"): index for index in range(self.vocab_size)}
            tokenizer.get_vocab = lambda: complete  # one token a row of the embeddings, no gaps
            self.tokenizer = tokenizer
            return tokenizer

        def _load(self):
            specification = super()._load()
            start = read_generation_config(model_folder).decoder_start_token_id
            if start is None:
                start = artifacts.read_json(model_folder / "config.json").get("decoder_start_token_id")
            specification.config.decoder_start_token = self.tokenizer.convert_ids_to_tokens(start)
            return specification

    return FixedConverter(str(model_folder))


def read_generation_config(model_folder: Path | str) -> GenerationConfig:
    """Read a saved model's generation settings; old checkpoints keep them in config.json."""
    named = (Path(model_folder) / "generation_config.json").is_file()
    name = "generation_config.json" if named else "config.json"
    return GenerationConfig.from_pretrained(model_folder, config_file_name=name)


def check_convertible(model_folder: Path) -> None:
    """Raise ValueError naming the first thing of a saved model that CTranslate2 cannot express."""
    _check(artifacts.read_json(model_folder / "config.json"), read_generation_config(model_folder).to_dict())


def writes_as_generate(model, **decoding) -> bool:
    """Tell whether the engine can stand for `generate` with a model: on the CPU, and by the same rules.

    Greedy summaries are then the same, and beams agree over a corpus: of 300 summaries by four beams 92 to 95 %.
    """
    settings = model.generation_config.to_dict()
    try:
        _check(model.config.to_dict(), settings)
        beams = generation.decoding_settings(model.generation_config, **decoding)["num_beams"]
    except (ValueError, TypeError):  # TypeError: a setting that only `generate` knows
        return False
    start = settings.get("decoder_start_token_id")
    start = model.config.decoder_start_token_id if start is None else start
    once = 1 in (settings.get("no_repeat_ngram_size"), decoding.get("no_repeat_ngram_size"))
    if once or settings.get("repetition_penalty") not in (None, 1.0):
        if start in generation.as_list(settings.get("eos_token_id")):
            return False  # `generate` counts the start token as written, and the end token as its repetition
    return model.device.type == "cpu" and (beams == 1 or settings.get("early_stopping") is True)


def _check(config: dict, settings: dict) -> None:
    kind = config.get("model_type")
    if kind not in (*LEGACY_NORM_FIELDS, *T5_TYPES):
        raise ValueError(f"architecture {kind!r} is not converted to CTranslate2 here: use engine='transformers'")
    heads = config.get("encoder_attention_heads"), config.get("decoder_attention_heads")
    if kind not in T5_TYPES and heads[0] != heads[1]:
        raise ValueError(f"CTranslate2 needs equal attention heads, not {heads}: use engine='transformers'")
    neutral = UNSUPPORTED_SETTINGS.items()
    if found := {name: settings[name] for name, value in neutral if settings.get(name) not in (None, value)}:
        raise ValueError(f"CTranslate2 has no generation setting like {found}: use engine='transformers'")


# ---------------------------------------------------------------------------------------------- summaries and scores


def summarize_ctranslate2(
    folder: Path | str,
    tokenizer,
    documents: Sequence[str],
    *,
    max_source_length: int,
    batch_tokens: int = 2048,
    prefix: str = "",
    num_candidates: int = 1,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    translator=None,
    **decoding: int | float | None,
) -> tuple[list[str], list[float | None]]:
    """Write one summary per document with a model converted by `to_ctranslate2`; return (summaries, scores).

    `decoding` settings (`decoding_settings` knows them) that are not given are the model's own, as in `summarize`;
    forced tokens and the repetition penalty always are. Lengths mean what they mean to `generate`: `max_new_tokens`
    counts a forced first token and the forced end, and `min_length` counts the decoder's start token too. Beam search
    stops early (as `early_stopping=True` does), so beam outputs agree with `generate` over a corpus, not string by
    string. Runs on the CPU. Scores, candidates and empty documents are as in `summarize_with_scores`.

    Args:
        batch_tokens: padded source tokens a batch; beams and sampled candidates multiply the memory.
        temperature: draw tokens at this temperature in place of beams, from the `top_k` likeliest or from the likeliest
            that together reach the probability `top_p` (at that temperature, as `generate` does). The same seed and
            batches draw the same.
        translator: what `load_translator` returned, for a folder that is used more than once.
    """
    import ctranslate2

    settings = GenerationConfig.from_pretrained(folder)
    decoding = generation.decoding_settings(settings, **decoding)
    source_ids = generation.tokenize_documents(tokenizer, documents, max_source_length, prefix)
    first = tokenizer.convert_ids_to_tokens(generation.as_list(settings.forced_bos_token_id))
    sampling = {}
    if temperature is not None:
        ctranslate2.set_random_seed(seed)
        sampling = {"sampling_temperature": temperature, "sampling_topk": top_k or 0, "sampling_topp": top_p or 1.0}
        decoding |= {"num_beams": 1, "length_penalty": 1.0}
    # A forced end takes the last place from the text.
    longest = decoding["max_new_tokens"] - (settings.forced_eos_token_id is not None)
    batches = list(generation.batches_by_length([len(ids) for ids in source_ids], batch_tokens=batch_tokens))
    # A worker draws from a generator of its own, seeded at its first draw: only one alone always gets the same batches.
    translator = translator or load_translator(folder, len(batches), alone=temperature is not None)
    waiting = []
    for chosen in batches:
        futures = translator.translate_batch(
            [tokenizer.convert_ids_to_tokens(source_ids[i]) for i in chosen],
            target_prefix=[first] * len(chosen) if first else None,
            beam_size=decoding["num_beams"],
            num_hypotheses=num_candidates,
            length_penalty=decoding["length_penalty"],
            no_repeat_ngram_size=decoding["no_repeat_ngram_size"],
            repetition_penalty=settings.repetition_penalty or 1.0,
            min_decoding_length=min(max(0, decoding["min_length"] - 1), longest),
            max_decoding_length=longest,
            max_input_length=0,
            return_scores=True,
            return_end_token=True,
            end_token=generation.as_list(settings.eos_token_id) or None,
            asynchronous=True,
            **sampling,
        )
        waiting += zip(chosen, futures, strict=True)
    summaries, scores = [""] * len(documents) * num_candidates, [None] * len(documents) * num_candidates
    for done, (i, future) in enumerate(waiting, start=len(documents) - len(waiting) + 1):
        result = future.result()
        for place, tokens in enumerate(result.hypotheses, start=i * num_candidates):
            summaries[place] = generation.to_text(tokenizer, tokenizer.convert_tokens_to_ids(tokens))
            # The engine divides the sum by length ** penalty, the prefix counted with 0.
            total = result.scores[place - i * num_candidates] * len(tokens) ** decoding["length_penalty"]
            scores[place] = round(total / max(1, len(tokens) - len(first)), 6)
        if progress and (done % 16 == 0 or done == len(documents)):
            progress(done, len(documents))
    return summaries, scores


def load_translator(folder: Path | str, num_batches: int = 1, alone: bool = False):
    """Return the engine of a converted model: up to `num_batches` workers share torch's threads, or one `alone`.

    A worker takes a batch alone. Two of one thread write labels nearly twice as fast as one of two (LOG.md). For a
    single batch it is tried whether all threads are faster than one: where threads wake slowly they are not, and an
    idle team of them doubles the time of torch's own decoding.
    """
    num_threads = torch.get_num_threads()
    workers = 1 if alone else min(max(1, num_batches), num_threads)
    if num_batches > 1 or num_threads == 1:
        return _engine(folder, workers, num_threads // workers)
    end = artifacts.read_json(Path(folder) / "config.json")["eos_token"]
    seconds = {}
    for intra_threads in (num_threads, 1):
        engine = _engine(folder, 1, intra_threads)
        probe = partial(engine.translate_batch, [[end] * 64], beam_size=1, min_decoding_length=8, max_decoding_length=8)
        seconds[intra_threads] = min(timed(probe, torch.device("cpu")) for _ in range(2))
    return engine if seconds[1] <= seconds[num_threads] else _engine(folder, 1, num_threads)


def _engine(folder: Path | str, workers: int, intra_threads: int):
    import ctranslate2

    num_threads = torch.get_num_threads()
    ctranslate2.set_log_level(logging.ERROR)  # that bf16 is computed in float32 where it is emulated is no news
    engine = ctranslate2.Translator(
        str(folder), inter_threads=workers, intra_threads=intra_threads, max_queued_batches=-1
    )
    torch.set_num_threads(num_threads)  # the engine has set those of a worker for this process as well
    return engine


def converted_decoder(model, tokenizer, folder: Path, quantization: str = "int8") -> tuple[Callable, float]:
    """Return a function like `summarize` that decodes by CTranslate2, and the megabytes of its weights.

    One document meets a loaded engine; many get one with as many workers as they need. The folder takes the converted
    model, and the saved one for a while. ValueError for what CTranslate2 cannot express.
    """
    save_model(model, tokenizer, folder / "model")
    converted = to_ctranslate2(folder / "model", folder / quantization, quantization)
    shutil.rmtree(folder / "model")
    loaded = cache(partial(load_translator, converted))

    def decode(documents: Sequence[str], **settings) -> list[str]:
        translator = loaded() if len(documents) == 1 else None
        return summarize_ctranslate2(converted, tokenizer, documents, translator=translator, **settings)[0]

    return decode, (converted / "model.bin").stat().st_size / 2**20


def score_ctranslate2(
    folder: Path | str, source_ids: Sequence[Sequence[int]], target_ids: Sequence[Sequence[int]], tokenizer
) -> list[list[float]]:
    """Return the natural log-probability of every target token given its source; targets end with the end token."""
    source = [tokenizer.convert_ids_to_tokens(list(ids)) for ids in source_ids]
    target = [tokenizer.convert_ids_to_tokens(list(ids[:-1])) for ids in target_ids]  # the engine adds the end token
    results = load_translator(folder, len(source) // 16).score_batch(source, target, max_batch_size=16)
    return [result.log_probs for result in results]
