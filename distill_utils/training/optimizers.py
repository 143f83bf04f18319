"""What a training run is asked to do: its settings, its learning rate, when it stops, and its optimizers."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import _muon
from transformers import Adafactor

from distill_utils.artifacts import InputError, later
from distill_utils.device import amp_dtype
from distill_utils.training.distributed import is_sharded

MUON_RATE = 2.0  # times the learning rate, for updates of root mean square 0.4 of it, an AdamW update's usual size
BF16_PRODUCTS = _muon._zeropower_via_newtonschulz
OPTIMIZERS = ("adamw", "adafactor", "muon")
SCHEDULES = ("linear", "cooldown", "constant")
MIN_VALIDATION = 100  # rows; fewer measure a loss so roughly that chance would choose the best checkpoint


@dataclass(frozen=True)
class Training:
    """What determines one training run besides model, objective and data; it is hashed by `artifacts.hashed`."""

    max_steps: int
    batch_size: int = 32  # examples an optimizer step
    micro_batch_size: int = 0  # examples a forward pass, 0 = batch_size
    optimizer: str = "adamw"  # or "adafactor"; or "muon": inner matrices by Muon, everything else by AdamW
    learning_rate: float = 3e-4  # peak
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    eval_every: int = 0  # steps, 0 = only at the end
    checkpoint_every: int = 0  # steps, 0 = never
    log_every: int = 10  # steps averaged in one history row
    seed: int = 0
    precision: str = "auto"  # "auto" = bf16 where the device has it, or "float32"
    schedule: str = later("linear")  # after the warm-up: one of SCHEDULES
    cooldown_share: float = later(0.15)  # of max_steps, with schedule "cooldown"
    patience: int = later(0)  # evaluations without a lower `stop_metric` until training stops, 0 = it never does
    stop_metric: str = later("validation_ce")  # one of the numbers that `evaluate` returns


def check_training(settings: Training, num_processes: int = 1) -> None:
    """Reject impossible settings before anything is computed."""
    least = dict.fromkeys(("max_steps", "batch_size", "log_every"), 1)
    others = ("micro_batch_size", "warmup_steps", "weight_decay", "eval_every", "checkpoint_every", "patience", "seed")
    for name, value in (least | dict.fromkeys(others, 0)).items():
        if getattr(settings, name) < value:
            raise InputError(f"{name} {getattr(settings, name)} is too small: use at least {value}")
    if settings.micro_batch_size and settings.batch_size % settings.micro_batch_size:
        raise InputError(
            f"micro_batch_size {settings.micro_batch_size} does not divide batch_size {settings.batch_size}: "
            "use one that does"
        )
    for name, usual in (("learning_rate", 0.0003), ("max_grad_norm", 1.0)):
        if not getattr(settings, name) > 0:
            raise InputError(f"{name} {getattr(settings, name)} is not positive: use for example {usual}")
    known_values = {"optimizer": OPTIMIZERS, "precision": ("auto", "float32"), "schedule": SCHEDULES}
    for name, known in known_values.items():
        if getattr(settings, name) not in known:
            raise InputError(f"{name} {getattr(settings, name)!r} is unknown: use {' or '.join(known)}")
    if not 0 < settings.cooldown_share < 1:
        raise InputError(f"cooldown_share {settings.cooldown_share} is impossible: use for example 0.15")
    if (falling := cooldown_steps(settings)) and max(settings.warmup_steps, 1) + falling > settings.max_steps:
        raise InputError(
            f"warmup_steps {settings.warmup_steps} (or one update) and a cooldown of {falling} updates do not fit in "
            f"max_steps {settings.max_steps}: lower warmup_steps or cooldown_share, or raise max_steps"
        )
    if settings.patience and not settings.eval_every:
        raise InputError(f"patience {settings.patience} needs evaluations: set eval_every, or patience to 0")
    name = "micro_batch_size" if settings.micro_batch_size else "batch_size"
    if (rows := getattr(settings, name)) % num_processes:
        raise InputError(f"{num_processes} processes do not divide {name} {rows}: use a multiple of {num_processes}")


def check_metric(settings: Training, metrics: Iterable[str]) -> None:
    """Reject a metric to stop by that is none of these."""
    if settings.stop_metric not in metrics:
        raise InputError(f"stop_metric {settings.stop_metric!r} is unknown: use one of {', '.join(metrics)}")


def check_early_stopping(settings: Training, metrics: tuple[str, ...], num_validation: int) -> None:
    """Reject a metric that is none of what is evaluated, and early stopping by too few rows."""
    check_metric(settings, metrics)
    if settings.patience and num_validation < MIN_VALIDATION:
        raise InputError(
            f"{num_validation} validation rows are too few to stop early by: use at least {MIN_VALIDATION}, "
            "or patience 0"
        )


def make_optimizers(model, parameters: dict[str, torch.nn.Parameter], settings: Training) -> list:
    """Return the optimizers that share the trainable parameters: AdamW alone, or Muon for the layers' matrices as well.

    Adafactor (Shazeer & Stern 2018) is used with the given rate, as the Pegasus recipes do, instead of AdamW.
    Muon (Jordan et al. 2024) orthogonalises a matrix's update; embeddings, the head, norms and biases stay with AdamW.
    """
    weights, inner = list(parameters.values()), set()
    rates = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    # Muon's bf16 products come out differently in parts, and Adafactor sums rows and columns of whole ones.
    if settings.optimizer != "adamw" and any(map(is_sharded, weights)):
        raise InputError(
            f"optimizer {settings.optimizer} needs whole matrices, and processes hold parts: use adamw, or one process"
        )
    if settings.optimizer == "adafactor":
        return [Adafactor(weights, scale_parameter=False, relative_step=False, **rates)]
    if settings.optimizer == "muon":
        inner = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
        outer = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        outer += [model.lm_head] if hasattr(model, "lm_head") else []
        inner -= {id(module.weight) for module in outer}
    matrices = [weight for weight in weights if id(weight) in inner]
    rest = [weight for weight in weights if id(weight) not in inner]
    # The fused update takes sharded and whole tensors, but not together.
    groups = [[weight for weight in rest if is_sharded(weight) == sharded] for sharded in (False, True)]
    found = [torch.optim.AdamW(group, fused=True, **rates) for group in groups if group]
    if not matrices:
        return found
    on = matrices[0].device
    exact = on.type == "cpu" and not amp_dtype(on, settings.precision)
    _muon._zeropower_via_newtonschulz = newton_schulz if exact else BF16_PRODUCTS
    return [*found, torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **rates)]


def newton_schulz(grad: Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float) -> Tensor:
    """Return a nearly orthogonal matrix with the singular vectors of `grad` (Jordan et al. 2024), in its own dtype.

    torch does so in bf16, which a processor without it emulates: 28 times slower for matrices of width 192. With
    precision "float32" a processor that has it makes these products, too.
    """
    a, b, c = ns_coefficients
    tall = grad.size(0) > grad.size(1)
    found = grad.T if tall else grad
    found = found / found.norm().clamp(min=eps)
    if found.size(1) <= 2 * found.size(0):
        for _ in range(ns_steps):
            gram = found @ found.T
            found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
        return found.T if tall else found
    # Each step multiplies by a polynomial of the Gram matrix. Where that is much smaller the steps are made with it
    # alone: two fifths less arithmetic for feed-forward matrices.
    gram = found @ found.T
    factor = whole = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for step in range(ns_steps):
        gram = factor @ gram @ factor if step else gram
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        whole = factor @ whole
    found = whole @ found
    return found.T if tall else found


def learning_rate_at(step: int, settings: Training) -> float:
    """Return the learning rate of a step: linear warm-up to the peak, then what the schedule says.

    "linear" decays to zero, as published; "constant" stays; "cooldown" stays and then, over the last `cooldown_share`
    of the updates, decays to zero (Hägele et al. 2024), so that runs of different length share all but their ends.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "linear":
        left = (settings.max_steps - step) / max(settings.max_steps - settings.warmup_steps, 1)
        return settings.learning_rate * left
    falling = cooldown_steps(settings)
    return settings.learning_rate * min(1.0, (settings.max_steps - step) / falling if falling else 1.0)


def cooldown_steps(settings: Training) -> int:
    """Return over how many updates the learning rate falls at the end."""
    return max(1, round(settings.cooldown_share * settings.max_steps)) if settings.schedule == "cooldown" else 0


def best_row(history: list[dict], settings: Training) -> dict | None:
    """Return the first row with the lowest `stop_metric`; of a cooldown, among those after the learning rate fell."""
    begin = settings.max_steps - cooldown_steps(settings) if settings.schedule == "cooldown" else 0
    evaluated = [row for row in history if settings.stop_metric in row and row["step"] > begin]
    return min(evaluated, key=lambda row: row[settings.stop_metric], default=None)


def stopped_at(history: list[dict], settings: Training) -> int | None:
    """Return the step at which `patience` evaluations in a row were no better than the best, or None.

    No run stops before its warm-up has ended. A function of the history alone: whoever asks later, of a run that went
    on, gets the same step.
    """
    waited, best = 0, float("inf")
    for row in history:
        if settings.stop_metric in row:
            waited = 0 if row[settings.stop_metric] < best else waited + 1
            best = min(best, row[settings.stop_metric])
            if 0 < settings.patience <= waited and row["step"] >= settings.warmup_steps:
                return row["step"]
    return None


def stop_facts(history: list[dict], training: Training) -> dict:
    """Return after how many updates a run stopped and, with patience, where by which metric it was best."""
    facts = {"trained_steps": history[-1]["step"]}
    training = replace(training, max_steps=facts["trained_steps"])  # patience may have brought a cooldown forward
    if training.patience and (best := best_row(history, training)):
        facts |= {"stop_metric": training.stop_metric, "patience": training.patience, "best_step": best["step"]}
    return facts
