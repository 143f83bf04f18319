"""What nothing trains is held once, in the dtype that the device multiplies."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_utils.artifacts import disk_space_named, runs_dir
from distill_utils.device import release_memory
from distill_utils.models.students import freeze


def own_trained(student: PreTrainedModel, encoder: bool = True, embeddings: bool = True) -> None:
    """Make a view on a teacher (`init_student(..., share_weights=True)`) a student to train.

    Encoder and embeddings are frozen as by `students.freeze`, and stay the teacher's memory; all else gets its own.
    """
    computed = {id(module.weight) for module in student.modules() if hasattr(module, "create_weight")}  # sines
    for weight in student.parameters():
        weight.requires_grad_(id(weight) not in computed)
    freeze(student, encoder, embeddings)
    for weight in student.parameters():
        if weight.requires_grad:
            weight.data = weight.data.clone()


@contextmanager
def frozen_in(
    dtype: torch.dtype | None, student: PreTrainedModel, teacher: PreTrainedModel | None,
    idle: Sequence[nn.Module] = (),
) -> Iterator[int]:  # fmt: skip
    """Hold matrices that nothing trains in `dtype` inside the block; afterwards both models are as they were.

    These are the teacher's and the student's frozen ones, which autocast would cast in every pass, to the same bits.
    What the models share is held once. Tables stay, as a look-up casts nothing: a head tied to one gets a copy. The
    originals wait on disk, in a nameless file of the runs folder that no kill leaves behind, and so do all matrices of
    `idle` modules, which must not run in the block. Without a dtype only those are put aside. Yields the bytes
    that wait there; raises InputError when the disk is full.
    """
    modules = [module for model in (student, teacher) if model is not None for module in model.modules()]
    tables = {module.weight.data_ptr() for module in modules if isinstance(module, nn.Embedding)}
    trained = {id(weight) for weight in student.parameters() if weight.requires_grad}
    unused = {id(module) for part in idle for module in part.modules()}
    uses: dict[int, list] = {}  # by place in memory: modules, names there and parameters
    for module in modules:
        for name, weight in module.named_parameters(recurse=False) if isinstance(module, nn.Linear) else ():
            if id(weight) not in trained and not hasattr(weight, "placements"):  # or sharded
                uses.setdefault(weight.data_ptr(), []).append((module, name, weight))
    changed = []
    with tempfile.TemporaryFile(dir=runs_dir()) as file:
        try:
            for place, users in uses.items():
                first, needed = users[0][2], any(id(module) not in unused for module, *_ in users)
                if needed and dtype in (None, first.dtype):
                    continue
                aside = file if place not in tables else None
                changed.append((users, aside, first.shape, first.device))
                _replace(users, dtype if needed else None, aside)
            yield file.tell()
        finally:
            file.seek(0)
            release_memory()  # of training, before as much is read
            for users, aside, shape, device in changed:
                _restore(users, aside, shape, device)


def _replace(users: list[tuple], dtype: torch.dtype | None, file: BinaryIO | None) -> None:
    """Write a matrix to the file, if any, and give the modules that use it a copy in `dtype`, if any, in its place."""
    original = users[0][2].data
    copy = None if dtype is None else nn.Parameter(original.to(dtype), requires_grad=False)
    if file:
        with disk_space_named(runs_dir()):
            file.write(original.cpu().contiguous().view(torch.uint8).numpy())
            file.flush()
    for module, name, weight in users:
        if copy is not None:
            setattr(module, name, copy)
        if file:
            weight.data = original.new_empty(0)  # a module that should not run ends in an error when it does


def _restore(users: list[tuple], file: BinaryIO | None, shape: torch.Size, device: torch.device) -> None:
    original = users[0][2].data
    if file and not original.numel():
        original = torch.empty(shape, dtype=original.dtype)
        file.readinto(original.view(torch.uint8).numpy())
        original = original.to(device)
    for module, name, weight in users:
        setattr(module, name, weight)
        weight.data = original
