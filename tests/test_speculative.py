"""Speculative decoding against `generate` with one beam, token by token."""

import pytest
import torch
from test_generation import make_documents
from tiny_models import FAMILIES, tiny_tokenizer

from distill_utils.artifacts import InputError
from distill_utils.evaluation.generation import summarize
from distill_utils.evaluation.speculative import _copied, measure_speculation, summarize_speculatively
from distill_utils.models.students import init_student

OPTIONS = {"max_source_length": 24, "max_new_tokens": 12, "min_length": 0}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("drafts", "drafted"), [("student", 3), ("itself", 1), ("source", 3)])
def test_it_writes_the_teachers_greedy_summaries(family, drafts, drafted):
    teacher, tokenizer = FAMILIES[family](3, 3), tiny_tokenizer()
    student = {"student": init_student(teacher, 3, 1)[0], "itself": init_student(teacher, 3, 3)[0]}.get(drafts)
    texts = make_documents(7, seed=1)
    for batch_size in (1, 4):
        options = OPTIONS | {"batch_size": batch_size}
        expected = summarize(teacher, tokenizer, texts, **options, num_beams=1)
        written, found = summarize_speculatively(teacher, tokenizer, texts, student, drafted, **options)
        assert written == expected and len(set(expected)) > 2
        assert student is None or any(weight.requires_grad for weight in student.get_decoder().parameters())
        assert found["tokens"] >= found["passes"] > 0 and {0} <= set(found["tried"]) <= set(range(drafted))
        assert all(found["accepted"][place] <= found["tried"][place] for place in range(drafted))
        if drafts == "itself":  # its own drafts are all right: a pass a document for every drafted + 1 tokens
            assert found["accepted"] == found["tried"] != {}
            assert batch_size > 1 or found["passes"] <= found["tokens"] // (drafted + 1) + len(texts)


def test_copying_from_the_source_is_accepted_where_the_teacher_copies():
    """A hand-made case: what follows the last two tokens in the source, else the last token again."""
    source = torch.tensor([[5, 6, 7, 8, 5, 6, 9], [5, 5, 5, 6, 7, 2, 0]])
    ids = torch.tensor([[2, 5, 6], [2, 9, 9]])
    assert _copied(ids, source).tolist() == [7, 9]
    assert _copied(torch.tensor([[2], [3]]), source).tolist() == [2, 3]
    assert _copied(torch.tensor([[6, 9], [7, 2]]), source).tolist() == [9, 0]
    assert _copied(torch.tensor([[6, 9]]), torch.tensor([[9, 2]])).tolist() == [9]  # nothing could follow there


def test_a_student_with_another_encoder_or_no_draft_is_rejected():
    teacher, tokenizer = FAMILIES["bart"](2, 2), tiny_tokenizer()
    with pytest.raises(InputError, match="another encoder"):
        summarize_speculatively(teacher, tokenizer, ["a"], init_student(teacher, 1, 2)[0], **OPTIONS)
    with pytest.raises(InputError, match="num_drafted 0"):
        summarize_speculatively(teacher, tokenizer, ["a"], None, 0, **OPTIONS)


def test_measured_rows_count_passes_and_accepted_tokens():
    teacher, tokenizer = FAMILIES["bart"](3, 3), tiny_tokenizer()
    drafters = {"itself": init_student(teacher, 3, 3)[0], "source": None}
    rows = measure_speculation(teacher, tokenizer, make_documents(5), drafters, (1, 5), 2, turns=1, **OPTIONS)
    assert [(row["drafts"], row["batch"]) for row in rows] == [(name, n) for n in (1, 5) for name in drafters]
    assert all(row["equal"] == 100 and row["speedup"] > 0 and len(row["accepted"]) <= 2 for row in rows)
    itself, copied = rows[0], rows[1]
    assert itself["accepted"] == [100, 100] and 2 < itself["tokens_per_pass"] <= 3  # two drafted, one for free
    assert 1 <= copied["tokens_per_pass"] < itself["tokens_per_pass"]
