"""Pickled checkpoints: refused; read without their code where the user allows it."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mechmerge.errors import CheckpointError
from mechmerge.models.pickles import ALLOWED
from mechmerge.models.references import Model, resolve


@pytest.fixture
def allowed() -> Iterator[None]:
    token = ALLOWED.set(True)
    yield
    ALLOWED.reset(token)


@pytest.fixture
def pickled(base: Model, tmp_path: Path) -> Path:
    """The base as a pickle, its tied head beside the embeddings."""
    folder = Path(shutil.copytree(base.path, tmp_path / "pickled"))
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_without_leave_it_is_refused(pickled: Path) -> None:
    with pytest.raises(CheckpointError, match=r"found the pickle pytorch_model\.bin; pickles can run code and are refused"):
        resolve(str(pickled))


def test_with_leave_the_tensors_are_the_same(pickled: Path, base: Model, allowed: None) -> None:
    model = resolve(str(pickled))
    assert model.id.name == "pickled"
    one, other = base.checkpoint(), model.checkpoint()
    assert one.shapes == other.shapes
    assert all(torch.equal(tensor, other.tensor(name)) for name, tensor in one.tensors())
    assert model.sides == base.sides
    assert resolve(str(pickled)).path == model.path, "made once"


def test_shards_of_a_pickle(pickled: Path, base: Model, allowed: None) -> None:
    tensors = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    names = sorted(tensors)
    halves = {"pytorch_model-1.bin": names[:5], "pytorch_model-2.bin": names[5:]}
    for file, half in halves.items():
        torch.save({name: tensors[name] for name in half}, pickled / file)
    (pickled / "pytorch_model.bin").unlink()
    weight_map = {name: file for file, half in halves.items() for name in half}
    index = pickled / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert resolve(str(pickled)).checkpoint().shapes == base.checkpoint().shapes
    for outside in ("../pytorch_model-1.bin", "pytorch_model-3.bin", "model.py"):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": outside}}))
        with pytest.raises(CheckpointError, match=r"expected names of \.bin files beside it"):
            resolve(str(pickled))


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_pickle_never_runs(pickled: Path, tmp_path: Path, allowed: None, protocol: int) -> None:
    ran = tmp_path / "ran"
    evil = {"model.norm.weight": Evil(f"touch {ran}")}
    torch.save(evil, pickled / "pytorch_model.bin", pickle_protocol=protocol)
    with pytest.raises(CheckpointError, match="expected a pickle of tensors alone"):
        resolve(str(pickled))
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(evil, protocol=protocol))
    with pytest.raises(CheckpointError, match="expected a pickle of tensors alone"):
        resolve(str(pickled))
    assert not ran.exists()


@pytest.mark.parametrize("value", [[torch.zeros(2)], {"state_dict": {"a": torch.zeros(2)}}, {"epoch": 3}, {1: torch.zeros(2)}])
def test_what_is_no_mapping_of_tensors(pickled: Path, allowed: None, value: object) -> None:
    torch.save(value, pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="expected a mapping of names to tensors"):
        resolve(str(pickled))
