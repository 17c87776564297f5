"""Checkpoints in Hugging Face layout: weights into modules by name, and back."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.distributed import gather_to_main, is_main, local_part
from engine.files import as_others, read_json, write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED = ("F32", "BF16", "F16")  # what weights may be stored as
SHARD_BYTES = 5 * 10**9  # largest file that is written
BLOCK_BYTES = 2**24  # of a tensor, read at a time

# Tables of positions, which old checkpoints have; they are not read.
IGNORED = ("rotary_emb.inv_freq", "position_ids")


def check_device(device: str) -> None:
    """ValueError if this machine, or this torch, has no such device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None


# ------------------------------------------------------------------------ reading


def load_pretrained(cls, config, folder: str | Path, dtype=None, device=None, **options):
    """cls(config, **options) with the folder's tensors, in `dtype` or else the config's.

    FileNotFoundError or ValueError names what is missing, unexpected, misshapen or truncated.
    """
    dtype = DTYPES.get(dtype or config.dtype, dtype)
    with uninitialized(dtype, device or "cpu"):
        model = cls(config, **options)
    load_weights(model, folder)
    return model


@contextmanager
def uninitialized(dtype: torch.dtype, device) -> Iterator[None]:
    """Modules built inside have this dtype and device, and uninitialised weights."""
    kinds = (nn.Linear, nn.Embedding)
    draw = [kind.reset_parameters for kind in kinds]
    before = torch.get_default_dtype()
    try:
        # Drawing random matrices takes longer than reading the real ones.
        for kind in kinds:
            kind.reset_parameters = lambda module: None
        torch.set_default_dtype(dtype)
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)
        for kind, method in zip(kinds, draw):
            kind.reset_parameters = method


def weight_files(folder: str | Path) -> dict[str, Path]:
    """{tensor name: the safetensors file that holds it}, from the index or from the single file."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder, expected a Hugging Face checkpoint")

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = read_json(index).get("weight_map")
        names = files.values() if isinstance(files, dict) else [None]
        # A path would lead out of the folder.
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError(f"{index}: expected a weight_map from tensor names to file names")
        for name in sorted(set(files.values())):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name}: no such file, but {index.name} names it")
        return {tensor: folder / name for tensor, name in files.items()}

    single = folder / "model.safetensors"
    if not single.is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        hint = f" ({pickled[0]} is a pickle, which is never read: convert it)" if pickled else ""
        raise FileNotFoundError(f"{single}: no such file, and no {index.name}{hint}")
    with open_weights(single) as file:
        return dict.fromkeys(file.keys(), single)


def open_weights(path: Path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file (truncated?): {error}") from None


@torch.no_grad()
def load_weights(module: nn.Module, folder: str | Path, prefix: str = "", unused: tuple = ()):
    """Copy the folder's tensors into parameters by name (after `prefix`), casting to their dtype.

    The peak is one copy of the weights and a few blocks; of sharded parameters each process reads
    its own rows. Tensors whose names begin with one of `unused` may be there.
    """
    parameters = {prefix + name: parameter for name, parameter in module.named_parameters()}
    files = weight_files(folder)

    # A tied head may be stored all the same.
    tied = getattr(module.config, "tie_word_embeddings", False)
    check_names(parameters, files, folder, (*unused, "lm_head.") if tied else unused)

    path = None
    file = None
    read = 0
    for name, parameter in parameters.items():
        own, begin = local_part(parameter)
        rows = max(1, BLOCK_BYTES * len(parameter) // parameter.nbytes)
        for start in range(0, len(own), rows):
            # What has been read of an open file stays mapped, so it is opened again after each
            # block: that drops the previous file and its mapping.
            if path != files[name] or read > BLOCK_BYTES:
                path = files[name]
                file = open_weights(path)
                read = 0

            part = own[start : start + rows]
            tensor = find_tensor(file, path, name, tuple(parameter.shape))
            part.copy_(tensor[begin + start : begin + start + len(part)])
            check_finite(part, f"{path}: tensor {name}")
            read += part.nbytes


def check_finite(tensor: Tensor, name: str) -> None:
    """ValueError if a tensor has an infinity or NaN; several processes have a part each."""
    # Whatever is added to NaN or an infinity, the sum is not finite. Large numbers may overflow it,
    # too: only then each of them is looked at.
    if not tensor.sum().isfinite() and (wrong := int((~tensor.isfinite()).sum())):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name} has {wrong} numbers that are not finite (as {dtype})")


def check_names(parameters: dict, files: dict, folder, unused: tuple) -> None:
    """ValueError names the first tensor that is missing or unexpected."""
    missing = sorted(parameters.keys() - files.keys())
    if missing:
        count = f"{len(missing)} of {len(parameters)} are"
        raise ValueError(f"{folder}: tensor {missing[0]} is missing ({count})")

    for name in sorted(files.keys() - parameters.keys()):
        if not name.startswith(unused) and not name.endswith(IGNORED):
            raise ValueError(f"{files[name]}: unexpected tensor {name}, not of this architecture")


def find_tensor(file, path: Path, name: str, shape: tuple):
    """A tensor of an open file, not read yet. ValueError if it is absent or has another shape."""
    try:
        tensor = file.get_slice(name)
    except SafetensorError:
        raise ValueError(f"{path}: tensor {name} is missing, but the index has it here") from None

    dtype = tensor.get_dtype()
    if dtype not in STORED:
        raise ValueError(f"{path}: tensor {name} is {dtype}, expected {' or '.join(STORED)}")
    found = tuple(tensor.get_shape())
    if found != shape:
        raise ValueError(f"{path}: tensor {name} is {found}, expected {shape}")
    return tensor


# ------------------------------------------------------------------------ writing


def save_checkpoint(module: nn.Module, folder, extra=None, shard_bytes: int = SHARD_BYTES) -> None:
    """Write weights and config.json, which gets the dtype that the weights have, and `extra` keys.

    All processes gather sharded weights, tensor by tensor; the main one writes, a file at a time.
    """
    save_weights(module, folder, shard_bytes)
    if is_main():
        dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
        config = dataclasses.replace(module.config, dtype=dtype).to_json()
        write_json(Path(folder) / "config.json", config | (extra or {}))


def save_weights(module: nn.Module, folder: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the parameters as model.safetensors, or as numbered files and an index if larger."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, parameter in module.named_parameters():
        check_finite(local_part(parameter)[0], f"tensor {name}")
    shards = split_parameters(module, shard_bytes)

    # One file at a time is gathered in main memory.
    for name, shard in shards.items():
        tensors = gather_to_main(shard)
        try:
            if is_main():
                save_file(tensors, folder / name, metadata={"format": "pt"})
                as_others(folder / name)
        except SafetensorError as error:  # the library's own class for a full disk
            raise OSError(f"{name}: {error}") from None

    if len(shards) > 1 and is_main():
        weight_map = {tensor: name for name, shard in shards.items() for tensor in shard}
        total = sum(parameter.nbytes for parameter in module.parameters())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def split_parameters(module: nn.Module, shard_bytes: int) -> dict[str, dict[str, Tensor]]:
    """{file name: {name: parameter}}, in order, each file of at most shard_bytes if it can be."""
    shards = [{}]
    size = 0
    for name, parameter in module.named_parameters():
        if shards[-1] and size + parameter.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = parameter.detach()
        size += parameter.nbytes

    # Their names tell how many there are, so they come last.
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": part for i, part in enumerate(shards, 1)}
