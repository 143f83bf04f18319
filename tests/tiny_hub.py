"""A hub cache of stand-ins for the models and data sets that profiles name: real depths, heads and vocabularies, tiny
widths, random weights, synthetic text. With HF_HOME at it and no network, hub names load as a user's do.

Out of scope: what models or texts mean; nothing here can be learned.
"""

import hashlib
import json
import random
import string
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import torch
from datasets import Dataset, DatasetInfo
from datasets.splits import SplitDict, SplitInfo
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartTokenizer,
    GenerationConfig,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PegasusTokenizer,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

from distill_utils.evaluation import tasks

WORDS = (
    "a the of and to in on for with by from at as is was has had not will said more one two new old first last year "
    "people police government company court city school club team market bank house water road train plane law film "
    "win lost found made took held given set left right north south man woman child player minister judge doctor book "
    "yes no good bad great poor story music game match goal price rate share cost growth profit report week day war"
).split()  # fmt: skip

# ------------------------------------------------------------------------------------------------------------- models

# Published configs, but for the widths: heads and layers are the real ones, and so are generation settings.
SIZES = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
SIZES |= {"encoder_attention_heads": 16, "decoder_attention_heads": 16}
BART = SIZES | {
    "vocab_size": 50_264, "encoder_layers": 12, "decoder_layers": 12, "max_position_embeddings": 1024,
    "normalize_before": False, "normalize_embedding": True, "add_final_layer_norm": False,
}  # fmt: skip
PEGASUS = SIZES | {
    "vocab_size": 96_103, "encoder_layers": 16, "decoder_layers": 16, "activation_function": "relu",
    "scale_embedding": True, "attention_dropout": 0.1, "activation_dropout": 0.1, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": 0, "decoder_start_token_id": 0, "forced_eos_token_id": 1, "normalize_before": True,
    "normalize_embedding": False, "add_final_layer_norm": True,
}  # fmt: skip
T5 = {
    "vocab_size": 32_128, "d_kv": 8, "d_ff": 64, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip
SHORT = {"no_repeat_ngram_size": 3, "early_stopping": True}
MODELS = {  # name: family, changes of its config, generation settings
    "facebook/bart-large-xsum": ("bart", {}, {"num_beams": 6, "max_length": 62, "min_length": 11, **SHORT}),
    "facebook/bart-large-cnn": (
        "bart", {},
        {"num_beams": 4, "max_length": 142, "min_length": 56, "length_penalty": 2.0, "forced_bos_token_id": 0, **SHORT},
    ),
    "google/pegasus-xsum": (
        "pegasus", {"max_position_embeddings": 512}, {"num_beams": 8, "max_length": 64, "length_penalty": 0.6},
    ),
    "google/pegasus-cnn_dailymail": (
        "pegasus", {"max_position_embeddings": 1024}, {"num_beams": 8, "max_length": 128, "length_penalty": 0.8},
    ),
    "google-t5/t5-small": ("t5", {"d_model": 32, "num_layers": 6, "num_heads": 8}, {}),
    "google-t5/t5-base": ("t5", {"d_model": 48, "num_layers": 12, "num_heads": 12}, {}),
    "google-t5/t5-large": ("t5", {"d_model": 64, "num_layers": 24, "num_heads": 16}, {}),
    "google-t5/t5-3b": ("t5", {"d_model": 64, "num_layers": 24, "num_heads": 32, "d_kv": 16}, {}),
}  # fmt: skip
CLASSES = {
    "bart": (BartConfig, BartForConditionalGeneration, BART),
    "pegasus": (PegasusConfig, PegasusForConditionalGeneration, PEGASUS),
    "t5": (T5Config, T5ForConditionalGeneration, T5),
}


def make_model(name: str) -> PreTrainedModel:
    """Return the stand-in of a hub model."""
    family, changes, generation = MODELS[name]
    config_class, model_class, published = CLASSES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**published | changes))
    special = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_eos_token_id")
    special = {key: value for key in special if (value := getattr(model.config, key, None)) is not None}
    model.generation_config = GenerationConfig(**special | generation)
    return model


def write_model(home: Path, name: str) -> None:
    """Write a model and its tokenizer into a hub cache."""
    model, tokenizer = make_model(name), TOKENIZERS[MODELS[name][0]]()
    if model.config.model_type != "t5":
        write_words(model, tokenizer)
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit(name)
    model.save_pretrained(snapshot)
    tokenizer.save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit(name))


@torch.no_grad()
def write_words(model, tokenizer) -> None:
    """Let a model write words, chosen by their position, and end after a few; an untrained one writes to its limit."""
    decoder, table = model.get_decoder(), model.get_input_embeddings().weight
    positions = decoder.embed_positions.weight
    if positions.requires_grad:
        positions.normal_()  # large beside the tokens, as Pegasus's sines are anyway
    norm = [module for module in decoder.modules() if isinstance(module, torch.nn.LayerNorm)][-1]
    fast = [place + i for place in (0, len(norm.weight) // 2) for i in range(4)]  # sines that differ from word to word
    norm.weight.zero_()
    norm.weight[fast] = 80.0
    words = tokenizer(" ".join(WORDS), add_special_tokens=False)["input_ids"]
    table *= 0.1
    table[words] *= 10
    last = max(10, (model.generation_config.min_length or 0) + 2)
    place = positions[last + getattr(decoder.embed_positions, "offset", 0)]
    table[tokenizer.eos_token_id] = 0.05 * place / place.std()


def commit(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


def bart_tokenizer() -> BartTokenizer:
    """Return one of 50,265 entries, the mask one beyond the model's vocabulary, as published."""
    learned, special = Tokenizer(BPE()), ["<s>", "<pad>", "</s>", "<unk>"]
    learned.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(vocab_size=1000, special_tokens=special, initial_alphabet=sorted(ByteLevel.alphabet()))
    learned.train_from_iterator([" ".join(WORDS)], trainer)
    vocab = learned.get_vocab()
    vocab |= {f"Ġnever{number}": number for number in range(len(vocab), 50_264)} | {"<mask>": 50_264}
    return BartTokenizer(vocab=vocab, merges=[tuple(pair) for pair in json.loads(learned.to_str())["model"]["merges"]])


def pegasus_tokenizer() -> PegasusTokenizer:
    """Return one of 96,103 entries, the reserved ones first, as published."""
    reserved = ["<pad>", "</s>", "<mask_1>", "<mask_2>", *(f"<unk_{number}>" for number in range(2, 103)), "<unk>"]
    return PegasusTokenizer(vocab=pieces([*reserved, "<n>"], 96_103))


def t5_tokenizer() -> T5Tokenizer:
    """Return one of 32,100 entries, the sentinels last; the models' vocabularies are padded beyond, as published."""
    sentinels = [(f"<extra_id_{number}>", 0.0) for number in reversed(range(100))]
    return T5Tokenizer(vocab=[*pieces(["<pad>", "</s>", "<unk>"], 32_000), *sentinels])


def pieces(first: Sequence[str], count: int) -> list[tuple[str, float]]:
    """Return so many pieces of a unigram model and their scores: words, characters, and what no text holds."""
    used = [f"▁{word}" for word in WORDS] + ["▁", *string.ascii_letters, *string.digits, *string.punctuation]
    found = [(piece, 0.0) for piece in first]
    found += [(piece, -2.0 if len(piece) > 1 else -9.0) for piece in dict.fromkeys(used)]
    return found + [(f"▁never{number}", -12.0) for number in range(len(found), count)]


TOKENIZERS = {"bart": bart_tokenizer, "pegasus": pegasus_tokenizer, "t5": t5_tokenizer}

# --------------------------------------------------------------------------------------------------------------- data


def sentence(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=words)).capitalize() + "."


def text(draw: random.Random, sentences: int) -> str:
    return " ".join(sentence(draw, draw.randint(5, 12)) for _ in range(sentences))


def xsum(draw: random.Random) -> dict:
    return {"document": text(draw, 4), "summary": sentence(draw, 8), "id": str(draw.randrange(10**8))}


def cnn_dailymail(draw: random.Random) -> dict:
    highlights = "\n".join(sentence(draw, 6) for _ in range(3))
    return {"article": text(draw, 6), "highlights": highlights, "id": f"{draw.randrange(16**40):040x}"}


def openwebtext(draw: random.Random) -> dict:
    return {"text": "\n\n".join(text(draw, 4) for _ in range(2))}


def glue(task: str, draw: random.Random) -> dict:
    known = tasks.TASKS[task]
    label = round(draw.uniform(0, 5), 2) if task == "stsb" else draw.randrange(len(known.labels))
    return {name: sentence(draw, 8) for name in known.columns} | {"label": label, "idx": draw.randrange(10**6)}


GLUE = {task: ("train", "validation", "test") for task in ("sst2", "mrpc", "stsb", "qqp", "qnli", "rte", "cola")}
GLUE["mnli"] = ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched")
PARTS = ("train", "validation", "test")
DATA = {  # name: configurations and their parts, one row of each
    "EdinburghNLP/xsum": ({"default": PARTS}, lambda _, draw: xsum(draw)),
    "abisee/cnn_dailymail": (dict.fromkeys(("1.0.0", "2.0.0", "3.0.0"), PARTS), lambda _, draw: cnn_dailymail(draw)),
    "Skylion007/openwebtext": ({"plain_text": ("train",)}, lambda _, draw: openwebtext(draw)),
    "nyu-mll/glue": (GLUE, glue),
}
NUM_ROWS = 600  # of a training part; of the others a tenth


def write_data(home: Path, name: str) -> None:
    """Write the stand-in of a hub data set into a cache, as the library keeps what it has downloaded."""
    configurations, make_row = DATA[name]
    owner, short = name.split("/")
    for configuration, parts in configurations.items():
        folder = home / "datasets" / f"{owner}___{short}" / configuration / "0.0.0" / commit(name)
        folder.mkdir(parents=True)
        splits = SplitDict(dataset_name=short)
        for part in parts:
            draw = random.Random(f"{name} {configuration} {part}")
            rows = [make_row(configuration, draw) for _ in range(NUM_ROWS if part == "train" else NUM_ROWS // 10)]
            found = Dataset.from_list(rows)
            with pa.OSFile(str(folder / f"{short}-{part}.arrow"), "wb") as file:
                with pa.ipc.new_stream(file, found.data.table.schema) as stream:
                    stream.write_table(found.data.table)
            splits[part] = SplitInfo(name=part, num_examples=len(rows), dataset_name=short)
        info = DatasetInfo(features=found.features, splits=splits, config_name=configuration, dataset_name=short)
        info.write_to_directory(folder)


def write_hub(home: Path) -> None:
    """Write all stand-ins."""
    for name in MODELS:
        write_model(home, name)
    for name in DATA:
        write_data(home, name)
