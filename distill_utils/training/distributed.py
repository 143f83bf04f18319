"""What a training run that several processes share adds up, splits and gathers; in one process all of it does nothing.

Out of scope: how models are sharded and processes started (experiments/launch.py).
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and how many share the run: (0, 1) unless torch.distributed was set up."""
    several = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if several else (0, 1)


def local_rows(batch: dict) -> dict:
    """Return this process's rows of a batch: each row belongs to one process, and all have as many or one more.

    They are taken in turns, as batches are sorted by length. With fewer rows than processes some have none of their
    own; they run the first one without a target token, because a sharded model's pass needs every process.
    """
    rank, world = rank_and_world_size()
    if world == 1:
        return batch
    num_rows = len(batch["labels"])
    own = slice(rank, None, world) if rank < num_rows else slice(0, 1)
    batch = {k: v[own] if hasattr(v, "__len__") and len(v) == num_rows else v for k, v in batch.items()}
    return batch if rank < num_rows else batch | {"labels": torch.full_like(batch["labels"], -100)}


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of what every process has, in all of them; in place."""
    if rank_and_world_size()[1] > 1:
        dist.all_reduce(values)
    return values


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor of which every process may hold a part; all must call this together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether this process holds a part of the tensor only."""
    return hasattr(tensor, "full_tensor")  # a DTensor; importing its class costs a second


def part_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return this process's part of a whole tensor, where and as `other` has it."""
    if not is_sharded(other) or tensor.shape != other.shape:
        return tensor.to(other.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def reset_fsdp_state(model) -> None:
    """Put sharded stacks back to parts: an objective may leave a forward pass early, which FSDP takes for a failure."""
    for module in model.modules():
        if getattr(module, "has_run", False):  # set by launch.shard
            module.reset_iter_state()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their common norm is at most `max_norm`, and return what it was.

    FSDP adds up those of sharded weights; those of weights that every process holds are added up here.
    """
    kinds: dict[bool, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            kinds.setdefault(is_sharded(parameter), []).append(parameter)
    for parameter in kinds.get(False, []):
        sum_over_processes(parameter.grad)
    norms = [whole(nn.utils.get_total_norm([p.grad for p in kind])) for kind in kinds.values()]
    norm = torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]
    for kind in kinds.values():
        nn.utils.clip_grads_with_norm_(kind, max_norm, norm)
    return norm


def gather(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return whole tensors in rank 0 and nothing elsewhere; one after another, and several processes' in main memory.

    The distributed checkpoints of PyTorch would write parts in parallel, but their index is a pickle, and their
    safetensors come in a format of their own that one process could not read without them.
    """
    rank, world = rank_and_world_size()
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if rank == 0:
            found[name] = (full if world == 1 else full.cpu()).contiguous()
    return found
