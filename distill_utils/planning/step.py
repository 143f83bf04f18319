"""One training step from configs alone: its operations, the bytes they move and its peak memory by cause.

Out of scope: the time that takes and whether it fits (plan.py), and steps that really run (measure.py).
"""

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedConfig, PreTrainedModel, masking_utils

from distill_utils.artifacts import InputError
from distill_utils.device import mixed_precision
from distill_utils.distillation import losses
from distill_utils.models import students
from distill_utils.models.loading import empty_model
from distill_utils.training import optimizers
from distill_utils.training.loop import Training, make_optimizers, recompute_activations, set_attention, train_mode
from distill_utils.training.optimizers import OPTIMIZERS

PHASES = ("teacher", "student", "backward", "recomputed", "optimizer")
CAUSES = (
    "teacher weights", "student weights", "weight copies", "gathered layers", "gradients", "optimizer", "activations",
    "logits", "relations", "captured tensors",
)  # fmt: skip
WORK = ("phase", "dtype", "flops", "bytes")  # of one kind of operation

Objective = Callable[[PreTrainedModel, PreTrainedModel | None, dict[str, Tensor]], dict[str, Tensor]]

aten = torch.ops.aten
FORMULAS = flop_registry | {  # torch counts the attention kernels of CUDA only
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
MASKED_BY_CONTENTS = (
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
)  # fmt: skip
RELATION_CODE = (losses._RelationLoss.forward.__code__, losses._RelationLoss.backward.__wrapped__.__code__)


def plan_step(
    objective: Objective,
    student: PreTrainedConfig,
    teacher: PreTrainedConfig | None = None,
    *,
    source_length: int,
    target_length: int,
    batch_size: int,
    micro_batch_size: int = 0,
    optimizer: str = "adamw",
    precision: str = "bfloat16",
    teacher_dtype: str = "bfloat16",
    checkpoint_activations: bool = False,
    attention: str = "sdpa",
    padded: bool = True,
    on: str = "cuda",
    devices: int = 1,
) -> dict:
    """Return floating-point operations, bytes and peak memory of one training step; nothing is loaded or computed.

    The objective itself, the backward pass, clipping and the optimizer run on tensors without contents
    (`FakeTensorMode`), and every storage they would allocate is counted while it lives. Student weights are
    float32, used in bfloat16 by autocast where `precision` says so; the teacher is in eval mode, without gradients, in
    `teacher_dtype`. Positions all count as valid tokens; `padded` says whether the masks are needed, which for T5 is a
    (batch, heads, length, length) bias in each layer.

    One step is `batch_size` examples over all `devices`, `micro_batch_size` (0 = all of a device's) a pass. With
    several, the layers of both models are split as launch.py does by FSDP2: weights, gradients and moments are
    1 / devices of them, embeddings and head are whole everywhere, two of the largest layer at a time are gathered, and
    the student's last layers stay so until the backward pass. Copies that autocast makes of weights are kept whole for
    the backward pass. The result is for one device.

    Planned `on` "cuda" everywhere, a machine without CUDA included: fake tensors are the CPU's, but attention is the
    memory-efficient kernel that CUDA takes where a bias has gradients, and `relation_loss` works in CUDA's chunks. What
    kernels need inside is not counted, nor are the CUDA context (about 0.5 GB) and fragmentation.

    Returns `flops` {"teacher", "student", "backward", "recomputed", "optimizer"}, `memory` {cause: bytes} at the peak,
    `peak_bytes`, `peak_phase`, `parameters`, `tokens` a step, `communication_bytes` that a device sends a step,
    `checkpoint_bytes` on disk, and `work`, what `plan.step_seconds` reads. Raises InputError for what is
    impossible.
    """
    settings = {name: value for name, value in locals().items() if name not in ("objective", "student", "teacher")}
    settings["micro_batch_size"] = micro_batch_size or max(batch_size // max(devices, 1), 1)
    passes = _check_step(settings)
    models = {"student": empty_model(student, torch.float32)}
    if teacher is not None:
        models["teacher"] = empty_model(teacher, getattr(torch, teacher_dtype))
    with FakeTensorMode(allow_non_fake_inputs=True), _as_on(on) as repeated:
        for model in models.values():
            model.to_empty(device="cpu").tie_weights()
        model, frozen = models["student"], models.get("teacher")
        set_attention(model, attention)
        if frozen is not None:
            frozen.eval().requires_grad_(False)
        train_mode(model)
        if checkpoint_activations:
            recompute_activations(model)
        ledger = _Ledger(models, padded, devices, repeated)
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        mixed = "float32" if precision == "float32" else "auto"
        made = make_optimizers(model, trained, Training(max_steps=1, optimizer=optimizer, precision=mixed))
        for weight in trained.values():
            weight.grad = torch.empty_like(weight)
        moments = 0
        for each in made:  # the first update makes the moments that all later ones find
            each.step()
            each.zero_grad()
            for weight, state in each.state.items():
                for value in state.values():
                    if isinstance(value, Tensor):  # Adafactor counts in plain numbers
                        ledger.add(value, "optimizer", weight)
                        moments += value.nbytes
        for weight in trained.values():
            weight.register_post_accumulate_grad_hook(lambda weight: ledger.add(weight.grad, "gradients", weight))
        rows = settings["micro_batch_size"]
        batch = {name: torch.ones(rows, source_length, dtype=torch.long) for name in ("input_ids", "attention_mask")}
        batch["labels"] = torch.ones(rows, target_length, dtype=torch.long)
        for tensor in batch.values():
            ledger.add(tensor, "activations")
        if passes > 1:  # every pass but the first finds gradients
            for weight in trained.values():
                weight.grad = torch.empty_like(weight)
                ledger.add(weight.grad, "gradients", weight)
        with ledger:
            ledger.times = passes
            with mixed_precision(torch.device("cpu"), getattr(torch, precision)):
                loss = objective(model, frozen, batch)["loss"]
            ledger.phase = "backward"
            (loss * 1.0).backward()  # weighted by its tokens, as the loop does
            del loss
            ledger.phase, ledger.times = "optimizer", 1
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            for each in made:
                each.step()
    work = [{**dict(zip(WORK, key, strict=True)), "times": times} for key, times in ledger.work.items()]
    flops = dict.fromkeys(PHASES, 0)
    for row in work:
        flops[row["phase"]] += round(row["flops"] * row["times"])
    return {
        "flops": flops,
        "memory": ledger.at_peak,
        "peak_bytes": round(sum(ledger.at_peak.values())),
        "peak_phase": ledger.peak_phase,
        "parameters": {name: students.count_parameters(model) for name, model in models.items()},
        "tokens": batch_size * (source_length + target_length),
        "communication_bytes": _communication(models, passes, devices),
        "checkpoint_bytes": sum(weight.nbytes for weight in trained.values()) + moments,
        "work": work,
        "settings": settings,
    }


def _check_step(settings: dict) -> int:
    """Return how many passes a step has on a device, or reject the settings."""
    for name in ("source_length", "target_length", "batch_size", "micro_batch_size", "devices"):
        if settings[name] < 1:
            raise InputError(f"{name} {settings[name]} is too small: use at least 1")
    choices = {
        "optimizer": OPTIMIZERS, "precision": ("bfloat16", "float32"), "teacher_dtype": ("bfloat16", "float32"),
        "attention": ("sdpa", "eager"), "on": ("cuda", "cpu"),
    }  # fmt: skip
    for name, known in choices.items():
        if settings[name] not in known:
            raise InputError(f"{name} {settings[name]!r} is unknown: use {' or '.join(known)}")
    if settings["optimizer"] != "adamw" and (devices := settings["devices"]) > 1:
        name = settings["optimizer"]
        raise InputError(f"optimizer {name} needs whole matrices, which {devices} devices split: use adamw")
    rows = settings["micro_batch_size"] * settings["devices"]
    passes, rest = divmod(settings["batch_size"], rows)
    if rest or not passes:
        raise InputError(
            f"batch_size {settings['batch_size']} is not a multiple of {settings['micro_batch_size']} per pass on "
            f"{settings['devices']} devices: use a multiple of {rows}"
        )
    return passes


class _Ledger(TorchDispatchMode):
    """Counts what each operation needs and which storages live, by cause, and remembers the moment of the peak."""

    def __init__(self, models: dict[str, PreTrainedModel], padded: bool, devices: int, repeated: list[float]):
        super().__init__()
        self.padded, self.devices, self.repeated = padded, devices, repeated
        self.phase, self.times, self.inside_teacher = "student", 1, 0
        self.work: Counter[tuple] = Counter()
        self.live: dict[int, tuple] = {}  # storage: weak reference, bytes, cause
        self.totals, self.at_peak, self.peak, self.peak_phase = Counter(), {}, 0, ""
        self.vocabularies = {model.config.vocab_size for model in models.values()}
        self.layered: set[int] = set()  # weights that are spread over the devices
        self.weights: set[int] = set()  # storages of weights
        gathered = 0.0
        for name, model in models.items():
            if devices > 1:
                outer = {id(weight) for weight in students.outer_weights(model)}
                self.layered |= {id(weight) for weight in model.parameters() if id(weight) not in outer}
                stacks = (students.encoder_layers(model), students.decoder_layers(model))
                whole = 2 * max(_bytes_of(layer) for layers in stacks for layer in layers)
                if name == "student":
                    whole += sum(_bytes_of(layers[-1]) for layers in stacks)
                gathered += whole * (1 - 1 / devices)
            for tensor in [*model.parameters(), *model.buffers()]:
                self.add(tensor, f"{name} weights", tensor)
                self.weights.add(tensor.untyped_storage()._cdata)
        if gathered:
            self.totals["gathered layers"] = gathered
        if "teacher" in models:
            self._watch(models["teacher"])

    def _watch(self, teacher: PreTrainedModel) -> None:
        def count(change: int, *_) -> None:
            self.inside_teacher += change

        for part in (teacher.get_encoder(), teacher.get_decoder(), teacher.get_output_embeddings()):
            part.register_forward_pre_hook(partial(count, 1))
            part.register_forward_hook(partial(count, -1), always_call=True)  # a capture may leave by an exception

    def add(self, tensor: Tensor, cause: str, weight: Tensor | None = None) -> None:
        """Count a tensor's storage, once, under a cause; of a weight that is spread over devices only the share."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live:
            self.forget(key)
        share = self.devices if id(weight) in self.layered else 1
        self.live[key] = (weakref.ref(storage, lambda _: self.forget(key)), storage.nbytes() / share, cause)
        self.totals[cause] += storage.nbytes() / share
        total = sum(self.totals.values())
        if total >= self.peak:  # also where only the cause of what lives has changed
            self.peak, self.at_peak, self.peak_phase = total, dict(self.totals), self.phase

    def forget(self, key: int) -> None:
        _, size, cause = self.live.pop(key)
        self.totals[cause] -= size

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function is aten._local_scalar_dense.default:  # a condition on contents: are all positions valid?
            return not self.padded if arguments[0].dtype == torch.bool else 1
        if function is aten.nonzero.default:
            return torch.ones(arguments[0].numel(), arguments[0].ndim, dtype=torch.long)
        if function in MASKED_BY_CONTENTS:
            arguments = (arguments[0], _all_chosen(arguments[1]), *arguments[2:])
        found = function(*arguments, **options)
        given = [x for x in tree_flatten((arguments, options))[0] if isinstance(x, Tensor)]
        made = [x for x in tree_flatten(found)[0] if isinstance(x, Tensor)]
        in_relations = _runs_inside(RELATION_CODE)
        if not function.is_view:
            packet, flops = function._overloadpacket, 0
            if packet in FORMULAS:
                flops = FORMULAS[packet](*arguments, **options, out_val=found)
            moved = sum(x.numel() * x.element_size() for x in [*given, *made])
            dtype = str(made[0].dtype).removeprefix("torch.") if made else "none"
            chunks = self.repeated[0] if in_relations and self.phase == "student" else 1
            self.work[self._phase(), dtype, flops, moved] += self.times * chunks
        if in_relations:
            for tensor in given:
                entry = self.live.get(tensor.untyped_storage()._cdata)
                if entry and entry[2] == "activations" and tensor.is_floating_point():
                    self.add(tensor, "captured tensors")
        for tensor in made:
            if tensor.untyped_storage()._cdata not in self.live:
                self.add(tensor, self._cause(function, tensor, given, in_relations))
        return found

    def _phase(self) -> str:
        if self.inside_teacher and self.phase == "student":
            return "teacher"
        # Within the backward pass only a forward pass that is taken again has gradients on.
        return "recomputed" if self.phase == "backward" and torch.is_grad_enabled() else self.phase

    def _cause(self, function, tensor: Tensor, given: list[Tensor], in_relations: bool) -> str:
        if in_relations:
            return "relations"
        if function is aten._to_copy.default and given[0].untyped_storage()._cdata in self.weights:
            return "weight copies"
        if tensor.ndim and tensor.shape[-1] in self.vocabularies and tensor.is_floating_point():
            return "logits"
        return "activations"


def _all_chosen(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Return indices in which every mask chooses all its positions, so that the shape of the result is known."""
    found = []
    for index in indices:
        is_mask = index is not None and index.dtype == torch.bool
        found += [torch.zeros(index.numel(), dtype=torch.long)] * index.ndim if is_mask else [index]
    return found


def _runs_inside(codes: Sequence) -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code in codes:
            return True
        frame = frame.f_back
    return False


def _bytes_of(module: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def _communication(models: dict[str, PreTrainedModel], passes: int, devices: int) -> float:
    """Return the bytes that a device sends a step.

    Sharded layers are gathered in every forward pass, the student's in the backward pass too; its gradients are added
    up once a step: those of sharded layers by a reduce-scatter, others by an all-reduce, which moves twice as much.
    """
    total = 0.0
    for name, model in models.items():
        layers = _bytes_of(students.encoder_layers(model)) + _bytes_of(students.decoder_layers(model))
        total += passes * layers * (2 if name == "student" else 1)
        if name == "student":
            trained = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
            total += layers + 2 * max(trained - layers, 0)
    return total * (1 - 1 / devices)


@contextmanager
def _as_on(on: str) -> Iterator[list[float]]:
    """Let fake CPU tensors take the ways of the device that is planned for, through one chunk of each relation.

    The list yielded holds how many such chunks the last relation has: hundreds of the same on a CPU.
    """
    repeated = [1.0]

    def first(rows: range, heads: range) -> Iterator[tuple[int, int]]:
        repeated[0] = max(len(rows) and rows.stop / rows.step, 1) * max(len(heads) and heads.stop / heads.step, 1)
        yield from ((i, j) for i in rows[:1] for j in heads[:1])

    with ExitStack() as changes:
        # Masks are left out where nothing is padded, which the library decides by contents, and not while tracing.
        changes.enter_context(patch.object(masking_utils, "is_tracing", lambda *_: False))
        changes.enter_context(patch.object(losses, "itertools", SimpleNamespace(product=first)))
        if on == "cuda":
            changes.enter_context(patch.object(F, "scaled_dot_product_attention", _cuda_attention))
            sizes = {"RELATION_ELEMENTS": losses.CUDA_RELATION_ELEMENTS, "CPU_CHUNK": 2**62, "CPU_ELEMENTS": 2**62}
            changes.enter_context(patch.multiple(losses, **sizes))
            changes.enter_context(patch.object(optimizers, "amp_dtype", lambda *_: torch.bfloat16))  # for Muon
        yield repeated


def _cuda_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Attention as CUDA's memory-efficient kernel does it: scores are never whole, but the bias and its gradient."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    query, key, value = (x.to(dtype) for x in (query, key, value))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=dtype).masked_fill(~attn_mask, float("-inf"))
        attn_mask = attn_mask.to(dtype)
        columns = attn_mask.shape[-1]
        if columns % 16:  # rows of the bias are aligned
            attn_mask = F.pad(attn_mask, (0, 16 - columns % 16))[..., :columns]
        attn_mask = attn_mask.expand(*query.shape[:3], columns)
    keeps_sums = any(x.requires_grad for x in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, keeps_sums, dropout_p, is_causal, scale=scale
    )[0]
