"""What nothing trains is held once, in the dtype that the device multiplies."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel


def share_frozen(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Let every frozen weight of the student that equals one of the teacher's on its device be that one's memory.

    One each: weights that happen to be equal, such as biases of 0, stay apart within the student, or it is not saved.
    """

    def key(weight: nn.Parameter) -> tuple:
        return weight.shape, weight.dtype, weight.device, tuple(weight.detach().flatten()[:8].tolist())

    theirs: dict[tuple, list[nn.Parameter]] = {}
    for weight in teacher.parameters():
        theirs.setdefault(key(weight), []).append(weight)
    for weight in student.parameters():
        alike = [] if weight.requires_grad else theirs.get(key(weight), [])
        same = next((i for i, other in enumerate(alike) if torch.equal(weight, other)), None)
        if same is not None:
            weight.data = alike.pop(same).data


@contextmanager
def frozen_in(dtype: torch.dtype | None, student: PreTrainedModel, teacher: PreTrainedModel | None) -> Iterator[None]:
    """Hold matrices that nothing trains in `dtype` inside the block; afterwards both models are as they were.

    These are the teacher's and the student's frozen ones, which autocast would cast in every pass, to the same bits.
    What the models share is held once. Tables stay, as a look-up casts nothing: a head tied to one gets a copy. On a
    GPU the originals wait in the machine's memory. None changes nothing.
    """
    models = [model for model in (student, teacher) if model is not None and dtype is not None]
    modules = [module for model in models for module in model.modules()]
    tables = {module.weight.data_ptr() for module in modules if isinstance(module, nn.Embedding)}
    linear = [module for module in modules if isinstance(module, nn.Linear)]
    trained = {id(weight) for weight in student.parameters() if weight.requires_grad}
    copies, originals, replaced = {}, {}, []
    try:
        for module in linear:
            for name, weight in list(module.named_parameters(recurse=False)):
                if id(weight) in trained or weight.dtype == dtype or hasattr(weight, "placements"):  # or sharded
                    continue
                place = weight.data_ptr()
                if place not in copies:
                    copies[place] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
                    originals[place] = weight.data if place in tables else weight.data.cpu()
                replaced.append((module, name, weight, weight.device, place))
                setattr(module, name, copies[place])
        for _, _, weight, _, place in replaced:
            weight.data = originals[place]
        yield
    finally:
        copies.clear()
        back = {}
        for module, name, weight, on, place in replaced:
            weight.data = back.setdefault(place, originals[place].to(on))
            setattr(module, name, weight)
