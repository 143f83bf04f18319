"""Measure the shipped teachers again and write their cards: after the corpus or a pinned package changed.

    python benchmarks/renew_cards.py

Where and how they were trained stays as it is in the cards. The tokenizers are written again without a stored
truncation. About 20 minutes on two cores.
"""

from __future__ import annotations

from distill_utils.artifacts import read_json
from distill_utils.experiments import t5_teacher, teacher
from distill_utils.models.loading import ASSETS, load_model

if __name__ == "__main__":
    for name in ("pydocs-bart", "pydocs-bart-base", *t5_teacher.SHAPES):
        folder = ASSETS / name
        tokenizer = load_model(name)[1]
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.save_pretrained(folder)
        if name == "pydocs-bart-base":
            continue
        room = teacher if name == "pydocs-bart" else t5_teacher
        measured = teacher.measure() if room is teacher else t5_teacher.measure(name)
        card = read_json(folder / "card.json")
        trained_on = {"training_corpus": card.get("training_corpus", card["corpus_fingerprint"])}
        teacher.write_card(folder, card | trained_on | measured, room.card_text)
        print(f"renewed {folder}", flush=True)
