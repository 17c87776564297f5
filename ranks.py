"""The processes of a run on several GPUs, one each: who I am, what is my share, what the others have.

    torchrun --nproc-per-node 8 train.py ...

Each process has a whole copy of the policy, with which it samples, judges and scores its share of the prompts. To fit,
the processes train together: each keeps its part of float32 weights, gradients and optimizer state (FSDP2, `sharded`) and
computes with its share of a batch. Without torchrun there is one process, and everything here returns what it was given.

All processes run the same program and must call the functions that talk (joined, agreed, meet, in_step, together, full)
equally often and in the same order. They share a file system; files are written by the first.
"""

import gc
import os
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from data import whole

PATIENCE = timedelta(days=1)  # one process may sample for long while the others wait; who dies is noticed by torchrun


def start(device):
    """Join the other processes, if torchrun started some: gloo for the CPU and for Python's objects, NCCL between GPUs."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if cuda := torch.device(device).type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from now on
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)


def stop():
    """Leave. Nobody may hold a sharded policy any more: its connections would abort the interpreter at its end."""
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def count():
    return dist.get_world_size() if dist.is_initialized() else 1


def number():
    return dist.get_rank() if dist.is_initialized() else 0


def first():
    """Whether this is the process that writes files and speaks to the user."""
    return number() == 0


def lost(error):
    """Whether an error says that another process is gone."""
    return count() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


# ------------------------------------------------------------------------------------------------ sharing out


def share(items):
    """This process's part of a list or tensor: consecutive items, as many as the others have, or one more or less."""
    return items[len(items) * number() // count() : len(items) * (number() + 1) // count()]


def joined(part):
    """The lists of all processes as one, in their order: what `share` took apart."""
    if count() == 1:
        return part
    parts = [None] * count()
    dist.all_gather_object(parts, part)
    return [item for part in parts for item in part]


def agreed(value):
    """The first process's value, in all of them."""
    box = [value]
    if count() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def meet():
    """Wait for all."""
    joined([])


def in_step(parts, spare):
    """Go through parts, as (part, weight), together: FSDP computes in all processes or in none.

    Who has fewer than the others goes through `spare` meanwhile, with weight 0. The other weights are the number of
    processes, because gradients are averaged over them.
    """
    parts = [part for part in parts if part]
    for turn in range(max(joined([len(parts)]))):
        yield (parts[turn], count()) if turn < len(parts) else (spare, 0)


@contextmanager
def together(path):
    """data.whole for all processes: one temporary name, into which each may write, and the first renames it."""
    path = Path(path).absolute()
    with whole(path) if first() else nullcontext(path.with_name(path.name + ".tmp")) as temporary:
        meet()  # what an interrupted run had left there is gone
        yield temporary
        meet()  # all have written
    meet()


# ------------------------------------------------------------------------------------------------ sharded weights


def sharded(policy, dtype, device):
    """Spread a policy that is on the meta device over all processes, in float32, each block gathered in `dtype` when it computes.

    Embedding, head and last norm stay gathered through forward and backward: their log-probabilities come in chunks.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = dist.device_mesh.init_device_mesh(torch.device(device).type, (count(),))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in policy.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    return policy.to_empty(device=device)


def full(tensor):
    """A tensor, put together from all processes if each has a part of it (then it is a DTensor)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(tensors):
    """{name: tensor}, put together one after the other, in the first process's main memory; the others only take part."""
    kept = {}
    for name, tensor in tensors.items():
        tensor = full(tensor)
        if first():
            kept[name] = tensor.cpu().contiguous()
    return kept


def local(tensor):
    """This process's part of a tensor, and the number of its first row in the whole one (FSDP2 splits rows as torch.chunk)."""
    if not hasattr(tensor, "to_local"):
        return tensor, 0
    return tensor.to_local(), min(len(tensor), number() * -(-len(tensor) // count()))
