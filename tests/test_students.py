"""Students of every family against the Hugging Face forward pass, and every error of bad models."""

import copy
import errno
import io
import json
import math
import os
import tempfile
from functools import partial
from itertools import pairwise

import pytest
import test_loading
import torch
from safetensors.torch import load, save_file
from tiny_models import FAMILIES, GENERATION, VOCAB_SIZE, tiny_bart, tiny_batch, tiny_pegasus, tiny_t5, tiny_tokenizer
from tokenizers import Tokenizer
from torch import nn

from distill_utils.artifacts import InputError
from distill_utils.distillation import objectives
from distill_utils.models import loading, students
from distill_utils.models.frozen import frozen_in, own_trained
from distill_utils.models.loading import load_config, load_model, save_model, shipped_models
from distill_utils.models.students import (
    count_parameters,
    decoder_layers,
    encoder_layers,
    freeze,
    has_teacher_encoder,
    init_student,
    layer_map,
    maps,
    project,
    supervision_map,
)

each_family = pytest.mark.parametrize("family", FAMILIES)


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def storages(*models):
    return {weight.data_ptr() for model in models for weight in model.state_dict(keep_vars=True).values()}


def copied(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


# ----------------------------------------------------------------------------------------------------------- layer maps


def test_published_and_named_maps():
    published = {(12, 2): [0, 6], (12, 6): [0, 2, 4, 7, 9, 11], (16, 4): [0, 5, 10, 15], (6, 3): [0, 2, 5], (6, 1): [0]}
    computed = {(24, 1): [0], (24, 3): [0, 12, 23], (24, 6): [0, 5, 9, 14, 18, 23], (12, 5): [0, 3, 6, 8, 11]}
    for (teacher, student), ids in (published | computed).items():
        assert layer_map(teacher, student) == ids
    assert maps(6, 3) == {"published": [0, 2, 5], "spaced": [0, 3, 5], "first": [0, 1, 2], "last": [3, 4, 5]}
    assert maps(24, 1) == {"spaced": [0], "first": [0], "last": [23]}
    supervised = {(12, 3): [3, 7, 11], (6, 1): [5], (24, 4): [5, 11, 17, 23]}
    assert {shape: supervision_map(*shape) for shape in supervised} == supervised


def test_computed_maps_keep_first_and_last_and_are_even():
    for teacher in range(1, 33):
        for student in range(1, teacher + 1):
            ids, supervised = layer_map(teacher, student), supervision_map(teacher, student)
            for values in (ids, supervised):
                assert len(values) == student and values == sorted(set(values))
                assert 0 <= values[0] and values[-1] < teacher
            assert ids[0] == 0 and supervised[-1] == teacher - 1
            if student > 1 and teacher not in (6, 12, 16):
                gaps = {b - a for a, b in pairwise(ids)}
                assert ids[-1] == teacher - 1 and max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("layers", [0, -1, 13, 2.0, True, "3"])
def test_impossible_depths_are_rejected(layers):
    for function in (layer_map, supervision_map, maps):
        with pytest.raises(InputError, match="give 1 to 12"):
            function(12, layers)


# --------------------------------------------------------------------------------------------------------- init_student


@each_family
@pytest.mark.parametrize(("encoder_ids", "decoder_ids"), [([0, 1, 2], [0, 1, 2]), ([0, 2], [1, 2]), ([1], [0, 2, 1])])
def test_student_equals_teacher_with_sliced_layers(family, encoder_ids, decoder_ids):
    teacher, batch = FAMILIES[family](3, 3), tiny_batch()
    sliced = copy.deepcopy(teacher)
    for layers, ids in ((encoder_layers(sliced), encoder_ids), (decoder_layers(sliced), decoder_ids)):
        first, kept = layers[0], [layers[i] for i in ids]
        if family.startswith("t5") and ids[0] != 0:  # the position bias of the whole stack lives in block 0
            ours, theirs = (layer.layer[0].SelfAttention for layer in (kept[0], first))
            ours.relative_attention_bias = theirs.relative_attention_bias
            ours.has_relative_attention_bias, theirs.has_relative_attention_bias = True, False
        stack = sliced.get_encoder() if layers is encoder_layers(sliced) else sliced.get_decoder()
        setattr(stack, "block" if family.startswith("t5") else "layers", nn.ModuleList(kept))
    student, *kept_ids = init_student(teacher, len(encoder_ids), len(decoder_ids), encoder_ids, decoder_ids)
    assert kept_ids == [encoder_ids, decoder_ids]
    assert torch.equal(logits(student, batch), logits(sliced, batch))
    is_whole = encoder_ids == decoder_ids == [0, 1, 2]
    assert torch.allclose(logits(student, batch), logits(teacher, batch), atol=0.1) == is_whole and not student.training
    view, *_ = init_student(teacher, len(encoder_ids), len(decoder_ids), encoder_ids, decoder_ids, share_weights=True)
    assert torch.equal(logits(view, batch), logits(student, batch))
    assert storages(view) <= storages(teacher) and not any(weight.requires_grad for weight in view.parameters())
    assert any(weight.requires_grad for weight in teacher.parameters())


@each_family
@pytest.mark.parametrize(("encoder", "decoder"), [(3, 1), (1, 3), (2, 2)])
def test_cached_generation_equals_uncached(family, encoder, decoder):
    """Stale layer numbers, and T5's cache sized by the encoder, fail or differ here."""
    student, _, _ = init_student(FAMILIES[family](3, 3), encoder, decoder)
    batch = tiny_batch()
    del batch["labels"]
    for beams in (1, 3):
        cached, uncached = (student.generate(**batch, num_beams=beams, use_cache=use) for use in (True, False))
        assert torch.equal(cached, uncached)
        assert cached.shape[1] > 3
    layers = decoder_layers(student)
    numbers = [module.layer_idx for layer in layers for module in layer.modules() if hasattr(module, "layer_idx")]
    assert numbers == [i for i in range(decoder) for _ in range(2)]  # self-attention and cross-attention of each layer


@each_family
def test_teacher_is_neither_changed_nor_shared_and_the_student_has_its_settings_dtype_and_ties(family):
    teacher = FAMILIES[family](3, 3).to(torch.bfloat16)
    teacher.generation_config.forced_bos_token_id = 7
    before, config, generation = copied(teacher), teacher.config.to_dict(), teacher.generation_config.to_dict()
    is_trainable = {name: weight.requires_grad for name, weight in teacher.named_parameters()}
    freeze(teacher)  # a frozen teacher must not make a frozen student
    student, _, _ = init_student(teacher, 3, 1)
    assert not storages(student) & storages(teacher)
    assert {weight.dtype for weight in student.parameters()} == {torch.bfloat16}
    assert student.generation_config.to_dict() == generation
    for model in (teacher, student):
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert (embedding is head) == (family != "t5_v1_1")
        assert model.get_decoder().embed_tokens.weight is embedding
        assert torch.equal(head, teacher.get_output_embeddings().weight)
    assert student.config.student_init["decoder_layer_ids"] == [0]
    assert student.config.student_init["teacher_decoder_layers"] == 3
    assert all(weight.requires_grad == is_trainable[name] for name, weight in student.named_parameters())

    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(1.0)
    student.generation_config.num_beams = 9
    student.config.dropout_rate = student.config.dropout = 0.77
    assert unchanged(teacher, before)
    assert teacher.config.to_dict() == config and teacher.generation_config.to_dict() == generation


@pytest.mark.parametrize(
    ("encoder", "decoder", "encoder_ids", "decoder_ids", "message"),
    [
        (3, 0, None, None, "decoder_layers is 0.*give 1 to 3"),
        (4, 1, None, None, "encoder_layers is 4"),
        (2, 2, [0, 0], None, r"encoder_layer_ids is \[0, 0\]"),
        (3, 2, None, [0, 3], r"decoder_layer_ids is \[0, 3\]"),
        (3, 2, None, [-1, 0], r"decoder_layer_ids is \[-1, 0\]"),
        (3, 2, None, [0], "give 2 different ids"),
        (3, 2, None, [0, 1.0], "give 2 different ids"),
    ],
)
def test_bad_depths_and_ids_are_rejected(encoder, decoder, encoder_ids, decoder_ids, message):
    with pytest.raises(InputError, match=message) as caught:
        init_student(tiny_bart(), encoder, decoder, encoder_ids, decoder_ids)
    assert "\n" not in str(caught.value)


def test_missing_and_foreign_weights_are_rejected():
    lacking, foreign = tiny_bart(), tiny_bart()
    del lacking.model.decoder.layernorm_embedding.weight
    foreign.model.adapter = nn.Linear(2, 2)
    for teacher, name in ((lacking, "model.decoder.layernorm_embedding.weight"), (foreign, "model.adapter.weight")):
        with pytest.raises(InputError, match=name):
            init_student(teacher, 1, 1)


# -------------------------------------------------------------------------------------------------------- save and load


@each_family
def test_round_trip_keeps_logits_generation_and_origin(family, tmp_path):
    student, encoder_ids, decoder_ids = init_student(FAMILIES[family](3, 3), 1, 2)
    save_model(student, tiny_tokenizer(), tmp_path / "student")
    loaded, tokenizer = load_model(tmp_path / "student")
    batch = tiny_batch()
    assert torch.equal(logits(loaded, batch), logits(student, batch))
    assert not loaded.training
    settings = loaded.generation_config.to_dict()
    assert {name: settings[name] for name in GENERATION} == GENERATION
    assert loaded.config.student_init["encoder_layer_ids"] == encoder_ids
    assert loaded.config.student_init["decoder_layer_ids"] == decoder_ids
    sources = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(loaded.generate(**sources), student.generate(**sources))
    again, _, _ = init_student(loaded, 1, 1)  # a student can be a teacher
    assert again.config.student_init["teacher_decoder_layers"] == 2
    assert tokenizer("read the file")["input_ids"] == tiny_tokenizer()("read the file")["input_ids"]
    files = {path.name for path in (tmp_path / "student").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= files
    assert not any(name.endswith((".bin", ".pt", ".tmp")) for name in files)
    for path in (tmp_path / "student").glob("*.json"):
        assert str(tmp_path) not in path.read_text()
    if not family.startswith("t5"):  # what CTranslate2 goes by
        for name in ("normalize_before", "normalize_embedding", "add_final_layer_norm"):
            assert getattr(loaded.config, name) is getattr(student.config, name)


def test_saving_again_replaces_the_folder_and_loading_takes_the_dtype_asked_for(tmp_path):
    for seed in (0, 5):
        save_model(tiny_bart(1, 1, seed=seed).to(torch.bfloat16), tiny_tokenizer(), tmp_path)
        assert not (tmp_path / "stale.txt").exists()
        (tmp_path / "stale.txt").write_text("")
    model = load_model(tmp_path)[0]
    assert model.dtype == torch.float32 and load_model(tmp_path, torch.bfloat16)[0].dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, tiny_bart(1, 1, seed=5).lm_head.weight.bfloat16().float())


@pytest.fixture
def folder(tmp_path):
    save_model(tiny_bart(1, 2), tiny_tokenizer(), tmp_path / "model")
    return tmp_path / "model"


refusal = partial(test_loading.refusal, load_model)


def test_published_pegasus_files_have_no_tables_of_positions(tmp_path):
    model, batch = tiny_pegasus(1, 1), tiny_batch()
    for stack in (model.get_encoder(), model.get_decoder()):
        place = torch.arange(64)[:, None] / 10_000 ** (torch.arange(0, 16, 2) / 16)  # Vaswani et al. 2017, section 3.5
        stack.embed_positions.weight.data = torch.cat([place.sin(), place.cos()], dim=1)
    save_model(model, tiny_tokenizer(), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = {name: weight for name, weight in load(path.read_bytes()).items() if "embed_positions" not in name}
    save_file(weights, path, {"format": "pt"})
    torch.testing.assert_close(load_model(tmp_path / "model")[0](**batch).logits, model(**batch).logits)
    save_file({name: weight for name, weight in weights.items() if "fc1" not in name}, path, {"format": "pt"})
    assert "disagree on 4 weights, such as model.decoder.layers.0.fc1.bias" in refusal(tmp_path / "model")


def test_folder_without_weights_is_rejected(folder):
    (folder / "model.safetensors").unlink()
    assert "has no weights" in refusal(folder)
    torch.save({}, folder / "pytorch_model.bin")
    assert "pickle weights only" in refusal(folder)
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(folder)


def test_damaged_or_incomplete_weights_are_rejected(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    weights = load(whole)  # not load_file: that maps the file, which is overwritten below
    path.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in refusal(folder)
    dropped = "model.decoder.layers.1.fc1.weight"
    save_file({name: weight for name, weight in weights.items() if name != dropped}, path, {"format": "pt"})
    assert dropped in refusal(folder)
    path.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"decoder_layers": 1}))
    assert "disagree" in refusal(folder)  # a shallower config would silently drop a layer
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": VOCAB_SIZE + 1}))
    assert str(folder) in refusal(folder)
    (folder / "config.json").write_text("{")
    assert str(folder) in refusal(folder)


def test_tokenizer_must_fit_the_vocabulary(folder):
    tiny_tokenizer(VOCAB_SIZE + 3).save_pretrained(folder)
    assert f"3 entries beyond the model's vocabulary of {VOCAB_SIZE}" in refusal(folder)
    with pytest.raises(InputError, match="3 entries beyond"):
        save_model(tiny_bart(), tiny_tokenizer(VOCAB_SIZE + 3), folder)
    tokenizer = tiny_tokenizer()  # published BART summarizers: only the mask token lies beyond
    tokenizer.add_special_tokens({"mask_token": "<new mask>"})
    tokenizer.save_pretrained(folder)
    assert load_model(folder)[1].mask_token_id == VOCAB_SIZE
    for path in folder.glob("*token*"):
        path.unlink()
    assert "has no tokenizer" in refusal(folder)


def test_other_architectures_and_unknown_names_are_rejected_and_shipped_models_found(folder, monkeypatch):
    assert load_config("pydocs-t5").d_model == 192
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(loading, "ASSETS", folder.parent)
    assert shipped_models() == ["model"]
    assert load_model("model")[0].config.decoder_layers == 2
    for function in (load_model, load_config):
        message = test_loading.refusal(function, "pydocs-brat")
        assert "pydocs-brat" in message and "shipped model (model)" in message
    assert "no model folder ./nowhere" in refusal("./nowhere")
    assert "no model folder" in refusal(folder / "nowhere")
    assert "is a file" in refusal(folder / "config.json")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    assert "is a bert model: give one of bart, mbart" in refusal(folder)
    (folder / "model.safetensors").unlink()
    tiny_bart().config.save_pretrained(folder)
    assert load_config(folder).decoder_layers == 3  # weights need not be there
    with pytest.raises(InputError, match="is a bart model"):
        students.new_student(tiny_t5(), 1, 1, like=str(folder))


# ---------------------------------------------------------------------------------------------------- parts of a model


@each_family
def test_project_gives_the_models_own_logits(family):
    model, batch = FAMILIES[family](1, 2), tiny_batch()
    seen = []
    model.get_decoder().register_forward_hook(lambda *call: seen.append(call[-1].last_hidden_state))
    expected = logits(model, batch)
    torch.testing.assert_close(project(model, seen[0]), expected)
    flat = seen[0].flatten(0, 1)
    torch.testing.assert_close(project(model, flat), expected.flatten(0, 1))


@each_family
def test_counts_add_up_and_freezing_shows(family):
    model = FAMILIES[family](2, 3)
    counts = count_parameters(model)
    assert counts["total"] == sum(weight.numel() for weight in set(model.parameters()))
    assert counts["encoder"] + counts["decoder"] + counts["embeddings"] == counts["total"]
    layer = sum(weight.numel() for weight in encoder_layers(model)[1].parameters())
    assert counts["encoder"] - count_parameters(init_student(model, 1, 3)[0])["encoder"] == layer
    freeze(model)
    head = VOCAB_SIZE * 16 if family == "t5_v1_1" else 0  # an untied head stays trainable
    assert count_parameters(model)["trainable"] == counts["decoder"] + head
    batch = tiny_batch()
    model(**batch).loss.backward()
    assert all(weight.grad is None for weight in model.get_encoder().parameters())
    assert all(weight.grad is not None for weight in decoder_layers(model).parameters())


def test_freezing_one_part_leaves_the_other_trainable():
    model = tiny_t5()
    freeze(model, embeddings=False)
    assert model.shared.weight.requires_grad
    assert not encoder_layers(model)[0].layer[0].SelfAttention.q.weight.requires_grad
    model = tiny_bart()
    freeze(model, encoder=False)
    assert not model.lm_head.weight.requires_grad and encoder_layers(model)[0].fc1.weight.requires_grad


@each_family
def test_teacher_encoder_is_recognized(family):
    teacher = FAMILIES[family](2, 2)
    student, _, _ = init_student(teacher, 2, 1)
    assert not has_teacher_encoder(student, teacher)  # equal but trainable
    freeze(student)
    assert has_teacher_encoder(student, teacher)
    assert has_teacher_encoder(student, copy.deepcopy(teacher).to(torch.bfloat16))
    with torch.no_grad():
        next(encoder_layers(student)[1].parameters()).add_(0.5)
    assert not has_teacher_encoder(student, teacher)
    smaller, _, _ = init_student(teacher, 1, 1)
    freeze(smaller)
    assert not has_teacher_encoder(smaller, teacher)


# ------------------------------------------------------------------------------------------------- a narrower student


@each_family
def test_new_student_has_the_asked_sizes_and_writes(family):
    teacher = FAMILIES[family]()
    before = copied(teacher)
    student = students.new_student(teacher, 2, 1, teacher.config.d_model // 2)
    config = student.config
    assert (len(encoder_layers(student)), len(decoder_layers(student))) == (2, 1)
    assert student.get_input_embeddings().weight.shape == (teacher.config.vocab_size, teacher.config.d_model // 2)
    inner, whole = (
        {layer.out_features for name, layer in model.named_modules() if name.endswith(("q_proj", ".q"))}
        for model in (student, teacher)
    )
    assert {2 * width for width in inner} == whole and teacher.config.d_model == 2 * config.d_model
    assert config.num_attention_heads * 2 == teacher.config.num_attention_heads
    assert student.generation_config.to_dict() == teacher.generation_config.to_dict()
    assert len(student.generate(tiny_batch()["input_ids"])) == 3
    assert unchanged(teacher, before)


def test_new_student_of_the_teachers_width_shares_nothing_with_it_and_heads_stay_whole():
    teacher = tiny_t5()
    student = students.new_student(teacher, 3, 3)
    ours, theirs = dict(student.named_parameters()), dict(teacher.named_parameters())
    assert ours.keys() == theirs.keys() and all(ours[name].shape == theirs[name].shape for name in ours)
    assert not torch.equal(ours["shared.weight"], theirs["shared.weight"])
    with pytest.raises(InputError, match="width 15 leaves no whole .*give a multiple of"):
        students.new_student(teacher, 2, 2, 15)
    with pytest.raises(InputError, match="decoder_layers is 9"):
        students.new_student(teacher, 2, 9)


@each_family
def test_new_student_begins_near_a_guess_and_keeps_its_head(family, tmp_path):
    """Of unit embeddings and a head scaled by 1 / sqrt(width), or small ones, logits have about unit variance."""
    teacher, batch = FAMILIES[family](2, 2), tiny_batch()
    student = students.new_student(teacher, 1, 1)
    loss = objectives.sft(student, None, batch)["loss"].detach()
    assert abs(float(loss) - math.log(VOCAB_SIZE)) < 1.5
    tied = student.lm_head.weight is student.get_input_embeddings().weight
    assert tied == (family != "t5_v1_1")
    save_model(student, tiny_tokenizer(), tmp_path)
    torch.testing.assert_close(objectives.sft(load_model(tmp_path)[0], None, batch)["loss"], loss)


def test_student_like_another_model_has_its_sizes_and_the_teachers_tokens(tmp_path):
    tiny_t5(4, 4, d_model=24, d_kv=6, num_heads=4, d_ff=20, vocab_size=50).config.save_pretrained(tmp_path)
    made = [students.new_student(tiny_t5(depth, depth), 2, 1, 12, like=str(tmp_path)) for depth in (2, 3)]
    for student in made:
        assert (student.config.d_kv, student.config.num_heads, student.config.d_ff) == (6, 2, 10)
        assert student.config.vocab_size == VOCAB_SIZE and student.config.d_model == 12
        assert student.config.decoder_start_token_id == tiny_t5().config.decoder_start_token_id
        assert len(students.encoder_layers(student)) == 2 and len(students.decoder_layers(student)) == 1
    shapes = [{name: weight.shape for name, weight in student.named_parameters()} for student in made]
    assert shapes[0] == shapes[1]  # one student for teachers of any size


def test_narrowed_embeddings_keep_as_much_of_the_products_as_any_could():
    embeddings = torch.randn(40, 12, generator=torch.Generator().manual_seed(0)).double()
    narrow = students.project_embeddings(embeddings, 5)
    values = torch.linalg.eigvalsh(embeddings @ embeddings.T)  # Eckart and Young: what the best of rank 5 leaves out
    error = (narrow @ narrow.T - embeddings @ embeddings.T).norm()
    assert narrow.shape == (40, 5) and float(error) == pytest.approx(float(values[:-5].norm()))
    assert students.project_embeddings(embeddings, 12) is embeddings


def test_student_starts_from_given_embeddings_of_its_own_size():
    source, student = tiny_t5(d_model=24, vocab_size=VOCAB_SIZE - 8), students.new_student(tiny_t5(), 1, 1, 8)
    before = student.get_input_embeddings().weight.detach().clone()
    students.start_embeddings(student, source)
    own, given = (model.get_input_embeddings().weight.detach() for model in (student, source))
    assert torch.equal(own[VOCAB_SIZE - 8 :], before[VOCAB_SIZE - 8 :])
    products = own[: VOCAB_SIZE - 8] @ own[: VOCAB_SIZE - 8].T
    wanted = students.project_embeddings(given, 8) @ students.project_embeddings(given, 8).T
    assert torch.corrcoef(torch.stack([products.flatten(), wanted.flatten()]))[0, 1] > 0.9999  # but for their size
    assert own[: VOCAB_SIZE - 8].std() == pytest.approx(float(before.std()), rel=1e-4)
    assert student.lm_head.weight is student.get_input_embeddings().weight


def test_embeddings_of_another_tokenizer_or_of_too_few_dimensions_are_rejected(tmp_path):
    swapped = tiny_tokenizer()
    content = json.loads(swapped.backend_tokenizer.to_str())
    words = content["model"]["vocab"]
    words["word0"], words["word1"] = words["word1"], words["word0"]  # as many entries, other rows
    swapped._tokenizer = Tokenizer.from_str(json.dumps(content))
    for name, tokenizer in (("teacher", tiny_tokenizer()), ("alike", tiny_tokenizer()), ("other", swapped)):
        save_model(tiny_t5(1, 1), tokenizer, tmp_path / name)
    teacher, alike, other = (str(tmp_path / name) for name in ("teacher", "alike", "other"))
    for source in (teacher, alike):
        students.check_embeddings(source, teacher, 16)
        with pytest.raises(InputError, match="width 16 .*width 24"):
            students.check_embeddings(source, teacher, 24)
    with pytest.raises(InputError, match=f"{other} has another tokenizer than {teacher}"):
        students.check_embeddings(other, teacher, 16)


# ------------------------------------------------------------------------------------------------- frozen means frozen


@each_family
@pytest.mark.parametrize("embeddings", [True, False])
def test_frozen_matrices_in_bf16_change_no_bit_of_a_mixed_step(family, embeddings):
    teacher, batch = FAMILIES[family](3, 3), tiny_batch(padding=2)
    student, _, ids = init_student(teacher, 3, 2)
    freeze(student, encoder=True, embeddings=embeddings)
    trained = {name: weight for name, weight in student.named_parameters() if weight.requires_grad}

    def gradients():
        with torch.autocast("cpu", torch.bfloat16):
            losses = objectives.kd(student, teacher, batch, encoder_layer_ids=[], decoder_layer_ids=ids)
        losses["loss"].backward()
        found = {name: weight.grad for name, weight in trained.items()}
        student.zero_grad(set_to_none=True)
        return found | {"loss": losses["loss"].detach()}

    expected = gradients()
    before = [(model, dict(model.named_parameters()), copied(model)) for model in (student, teacher)]
    with frozen_in(torch.bfloat16, student, teacher):
        linear = [module for model in (student, teacher) for module in model.modules() if isinstance(module, nn.Linear)]
        dtypes = {module.weight.dtype for module in linear if not any(module.weight is w for w in trained.values())}
        assert dtypes == {torch.bfloat16}
        assert all(weight.dtype == torch.float32 for weight in trained.values())
        found = gradients()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    for model, weights, values in before:
        after = dict(model.named_parameters())
        assert after.keys() == weights.keys() and all(after[name] is weight for name, weight in weights.items())
        assert unchanged(model, values)


def test_models_are_as_they_were_when_the_copies_fail(monkeypatch):
    teacher = tiny_bart(2, 2)
    student, *_ = init_student(teacher, 2, 1)
    freeze(student)
    before = [dict(model.named_parameters()) for model in (student, teacher)]
    made = iter([nn.Parameter] * 5)
    monkeypatch.setattr(nn, "Parameter", lambda *given, **more: next(made)(*given, **more))
    with pytest.raises(RuntimeError), frozen_in(torch.bfloat16, student, teacher):
        pass
    for model, weights in zip((student, teacher), before, strict=True):
        assert all(
            weight is weights[name] and weight.dtype == torch.float32 for name, weight in model.named_parameters()
        )


@each_family
@pytest.mark.parametrize("embeddings", [True, False])
def test_a_student_to_train_shares_what_is_frozen_with_its_teacher(family, embeddings, tmp_path):
    teacher = FAMILIES[family](3, 3)
    plain, *_ = init_student(teacher, 3, 2)
    freeze(plain, encoder=True, embeddings=embeddings)
    student, *_ = init_student(teacher, 3, 2, share_weights=True)
    own_trained(student, encoder=True, embeddings=embeddings)
    assert unchanged(student, before := copied(plain))
    trains = {name: weight.requires_grad for name, weight in plain.named_parameters()}
    assert {name: weight.requires_grad for name, weight in student.named_parameters()} == trains
    assert len({weight.data_ptr() for weight in student.parameters()}) == len(list(student.parameters()))
    theirs = storages(teacher)
    for dtype in (None, torch.bfloat16):
        with frozen_in(dtype, student, teacher):
            shared = storages(student) & storages(teacher)
            assert len(shared) >= len([w for w in student.get_encoder().parameters() if not w.requires_grad])
        assert not {weight.data_ptr() for weight in student.parameters() if weight.requires_grad} & theirs
        assert {w.data_ptr() for w in student.parameters() if not w.requires_grad} <= storages(teacher)
    save_model(student, tiny_tokenizer(), tmp_path)
    assert unchanged(load_model(tmp_path)[0], before)


@each_family
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_idle_modules_hold_nothing_and_come_back(family, dtype):
    teacher, batch = FAMILIES[family](3, 3), tiny_batch(padding=2)
    student, *_ = init_student(teacher, 3, 2, share_weights=True)
    own_trained(student)
    before = [copied(model) for model in (student, teacher)]
    stacks = [teacher.get_encoder(), teacher.get_decoder(), student.get_encoder()]
    linear = [module for stack in stacks for module in stack.modules() if isinstance(module, nn.Linear)]
    matrices = [weight for module in linear for weight in module.parameters()]  # and biases
    sizes = {weight.data_ptr(): weight.nbytes for weight in matrices}
    with frozen_in(dtype, student, teacher, stacks) as waiting:
        assert waiting >= sum(sizes.values()) if dtype else waiting == sum(sizes.values())
        assert not sum(weight.numel() for weight in matrices)
        hidden = torch.randn(3, 5, student.config.d_model)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            decoded = student.get_decoder()(batch["labels"].clamp(min=0), encoder_hidden_states=hidden)[0]
            assert torch.isfinite(decoded).all()
            with pytest.raises(RuntimeError):  # not some wrong result
                teacher.get_encoder()(batch["input_ids"])
    assert all(unchanged(model, values) for model, values in zip((student, teacher), before, strict=True))


def test_a_full_disk_is_named_and_changes_no_model(monkeypatch, tmp_path):
    teacher = tiny_bart(2, 2)
    student, *_ = init_student(teacher, 2, 1, share_weights=True)
    own_trained(student)
    before = [copied(model) for model in (student, teacher)]

    class Full(io.BytesIO):
        def write(self, data):
            if self.tell() > 20_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(InputError, match="no space left"), frozen_in(torch.bfloat16, student, teacher):
        raise AssertionError("the block runs")
    assert all(unchanged(model, values) for model, values in zip((student, teacher), before, strict=True))
