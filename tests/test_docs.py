"""Claims about README.md, CONTRIBUTING.md and docs/: their commands run, and their links lead somewhere.

A page is walked from its first command to its last, in a folder that has what the page speaks of: a policy, prompts and so
on, but of the small world for the debugger, and with flags added that keep each command short. Commands that cannot run
here are named in NOT_RUN, each with the reason.
"""

import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from string import Template

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_run
from refresh_map import PAGES

from engine.files import write_json, write_lines
from prefmodel import PreferenceModel
from toy.debug import build_debugging
from toy.text_game import STRENGTHS, SUMS, draw_pairs

TEXT = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}

NOT_RUN = {  # the beginning of a command: why no test runs it
    "make demo": "2 minutes; tests/test_text_game.py and tests/test_train.py run its parts",
    "make toys": "4 minutes; each script has tests of its own",
    "make real": "half an hour; tests/test_instructions.py runs it on a tiny model",
    "make test": "it is what runs this",
    "make bench": "23 minutes; tests/test_benchmarks.py runs its parts",
    "make map": "it edits the pages; tests/test_readme.py compares the same lines",
    "source .venv/bin/activate": "the tests already run inside of it",
    "python -m pytest": "it is what runs this",
    "pip install pre-commit": "it installs from the package registry",
    "pre-commit": "it clones the hooks from GitHub",
    "python -m toy.rps": "under a minute; tests/test_rps.py",
    "python -m toy.tabular": "under a minute; tests/test_tabular.py",
    "python -m toy.likelihood": "under a minute; tests/test_likelihood.py",
    "python -m toy.ablations": "under a minute; tests/test_ablations.py",
    "python -m toy.judges": "under a minute; tests/test_judges.py",
    "python -m toy.relatives": "under a minute; tests/test_relatives.py",
    "python -m toy.arrival": "under a minute; tests/test_arrival.py",
    "python train.py --policy out/first/round-40/policy": "no first run has 40 rounds here; tests/test_arrival.py",
    "make attack": "two minutes; tests/test_attack.py runs a share of it",
    "make numbers": "hours; tests/test_numbers.py compares the records with the pages",
    "python -m toy.social_choice": "its votes are not shipped; tests/test_social_choice.py",
    "export OPENAI_API_KEY=...": "it is a secret",
    """python train.py --judge 'llm:{"url":""": "needs a server; tests/test_llm_judge.py has one",
    """python -m evaluate judge --judge 'llm:{"url":""": "needs a server; tests/test_llm_judge.py has one",
    "python -m venv out/llama": "it installs a server from the package registry",
    "out/llama/bin/pip": "it installs from the package registry",
    "out/llama/bin/python": "it is not installed",
    "python -m zipfile": "needs a download",
    "awk": "the votes are not shipped",
    "python -m toy.stories": "needs a model that writes stories; tests/test_stories.py",
    "python -m toy.text_game build": "half a minute of training; tests/test_text_game.py",
    "python -m real.instructions": "half an hour; tests/test_instructions.py runs it on a tiny model",
    "python -m real.ifeval": "needs the real model; tests/test_ability.py runs it on a tiny one",
    "python -m real.ability": "needs the real model; tests/test_ability.py runs it on a tiny one",
    "python -m real.judge": "an hour; tests/test_real_judge.py runs it on a tiny model",
    "python benchmarks/score_ifeval.py": "needs lm_eval; tests/test_ability.py",
    "python benchmarks/gpu.py": "needs a GPU; tests/test_gpu_benchmark.py runs it on a CPU",
    "python benchmarks/neighbour.py": "needs the real model; tests/test_threads.py runs it on a tiny one",
    "python benchmarks/real.py": "needs the real model; tests/test_benchmarks_real.py runs it on a tiny one",
    "torchrun": "needs eight GPUs; tests/test_distributed.py has two and three processes",
    "python -m toy.debug --rounds 1 --loss hinge": "after an edit; tests/test_change_one_thing.py makes it",
    """python -m toy.debug --rounds 1 --judge 'short:{"scale":""": "after an edit; tests/test_change_one_thing.py makes it",
    "python digits.py": "after an edit; tests/test_change_one_thing.py makes it",
    "python compare.py": "after an edit; tests/test_change_one_thing.py makes it",
    "pip install pyarrow": "it installs from the package registry",
    "python - train.parquet": "needs pyarrow",
    "hf": "needs a download",
    "alpaca_eval": "needs a key, and is not installed",
    "vllm": "needs a GPU, and is not installed",
    "lm_eval": "needs a download, and is not installed",
}

# Flags that are added to a command: short rows, for which the small world has no chat format.
SHORT = "--template plain --max-new-tokens 4 --device cpu"
ADDED = {
    "python train.py": f"{SHORT} --samples 2",
    "python train.py --preset tiny": f"{SHORT} --samples 2 --rounds 2 --epochs 1",
    "python plan.py": SHORT,
    "python prefmodel.py train": "--template plain --epochs 2",
    "python -m evaluate outputs": SHORT,
    "python -m evaluate winrate": SHORT,
    "python -m evaluate distill": f"{SHORT} --samples 4",
}


# ------------------------------------------------------------------------------------------------ reading a page


def blocks(text):
    """(language, content) of every block of a page; one that is indented, not fenced, counts as commands."""
    fenced = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
    indented = re.findall(r"(?<=\n\n)(?: {4}.*\n)+", fenced.sub("", text))
    return fenced.findall(text) + [("sh", block) for block in indented]


def commands(text):
    """The shell commands of a page, in order: continued lines joined, here-documents whole, variables put in."""
    found, variables = [], {}
    shell = [block for kind, block in blocks(text) if kind == "sh"]
    lines = iter("\n".join(shell).splitlines())
    for line in map(str.strip, lines):
        while line.endswith("\\"):
            line = line[:-1] + next(lines).strip()

        if start := re.search(r"<<'(\w+)'$", line):
            while not line.endswith("\n" + start[1]):
                line += "\n" + next(lines)
            found.append(line)
        elif assigned := re.fullmatch(r'(\w+)="?([^"]*)"?', line):
            variables[assigned[1]] = Template(assigned[2]).substitute(variables)
        elif line and not line.startswith("#"):
            found.append(Template(line).substitute(variables))
    return found


def longest_match(command, beginnings):
    """The longest of these beginnings, word by word, that a command has; None if it has none."""
    words = command.split()
    fitting = [start for start in beginnings if words[: len(start.split())] == start.split()]
    return max(fitting, key=len, default=None)


COMMANDS = {page: commands(text) for page, text in TEXT.items()}


# ------------------------------------------------------------------------------------------------ what the pages speak of


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A folder with everything that the commands of the pages take for granted."""
    folder = tmp_path_factory.mktemp("template")
    world = folder / "out/demo/world"
    build_debugging(world)
    generator = torch.Generator().manual_seed(0)
    judge = PreferenceModel.from_backbone(world / "policy", generator, template="plain")
    judge.save_pretrained(world / "judge")
    tiny_run(world, folder / "out/demo/run", judge="toy.text_game:oracle")

    for name in ("my-model", "mistral"):
        shutil.copytree(world / "policy", folder / name)
    shutil.copytree(world, folder / "out/debug-world")  # what toy.debug would build
    shutil.copytree(world / "judge", folder / "pairrm")
    write_lines(world / "prompts.jsonl", [{"prompt": prompt} for prompt in list(SUMS)[:6]])
    shutil.copy(world / "prompts.jsonl", folder)
    for name in ("pairs.jsonl", "held-out.jsonl", "out/soft.jsonl"):
        write_lines(folder / name, draw_pairs(60, STRENGTHS, generator))

    rows = [{"instruction": prompt, "output": "7.", "generator": "people"} for prompt in SUMS]
    write_json(folder / "outputs.json", rows)
    write_lines(folder / "ultrafeedback/part.jsonl", rows[:6] + rows[:1])
    write_json(folder / "alpaca/alpaca_eval.json", rows[:3])
    write_alpaca_eval(folder)
    return folder


def write_alpaca_eval(folder):
    """What AlpacaEval leaves, of made-up numbers."""
    random = np.random.default_rng(0)
    rows = [
        {
            "instruction": str(number),
            "output_1": "a" * int(random.integers(1, 90)),
            "output_2": "b" * int(random.integers(1, 90)),
            "generator_2": "sppo-3",
            "preference": random.uniform(1, 2),
        }
        for number in range(40)
    ]
    for name in ("annotations.json", "weighted_alpaca_eval_gpt4_turbo/annotations.json"):
        write_json(folder / name, rows)
    write_json(folder / "difficulty.json", random.normal(size=40).tolist())
    columns = {"tanh_std_delta_len": (-1, 1), "instruction_difficulty": (-2, 2), "pref": (1, 2)}
    gamed = {name: random.uniform(*limits, 80).tolist() for name, limits in columns.items()}
    write_json(folder / "gamed.json", gamed)


# ------------------------------------------------------------------------------------------------ running a command


def run(command, page, monkeypatch):
    """Run a command in the current folder: ours in this process, others in a shell. Returns its exit code."""
    if "<<" in command:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(["bash", "-c", command], env=os.environ | {"PATH": path}).returncode
    if longest_match(command, ["python -m pdb"]):
        return debug(command, page)

    words = shlex.split(command, comments=True)
    assert words[0] == "python", f"{command}: neither run nor named in NOT_RUN"
    words += ADDED.get(longest_match(command, ADDED), "").split()
    if words[1] == "-m":
        name, *arguments = words[2:]
    else:
        name, *arguments = words[1:]
    module = importlib.import_module("evaluate.__main__" if name == "evaluate" else name.removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n" * 1000))  # for the judge at the terminal
    return module.main()


def debug(command, page):
    """Start the debugger and type what the page types: all of it must be understood."""
    typed = re.findall(r"^\(Pdb\) (.*)$", TEXT[page], re.M)
    words = [sys.executable, *shlex.split(command)[1:]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(words, input="\n".join([*typed, "q"]), env=environment, capture_output=True, text=True)
    assert "***" not in result.stdout, result.stdout  # how pdb answers what it does not know
    for place in ("sppo_round()", "sppo_loss()"):
        assert place in result.stdout, result.stdout + result.stderr
    return result.returncode


@pytest.mark.parametrize("page", [page for page in COMMANDS if COMMANDS[page]])
def test_every_command_of_a_page_runs(page, template, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "here"
    shutil.copytree(template, folder)
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, "my_rule", raising=False)  # another page's
    for command in COMMANDS[page]:
        if longest_match(command, NOT_RUN) is None:
            code = run(command, page, monkeypatch)
            assert code == 0, f"{page}: {command}\n{capfd.readouterr().err}"


# ------------------------------------------------------------------------------------------------ the other claims


def test_what_is_not_run_is_on_a_page():
    named = {longest_match(command, NOT_RUN) for row in COMMANDS.values() for command in row}
    assert named - {None} == set(NOT_RUN)


def test_a_command_that_is_neither_run_nor_named_fails(monkeypatch):
    for command in ("accelerate launch train.py", "python new.py --quick"):
        assert longest_match(command, NOT_RUN) is None
        with pytest.raises((AssertionError, ModuleNotFoundError)):
            run(command, "README.md", monkeypatch)


def test_every_target_of_make_that_a_page_names_exists():
    makefile = (ROOT / "Makefile").read_text()
    every = [command for row in COMMANDS.values() for command in row]
    targets = {command.split()[1] for command in every if command.startswith("make ")}
    assert targets and all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


def test_pre_commit_has_the_ruff_of_make_test():
    (pinned,) = re.findall(r"^ruff==(.*)$", (ROOT / "requirements-dev.txt").read_text(), re.M)
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"ruff-pre-commit\n +rev: v(\S+)", hooks) == [pinned]


def test_commands_are_found_in_fenced_and_indented_blocks():
    page = """Text.

```sh
W=out
python a.py --to $W \\
    --more    # why
cat > x <<'EOF'
$W
EOF
```

    make demo

- a list
  continued
"""
    heredoc = "cat > x <<'EOF'\n$W\nEOF"
    assert commands(page) == ["python a.py --to out --more    # why", heredoc, "make demo"]


@pytest.mark.parametrize("page", TEXT)
def test_every_block_says_its_language(page):
    for kind, block in blocks(TEXT[page]):
        assert kind in ("sh", "text", "python", "diff"), block
        if kind == "python":
            compile(block, page, "exec")


@pytest.mark.parametrize("page", TEXT)
def test_every_link_and_figure_is_there(page):
    text = re.sub(r"^```.*?^```$", "", TEXT[page], flags=re.M | re.S)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in links:
        file, _, section = link.partition("#")
        path = ((ROOT / page).parent / file) if file else (ROOT / page)
        assert path.exists(), link
        assert path.suffix != ".md" or not section or section in sections(path), link


def sections(path):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_pages_show_every_figure():
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", "".join(TEXT.values()))
    figures = {path.name for path in (ROOT / "figures").iterdir()} | {"side_by_side.png", "real.png", "measure.png", "report.png"}
    assert {Path(path).name for path in shown} == figures
