"""A tiny project on disk: models, an adapter, behaviours, a suite and a pipeline, and the commands that work on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

from mechmerge.models.references import resolve
from mechmerge.recipe.schema import Policy, Recipe, RecipeExpert, write_recipe
from tests.tiny import tiny_adapter, tiny_expert, tiny_model

Command = Literal["run", "localize", "effects", "merge", "evaluate"]
COMMANDS: tuple[Command, ...] = ("run", "localize", "effects", "merge", "evaluate")
TOPICS = ("tea", "rain", "a river", "the moon")
PIPELINE = {
    "title": "tiny",
    "license": "mit",
    "base": "models/base",
    "experts": {"a": "models/a", "b": "models/base+models/b"},
    "behaviors": {"loud": {"expert": "a", "file": "loud.yaml"}, "soft": {"expert": "b", "file": "soft.yaml"}},
    "localize": {
        "anchor_layer": 2, "verify": 1, "prompts": 2, "steering_prompts": 0, "on_invalid": "report", "curves": False,
        "output_prompts": 0,
    },
    "effects": {"prompts": 4, "dtype": "float32", "max_nodes": 6, "tolerance": 0.5},
    "recipes": {"conflict": {"policy": "conflict", "parameters": {"weighting": "equal"}}, "sum": {"policy": "task-arithmetic"}},
    "publish": "conflict",
    "out_dtype": "float32",
    "evaluate": {"suites": ["short.yaml"], "dtype": "float32", "batch": 2},
    "gate": {"model": "conflict", "rules": [{"metric": "short", "at_least": 0.0}]},
}  # fmt: skip


@dataclass(frozen=True)
class Project:
    """The folder of a project; nothing but its models is ever changed."""

    root: Path

    @classmethod
    def make(cls, root: Path) -> Project:
        """Writes it: a base of two layers, an expert, and an adapter that has to be merged in the cache."""
        models = root / "models"
        base = resolve(str(tiny_model(models / "base", layers=2)))
        experts = {
            "a": resolve(str(tiny_expert(base.path, models / "a", seed=1))),
            "b": resolve(f"{base.path}+{tiny_adapter(base.path, models / 'b', seed=2)}"),
        }
        recipe = Recipe(
            base=base.id,
            experts={name: RecipeExpert(model=model.id, default=0.5) for name, model in experts.items()},
            policy=Policy(name="by hand"),
            out_dtype="float32",
        )
        write_recipe(root / "recipe.yaml", recipe, {"a.neuron": np.eye(2, 48, dtype=np.float32)})
        for name, word in (("loud", "Shout"), ("soft", "Whisper")):
            pairs = [{"with": f"{word} about {t}.", "without": f"Write about {t}.", "topic": t} for t in TOPICS]
            (root / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, "pairs": pairs, "answer_tokens": 4}))
        prompts = [
            {"prompt": f"Say {t}.", "verifier": {"name": "contains", "arguments": {"text": "e"}}, "topic": t} for t in TOPICS
        ]
        (root / "short.yaml").write_text(yaml.safe_dump({"name": "short", "answer_tokens": 4, "prompts": prompts}))
        (root / "pipeline.yaml").write_text(yaml.safe_dump(PIPELINE, sort_keys=False))
        return cls(root)

    def model(self, name: str) -> str:
        """The reference of one of its models."""
        folder = str(self.root / "models" / name)
        return f"{self.root / 'models' / 'base'}+{folder}" if name == "b" else folder

    def arguments(self, command: Command, out: Path) -> Sequence[str]:
        """The command line that writes into the folder `out`."""
        base, a, b = (self.model(name) for name in ("base", "a", "b"))
        loud, soft = self.root / "loud.yaml", self.root / "soft.yaml"
        common = ("--quiet", "--threads", "1")
        match command:
            case "run":
                words = ("run", self.root / "pipeline.yaml", "--out", out / "run")
            case "localize":
                words = ("localize", base, a, "--behavior", loud, "--behavior", soft, "--out", out / "scores",
                         "--anchor-layer", "2", "--steering-prompts", "0", "--invalid-anchor", "report", "--prompts", "2",
                         "--verify", "1", "--no-curves", "--output-prompts", "1")  # fmt: skip
            case "effects":
                words = ("effects", base, f"a={a}", f"b={b}", "--behavior", f"{loud}=a", "--behavior", f"{soft}=b",
                         "--prompts", "4", "--dtype", "float32", "--max-nodes", "6", "--tolerance", "0.5",
                         "--out", out / "effects.safetensors")  # fmt: skip
            case "merge":
                named = [word for name in ("base", "a", "b") for word in ("--model", f"{name}={self.model(name)}")]
                words = ("merge", self.root / "recipe.yaml", out / "model", *named)
            case "evaluate":
                words = ("evaluate", f"base={base}", f"a={a}", f"b={b}", "--suite", self.root / "short.yaml",
                         "--dtype", "float32", "--batch", "2", "--out", out / "evaluation.json")  # fmt: skip
        return [str(word) for word in (*words, *common)]
