"""Measure a whole KD step, forward to optimizer, against the loops that people write: same model, same batch, in turns.

    python benchmarks/kd_step.py --shapes embedded bart-base
    python benchmarks/kd_step.py --shapes bart-large --rounds 3 --output benchmarks/results/kd_step_large.json
    python benchmarks/kd_step.py --shapes bart-large pegasus-large t5-base t5-3b     # one large GPU

Others: `published`, the released recipe's form in plain transformers in float32 (both encoders run, all hidden states,
logits of the whole vocabulary); `expert`, the same under bf16 autocast with fused attention and the teacher in bf16;
`trainer`, `Seq2SeqTrainer` with that loss in `compute_loss`, its teacher in float32; `textbrewer` and `torchdistill`,
the packages with equivalent losses (peers.py). `cached` is our step when a comparison of students has written
what the teacher makes of the rows to disk before, once for all. Without native bf16 all are float32. The student keeps
the frozen encoder and half or a quarter of the decoder; weights are random, for nothing is learned here. Equal losses
show in equal `gradient_norm` of the first step. `ceiling_share` is the arithmetic of our step over its time, over the
ceiling.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import peers
import timing
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import (
    BartConfig,
    PegasusConfig,
    PreTrainedConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)

from distill_utils.device import amp_dtype, device, mixed_precision, to_device
from distill_utils.distillation import objectives
from distill_utils.distillation.teacher_cache import with_states, write_states
from distill_utils.models import students
from distill_utils.models.frozen import frozen_in, own_trained
from distill_utils.models.loading import empty_model
from distill_utils.planning.measure import T5_SIZES, model_config
from distill_utils.training.loop import Training, choose_attention, make_optimizers, set_attention, train_mode

# kept: decoder layers of the student; source and target in tokens; batch on a GPU, batch on a CPU.
SHAPES = {
    "embedded": {"kept": 3, "source": 128, "target": 24, "batch": (64, 16)},
    "bart-base": {"kept": 3, "source": 256, "target": 48, "batch": (32, 8)},
    "bart-large": {"kept": 3, "source": 512, "target": 64, "batch": (32, 2)},
    "pegasus-large": {"kept": 4, "source": 512, "target": 64, "batch": (16, 1)},
    "t5-base": {"kept": 3, "source": 512, "target": 114, "batch": (16, 1)},
    "t5-3b": {"kept": 6, "source": 512, "target": 114, "batch": (8, 1)},
}
WEIGHTS = {"ce_weight": 0.2, "kl_weight": 0.8, "hidden_weight": 3.0, "temperature": 2.0}
IGNORED = -100
# The figures: with native bf16, and what the arithmetic alone gives where all is float32.
GOALS = {
    "bart-base": {"published": (5.0, None), "expert": (2.3, 1.4), "trainer": (2.3, 1.4)},
    "bart-large": {"published": (4.0, None), "expert": (1.6, 1.6), "trainer": (2.0, 1.6)},
}
PACKAGES_GOAL = dict.fromkeys(("textbrewer", "torchdistill"), 2.0)


def shape_config(name: str) -> PreTrainedConfig:
    """Return the config of a teacher: the published sizes, dropout off, which costs every form the same."""
    if name in T5_SIZES:
        config = model_config(name)
        config.dropout_rate = 0.0
        return config
    bart = {"dropout": 0.0, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}

    def sizes(width: int, layers: int, heads: int) -> dict:
        both = {"layers": layers, "attention_heads": heads, "ffn_dim": 4 * width}
        return {"d_model": width} | {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in both.items()}

    return {
        "embedded": lambda: BartConfig(**bart, **sizes(192, 6, 4), vocab_size=8000, max_position_embeddings=128),
        "bart-base": lambda: BartConfig(**bart, **sizes(768, 6, 12), vocab_size=50265),
        "bart-large": lambda: BartConfig(**bart, **sizes(1024, 12, 16), vocab_size=50265),
        "pegasus-large": lambda: PegasusConfig(
            **sizes(1024, 16, 16), vocab_size=96103, dropout=0.0, attention_dropout=0.0, max_position_embeddings=512
        ),
    }[name]()


def build(case: dict, turns: timing.Turns, share_weights: bool = False):
    """Return student, teacher, the layers to match and a batch of random tokens, some of it padding.

    The student is a copy as people make it, or shares what is frozen with its teacher, as ours do.
    """
    torch.manual_seed(0)
    on, size, config = device(), SHAPES[case["shape"]], shape_config(case["shape"])
    teacher = empty_model(config, torch.float32).to_empty(device=on)  # as much memory as from a file, and no more
    teacher.tie_weights()
    teacher.init_weights()
    teacher.eval().requires_grad_(False)
    depth = len(students.encoder_layers(teacher))
    student, _, decoder_ids = students.init_student(teacher, depth, size["kept"], share_weights=share_weights)
    (own_trained if share_weights else students.freeze)(student, encoder=True, embeddings=True)
    batch = case["batch"]
    input_ids = torch.randint(3, config.vocab_size, (batch, size["source"]), device=on)
    labels = torch.randint(3, config.vocab_size, (batch, size["target"]), device=on)
    mask = torch.ones_like(input_ids)
    mask[batch // 2 :, size["source"] * 7 // 8 :] = 0
    labels[batch // 2 :, size["target"] * 7 // 8 :] = IGNORED
    input_ids[mask == 0] = config.pad_token_id
    turns.watch(student.to(on))
    return student, teacher, decoder_ids, {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def ours(turns: timing.Turns, case: dict, cached: bool = False) -> None:
    """Take the steps of `training.loop.fit` with `objectives.kd`; `cached`: the encoder's states are read from disk."""
    on = device()
    student, teacher, decoder_ids, batch = build(case, turns, share_weights=True)
    for model in (student, teacher):
        choose_attention(model, SHAPES[case["shape"]]["source"])
    train_mode(student)
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    optimizers = make_optimizers(student, trained, Training(max_steps=10, batch_size=len(batch["labels"])))
    with ExitStack() as stack:
        batches, idle = (lambda step: [batch]), []
        if cached:  # by the teacher, which then waits on disk
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            batches = states_on_disk(batch, teacher, decoder_ids, folder)
            idle = [teacher.get_encoder(), teacher.get_decoder(), student.get_encoder()]
        stack.enter_context(frozen_in(amp_dtype(on), student, teacher, idle))
        for step in turns:
            batch = to_device(batches(step)[0], on)
            with mixed_precision(on):
                loss = objectives.kd(
                    student, teacher, batch, encoder_layer_ids=[], decoder_layer_ids=decoder_ids, shared_encoder=True,
                    **WEIGHTS,
                )["loss"]  # fmt: skip
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            loss.item()
        del optimizer, optimizers  # as when `fit` has returned, before the originals are read back


def states_on_disk(batch: dict, teacher, decoder_ids: list[int], folder: str):
    """Return `batches(step)` that reads what the teacher makes of the batch from a folder, where it is written once."""
    plain = {name: values.cpu() for name, values in batch.items()} | {"ids": list(range(len(batch["labels"])))}
    lengths = plain["attention_mask"].sum(1).tolist()
    sources = [ids[:length].tolist() for ids, length in zip(plain["input_ids"], lengths, strict=True)]
    targets = [[token for token in row if token != IGNORED] for row in plain["labels"].tolist()]
    rows = Dataset.from_dict({"id": plain["ids"], "input_ids": sources, "labels": targets})
    return with_states(lambda step: [plain], *write_both(Path(folder), teacher, rows, decoder_ids))


def write_both(folder: Path, teacher, rows: Dataset, decoder_ids: list[int]) -> tuple[Path, Path]:
    """Write what the teacher's encoder and decoder make of tokenized rows and return the two folders."""
    encoder, decoder = folder / "encoder", folder / "decoder"
    options = {"pad_token_id": teacher.config.pad_token_id, "dtype": amp_dtype()}
    write_states(encoder, teacher, rows, "encoder", **options)
    write_states(decoder, teacher, rows, "decoder", layer_ids=decoder_ids, encoder=encoder, **options)
    return encoder, decoder


def plain_loss(found, theirs, labels: torch.Tensor, decoder_ids: list[int]) -> torch.Tensor:
    """Return the loss of `objectives.kd` as one writes it from `model(..., output_hidden_states=True)`."""
    valid, t = labels != IGNORED, WEIGHTS["temperature"]
    log_p = (found.logits[valid].float() / t).log_softmax(-1)
    kl = F.kl_div(log_p, (theirs.logits[valid].float() / t).softmax(-1), reduction="batchmean") * t**2
    pairs = [
        (found.decoder_hidden_states[i + 1], theirs.decoder_hidden_states[k + 1]) for i, k in enumerate(decoder_ids)
    ]
    hidden = torch.stack([
        F.mse_loss(F.layer_norm(a[valid].float(), a.shape[-1:]), F.layer_norm(b[valid].float(), b.shape[-1:]))
        for a, b in pairs
    ]).mean()  # fmt: skip
    return WEIGHTS["ce_weight"] * found.loss + WEIGHTS["kl_weight"] * kl + WEIGHTS["hidden_weight"] * hidden


def plain_transformers(turns: timing.Turns, case: dict, expert: bool) -> None:
    """Take the steps as one writes them without a trainer."""
    on = device()
    student, teacher, decoder_ids, batch = build(case, turns)
    dtype = amp_dtype(on) if expert else None
    if dtype:
        teacher.to(dtype)
    for model in (student, teacher):
        set_attention(model, "sdpa" if expert else "eager")
    student.train()
    student.get_encoder().eval()
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, fused=expert)
    for _ in turns:
        with mixed_precision(on, dtype):
            with torch.no_grad():
                theirs = teacher(**batch, output_hidden_states=True)
            found = student(**batch, output_hidden_states=True)
            loss = plain_loss(found, theirs, batch["labels"], decoder_ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()


class DistillationTrainer(Seq2SeqTrainer):
    """What a user writes: the trainer they have, and the loss; the teacher stays as it was loaded."""

    teacher, decoder_ids = None, ()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            theirs = self.teacher(**inputs, output_hidden_states=True)
        found = model(**inputs, output_hidden_states=True)
        loss = plain_loss(found, theirs, inputs["labels"], self.decoder_ids)
        return (loss, found) if return_outputs else loss


class InTurns(TrainerCallback):
    """Begin a turn every `every` steps of a trainer, and stop it after the last."""

    def __init__(self, turns: timing.Turns, every: int = 1):
        self.turns, self.every = turns, every

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0 and next(self.turns, None) is None:
            raise timing.Finished


def training_arguments(folder: str, batch_size: int, **options) -> Seq2SeqTrainingArguments:
    """Return the trainer's arguments, with what a benchmark does not want switched off: files, logs, bars."""
    silent = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    return Seq2SeqTrainingArguments(
        folder, per_device_train_batch_size=batch_size, learning_rate=3e-4, max_grad_norm=1.0,
        bf16=amp_dtype() is not None, use_cpu=device().type == "cpu", **silent, **options,
    )  # fmt: skip


def trainer(turns: timing.Turns, case: dict) -> None:
    """Let `Seq2SeqTrainer.train` take the steps."""
    student, teacher, decoder_ids, batch = build(case, turns)
    size = len(batch["labels"])
    rows = [{name: values[i].cpu() for name, values in batch.items()} for i in range(size)] * 64
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(folder, size, max_steps=10**6, train_sampling_strategy="sequential")
        found = DistillationTrainer(student, arguments, train_dataset=rows, callbacks=[InTurns(turns)])
        found.teacher, found.decoder_ids = teacher, decoder_ids
        try:
            found.train()
        except timing.Finished:
            pass


FORMS = {
    "ours": ours,
    "cached": partial(ours, cached=True),
    "published": partial(plain_transformers, expert=False),
    "expert": partial(plain_transformers, expert=True),
    "trainer": trainer,
    "textbrewer": partial(peers.textbrewer, build, WEIGHTS),
    "torchdistill": partial(peers.torchdistill, build, WEIGHTS),
}


def main() -> None:
    on, small = device(), ["embedded", "bart-base"]
    arguments = timing.parse(
        __doc__, "kd_step", 4, FORMS,
        shapes={"nargs": "+", "choices": SHAPES, "default": small if amp_dtype() is None else [*small, "bart-large"]},
        forms={"nargs": "+", "choices": FORMS, "default": list(FORMS)},
        batch={"type": int, "default": 0, "help": "default: the shape's"},
    )  # fmt: skip
    rows = []
    own = {"ours": "", "cached": ", teacher states read from disk"}
    own = {name: ending for name, ending in own.items() if name in arguments.forms}
    others = [name for name in arguments.forms if name not in own]
    for shape in arguments.shapes:
        size = SHAPES[shape]
        case = {"shape": shape, "batch": arguments.batch or size["batch"][on.type == "cpu"]}
        facts = {name: size[name] for name in ("source", "target", "kept")} | case
        goals = {other: both[amp_dtype() is None] for other, both in GOALS.get(shape, {}).items()} | PACKAGES_GOAL
        for rivals in [others] if arguments.one_process else [[name] for name in others]:  # all may not fit at a time
            found = timing.in_turns(__file__, FORMS, [*own, *rivals], case, arguments, warm_up=1 + (on.type == "cuda"))
            for name, ending in own.items():
                label = f"KD step, {shape}, {timing.dtype_name()}{ending}"
                compared = {each: found[each] for each in (name, *rivals)}
                rows += timing.rows_of(label, compared, name, goals, timing.ceiling(arguments), **facts)
        timing.write(arguments, rows)


if __name__ == "__main__":
    main()
