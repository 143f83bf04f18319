"""Measure how much faster students write than their teacher: engines, batches and beams, a fixed number of tokens.

    python benchmarks/student.py --shape bart-large --kept 3 6 --batches 1 8 32

The other is always the teacher in transformers in float32. Weights are random: speed does not depend on them. Latency
is that of a batch of 1; `documents_per_second` is throughput. `arithmetic_removed` is the share of the teacher's
floating-point operations that the student does without, counted while transformers decodes: what a speed-up by fewer
layers alone could reach is 1 / (1 - removed).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import timing
import torch
from kd_step import SHAPES, shape_config
from transformers import AutoModelForSeq2SeqLM

from distill_utils.device import amp_dtype, device
from distill_utils.evaluation.ctranslate import load_translator, to_ctranslate2
from distill_utils.models import students
from distill_utils.models.loading import load_model, save_model

GOALS = {("int8", 4): 8.0}  # engine and beams, at BART-large on a CPU


def make(folder: Path, shape: str, kept: list[int], engines: list[str]) -> dict[str, str]:
    """Save the teacher, students of `kept` decoder layers and their converted forms; return {form: folder}."""
    torch.manual_seed(0)
    teacher = AutoModelForSeq2SeqLM.from_config(shape_config(shape)).eval()
    encoder, decoder = len(students.encoder_layers(teacher)), len(students.decoder_layers(teacher))
    models = {f"{encoder}-{decoder}": teacher}
    models |= {f"{encoder}-{layers}": students.init_student(teacher, encoder, layers)[0] for layers in kept}
    tokenizer, places = load_model("pydocs-bart")[1], {}
    for name, model in models.items():
        save_model(model, tokenizer, folder / name)
        for engine in engines:
            if engine.startswith("ct2"):
                to_ctranslate2(folder / name, folder / f"{name} {engine}", engine.removeprefix("ct2 "))
            places[f"{name} {engine}"] = str(folder / (f"{name} {engine}" if engine.startswith("ct2") else name))
    return places


def form(turns: timing.Turns, case: dict) -> dict:
    """Write the same number of tokens for random sources: a lap for each batch size and number of beams."""
    torch.manual_seed(0)
    place, engine, tokens = case["places"][case["form"]], case["form"].partition(" ")[2], case["tokens"]
    vocabulary = len(load_model("pydocs-bart")[1])
    ids = torch.randint(4, vocabulary, (max(case["batches"]), case["source"]))
    if engine.startswith("ct2"):
        translator, words = load_translator(place), load_model("pydocs-bart")[1]
        texts = [words.convert_ids_to_tokens(row) for row in ids.tolist()]
    else:
        dtype = torch.bfloat16 if engine == "bf16" else torch.float32
        model = AutoModelForSeq2SeqLM.from_pretrained(place, dtype=dtype).to(device()).eval()
        ids = ids.to(device())

    def write(batch: int, beams: int) -> None:
        if engine.startswith("ct2"):
            translator.translate_batch(
                texts[:batch], beam_size=beams, min_decoding_length=tokens, max_decoding_length=tokens,
                max_batch_size=0, max_input_length=0,
            )  # fmt: skip
            return
        with torch.inference_mode():
            model.generate(
                ids[:batch], attention_mask=torch.ones_like(ids[:batch]), num_beams=beams, max_new_tokens=tokens,
                min_new_tokens=tokens, do_sample=False,
            )  # fmt: skip

    counted = []
    for _ in turns:
        for batch in case["batches"]:
            for beams in case["beams"]:
                write(batch, beams)
                turns.lap(f"batch {batch}, beam {beams}")
                if turns.begun == turns.warm_up:
                    counted.append((f"batch {batch}, beam {beams}", turns.counter.get_total_flops()))
    before = [0, *(total for _, total in counted)]
    return {"operations": {lap: total - then for (lap, total), then in zip(counted, before, strict=False)}}


FORMS = {"": form}  # by any name: which there are follows from the models made


def main() -> None:
    engines = ["float32"] + (["bf16"] if amp_dtype() is not None else [])
    engines += [] if device().type == "cuda" else ["ct2 float32", "ct2 int8"]
    many = {"nargs": "+", "type": int}
    arguments = timing.parse(
        __doc__, "student", 2, FORMS,
        shape={"choices": SHAPES, "default": "bart-large"}, kept=many | {"default": [3]},
        batches=many | {"default": [1, 8] if amp_dtype() is None else [1, 8, 32]}, beams=many | {"default": [1, 4]},
        source={"type": int, "default": 128}, tokens={"type": int, "default": 16},
    )  # fmt: skip
    sizes = {name: getattr(arguments, name) for name in ("batches", "beams", "source", "tokens")}
    with tempfile.TemporaryDirectory() as folder:
        places = make(Path(folder), arguments.shape, arguments.kept, engines)
        names, case = list(places), {"places": places, **sizes}
        found = timing.in_turns(__file__, FORMS, names, case, arguments, warm_up=1)
    teacher = names[0]
    operations = {name: each.get("operations", {}) for name, each in found.items()}
    rows = []
    for name in names[1:]:
        model, _, engine = name.partition(" ")
        of = {name: found[name], teacher: found[teacher]}
        for row in timing.rows_of(f"{arguments.shape} {name}", of, ours=name):
            lap = row["case"].partition(", ")[2]
            counted = [operations.get(each, {}).get(lap) for each in (f"{model} float32", teacher)]
            batch, beams = (int(part.split()[1]) for part in (lap or "batch 0, beam 0").split(", "))  # none: it failed
            row["goal"] = GOALS.get((engine.removeprefix("ct2 "), beams)) if model == "12-3" else None
            row["arithmetic_removed"] = 1 - counted[0] / counted[1] if all(counted) else None
            row["documents_per_second"] = batch / row["ours_seconds"] if row["ours_seconds"] else None
            rows.append(row | {"source": arguments.source, "tokens": arguments.tokens})
    timing.write(arguments, rows)


if __name__ == "__main__":
    main()
