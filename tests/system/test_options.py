"""The command, the Python function and the page of options say the same."""

import inspect
import os
from dataclasses import fields
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import prep
from prep.cli import main
from prep.preprocess.options import CovarianceOptions, DecomposeOptions

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
VERBS = {name: getattr(prep, name) for name in main.commands}
OF_COMMAND = {"quiet", "as_json"}  # how a result is printed
OF_FILE = {"ranks": {"output", "overwrite"}}  # where it is written
OF_PYTHON = {"batches", "mask", "distributed"}  # what a command line cannot say, or finds out by itself
HEAD = """# Commands

Written by `PREP_WRITE_DOCS=1 pytest tests/system/test_options.py` from what `--help` prints.
"""


def defaults(function) -> dict:
    return {name: given.default for name, given in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize("name", VERBS)
def test_a_command_takes_what_its_function_takes(name):
    """Every option is a parameter with the same default, and the other way round."""
    wanted = {key: value for key, value in defaults(VERBS[name]).items() if key not in OF_PYTHON}
    options = {option.name: option for option in main.commands[name].params}
    assert options.keys() - OF_COMMAND - OF_FILE.get(name, set()) == wanted.keys() - OF_COMMAND
    for key in wanted.keys() & options.keys():
        option, default = options[key], wanted[key]
        if isinstance(option, click.Option) and default is not inspect.Parameter.empty:
            shown = option.get_default(click.Context(main.commands[name]))
            shown = shown if isinstance(shown, (str, int, float, tuple)) else None  # click has a mark for none
            assert (shown or None) == (default or None), key


@pytest.mark.parametrize(
    ("verb", "options"), [(prep.covariance, CovarianceOptions), (prep.decompose, DecomposeOptions)]
)
def test_the_options_object_has_the_function_s_parameters(verb, options):
    of_object = {field.name: field.default for field in fields(options) if field.init}
    of_verb = defaults(verb)
    assert of_object.keys() == of_verb.keys()
    for name, value in of_verb.items():
        if value is not inspect.Parameter.empty:
            assert of_object[name] == value, name


def page() -> str:
    """What every command prints for --help, in pipeline order."""
    text = HEAD
    for name in ("", *main.commands):
        shown = CliRunner().invoke(main, [*name.split(), "--help"], prog_name="prep", terminal_width=110)
        text += f"\n## {f'prep {name}'.strip()}\n\n```\n{shown.output.rstrip()}\n```\n"
    return text


def test_the_page_is_current():
    """Stale: run PREP_WRITE_DOCS=1 pytest tests/system/test_options.py."""
    if os.environ.get("PREP_WRITE_DOCS"):
        PAGE.write_text(page())
    assert PAGE.read_text() == page()
