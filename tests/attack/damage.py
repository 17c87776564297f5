"""Ways to break values, JSON, bytes and safetensors, drawn from a random.Random."""

import copy
import json
import os
import struct
from pathlib import Path

from safetensors.torch import load_file, save_file

ESCAPE = "\x1b]0;x\x07\x1b[31mred"
DEEP = json.loads("[" * 60 + "]" * 60)
WEIRD = [
    None, True, False, "", "x", "∞ 日本 🙂", "a\0b", ESCAPE, "\ud800", "1", "x" * 3000, -1, 0, 1, 2, 3, 18, 10**9, 10**18,
    -(10**18), 10**400, 0.5, -0.5, 1.5, 1e-40, 1e30, 1e300, float("nan"), float("inf"), -float("inf"), [],
    [1], ["x"], [None], [[1]], {}, {"a": 1}, {"a": {"b": []}}, DEEP,
]  # fmt: skip


def paths_of(value, path=()):
    """The path of every value inside of a JSON value, the whole one included."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from paths_of(one, (*path, key))


def mutated_json(value, random) -> tuple[str, str]:
    """(JSON text of a value in which one thing is another, what was done)."""
    value = copy.deepcopy(value)
    # The upper ones are the more interesting: every level is as likely.
    paths = list(paths_of(value))
    depth = random.choice(sorted({len(path) for path in paths}))
    path = random.choice([path for path in paths if len(path) == depth])
    weird = random.choice(WEIRD)
    if not path:
        return json.dumps(weird), f"the whole is {json.dumps(weird)[:60]}"

    *above, key = path
    parent = value
    for step in above:
        parent = parent[step]
    kind = random.choice(["set", "set", "set", "drop", "rename", "wrap", "text", "shorter"])
    found = parent[key]
    if kind == "set":
        parent[key] = weird
    elif kind == "drop":
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        parent[f"{key}_"] = parent.pop(key)
    elif kind == "text":
        parent[key] = json.dumps(found)
    elif kind == "shorter" and isinstance(found, list | str):
        parent[key] = found[: len(found) // 2]
    else:
        parent[key] = [found]
    shown = f" {json.dumps(weird)[:60]}" if kind == "set" else ""
    return json.dumps(value), f"{kind} {'.'.join(map(str, path))}{shown}"


def mutated_bytes(data: bytes, random) -> tuple[bytes, str]:
    """(bytes with one to three changes, what was done)."""
    done = []
    for _ in range(random.choice([1, 1, 2, 3])):
        size = len(data)
        begin = random.randrange(size + 1)
        end = min(size, begin + random.choice([1, 1, 2, 8, 100, size]))
        part = data[begin:end]
        kind = random.choice(["flip", "flip", "set", "insert", "delete", "repeat", "cut", "zero", "reverse", "digit"])
        if kind == "flip":
            new = bytes([part[0] ^ (1 << random.randrange(8))]) + part[1:] if part else b""
        elif kind == "set":
            new = bytes([random.randrange(256)]) + part[1:]
        elif kind == "insert":
            new = (
                random.choice([b"\0", b"\xff", b"\xef\xbb\xbf", b"\n", b'"', b"{", b"]", b"9", b"-", random.randbytes(9)]) + part
            )
        elif kind == "digit":  # a number becomes another
            begin = next((k for k in range(begin, size) if data[k : k + 1].isdigit()), begin)
            end = min(size, begin + 1)
            new = str(random.randrange(1000)).encode()
        else:
            new = {"delete": b"", "repeat": part * 2, "zero": bytes(len(part)), "reverse": part[::-1], "cut": b""}[kind]
            end = size if kind == "cut" else end
        data = data[:begin] + new + data[end:]
        done.append(f"{kind} {begin}-{end}")
    return data, ", ".join(done)


# ------------------------------------------------------------------------------------------------ safetensors


def read_header(path: Path) -> tuple[dict, bytes]:
    """(header, numbers) of a safetensors file: eight bytes of length, JSON, and the rest."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(path: Path, header, numbers: bytes, length: int | None = None) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + numbers)


def with_tensors(path: Path, change) -> None:
    """Write the file anew with change({name: tensor})."""
    tensors = {name: tensor.contiguous() for name, tensor in change(dict(load_file(path))).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def one_tensor(path: Path, random, change) -> str:
    """Change one tensor of the file, drawn at random; its name."""
    name = random.choice(sorted(load_file(path)))
    with_tensors(path, lambda tensors: tensors | {name: change(tensors[name])})
    return name


def with_number(tensor, random, value):
    tensor = tensor.clone()
    tensor.view(-1)[random.randrange(tensor.numel())] = value
    return tensor


def in_two_files(path: Path) -> None:
    """model.safetensors becomes two files and an index."""
    tensors = load_file(path)
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, path.with_name(file))
    path.unlink()
    where = {name: file for file, own in parts.items() for name in own}
    path.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


# ------------------------------------------------------------------------------------------------ no files


def no_file(path: Path, random) -> str:
    """In the place of a file something that is none, or none that can be read; what it is."""
    path.unlink()
    kind = random.choice(["gone", "folder", "pipe", "loop", "nowhere", "zeros", "null", "empty"])
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "nowhere":
        path.symlink_to("nowhere/at/all")
    elif kind == "zeros":
        path.symlink_to("/dev/zero")
    elif kind == "null":
        path.symlink_to("/dev/null")
    elif kind == "empty":
        path.write_bytes(b"")
    return kind
