"""Measure a whole KD step, forward to optimizer, against the loops that people write: same model, same batch, in turns.

    python benchmarks/kd_step.py --shapes embedded bart-base
    python benchmarks/kd_step.py --shapes bart-large pegasus-large t5-base t5-3b     # one large GPU

Others are written in plain transformers: `published`, the released recipe's form in float32 (both encoders run, all
hidden states are returned, logits of the whole vocabulary), and `expert`, the same under bf16 autocast with the teacher
loaded in bf16. The student keeps the frozen encoder and half or a quarter of the decoder; weights are random, for
nothing is learned here. On a CPU each form runs in a process of its own, so that the growth of its peak is its memory;
on a GPU the allocator knows. `ceiling_share` is arithmetic executed by our step over time, over the measured ceiling.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSeq2SeqLM, BartConfig, PegasusConfig, PreTrainedConfig, T5Config

from distill_utils import artifacts
from distill_utils.device import amp_dtype, device, mixed_precision
from distill_utils.distillation import objectives
from distill_utils.models import students
from distill_utils.models.frozen import frozen_in, share_frozen
from distill_utils.planning.plan import machine_ceilings
from distill_utils.training.loop import Training, choose_attention, make_optimizers, train_mode

# kept: decoder layers of the student; source and target in tokens; batch on a GPU, batch on a CPU.
SHAPES = {
    "embedded": {"kept": 3, "source": 128, "target": 24, "batch": (64, 16)},
    "bart-base": {"kept": 3, "source": 256, "target": 48, "batch": (32, 8)},
    "bart-large": {"kept": 3, "source": 512, "target": 64, "batch": (32, 2)},
    "pegasus-large": {"kept": 4, "source": 512, "target": 64, "batch": (16, 1)},
    "t5-base": {"kept": 3, "source": 512, "target": 114, "batch": (16, 1)},
    "t5-3b": {"kept": 6, "source": 512, "target": 114, "batch": (8, 1)},
}
FORMS = ("ours", "expert", "published")
WEIGHTS = {"ce_weight": 0.2, "kl_weight": 0.8, "hidden_weight": 3.0, "temperature": 2.0}
IGNORED = -100


def resident_peak() -> int:
    """Return the most bytes this process has held; Linux keeps it from before `exec` in getrusage, not here."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])


def shape_config(name: str) -> PreTrainedConfig:
    """Return the config of a teacher: the published sizes, dropout off, which costs every form the same."""
    bart = {"dropout": 0.0, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    t5 = {"dropout_rate": 0.0, "pad_token_id": 0, "decoder_start_token_id": 0, "vocab_size": 32128}

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
        "t5-base": lambda: T5Config(**t5, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12),
        "t5-3b": lambda: T5Config(**t5, d_model=1024, d_kv=128, d_ff=16384, num_layers=24, num_heads=32),
    }[name]()


def build(shape: str, on: torch.device):
    """Return student, teacher and one batch of random tokens; the last eighth of sources and targets is padding."""
    torch.manual_seed(0)
    size, config = SHAPES[shape], shape_config(shape)
    with on:
        teacher = AutoModelForSeq2SeqLM.from_config(config).eval().requires_grad_(False)
    depth = len(students.encoder_layers(teacher))
    student, _, decoder_ids = students.init_student(teacher, depth, size["kept"])
    students.freeze(student, encoder=True, embeddings=True)
    batch = size["batch"][on.type == "cpu"]
    input_ids = torch.randint(3, config.vocab_size, (batch, size["source"]), device=on)
    labels = torch.randint(3, config.vocab_size, (batch, size["target"]), device=on)
    mask = torch.ones_like(input_ids)
    mask[batch // 2 :, size["source"] * 7 // 8 :] = 0
    labels[batch // 2 :, size["target"] * 7 // 8 :] = IGNORED
    input_ids[mask == 0] = config.pad_token_id
    return student.to(on), teacher, decoder_ids, {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def ours(shape: str, on: torch.device):
    """Return the step of `training.loop.fit` with `objectives.kd`."""
    student, teacher, decoder_ids, batch = build(shape, on)
    for model in (student, teacher):
        choose_attention(model, SHAPES[shape]["source"])
    train_mode(student)
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    optimizers = make_optimizers(student, trained, Training(max_steps=10, batch_size=len(batch["labels"])))
    share_frozen(student, teacher)
    frozen = ExitStack()
    frozen.enter_context(frozen_in(amp_dtype(on), student, teacher))

    def step() -> float:
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
        return loss.item()

    step.frozen = frozen  # as long as the step can be called
    return step


def plain_transformers(shape: str, on: torch.device, expert: bool):
    """Return the step as one writes it with `model(..., output_hidden_states=True)`."""
    student, teacher, decoder_ids, batch = build(shape, on)
    dtype = amp_dtype(on) if expert else None
    if dtype:
        teacher.to(dtype)
    for model in (student, teacher):
        model.set_attn_implementation("sdpa" if expert else "eager")
    student.train()
    student.get_encoder().eval()
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, fused=expert)
    t = WEIGHTS["temperature"]

    def step() -> float:
        with mixed_precision(on, dtype):
            with torch.no_grad():
                theirs = teacher(**batch, output_hidden_states=True)
            found = student(**batch, output_hidden_states=True)
            valid = batch["labels"] != IGNORED
            log_p = (found.logits[valid].float() / t).log_softmax(-1)
            kl = F.kl_div(log_p, (theirs.logits[valid].float() / t).softmax(-1), reduction="batchmean") * t**2
            pairs = [(found.decoder_hidden_states[i + 1], theirs.decoder_hidden_states[k + 1])
                     for i, k in enumerate(decoder_ids)]  # fmt: skip
            hidden = torch.stack([
                F.mse_loss(F.layer_norm(a[valid].float(), a.shape[-1:]), F.layer_norm(b[valid].float(), b.shape[-1:]))
                for a, b in pairs
            ]).mean()  # fmt: skip
            loss = WEIGHTS["ce_weight"] * found.loss + WEIGHTS["kl_weight"] * kl + WEIGHTS["hidden_weight"] * hidden
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


STEPS = {
    "ours": ours,
    "expert": partial(plain_transformers, expert=True),
    "published": partial(plain_transformers, expert=False),
}


def measure(shape: str, form: str, steps: int, on: torch.device) -> dict:
    """Return the seconds of `steps` steps after two that warm up, loss, peak memory (MB, models included), arithmetic.

    Memory counts from before the models were built.
    """
    on_cuda = on.type == "cuda"
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_cuda else resident_peak()
    step = STEPS[form](shape, on)
    first = step()
    with FlopCounterMode(display=False) as counter:
        step()
    flops = counter.get_total_flops()
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        if on_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    peak = (torch.cuda.max_memory_allocated() if on_cuda else resident_peak()) - before
    return {"times": times, "first_loss": first, "peak_mb": peak / 1e6, "tflops": flops / 1e12}


def in_own_process(shape: str, form: str, steps: int, arguments) -> dict:
    options = ["--threads", str(arguments.threads), "--one", shape, form, "--steps", str(steps)]
    done = subprocess.run([sys.executable, __file__, *options], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(shape: str, arguments, on: torch.device, ceiling: float) -> list[dict]:
    """Return one row for each other form, ours beside it."""
    found: dict[str, list[dict]] = {form: [] for form in arguments.forms}
    for _ in range(arguments.rounds):
        for form in arguments.forms:
            if on.type == "cpu":
                found[form].append(in_own_process(shape, form, arguments.steps, arguments))
                continue
            try:
                found[form].append(measure(shape, form, arguments.steps, on))
            except torch.OutOfMemoryError as error:  # a result, too
                found[form].append({"times": [], "error": str(error).splitlines()[0]})
            gc.collect()
            torch.cuda.empty_cache()
    times = {form: [t for run in runs for t in run["times"]] for form, runs in found.items()}
    middle = {form: statistics.median(spent) if spent else None for form, spent in times.items()}
    mine = found["ours"][0]
    size = SHAPES[shape]
    facts = {"shape": shape, "source": size["source"], "target": size["target"],
             "batch": size["batch"][on.type == "cpu"], "kept": size["kept"]}  # fmt: skip
    share = mine["tflops"] * 1e12 / (middle["ours"] * ceiling * 1e9) if middle["ours"] else None
    return [
        facts
        | {
            "case": f"KD step, {shape}",
            "other": form,
            "ours_seconds": middle["ours"],
            "other_seconds": middle[form],
            "ratio": middle[form] / middle["ours"] if middle[form] and middle["ours"] else None,
            "ours_spread": spread(times["ours"]),
            "other_spread": spread(times[form]),
            "ours_peak_mb": mine.get("peak_mb"),
            "other_peak_mb": found[form][0].get("peak_mb"),
            "ours_tflop": mine.get("tflops"),
            "other_tflop": found[form][0].get("tflops"),
            "ceiling_share": share,
            "ours_loss": mine.get("first_loss"),
            "other_loss": found[form][0].get("first_loss"),
            "error": found[form][0].get("error"),
        }
        for form in arguments.forms
        if form != "ours"
    ]


def spread(times: list[float]) -> list[float] | None:
    """Return the quartiles of times."""
    return [statistics.quantiles(times, n=4)[i] for i in (0, 2)] if len(times) > 1 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["embedded", "bart-base"])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--rounds", type=int, default=2, help="turns of all forms")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="default: results/kd_step_DEVICE.json")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    on = device()
    if arguments.one:
        print(json.dumps(measure(*arguments.one, arguments.steps, on)))
        return
    load, rows, ceilings = os.getloadavg()[0], [], machine_ceilings()
    ceiling = ceilings["bfloat16"] or ceilings["float32"]
    output = arguments.output or Path(__file__).parent / "results" / f"kd_step_{on.type}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    for shape in arguments.shapes:
        rows += compare(shape, arguments, on, ceiling)
        for row in rows[-len(arguments.forms) + 1 :]:
            print(json.dumps(row), flush=True)
        result = {"ceilings": ceilings, "rows": rows, "load": {"before": load, "after": os.getloadavg()[0]}}
        artifacts.write_json(output, result | {"provenance": artifacts.provenance()})


if __name__ == "__main__":
    main()
