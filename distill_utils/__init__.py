"""Compress encoder-decoder language models and measure what it costs; the names below load what they need on use."""

from importlib import import_module

__version__ = "0.1.0"

# What a user of the package calls, by module; torch is imported with the first of them, not with the package.
_PUBLIC = {
    "artifacts": ("InputError", "artifact", "start_notebook"),
    "data.batches": ("batch_list", "pair_stream", "tokenize_pairs"),
    "data.denoising": ("denoising_stream", "pack_text"),
    "data.loading": ("load_classification", "load_pairs", "load_text"),
    "device": ("seed_everything",),
    "distillation.objectives": ("kd", "miniend", "pl_kl", "sft"),
    "evaluation.scoring": ("evaluate_model",),
    "experiments.use": ("summarize",),
    "models.loading": ("load_model", "save_model"),
    "models.students": ("count_parameters", "freeze", "init_student", "layer_map", "new_student"),
    "training.loop": ("Training", "fit"),
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str):
    """Return a public name, importing its module (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """Return the public names, for completion."""
    return sorted(__all__)
