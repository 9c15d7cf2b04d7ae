"""What is not published: a gate that did not pass on these weights, a broken model, no right, no room; each in one line."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors

from mechmerge.artifacts import sha256_file
from mechmerge.errors import CheckpointError, GateRefused, InputError, MechmergeError, MissingError
from mechmerge.publish.repository import Repository
from tests.hub import Hub
from tests.hub.accounts import EXPIRED, READER, STRANGER, WRITER
from tests.hub.runner import Runner
from tests.publishing import REPO, WAITS, Publish, card_of, rewrite

# huggingface_hub's own use of httpx2.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


# -------------------------------------------------------------------------------------------------------------------- gate
def refuse(run: Path) -> None:
    rewrite(run / "run.yaml", lambda record: record["pipeline"]["gate"]["rules"][0]["at_least"].update(plus=0.5))


def other_weights(run: Path) -> None:
    shards = {"model.safetensors": "0" * 64}
    rewrite(run / "evaluation.json", lambda value: value["models"]["conflict"]["id"].update(shards=shards))


def other_model(run: Path) -> None:
    rewrite(run / "run.yaml", lambda record: record["pipeline"]["gate"]["rules"][0].update(model="first"))


def unevaluated(run: Path) -> None:
    rewrite(run / "evaluation.json", lambda value: (value["models"].pop("conflict"), value.update(pairs=[])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (refuse, r"gate of conflict: expected every rule to pass; found FAILED .* short by 0\.250"),
        (other_weights, "an evaluation of these very weights; found other weights under this name"),
        (other_model, "a rule about conflict; found none"),
        (unevaluated, "an evaluation of these very weights; found only base, first, second"),
    ],
)
def test_a_gate_that_did_not_pass_on_these_weights_refuses(
    send: Publish, lfs_hub: Hub, run: Path, change: Callable[[Path], None], message: str
) -> None:
    change(run)
    with pytest.raises(GateRefused, match=message) as refused:
        send(run)
    assert refused.value.exit_code == 3
    assert lfs_hub.requests() == []


def test_without_a_gate_only_on_purpose_and_the_card_says_so(send: Publish, lfs_hub: Hub, run: Path) -> None:
    rewrite(run / "run.yaml", lambda record: record["pipeline"].pop("gate"))
    with pytest.raises(InputError, match="expected a gate; found none; pass --gate FILE"):
        send(run)
    send(run, no_gate=True)
    assert "**Published without a gate that passed**" in card_of(lfs_hub)[1]
    gate = run / "gate.yaml"
    gate.write_text("rules: [{metric: formats, at_least: 0.4}]")
    send(run, gate=gate)
    assert "Gate: **passed**" in card_of(lfs_hub)[1]
    assert "without a gate" not in card_of(lfs_hub)[1]


def test_a_refusal_that_is_overridden_still_stands_in_the_card(send: Publish, lfs_hub: Hub, run: Path) -> None:
    refuse(run)
    send(run, no_gate=True)
    body = card_of(lfs_hub)[1]
    assert "Gate: **refused**" in body
    assert "**Published without a gate that passed**" in body


def test_an_evaluation_of_other_weights_is_not_shown(send: Publish, lfs_hub: Hub, run: Path) -> None:
    other_weights(run)
    send(run, no_gate=True)
    metadata, body = card_of(lfs_hub)
    assert "model-index" not in metadata
    assert "nothing is known of what this merge does" in body
    assert "mechmerge/evaluation.json" not in lfs_hub.files(REPO)


def test_a_model_folder_takes_gate_and_evaluation(send: Publish, lfs_hub: Hub, run: Path) -> None:
    folder = Path(shutil.copytree(run / "merged" / "conflict", run.parent / "some-model"))
    gate = run / "gate.yaml"
    gate.write_text("rules: [{metric: formats, at_least: 0.4}]")
    with pytest.raises(InputError, match="pass --gate FILE"):
        send(folder, license="mit")
    with pytest.raises(InputError, match="pass --evaluation FILE"):
        send(folder, license="mit", gate=gate)
    send(folder, license="mit", gate=gate, evaluation=run / "evaluation.json")
    metadata, body = card_of(lfs_hub)
    assert metadata["license"] == "mit"
    assert "This model is the row `conflict`" in body
    assert "scores" not in str(lfs_hub.files(REPO).keys())


# --------------------------------------------------------------------------------------------------------------- bad input
def test_no_token(lfs_hub: Hub, run: Path, tmp_path: Path) -> None:
    with Runner(lfs_hub.env(token=None), tmp_path / "anonymous") as anonymous:
        done = anonymous.mechmerge("publish", run, REPO)
    assert done.code == 4
    assert done.err.strip() == (
        "mechmerge: publishing to writer/merge: expected a token of the Hub; found none; log in with `hf auth login`"
    )
    assert lfs_hub.requests() == []


@pytest.mark.parametrize(
    ("token", "kind", "message"),
    [
        (EXPIRED, MissingError, "expected a valid token; found one that the Hub refuses"),
        (READER, InputError, "expected the right to do this; found a token without it"),
        (STRANGER, InputError, "expected the right to do this; found a token without it"),
    ],
)
def test_tokens_without_the_right(
    send: Publish, lfs_hub: Hub, run: Path, token: str, kind: type[MechmergeError], message: str
) -> None:
    with pytest.raises(kind, match=message) as refused:
        send(run, token=token)
    assert token not in str(refused.value)
    assert lfs_hub.repositories == {}
    assert WAITS == []


def test_a_token_that_expires_on_the_way(send: Publish, lfs_hub: Hub, run: Path) -> None:
    lfs_hub.faults.add("expired", method="POST", pattern="/commit/main")
    with pytest.raises(MissingError, match="a valid token"):
        send(run)
    assert lfs_hub.files(REPO) == {}
    lfs_hub.accounts.renew()
    assert send(run).uploaded == ()


def test_a_repository_of_another_type(send: Publish, lfs_hub: Hub, run: Path) -> None:
    Repository(REPO, "dataset", endpoint=lfs_hub.url, token=WRITER).create(private=False)
    with pytest.raises(InputError, match="expected a model repository, or a name that is free; found a dataset repository"):
        send(run)
    assert ("models", REPO) not in lfs_hub.repositories


@pytest.mark.parametrize(
    "name", ["merge", "a/b/c", "writer/with space", "writer/a--b", "writer/a..b", "writer/x.git", "-/x", ""]
)
def test_names_that_the_hub_refuses(send: Publish, lfs_hub: Hub, run: Path, name: str) -> None:
    with pytest.raises(InputError, match="expected owner/name as the Hub takes it"):
        send(run, name)
    assert lfs_hub.requests() == []


def test_a_licence_that_cannot_be_worked_out(send: Publish, lfs_hub: Hub, run: Path) -> None:
    rewrite(run / "run.yaml", lambda record: record["pipeline"].pop("license"))
    with pytest.raises(InputError, match="licence of the merge: expected parents under one known licence"):
        send(run)
    assert not [entry for entry in lfs_hub.requests() if entry.method != "GET"]
    send(run, license="apache-2.0")
    assert card_of(lfs_hub)[0]["license"] == "apache-2.0"


def test_a_card_that_the_hub_refuses_stops_before_any_weights(send: Publish, lfs_hub: Hub, run: Path) -> None:
    lfs_hub.faults.add("error", method="POST", pattern="validate-yaml", status=400)
    with pytest.raises(InputError, match=r"expected what the Hub takes; found Invalid metadata in README\.md"):
        send(run)
    assert not [entry for entry in lfs_hub.requests() if entry.method == "PUT"]


def spoil(run: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Changes the merged weights, and has them evaluated anew."""
    file = run / "merged" / "conflict" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_tensors(tensors, file, {"format": "pt"})
    shards = {"model.safetensors": sha256_file(file)}
    rewrite(run / "evaluation.json", lambda value: value["models"]["conflict"]["id"].update(shards=shards))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors["model.norm.weight"].fill_(float("nan")), r"norm\.weight: expected finite weights; found NaN"),
        (lambda tensors: tensors.pop("model.norm.weight"), r"model\.norm\.weight: expected a tensor of this name; found none"),
    ],
)
def test_a_model_that_is_not_whole_or_not_finite(
    send: Publish, lfs_hub: Hub, run: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    spoil(run, change)
    with pytest.raises(CheckpointError, match=message):
        send(run)
    assert lfs_hub.requests() == []


def test_a_model_that_does_not_load(send: Publish, run: Path) -> None:
    rewrite(run / "merged/conflict/config.json", lambda config: config.update(hidden_act="no-such-thing"))
    with pytest.raises(CheckpointError, match="expected a model that transformers can build"):
        send(run)


def test_nothing_there_and_nothing_merged(send: Publish, run: Path) -> None:
    with pytest.raises(InputError, match="expected a run directory or a model folder"):
        send(run / "nowhere")
    shutil.rmtree(run / "merged")
    with pytest.raises(InputError, match=r"expected a model with its mechmerge/recipe\.yaml"):
        send(run)


@pytest.mark.parametrize("xet", [False, True])
def test_a_full_quota(run: Path, tmp_path: Path, xet: bool) -> None:
    with Hub(tmp_path / "hub", xet=xet, quota=1000) as hub, Runner(hub.env(), tmp_path / "output") as publisher:
        done = publisher.mechmerge("publish", run, REPO)
        assert done.code == 4, done.err
        assert re.search(r"mechmerge: .*expected room on the Hub; found .*limit.*; free some storage", done.err)
        assert hub.files(REPO) == {}


def test_contradicting_modes_are_wrong_usage(lfs_hub: Hub, publisher: Runner, run: Path) -> None:
    done = publisher.mechmerge("publish", run, REPO, "--pr", "--direct")
    assert done.code == 2
    assert "exclude each other" in done.err
