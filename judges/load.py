"""Build a judge from the value of --judge.

    DIR                                   a judge of `prefmodel.py train`, or a PairRM checkpoint
    module:function  or  module:Class     a rule, an API: (prompt, responses) -> K × K numbers
    human:{"votes": "mine.jsonl"}         you, at the terminal
    ensemble:{"judges": [...], "weights": [0.8, 0.2]}     the weighted mean of other judges
    transitive:{"judge": ...}             what the authors' code makes of another judge

Arguments are a JSON object after the last name; module:function takes them too, after a second
colon. A new kind of judge is a file in this folder and a line in KINDS.
"""

import importlib
import inspect
import json
import sys
from pathlib import Path

from engine.files import read_json
from judges.base import Ensemble, Rule, Transitive
from judges.human import Human
from judges.pairrm import PairRM
from prefmodel import PreferenceModel

KINDS = {"human": Human, "ensemble": Ensemble, "transitive": Transitive}


def load_judge(spec: str, device: str | None = None, dtype: str | None = None):
    """The judge that `spec` names. FileNotFoundError or ValueError says what is wrong with it.

    Example: 'toy.text_game:oracle:{"strengths": [0.9, 0.9, 0.8]}'.
    """
    if Path(spec).is_dir():
        published = read_json(Path(spec) / "config.json").get("model_type") == "deberta-v2"
        kind = PairRM if published else PreferenceModel
        return kind.from_pretrained(spec, dtype, device)

    module, name, arguments = split_spec(spec)
    if module is None:
        return build(KINDS[name], load_members(arguments, spec, device, dtype), spec)

    # An instance of a class that has `preferences_many` is a judge, anything else a rule.
    found = find(module, name, spec)
    if isinstance(found, type):
        # A class gets these two if it asks for them.
        places = {"device": device, "dtype": dtype}
        wanted = places.keys() & inspect.signature(found).parameters
        found = build(found, {key: places[key] for key in wanted} | arguments, spec)
        arguments = {}
    if hasattr(found, "preferences_many"):
        return found
    return make_rule(getattr(found, "preferences", found), arguments, spec)


def split_spec(spec: str) -> tuple[str | None, str, dict]:
    """'module:function:{"key": value}' -> module, function, arguments; no module for KINDS."""
    word, _, text = spec.partition(":")
    if word in KINDS:
        module = None
        name = word
    else:
        module = word
        name, _, text = text.partition(":")
        if not module or not name:
            expected = f"not of the form module:function (or {', '.join(KINDS)})"
            raise FileNotFoundError(f"judge {spec}: no such folder, and {expected}")

    # Whatever is no JSON object gets one message.
    try:
        arguments = json.loads(text or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        expected = "expected keyword arguments as a JSON object after the colon"
        raise ValueError(f"judge {spec}: {expected}")
    return module, name, arguments


def load_members(arguments: dict, spec: str, device, dtype) -> dict:
    """The arguments of `ensemble` and `transitive`, with the judges loaded that they name."""
    loaded = dict(arguments)
    if "judge" in arguments:
        member = arguments["judge"]
        if not isinstance(member, str):
            raise ValueError(f"judge {spec}: judge is {member!r}, expected a string")
        loaded["judge"] = load_judge(member, device, dtype)

    if "judges" in arguments:
        members = arguments["judges"]
        if not isinstance(members, list) or not all(isinstance(one, str) for one in members):
            expected = "expected a list of checkpoint folders and module:function"
            raise ValueError(f"judge {spec}: judges are {members!r}, {expected}")
        loaded["judges"] = [load_judge(member, device, dtype) for member in members]
    return loaded


def find(module: str, name: str, spec: str):
    """The object `name` of a module; the folder that the command is called from is searched too."""
    sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, SyntaxError) as error:
        raise ValueError(f"judge {spec}: {error}") from None
    finally:
        sys.path.remove("")


def build(kind: type, arguments: dict, spec: str):
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ValueError(f"judge {spec}: {error}") from None


def make_rule(function, arguments: dict, spec: str) -> Rule:
    """A Rule. ValueError, before it is first asked, if it does not take such arguments."""
    try:
        inspect.signature(function).bind("prompt", ["response"], **arguments)
    except (TypeError, ValueError) as error:
        asked = f"a prompt, a list of responses and {arguments}"
        raise ValueError(f"judge {spec}: cannot be called with {asked}: {error}") from None
    return Rule(function, **arguments)
