"""Several processes on one run, one for each GPU: rank, world size, this process's share, gather.

    torchrun --nproc-per-node 8 train.py ...

Each process has a whole copy of the policy, with which it samples, judges and scores its share of
the prompts. To fit, the processes train together: each keeps its part of float32 weights, gradients
and optimizer state (FSDP2, `shard`) and computes with its share of a batch. Without torchrun there
is one process, and everything here returns what it was given.

All processes run the same program and must call the collectives (all_gather, broadcast, barrier,
on_main, lock_step, full_tensor) equally often and in the same order. They share a file system;
files are written by the main process, rank 0.
"""

import gc
import os
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

# One process may sample for long while the others wait; a process that dies is noticed by torchrun.
TIMEOUT = timedelta(days=1)


def start(device: str) -> None:
    """Join the process group, if torchrun started several processes: gloo on the CPU and for
    objects, NCCL between GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from now on
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)


def stop() -> None:
    """Destroy the group; release sharded policies first, since their connections would abort the
    interpreter at its end.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the process that writes files and speaks to the user."""
    return rank() == 0


def lost(error: Exception) -> bool:
    """Whether an error says that another process is gone."""
    return world_size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


# ------------------------------------------------------------------------ sharing out


def my_share(items):
    """This process's part of a list or tensor: consecutive items, as many as the others have, or
    one more or less.
    """
    first = len(items) * rank() // world_size()
    last = len(items) * (rank() + 1) // world_size()
    return items[first:last]


def all_gather(part: list) -> list:
    """The lists of all processes as one, in the order of their ranks: puts together what `my_share`
    took apart.
    """
    if world_size() == 1:
        return part
    # Objects and not tensors: processes may have found unequally many.
    parts = [None] * world_size()
    dist.all_gather_object(parts, part)
    return [item for part in parts for item in part]


def broadcast(value):
    """The main process's value, in all of them."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait for all processes."""
    all_gather([])


def on_main(work: Callable):
    """Call `work` in the main process only. What it returns, or what it raises, reaches all of
    them.
    """
    # The others must not wait for a value that never comes.
    value = None
    error = None
    if is_main():
        try:
            value = work()
        except Exception as caught:
            if world_size() == 1:
                raise
            error = caught
    value, error = broadcast((value, error))
    if error is not None:
        raise error
    return value


def lock_step(parts: list, spare) -> Iterator[tuple]:
    """Go through parts, as (part, weight), together: FSDP computes in all processes or in none.

    A process that runs out of parts repeats `spare` with weight 0. The other weights are the number
    of processes, because FSDP averages gradients over them.
    """
    parts = [part for part in parts if part]

    # A part may be larger in one process than in another, so that they need not have equally many.
    turns = max(all_gather([len(parts)]))
    for turn in range(turns):
        if turn < len(parts):
            yield parts[turn], world_size()
        else:
            yield spare, 0


# ------------------------------------------------------------------------ sharded weights


def shard(policy: nn.Module, dtype: torch.dtype, device: str) -> nn.Module:
    """Spread a policy that is on the meta device over all processes, in float32; each block is
    gathered in `dtype` to compute.

    Embedding, head and last norm stay gathered through forward and backward: their
    log-probabilities come in chunks.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # float32 gradients: what eight processes add up in bfloat16 would lose the small ones.
    mesh = dist.device_mesh.init_device_mesh(torch.device(device).type, (world_size(),))
    precision = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in policy.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    return policy.to_empty(device=device)


def mean_of_all(gradient: torch.Tensor) -> torch.Tensor:
    """Mean over all processes of the gradient of a parameter that each has whole; FSDP takes the
    same of its shards.
    """
    if world_size() == 1:
        return gradient
    total = gradient.clone()
    dist.all_reduce(total)
    return total / world_size()


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, put together from all processes if each has a part of it (then it is a DTensor)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather_to_main(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """{name: tensor}, put together one after the other, in the main process's main memory; the
    others only take part.
    """
    kept = {}
    for name, tensor in tensors.items():
        tensor = full_tensor(tensor)
        if is_main():
            kept[name] = tensor.cpu().contiguous()
    return kept


def local_part(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This process's part of a tensor, and the number of its first row in the whole one (FSDP2
    splits rows as torch.chunk).
    """
    if not hasattr(tensor, "to_local"):
        return tensor, 0
    rows_each = -(-len(tensor) // world_size())
    return tensor.to_local(), min(len(tensor), rank() * rows_each)
