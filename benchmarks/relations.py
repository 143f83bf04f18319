"""Measure a step of `objectives.miniend` and its relations alone against attention maps and plain autograd, by length.

    python benchmarks/relations.py --shapes pydocs-t5 --lengths 128 256 512 1024

Steps: `ours`; `eager`, both models in plain attention with `output_attentions=True` and the divergence of the last
layers' attention maps (one map a site, where ours compares three relations); `naive`, relations of the same queries,
keys and values by plain autograd, equal in value; `passes`, the passes that ours makes, without relations. Relations
alone, of one site: `naive`, and `checkpointed`, one head at a time and again in the backward pass. Batches hold equally
many tokens at every length; weights are random. Memory is that of one step beyond models and batch.
"""

from __future__ import annotations

from functools import partial

import timing
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import T5Config, T5ForConditionalGeneration

from distill_utils.data import denoising
from distill_utils.device import device, mixed_precision
from distill_utils.distillation import losses, objectives
from distill_utils.experiments.miniend import PATHS, SILENT
from distill_utils.models import students
from distill_utils.training.loop import choose_attention, set_attention

SHAPES = {  # of teacher and student
    "pydocs-t5": {"width": 192, "heads": 4, "layers": 6, "kept": 3, "vocab": 8100},
    "t5-base": {"width": 768, "heads": 12, "layers": 12, "kept": 6, "vocab": 32128},
}
HEADS = 32  # of relations
GOALS = {"eager": 2.0, "passes": 1 / 1.15}  # a step may take 1.15 times its passes
MEMORY_GOAL = 1 / 8  # of the eager step's


def inputs(case: dict):
    """Return student, teacher and one batch of random tokens, without padding."""
    torch.manual_seed(0)
    size, on = SHAPES[case["shape"]], device()
    width, heads = size["width"], size["heads"]
    config = T5Config(
        vocab_size=size["vocab"], d_model=width, d_kv=width // heads, num_heads=heads, d_ff=4 * width, dropout_rate=0.0,
        num_layers=size["layers"], num_decoder_layers=size["layers"], pad_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    with on:  # drawing the weights of each form on a processor would take longer than the steps
        teacher = T5ForConditionalGeneration(config).eval()
        student = students.new_student(teacher, size["kept"], size["kept"]).train()
    for model in (student, teacher):
        choose_attention(model, case["length"])
    target = denoising.span_corruption_lengths(case["length"])[1]
    ids = torch.randint(2, size["vocab"], (case["batch"], case["length"] + target), device=on)
    input_ids, labels = ids.split([case["length"], target], dim=1)
    return student, teacher, {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def terms(path: str) -> list[tuple[str, str]]:
    """Return the site of each of a path's relation terms, and whose tokens its queries, keys and values are of."""
    weights = SILENT | PATHS[path]
    return [found for name, found in objectives.RELATION_TERMS.items() if weights[name.replace("_loss", "_weight")]]


def read_both(path: str, student, teacher, batch):
    """Return queries, keys and values of student and teacher as `miniend` reads them."""
    sites = [site for site, _ in terms(path)]
    read, _ = objectives.forward_with_attention(student, batch, sites, False)
    with objectives.teacher_mode(teacher):
        theirs, _ = objectives.forward_with_attention(teacher, batch, sites, False)
    return read, theirs


def ours(path: str, student, teacher, batch) -> torch.Tensor:
    return objectives.miniend(student, teacher, batch, num_relation_heads=HEADS, **SILENT | PATHS[path])["loss"]


def passes(path: str, student, teacher, batch) -> torch.Tensor:
    read, _ = read_both(path, student, teacher, batch)
    return sum(vector.float().sum() for vectors in read.values() for vector in vectors.values())


def naive(path: str, student, teacher, batch) -> torch.Tensor:
    read, theirs = read_both(path, student, teacher, batch)
    masks = {"s": batch["attention_mask"].bool(), "t": batch["labels"] != objectives.IGNORED}
    found = [
        naive_loss(read[site][name], theirs[site][name], masks[side], HEADS, causal=side == "t")
        for site, sides in terms(path)
        for name, side in zip("qkv", sides, strict=True)
    ]
    return torch.stack(found).mean()


def eager(path: str, student, teacher, batch) -> torch.Tensor:
    names = {"encoder_self": "encoder", "decoder_self": "decoder", "decoder_cross": "cross"}
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    given["decoder_input_ids"] = student.prepare_decoder_input_ids_from_labels(batch["labels"])
    with torch.no_grad():
        theirs = teacher(**given, output_attentions=True, use_cache=False)
    found = student(**given, output_attentions=True, use_cache=False)
    maps = [
        (found[f"{names[site]}_attentions"][-1], theirs[f"{names[site]}_attentions"][-1]) for site, _ in terms(path)
    ]
    return sum(F.kl_div((a + 1e-9).log(), b, reduction="sum") / b.shape[:-1].numel() for a, b in maps) / len(maps)


def scores(x: torch.Tensor, mask: torch.Tensor, heads: int, causal: bool) -> torch.Tensor:
    x = x.float().unflatten(-1, (heads, -1)).transpose(1, 2)  # (batch, heads, length, width of a head)
    hidden = ~mask[:, None, None]
    if causal:
        hidden = hidden | torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=x.device).triu(1)
    with torch.autocast(x.device.type, enabled=False):  # in float32, as ours
        return (x @ x.mT * x.shape[-1] ** -0.5).masked_fill(hidden, losses.MASKED)


def naive_loss(student, teacher, mask, heads: int, causal: bool = False) -> torch.Tensor:
    with torch.no_grad():
        log_p = scores(teacher, mask, heads, causal).log_softmax(-1)
    log_q = scores(student, mask, heads, causal).log_softmax(-1)
    rows = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    return (rows * mask[:, None]).sum() / (heads * mask.sum())


def checkpointed(student, teacher, mask, heads: int) -> torch.Tensor:
    pairs = zip(student.chunk(heads, -1), teacher.chunk(heads, -1), strict=True)
    return sum(checkpoint(naive_loss, a, b, mask, 1, use_reentrant=False) for a, b in pairs) / heads


STEPS = {"ours": ours, "passes": passes, "naive": naive, "eager": eager}
ALONE = {"ours": losses.relation_loss, "naive": naive_loss, "checkpointed": checkpointed}


def whole_step(name: str, case: dict):
    """Return the student and the loss of a MiniEnD step."""
    student, teacher, batch = inputs(case)
    if name == "eager":
        for model in (student, teacher):
            set_attention(model, "eager")
    return list(student.parameters()), partial(STEPS[name], case["path"], student, teacher, batch)


def alone(name: str, case: dict):
    """Return random vectors of one site and the loss of their relations."""
    torch.manual_seed(0)
    size = case["batch"], case["length"], SHAPES[case["shape"]]["width"]
    student, teacher = (torch.randn(size, device=device()) for _ in range(2))
    mask = torch.ones(size[:2], dtype=torch.bool, device=device())
    return [student.requires_grad_()], partial(ALONE[name], student, teacher, mask, HEADS)


def form(build, turns: timing.Turns, case: dict) -> dict:
    """Take value and gradient of what `build` returns."""
    weights, loss_of = build(case)
    return timing.take_gradients(turns, weights, mixed_precision(device())(loss_of))


FORMS = {name: partial(form, partial(whole_step, name)) for name in STEPS}
FORMS |= {f"{name}, alone": partial(form, partial(alone, name)) for name in ALONE}


def main() -> None:
    arguments = timing.parse(
        __doc__, "relations", 5, FORMS,
        shapes={"nargs": "+", "choices": SHAPES, "default": ["pydocs-t5"]},
        lengths={"nargs": "+", "type": int, "default": [128, 512, 1024]},
        tokens={"type": int, "default": 2048, "help": "source tokens of a batch"},
        path={"choices": [name for name in PATHS if terms(name)], "default": "miniend"},
    )  # fmt: skip
    rows = []
    for shape in arguments.shapes:
        for length in arguments.lengths:
            batch = max(1, arguments.tokens // length)
            case = {"shape": shape, "length": length, "batch": batch, "path": arguments.path}
            label = f"{shape}, {case['batch']} x {length}, {timing.dtype_name()}"
            found = timing.in_turns(__file__, FORMS, list(STEPS), case, arguments)
            ceiling = timing.ceiling(arguments)
            rows += timing.rows_of(f"MiniEnD step, {label}", found, goals=GOALS, ceiling=ceiling, **case)
            names = {f"{name}, alone": name for name in ALONE}
            found = timing.in_turns(__file__, FORMS, list(names), case, arguments)
            found = {names[name]: facts for name, facts in found.items()}
            rows += timing.rows_of(f"relations of a site, {label}", found, **case)
            for row in rows:
                if row["other"] == "eager":
                    row["memory_goal"] = MEMORY_GOAL
            timing.write(arguments, rows)  # the longest may not fit the time


if __name__ == "__main__":
    main()
