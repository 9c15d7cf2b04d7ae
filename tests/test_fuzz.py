"""Damaged and hostile files of every kind: only our own errors of one line, in bounded memory, and never without an end.

`MECHMERGE_FUZZ=20000 pytest tests/test_fuzz.py` tries so many of each kind (default: a few, for CI).
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mechmerge.artifacts import read_document
from mechmerge.behaviors.schema import load_behavior
from mechmerge.errors import MechmergeError, machine_error, visible
from mechmerge.evaluate.gate import Gate, check_gate
from mechmerge.evaluate.record import Evaluation
from mechmerge.evaluate.responses import join
from mechmerge.evaluate.run import check_samples
from mechmerge.evaluate.suites import load_suite
from mechmerge.localize.scores import read_scores
from mechmerge.models.adapters import adapter_digests, materialise
from mechmerge.models.checkpoint import Checkpoint, read_header
from mechmerge.models.load import empty_model, load_tokenizer
from mechmerge.models.pair import check_pair, token_ids
from mechmerge.models.positions import positions_of
from mechmerge.models.references import Model
from mechmerge.pipeline.source import check_pipeline
from mechmerge.recipe.schema import read_recipe
from mechmerge.recipe.sources import read_sources
from mechmerge.report.files import find_run_files
from mechmerge.report.inspection import inspect_file
from tests import measured
from tests.faults.project import PIPELINE
from tests.fuzz.damage import as_json, as_yaml, damaged_bytes, tensors, texts
from tests.samples import evaluation, masks, recipe
from tests.tiny import tiny_adapter

EXAMPLES = int(os.environ.get("MECHMERGE_FUZZ", "25"))
SECONDS = 60
"""CPU time that all the examples of the short run may take together in one reader: more is a loop without an end."""
ROOM = 2_000_000_000
"""Bytes of address space beyond what the process has when a test begins."""
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=EXAMPLES <= 100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
Read = Callable[[Path], Any]


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Memory and time are limited while hostile files are read."""

    def too_long(*_: object) -> None:
        raise TimeoutError("it does not end")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    handler = signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, SECONDS * max(1, EXAMPLES // 25))
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, handler)
    resource.setrlimit(resource.RLIMIT_AS, before)


def survives(read: Read, path: Path) -> None:
    """Reading ends well, or with an error of ours: wrong input or something missing, in one line that a terminal can show.

    What the system says of a path that cannot be (a name of 300 letters) is put into such a line by the commands.
    """
    found: MechmergeError | None = None
    try:
        read(path)
    except MechmergeError as error:
        found = error
    except OSError as error:
        found = machine_error(error)
        if found is None:
            raise
    if found is not None:
        assert found.exit_code in (2, 4), repr(found)
        assert visible(str(found)) == str(found)
        assert len(str(found)) < 10_000


# ------------------------------------------------------------------------------------------------------------ our own files
PAIRS = [{"with": f"Shout {w}.", "without": f"Say {w}.", "topic": w, "arguments": {}} for w in ("tea", "rain", "sun", "sea")]
BEHAVIOR = {
    "name": "shout", "description": "Shouts.", "chat_template": "none", "answer_tokens": 4, "pairs": PAIRS,
    "verifier": {"name": "contains", "arguments": {"text": "e"}, "min_words": 1},
}  # fmt: skip
SUITE = {
    "name": "short",
    "answer_tokens": 4,
    "prompts": [
        {"id": "a", "prompt": "Say tea.", "verifier": {"name": "contains", "arguments": {"text": "e"}}, "topic": "tea"},
        {"id": "b", "prompt": "Say 1.", "instructions": [{"verifier": {"name": "punctuation:no_comma"}}], "group": "g"},
    ],
}
GATE = {
    "model": "sum", "weights": {"sum": "a" * 64},
    "rules": [
        {"metric": "formats", "at_least": {"model": "base", "plus": 0.1}, "use": "low"},
        {"metric": "formats", "difference_to": "base", "at_least": 0.05},
        {"metric": "formats", "retained": {"expert": "formats", "base": "base"}, "at_least": 0.8},
    ],
}  # fmt: skip
MEASURED = evaluation("base", "formats", "sum")
RECIPE = {
    "experts": {"formats": {"model": recipe().experts["formats"].model.model_dump(mode="json"), "default": 0.5}},
    "base": recipe().base.model_dump(mode="json"),
    "policy": {"name": "conflict", "parameters": {"weight": 1.0}},
    "rules": [{"component": "L*.attention", "expert": "formats", "coefficient": 0.0}],
    "out_dtype": "bfloat16",
    "predicted": {"formats": -0.5},
    "provenance": [{"file": "e.safetensors", "kind": "effects", "sha256": "f" * 64}],
}
RUN = {"pipeline": {"title": "Two", "notes": "", "publish": "sum", "recipes": {"sum": {}}, "license": "mit"}}
TEXTS: dict[str, tuple[str, Any, Read]] = {
    "behaviour": ("shout.yaml", BEHAVIOR, load_behavior),
    "suite": ("short.yaml", SUITE, lambda path: load_suite(str(path))),
    "gate": ("gate.yaml", GATE, lambda path: check_gate(MEASURED, read_document(Gate, path))),
    "pipeline": ("pipeline.yaml", PIPELINE, check_pipeline),
    "recipe": ("recipe.yaml", RECIPE, read_recipe),
    "inspected recipe": ("recipe.yaml", RECIPE, inspect_file),
    "evaluation": ("evaluation.json", json.loads(MEASURED.model_dump_json()), inspect_file),
    "gated evaluation": (
        "evaluation.json",
        json.loads(MEASURED.model_dump_json()),
        lambda path: check_gate(read_document(Evaluation, path), Gate.model_validate(GATE)),
    ),
    "run.yaml": ("run.yaml", RUN, lambda path: find_run_files(path.parent)),
}


@pytest.mark.parametrize("kind", TEXTS)
@given(data=st.data())
@FUZZ
def test_texts_of_ours(kind: str, data: st.DataObject, tmp_path: Path) -> None:
    name, document, read = TEXTS[kind]
    write = as_json if name.endswith(".json") else as_yaml
    path = tmp_path / name
    path.write_bytes(write(document))
    if kind == "run.yaml":
        (tmp_path / "effects.safetensors").touch()
    path.write_bytes(data.draw(texts(write(document), write)))
    survives(read, path)


def test_what_is_damaged_was_whole(tmp_path: Path) -> None:
    """The undamaged files are read without an error, so that the damage is what is tried."""
    for kind, (name, document, read) in TEXTS.items():
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "effects.safetensors").touch()
        for beside in ("loud.yaml", "soft.yaml", "short.yaml"):
            content = SUITE if beside == "short.yaml" else BEHAVIOR | {"name": beside.removesuffix(".yaml")}
            (folder / beside).write_text(yaml.safe_dump(content))
        for model in ("base", "a", "b"):
            (folder / "models" / model).mkdir(parents=True)
        (folder / name).write_bytes((as_json if name.endswith(".json") else as_yaml)(document))
        read(folder / name)


LINES: dict[str, tuple[bytes, Read]] = {
    "samples": (b'{"answers": "k", "id": "a"}\n', lambda path: check_samples(path, "k")),
    "suite lines": (
        b'{"id": "a", "prompt": "Say tea.", "verifier": {"name": "contains", "arguments": {"text": "e"}}}\n'
        b'{"key": 7, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}\n',
        lambda path: load_suite(str(path)),
    ),
    "responses": (b'{"key": "a", "prompt": "Say tea.", "response": "tea"}\n', lambda path: join(path, the_suite(), loose=True)),
}


def the_suite() -> Any:
    """A suite of one prompt, `a`."""
    from mechmerge.artifacts import parse_document
    from mechmerge.evaluate.suites import Suite

    return parse_document(Suite, SUITE | {"split": "file"}, "suite")


@pytest.mark.parametrize("kind", LINES)
@given(data=st.data())
@FUZZ
def test_lines_of_json(kind: str, data: st.DataObject, tmp_path: Path) -> None:
    content, read = LINES[kind]
    first, _, rest = content.partition(b"\n")
    damaged = data.draw(st.one_of(texts(first, as_json), damaged_bytes(first)))
    path = tmp_path / "file.jsonl"
    path.write_bytes(damaged + b"\n" + rest)
    survives(read, path)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of a score, an effect and a mask file."""
    folder = tmp_path_factory.mktemp("ours")
    measured.score_file(0, measured.FIRST, "first").write(folder / "scores.safetensors")
    measured.effect_file().write(folder / "effects.safetensors")
    from mechmerge.recipe.schema import write_recipe

    write_recipe(folder / "recipe.yaml", recipe(), masks())
    return {path.stem: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("kind", ["scores", "effects", "masks"])
@given(data=st.data())
@FUZZ
def test_tensors_of_ours(kind: str, data: st.DataObject, ours: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / f"{kind}.safetensors"
    path.write_bytes(data.draw(tensors(ours[kind])))
    survives(inspect_file, path)
    if kind != "masks":
        survives(lambda path: read_sources([path]), path)
    if kind == "scores":
        survives(read_scores, path)


# ----------------------------------------------------------------------------------------------------------- files of models
@given(data=st.data())
@FUZZ
def test_headers_of_checkpoints(data: st.DataObject, base: Model, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    shutil.copyfile(base.path / "config.json", tmp_path / "config.json")
    path.write_bytes(data.draw(tensors((base.path / path.name).read_bytes())))

    def read(path: Path) -> None:
        checkpoint = Checkpoint(path.parent)
        checkpoint.check_complete()
        checkpoint.check_finite()

    survives(read_header, path)
    survives(read, path)


def opened(folder: Path) -> None:
    """What every command does with a model before it computes."""
    checkpoint = Checkpoint(folder)
    checkpoint.check_complete()
    positions_of(checkpoint.config)
    check_pair(checkpoint, checkpoint)
    empty_model(folder)


MODEL_FILES: dict[str, Read] = {
    "config.json": lambda path: opened(path.parent),
    "generation_config.json": lambda path: opened(path.parent),
    "tokenizer.json": lambda path: (token_ids(path.parent), load_tokenizer(path.parent)),
    "tokenizer_config.json": lambda path: load_tokenizer(path.parent),
}


@pytest.mark.parametrize("name", MODEL_FILES)
@given(data=st.data())
@FUZZ
def test_files_beside_the_weights(name: str, data: st.DataObject, base: Model, tmp_path: Path) -> None:
    for file in base.path.iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    path = tmp_path / name
    path.write_bytes(data.draw(texts((base.path / name).read_bytes(), as_json)))
    survives(MODEL_FILES[name], path)


@given(data=st.data())
@FUZZ
def test_index_files(data: st.DataObject, base: Model, tmp_path: Path) -> None:
    weights = Checkpoint(base.path).files
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    shutil.copyfile(base.path / "config.json", tmp_path / "config.json")
    shutil.copyfile(base.path / "model.safetensors", tmp_path / "model-00001-of-00001.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(data.draw(texts(as_json(index), as_json)))
    survives(lambda path: Checkpoint(path.parent).check_complete(), path)


@given(data=st.data())
@FUZZ
def test_adapter_configs(
    data: st.DataObject, base: Model, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, models: Path
) -> None:
    original = models / "fuzzed_adapter"
    if not original.exists():
        tiny_adapter(base.path, original)
    folder = tmp_path / "adapter"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    path = folder / "adapter_config.json"
    path.write_bytes(data.draw(texts((original / path.name).read_bytes(), as_json)))

    def read(path: Path) -> None:
        adapter_digests(path.parent)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MECHMERGE_CACHE", str(tmp_path / "cache"))
            materialise(base.path, base.id.shards, path.parent)

    survives(read, path)
