"""Train a larger teacher of the embedded corpus in a given time: does a ranking hold as the teacher grows?

    python benchmarks/larger_teacher.py --width 512 --heads 8 --seconds 180 --output runs/teacher-w512
    python -m distill_utils report 03 --profile h200 -p teacher=runs/teacher-w512

The recipe is that of `pydocs-bart` (experiments/teacher.py) with another width and larger batches. The number of
updates follows from the time of a few, four fifths of the time go to denoising. Made for one GPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from distill_utils.artifacts import read_json, write_json
from distill_utils.data.batches import tokenize_pairs
from distill_utils.data.loading import load_pairs
from distill_utils.device import device
from distill_utils.experiments import teacher
from distill_utils.models import students
from distill_utils.models.loading import load_model, save_model
from distill_utils.training.loop import choose_attention, fit

TRIAL = 30  # updates that are timed, after as many that warm up


def seconds_per_update(batch_size: int) -> float:
    """Return the time of an update of denoising."""
    tokenizer_folder = teacher.train_tokenizer()
    tokenizer = teacher.load_tokenizer(tokenizer_folder)
    tokens = teacher.token_stream("train", tokenizer, tokenizer_folder)
    batches = teacher.infilling_stream(tokens, tokenizer, teacher.WINDOW, batch_size, 0, 0)
    model = teacher.new_model()
    choose_attention(model, teacher.MAX_SOURCE_LENGTH)
    settings = replace(
        teacher.DENOISING, max_steps=2 * TRIAL, batch_size=batch_size, eval_every=0, checkpoint_every=0, log_every=TRIAL
    )
    with tempfile.TemporaryDirectory() as folder:
        history = fit(model, teacher.without_teacher, batches, settings, Path(folder), stage="trial")
    return (history[1]["seconds"] - history[0]["seconds"]) / TRIAL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=6, help="of either stack")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=180.0, help="of training in all")
    parser.add_argument("--output", type=Path, required=True, help="folder of the teacher")
    arguments = parser.parse_args()
    began = time.monotonic()
    # The recipe's shape and schedule are constants of its module; every artifact's name carries them.
    teacher.WIDTH, teacher.HEADS, teacher.LAYERS = arguments.width, arguments.heads, arguments.layers
    teacher.INIT_STD = arguments.width**-0.5
    per_update = seconds_per_update(arguments.batch_size)
    denoising = max(int(0.8 * arguments.seconds / per_update), 20)
    tuning = max(int(0.2 * arguments.seconds / per_update), 20)
    changed = {"batch_size": arguments.batch_size, "checkpoint_every": 0}
    teacher.DENOISING = replace(
        teacher.DENOISING, max_steps=denoising, warmup_steps=min(300, denoising // 10),
        eval_every=max(denoising // 8, 1), **changed,
    )  # fmt: skip
    teacher.FINE_TUNING = replace(
        teacher.FINE_TUNING, max_steps=tuning, warmup_steps=min(100, tuning // 10), eval_every=max(tuning // 4, 1),
        **changed,
    )  # fmt: skip
    print(f"{1000 * per_update:.1f} ms an update: {denoising} of denoising, {tuning} of fine-tuning", flush=True)
    denoised = teacher.denoise()
    tuned = teacher.fine_tune(denoised)
    model, tokenizer = load_model(tuned / "model")
    save_model(model, tokenizer, arguments.output)
    pairs = tokenize_pairs(load_pairs("pydocs", "train"), tokenizer, teacher.MAX_SOURCE_LENGTH, 40)
    facts = {
        "parameters": students.count_parameters(model), "seconds": time.monotonic() - began, "device": device().type,
        "ms_per_update": 1000 * per_update, "pairs": len(pairs),
        "stages": [
            teacher.stage_facts("denoising", denoised, teacher.DENOISING),
            teacher.stage_facts("fine-tuning", tuned, teacher.FINE_TUNING),
        ],
        "provenance": read_json(tuned / "results.json")["provenance"],
    }  # fmt: skip
    write_json(arguments.output / "training.json", facts)
    for folder in (denoised, tuned):
        shutil.copy(folder / "history.csv", arguments.output / f"{folder.name.rpartition('-')[0]}.csv")
    print(json.dumps(facts["stages"]))


if __name__ == "__main__":
    main()
