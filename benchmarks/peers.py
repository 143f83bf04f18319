"""The KD step by other packages, with losses equivalent to ours; `make bench` installs them into benchmarks/.packages.

Both run the whole teacher and the whole student on each batch, as their loops do. TextBrewer's KL is a cross-entropy,
which differs by the teacher's entropy, a constant: its gradient is that of the others.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import timing
import torch
import torch.nn.functional as F

from distill_utils.device import device
from distill_utils.models import students

IGNORED = -100
PACKAGES = Path(__file__).parent / ".packages"


def textbrewer(build: Callable, weights: dict, turns: timing.Turns, case: dict) -> None:
    """Let `GeneralDistiller.train` take the steps."""
    student, teacher, decoder_ids, batch = build(case, turns)
    sys.path.append(str(PACKAGES))
    from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig

    def adaptor(batch: dict, outputs) -> dict:
        valid = batch["labels"] != IGNORED
        hidden = [F.layer_norm(state, state.shape[-1:]) for state in outputs.decoder_hidden_states]
        return {"logits": outputs.logits, "logits_mask": valid, "inputs_mask": valid, "hidden": hidden,
                "losses": outputs.loss}  # fmt: skip

    def batches():
        for _ in turns:
            yield batch
        raise timing.Finished

    match = {"feature": "hidden", "loss": "hidden_mse", "weight": weights["hidden_weight"] / len(decoder_ids)}
    distillation = DistillationConfig(
        temperature=weights["temperature"], kd_loss_weight=weights["kl_weight"] * weights["temperature"] ** 2,
        hard_label_weight=weights["ce_weight"],
        intermediate_matches=[match | {"layer_S": i + 1, "layer_T": k + 1} for i, k in enumerate(decoder_ids)],
    )  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=3e-4)
    logging.getLogger("Distillation").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingConfig(ckpt_steps=10**6, output_dir=folder, device=device().type)
        distiller = GeneralDistiller(training, distillation, teacher, student, adaptor, adaptor)
        try:
            with distiller:
                distiller.train(optimizer, batches(), num_steps=10**6, max_grad_norm=1.0, output_hidden_states=True)
        except timing.Finished:
            pass


def torchdistill(build: Callable, weights: dict, turns: timing.Turns, case: dict) -> None:
    """Take the steps as torchdistill's examples do, with its `DistillationBox`."""
    student, teacher, decoder_ids, batch = build(case, turns)
    sys.path.append(str(PACKAGES))  # after the models were imported: transformers takes torchvision where it sees one
    import_torchvision()
    from torchdistill.core.distillation import DistillationBox
    from torchdistill.losses.mid_level import KDLoss

    class TokenLoss(KDLoss):  # theirs compares along dimension 1, so it wants (tokens, vocabulary)
        def forward(self, student_io: dict, teacher_io: dict, targets) -> torch.Tensor:
            valid = targets != IGNORED
            flat = [{".": {"output": io["."]["output"].logits[valid]}} for io in (student_io, teacher_io)]
            return super().forward(*flat, targets[valid])

    class HiddenLoss(torch.nn.Module):
        def __init__(self, ours: str, theirs: str):
            super().__init__()
            self.ours, self.theirs = ours, theirs

        def forward(self, student_io: dict, teacher_io: dict, targets) -> torch.Tensor:
            found = student_io[self.ours]["output"], teacher_io[self.theirs]["output"]
            states = [(state[0] if isinstance(state, tuple) else state)[targets != IGNORED] for state in found]
            return F.mse_loss(*(F.layer_norm(state, state.shape[-1:]) for state in states))

    names = {id(module): name for name, module in teacher.named_modules()}
    layers = names[id(students.decoder_layers(teacher))]
    pairs = [(f"{layers}.{i}", f"{layers}.{k}") for i, k in enumerate(decoder_ids)]
    kd = TokenLoss(".", "output", ".", "output", weights["temperature"], weights["ce_weight"], weights["kl_weight"])
    terms = {"kd": {"criterion": kd, "weight": 1.0}}
    terms |= {
        f"hidden {ours}": {"criterion": HiddenLoss(ours, theirs), "weight": weights["hidden_weight"] / len(pairs)}
        for ours, theirs in pairs
    }
    by_name = {"forward_proc": "forward_batch_only_as_kwargs"}
    config = {
        "num_epochs": 1,
        "teacher": by_name | {"requires_grad": False, "forward_hook": {"output": [theirs for _, theirs in pairs]}},
        "student": by_name | {"forward_hook": {"output": [ours for ours, _ in pairs]}},
        "optimizer": {"key": "AdamW", "kwargs": {"lr": 3e-4}, "max_grad_norm": 1.0},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }
    box = DistillationBox(teacher, student, {}, config, device(), None, False, 1.0)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    inputs["decoder_input_ids"] = student.prepare_decoder_input_ids_from_labels(batch["labels"])
    box.pre_epoch_process(epoch=0)
    for _ in turns:
        loss = box.forward_process(inputs, batch["labels"], {})
        box.post_forward_process(loss)
        loss.item()


def import_torchvision() -> None:
    """Import torchvision, which torchdistill needs for its data sets of images, beside a torch of any build.

    A wheel for CUDA does not load its operators beside a torch for the CPU, and then cannot be imported at all, because
    it registers shapes of operators that are not there. Nothing here uses them, so they are declared.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
