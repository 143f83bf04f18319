"""Speculative decoding: a student or the source's own n-grams draft tokens, the teacher checks several in one pass.

What comes out is the teacher's greedy summary, exactly in float32 (ties of logits aside): a drafted token stays only
where it is the teacher's own choice (Leviathan et al. 2023; n-grams of the source: Saxena 2023). The student reads what
the teacher's encoder wrote, so it must have kept that. `model.generate` drafts for one document at a time; here a batch
goes on as far as all its rows agree.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from distill_utils.artifacts import InputError
from distill_utils.device import timed
from distill_utils.evaluation.generation import summarize
from distill_utils.models.students import encoders_equal

NGRAM = 2  # tokens that are looked up in the source to copy what follows them


def summarize_speculatively(
    teacher: PreTrainedModel, tokenizer, documents: list[str], student: PreTrainedModel | None, num_drafted: int = 4,
    **options,
) -> tuple[list[str], dict]:  # fmt: skip
    """Return the teacher's greedy summaries and what they took; options are those of `generation.summarize`.

    Without a student the drafts are copied from the source. The counts are `passes` of the teacher's decoder, `tokens`
    written (rows that wait for others count once), and for each place in the draft `tried` and `accepted`.
    Raises InputError for a student that did not keep the teacher's encoder, and for drafts of no token.
    """
    if num_drafted < 1:
        raise InputError(f"num_drafted {num_drafted} is too small: draft at least 1 token")
    if student is not None and not encoders_equal(student, teacher):
        raise InputError("the student has another encoder than the teacher: use one that kept it whole")
    found, seen = {"passes": 0, "tokens": 0, "tried": Counter(), "accepted": Counter()}, {}
    decode = partial(draft_and_check, student=student, num_drafted=num_drafted, found=found, seen=seen)
    fixed = {"num_beams": 1, "do_sample": False, "custom_generate": decode}

    def keep(module, arguments, named: dict) -> None:
        seen["source"] = named["input_ids"]  # `generate` hands on what the encoder made of it only

    hook = teacher.get_encoder().register_forward_pre_hook(keep, with_kwargs=True)
    try:
        return summarize(teacher, tokenizer, documents, **options, **fixed), found
    finally:
        hook.remove()


def draft_and_check(
    model: PreTrainedModel, input_ids: Tensor, logits_processor, stopping_criteria, generation_config, *,
    student: PreTrainedModel | None, num_drafted: int, found: dict, seen: dict, **inputs,
) -> Tensor:  # fmt: skip
    """Write summaries as `generate` with one beam does, which calls this with its logits processors and stop rules."""
    models = [model] if student is None else [model, student]
    caches = {each: EncoderDecoderCache(DynamicCache(), DynamicCache()) for each in models}
    encoded = {name: inputs[name] for name in ("encoder_outputs", "attention_mask")}

    def logits_after(each: PreTrainedModel, ids: Tensor, last: int) -> Tensor:
        """Return (batch, last, vocabulary): the scores of what follows the last tokens."""
        unread = ids[:, caches[each].get_seq_length() :]
        out = each(decoder_input_ids=unread, past_key_values=caches[each], use_cache=True, **encoded)
        return out.logits[:, -last:].float()

    ids, pad = input_ids, generation_config.pad_token_id
    unfinished = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    while unfinished.any():
        length = ids.shape[1]
        draft = ids
        for _ in range(min(num_drafted, generation_config.max_length - length - 1)):
            if student is None:
                drafted = _copied(draft, seen["source"])
            else:
                drafted = logits_processor(draft, logits_after(student, draft, 1)[:, 0]).argmax(-1)
            draft = torch.cat([draft, torch.where(unfinished, drafted, pad)[:, None]], 1)
        places = draft.shape[1] - length
        checked = logits_after(model, draft, places + 1)
        found["passes"] += 1
        for place in range(places + 1):
            chosen = logits_processor(draft[:, : length + place], checked[:, place]).argmax(-1)
            chosen = torch.where(unfinished, chosen, pad)
            ids = torch.cat([ids, chosen[:, None]], 1)
            found["tokens"] += int(unfinished.sum())
            if place < places:
                same = (chosen == draft[:, length + place]) | ~unfinished
                found["tried"][place] += int(unfinished.sum())
                found["accepted"][place] += int((same & unfinished).sum())
            unfinished = unfinished & ~stopping_criteria(ids, None)
            if place == places or not same.all() or not unfinished.any():
                break
        for cache in caches.values():  # a cache holds what was drafted in vain
            cache.crop(-max(0, cache.get_seq_length() - (ids.shape[1] - 1)))
    return ids


def measure_speculation(
    teacher: PreTrainedModel, tokenizer, documents: Sequence[str], drafters: Mapping[str, PreTrainedModel | None],
    batch_sizes: Sequence[int] = (1, 4, 16), num_drafted: int = 4, turns: int = 3, **options,
) -> list[dict]:  # fmt: skip
    """Return a row for each drafter (None: the source) and batch size, against the teacher's plain greedy decoding.

    `tokens_per_pass` of the teacher's decoder, counting rows of a batch together; `accepted` of the drafted tokens, by
    place (percent of those tried there); `speedup` of all documents, plain and speculative in turns, best of each; and
    `equal`, the percent of summaries that are the same, all but for ties of logits.
    """
    rows = []
    for size in batch_sizes:
        own = {"batch_size": size, **options}
        ways = {"": partial(summarize, teacher, tokenizer, documents, num_beams=1, **own)}
        for name, student in drafters.items():
            ways[name] = partial(summarize_speculatively, teacher, tokenizer, documents, student, num_drafted, **own)
        plain, found = ways[""](), {name: ways[name]() for name in drafters}
        times = [{name: timed(run, teacher.device) for name, run in ways.items()} for _ in range(turns)]
        spent = {name: min(turn[name] for turn in times) for name in ways}
        for name, (written, counts) in found.items():
            accepted = [100 * counts["accepted"][place] / tried for place, tried in sorted(counts["tried"].items())]
            rows.append({
                "drafts": name, "batch": size, "tokens_per_pass": counts["tokens"] / counts["passes"],
                "accepted": accepted, "speedup": spent[""] / spent[name],
                "equal": 100 * sum(a == b for a, b in zip(written, plain, strict=True)) / len(plain),
            })  # fmt: skip
    return rows


def _copied(ids: Tensor, source_ids: Tensor) -> Tensor:
    """Return for each row what follows the last tokens where they stand in its source first, else the last token."""
    if min(ids.shape[1], source_ids.shape[1] - 1) < NGRAM:
        return ids[:, -1]
    windows = source_ids.unfold(1, NGRAM, 1)[:, :-1]  # (batch, places, n-gram), each with a token after it
    hits = (windows == ids[:, None, -NGRAM:]).all(-1)
    first = hits.int().argmax(1)
    following = source_ids.gather(1, (first + NGRAM).clamp(max=source_ids.shape[1] - 1)[:, None])[:, 0]
    return torch.where(hits.any(1), following, ids[:, -1])
