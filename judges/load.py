"""Build a judge from the value of --judge.

    DIR                                   a judge of `prefmodel.py train`, or a PairRM checkpoint
    module:function  or  module:Class     a rule, an API: (prompt, responses) -> K × K numbers;
                                          mine.py in the working folder is the module `mine`
    llm:{"url": ..., "model": ...}        a language model behind an OpenAI-compatible server
    human:{"votes": "mine.jsonl"}         you, at the terminal
    ensemble:{"judges": [...], "weights": [0.8, 0.2]}     the weighted mean of other judges
    transitive:{"judge": ...}             what the authors' code makes of another judge

Arguments are a JSON object after the last name; module:function takes them too, after a second
colon. A new kind of judge is a file in this folder and a line in KINDS.
"""

import hashlib
import importlib
import importlib.util
import inspect
import json
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import torch

from engine.files import fingerprint, read_json
from engine.terminal import printable
from judges.base import RETRIES, Ensemble, JudgeError, Rule, Transitive, checked_tables, described
from judges.human import Human
from judges.llm import LLM
from judges.pairrm import PairRM
from prefmodel import PreferenceModel

PROJECT = Path(__file__).resolve().parent.parent
KINDS = {"llm": LLM, "human": Human, "ensemble": Ensemble, "transitive": Transitive}


def load_judge(
    spec: str, device: str | None = None, dtype: str | None = None, retries: int = RETRIES
):
    """The judge that `spec` names. FileNotFoundError or ValueError says what is wrong with it.

    `retries`: how often it is asked again after an error that may pass. Example:
    'toy.text_game:oracle:{"strengths": [0.9, 0.9, 0.8]}'.
    """
    judge = make_judge(spec, device, dtype, retries)

    # Somebody's object may take no attributes; then the default number holds.
    with suppress(AttributeError):
        judge.retries = retries
    return judge


def is_folder(spec: str) -> bool:
    """Whether a word is a folder. JSON arguments may be longer than any file name is allowed to be,
    which is an error of the file system's.
    """
    try:
        return Path(spec).is_dir()
    except OSError:
        return False


def make_judge(spec: str, device, dtype, retries: int):
    if is_folder(spec):
        published = read_json(Path(spec) / "config.json").get("model_type") == "deberta-v2"
        kind = PairRM if published else PreferenceModel
        return kind.from_pretrained(spec, dtype, device)

    module, name, arguments = split_spec(spec)
    shown = printable(spec, 80)  # a long rubric would hide the message
    if module is None:
        arguments = load_members(arguments, shown, device, dtype, retries)
        return build(KINDS[name], arguments, shown)

    # An instance of a class that has `preferences_many` is a judge, anything else a rule.
    found = find(module, name, shown)
    if isinstance(found, type):
        # A class gets these two if it asks for them.
        places = {"device": device, "dtype": dtype}
        wanted = places.keys() & inspect.signature(found).parameters
        found = build(found, {key: places[key] for key in wanted} | arguments, shown)
        arguments = {}
    if hasattr(found, "preferences_many"):
        return found
    return make_rule(getattr(found, "preferences", found), arguments, shown)


def split_spec(spec: str) -> tuple[str | None, str, dict]:
    """'module:function:{"key": value}' -> module, function, arguments; no module for KINDS."""
    shown = printable(spec, 80)
    word, _, text = spec.partition(":")
    if word in KINDS:
        module = None
        name = word
    else:
        module = word
        name, _, text = text.partition(":")
        if not module or not name:
            expected = f"not of the form module:function (or {', '.join(KINDS)})"
            raise FileNotFoundError(f"judge {shown}: no such folder, and {expected}")

    # Whatever is no JSON object gets one message.
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        expected = "expected keyword arguments as a JSON object after the colon"
        raise ValueError(f"judge {shown}: {expected}")
    return module, name, arguments


def judge_fingerprint(spec: str) -> str:
    """A hash of what a loaded judge is made of: weights, or the source of a rule, and arguments."""
    if is_folder(spec):
        return fingerprint(spec)

    # Members are compared by what they are, too.
    module, name, arguments = split_spec(spec)
    if "judge" in arguments:
        arguments["judge"] = judge_fingerprint(arguments["judge"])
    if "judges" in arguments:
        arguments["judges"] = [judge_fingerprint(member) for member in arguments["judges"]]
    loaded = sys.modules.get(module and loaded_as(module))
    source = getattr(loaded, "__file__", None)
    made_of = json.dumps([name, arguments, fingerprint(source)], sort_keys=True)
    return hashlib.sha256(made_of.encode()).hexdigest()[:16]


def load_members(arguments: dict, spec: str, device, dtype, retries: int) -> dict:
    """The arguments of `ensemble` and `transitive`, with the judges loaded that they name."""
    loaded = dict(arguments)
    if "judge" in arguments:
        member = arguments["judge"]
        if not isinstance(member, str):
            raise ValueError(f"judge {spec}: judge is {member!r}, expected a string")
        loaded["judge"] = load_judge(member, device, dtype, retries)

    if "judges" in arguments:
        members = arguments["judges"]
        if not isinstance(members, list) or not all(isinstance(one, str) for one in members):
            expected = "expected a list of checkpoint folders and module:function"
            raise ValueError(f"judge {spec}: judges are {members!r}, {expected}")
        loaded["judges"] = [load_judge(member, device, dtype, retries) for member in members]
    return loaded


def loaded_as(module: str) -> str:
    """The name in sys.modules of the module that a judge names.

    A file of the user's is there by its path: it may well be called data.py, as one of ours is.
    """
    file = Path(module.removesuffix(".py") + ".py").resolve()
    if not file.is_file():
        return module
    return file.stem if file.parent == PROJECT else str(file)


def load_module(name: str) -> ModuleType:
    """The module of this name in sys.modules, loaded if it is not there."""
    if name in sys.modules:
        return sys.modules[name]
    if not name.endswith(".py"):
        return importlib.import_module(name)

    recipe = importlib.util.spec_from_file_location(name, name)
    module = sys.modules[name] = importlib.util.module_from_spec(recipe)
    try:
        recipe.loader.exec_module(module)
    except BaseException:  # half a module is none
        del sys.modules[name]
        raise
    return module


def find(module: str, name: str, spec: str):
    """The object `name` of a module; the folder that the command is called from is searched too."""
    sys.path.insert(0, "")
    try:
        return getattr(load_module(loaded_as(module)), name)
    except (ImportError, AttributeError, TypeError, SyntaxError) as error:
        raise ValueError(f"judge {spec}: {error}") from None
    except (Exception, SystemExit) as error:
        raise ValueError(f"judge {spec}: {described(error)}") from error
    finally:
        sys.path.remove("")


def build(kind: type, arguments: dict, spec: str):
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ValueError(f"judge {spec}: {printable(str(error))}") from None
    except (ValueError, OSError):  # sentences already
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"judge {spec}: {described(error)}") from error


def make_rule(function, arguments: dict, spec: str) -> Rule:
    """A Rule. ValueError, before it is first asked, if it does not take such arguments."""
    try:
        inspect.signature(function).bind("prompt", ["response"], **arguments)
    except (TypeError, ValueError) as error:
        asked = f"a prompt, a list of responses and {arguments}"
        raise ValueError(f"judge {spec}: cannot be called with {asked}: {error}") from None
    return Rule(function, **arguments)


def probe(judge, name: str, prompt: str) -> None:
    """Have two short responses judged, so that a judge that cannot is known before anything is
    sampled. A person is not asked. JudgeError says what is wrong.
    """
    if isinstance(judge, Ensemble):
        for member in judge.judges:
            probe(member, name, prompt)
    elif isinstance(judge, Transitive):
        probe(judge.judge, name, prompt)
    elif not isinstance(judge, Human):
        # A rule may draw random numbers: those of the run stay where they are.
        with torch.random.fork_rng(devices=[]):
            try:
                checked_tables(judge, [prompt], [["yes", "no"]], name)
            except JudgeError as error:
                raise JudgeError(f"before the first response: {error}") from error
