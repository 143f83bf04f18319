"""Models by shipped name, folder or hub name: load and save, safetensors only."""

import contextlib
import copy
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from distill_utils.artifacts import InputError, config_hash, file_hash, folder_atomic, runs_dir

ASSETS = Path(__file__).parent.parent / "assets"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "source.spm")
FAMILIES = ("bart", "mbart", "pegasus", "marian", "t5")  # config.model_type; T5 v1.1 and Flan-T5 are "t5"


def size_t5_cache(config) -> None:
    # `generate` sizes T5's cache by the *encoder's* depth, too small for a deeper decoder (IndexError). It looks for a
    # field `decoder_layers` first, which T5 lacks, so naming the depth there as well fixes it, also after a reload.
    config.decoder_layers = config.num_decoder_layers


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model of a configuration on the meta device: shapes without contents."""
    with torch.device("meta"):
        return AutoModelForSeq2SeqLM.from_config(copy.deepcopy(config), dtype=dtype)


def load_config(name_or_path: str | Path) -> PreTrainedConfig:
    """Return the config of a shipped model, local folder or hub name; its weights need not be there.

    Raises InputError for an unknown name or another architecture.
    """
    folder = model_folder(name_or_path)
    local = (folder / "config.json").exists()
    with _loading_errors(name_or_path, local):
        source = folder if local else name_or_path
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=local)
    if config.model_type not in FAMILIES:
        raise InputError(f"{name_or_path} is a {config.model_type} model: give one of {', '.join(FAMILIES)}")
    return config


def load_model(
    name_or_path: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model in eval mode and its tokenizer, by shipped name ("pydocs-bart"), local folder or hub name.

    Only safetensors are read and no code from outside is run. Raises InputError for an unknown name, a folder without
    weights or tokenizer or with pickle weights only, another architecture, missing weights, or a tokenizer larger than
    the vocabulary.
    """
    source, local = _find_model(name_or_path)
    load_config(name_or_path)  # another family ends here
    with _loading_errors(name_or_path, local):
        model, report = AutoModelForSeq2SeqLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True, trust_remote_code=False,
            local_files_only=local,
        )  # fmt: skip
    tokenizer = load_tokenizer(name_or_path)
    # Sines of positions, which published Pegasus files leave out, are no loss: the class computes them.
    computed = {f"{name}.weight" for name, module in model.named_modules() if hasattr(module, "create_weight")}
    # A file of another depth than its config loads without an error: layers are drawn at random or dropped.
    lost = sorted(set(report["missing_keys"]) - computed) + [
        k for k in report["unexpected_keys"] if re.search(r"\.(layers|block)\.\d", k)
    ]
    if lost:
        raise InputError(f"{name_or_path}: weights and config.json disagree on {len(lost)} weights, such as {lost[0]}")
    _check_tokenizer(str(name_or_path), tokenizer, model.config.vocab_size)
    if model.config.model_type == "t5":
        size_t5_cache(model.config)
    tokenizer.model_writes_bos = _writes_bos(model.eval(), tokenizer)
    return model, tokenizer


@torch.inference_mode()
def _writes_bos(model: PreTrainedModel, tokenizer) -> bool:
    """Tell whether a model's texts begin with the tokenizer's <s>: those of the hub's BART do, the embedded one's not.

    Labels have to agree: a decoder that never saw the token in training writes nonsense after it, and the reverse.
    """
    bos, forced = tokenizer.bos_token_id, model.generation_config.forced_bos_token_id
    if bos is None or tokenizer(text_target="a")["input_ids"][0] != bos:
        return False
    if forced is not None:
        return forced == bos
    start = model.generation_config.decoder_start_token_id
    start = model.config.decoder_start_token_id if start is None else start
    source = torch.tensor([tokenizer("a")["input_ids"]])
    return int(model(input_ids=source, decoder_input_ids=torch.tensor([[start]])).logits.argmax()) == bos


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model alone; raises InputError as `load_model` does."""
    source, local = _find_model(name_or_path)
    with _loading_errors(name_or_path, local):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=local)


@contextlib.contextmanager
def _loading_errors(name_or_path: str | Path, local: bool) -> Iterator[None]:
    """Turn whatever the libraries raise about a model's files into one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        cause = "its files are damaged, incomplete or of another version"
        if not local:
            cause = f"no config, tokenizer or safetensors weights on the hub or in its cache; give {_choices()}"
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"cannot load {name_or_path}: {cause} ({type(error).__name__}: {reason})") from error


def _find_model(name_or_path: str | Path) -> tuple[str, bool]:
    """Return what `from_pretrained` should load and whether it is a local folder, which has all files."""
    folder = model_folder(name_or_path)
    if not folder.is_dir():
        if folder.exists():
            raise InputError(f"{name_or_path} is a file: give the folder with config.json and model.safetensors")
        hub_name = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(name_or_path))
        if not hub_name or (folder.parent != Path() and folder.parent.is_dir()):
            raise InputError(f"no model folder {name_or_path}: give {_choices()}")
        return str(name_or_path), False
    if not (folder / "config.json").exists():
        raise InputError(f"{name_or_path} has no config.json: give the folder that save_pretrained wrote")
    if not any(folder.glob("*.safetensors")):
        if any(any(folder.glob(pattern)) for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt")):
            raise InputError(f"{name_or_path} has pickle weights only, which may run code: save as safetensors first")
        raise InputError(f"{name_or_path} has no weights: put model.safetensors beside config.json")
    if not any((folder / name).exists() for name in TOKENIZER_FILES):  # an empty tokenizer would be made up
        raise InputError(f"{name_or_path} has no tokenizer: save it there as well, with tokenizer.save_pretrained")
    return str(folder), True


def model_folder(name_or_path: str | Path) -> Path:
    """Return the folder of a shipped model, of a trained one by its run's name, or of a local path.

    It need not exist, as for a hub name.
    """
    if str(name_or_path) in shipped_models():
        return ASSETS / name_or_path
    path = Path(name_or_path).expanduser()
    if len(path.parts) == 1 and not path.exists():
        pointer = runs_dir() / "students" / path
        trained = runs_dir() / (pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else path) / "student"
        return trained if (trained / "config.json").is_file() else path
    return path


def shipped_models() -> list[str]:
    """Return the names of the models inside this package."""
    return sorted(path.parent.name for path in ASSETS.glob("*/config.json"))


def _choices() -> str:
    shipped = ", ".join(shipped_models()) or "none yet, run make teachers"
    return f"a shipped model ({shipped}), a trained one, a local folder or a hub name"


def entries_beyond(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """Return how many entries of a tokenizer a model of this vocabulary has no row for.

    Published BART summarizers have a mask token one beyond it, which does not count: no text is tokenized to it.
    """
    return sum(i >= vocab_size and i != tokenizer.mask_token_id for i in tokenizer.get_vocab().values())


def _check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    beyond = entries_beyond(tokenizer, vocab_size)
    if beyond:
        raise InputError(
            f"{name}: the tokenizer has {beyond} entries beyond the model's vocabulary of {vocab_size}; "
            "use the tokenizer that belongs to the model, or resize the model's embeddings and train them"
        )


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write weights (safetensors), config, generation settings and tokenizer; the folder appears whole or not at all.

    A truncation that some call left in the tokenizer is not written: it would cut texts wherever the file is loaded.
    Raises InputError when the tokenizer is larger than the vocabulary or the disk is full.
    """
    _check_tokenizer(str(folder), tokenizer, model.config.vocab_size)
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    with folder_atomic(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def model_fingerprint(name_or_path: str, model) -> str:
    """Return a short hash that changes with a model: of its files when local, of its commit on the hub."""
    folder = model_folder(name_or_path)
    files = sorted(folder.glob("*.safetensors"))
    if files and folder.parent != ASSETS and runs_dir().resolve() not in folder.resolve().parents:
        files += sorted(folder.glob("*.json"))  # a user's own may be edited: how it decodes, its tokens, its dropout
    if files:
        return config_hash([file_hash(file) for file in files])
    with contextlib.suppress(ValueError):  # a path without weights is no hub name
        cached = try_to_load_from_cache(str(name_or_path), "config.json")
        if isinstance(cached, str):
            return Path(cached).parent.name[:10]
    return config_hash(model.config.to_dict())


def check_same_tokenizer(teacher: str, tokenizer, name: str, other) -> None:
    """Reject a second model whose token ids mean something else."""
    if tokenizer.get_vocab() != other.get_vocab():
        raise InputError(f"{name} has another tokenizer than {teacher}: choose two models of one vocabulary")
