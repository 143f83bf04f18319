"""Cached teacher targets against the online divergence and plain enumeration."""

import errno
import itertools
from functools import partial

import pytest
import torch
from datasets import Dataset
from test_objectives import gradients
from tiny_models import FAMILIES, PAD, VOCAB_SIZE, tiny_bart, tiny_batch

from distill_utils import device
from distill_utils.artifacts import InputError, read_json
from distill_utils.data.batches import batch_list, pair_stream
from distill_utils.distillation import targets
from distill_utils.distillation.objectives import kd, kd_cached
from distill_utils.models.students import init_student

TOKEN_LOSSES = partial(kd, encoder_layer_ids=[], decoder_layer_ids=[], hidden_weight=0.0)


@pytest.fixture(autouse=True)
def float32_teacher(monkeypatch):
    monkeypatch.setattr(device, "amp_dtype", lambda on=None: None)


def make_rows(count=7):
    batch = tiny_batch(
        source_lengths=[5 + i % 4 for i in range(count)], target_lengths=[2 + i % 5 for i in range(count)]
    )
    columns = {"id": [f"d{i}" for i in range(count)]}
    columns["input_ids"] = [[t for t in row if t != PAD] for row in batch["input_ids"].tolist()]
    columns["labels"] = [[t for t in row if t != -100] for row in batch["labels"].tolist()]
    return Dataset.from_dict(columns)


def write(folder, teacher, rows, **options):
    return targets.write_targets(folder, teacher, rows, pad_token_id=PAD, batch_size=3, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_ids_give_the_online_loss_and_gradients(family, tmp_path):
    teacher, rows = FAMILIES[family](2, 2), make_rows()
    student, _, _ = init_student(teacher, 2, 1)
    write(tmp_path / "all", teacher, rows, top_k=VOCAB_SIZE, temperature=2.0)
    batches = targets.with_targets(pair_stream(rows, PAD, 4, seed=0, micro_batch_size=2), tmp_path / "all")
    for batch in batches(0):
        assert batch["target_ids"].shape == batch["target_probs"].shape == (*batch["labels"].shape, VOCAB_SIZE)
        online = TOKEN_LOSSES(student, teacher, batch)
        expected = gradients(student, online["loss"])
        cached = kd_cached(student, None, batch)
        torch.testing.assert_close(cached, online, rtol=2e-3, atol=2e-3)  # probabilities are kept in float16
        assert list(kd_cached(student, None, batch, ce_weight=0.0)) == ["loss", "kl_loss"]
        for name, gradient in gradients(student, cached["loss"]).items():
            torch.testing.assert_close(gradient, expected[name], rtol=5e-3, atol=5e-3)


def test_fewer_ids_give_a_lower_bound_that_rises_with_their_number(tmp_path):
    teacher, rows = tiny_bart(2, 2), make_rows()
    student, _, _ = init_student(teacher, 2, 1)
    (batch,) = batch_list(rows, PAD, 7)
    exact = TOKEN_LOSSES(student, teacher, batch)
    values, residuals = [], []
    for top_k in (1, 4, 16, 64, VOCAB_SIZE):
        facts = write(tmp_path / str(top_k), teacher, rows, top_k=top_k)
        (cached,) = targets.with_targets(lambda step: [batch], tmp_path / str(top_k))(0)
        values.append(kd_cached(student, None, cached)["kl_loss"].item())
        residuals.append(facts["mean_residual"])
        assert facts["entries_per_token"] == top_k and facts["rows"] == 7
        assert facts["tokens"] == sum(map(len, rows["labels"]))
    assert values == sorted(values) and residuals == sorted(residuals, reverse=True)
    assert 0 < values[0] < 0.9 * values[-1] and values[-1] == pytest.approx(exact["kl_loss"].item(), rel=2e-3)
    assert residuals[0] > 0.01 and residuals[-1] < 1e-6


def test_shares_of_samples_are_unbiased_over_all_draws():
    """Every outcome of three draws from four ids, weighted by its probability, averages to the distribution."""
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    mean = torch.zeros(4, dtype=torch.float64)
    for draws in itertools.product(range(4), repeat=3):
        weight = probs[list(draws)].prod()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "multinomial", lambda *a, draws=draws, **k: torch.tensor([draws]))
            values, ids = targets.choose_targets(probs[None], samples=3)
        assert values.sum() == 3 and values.shape == (1, 3)
        mean.scatter_add_(0, ids[0], weight * values[0] / 3)
    torch.testing.assert_close(mean, probs)


def test_samples_depend_on_the_seed_alone_and_their_shares_add_up(tmp_path):
    teacher, rows = tiny_bart(1, 1), make_rows(3)
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        torch.rand(1)
        facts = write(tmp_path / name, teacher, rows, samples=8, seed=seed)
        assert facts["entries_per_token"] < 8 and 0 < facts["mean_residual"] < 1
    first, again, other = ((tmp_path / name / "ids.bin").read_bytes() for name in ("first", "again", "other"))
    assert first == again != other
    (cached,) = targets.with_targets(lambda step: batch_list(rows, PAD, 3), tmp_path / "first")(0)
    assert cached["target_probs"].sum(-1)[cached["labels"] != -100].sub(1).abs().max() < 1e-6


def test_the_teacher_stays_as_it_was(tmp_path):
    teacher = tiny_bart(1, 1)
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    done = []
    write(tmp_path / "top", teacher, make_rows(), top_k=2, progress=lambda *counts: done.append(counts))
    assert not teacher.training and all(weight.grad is None for weight in teacher.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())
    assert done == [(3, 7), (6, 7), (7, 7)]


def test_large_vocabularies_and_bf16_teachers_are_kept_too(tmp_path, monkeypatch):
    teacher, rows = tiny_bart(1, 1, vocab_size=70_000), make_rows(2)
    monkeypatch.setattr(device, "amp_dtype", lambda on=None: torch.bfloat16)
    with torch.no_grad():
        teacher.final_logits_bias[0, 69_999] = 1000.0
    write(tmp_path / "large", teacher, rows, top_k=1)
    (batch,) = targets.with_targets(lambda step: batch_list(rows, PAD, 2), tmp_path / "large")(0)
    valid = batch["labels"] != -100
    assert (batch["target_ids"][valid] == 69_999).all() and (batch["target_probs"][valid] == 1).all()


def test_rows_of_other_tokens_are_rejected_while_training(tmp_path):
    rows = make_rows(3)
    write(tmp_path / "top", tiny_bart(1, 1), rows, top_k=2)
    attach = partial(targets.with_targets, folder=tmp_path / "top")
    for column in ("input_ids", "labels"):
        cut = rows.map(lambda row, column=column: {column: row[column][1:]})
        with pytest.raises(InputError, match="example d0 has other tokens than the cached targets in top"):
            attach(lambda step, cut=cut: batch_list(cut.select([0]), PAD, 1))(0)
    more = Dataset.from_dict({"id": ["new"], "input_ids": [[5, 2]], "labels": [[6, 2]]})
    with pytest.raises(InputError, match="example new is not among the cached targets in top"):
        attach(lambda step: batch_list(more, PAD, 1))(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": VOCAB_SIZE + 1}, f"top_k {VOCAB_SIZE + 1} is above the vocabulary of {VOCAB_SIZE}"),
        ({"top_k": 0}, "top_k is 0 and samples 0"),
        ({"top_k": 2, "samples": 2}, "top_k is 2 and samples 2"),
        ({"top_k": -1, "samples": 2}, "top_k is -1 and samples 2"),
        ({"samples": 4096}, "samples 4096 is above 2048"),
        ({"top_k": 2, "temperature": 0.0}, "temperature 0.0 is not positive"),
    ],
)
def test_impossible_numbers_are_rejected_before_the_teacher_runs(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(targets, "encode", None)
    with pytest.raises(InputError, match=message):
        write(tmp_path / "top", tiny_bart(1, 1), make_rows(2), **options)
    for rows, problem in (
        (make_rows(2).map(lambda row: {"id": "d"}), "two rows have the same id"),
        (make_rows(2).select([]), "there are no rows"),
    ):
        with pytest.raises(InputError, match=problem):
            write(tmp_path / "top", tiny_bart(1, 1), rows, top_k=2)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_gives_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    write(tmp_path / "top", tiny_bart(1, 1), make_rows(2), top_k=2)

    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(targets, "write_json", fail)
    with pytest.raises(InputError, match="^no space left while writing top: free some disk"):
        write(tmp_path / "top", tiny_bart(1, 1), make_rows(2), top_k=3)
    assert [path.name for path in tmp_path.iterdir()] == ["top"]
    assert read_json(tmp_path / "top" / "settings.json")["top_k"] == 2  # the older ones are still whole
