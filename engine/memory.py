"""How much memory was used, and whether there was too little."""

import resource
import sys

import torch


def out_of_memory(error: Exception) -> bool:
    """Whether an error of torch, on a GPU or the CPU, or of Python says that memory ran out."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    said = str(error)
    return known or "not enough memory" in said or "can't allocate memory" in said


def peak_memory(device: str) -> float:
    """Largest memory of this process so far, in GB: of the GPU where there is one."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
