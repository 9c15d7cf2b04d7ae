"""Stock recipes in a process that cannot import mechmerge: mergekit's own `mergekit-yaml` gives what our engine gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mechmerge.merge.engine import merge
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.references import Model
from mechmerge.recipe.compile import DRAWN, compile_recipe
from mechmerge.recipe.emit import emit_baseline
from mechmerge.recipe.schema import Recipe, write_recipe
from mechmerge.recipe.sources import Sources
from tests.test_emit import RULES, recipe, stock

ALONE = """
import sys
sys.modules["mechmerge"] = None  # an import of it is an error now
try:
    import mechmerge
except ImportError:
    pass
else:
    raise SystemExit("mechmerge can be imported")
from mergekit.scripts.run_yaml import main
main()
"""


def mergekit_yaml(folder: Path, text: str) -> Checkpoint:
    """Runs mergekit's command line on the text as the text says, in a folder of its own."""
    folder.mkdir()
    (folder / "stock.yaml").write_text(text)
    command = [sys.executable, "-I", "-c", ALONE, "stock.yaml", "out", "--no-write-model-card", "--quiet"]
    first = text.partition("\n")[0]
    command += first.partition("told: ")[2].split() if first.startswith("#") else []
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return Checkpoint(folder / "out")


def same(ours: Checkpoint, theirs: Checkpoint) -> None:
    assert theirs.shapes == ours.shapes
    for name, tensor in theirs.tensors():
        assert torch.equal(tensor, ours.tensor(name)), name


def test_a_recipe_of_rules(base: Model, expert: Model, second_expert: Model, tmp_path: Path) -> None:
    experts = {"e0": expert, "e1": second_expert}
    rules = [rule for rule in RULES if rule[1] in experts and rule[0] in ("L1", "L*.attention", "L2.mlp", "final_norm")]
    assert len(rules) == 4
    made: Recipe = recipe(base, experts, rules, 0.1, out_dtype="bfloat16")
    write_recipe(tmp_path / "recipe.yaml", made)
    merge(tmp_path / "recipe.yaml", tmp_path / "ours", {name: model.path for name, model in experts.items()})
    text = stock(made, base, {"base": base.path} | {name: model.path for name, model in experts.items()})
    same(Checkpoint(tmp_path / "ours"), mergekit_yaml(tmp_path / "alone", text))


@pytest.mark.parametrize("policy", ["ties", "dare-ties", "della", "breadcrumbs", "sce", "model-stock"])
def test_baselines(base: Model, expert: Model, second_expert: Model, tmp_path: Path, policy: str) -> None:
    """Also those that draw: the YAML says with which seed."""
    experts = {"e0": expert, "e1": second_expert}
    sources = Sources(base.id, {name: model.id for name, model in experts.items()})
    parameters = {"lambda": 1.4} if policy in ("ties", "della") else {}
    made = compile_recipe(policy, sources, parameters=parameters, seed=11).recipe
    write_recipe(tmp_path / "recipe.yaml", made)
    merge(tmp_path / "recipe.yaml", tmp_path / "ours", {name: model.path for name, model in experts.items()})
    text = emit_baseline(made, {"base": base.path} | {name: model.path for name, model in experts.items()})
    same(Checkpoint(tmp_path / "ours"), mergekit_yaml(tmp_path / "alone", text))
    assert text.startswith("#") == (policy in DRAWN)
