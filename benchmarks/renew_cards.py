"""Measure the shipped teachers again and write their cards: after the corpus or a pinned package changed.

    python benchmarks/renew_cards.py [--tasks]

Where and how they were trained stays as it is in the cards. The tokenizers are written again without a stored
truncation. Minutes on two cores; with `--tasks` the largest T5 is also fine-tuned on the tasks again, in an hour.
"""

from __future__ import annotations

import sys

from distill_utils.artifacts import read_json
from distill_utils.experiments import t5_teacher, teacher
from distill_utils.models.loading import ASSETS, load_model

if __name__ == "__main__":
    for name in ("pydocs-bart", "pydocs-bart-base", *t5_teacher.SHAPES):
        folder = ASSETS / name
        tokenizer = load_model(name)[1]
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        if name == "pydocs-bart-base":
            continue
        measured = teacher.measure() if name == "pydocs-bart" else t5_teacher.measure(name)
        if name == "pydocs-t5" and "--tasks" in sys.argv:
            measured |= t5_teacher.measure_tasks(name)
        teacher.write_card(folder, read_json(folder / "card.json") | measured)
        print(f"renewed {folder}", flush=True)
