"""Claims about --help and --version (engine/command.py): they look alike, fit the page, and change nothing about parsing."""

import argparse
import os
import subprocess
import sys
import tomllib
from dataclasses import fields

import pytest
from conftest import ROOT

import train
from engine.command import GROUP, GROUPS, VERSION, Parser, add_flags, flag
from evaluate import __main__ as evaluate
from prefmodel import JudgeConfig
from real.instructions import PromptConfig

SETTINGS = [
    train.TrainConfig, JudgeConfig, evaluate.Sampling, evaluate.Outputs, evaluate.WinRate, evaluate.Distill, PromptConfig,
]  # fmt: skip


def parser_of(settings, kind=Parser, **options):
    parser = kind("a_command.py", **options)
    add_flags(parser, settings)
    return parser


def help_of(parser, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    return parser.format_help()


def parts(text):
    """{title: the first word of each line} of a help text."""
    found = {}
    for block in text.split("\n\n"):
        title, *lines = block.splitlines()
        found[title.strip(":")] = [line.split()[0].strip(",") for line in lines if line.split()]
    return found


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_setting_stands_in_its_part_and_no_other(settings, monkeypatch):
    shown = parts(help_of(parser_of(settings), monkeypatch, 100))
    for field in fields(settings):
        places = [title for title, words in shown.items() if flag(field.name) in words]
        assert places == [GROUP.get(field.name, "options")]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_default_is_shown_where_there_is_one(settings, monkeypatch):
    text = " ".join(help_of(parser_of(settings), monkeypatch, 100).split())
    for field in fields(settings):
        told = " ".join(field.metadata["help"].split())
        assert told + ("" if field.default in ("", None) else f" [{field.default}]") in text


def test_a_name_is_in_one_part_only():
    names = [name for names in GROUPS.values() for name in names.split()]
    assert len(names) == len(set(names))
    assert list(GROUPS) == ["files", "model", "sampling", "judging", "learning", "machine"]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("columns", "widest"), [(300, 100), (80, 80)])
def test_it_fits_the_page_and_the_terminal(settings, columns, widest, monkeypatch):
    lines = help_of(parser_of(settings), monkeypatch, columns).splitlines()
    assert max(map(len, lines)) <= widest


@pytest.mark.parametrize("options", [{}, {"argument_default": argparse.SUPPRESS}])
def test_parsing_is_that_of_argparse(options):
    given = ["--eta", "3", "--reuse-prompts", "--no-recompute", "--loss", "dpo", "--policy", "p", "--lr", "1e-3"]
    ours = parser_of(train.TrainConfig, **options).parse_args(given)
    theirs = parser_of(train.TrainConfig, argparse.ArgumentParser, **options).parse_args(given)
    assert vars(ours) == vars(theirs)


def test_the_first_line_has_what_must_be_given_and_errors_are_short(monkeypatch, capsys):
    parser = Parser("python -m evaluate")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("judge")
    command.add_argument("run_folder", metavar="RUN")
    command.add_argument("--pairs", required=True)
    command.add_argument("--out")
    add_flags(command, JudgeConfig)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["judge", "here", "--pairs", "there", "--epochs", "many"])
    assert stopped.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage == "usage: python -m evaluate judge --pairs PAIRS RUN [flags]"
    assert error == "python -m evaluate judge: error: argument --epochs: invalid int value: 'many'"
    assert parts(help_of(command, monkeypatch, 100))["files"][:2] == ["--pairs", "--out"]


def test_the_version_is_that_of_the_project(capsys):
    with pytest.raises(SystemExit) as stopped:
        Parser("a_command.py").parse_args(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"SPPO {VERSION}, Python {sys.version.split()[0]}, torch ")

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = [line for line in (ROOT / "CITATION.cff").read_text().splitlines() if line.startswith("version: ")]
    assert project["version"] == VERSION and cited == [f"version: {VERSION}"]


def test_no_terminal_makes_it_fail():
    """One without Greek letters, and one that is closed before the end."""
    code = "from engine.command import Parser, add_flags; from train import TrainConfig; from sppo import setting\n"
    code += "parser = Parser('x', description='η' * 100_000); add_flags(parser, TrainConfig); parser.parse_args(['--help'])"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and r"step size \u03b7" in done.stdout and not done.stderr

    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.read(10)
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 0


def test_every_command_has_this_help_and_these_bars():
    """No file makes a parser or a bar of its own kind."""
    for file in ROOT.rglob("*.py"):
        if file.parts[len(ROOT.parts)] not in ("tests", "out", ".venv") and file.name not in ("command.py", "progress.py"):
            text = file.read_text(encoding="utf-8")
            assert "ArgumentParser(" not in text and "from tqdm" not in text, file
