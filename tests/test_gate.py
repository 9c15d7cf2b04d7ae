"""The gate: what passes, what fails by how much, and what was not measured refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mechmerge.artifacts import parse_document, parse_yaml
from mechmerge.cli.main import main
from mechmerge.errors import InputError, SchemaError
from mechmerge.evaluate.columns import Column
from mechmerge.evaluate.gate import Gate, check_gate
from mechmerge.evaluate.record import EvaluateSettings, Evaluation, Metric, ModelResult, ResponsesId, SuiteRecord, SuiteResult
from mechmerge.evaluate.statistics import paired
from mechmerge.models.references import ModelId
from tests.samples import plain_units

VALUES = {
    "base": {"formats": 0.27, "arithmetic": 0.05},
    "arithmetic": {"arithmetic": 0.9},
    "merge": {"formats": 0.47, "arithmetic": 0.7},
}


def evaluation():
    def result(metrics):
        suites = {
            name: SuiteResult(
                metrics={name: Metric(value=value, n=100, clusters=20, low=max(0.0, value - 0.1), high=value)},
                outcomes={name: "1" * round(100 * value) + "0" * round(100 - 100 * value)},
                errors=0,
                tokens=1,
                unfinished=0,
                template="none",
                answers="0",
            )
            for name, value in metrics.items()
        }
        return ModelResult(id=ModelId(name="m"), suites=suites)

    records = {
        name: SuiteRecord(
            digest="0",
            split="test",
            prompts=100,
            answer_tokens=8,
            chat_template="model",
            groups=("all",),
            units={name: plain_units(100, 100)},
        )
        for name in ("formats", "arithmetic")
    }
    return Evaluation(
        suites=records,
        models={name: result(metrics) for name, metrics in VALUES.items()},
        against=(),
        pairs=(),
        settings=EvaluateSettings(),
        versions={},
    )


def gate(text):
    return parse_document(Gate, parse_yaml(text, "gate.yaml"), "gate.yaml")


def check(rule, model="merge"):
    return check_gate(evaluation(), gate(f"rules: [{rule}]"), model).rules[0]


@pytest.mark.parametrize(
    ("rule", "passed", "bound"),
    [
        ("{metric: formats, at_least: {model: base, plus: 0.20}}", True, 0.47),
        ("{metric: formats, at_least: {model: base, plus: 0.21}}", False, 0.48),
        ("{metric: arithmetic, at_least: {model: arithmetic, times: 0.8}}", False, 0.72),
        ("{metric: arithmetic, at_least: {model: arithmetic, times: 0.7}}", True, 0.63),
        ("{metric: arithmetic, at_least: {model: base, metric: formats, times: 2, plus: 0.1}}", True, 0.64),
        ("{metric: arithmetic, at_least: 0.65}", True, 0.65),
        ("{metric: arithmetic, at_least: 0.65, use: low}", False, 0.65),
        ("{metric: arithmetic, at_least: 0.55, use: low}", True, 0.55),
        ("{metric: arithmetic, model: arithmetic, at_least: 0.9}", True, 0.9),
    ],
)
def test_rules(rule, passed, bound):
    result = check(rule)
    assert result.passed is passed
    assert result.bound == pytest.approx(bound)
    assert result.short_by == (0.0 if passed else pytest.approx(bound - result.found))


@pytest.mark.parametrize(
    ("rule", "missing"),
    [
        ("{metric: poetry, at_least: 0}", "poetry"),
        ("{metric: formats, model: nobody, at_least: 0}", "nobody"),
        ("{metric: formats, at_least: {model: nobody}}", "nobody"),
        ("{metric: formats, at_least: {model: arithmetic}}", "formats"),
    ],
)
def test_what_was_not_measured_refuses(rule, missing):
    result = check(rule)
    assert not result.passed
    assert missing in result.problem
    assert "REFUSED" in result.line
    assert not check_gate(evaluation(), gate(f"rules: [{rule}]"), "merge").passed


def test_one_failing_rule_fails_the_gate():
    text = "rules: [{metric: formats, at_least: 0.1}, {metric: arithmetic, at_least: 0.95}]"
    result = check_gate(evaluation(), gate(text), "merge")
    assert not result.passed
    assert [rule.metric for rule in result.failed] == ["arithmetic"]
    line = "FAILED  arithmetic of merge ≥ 0.95: found 0.700, needed 0.950, short by 0.250; at no n while the value stays"
    assert result.failed[0].line == line


def test_the_model_is_the_rules_the_callers_or_the_gates():
    text = "model: base\nrules: [{metric: formats, at_least: 0.4}]"
    assert not check_gate(evaluation(), gate(text)).passed
    assert check_gate(evaluation(), gate(text), "merge").passed
    with pytest.raises(InputError, match="--model"):
        check_gate(evaluation(), gate("rules: [{metric: formats, at_least: 0.4}]"))


@pytest.mark.parametrize(
    "text",
    [
        "rules: []",
        "rules: [{metric: formats}]",
        "rules: [{metric: formats, at_least: 20}]",
        "rules: [{metric: formats, at_least: {model: base, minus: 1}}]",
        "rules: [{metric: formats, at_least: .inf}]",
        "rules: [{metric: formats, at_least: 0.5, at_most: 0.6}]",
        "rules: [{metric: formats, at_least: 0.5}]\nmodels: base",
    ],
)
def test_bad_gates_are_refused(text):
    with pytest.raises(SchemaError):
        gate(text)


@pytest.fixture
def files(tmp_path):
    evaluation().write(tmp_path / "evaluation.json")
    (tmp_path / "good.yaml").write_text("model: merge\nrules: [{metric: formats, at_least: {model: base, plus: 0.1}}]")
    (tmp_path / "bad.yaml").write_text("model: merge\nrules: [{metric: formats, at_least: {model: base, plus: 0.5}}]")
    return tmp_path


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main(["gate", *map(str, arguments)])
    return stop.value.code


def test_command(files, capsys):
    assert run(files / "evaluation.json", files / "good.yaml") == 0
    assert capsys.readouterr().out == "passed  formats of merge ≥ base + 0.1: found 0.470, needed 0.370\n"
    assert run(files / "evaluation.json", files / "bad.yaml") == 3
    out, err = capsys.readouterr()
    assert "short by 0.300" in out
    assert "short by 0.300" in err
    assert err.count("\n") == 1
    assert run(files / "evaluation.json", files / "bad.yaml", "--format", "json") == 3
    printed = json.loads(capsys.readouterr().out)
    assert printed["passed"] is False
    assert printed["rules"][0]["short_by"] == pytest.approx(0.3)


def test_command_with_files_that_are_not_there_or_broken(files, capsys):
    assert run(files / "nothing.json", files / "good.yaml") == 2
    (files / "broken.json").write_text('{"schema_version": 1}')
    assert run(files / "broken.json", files / "good.yaml") == 2
    assert "broken.json" in capsys.readouterr().err


def rule(text):
    """What becomes of one rule for the merge."""
    gate = parse_document(Gate, parse_yaml(f"rules: [{text}]", "gate"), "gate")
    return check_gate(evaluation(), gate, "merge").rules[0]


def test_a_difference_is_judged_on_the_paired_interval():
    passed = rule("{metric: formats, difference_to: base, at_least: 0.1, use: low}")
    assert passed.passed
    assert 0.1 < passed.found < 0.2, "the 20 prompts that only the merge passes, less what chance may give"
    failed = rule("{metric: formats, difference_to: base, at_least: 0.19, use: low}")
    assert not failed.passed
    assert failed.could_pass_at > failed.n == 100
    assert f"n ≈ {failed.could_pass_at}" in failed.line
    never = rule("{metric: formats, difference_to: base, at_least: 0.21, use: low}")
    assert never.could_pass_at is None
    assert "at no n" in never.line
    assert rule("{metric: formats, difference_to: base, at_least: 0.2}").passed


def test_a_share_of_the_gain_that_is_kept():
    kept = rule("{metric: arithmetic, retained: {expert: arithmetic}, at_least: 0.7}")
    assert kept.found == pytest.approx((0.7 - 0.05) / (0.9 - 0.05))
    low = rule("{metric: arithmetic, retained: {expert: arithmetic}, at_least: 0.7, use: low}")
    assert low.found < kept.found
    undefined = rule("{metric: arithmetic, retained: {expert: base, base: arithmetic}, at_least: 0.7}")
    assert "no share" in undefined.problem.replace("no share of it", "no share")
    assert not undefined.passed


@pytest.mark.parametrize(
    "text",
    [
        "{metric: formats, difference_to: base, retained: {expert: arithmetic}, at_least: 0.1}",
        "{metric: formats, difference_to: base, at_least: {model: base}}",
        "{metric: formats, at_least: 1.5}",
    ],
)
def test_rules_that_contradict_themselves(text):
    with pytest.raises(SchemaError):
        rule(text)


def test_a_gate_is_bound_to_the_weights():
    gate = parse_document(Gate, parse_yaml("rules: [{metric: formats, at_least: 0.1}]", "gate"), "gate")
    same, other = ModelId(name="m"), ModelId(name="m", shards={"model.safetensors": "0" * 64})
    bound = check_gate(evaluation(), gate, "merge", weights={"merge": same})
    assert bound.passed
    assert bound.weights == {"merge": same.digest}
    refused = check_gate(evaluation(), gate, "merge", weights={"merge": other})
    assert not refused.passed
    assert "evaluate the model again" in refused.rules[0].problem
    made = evaluation()
    answers = ResponsesId(name="a.jsonl", sha256="0", rows=1, unmatched=0, joined="key")
    made.models["merge"] = made.models["merge"].model_copy(update={"id": answers})
    assert "made elsewhere" in check_gate(made, gate, "merge", weights={"merge": same}).rules[0].problem


def test_a_gate_file_may_name_the_weights_itself():
    def pinned(name, digest):
        text = f"{{weights: {{{name}: '{digest}'}}, rules: [{{metric: formats, at_least: 0.1}}]}}"
        return parse_document(Gate, parse_yaml(text, "gate"), "gate")

    same, other = ModelId(name="m"), ModelId(name="m", shards={"model.safetensors": "0" * 64})
    passed = check_gate(evaluation(), pinned("merge", same.digest), "merge")
    assert passed.passed
    assert passed.weights == {"merge": same.digest}
    refused = check_gate(evaluation(), pinned("merge", other.digest), "merge")
    assert "evaluate the model again" in refused.rules[0].problem
    # What the caller asks for binds as well: neither stands in for the other.
    both = check_gate(evaluation(), pinned("merge", same.digest), "merge", weights={"merge": other})
    assert "evaluate the model again" in both.rules[0].problem
    with pytest.raises(InputError, match="gate weights of mergee: expected one of merge"):
        check_gate(evaluation(), pinned("mergee", same.digest), "merge")
    with pytest.raises(SchemaError, match="weights"):
        pinned("merge", "abc")


@pytest.mark.slow
def test_no_difference_is_seldom_accepted():
    """Two models of equal quality: `difference > 0` on the lower end passes in at most 5 % of evaluations (one-sided 2.5 %)."""
    rng = np.random.default_rng(0)
    groups = ["all"] * 96
    for size in (1, 4):
        clusters = [str(i // size) for i in range(96)]
        accepted = 0
        for seed in range(400):
            level = np.repeat(rng.beta(2, 2, 96 // size), size)
            a, b = ((rng.random(96) < level).astype(float).tolist() for _ in range(2))
            accepted += paired(Column(a, clusters, groups), Column(b, clusters, groups), seed=seed, resamples=400).low > 0
        assert accepted <= 0.05 * 400


@pytest.mark.slow
def test_a_loss_is_seldom_taken_for_a_tie():
    """A model .05 worse than a parent near 1 must not pass `difference ≥ −.05` too often: a percentile interval does in half
    of all draws, since few of 24 prompts differ.
    """
    rng = np.random.default_rng(1)
    clusters, groups = [str(i) for i in range(24)], ["all"] * 24
    accepted = plain = 0
    for seed in range(400):
        level = rng.random(24)
        merged, parent = (Column((level < rate).astype(float).tolist(), clusters, groups) for rate in (0.93, 0.98))
        found = paired(merged, parent, seed=seed, resamples=400)
        accepted += found.low > -0.05
        plain += np.subtract(merged.values, parent.values).mean() == 0  # nothing differs: its interval is [0, 0]
    assert plain > 0.25 * 400
    assert accepted <= 0.05 * 400
