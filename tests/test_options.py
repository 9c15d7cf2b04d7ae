"""Which command has which of the shared options, and why not; shell completion; the configuration file; exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from mechmerge.cli.config import SHARED, inner_commands, options_of
from mechmerge.cli.main import COMMANDS, COMPLETE, cli, main
from mechmerge.models.references import Model
from tests.samples import evaluation, recipe

PIPELINE = "the pipeline file says it, so that a run can be made again from it"
READS = "reads and writes small files; computes nothing to speak of"
TALKS_NOT = "is done in a moment and reports nothing while it works"
BYTES = "the merge's bytes must not depend on it: computed on the CPU, in float32"
NOTHING_DRAWN = "draws nothing at random"
NO_MODEL = "loads no model"
REMOTE = dict.fromkeys(("device", "dtype", "seed", "threads", "quiet"), "asks a server, which computes by its own options")
OUT_DTYPE = "--out-dtype is the dtype of what is merged; nothing is computed in another"

TABLE: dict[str, dict[str, str]] = {
    # command: option → why it has none; an option that is not named here is there
    "demo": {"dtype": PIPELINE, "seed": PIPELINE},
    "run": {"dtype": PIPELINE, "seed": PIPELINE},
    "sweep": {"dtype": PIPELINE, "seed": PIPELINE},
    "tune": {"dtype": PIPELINE},
    "localize": {},
    "effects": {},
    "rounds": {},
    "recipe": {"device": BYTES, "dtype": OUT_DTYPE},
    "recipe diff": {"device": NO_MODEL, "dtype": NO_MODEL, "seed": NOTHING_DRAWN, "threads": READS, "quiet": TALKS_NOT},
    "recipe emit": {"device": NO_MODEL, "dtype": "the recipe says it (out_dtype)", "seed": "the recipe says it (policy.seed)",
                    "threads": READS, "quiet": TALKS_NOT},
    "recipe explain": {"device": NO_MODEL, "dtype": NO_MODEL, "seed": NOTHING_DRAWN, "threads": READS, "quiet": TALKS_NOT},
    "merge": {"device": BYTES, "dtype": "the recipe says it (out_dtype)", "seed": "the recipe says it (policy.seed)"},
    "export": {"device": BYTES, "dtype": "the base's", "seed": NOTHING_DRAWN},
    "evaluate": {},
    "compare": {"device": NO_MODEL, "dtype": NO_MODEL, "seed": "the files' own, which must be equal", "threads": READS},
    "gate": {"device": NO_MODEL, "dtype": NO_MODEL, "seed": "the evaluation's own", "threads": READS, "quiet": TALKS_NOT},
    "card": {"device": NO_MODEL, "dtype": NO_MODEL, "seed": NOTHING_DRAWN, "threads": READS, "quiet": TALKS_NOT},
    "report": {"device": NO_MODEL, "dtype": NO_MODEL, "seed": NOTHING_DRAWN, "threads": READS, "quiet": TALKS_NOT},
    "publish": {"device": NO_MODEL, "dtype": NO_MODEL, "seed": NOTHING_DRAWN, "threads": "bound by disk and network"},
    "publish-scores": {"device": NO_MODEL, "dtype": NO_MODEL, "seed": NOTHING_DRAWN, "threads": READS},
    "inspect": {"device": NO_MODEL, "dtype": NO_MODEL, "seed": NOTHING_DRAWN, "threads": "bound by the disk"},
    "generate": {},
    "cache list": {"device": NO_MODEL, "dtype": NO_MODEL, "seed": NOTHING_DRAWN, "threads": READS, "quiet": TALKS_NOT},
    "cache prune": {"device": NO_MODEL, "dtype": NO_MODEL, "seed": NOTHING_DRAWN, "threads": READS, "quiet": TALKS_NOT},
    "doctor": {
        "device": "looks at every device", "dtype": NO_MODEL, "seed": NOTHING_DRAWN, "threads": READS, "quiet": TALKS_NOT,
    },
    "serve token": dict.fromkeys(SHARED, "prints a token, a short list or nothing"),
    "submit": REMOTE | {"format": "prints the job's id for a script to take"},
    "jobs": REMOTE,
    "logs": REMOTE | {"format": "prints the log as it is"},
    "cancel": REMOTE | {"format": "says one line"},
    "mergekit": dict.fromkeys(SHARED, "all options behind the tool's name are mergekit's own"),
    "completion": dict.fromkeys(SHARED, "prints a script for a shell to read"),
}  # fmt: skip


def leaves() -> dict[str, click.Command]:
    """Every command that does something, by its whole name."""
    found: dict[str, click.Command] = {}
    context = click.Context(cli)
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        if not isinstance(command, click.Group):
            found[name] = command
        found |= {f"{name} {one}": sub for one, sub in inner_commands(command).items()}
    return found


# --------------------------------------------------------------------------------------------------------- shared options
def test_the_table_names_every_command_and_no_other() -> None:
    assert set(TABLE) == set(leaves()), "a new command needs a line: which shared options has it not, and why"


@pytest.mark.parametrize("name", TABLE)
def test_shared_options(name: str) -> None:
    has = set(options_of(leaves()[name]))
    lacking = {option for option in SHARED if option not in has}
    assert lacking == set(TABLE[name]), f"{name} lacks {sorted(lacking)}"
    assert all(TABLE[name].values())


@pytest.mark.parametrize("name", TABLE)
def test_shared_options_mean_the_same_everywhere(name: str) -> None:
    options = options_of(leaves()[name])
    if "format" in options:
        kind = options["format"].type
        assert isinstance(kind, click.Choice)
        assert {"table", "json"} <= set(kind.choices)
        assert options["format"].default == "table"
    if "dtype" in options:
        kind = options["dtype"].type
        assert isinstance(kind, click.Choice)
        assert {"float32", "bfloat16"} <= set(kind.choices) <= {"float32", "bfloat16", "float16"}
    if "seed" in options:
        assert options["seed"].default == 0
    if "device" in options:
        assert options["device"].default == "cpu"
    if "threads" in options:
        assert options["threads"].default is None
    if "quiet" in options:
        assert options["quiet"].is_flag


# -------------------------------------------------------------------------------------------------------------- completion
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_every_shell(shell: str) -> None:
    done = CliRunner().invoke(cli, ["completion", shell])
    assert done.exit_code == 0
    assert COMPLETE in done.output
    assert f"{shell}_complete" in done.output
    assert "mechmerge" in done.output


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("mechmerge ev", "evaluate"),
        ("mechmerge evaluate --dt", "--dtype"),
        ("mechmerge recipe --policy conf", "conflict"),
        ("mechmerge cache pr", "prune"),
    ],
)
def test_commands_options_and_values_are_completed(words: str, found: str) -> None:
    shell = {COMPLETE: "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    code = "from mechmerge.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | shell, check=False)
    assert f"plain,{found}" in done.stdout.splitlines(), done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_bash_takes_the_script(tmp_path: Path) -> None:
    script = tmp_path / "mechmerge.bash"
    script.write_text(CliRunner().invoke(cli, ["completion", "bash"]).output)
    done = subprocess.run(
        ["bash", "-c", f"source {script} && complete -p mechmerge"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "mechmerge" in done.stdout


# ----------------------------------------------------------------------------------------------------------- configuration
@pytest.fixture
def gate_files(tmp_path: Path) -> tuple[str, str]:
    """An evaluation and a gate that it passes."""
    evaluation("base", "formats").write(tmp_path / "evaluation.json")
    (tmp_path / "gate.yaml").write_text(yaml.safe_dump({"model": "formats", "rules": [{"metric": "formats", "at_least": 0.4}]}))
    return str(tmp_path / "evaluation.json"), str(tmp_path / "gate.yaml")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the configuration, named by the environment."""
    path = tmp_path / "own.toml"
    path.write_text("")
    monkeypatch.setenv("MECHMERGE_CONFIG", str(path))
    return path


def printed_json(*arguments: str) -> bool:
    """Whether a command that succeeds printed JSON."""
    done = CliRunner().invoke(cli, list(arguments))
    assert done.exit_code == 0, done.output
    return done.output.lstrip().startswith("{")


def test_what_is_said_more_closely_wins(config: Path, gate_files: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    gate = ("gate", *gate_files)
    assert not printed_json(*gate), "the default"
    config.write_text('format = "json"\n')
    assert printed_json(*gate), "the top of the file"
    config.write_text('format = "json"\n[gate]\nformat = "table"\n')
    assert not printed_json(*gate), "the command's table"
    monkeypatch.setenv("MECHMERGE_FORMAT", "json")
    assert printed_json(*gate), "the shared environment"
    monkeypatch.setenv("MECHMERGE_GATE_FORMAT", "table")
    assert not printed_json(*gate), "the command's environment"
    assert printed_json(*gate, "--format", "json"), "the command line"


def test_where_the_file_lies(tmp_path: Path, gate_files: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MECHMERGE_CONFIG", raising=False)
    for variable, folder in (("HOME", tmp_path / "home/.config"), ("XDG_CONFIG_HOME", tmp_path / "xdg")):
        monkeypatch.setenv(variable, str(folder if variable.startswith("XDG") else folder.parent))
        if variable == "HOME":
            monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
        assert not printed_json("gate", *gate_files)
        (folder / "mechmerge").mkdir(parents=True)
        (folder / "mechmerge" / "config.toml").write_text('format = "json"')
        assert printed_json("gate", *gate_files)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mechmerge.toml").write_text("nonsense = 1")
    assert printed_json("gate", *gate_files), "a file in the working folder is not looked for"
    monkeypatch.setenv("MECHMERGE_CONFIG", os.devnull)
    assert not printed_json("gate", *gate_files), "no configuration at all"


def test_the_cache_and_nested_commands(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MECHMERGE_CACHE")
    (tmp_path / "cache" / "models" / "one").mkdir(parents=True)
    config.write_text(f'cache_folder = "{tmp_path}/cache"\nformat = "json"\n[cache.prune]\nolder-than = "0"\ndry_run = true\n')
    listed = CliRunner().invoke(cli, ["cache", "list"])
    assert [row["path"] for row in json.loads(listed.output)["cache"]] == [str(tmp_path / "cache/models/one")]
    pruned = CliRunner().invoke(cli, ["cache", "prune"])
    assert [row["what"] for row in json.loads(pruned.output)["prune"]] == ["would remove"]
    monkeypatch.delenv("MECHMERGE_CACHE", raising=False)  # the configuration had set it


def test_a_group_with_options_of_its_own_takes_them_beside_its_commands(config: Path, tmp_path: Path) -> None:
    config.write_text(f'[serve]\ndata = "{tmp_path}/data"\nport = "none"\n[serve.token.add]\nrole = "admin"\n')
    refused = CliRunner().invoke(cli, ["serve"])
    assert refused.exit_code == 2
    assert "'--port'" in refused.output
    made = CliRunner().invoke(cli, ["serve", "--port", "0", "token", "add", "ann"])
    assert made.exit_code == 0, made.output
    listed = CliRunner().invoke(cli, ["serve", "--port", "0", "token", "list", "--format", "json"])
    assert [row["role"] for row in json.loads(listed.output)["tokens"]] == ["admin"]
    assert (tmp_path / "data" / "service.sqlite").is_file()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense = 1", "nonsense: expected one of device"),
        ("[serve]\nnonsense = 1", "[serve] nonsense: expected an option"),
        ("[serve.nonsense]\nx = 1", "[serve.nonsense]: expected one of token"),
        ("[nonsense]\nx = 1", "[nonsense]: expected a command"),
        ("[gate]\nnonsense = 1", "[gate] nonsense: expected an option"),
        ("[evaluate]\nsuite = 'formats'", "[evaluate] suite: expected a list"),
        ("[gate]\nmodel = ['a']", "[gate] model: expected one value"),
        ("[gate.inner]\nx = 1", "[gate] inner"),
        ("[cache]\nformat = 'json'", "expected a table [cache.COMMAND]"),
        ("[cache.nonsense]\nx = 1", "[cache.nonsense]: expected one of list, prune"),
        ("cache_folder = 5", "cache_folder: expected a folder"),
        ("cache = '/x'", "cache: expected one of device"),
        ("device = ", "expected valid TOML"),
    ],
)
def test_unknown_keys_and_wrong_values_are_refused_in_one_line(
    config: Path, gate_files: tuple[str, str], text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["gate", *gate_files])
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1


def test_a_file_that_is_named_must_be_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MECHMERGE_CONFIG", "/nowhere/at/all.toml")
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--offline"])
    assert stop.value.code == 2
    assert "MECHMERGE_CONFIG: expected a file" in capsys.readouterr().err


def test_a_value_that_a_command_does_not_take_is_wrong_usage(config: Path, gate_files: tuple[str, str]) -> None:
    config.write_text("format = 'nonsense'")
    done = CliRunner().invoke(cli, ["gate", *gate_files])
    assert done.exit_code == 2
    assert "nonsense" in done.output


def test_every_variable_of_ours_stands_in_the_readme() -> None:
    root = Path(__file__).parent.parent
    sources = "\n".join(path.read_text("utf-8") for path in (root / "mechmerge").rglob("*.py"))
    named = set(re.findall(r"\bMECHMERGE_[A-Z_]+[A-Z]\b", sources)) - {"MECHMERGE_COMMAND_OPTION", "MECHMERGE_OPTION"}
    readme = (root / "README.md").read_text("utf-8")
    assert {"MECHMERGE_CACHE", "MECHMERGE_CONFIG"} <= named
    assert {name for name in named if name not in readme} == set()


# -------------------------------------------------------------------------------------------------------------- exit codes
def test_exit_codes(tmp_path: Path, gate_files: tuple[str, str], base: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 done, 2 wrong usage or input, 3 gate refused, 4 something needed is missing; 1 and 130 stand in test_cli.py."""
    (tmp_path / "hard.yaml").write_text(yaml.safe_dump({"model": "formats", "rules": [{"metric": "formats", "at_least": 0.9}]}))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe().model_dump(mode="json"), sort_keys=False))
    (tmp_path / "broken.yaml").write_text("a: [")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hard, broken, nowhere = str(tmp_path / "hard.yaml"), str(tmp_path / "broken.yaml"), str(tmp_path / "nowhere")
    table: list[tuple[int, list[str]]] = [
        (0, ["--help"]),
        (0, ["--version"]),
        (0, ["gate", *gate_files]),
        (0, ["inspect", str(base.path)]),
        (0, ["cache", "list"]),
        (0, ["completion", "fish"]),
        (2, ["nonsense"]),
        (2, ["gate"]),
        (2, ["gate", *gate_files, "--format", "nonsense"]),
        (2, ["completion", "powershell"]),
        (2, ["cache", "prune", "--older-than", "soon"]),
        (2, ["gate", gate_files[0], broken]),
        (2, ["inspect", nowhere]),
        (2, ["report", nowhere]),
        (2, ["run", broken, "--check"]),
        (2, ["generate", str(base.path), "x", "--device", "nonsense"]),
        (2, ["evaluate", str(base.path), "--suite", "nonsense"]),
        (3, ["gate", gate_files[0], hard]),
        (3, ["gate", gate_files[0], hard, "--format", "json"]),
        (4, ["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out")]),
        (4, ["inspect", "owner/name"]),
        (4, ["localize", "owner/name", str(base.path), "--behavior", "title", "--out", nowhere]),
    ]
    found = []
    for _, arguments in table:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        found.append((stop.value.code or 0, arguments))
    assert found == table


def test_every_range_of_numbers_refuses_nan() -> None:
    """Which no comparison finds outside a range: click alone lets it through."""
    asked = 0

    def check(command: click.Command) -> None:
        nonlocal asked
        for parameter in command.params:
            if isinstance(parameter.type, click.FloatRange):
                asked += 1
                with pytest.raises(click.BadParameter, match="no number"):
                    parameter.type.convert("nan", parameter, None)
        for inner in inner_commands(command).values():
            check(inner)

    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        check(command)
    assert asked >= 13
