"""The command line: help without heavy imports, exit codes, one line for an error."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mechmerge.cli import main as cli_main
from mechmerge.cli.common import show
from mechmerge.cli.main import COMMANDS, cli, main
from mechmerge.errors import GateRefused, InputError, MechmergeError, MissingError

HEAVY = ("torch", "transformers", "numpy", "mergekit", "lm_eval", "matplotlib", "pydantic", "huggingface_hub", "safetensors")
LIGHT_ENOUGH_FOR_A_COMMAND = {"numpy", "pydantic", "safetensors", "huggingface_hub"}


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)


def heavy_modules_after(*arguments: str) -> set[str]:
    """Heavy modules that are loaded once the command line has answered."""
    done = python(
        "import sys\nfrom mechmerge.cli.main import main\n"
        f"try: main({list(arguments)!r})\n"
        "except SystemExit as stop: assert stop.code == 0, stop.code\n"
        f"print('LOADED', *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


# -------------------------------------------------------------------------------------------------------------------- help
def test_top_level_help_lists_every_command_and_imports_nothing_heavy() -> None:
    assert heavy_modules_after("--help") == set()
    text = CliRunner().invoke(cli, ["--help"]).output
    for name, (_, help_text) in COMMANDS.items():
        assert name in text
        assert help_text.split(",")[0].split(":")[0][:20] in text


def test_the_check_for_heavy_modules_sees_them() -> None:
    done = python(f"import sys, numpy\nprint(*[name for name in {HEAVY!r} if name in sys.modules])")
    assert done.stdout.split() == ["numpy"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("Usage: cli " + name)
    module = importlib.import_module(f"mechmerge.cli.{COMMANDS[name][0]}")
    assert isinstance(module.command, click.Command)
    assert module.command.help
    for parameter in module.command.params:
        if isinstance(parameter, click.Option) and parameter.opts != ["--help"]:
            assert parameter.help or parameter.show_default, f"{name} {parameter.opts}"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help_imports_no_torch(name: str) -> None:
    assert heavy_modules_after(name, "--help") <= LIGHT_ENOUGH_FOR_A_COMMAND


@pytest.mark.parametrize("name", ["localize", "effects", "rounds"])
def test_help_names_the_built_in_behaviours(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from mechmerge.behaviors.schema import builtin_names

    with pytest.raises(SystemExit):
        main([name, "--help"])
    told = capsys.readouterr().out.partition("Built-in behaviours:")[2]
    assert told.replace(",", " ").split() == builtin_names()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from mechmerge import __version__

    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == f"mechmerge, version {__version__}"


# -------------------------------------------------------------------------------------------------------------- exit codes
@pytest.mark.parametrize("arguments", [["nonsense"], ["report"], ["report", "--nonsense"], ["report", "a", "b"]])
def test_wrong_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert "Traceback" not in captured.err


class Failing(click.Command):
    """A command that raises what it is given."""

    def __init__(self, error: BaseException) -> None:
        super().__init__("failing")
        self.error = error

    def invoke(self, ctx: click.Context) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("file.yaml", expected="a", found="b", fix="do c"), 2),
        (GateRefused("formats"), 3),
        (MissingError("the Hub"), 4),
        (MechmergeError("x"), 1),
        (RuntimeError("first line\nsecond line"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_are_one_line_on_stderr(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MECHMERGE_DEBUG", raising=False)
    monkeypatch.setattr(cli_main.LazyGroup, "get_command", lambda *_: Failing(error))
    with pytest.raises(SystemExit) as stop:
        main(["report"])
    captured = capsys.readouterr()
    line = captured.err.strip("\n")
    assert stop.value.code == code
    assert captured.out == ""
    assert line.startswith("mechmerge: ")
    assert "\n" not in line
    if isinstance(error, InputError):
        assert line == "mechmerge: file.yaml: expected a; found b; do c"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_main.LazyGroup, "get_command", lambda *_: Failing(InputError("file.yaml")))
    with pytest.raises(InputError):
        main(["--debug", "report"])
    monkeypatch.setenv("MECHMERGE_DEBUG", "1")
    with pytest.raises(InputError):
        main(["report"])


def test_a_missing_run_is_one_line_without_traceback() -> None:
    done = python("from mechmerge.cli.main import main\nmain(['report', 'nowhere-at-all'])")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "nowhere-at-all" in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_stands_in_the_readme(name: str) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
    assert re.search(rf"`(mechmerge )?{name}\b", readme), f"README.md does not mention {name}"


def test_names_stand_whole_in_a_narrow_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What a user types again is not cut where sentences beside it can be folded."""
    monkeypatch.setenv("COLUMNS", "60")
    rows = [
        {"component": f"L{i}.neuron.1229", "why": "harms what the others want on both halves of the prompts " * 2}
        for i in (1, 11)
    ]
    show(rows, "table", "decided")
    told = capsys.readouterr().out
    assert all(row["component"] in told for row in rows)
    assert "…" not in told
    assert "".join(told.split()).count("halves") == 4
