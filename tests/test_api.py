"""`import mechmerge`: light, typed, pinned by name and signature, and the README's example really runs."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest
import yaml

import mechmerge
from mechmerge import api
from mechmerge.cli.main import COMMANDS
from mechmerge.models.references import Model

SIGNATURES = {
    "card": "(run, model=, out=, *, license=)",
    "compare": "(evaluations, *, against=, progress=)",
    "effects": "(base, experts, behaviors, out, *, weights=, protect=, settings=, progress=)",
    "evaluate": "(models, suites, out, *, against=, split=, tiers=, limit=, data=, overwrite=, settings=, progress=)",
    "export": "(recipe, out, *, rank=, expert=, models=, progress=)",
    "gate": "(evaluation, rules, *, model=, weights=)",
    "generate": "(model, prompts, *, max_tokens=, temperature=, seed=, chat_template=, dtype=, device=, progress=)",
    "inspect": "(file, other=, *, progress=)",
    "localize": "(base, expert, behaviors, out, *, settings=, progress=)",
    "merge": "(recipe, out, *, models=, expert=, engine=, verify=, progress=)",
    "publish": "(source, repo, *, model=, gate=, evaluation=, no_gate=, mode=, branch=, private=, dry_run=, tag=, "
    "license=, progress=)",
    "publish_scores": "(run, repo, *, mode=, branch=, private=, dry_run=, tag=, license=, progress=)",
    "recipe": "(files, policy, out, *, parameters=, like=, within=, models=, seed=, out_dtype=, vocabulary=, positions=, "
    "progress=)",
    "report": "(run)",
    "resolve": "(model, *, progress=)",
    "rounds": "(base, experts, behaviors, out, *, weights=, protect=, solve=, settings=, progress=)",
    "run": "(pipeline, out, *, device=, progress=)",
    "sweep": "(pipeline, vary, out, *, split=, device=, progress=)",
    "tune": "(pipeline, out, *, recipe=, opened=, suites=, settings=, device=, progress=)",
}
"""Every public function; `name=` has a default."""
RECORDS = {"EffectSettings", "EvaluateSettings", "LocalizeSettings", "Model", "RoundSettings", "SolveSettings", "TuneSettings"}
ERRORS = {
    "CheckpointError",
    "GateRefused",
    "InputError",
    "LocalizeError",
    "MechmergeError",
    "MissingError",
    "PairError",
    "SchemaError",
}
COMMANDS_WITHOUT_A_FUNCTION = {
    "demo": "`run` of the demo's own pipeline file",
    "mergekit": "mergekit's own tools, by its own names",
    "cache": "housekeeping of a machine, not a stage",
    "doctor": "a look at a machine, not a stage",
    "completion": "of shells",
    "serve": "a server, not a stage",
    "submit": "for people; programs speak to the server's HTTP API",
    "jobs": "for people; programs speak to the server's HTTP API",
    "logs": "for people; programs speak to the server's HTTP API",
    "cancel": "for people; programs speak to the server's HTTP API",
}


def said(function: typing.Callable[..., object]) -> str:
    """A signature as `SIGNATURES` writes it."""
    parts, keywords = [], False
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and not keywords:
            parts.append("*")
            keywords = True
        parts.append(name + ("=" if parameter.default is not parameter.empty else ""))
    return f"({', '.join(parts)})"


def test_names_and_signatures_are_pinned() -> None:
    functions = {name for name in mechmerge.__all__ if isinstance(getattr(mechmerge, name), types.FunctionType)}
    assert {name: said(getattr(mechmerge, name)) for name in functions} == SIGNATURES
    assert set(mechmerge.__all__) == functions | RECORDS | ERRORS | {"SILENT", "Progress", "__version__"}
    assert set(api.__all__) == set(mechmerge.__all__) - {"__version__"}
    assert set(dir(mechmerge)) >= set(mechmerge.__all__)


@pytest.mark.parametrize("name", SIGNATURES)
def test_every_function_is_documented_and_typed(name: str) -> None:
    function = getattr(mechmerge, name)
    assert function is getattr(api, name)
    assert function.__doc__
    assert "\n" in function.__doc__, "more than a line"
    hints = function.__annotations__
    assert set(hints) == {*inspect.signature(function).parameters, "return"}
    for parameter in inspect.signature(function).parameters:
        if name not in ("publish_scores", "report", "run", "rounds"):
            assert re.search(rf"^ {{8}}(?:\w+, )*{parameter}\b", function.__doc__, re.M), f"{name} says nothing of {parameter}"


def test_every_command_has_its_function() -> None:
    """A command without a function needs a reason; a function is a command, or `resolve`."""
    missing = {name for name in COMMANDS if name.replace("-", "_") not in SIGNATURES}
    assert missing <= COMMANDS_WITHOUT_A_FUNCTION.keys(), "give the command a function, or a reason here"
    assert SIGNATURES.keys() - {name.replace("-", "_") for name in COMMANDS} == {"resolve"}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "numpy", "pydantic", "mergekit")

    def loaded(use: str) -> list[str]:
        found = python(f"import sys, mechmerge\n{use}\nprint(*[name for name in {heavy!r} if name in sys.modules])")
        return found.split()

    assert loaded("") == []
    assert loaded("mechmerge.localize, mechmerge.merge, mechmerge.InputError, dir(mechmerge)") == []
    assert "torch" in loaded("mechmerge.EffectSettings"), "the check sees what it looks for"


@pytest.mark.parametrize("name", ["localize", "recipe", "merge", "evaluate", "publish", "report"])
def test_a_function_and_its_subpackage_share_a_name(name: str) -> None:
    """Importing the subpackage, in any spelling, hides neither the function nor the subpackage's modules."""
    module = {
        "localize": "settings",
        "recipe": "schema",
        "merge": "verify",
        "evaluate": "record",
        "publish": "plan",
        "report": "files",
    }
    inner = module[name]
    code = f"""
import importlib, mechmerge
import mechmerge.{name}.{inner} as one
from mechmerge.{name} import {inner} as two
three = importlib.import_module("mechmerge.{name}.{inner}")
assert one is two is three is mechmerge.{name}.{inner}
from mechmerge import {name}
assert {name} is mechmerge.{name} and callable({name}) and {name}.__module__ == "mechmerge.api"
print("done")"""
    assert python(code) == "done"


def test_a_wrong_name_is_an_attribute_error() -> None:
    for module in (mechmerge, api):
        with pytest.raises(AttributeError):
            module.nonsense  # noqa: B018
    assert importlib.import_module("mechmerge.errors").InputError is mechmerge.InputError


# ------------------------------------------------------------------------------------------------------------- the stages
def readme_example() -> str:
    """The worked example of the README: its only Python block."""
    text = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 1
    return str(blocks[0])


def test_the_readmes_example_runs(
    tmp_path: Path, base: Model, expert: Model, second_expert: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Word for word, on tiny models: only the references, the behaviours' names and the sizes are others."""
    topics = ["tea", "rain", "a river", "the moon", "a forest", "bread"]
    for name in ("loud", "soft"):
        pairs = [{"with": f"{name} about {t}.", "without": f"Write about {t}.", "topic": t} for t in topics]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, "pairs": pairs, "answer_tokens": 5}))
    suite = [{"prompt": f"Say {t}.", "verifier": {"name": "contains", "arguments": {"text": "e"}}, "topic": t} for t in topics]
    (tmp_path / "short.yaml").write_text(yaml.safe_dump({"name": "short", "answer_tokens": 5, "prompts": suite}))
    (tmp_path / "gate.yaml").write_text(yaml.safe_dump({"model": "merged", "rules": [{"metric": "short", "at_least": 0.0}]}))
    code = readme_example()
    for word, tiny in {
        '"BASE"': repr(str(base.path)),
        '"EXPERT_A"': repr(str(expert.path)),
        '"EXPERT_B"': repr(str(second_expert.path)),
        '{"formats": "a", "arithmetic": "b"}': '{"loud": ("loud.yaml", "a"), "soft": ("soft.yaml", "b")}',
        'suites = ["formats", "arithmetic"]': 'suites = ["short.yaml"]',
        "prompts=48": "prompts=4, max_nodes=6, dtype='float32'",
    }.items():
        assert word in code, f"the example no longer says {word}"
        code = code.replace(word, tiny)
    monkeypatch.chdir(tmp_path)
    known: dict[str, typing.Any] = {}
    exec(compile(code, "README.md", "exec"), known)  # noqa: S102
    assert known["verdict"].passed
    assert list(known["evaluation"].models) == ["base", "a", "b", "merged"]
    assert known["merged"].id.digest not in (base.id.digest, expert.id.digest)
    for name in ("effects.safetensors", "recipe.yaml", "merged/config.json", "evaluation.json", "samples"):
        assert (tmp_path / name).exists()
    again = mechmerge.evaluate({"merged": known["merged"]}, ["short.yaml"], "again.json")
    with pytest.raises(mechmerge.InputError, match="weights"):
        mechmerge.effects(base, {"a": expert}, {"loud": ("loud.yaml", "a")}, "x", weights={"soft": 1.0})
    with pytest.raises(mechmerge.InputError, match="positive"):
        mechmerge.effects(base, {"a": expert}, {"loud": ("loud.yaml", "a")}, "x", weights={"loud": -1.0})
    both = mechmerge.compare({"one": known["evaluation"], "two": tmp_path / "again.json"})
    assert set(both.models) == {"base", "a", "b", "merged"}, "the same weights with the same outcomes stand once"
    assert not mechmerge.gate(again, "gate.yaml", weights={"merged": base}).passed, "an evaluation of other weights"
    with pytest.raises(mechmerge.InputError, match=r"weights of other: expected .*merged"):
        mechmerge.gate(again, "gate.yaml", weights={"other": base})
    scores = mechmerge.localize(
        base,
        expert,
        "loud.yaml",
        "scores",
        settings=mechmerge.LocalizeSettings(
            anchor_layer=2, verify=2, prompts=3, steering_prompts=0, curves=False, on_invalid="report"
        ),
    )
    assert [path.name for path in scores] == ["loud.safetensors"]
    assert mechmerge.inspect(scores[0]).kind == "scores"
    # What the command takes: a baseline within a recipe, and norms of models that no score file tells of.
    inside = mechmerge.recipe(["effects.safetensors"], "ties", "inside.yaml", within="recipe.yaml")
    assert inside.policy.name == "ties within conflict"
    like = mechmerge.recipe(["effects.safetensors"], "magnitude", "like.yaml", like="recipe.yaml", models={"a": expert})
    assert like.policy.name == "magnitude like conflict"
    with pytest.raises(mechmerge.InputError, match="neither"):
        mechmerge.export("recipe.yaml", "adapter")
    adapter = mechmerge.export("recipe.yaml", "adapter", rank=4)
    assert mechmerge.inspect(adapter).kind == "adapter"
    with pytest.raises(mechmerge.InputError, match="expected SolveSettings; found RoundSettings"):
        mechmerge.rounds(base, {"a": expert}, {}, "x", solve="effects.safetensors", settings=mechmerge.RoundSettings())
    answers = mechmerge.generate(known["merged"], ["Say tea.", "Say rain."], max_tokens=3, dtype="float32")
    assert [answer.tokens <= 3 for answer in answers] == [True, True]
    assert mechmerge.generate(known["merged"], "Say tea.", max_tokens=3, dtype="float32") == answers[:1]
