"""Corruption can be undone, has exact lengths and shares, and streams are functions of the step."""

import json
from collections import Counter
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from test_loading import refusal, unpadded
from tiny_models import BOS, EOS, MASK, PAD, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from distill_utils import artifacts
from distill_utils.data import denoising, loading

SENTINELS = [f"<extra_id_{i}>" for i in range(12)]
PROSE = [
    "Read the file. Return its lines, e.g. as a list! Is it 3.14 or numpy.array?",
    "The list is sorted (by name.) Then it is written.",
    "One text without an end",
    "Values are read from the file. The file is read once. Nothing is read twice.",
]


@cache
def prose_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with a mask, no start token, and sentinels whose ids fall as those of T5."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", "<mask>", *SENTINELS[::-1]]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(PROSE, trainers.BpeTrainer(vocab_size=340, **options))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", mask_token="<mask>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def prose_tokens(copies: int = 40) -> np.ndarray:
    order = np.random.default_rng(0).integers(0, len(PROSE), size=copies)
    return denoising.pack_text([PROSE[i] for i in order], prose_tokenizer())


def test_pack_text_ends_every_text():
    tokenizer = prose_tokenizer()
    flat = denoising.pack_text(PROSE * 300, tokenizer)  # more texts than are encoded at once
    one_by_one = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in PROSE]
    assert flat.dtype == np.uint16 and flat.tolist() == [i for ids in one_by_one for i in ids] * 300
    assert tokenizer.decode(flat[: len(one_by_one[0]) - 1]) == PROSE[0]


@pytest.mark.parametrize(("size", "kind"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_pack_text_takes_four_bytes_for_a_large_vocabulary(size, kind):
    class Large:
        eos_token_id = size - 1

        def __len__(self):
            return size

        def __call__(self, texts, **_):
            return {"input_ids": [[size - 2] for _ in texts]}

    flat = denoising.pack_text(["a", "b"], Large())
    assert flat.dtype == kind and flat.tolist() == [size - 2, size - 1] * 2


def test_tokens_are_packed_once_for_each_text_and_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_RUNS", str(tmp_path / "runs"))
    pack, packed = denoising.pack_text, []
    monkeypatch.setattr(denoising, "pack_text", lambda texts, tokenizer: packed.append(texts) or pack(texts, tokenizer))
    path, tokenizer, other = tmp_path / "texts.jsonl", prose_tokenizer(), tiny_tokenizer()
    for texts in (PROSE * 4, PROSE * 5):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        for each in (tokenizer, tokenizer, other):
            found = denoising.load_tokens(str(path), "train", each, num=3)
            assert np.array_equal(found, pack(loading.load_text(str(path), "train", num=3), each))
            each(PROSE, truncation=True, max_length=4, padding=True)  # what a call sets is not the tokenizer
    assert len(packed) == 2  # the first three texts are the same in both files


def test_tokens_have_the_hash_of_their_list(monkeypatch):
    flat, computed = np.arange(300, dtype=np.uint16), []
    expected = artifacts.config_hash(flat.tolist())
    monkeypatch.setattr(denoising, "config_hash", lambda given: computed.append(given) or artifacts.config_hash(given))
    assert {denoising.tokens_hash(each) for each in (flat, flat.copy(), flat.astype(np.uint32))} == {expected}
    assert denoising.tokens_hash(flat[1:]) != expected and len(computed) == 3


# -------------------------------------------------------------------------------------------------- span corruption


@pytest.mark.parametrize(
    ("source_length", "packed", "target_length"),
    [(512, 568, 114), (256, 284, 58), (128, 141, 29), (3, 2, 3)],  # the first three are those of T5
)
def test_span_corruption_lengths(source_length, packed, target_length):
    assert denoising.span_corruption_lengths(source_length) == (packed, target_length)


@pytest.mark.parametrize("source_length", [3, 4, 5, 9, 16, 33, 100, 128, 256, 512])
def test_corrupt_spans_has_exact_lengths_and_can_be_undone(source_length):
    packed, target_length = denoising.span_corruption_lengths(source_length)
    ids = np.random.default_rng(1).integers(500, 9000, size=(6, packed))
    sentinel_ids = list(range(400, 200, -1))
    source, target = denoising.corrupt_spans(ids, sentinel_ids, EOS, np.random.default_rng(2))
    assert source.shape == (6, source_length) and target.shape == (6, target_length)
    assert (source[:, -1] == EOS).all() and (target[:, -1] == EOS).all()
    for row, left, right in zip(ids.tolist(), source.tolist(), target.tolist(), strict=True):
        spans, used = {}, []
        for token in right[:-1]:
            if token < 500:
                used.append(token)
            else:
                spans.setdefault(used[-1], []).append(token)
        assert used == sentinel_ids[: len(used)] == [token for token in left[:-1] if token < 500]  # in order, once each
        assert len(spans) == len(used)  # no span is empty
        restored = [token for place in left[:-1] for token in (spans[place] if place < 500 else [place])]
        assert restored == row
        assert left[0] == row[0] and left[-2] == used[-1]  # T5 begins with a visible token and ends with a hidden one


def test_corrupt_spans_hides_the_same_share_at_every_place():
    ids = np.tile(np.arange(1000, 1141), (4000, 1))
    source, target = denoising.corrupt_spans(ids, list(range(99)), EOS, np.random.default_rng(0))
    assert abs((target >= 1000).mean() * target.shape[1] / 141 - 0.15) < 0.005
    hidden = np.stack([(target == token).any(axis=1) for token in range(1000, 1141)], axis=1)
    spans = (hidden & ~np.pad(hidden, ((0, 0), (1, 0)))[:, :-1]).sum(axis=1)
    assert (spans == 7).all() and (hidden.sum(axis=1) == 21).all()  # mean 3
    # Every way to cut is equally likely: the lengths of parts of 21 in 7 are those of 6 cuts among 20 places.
    lengths = np.diff(np.flatnonzero(np.diff(np.pad(hidden, ((0, 0), (1, 1))).ravel().astype(int))))[::2]
    assert abs((lengths == 1).mean() - 6 / 20) < 0.01 and abs((lengths == 2).mean() - 14 / 20 * 6 / 19) < 0.01
    shares = hidden.mean(axis=0)
    assert shares[0] == 0 and shares[-1] == 1 and 0.05 < shares[2:-8].min() and shares[2:-8].max() < 0.25
    assert (source[0] != source[1]).any()


def test_sentinels_are_found_in_t5_order():
    tokenizer = prose_tokenizer()
    ids = denoising.find_sentinels(tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == SENTINELS and ids == sorted(ids, reverse=True)
    assert denoising.find_sentinels(tiny_tokenizer()) == []


# --------------------------------------------------------------------------------------------------------- sentences


def test_sentences_end_where_they_should():
    tokenizer = prose_tokenizer()
    flat = denoising.pack_text(PROSE[:3], tokenizer)
    split = denoising.sentence_splitter(tokenizer)
    assert [tokenizer.decode(sentence) for sentence in split(flat)] == [
        "Read the file.", " Return its lines, e.g.", " as a list!", " Is it 3.14 or numpy.array?</s>",
        "The list is sorted (by name.)", " Then it is written.</s>", "One text without an end</s>",
    ]  # fmt: skip
    no_end = flat[-9:-1]
    assert [len(half) for half in split(no_end)] == [4, 4] and np.concatenate(split(no_end)).tolist() == no_end.tolist()


def rouge1_by_counting(sentence: list[int], others: list[list[int]]) -> float:
    rest = [token for other in others for token in other]
    return 2 * sum((Counter(sentence) & Counter(rest)).values()) / (len(sentence) + len(rest))


def test_gap_sentences_are_those_most_like_the_rest_of_their_text():
    generator = np.random.default_rng(0)
    for _ in range(100):
        lengths = generator.integers(1, 9, size=generator.integers(2, 12))
        sentences = [generator.integers(10, 30, size=length) for length in lengths]
        texts = np.cumsum(generator.random(len(sentences)) < 0.3)
        for i in np.flatnonzero(np.diff(texts)):
            sentences[i] = np.append(sentences[i], EOS)
        source, target = denoising.mask_sentences(sentences, MASK, EOS)
        scores = [
            rouge1_by_counting(
                one.tolist(), [o.tolist() for j, o in enumerate(sentences) if j != i and texts[j] == texts[i]]
            )
            for i, one in enumerate(sentences)
        ]
        num = min(max(round(0.3 * len(sentences)), 1), len(sentences) - 1)
        gaps = sorted(sorted(range(len(sentences)), key=lambda i: -scores[i])[:num])
        assert target.tolist() == [token for i in gaps for token in sentences[i] if token != EOS]
        hidden = iter(gaps)  # put back, the window is whole again
        whole = [
            token
            for place in source.tolist()
            for token in ([t for t in sentences[next(hidden)].tolist() if t != EOS] if place == MASK else [place])
        ]
        assert whole == np.concatenate(sentences).tolist()


def test_permuted_sentences_stay_whole():
    sentences = [np.arange(start, start + 3) for start in range(0, 30, 10)]
    orders = Counter(
        tuple(denoising.permute_sentences(sentences, np.random.default_rng(draw))[::3].tolist()) for draw in range(600)
    )
    assert len(orders) == 6 and min(orders.values()) > 60  # every order, about equally often


# ----------------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("objective", denoising.OBJECTIVES)
def test_streams_are_functions_of_step_and_seed(objective):
    tokens, tokenizer = prose_tokens(), prose_tokenizer()
    arguments = (tokens, tokenizer, objective, 40, 4)
    in_order = denoising.denoising_stream(*arguments, seed=3)
    expected = [unpadded(in_order(step)) for step in range(30)]
    fresh, parts = denoising.denoising_stream(*arguments, seed=3), denoising.denoising_stream(*arguments, 3, 3)
    for step in (29, 0, 13, 13, 7):
        assert unpadded(fresh(step)) == unpadded(parts(step)) == expected[step]
        assert [len(batch["ids"]) for batch in parts(step)] == [3, 1]
    assert unpadded(denoising.denoising_stream(*arguments, seed=4)(0)) != expected[0]
    rows = [row for step in expected for row in step]
    names = [name for name, _, _ in rows]
    per_epoch = len(set(names)) // 4 * 4
    assert per_epoch < len(names) and len(set(names[:per_epoch])) == per_epoch  # none twice in an epoch
    assert names[:per_epoch] != names[per_epoch : 2 * per_epoch]
    different = len({(name, tuple(source)) for name, source, _ in rows})
    if objective == "gap_sentences":  # chosen by their scores, not drawn
        assert different == len(set(names))
    else:
        assert different > 0.6 * len(names)  # corrupted anew in every epoch

    eos, special = tokenizer.eos_token_id, (tokenizer.mask_token_id, *denoising.find_sentinels(tokenizer))
    packed, target_length = denoising.span_corruption_lengths(40) if objective == "span_corruption" else (39, None)
    for name, source, target in rows:
        number = int(name.removeprefix("window "))
        window = tokens[number * packed : (number + 1) * packed].tolist()
        assert len(source) <= 40 and source[-1] == target[-1] == eos
        if objective == "span_corruption":
            assert len(source) == 40 and len(target) == target_length
        if objective in ("text_infilling", "sentence_permutation"):
            assert target[:-1] == window
            assert Counter(source[:-1]) - Counter({tokenizer.mask_token_id: 99}) <= Counter(window)
        else:  # each side holds what the other one hides
            signs = Counter(token for token in source + target if token in special)
            assert signs and Counter(source[:-1]) + Counter(target[:-1]) - signs == Counter(window)
        if objective == "sentence_permutation":
            assert Counter(source[:-1]) == Counter(window)
    if objective == "span_corruption":  # no padding
        assert in_order(0)[0]["attention_mask"].all() and in_order(0)[0]["labels"].shape == (4, target_length)


def test_pegasus_has_a_mask_of_its_own_for_sentences():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<mask_1>"])
    (batch,) = denoising.denoising_stream(np.arange(5, 400) % 90 + 5, tokenizer, "gap_sentences", 24, 3, 0)(0)
    assert (batch["input_ids"] == len(tokenizer) - 1).any() and not (batch["input_ids"] == MASK).any()


@pytest.mark.parametrize(
    ("num_tokens", "arguments", "part"),
    [
        (999, ("span", 40, 4), "'span'"),
        (30, ("span_corruption", 40, 1), "30 tokens has 0 windows of 44"),
        (999, ("sentence_permutation", 1, 1), "0 windows"),
        (100, ("text_infilling", 50, 3), "batch_size 3"),
        (999, ("span_corruption", 2, 1), "source_length 2"),
        (9999, ("span_corruption", 512, 2), "28 spans, the tokenizer has 12 sentinels"),
    ],
)
def test_what_cannot_work_is_rejected_before_the_first_step(num_tokens, arguments, part):
    tokens = np.resize(prose_tokens(), num_tokens)
    assert part in refusal(denoising.denoising_stream, tokens, prose_tokenizer(), *arguments, 0)


def test_tokenizers_without_what_is_needed_are_rejected():
    bare = SimpleNamespace(mask_token_id=None, bos_token_id=None, eos_token_id=None, get_vocab=dict)
    for objective in ("text_infilling", "gap_sentences"):
        assert objective in refusal(denoising.denoising_stream, prose_tokens(), bare, objective, 40, 1, 0)
    assert "end token" in refusal(denoising.pack_text, ["a"], bare)


# --------------------------------------------------------------------------------------------------------- infilling


def align(source: list[int], text: list[int], mask_id: int) -> list[list[int]]:
    """Return what each mask of `source` hides in `text` (whose tokens are distinct); neighbours share their gap.

    Fails when a token moved, changed or went missing without a mask.
    """
    hidden, place, open_masks = [], 0, 0
    for token in [*source, None]:
        if token == mask_id:
            open_masks += 1
            continue
        end = len(text) if token is None else text.index(token)
        gap = text[place:end]  # raises or is wrong below when the order changed
        assert end >= place and (open_masks or not gap)
        if open_masks:
            hidden.append(gap)
        place, open_masks = end + 1, 0
    return hidden


def test_infill_masks_spans_and_keeps_the_rest():
    text = list(range(100, 164))
    masked, masks = [], []
    for draw in range(300):
        source = denoising.infill(np.asarray(text, dtype=np.uint16), MASK, np.random.default_rng(draw))
        assert source.dtype == np.int64
        hidden = align(source.tolist(), text, MASK)
        kept = [token for token in source.tolist() if token != MASK]
        assert kept == [token for token in text if token in set(kept)]  # in order, unchanged
        assert sum(map(len, hidden)) == len(text) - len(kept)  # all that is missing hides behind masks
        masked.append(1 - len(kept) / len(text))
        masks.append(source.tolist().count(MASK))
    # A span of no token uses up a token of the budget too, so that the share lies a little below 0.3.
    assert 0.28 < np.mean(masked) <= 0.3 and max(masked) <= 0.3
    # 19 tokens in spans of Poisson(3), zeros counted as one: 19 / (3 + exp(-3)) = 6.2, and more for the cut last one
    assert 6.0 < np.mean(masks) < 7.4
    assert denoising.infill(np.asarray(text[:0]), MASK, np.random.default_rng(0)).tolist() == []


SPECIAL = SimpleNamespace(mask_token_id=MASK, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)


def test_infilling_masks_every_token_by_itself_in_its_first_steps():
    flat = np.arange(100, 100 + 22 * 11 + 5, dtype=np.uint16)  # 11 windows of 22 tokens and a rest
    stream = denoising.denoising_stream(flat, SPECIAL, "text_infilling", 24, 3, seed=4, aligned_steps=1)
    for step in range(6):
        for name, source, target in unpadded(stream(step)):
            number = int(name.removeprefix("window "))
            window = flat[number * 22 : (number + 1) * 22].tolist()
            assert target == [*window, EOS]
            assert source[0] == BOS and source[-1] == EOS and MASK in source and len(source) <= 24
            if step < 1:  # a mask for every token: each place shows its own token or hides it
                assert all(token in (MASK, own) for token, own in zip(source[1:-1], window, strict=True))
            assert sum(map(len, align(source[1:-1], window, MASK))) == 22 - sum(token >= 100 for token in source)


def test_gap_pairs():
    body = "The file is opened once and read to its end."
    texts = [
        f"function load\nRead a table\nfrom a file.\n\n{body}\n\nMore   of it.",
        "This comment stands on one line and has no name above it.",
        f"function short\nRead it.\n\n{body}",
        f"function long\n{'word ' * 41}\n\n{body}",
        f"function whole\n{'word ' * 40}\n\n{body}",
        "function bare\nRead a table from a file.\n\nToo short.",
        "function none\nRead a table from a file.",
        "class Wide\nRead a table from a file.\n\n" + "long " * 1000,
    ]
    rows = denoising.gap_pairs(texts).to_list()
    assert [row["id"] for row in rows] == ["gap 0", "gap 1", "gap 2"]
    assert rows[0]["document"] == f"function load <mask> {body} More of it."
    assert rows[0]["summary"] == "Read a table from a file."
    assert rows[1] == {"id": "gap 1", "document": f"function whole <mask> {body}", "summary": " ".join(["word"] * 40)}
    assert rows[2]["document"] == "class Wide <mask> " + ("long " * 1000)[:1500]
