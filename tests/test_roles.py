"""Roles from the measurements of a score file: thresholds, rules, the summary by depth, and the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from mechmerge.artifacts import write_arrays
from mechmerge.errors import SchemaError
from mechmerge.localize.roles import ROLES, RoleSummary, RoleThresholds, roles_of, summarize
from mechmerge.localize.scores import ScoreFile, read_scores
from tests.samples import role_arrays, score_file

NAN = float("nan")
RULE = RoleThresholds()


def one(kind: str = "mlp", *, after: bool = False, rule: RoleThresholds = RULE, **measures: tuple[float, float]) -> str:
    """The role of the second layer's only component, from measures → (value, standard error)."""
    arrays = {}
    for name, (value, error) in measures.items():
        for suffix, number in (("", value), (".stderr", error)):
            arrays[f"{kind}.{name}{suffix}"] = np.array([[NAN], [number]], np.float32)
    return str(roles_of(arrays, kind, 1 if after else 2, rule)[1, 0])


@pytest.mark.parametrize(
    ("measures", "role"),
    [
        # Weight patching decides on sources, whatever else there is.
        ({"sufficiency": (0.2, 0.02)}, "source"),
        ({"sufficiency": (0.2, 0.02), "activation": (0.9, 0.02)}, "source"),
        ({"sufficiency": (0.2, 0.02), "activation": (0.0, 0.0)}, "source"),
        # High only by its mean, or clearly above 0 but small: neither high nor low.
        ({"sufficiency": (0.2, 0.11), "activation": (0.0, 0.01)}, "unclear"),
        ({"sufficiency": (0.04, 0.001), "activation": (0.0, 0.01)}, "unclear"),
        # A relay: what it carries, its own weights do not make.
        ({"sufficiency": (0.0, 0.01), "activation": (0.3, 0.02)}, "router"),
        ({"sufficiency": (0.04, 0.005), "activation": (0.3, 0.02)}, "router"),
        ({"sufficiency": (-0.3, 0.05), "activation": (0.3, 0.02)}, "router"),
        ({"sufficiency": (0.04, 0.06), "activation": (0.3, 0.02)}, "unclear"),
        ({"sufficiency": (0.0, 0.01), "activation": (0.3, 0.2)}, "unclear"),
        ({"sufficiency": (0.04, 0.001), "activation": (0.06, 0.01)}, "unclear"),
        # Inert takes all of them.
        ({"sufficiency": (0.0, 0.01), "activation": (0.01, 0.01)}, "inert"),
        ({"sufficiency": (0.0, 0.01), "activation": (0.01, 0.03)}, "unclear"),
        ({"sufficiency": (0.0, 0.01), "activation": (0.01, 0.01), "necessity": (0.0, 0.01)}, "inert"),
        ({"sufficiency": (0.0, 0.01), "activation": (0.01, 0.01), "necessity": (0.4, 0.01)}, "unclear"),
        # What was not measured is not guessed.
        ({"sufficiency": (0.0, 0.01)}, "unknown"),
        ({"activation": (0.5, 0.01)}, "unknown"),
        ({"sufficiency": (NAN, NAN), "activation": (0.0, 0.01)}, "unknown"),
        ({"sufficiency": (0.2, NAN), "activation": (0.0, 0.01)}, "unknown"),
        # The output does not judge components below the anchor.
        ({"sufficiency": (0.0, 0.01), "activation": (0.01, 0.01), "output": (0.9, 0.01)}, "inert"),
    ],
)
def test_roles_below_the_anchor(measures: dict[str, tuple[float, float]], role: str) -> None:
    assert one(**measures) == role


@pytest.mark.parametrize(
    ("output", "role"),
    [
        ((0.3, 0.05), "execution"),
        ((0.0, 0.01), "inert"),
        ((-0.5, 0.01), "inert"),
        ((0.3, 0.2), "unclear"),
        ((0.03, 0.001), "unclear"),
        ((NAN, NAN), "unknown"),
    ],
)
def test_components_after_the_anchor_are_judged_on_the_output_alone(output: tuple[float, float], role: str) -> None:
    zero = {"sufficiency": (0.0, 0.0), "activation": (0.0, 0.0)}
    assert one(after=True, output=output, **zero) == role
    assert one(after=True, output=output) == role


def test_a_kind_has_its_own_threshold() -> None:
    for kind, high in (("layer", 0.05), ("attention", 0.05), ("mlp", 0.05), ("head", 0.02), ("kv", 0.02), ("neuron", 0.005)):
        assert one(kind, sufficiency=(1.01 * high, high / 10)) == "source"
        assert one(kind, sufficiency=(0.99 * high, high / 10), activation=(0.0, 0.0)) == "unclear"


def test_thresholds_are_settings() -> None:
    noisy = {"sufficiency": (0.2, 0.15), "activation": (0.0, 0.0)}
    assert one(**noisy) == "unclear"
    assert one(rule=RoleThresholds(errors=1), **noisy) == "source"
    assert one(rule=RoleThresholds(module=0.5), **noisy) == "unclear"
    # With no errors asked for, means decide, with or without a stored error.
    assert one(rule=RoleThresholds(errors=0), sufficiency=(0.2, NAN)) == "source"
    assert one(rule=RoleThresholds(low=0.9), sufficiency=(0.04, 0.001), activation=(0.0, 0.0)) == "inert"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head": 0.1}, r"head \(0.1\) must not be above module \(0.05\)"),
        ({"neuron": 0.03}, r"neuron \(0.03\) must not be above head \(0.02\)"),
        ({"low": 1.0}, "low"),
        ({"module": 0.0}, "module"),
        ({"errors": -1.0}, "errors"),
        ({"hihg": 1.0}, "hihg"),
    ],
)
def test_thresholds_out_of_range_are_refused(changes: dict[str, float], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RoleThresholds.model_validate(changes)


# ----------------------------------------------------------------------------------------------------------------- summary
def summary(**changes: Any) -> RoleSummary:
    found = summarize(role_arrays() | changes, 4, "recovery")
    assert found is not None
    return found


def test_the_summary_counts_every_component_once() -> None:
    arrays, found = role_arrays(), summary()
    for kind, counts in found.counts.items():
        assert sum(counts.values()) == arrays[f"{kind}.sufficiency"].size
        roles = roles_of(arrays, kind, 4, found.thresholds)
        assert set(roles.ravel()) <= set(ROLES)
        assert counts == {role: (roles == role).sum() for role in ROLES if (roles == role).any()}
    assert found.counts["mlp"] == {"source": 2, "execution": 1, "inert": 3}
    assert found.counts["attention"] == {"router": 2, "inert": 2, "unknown": 2}


def test_depths_sum_what_is_positive_below_the_anchor() -> None:
    arrays, found = role_arrays(), summary()
    assert [(depth.first, depth.last) for depth in found.layers] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert [(depth.first, depth.last) for depth in found.thirds] == [(0, 1), (2, 2), (3, 3)]
    for kind in ("attention", "mlp"):
        for measure in ("sufficiency", "activation"):
            plain = [max(float(value), 0) for value in arrays[f"{kind}.{measure}"][:4, 0]]
            assert [getattr(depth, measure)[kind] for depth in found.layers] == pytest.approx(plain)
            thirds = [plain[0] + plain[1], plain[2], plain[3]]
            assert [getattr(depth, measure)[kind] for depth in found.thirds] == pytest.approx(thirds)


def test_the_sentence_says_which_depth_holds_sources_and_which_routes() -> None:
    assert summary().sentence == (
        "weight patching (sources): 97 % in MLPs, most in the MLPs of the first third (L0–L1: 97 %), strongest L0.mlp 0.40 ± "
        "0.02, L1.mlp 0.20 ± 0.02; activation patching (routes): 59 % in attention, most in the MLPs of the first third "
        "(L0–L1: 39 %), strongest L3.attention 0.60 ± 0.02, L2.attention 0.50 ± 0.02; output after the "
        "anchor, strongest L5.mlp 0.50 ± 0.05"
    )


def test_what_was_not_measured_is_said() -> None:
    arrays = {name: array for name, array in role_arrays().items() if ".activation" not in name and ".output" not in name}
    found = summarize(arrays, 4, "recovery")
    assert found is not None
    assert "activation patching (routes): not measured on modules, no module is clearly one of the routers" in found.sentence
    assert "output" not in found.sentence
    assert found.layers[0].activation == {"attention": None, "mlp": None}
    assert found.counts["mlp"] == {"source": 2, "unknown": 4}
    alone = summarize({"mlp.sufficiency": role_arrays()["mlp.sufficiency"]}, 4, "recovery", RoleThresholds(errors=0))
    assert alone is not None
    assert "100 % in MLPs (the other was not measured)" in alone.sentence
    assert "strongest L0.mlp 0.40, L1.mlp 0.20;" in alone.sentence
    nothing = summarize({"mlp.sufficiency": np.full((6, 1), -1, np.float32)}, 4, "recovery")
    assert nothing is not None
    assert "weight patching (sources): nothing above 0" in nothing.sentence


def test_raw_differences_have_no_roles(tmp_path: Path) -> None:
    assert summarize(role_arrays(), 4, "difference") is None
    file = score_file()
    wrong = ScoreFile(file.metadata.model_copy(update={"scale": "difference", "roles": summary()}), file.arrays)
    write_arrays(tmp_path / "wrong", wrong.arrays, wrong.metadata)
    with pytest.raises(SchemaError, match="raw differences"):
        read_scores(tmp_path / "wrong")


def test_a_shallow_anchor_and_an_empty_file_are_summed_up_too() -> None:
    for layer in (1, 2):
        found = summarize(role_arrays(), layer, "recovery")
        assert found is not None
        assert [depth.first for depth in found.thirds] == list(range(layer))
        assert "of the part (L0: " in found.sentence
    empty = summarize({}, 4, "recovery")
    assert empty is not None
    assert (empty.counts, empty.layers) == ({}, ())


def test_roles_stand_in_the_file_and_follow_from_its_arrays(tmp_path: Path) -> None:
    file = score_file(roles=summary())
    file = ScoreFile(file.metadata, file.arrays | role_arrays())
    file.write(tmp_path / "scores")
    read = read_scores(tmp_path / "scores")
    assert read.metadata.roles == summary()
    roles = read.roles("mlp")
    assert roles is not None
    assert list(roles[:, 0]) == ["source", "source", "inert", "inert", "inert", "execution"]
    assert read.roles("layer") is None
    assert score_file().roles("mlp") is None


def test_a_file_from_before_roles_is_read(tmp_path: Path) -> None:
    old = score_file()
    fields = old.metadata.model_dump(mode="json")
    assert (fields.pop("roles"), fields.pop("verification")) == (None, {})

    class Plain:
        def model_dump(self, mode: str) -> dict[str, Any]:
            return fields

    write_arrays(tmp_path / "old", old.arrays, Plain())  # type: ignore[arg-type]
    assert read_scores(tmp_path / "old").metadata == old.metadata
