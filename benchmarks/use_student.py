"""Measure what a student gains whoever uses it: `summarize` of its exported folder against its teacher by `generate`.

    python benchmarks/use_student.py --student kd-6-1-s0 --documents 1000

`user` is the embedded teacher as people call it: float32, four beams, documents as they come, batches of 16. `ours` is
`distill_utils.summarize`, which on a CPU reads the folder's CTranslate2 model (int8, or the first type that keeps to
parity); loading it is part of the turn, while the teacher stands ready. Both write as much as they want; `value` is the
ROUGE-2 of it.
"""

import tempfile
from functools import partial
from pathlib import Path

import timing
from pseudo_labels import plain

from distill_utils.data.loading import load_pairs
from distill_utils.device import device
from distill_utils.evaluation.metrics import rouge_scores
from distill_utils.experiments.export import export
from distill_utils.experiments.use import summarize
from distill_utils.models.loading import load_model

LONGEST, GOAL = 128, 8.0  # tokens read of a document, as the student was trained


def form(turns: timing.Turns, case: dict) -> dict:
    """Write summaries of all documents in a turn."""
    pairs = load_pairs("pydocs", "test", case["documents"])
    documents, written = list(pairs["document"]), []
    write = partial(summarize, documents, case["folder"])
    if case["form"] == "user":
        teacher, tokenizer = load_model("pydocs-bart")
        teacher.to(device())
        write = partial(plain, teacher, tokenizer, documents, LONGEST, {}, expert=False)
    for _ in turns:
        written = write()
    return {"value": float(rouge_scores(written, pairs["summary"])["rouge2"].mean())}


def main() -> None:
    forms = {"": form}
    arguments = timing.parse(
        __doc__, "use_student", 3, forms,
        student={"default": "kd-6-1-s0", "help": "a trained student's name or folder"},
        documents={"type": int, "default": 1000},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(export(arguments.student, Path(temporary) / "student"))
        case = {"documents": arguments.documents, "folder": folder}
        found = timing.in_turns(__file__, forms, ["ours", "user"], case, arguments, warm_up=1)
    student = Path(arguments.student).name  # no place on this machine
    label = f"{student} by summarize, {arguments.documents} documents"
    facts = {"student": student, "documents": arguments.documents}
    timing.write(arguments, timing.rows_of(label, found, goals={"user": GOAL}, **facts))


if __name__ == "__main__":
    main()
