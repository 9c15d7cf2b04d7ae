"""Answers of a model to a suite: told batch by batch, kept by content, resumed after a kill, errors that name the prompt."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

from mechmerge.artifacts import digest
from mechmerge.behaviors.generation import batches
from mechmerge.errors import InputError, MissingError
from mechmerge.evaluate.answers import Speaker
from mechmerge.evaluate.backends import Engine
from mechmerge.evaluate.record import EvaluateSettings
from mechmerge.evaluate.suites import Suite, SuitePrompt
from mechmerge.models.load import load_model, load_tokenizer, quiet
from mechmerge.models.references import Model, resolve
from mechmerge.progress import SILENT
from tests.test_backends import Double
from tests.test_generation import Recorder, lively

SETTINGS = EvaluateSettings(dtype="float32", batch=3)
EXACT = SETTINGS.model_copy(update={"exact": True})


def suite_of(prompts, **changes):
    rows = tuple(
        SuitePrompt(id=f"p{i}", prompt=prompt, verifier={"name": "punctuation:no_comma"}) for i, prompt in enumerate(prompts)
    )
    return Suite(**({"name": "zoo", "split": "file", "answer_tokens": 5, "prompts": rows} | changes))


SUITE = suite_of(["Describe the river and tea.", "Tea?", *(f"What is {i} plus {i}{i}?" for i in range(6))])


def written(folder, base, seed=0, change=None):
    """A model on disk that says more than one token for ever."""
    with quiet():
        lively(load_model(base.path), seed).save_pretrained(folder)
        load_tokenizer(base.path).save_pretrained(folder)
    if change:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return resolve(str(folder))


@pytest.fixture(scope="module")
def zebra(base, tmp_path_factory):
    return written(tmp_path_factory.mktemp("zebra") / "zebra", base)


class Listener:
    """Remembers what it is told, and whether it was on the disk by then."""

    def __init__(self, folder):
        self.folder, self.calls = folder, []

    def __call__(self, rows, said):
        self.calls.append((rows, said))
        assert sum(1 for _ in self.folder.glob(".answers/**/*.json")) >= min(len(self.calls), 1)


def ask(model, samples, settings=SETTINGS, suite=SUITE, told=None, progress=SILENT, **engine):
    return Speaker("zebra", model, samples, settings, progress, **engine).answers(suite, told)


def kept_file(samples):
    (path,) = samples.glob(".answers/*.json")
    return path


# --------------------------------------------------------------------------------------------------------------------- told
def test_told_of_every_batch_in_the_order_of_the_plan(zebra, tmp_path):
    first, again = Listener(tmp_path), Listener(tmp_path)
    made, kept = ask(zebra, tmp_path, told=first), ask(zebra, tmp_path, told=again)
    lengths = [len(ids) for ids in Speaker("zebra", zebra, tmp_path, SETTINGS, SILENT)._asked(SUITE).tokens]
    assert [rows for rows, _ in first.calls] == batches(lengths, 3) != [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert {row: said for rows, part in first.calls for row, said in zip(rows, part, strict=True)} == dict(
        enumerate(made.answers)
    )
    assert first.calls == again.calls
    assert made == kept
    assert made.key == Speaker("other", zebra, tmp_path, SETTINGS, SILENT).key(SUITE)


def test_units_that_a_killed_call_left_beside_its_answers_go(zebra, tmp_path):
    made = ask(zebra, tmp_path)
    left = tmp_path / ".answers" / "units" / digest(Speaker("z", zebra, tmp_path, SETTINGS, SILENT)._asked(SUITE).inputs)[:16]
    left.mkdir(parents=True)
    (left / "00000.json").write_text("[]")
    assert ask(zebra, tmp_path) == made
    assert not left.parent.exists()


def test_answers_that_cannot_be_read_are_made_anew(zebra, tmp_path):
    made = ask(zebra, tmp_path)
    for damage in ("", "[]", "{", "[1, 2]"):
        kept_file(tmp_path).write_text(damage)
        assert ask(zebra, tmp_path) == made


def test_killed_while_telling_and_asked_again_gives_the_same_bytes(zebra, tmp_path):
    program = f"""
        import os, signal
        from pathlib import Path
        import torch
        from mechmerge.evaluate.answers import Speaker
        from mechmerge.evaluate.record import EvaluateSettings
        from mechmerge.evaluate.suites import Suite
        from mechmerge.models.references import Model
        from mechmerge.progress import SILENT

        torch.set_num_threads(1)
        told = []
        def deadly(rows, said):
            told.append(rows)
            if len(told) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        folder = Path({str(tmp_path)!r})
        read = lambda kind, name: kind.model_validate_json((folder / name).read_text())
        speaker = Speaker("zebra", read(Model, "model"), folder / "samples", read(EvaluateSettings, "settings"), SILENT)
        speaker.answers(read(Suite, "suite"), deadly)
    """
    for name, document in (("model", zebra), ("settings", SETTINGS), ("suite", SUITE)):
        (tmp_path / name).write_text(document.model_dump_json())
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    samples = tmp_path / "samples"
    units = sorted(samples.glob(".answers/units/*/*.json"))
    assert [unit.name for unit in units] == ["00000.json", "00001.json"]
    assert not list(samples.glob(".answers/*.json"))
    stamps = [unit.stat().st_mtime_ns for unit in units]

    seen = []

    def told(rows, said):
        if len(told_rows.calls) < 2:
            seen.append([unit.stat().st_mtime_ns for unit in units])
        told_rows(rows, said)

    told_rows, whole = Listener(samples), Listener(tmp_path / "whole" / "samples")
    ask(zebra, samples, told=told)
    assert seen == [stamps, stamps], "finished batches are not made again"
    ask(zebra, whole.folder, told=whole)
    assert told_rows.calls == whole.calls
    assert kept_file(samples).read_bytes() == kept_file(whole.folder).read_bytes()
    entry = json.loads((tmp_path / "timings.jsonl").read_text())
    assert entry["prompts"] == 2, "only what was made in this call"


# ---------------------------------------------------------------------------------------------------------------------- key
def test_the_key_holds_what_answers_depend_on(zebra, base, tmp_path):
    def key(model: Model = zebra, suite: Suite = SUITE, **settings):
        return Speaker("any", model, tmp_path, SETTINGS.model_copy(update=settings), SILENT).key(suite)

    double = Engine(lambda: "double 1", lambda folder, dtype: None)
    keys = [
        key(),
        key(dtype="bfloat16"),
        key(batch=4),
        key(exact=True),
        key(device="meta"),
        key(written(tmp_path / "ant", base, seed=1)),
        key(suite=SUITE.model_copy(update={"answer_tokens": 6})),
        key(suite=SUITE.model_copy(update={"chat_template": "none"})),
        key(suite=suite_of(["Tea!"])),
        Speaker("x", zebra, tmp_path, SETTINGS.model_copy(update={"backend": "vllm"}), SILENT, double).key(SUITE),
    ]
    assert len(set(keys)) == len(keys)
    assert key(exact=True, batch=4) == key(exact=True)
    assert key(seed=3, resamples=500) == key()
    renamed = SUITE.model_copy(update={"name": "ark", "split": "other"})
    assert key(suite=renamed) == key(), "names are no part of an answer"


# -------------------------------------------------------------------------------------------------------------------- exact
def test_exact_answers_are_found_whatever_the_batch(zebra, tmp_path):
    first = ask(zebra, tmp_path, EXACT)
    recorder, listener = Recorder(), Listener(tmp_path)
    other = EXACT.model_copy(update={"batch": 5})
    assert ask(zebra, tmp_path, other, progress=recorder, told=listener) == first
    assert recorder.started == []
    assert [len(rows) for rows, _ in listener.calls] == [5, 3]
    assert ask(zebra, tmp_path / "alone", EXACT.model_copy(update={"batch": 1})) == first


def test_batches_of_another_plan_are_not_mixed_in(zebra, tmp_path):
    """Stopped with batches of three and asked again with batches of five."""

    class Stop(Recorder):
        def advance(self, units=1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(zebra, tmp_path, EXACT, progress=Stop())
    assert len(list(tmp_path.glob(".answers/units/*/*.json"))) == 1
    assert ask(zebra, tmp_path, EXACT.model_copy(update={"batch": 5})) == ask(zebra, tmp_path / "whole", EXACT)
    assert not (tmp_path / ".answers" / "units").exists()


# ------------------------------------------------------------------------------------------------------------------ timings
def test_timings_tell_generation_from_the_rest(zebra, tmp_path):
    samples = tmp_path / "samples"
    made = ask(zebra, samples)
    ask(zebra, samples)
    (line,) = (tmp_path / "timings.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["stage"] == "evaluate zebra zoo"
    assert (entry["prompts"], entry["tokens"]) == (8, sum(answer.tokens for answer in made.answers))
    parts = [entry[f"{part}_seconds"] for part in ("generation", "loading", "outside")]
    assert all(part > 0 for part in parts)
    assert entry["seconds"] == pytest.approx(sum(parts), abs=0.002)


# ---------------------------------------------------------------------------------------------------------------- bad input
def test_a_context_too_short_names_the_prompt(zebra, tmp_path):
    long = suite_of(["Tea?", "tea " * 300])
    with pytest.raises(
        InputError, match=r"zebra: zoo: prompt p1: expected at most 512 tokens .*; found \d+ \(\d+ of the prompt"
    ):
        ask(zebra, tmp_path, suite=long.model_copy(update={"answer_tokens": 400}))
    assert not list(tmp_path.glob(".answers/**/*.json"))


def test_a_model_of_nan_names_itself_and_the_prompt(base, tmp_path):
    broken = written(tmp_path / "m", base, change=lambda weights: weights["model.norm.weight"].fill_(torch.nan))
    with pytest.raises(InputError, match="zebra: zoo: prompt p1: expected finite logits; found nan"):
        ask(broken, tmp_path / "samples")
    assert not list(tmp_path.glob("samples/.answers/**/*.json"))


def test_a_model_that_says_nothing_is_counted(base, tmp_path):
    def silence(weights):
        weights["model.norm.weight"].zero_()  # all logits are 0, and token 0 is the first of equals: padding

    said = ask(written(tmp_path / "m", base, change=silence), tmp_path / "samples").answers
    assert [tuple(answer) for answer in said] == [("", 5, False)] * len(SUITE.prompts)


# --------------------------------------------------------------------------------------------------------------------- vllm
VLLM = SETTINGS.model_copy(update={"backend": "vllm"})


def test_vllm_that_is_missing_says_what_to_install(zebra, tmp_path):
    with pytest.raises(MissingError, match=r"pip install 'mechmerge\[vllm\]'"):
        ask(zebra, tmp_path, VLLM)
    with pytest.raises(InputError, match="exact: expected backend transformers; found vllm"):
        ask(zebra, tmp_path, VLLM.model_copy(update={"exact": True}))


def test_an_engine_of_lm_eval_answers_in_the_models_place(zebra, tmp_path):
    double = Double()
    made = ask(zebra, tmp_path, VLLM, engine=Engine(lambda: "double 1", lambda folder, dtype: double))
    assert [answer.text for answer in made.answers] == [f"said to {prompt.prompt}"[:20] for prompt in SUITE.prompts]
    assert [len(call) for call in double.calls] == [3, 3, 2]
    assert double.calls[0][0].args[1]["until"] == ["<|im_end|>"]
    assert "<|im_start|>user\n" in double.calls[0][0].args[0]
