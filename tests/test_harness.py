"""Tasks of lm-eval, on data of the tests' own: values to the digit, kept, resumed, refused."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mechmerge.errors import InputError, MissingError
from mechmerge.evaluate.columns import Column
from mechmerge.evaluate.harness import run_tasks
from mechmerge.evaluate.lm_outcome import TaskOutcome
from mechmerge.evaluate.lm_tasks import manager, silent, task_digest
from mechmerge.evaluate.record import EvaluateSettings
from mechmerge.evaluate.statistics import interval
from mechmerge.models.load import load_model, load_tokenizer
from mechmerge.models.references import Model
from mechmerge.progress import NullProgress

SETTINGS = EvaluateSettings(dtype="float32", batch=4)
WORDS = ["tea", "river", "forest", "mountain", "sentence", "title", "text", "letter", "number", "water"]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _task(folder: Path, name: str, **settings: Any) -> None:
    base: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name.split('-')[0]}.jsonl")}},
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(base | settings))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two choices, one generation with two filters, and groups of the choices."""
    folder = tmp_path_factory.mktemp("tasks")
    draw = random.Random(0)
    choice: dict[str, Any] = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }
    for name, count in (("mm_small", 5), ("mm_large", 11)):
        rows = [
            {"question": f"Write {draw.choice(WORDS)}", "choices": draw.sample(WORDS, 3), "gold": draw.randrange(3)}
            for _ in range(count)
        ]
        _write(folder / f"{name}.jsonl", rows)
        _task(folder, name, **choice)
    _write(folder / "mm_gen.jsonl", [{"question": f"What is {n}?", "answer": str(n)} for n in range(7)])
    exact = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}
    generation: dict[str, Any] = {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
    }
    first = [{"function": "take_first"}]
    digits = [{"function": "regex", "regex_pattern": "(\\d)"}, *first]
    _task(
        folder, "mm_gen", metric_list=[exact], **generation,
        filter_list=[{"name": "strict-match", "filter": first}, {"name": "flexible-extract", "filter": digits}],
    )  # fmt: skip
    bleu = {"metric": "bleu", "aggregation": "bleu", "higher_is_better": True}
    _task(folder, "mm_gen-bleu", metric_list=[exact, bleu], **generation)
    _task(folder, "mm_gen-only-bleu", metric_list=[bleu], **generation)
    _task(folder, "mm_gen-unsafe", metric_list=[exact], unsafe_code=True, **generation)
    _task(folder, "mm_absent", metric_list=[exact], **generation)
    _task(folder, "mm_small-tagged", tag="mm_tag", **choice)
    _task(folder, "mm_large-tagged", tag="mm_tag", **choice)
    _task(folder, "mm_small-broken", **choice | {"doc_to_text": "{% if %}"})
    metric = {"metric": "acc", "aggregation": "mean"}
    groups: dict[str, Any] = {
        "mm_sized": {"task": ["mm_small", "mm_large"], "aggregate_metric_list": [metric | {"weight_by_size": True}]},
        "mm_even": {"task": ["mm_small", "mm_large"], "aggregate_metric_list": [metric | {"weight_by_size": False}]},
        "mm_nested": {"task": ["mm_even"], "aggregate_metric_list": [metric | {"weight_by_size": True}]},
        "mm_loose": {"task": ["mm_small", "mm_large"]},
        "mm_risky": {"task": ["mm_small", "mm_gen-unsafe"]},
    }
    for name, group in groups.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"group": name, **group}))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run") / "samples"


def run(name: str, model: Model, samples: Path, tasks: Path, **options: Any) -> TaskOutcome:
    return run_tasks([f"lm_eval:{name}"], model, options.pop("settings", SETTINGS), samples, include=tasks, **options)[name]


def reference(name: str, model: Model, tasks: Path, limit: int | None = None) -> dict[str, Any]:
    """What lm-eval reports when it is left to itself: its own loading of model and tasks."""
    from lm_eval import simple_evaluate

    with silent():
        raw: dict[str, Any] = simple_evaluate(
            "hf", model_args={"pretrained": str(model.path), "dtype": "float32"}, tasks=[name], batch_size=4, device="cpu",
            task_manager=manager(tasks), bootstrap_iters=0, limit=limit,
        )  # fmt: skip
    return raw["results"]  # type: ignore[no-any-return]


def value(column: Column) -> float:
    return interval(column).value


CLOSE = {"rel": 0.0, "abs": 1e-12}


# ------------------------------------------------------------------------------------------------------------------- values
@pytest.mark.parametrize("name", ["mm_large", "mm_gen", "mm_sized", "mm_even", "mm_nested"])
def test_values_are_those_of_lm_eval(name: str, base: Model, samples: Path, tasks: Path) -> None:
    outcome = run(name, base, samples, tasks)
    compared = 0
    for task, reported in reference(name, base, tasks).items():
        prefix = name if task == name else f"{name}.{task}"
        for key, expected in reported.items():
            if "," in key and "_stderr" not in key:
                flat = f"{prefix}.{key.replace(',none', '').replace(',', '-')}"
                assert value(outcome.columns[flat]) == pytest.approx(expected, **CLOSE), flat
                compared += 1
    assert compared == len(outcome.columns)
    assert not outcome.notes


def test_choice(base: Model, samples: Path, tasks: Path) -> None:
    outcome = run("mm_large", base, samples, tasks)
    assert list(outcome.columns) == ["mm_large.acc_norm", "mm_large.acc"]
    assert [column.headline for column in outcome.columns.values()] == [True, False]
    assert (outcome.n, len(outcome.samples), outcome.tasks) == (11, 11, ("mm_large",))
    assert {0.0, 1.0} == set(outcome.columns["mm_large.acc"].values)
    row = outcome.samples[3]
    assert row["id"] == "mm_large:3"
    assert row["prompt"].startswith("Write ")
    assert len(row["answer"]) == 3
    assert row["metrics"]["acc"] == outcome.columns["mm_large.acc"].values[3]
    assert row["metrics"]["acc"] == float(row["answer"].index(max(row["answer"])) == int(row["target"]))


def test_generation_with_filters(base: Model, samples: Path, tasks: Path) -> None:
    outcome = run("mm_gen", base, samples, tasks)
    names = ["mm_gen.exact_match-strict-match", "mm_gen.exact_match-flexible-extract"]
    assert list(outcome.columns) == names
    assert [column.headline for column in outcome.columns.values()] == [True, False]
    assert all(isinstance(row["answer"], str) and row["answer"] for row in outcome.samples)
    assert set(outcome.samples[0]["metrics"]) == {"exact_match-strict-match", "exact_match-flexible-extract"}


def test_groups(base: Model, samples: Path, tasks: Path) -> None:
    sized, even = (run(name, base, samples, tasks) for name in ("mm_sized", "mm_even"))
    assert [key for key, column in sized.columns.items() if column.headline] == ["mm_sized.acc"]
    assert sized.n == 16
    assert set(sized.columns["mm_sized.acc"].groups) == {"mm_sized"}
    assert set(even.columns["mm_even.acc"].groups) == {"mm_small", "mm_large"}
    assert value(sized.columns["mm_sized.acc"]) != value(even.columns["mm_even.acc"])
    assert len(set(sized.columns["mm_sized.acc"].clusters)) == 16
    loose, tag = run("mm_loose", base, samples, tasks), run("mm_tag", base, samples, tasks)
    headlines = [key for key, column in loose.columns.items() if column.headline]
    assert headlines == ["mm_loose.mm_small.acc_norm", "mm_loose.mm_large.acc_norm"]
    assert [c.values for c in tag.columns.values() if c.headline] == [loose.columns[h].values for h in reversed(headlines)]


def test_metrics_that_are_no_means(base: Model, samples: Path, tasks: Path) -> None:
    pytest.importorskip("sacrebleu")
    outcome = run("mm_gen-bleu", base, samples, tasks)
    assert list(outcome.columns) == ["mm_gen-bleu.exact_match"]
    assert outcome.notes == ("mm_gen-bleu.bleu is left out: it is no mean of one number a prompt.",)
    with pytest.raises(InputError, match=r"a metric that is a mean.*mm_gen-only-bleu.bleu is left out"):
        run("mm_gen-only-bleu", base, samples, tasks)


def test_limit(base: Model, samples: Path, tasks: Path) -> None:
    whole, few = run("mm_large", base, samples, tasks), run("mm_large", base, samples, tasks, limit=4)
    assert (few.n, len(few.samples)) == (4, 4)
    assert few.columns["mm_large.acc"].values == whole.columns["mm_large.acc"].values[:4]
    assert few.digest != whole.digest
    assert value(few.columns["mm_large.acc"]) == pytest.approx(
        reference("mm_large", base, tasks, 4)["mm_large"]["acc,none"], **CLOSE
    )


# --------------------------------------------------------------------------------------------------------- kept and resumed
class Weights:
    """Loads a model and counts how often."""

    def __init__(self, model: Model) -> None:
        self.model, self.times = model, 0

    def __call__(self) -> Any:
        self.times += 1
        return load_model(self.model.path, "float32")


def test_kept_by_content(base: Model, expert: Model, tmp_path: Path, tasks: Path) -> None:
    weights = Weights(base)
    names = ["mm_small", "mm_large", "mm_gen"]
    first = run_tasks(names, base, SETTINGS, tmp_path, loaded=weights, include=tasks)
    assert weights.times == 1  # once for all tasks
    again = run_tasks(names, base, SETTINGS, tmp_path, loaded=weights, include=tasks)
    assert weights.times == 1
    assert again == first
    # A group finds its members.
    run("mm_sized", base, tmp_path, tasks, loaded=weights)
    assert weights.times == 1
    other = run_tasks(names, expert, SETTINGS, tmp_path, loaded=Weights(expert), include=tasks)
    assert [o.key for o in other.values()] != [o.key for o in first.values()]
    assert [o.digest for o in other.values()] == [o.digest for o in first.values()]
    run_tasks(["mm_small"], base, EvaluateSettings(dtype="float32", batch=2), tmp_path, loaded=weights, include=tasks)
    assert weights.times == 2


def test_goes_on_after_a_break(base: Model, tmp_path: Path, tasks: Path) -> None:
    class Broken(NullProgress):
        def start(self, label: str, total: int) -> None:
            if label == "lm_eval:mm_large":
                raise KeyboardInterrupt

    weights = Weights(base)
    with pytest.raises(KeyboardInterrupt):
        run("mm_sized", base, tmp_path, tasks, progress=Broken(), loaded=weights)
    kept = list((tmp_path / ".answers" / "lm_eval").iterdir())
    assert len(kept) == 1
    stamp = kept[0].stat().st_mtime_ns
    run("mm_sized", base, tmp_path, tasks, loaded=weights)
    assert kept[0].stat().st_mtime_ns == stamp
    assert len(list((tmp_path / ".answers" / "lm_eval").iterdir())) == 2


def test_progress_counts_documents(base: Model, tmp_path: Path, tasks: Path) -> None:
    seen: list[Any] = []

    class Told(NullProgress):
        def start(self, label: str, total: int) -> None:
            seen.append((label, total))

        def advance(self, units: int = 1) -> None:
            seen.append(units)

    run_tasks(["mm_large", "mm_gen"], base, SETTINGS, tmp_path, include=tasks, progress=Told())
    assert [entry for entry in seen if isinstance(entry, tuple)] == [("lm_eval:mm_large", 11), ("lm_eval:mm_gen", 7)]
    assert sum(entry for entry in seen if isinstance(entry, int)) == 18


def test_shares_packed_weights(base: Model, tmp_path: Path, tasks: Path) -> None:
    from mechmerge.behaviors.generation import generate
    from mechmerge.models.packed import load_packed

    shared = load_packed(base.path, "float32")
    tokenizer = load_tokenizer(base.path)
    before = generate(shared, tokenizer, ["What is tea?"], max_new_tokens=8)
    outcome = run("mm_gen", base, tmp_path, tasks, loaded=lambda: shared)
    plain = run("mm_gen", base, tmp_path / "plain", tasks)
    assert [row["answer"] for row in outcome.samples] == [row["answer"] for row in plain.samples]
    assert generate(shared, tokenizer, ["What is tea?"], max_new_tokens=8) == before


def test_leaves_no_trace(base: Model, tmp_path: Path, tasks: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import numpy as np
    import torch

    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    run("mm_gen", base, tmp_path, tasks)
    drawn = random.random(), float(np.random.rand()), float(torch.rand(1))
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    assert drawn == (random.random(), float(np.random.rand()), float(torch.rand(1)))
    assert capfd.readouterr() == ("", "")


def test_digest_is_of_what_is_asked(tasks: Path, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    def digest_of(folder: Path) -> str:
        index = TaskManager(include_path=str(folder), include_defaults=False)  # reading all of lm-eval's takes long
        return task_digest(index.load(["mm_small"])["tasks"]["mm_small"])

    def copy(name: str, **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        rows = (tasks / "mm_small.jsonl").read_text()
        (folder / "mm_small.jsonl").write_text(rows.replace("Write", changes.pop("word", "Write")))
        settings = yaml.safe_load((tasks / "mm_small.yaml").read_text())
        settings["dataset_kwargs"]["data_files"]["test"] = str(folder / "mm_small.jsonl")
        (folder / "mm_small.yaml").write_text(yaml.safe_dump(settings | changes))
        return folder

    first = digest_of(tasks)
    assert digest_of(copy("same")) == first
    others = [
        copy("data", word="Draw"),
        copy("prompt", doc_to_text="Now: {{question}}"),
        copy("version", metadata={"version": 2}),
    ]
    assert len({first, *map(digest_of, others)}) == 4


# ---------------------------------------------------------------------------------------------------------------- refusals
def test_unknown_name(base: Model, samples: Path, tasks: Path) -> None:
    with pytest.raises(InputError, match=r"lm_eval:gsm8: .*gsm8k"):
        run("gsm8", base, samples, tasks)


@pytest.mark.parametrize("name", ["mm_gen-unsafe", "mm_risky", "humaneval", "humaneval_instruct"])
def test_code_is_not_run_without_leave(
    name: str, base: Model, samples: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MECHMERGE_UNSAFE_EXECUTION", raising=False)
    with pytest.raises(MissingError, match="MECHMERGE_UNSAFE_EXECUTION=1") as caught:
        run(name, base, samples, tasks)
    assert caught.value.exit_code == 4
    if name == "mm_gen-unsafe":
        monkeypatch.setenv("MECHMERGE_UNSAFE_EXECUTION", "1")
        assert run(name, base, samples, tasks).n == 7


def test_absent_data(base: Model, samples: Path, tasks: Path) -> None:
    with pytest.raises(MissingError, match=r"lm_eval:mm_absent.*\(json\).*mm_absent.jsonl"):
        run("mm_absent", base, samples, tasks)


def test_broken_task(base: Model, samples: Path, tasks: Path) -> None:
    with pytest.raises(InputError, match="lm_eval:mm_small-broken: expected a task that lm-eval loads"):
        run("mm_small-broken", base, samples, tasks)


OFFLINE = """
from mechmerge.errors import MissingError
from mechmerge.evaluate.lm_outcome import TaskOutcome
from mechmerge.evaluate.lm_tasks import load_task
try:
    load_task("gsm8k")
except MissingError as error:
    print(error)
"""
ORDERS = """
import sys
from mechmerge.behaviors.schema import Verifier
from mechmerge.behaviors.verifiers import verify
from mechmerge.evaluate.lm_outcome import TaskOutcome
from mechmerge.evaluate.lm_tasks import manager

def verdict():
    return verify(Verifier(name="punctuation:no_comma"), "p", "no comma here", {})

def tasks():
    return "gsm8k" in manager().task_index

for step in sys.argv[1:]:
    assert {"verdict": verdict, "tasks": tasks}[step]()
import lm_eval.tasks
assert hasattr(lm_eval.tasks, "TaskManager")
print("fine")
"""


def _python(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=dict(os.environ) | environment,
        check=False,
    )
    return done.stdout + done.stderr[-500:]


def test_hub_out_of_reach(tmp_path: Path) -> None:
    found = _python(OFFLINE, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert found.startswith("lm_eval:gsm8k: expected its data (")
    assert "gsm8k) on this machine, or the Hub within reach" in found
    assert len(found.splitlines()) == 1


@pytest.mark.parametrize("order", [("verdict", "tasks", "verdict"), ("tasks", "verdict", "tasks")])
def test_beside_the_verifiers(order: tuple[str, ...]) -> None:
    assert _python(ORDERS, *order) == "fine\n"
