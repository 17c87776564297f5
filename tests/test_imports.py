"""The plan of the house, read from the code: which file may import which.

    1  sppo.py   engine/        2  model.py   data.py        3  generate.py   prefmodel.py
    4  judges/                  5  train.py   evaluate/      6  plan.py   toy/   real/   benchmarks/

A room (a folder, or a file at the top) imports itself and rooms of lower floors; tests import what they like.
"""

import ast
import functools
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

FLOORS = (
    ("sppo", "engine"),
    ("model", "data"),
    ("generate", "prefmodel"),
    ("judges",),
    ("train", "evaluate"),
    ("plan", "toy", "real", "benchmarks"),
    ("tests",),
)
FLOOR = {room: number for number, floor in enumerate(FLOORS, 1) for room in floor}
PEERS = {"transformers", "trl", "peft", "lm_eval", "mistral_common", "scipy"}  # to compare with


# ------------------------------------------------------------------------------------------------ reading the code


def modules_of(root):
    """{dotted name: file} of every module below a folder; a package has the name of its folder."""
    modules = {}
    for room in FLOOR:
        for file in [root / f"{room}.py", *(root / room).rglob("*.py")]:
            if file.is_file():
                parts = file.relative_to(root).with_suffix("").parts
                modules[".".join(parts).removesuffix(".__init__")] = file
    return modules


def imports_of(name, file, modules):
    """(line, module, what is taken from it or None) of every import of a module, those in functions included."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:  # a relative import
                package = name.split(".")[: -node.level]
                source = ".".join([*package, source]).strip(".")
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                if inner in modules:  # from engine import files
                    yield node.lineno, inner, None
                else:
                    yield node.lineno, source, alias.name


@functools.cache
def defined_in(file):
    """The names that a module itself binds at its top: functions, classes and variables, but no imports."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif not isinstance(node, ast.Import | ast.ImportFrom):
            stored = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
            names |= {n.id for n in stored if isinstance(n.ctx, ast.Store)}
    return names


# ------------------------------------------------------------------------------------------------ the rules


def refused(importer, imported, taken, modules, root):
    """What is wrong with an import, or None."""
    room = importer.split(".")[0]
    other = imported.split(".")[0]

    if room == "tests":
        return None
    if room != "benchmarks" and other in PEERS:
        return "a package to compare with"
    if room == "sppo" and other != "torch" and other not in sys.stdlib_module_names:
        return "sppo.py imports torch and the standard library only"

    if other not in FLOOR:
        strange = (root / f"{other}.py").is_file() or (root / other).is_dir()
        return "it has no floor in the plan of the house" if strange else None
    if room != other and FLOOR[other] >= FLOOR[room]:
        return f"{other} is not on a lower floor than {room}"

    kept = imported in ("judges.human", "judges.llm", "judges.pairrm") and importer != "judges.load"
    if kept and not (imported == "judges.pairrm" and FLOOR[room] == 6):
        return "only judges/load.py imports it"
    if taken and imported in modules and taken not in defined_in(modules[imported]):
        return f"{taken} is not defined there"
    return None


def violations(root):
    """A line of text for each import below a folder that the plan of the house does not allow."""
    modules = modules_of(root)
    found = []
    for name, file in modules.items():
        for line, imported, taken in imports_of(name, file, modules):
            if reason := refused(name, imported, taken, modules, root):
                found.append(f"{file.relative_to(root)}:{line}: {imported}: {reason}")
    return found


def test_every_import_is_allowed_by_the_plan_of_the_house():
    assert violations(ROOT) == []


# ------------------------------------------------------------------------------------------------ the rules see what they should

HOUSE = {
    "sppo.py": "import math\nimport torch\nfrom torch import nn\n\ndef sppo_loss(): ...\n",
    "engine/__init__.py": "",
    "engine/files.py": "import json\nSIZE = 1\n\ndef read_json(): ...\n",
    "engine/checkpoint.py": "from engine.files import SIZE, read_json\n",
    "model.py": "from engine.files import read_json\n\nclass Transformer: ...\n",
    "data.py": "import engine.files\n",
    "generate.py": "import model\n",
    "judges/base.py": "from sppo import sppo_loss\n\nclass Judge: ...\n",
    "judges/human.py": "from judges.base import Judge\n",
    "judges/pairrm.py": "from judges.base import Judge\n\nclass PairRM: ...\n",
    "judges/load.py": "from judges import human\nfrom judges.pairrm import PairRM\n",
    "train.py": "from model import Transformer\n\ndef main(): ...\n",
    "evaluate/__main__.py": "from judges.base import Judge\n",
    "helpers.py": "import tests  # nobody's, as long as nobody imports it\n",
    "plan.py": "from judges.pairrm import PairRM\nfrom train import main\n",
    "toy/lab.py": "import train\n",
    "toy/rps.py": "import toy.lab\n",
    "benchmarks/peers.py": "import transformers\nimport judges.pairrm\n",
    "tests/test_all.py": "import scipy\nimport plan, toy.rps, judges.human\n",
}


def build(root, files):
    for name, source in files.items():
        path = Path(root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")


def test_a_house_in_order_has_no_violation(tmp_path):
    build(tmp_path, HOUSE)
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "line", "reason"),
    [
        ("sppo.py", "import numpy", "torch and the standard library only"),
        ("sppo.py", "from engine.files import SIZE", "torch and the standard library only"),
        ("engine/files.py", "import sppo", "not on a lower floor"),
        ("engine/files.py", "from model import Transformer", "not on a lower floor"),
        ("engine/files.py", "def f():\n    from ..data import x", "not on a lower floor"),
        ("data.py", "import model", "not on a lower floor"),
        ("generate.py", "from judges import base", "not on a lower floor"),
        ("generate.py", "def f():\n    import judges.load", "not on a lower floor"),
        ("train.py", "import evaluate.__main__", "not on a lower floor"),
        ("evaluate/__main__.py", "from train import main", "not on a lower floor"),
        ("train.py", "def f():\n    if f:\n        import toy.rps", "not on a lower floor"),
        ("plan.py", "from toy import rps", "not on a lower floor"),
        ("benchmarks/peers.py", "import toy.lab", "not on a lower floor"),
        ("toy/lab.py", "from tests import test_all", "not on a lower floor"),
        ("judges/base.py", "from .pairrm import PairRM", "only judges/load.py"),
        ("train.py", "from judges.human import Judge", "only judges/load.py"),
        ("train.py", "from judges.llm import LLM", "only judges/load.py"),
        ("plan.py", "import judges.human", "only judges/load.py"),
        ("model.py", "import transformers.models", "to compare with"),
        ("toy/lab.py", "def f():\n    from scipy.stats import norm", "to compare with"),
        ("generate.py", "from model import read_json", "read_json is not defined there"),
        ("train.py", "import helpers", "it has no floor"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, line, reason):
    build(tmp_path, HOUSE)
    with open(tmp_path / file, "a", encoding="utf-8") as planted:
        planted.write(line + "\n")
    (found,) = violations(tmp_path)
    assert found.startswith(f"{file}:") and reason in found


def test_pip_installs_no_module_of_ours():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings == {"packages": [], "py-modules": []}
