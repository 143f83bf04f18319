"""Evidence on layers against naive rebuilds and float64 formulas, and a search that must find what was planted."""

from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_models import FAMILIES, PAD, tiny_bart, tiny_batch, tiny_tokenizer

from distill_utils import device
from distill_utils.artifacts import InputError
from distill_utils.evaluation import statistics
from distill_utils.experiments import checks
from distill_utils.experiments import layer_selection as selection
from distill_utils.models.students import decoder_layers, encoder_layers, init_student
from distill_utils.training.loop import Training

each_family = pytest.mark.parametrize("family", FAMILIES)
BATCHES = [tiny_batch(), tiny_batch(source_lengths=(4, 8), target_lengths=(5, 2), seed=1, padding=2)]
BASE = selection.runs.StudentRun("sft", "", "x", 8, 8, Training(max_steps=1))


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """Compare in float32, whatever this machine would calculate in."""
    monkeypatch.setattr(device, "amp_dtype", lambda on=None: None)


def naive_loss(model) -> float:
    """Cross-entropy over all reference tokens by the model's own forward pass."""
    with torch.no_grad():
        losses = [model(**batch).loss.item() for batch in BATCHES]
    return float(np.average(losses, weights=[int((batch["labels"] != -100).sum()) for batch in BATCHES]))


def make_useless(layer) -> None:
    """Let a layer return its input: in a pre-norm layer all branches end in an output projection."""
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if "out_proj" in name or name.startswith("fc2"):
                weight.zero_()


@each_family
def test_leave_one_out_equals_rebuilt_students(family):
    teacher = FAMILIES[family](3, 3)
    assert selection.calibration_loss(teacher, BATCHES) == pytest.approx(naive_loss(teacher), rel=1e-5)
    for stack, encoded in (("encoder", None), ("decoder", selection.encode_all(teacher, BATCHES))):
        loss = partial(selection.calibration_loss, batches=BATCHES, encoded=encoded)
        kept = [{f"{stack}_layer_ids": ids} for ids in ([1, 2], [0, 2], [0, 1])]
        shape = (2, 3) if stack == "encoder" else (3, 2)
        expected = [naive_loss(init_student(teacher, *shape, **ids)[0]) for ids in kept]
        assert selection.leave_one_out(teacher, stack, loss) == pytest.approx(expected, rel=1e-5)


def test_all_evidence_and_what_it_cost():
    teacher, texts = tiny_bart(2, 4), ["read the file name", "write a list of values to the path"]
    given = {"tokenizer": tiny_tokenizer(), "documents": texts, "references": texts, "max_source_length": 16}
    rouge2 = partial(selection.greedy_rouge2, max_new_tokens=6, **given)
    assert rouge2(teacher).shape == (2,)  # one value a document
    found = selection.gather_evidence(teacher, BATCHES, rouge2, kept_layers=2, search_budget=100)
    assert found["loss"] == pytest.approx(naive_loss(teacher), rel=1e-5)
    assert [row["stack"] for row in found["rows"]] == ["encoder"] * 2 + ["decoder"] * 4
    cost = {row["evidence"]: (row["candidates"], row["passes"]) for row in found["cost"]}
    # The encoder's two layers run once for all students of three decoder layers, and of two.
    expected = {"search, encoder": (0, 0), "search, decoder": (7, 2 + 4 * 3 + 3 * 2)}
    expected |= {"leave one out, loss, decoder": (4, 4 + 4 * 3), "similarity and CKA": (None, 6)}
    for evidence, (candidates, layers) in expected.items():  # a pass is one batch through as many as the teacher has
        assert cost[evidence] == (candidates, round(layers * len(BATCHES) / 6, 1))

    (run,) = plan = [selection.run_of(BASE, teacher, [0, 1], [0, 1], 0)]
    means = [{"variant": run.variant, **dict.fromkeys(("validation_ce", "rouge2", "rouge2_low", "rouge2_high"), 1.0)}]
    (row,) = selection.judge_maps(teacher, BATCHES, {"first": [0, 1]}, plan, found["rows"], means)
    assert row["loss before"] == pytest.approx(naive_loss(init_student(teacher, 2, 2, None, [0, 1])[0]), rel=1e-5)
    assert row["sum left out"] == pytest.approx(sum(row["loss_change"] for row in found["rows"][4:]))


# -------------------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("stack", selection.STACKS)
def test_search_leaves_planted_layers_out(stack):
    teacher = FAMILIES["pegasus"](5, 5)
    layers = encoder_layers(teacher) if stack == "encoder" else decoder_layers(teacher)
    for i in (1, 3):
        make_useless(layers[i])
    score = lambda m: abs(selection.calibration_loss(m, BATCHES) - naive_loss(teacher))  # noqa: E731
    found = selection.search_layers(teacher, stack, 3, score, max_evaluations=50)
    assert found["layer_ids"] == [0, 2, 4] and found["complete"] and found["evaluations"] == 5 + 4
    assert found["score"] == pytest.approx(0.0, abs=1e-5)
    assert {step["left_out"] for step in found["steps"]} == {1, 3}


@pytest.mark.parametrize("budget", [1, 3, 6, 7, 30])
def test_search_respects_its_budget_and_still_answers(budget):
    teacher, asked = tiny_bart(1, 6), []

    def score(model) -> float:
        ids = model.config.student_init["decoder_layer_ids"]
        asked.append(ids)
        return float(-sum(ids))  # the lowest score keeps the last layers

    found = selection.search_layers(teacher, "decoder", 2, score, budget)
    assert len(asked) == found["evaluations"] <= budget
    assert len(found["layer_ids"]) == 2 and len(found["steps"]) == 4
    assert found["complete"] == (budget >= 6 + 5 + 4 + 3)
    if budget >= 6:  # one whole round is enough to rank the layers here
        assert found["layer_ids"] == [4, 5]
    assert (found["score"] is None) == (budget < 18 and len(found["steps"]) > 1 and found["steps"][-1]["score"] is None)


@pytest.mark.parametrize(("size", "budget", "value"), [(2, 0, "0"), (2, -1, "-1"), (0, 9, "is 0"), (4, 9, "is 4")])
def test_impossible_searches_are_refused_in_one_line(size, budget, value):
    with pytest.raises(InputError, match=value) as error:
        selection.search_layers(tiny_bart(1, 3), "decoder", size, lambda model: 0.0, budget)
    assert "\n" not in str(error.value)


def test_calibration_needs_a_full_batch():
    rows = Dataset.from_dict({"id": ["a"] * 3, "input_ids": [[5, 2], [5, 6, 2], [7, 2]], "labels": [[5, 2]] * 3})
    for batch_size in (0, 4):
        with pytest.raises(InputError, match=f"batches of {batch_size}"):
            selection.calibration_batches(rows, PAD, batch_size, torch.device("cpu"))
    assert len(selection.calibration_batches(rows, PAD, 2, torch.device("cpu"))) == 2


# -------------------------------------------------------------------------------------------------- what layers compute


@each_family
def test_states_are_the_hidden_states_of_the_forward_pass(family):
    teacher = FAMILIES[family](3, 2)
    states = selection.layer_states(teacher, BATCHES)
    assert {stack: len(found) for stack, found in states.items()} == {"encoder": 4, "decoder": 3}
    with torch.no_grad():
        outputs = [teacher(**batch, output_hidden_states=True) for batch in BATCHES]
    for stack in selection.STACKS:
        masks = [b["attention_mask"] == 1 if stack == "encoder" else b["labels"] != -100 for b in BATCHES]
        for i, state in enumerate(states[stack][:-1]):  # the library's last entry may be after a norm
            expected = [o[f"{stack}_hidden_states"][i][m] for o, m in zip(outputs, masks, strict=True)]
            assert torch.allclose(state, torch.cat(expected), atol=1e-5)
    assert len(selection.layer_states(teacher, BATCHES, max_tokens=6)["encoder"][0]) == 6
    assert not encoder_layers(teacher)[0]._forward_pre_hooks


def test_similarity_of_a_layer_that_does_nothing_is_one():
    teacher = FAMILIES["pegasus"](3, 3)
    make_useless(encoder_layers(teacher)[1])
    similarity = statistics.input_output_similarity(selection.layer_states(teacher, BATCHES)["encoder"])
    assert similarity[1] == pytest.approx(1.0, abs=1e-6) and max(similarity[0], similarity[2]) < 0.99


# ---------------------------------------------------------------------------------------------------- what it is worth


def test_maps_are_drawn_and_joined():
    drawn = selection.drawn_maps(6, 3, 5, seed=0)
    assert drawn == selection.drawn_maps(6, 3, 5, seed=0) and len({tuple(ids) for ids in drawn.values()}) == 5
    assert len(selection.drawn_maps(3, 2, 9, seed=0)) == 3
    named = {"published": [0, 2], "spaced": [0, 2], "last": [1, 2], "drawn 1": [0, 1], "drawn 2": [1, 2]}
    assert selection.distinct_maps(named) == {"published = spaced": [0, 2], "last": [1, 2], "drawn 1": [0, 1]}


def test_runs_name_the_layers_of_the_stacks_that_are_cut():
    run = selection.run_of(BASE, tiny_bart(3, 3), [0, 1, 2], [0, 2], seed=4)
    assert (run.shape, run.variant, run.training.seed) == ("3-2", "decoder 0 2", 4)
    assert (run.encoder_layer_ids, run.decoder_layer_ids) == (None, [0, 2])
    assert selection.run_of(BASE, tiny_bart(3, 3), [1], [0, 2], 0).variant == "encoder 1, decoder 0 2"
    checks.check_runs([run], tiny_bart(3, 3))
    with pytest.raises(InputError, match="give 2 different ids from 0 to 1"):
        checks.check_runs([run], tiny_bart(3, 2))


def test_of_one_shape_the_better_student_is_taken_and_not_the_one_that_writes_less():
    teacher = np.random.default_rng(0).uniform(5, 15, 200)
    times = {"6-1": (2.0, 90.0, 9.5), "6-1 from layer 5": (2.0, 50.0, 9.1), "6-3": (3.0, 99.0, 10.0)}
    times |= {"1-1": (1.0, 9.0, 2.0)}
    keys = ("ms_per_token", "latency_ms", "rouge2")
    rows = [{"label": label, **dict(zip(keys, values, strict=True))} for label, values in times.items()]
    scores = {row["label"]: teacher + row["rouge2"] - 10 for row in rows}
    assert selection.student_to_take(rows, scores, 0.9 * teacher, 4.0)["label"] == "6-1"
    assert selection.student_to_take(rows, scores, 0.9 * teacher, 2.1) is None  # the other is no good


def test_verdict_tells_a_win_from_noise():
    searched, other = np.full(60, 9.0), np.full(60, 8.0)
    win = selection.compare("searched", searched, "the published table", other)
    same = selection.compare("searched", searched, "even spacing", searched)
    noise = {**win, "low": -0.5, "high": 2.5}
    known = {"maps": 8, "rho": -0.9, "low": -1.0, "high": -0.5, "p_value": 0.01}
    take = dict.fromkeys(("rouge2", "rouge2_low", "rouge2_high", "ms_per_token", "latency_ms"), 8.0) | {"label": "6-3"}
    take |= {"speedup": 1.5, "share": 0.96, "share_low": 0.9, "share_high": 1.02, "not_worse_5_percent": False}
    text = selection.verdict([0, 1, 5], [win, same], known, [noise], take, 0.9, 300, 1, 60)
    for said in ("beats the published", "same map as even", "cannot be separated", "ranks the maps as", "Take 6-3"):
        assert said in text
    text = selection.verdict([0, 1, 5], [win], {**known, "p_value": 0.2}, [], None, 0.9, 240, 1, 2)
    assert "is not shown to rank" in text and "Take none" in text and "demonstration" in text
    assert "Smoke run" in selection.verdict([0, 1, 5], [win], known, [], None, 0.9, 24, 1, 2)


def test_a_verdict_names_the_usual_rivals_once_and_each_that_is_better():
    rivals = {"the published table": [0], "even spacing": [0], "the first layers": [0], "the last layers": [5]}
    scores = {"the last layers": np.full(60, 9.0)}
    searched, usual = np.full(60, 8.0), np.full(60, 8.0)
    tests = [selection.compare("searched", searched, name, scores.get(name, usual)) for name in rivals]
    named = selection.rivals_to_name(tests, list(rivals.values()))
    assert [test["rival"] for test in named] == ["the published table", "the last layers"]
    named = selection.rivals_to_name(tests, [[0], [1], [0], [0]])  # equal to one that is named
    assert [test["rival"] for test in named] == ["the published table", "even spacing"]


def test_a_row_of_chosen_layers_is_that_of_the_rebuilt_student():
    teacher, kept = tiny_bart(3, 3), {"encoder": [0, 2], "decoder": [1]}
    row = selection.untrained_row(teacher, tiny_tokenizer(), BATCHES, ["read the file name"], kept, max_source_length=9)
    rebuilt, *_ = init_student(teacher, 2, 1, *kept.values())
    assert row["loss"] == pytest.approx(naive_loss(rebuilt), rel=1e-5) and row["ms_per_token"] > 0
    assert row["parameters_m"] == pytest.approx(rebuilt.num_parameters() / 1e6)
