"""The direct writer: it equals its plain formula bit for bit, and mergekit wherever nothing is copied."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mechmerge.errors import CheckpointError, InputError, MechmergeError
from mechmerge.merge.arithmetic import combine, select
from mechmerge.merge.cuts import BASE, copied_from
from mechmerge.merge.engine import merge
from mechmerge.merge.executor import execute
from mechmerge.merge.files import lay_out
from mechmerge.merge.mapped import Mapped
from mechmerge.merge.pieces import Copy, Rows, pieces_of
from mechmerge.merge.reference import coefficient_tensor, direct_tensor
from mechmerge.merge.writer import clone, cuts_of, write_weights
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.components import UNIT_KINDS
from mechmerge.models.references import Model, resolve
from mechmerge.recipe.coefficients import Coefficients, coefficients
from mechmerge.recipe.compile import compile_recipe
from mechmerge.recipe.emit import emit_masked
from mechmerge.recipe.schema import Masks, Rule, read_recipe, write_recipe
from mechmerge.recipe.sources import Sources
from tests.test_components import MODEL_TYPES
from tests.test_merge import random_masks, written
from tests.tiny import tiny_expert, tiny_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def found_in(file: Path, base: Checkpoint) -> Coefficients:
    recipe, masks = read_recipe(file)
    return coefficients(recipe, masks, base.arch)


def write(file: Path, out: Path, base: Checkpoint, experts: Mapping[str, Checkpoint], **options: Any) -> Checkpoint:
    """The weights alone, with a config so that they can be opened."""
    recipe, _ = read_recipe(file)
    out.mkdir()
    write_weights(base, experts, found_in(file, base), recipe.out_dtype, out, **options)
    shutil.copyfile(base.folder / "config.json", out / "config.json")
    return Checkpoint(out)


def check(merged: Checkpoint, file: Path, base: Checkpoint, experts: Mapping[str, Checkpoint]) -> None:
    """Bit for bit what the plain twin gives."""
    found, dtype = found_in(file, base), DTYPES[read_recipe(file)[0].out_dtype]
    assert merged.shapes == base.shapes
    for name, tensor in merged.tensors():
        assert tensor.dtype == dtype
        assert torch.equal(bits(tensor), bits(direct_tensor(name, base, experts, found, dtype))), name


def opened(experts: Mapping[str, Model]) -> dict[str, Checkpoint]:
    return {name: model.checkpoint() for name, model in experts.items()}


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, dict[str, Model]]:
    """A bf16 base in several shards, and two experts in one file each."""
    folder = tmp_path_factory.mktemp("trio")
    base = resolve(str(tiny_model(folder / "base", dtype="bfloat16", tied=False, shard_size="30KB")))
    return base, {f"e{i}": resolve(str(tiny_expert(base.path, folder / f"e{i}", seed=i))) for i in range(2)}


# ------------------------------------------------------------------------------------------------------------ the formula
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_every_family_equals_the_formula_and_mergekit(family: str, tmp_path: Path) -> None:
    base = resolve(str(tiny_model(tmp_path / "base", family, layers=2, dtype="bfloat16")))
    experts = {f"e{i}": resolve(str(tiny_expert(base.path, tmp_path / f"e{i}", seed=i))) for i in range(3)}
    rules = (Rule(component="L1.norms", expert="e0", coefficient=0.5), Rule(component="embed", expert="e2", coefficient=0.0))
    file = written(tmp_path, base, experts, random_masks(base, experts), 0.9, rules=rules)
    one, others = base.checkpoint(), opened(experts)
    merged = write(file, tmp_path / "out", one, others)
    check(merged, file, one, others)
    (tmp_path / "mergekit").mkdir()
    paths = {"base": base.path} | {name: model.path for name, model in experts.items()}
    execute(emit_masked(read_recipe(file)[0], file, paths), one, list(others.values()), tmp_path / "mergekit")
    shutil.copyfile(base.path / "config.json", tmp_path / "mergekit" / "config.json")
    theirs, found, copied, summed = Checkpoint(tmp_path / "mergekit"), found_in(file, one), 0, 0
    for name, tensor in merged.tensors():
        shares = torch.stack([coefficient_tensor(name, one, found, expert) for expert in experts])
        alone = ((shares != 0).sum(0) == 1) & (shares == 1).any(0)
        everyone = (shares != 0).all(0)
        other = theirs.tensor(name)
        assert torch.equal(tensor[~alone], other[~alone]), name
        assert torch.equal(tensor[everyone].view(torch.int16), other[everyone].view(torch.int16)), name
        copied, summed = copied + int(alone.sum()), summed + int(everyone.sum())
    assert copied
    assert summed


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_every_pair_of_dtypes_equals_the_formula(tmp_path: Path, stored: str, out_dtype: Any) -> None:
    base = resolve(str(tiny_model(tmp_path / "base", dtype=stored)))
    experts = {f"e{i}": resolve(str(tiny_expert(base.path, tmp_path / f"e{i}", seed=i))) for i in range(2)}
    file = written(tmp_path, base, experts, random_masks(base, experts), 0.9, out_dtype=out_dtype)
    one, others = base.checkpoint(), opened(experts)
    check(write(file, tmp_path / "out", one, others), file, one, others)


def test_experts_of_another_dtype_than_the_base(base: Model, tmp_path: Path) -> None:
    half = resolve(str(tiny_model(tmp_path / "half", dtype="float16", seed=5)))
    mixed = tmp_path / "mixed"
    shutil.copytree(half.path, mixed)
    tensors = load_file(mixed / "model.safetensors")
    save_file({n: t.double() if "mlp" in n else t for n, t in tensors.items()}, mixed / "model.safetensors", {"format": "pt"})
    experts = {"half": half, "mixed": resolve(str(mixed))}
    for default in (1.0, 0.5):
        file = written(tmp_path / str(default), base, experts, random_masks(base, experts), default, out_dtype="float32")
        one, others = base.checkpoint(), opened(experts)
        check(write(file, tmp_path / f"out{default}", one, others), file, one, others)


SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-8, -1e-8, 3.0, 1e-30, 65504.0, 0.1, -0.3, 5.9604645e-08]


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.dtype, torch.dtype, list[torch.Tensor], np.ndarray, int]:
    rows, columns, experts, dim = draw(st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 3), st.integers(0, 1)))
    element = st.sampled_from(SPECIAL)
    matrices = [
        torch.tensor(draw(st.lists(element, min_size=rows * columns, max_size=rows * columns))).reshape(rows, columns)
        for _ in range(experts + 1)
    ]
    size = (rows, columns)[dim] * experts
    values = draw(st.lists(st.sampled_from([0.0, -0.0, 1.0, 0.3, -0.7, 2.0]), min_size=size, max_size=size))
    stored, out = draw(st.tuples(st.sampled_from([*DTYPES.values()]), st.sampled_from([torch.float32, torch.bfloat16])))
    return stored, out, [m.to(stored) for m in matrices], np.float32(values).reshape(experts, -1), dim


@given(problem=problems())
@settings(max_examples=150, deadline=None)
def test_the_arithmetic_equals_a_plain_loop(
    problem: tuple[torch.dtype, torch.dtype, list[torch.Tensor], np.ndarray, int],
) -> None:
    _, out_dtype, (base, *experts), values, dim = problem
    expected = torch.empty(base.shape, dtype=out_dtype)
    for row in range(base.shape[0]):
        for column in range(base.shape[1]):
            here = [float(v) for v in values[:, (row, column)[dim]]]
            start, total = base[row, column].float(), None
            for c, expert in zip(here, experts, strict=True):
                if c != 0:
                    term = torch.tensor(c) * (expert[row, column].float() - start)
                    total = term if total is None else total + term
            result = start if total is None else total + start
            entering = [k for k, c in enumerate(here) if c != 0]
            if len(entering) == 1 and here[entering[0]] == 1:
                result = experts[entering[0]][row, column].float()
            expected[row, column] = result.to(out_dtype)
    out = base.float().to(out_dtype)
    finite = combine(out, experts, select(values, copied_from(values), dim), out if base.dtype == out_dtype else base)
    assert torch.equal(bits(out), bits(expected))
    summed = copied_from(values) < BASE
    assert finite == bool(expected.isfinite()[summed if dim == 0 else slice(None), slice(None) if dim == 0 else summed].all())


@pytest.mark.parametrize("experts", [2, 5, 70])
def test_where_values_come_from(experts: int) -> None:
    generator = np.random.default_rng(0)
    values = generator.choice(
        np.float32([0, 1, 0.5]), p=[1 - 2 / experts / 2, 0.5 / experts, 0.5 / experts], size=(experts, 300)
    )
    who = copied_from(values)
    sets: dict[int, set[tuple[bool, ...]]] = {}
    for column, kind in zip(values.T, who, strict=True):
        entering = np.flatnonzero(column)
        if not entering.size:
            assert kind == BASE
        elif entering.size == 1 and column[entering[0]] == 1:
            assert kind == entering[0]
        else:
            assert kind < BASE
            sets.setdefault(int(kind), set()).add(tuple(column != 0))
    assert all(len(different) == 1 for different in sets.values())
    assert len(set().union(*sets.values())) == len(sets), "one number for every set"
    assert len(sets) > 1


@given(seed=st.integers(0, 2**31), default=st.sampled_from([0.0, 1.0, -0.5]), share=st.sampled_from([0.02, 0.5, 1.0]))
@settings(max_examples=10, deadline=None)
def test_random_masks_equal_the_formula(
    trio: tuple[Model, dict[str, Model]], tmp_path_factory: pytest.TempPathFactory, seed: int, default: float, share: float
) -> None:
    base, experts = trio
    masks = random_masks(base, experts, seed)
    generator = np.random.default_rng(seed)
    masks = {name: np.where(generator.random(mask.shape) < share, mask, 0).astype(np.float32) for name, mask in masks.items()}
    folder = tmp_path_factory.mktemp("random")
    file = written(folder, base, experts, masks, default)
    one, others = base.checkpoint(), opened(experts)
    check(write(file, folder / "out", one, others), file, one, others)


# -------------------------------------------------------------------------------------------------------------- exact copies
def test_coefficient_0_everywhere_is_the_bases_files(trio: tuple[Model, dict[str, Model]], tmp_path: Path) -> None:
    base, experts = trio
    one = base.checkpoint()
    write(written(tmp_path, base, experts, default=0.0), tmp_path / "out", one, opened(experts))
    names = sorted(path.name for path in base.path.glob("model*"))
    assert len(names) > 3
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (base.path / name).read_bytes(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_expert_at_1_is_that_expert(tmp_path: Path, dtype: Any) -> None:
    base = resolve(str(tiny_model(tmp_path / "base", dtype=dtype, seed=1)))
    experts = {f"e{i}": resolve(str(tiny_model(tmp_path / f"e{i}", dtype=dtype, seed=2 + i))) for i in range(2)}
    rules = (
        Rule(component="L*", expert="e1", coefficient=0),
        *(Rule(component=c, expert="e1", coefficient=0) for c in ("embed", "final_norm")),
    )
    one, others = base.checkpoint(), opened(experts)
    merged = write(written(tmp_path, base, experts, out_dtype=dtype, rules=rules), tmp_path / "out", one, others)
    differing = 0
    for name, tensor in merged.tensors():
        expert = others["e0"].tensor(name)
        assert torch.equal(bits(tensor), bits(expert)), name
        differing += int(
            ((one.tensor(name).float() + (expert.float() - one.tensor(name).float())).to(tensor.dtype) != expert).sum()
        )
    assert differing or dtype != "float32", "the sum would not have given the expert"


# ------------------------------------------------------------------------------------------------------------------- layouts
def test_shards_stay_as_they_are(trio: tuple[Model, dict[str, Model]], tmp_path: Path) -> None:
    base, experts = trio
    file = written(tmp_path, base, experts, random_masks(base, experts))
    one, others = base.checkpoint(), opened(experts)
    merged = write(file, tmp_path / "out", one, others)
    check(merged, file, one, others)
    assert merged.files == one.files
    for name in set(one.files.values()):
        assert (tmp_path / "out" / name).stat().st_size == (base.path / name).stat().st_size


def test_another_dtype_is_laid_out_anew_in_shards(trio: tuple[Model, dict[str, Model]], tmp_path: Path) -> None:
    one = trio[0].checkpoint()
    files, index = lay_out(one, "float32", 30_000)
    assert len(files) > 3
    assert index is not None
    assert json.loads(index)["weight_map"] == {name: file.name for file in files for name, _ in file.tensors}
    assert [name for file in files for name, _ in file.tensors] == sorted(one.entries)
    assert lay_out(one, "bfloat16", 1)[0][0].header is None, "the base's own layout where it can stay"


def test_a_stored_tied_head_is_dropped(tmp_path: Path) -> None:
    base_folder = tiny_model(tmp_path / "base", dtype="bfloat16")
    tensors = load_file(base_folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base_folder / "model.safetensors", {"format": "pt"})
    base = resolve(str(base_folder))
    experts = {"e": resolve(str(tiny_expert(base.path, tmp_path / "e")))}
    file = written(tmp_path, base, experts, default=0.5)
    merge(file, tmp_path / "out")
    check(Checkpoint(tmp_path / "out"), file, base.checkpoint(), opened(experts))
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_old_gpt2_names_and_buffers(tmp_path: Path) -> None:
    base_folder = tiny_model(tmp_path / "base", "gpt2", dtype="bfloat16")
    expert_folder = tiny_expert(base_folder, tmp_path / "e")
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(base_folder / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(tensors, base_folder / "model.safetensors", {"format": "pt"})
    base, experts = resolve(str(base_folder)), {"e": resolve(str(expert_folder))}
    file = written(tmp_path, base, experts, random_masks(base, experts), 0.0)
    merge(file, tmp_path / "out")
    check(Checkpoint(tmp_path / "out"), file, base.checkpoint(), opened(experts))
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(base.checkpoint().entries)


def test_a_header_of_another_size_than_its_shape(trio: tuple[Model, dict[str, Model]], tmp_path: Path) -> None:
    base, experts = trio
    broken = experts["e0"].checkpoint()
    name = "model.layers.0.mlp.up_proj.weight"
    broken.entries[name] = broken.entries[name] | {"bytes": 12}
    with pytest.raises(CheckpointError, match=r"up_proj.*12 in its header"):
        write(written(tmp_path, base, {"e0": experts["e0"]}, default=0.5), tmp_path / "out", base.checkpoint(), {"e0": broken})


# ----------------------------------------------------------------------------------------------- what is read and written
def few(base: Model) -> Masks:
    """Two neighbouring neurons and a head of expert e0."""
    arch = base.checkpoint().arch
    masks = {f"e0.{kind}": np.zeros((arch.layers, arch.units(kind)), np.float32) for kind in UNIT_KINDS}
    masks["e0.neuron"][1, 5:7] = 0.5
    masks["e0.head"][2, 3] = 1
    return masks


def test_a_file_that_ends_too_early_is_one_line(trio: tuple[Model, dict[str, Model]], tmp_path: Path) -> None:
    """It was whole when its header was read."""
    shutil.copytree(trio[0].path, tmp_path / "base")
    checkpoint = Checkpoint(tmp_path / "base")
    last = max(checkpoint.entries, key=lambda name: int(checkpoint.entries[name]["start"]))
    file = tmp_path / "base" / checkpoint.files[last]
    for size in (file.stat().st_size - 1, 0):
        os.truncate(file, size)
        with Mapped(checkpoint) as mapped, pytest.raises(CheckpointError, match=r"found the end of the file; it was changed"):
            mapped.matrix(last)


def test_only_what_is_selected_is_read(trio: tuple[Model, dict[str, Model]], tmp_path: Path) -> None:
    base, experts = trio
    one, file = base.checkpoint(), written(tmp_path, base, {"e0": experts["e0"]}, few(base), 0.0)
    cuts = cuts_of(one, found_in(file, one), {"e0": one})
    read: dict[str, int] = {}
    with Mapped(one) as first, Mapped(experts["e0"].checkpoint()) as second:
        for out in lay_out(one, "bfloat16")[0]:
            for piece in pieces_of(out, cuts, torch.bfloat16, first, {"e0": second}):
                theirs = [place.bytes for place in piece.reads() if place.file == second.open("model.safetensors")]
                if isinstance(piece, Copy):
                    assert not theirs
                else:
                    read[piece.tensor.name] = sum(theirs)
    layer = "model.layers."
    assert read == {
        f"{layer}1.mlp.gate_proj.weight": 2 * 32 * 2,
        f"{layer}1.mlp.up_proj.weight": 2 * 32 * 2,
        f"{layer}1.mlp.down_proj.weight": 48 * 32 * 2,
        f"{layer}2.self_attn.q_proj.weight": 8 * 32 * 2,
        f"{layer}2.self_attn.o_proj.weight": 32 * 32 * 2,
    }


def test_a_clone_is_written_only_where_it_changes(trio: tuple[Model, dict[str, Model]], tmp_path: Path) -> None:
    """The double clones to a file full of 0xAA, so that whatever else is written shows."""
    base, experts = trio
    one, file = base.checkpoint(), written(tmp_path, base, {"e0": experts["e0"]}, few(base), 0.0)
    others = {"e0": experts["e0"].checkpoint()}

    def filled(source: int, target: int) -> bool:
        os.pwrite(target, b"\xaa" * os.fstat(source).st_size, 0)
        return True

    def cloned(source: int, target: int) -> bool:
        os.pwrite(target, os.pread(source, os.fstat(source).st_size, 0), 0)
        return True

    check(write(file, tmp_path / "whole", one, others, clone_file=cloned), file, one, others)
    (tmp_path / "out").mkdir()
    write_weights(one, others, found_in(file, one), "bfloat16", tmp_path / "out", clone_file=filled)
    written_bytes = 0
    for name in set(one.files.values()):
        content = np.fromfile(tmp_path / "out" / name, np.uint8)
        written_bytes += int((content != 0xAA).sum())
    (tmp_path / "dense").mkdir()
    dense = found_in(written(tmp_path / "half", base, {"e0": experts["e0"]}, default=0.5), one)
    assert write_weights(one, others, dense, "bfloat16", tmp_path / "dense", clone_file=filled).cloned == 0
    selected = 2 * (2 * 32 * 2) + 8 * 32 * 2 + 48 * 32 * 2 + 32 * 32 * 2
    assert 0.9 * selected < written_bytes <= selected


def test_a_file_system_that_cannot_clone_says_so(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"x" * 4096)
    with (tmp_path / "one").open("rb") as source, open("/dev/null", "wb") as target:
        assert clone(source.fileno(), target.fileno()) is False


def test_any_number_of_threads_gives_the_same_bytes(trio: tuple[Model, dict[str, Model]], tmp_path: Path) -> None:
    base, experts = trio
    file = written(tmp_path, base, experts, random_masks(base, experts), 0.9)
    one, others, contents = base.checkpoint(), opened(experts), []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            write(file, tmp_path / str(threads), one, others)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        contents.append({path.name: path.read_bytes() for path in (tmp_path / str(threads)).iterdir()})
    assert contents[0] == contents[1] == contents[2]


# ------------------------------------------------------------------------------------------------------------- in a process
KILLED = """
import os, signal, sys
from pathlib import Path
from mechmerge.merge.engine import merge
from mechmerge.progress import NullProgress

class Killer(NullProgress):
    left = int(sys.argv[3])
    def advance(self, units=1):
        Killer.left -= 1
        if not Killer.left:
            os.kill(os.getpid(), signal.SIGKILL)

merge(Path(sys.argv[1]), Path(sys.argv[2]), progress=Killer(), check=False)
assert not {"mergekit", "transformers"} & set(sys.modules), "the writer imports neither"
"""


def test_a_killed_merge_leaves_nothing_under_the_final_name(trio: tuple[Model, dict[str, Model]], tmp_path: Path) -> None:
    base, experts = trio
    file, out = written(tmp_path, base, experts, random_masks(base, experts), 0.9), tmp_path / "made" / "out"

    def run(after: int) -> int:
        done = subprocess.run(
            [sys.executable, "-c", KILLED, file, out, str(after)], capture_output=True, text=True, check=False
        )
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode

    for after in (1, 7):
        assert run(after) == -signal.SIGKILL
        assert not out.exists()
        assert len(list(out.parent.glob(".out.partial-*"))) == 1, (
            "what a killed run left is there, and that of the one before is gone"
        )
    assert run(-1) == 0
    assert not list(out.parent.glob(".out.partial-*"))
    check(Checkpoint(out), file, base.checkpoint(), opened(experts))


# ----------------------------------------------------------------------------------------------------------------- engines
def test_engines(base: Model, expert: Model, tmp_path: Path) -> None:
    other = resolve(str(tiny_model(tmp_path / "other", seed=7)))
    file = written(tmp_path, base, {"e": other}, out_dtype="float32")
    merge(file, tmp_path / "auto")
    merge(file, tmp_path / "direct", engine="direct")
    merge(file, tmp_path / "mergekit", engine="mergekit")
    outs = {name: Checkpoint(tmp_path / name) for name in ("auto", "direct", "mergekit")}
    different = 0
    for name, tensor in outs["auto"].tensors():
        assert torch.equal(tensor, other.checkpoint().tensor(name))
        assert torch.equal(tensor, outs["direct"].tensor(name))
        assert torch.allclose(tensor, outs["mergekit"].tensor(name), atol=1e-6)
        different += int((tensor != outs["mergekit"].tensor(name)).sum())
    assert different, "the direct writer copies, mergekit computes"
    sources = Sources(base.id, {"e": expert.id})
    write_recipe(tmp_path / "ties.yaml", compile_recipe("ties", sources).recipe)
    with pytest.raises(InputError, match="--engine mergekit"):
        merge(tmp_path / "ties.yaml", tmp_path / "ties", engine="direct")


def test_what_is_not_finite_is_refused_without_verification(base: Model, expert: Model, tmp_path: Path) -> None:
    with pytest.raises(MechmergeError, match=r"finite weights.*coefficient"):
        merge(written(tmp_path / "a", base, {"e": expert}, default=1e8, out_dtype="float16"), tmp_path / "out", check=False)
    broken = tmp_path / "nan"
    shutil.copytree(expert.path, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"nan: model\.norm\.weight"):
        merge(written(tmp_path / "b", base, {"e": resolve(str(broken))}, default=0.5), tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()


def test_pieces_are_in_order_and_whole(trio: tuple[Model, dict[str, Model]], tmp_path: Path) -> None:
    base, experts = trio
    file = written(tmp_path, base, experts, random_masks(base, experts), 0.0)
    one = base.checkpoint()
    cuts = cuts_of(one, found_in(file, one), opened(experts))
    with Mapped(one) as first, Mapped(experts["e0"].checkpoint()) as second, Mapped(experts["e1"].checkpoint()) as third:
        for out in lay_out(one, "bfloat16")[0]:
            position, pieces = 0, pieces_of(out, cuts, torch.bfloat16, first, {"e0": second, "e1": third})
            for piece in pieces:
                assert piece.start == position
                position += piece.bytes
            assert position == (base.path / out.name).stat().st_size
            assert any(isinstance(piece, Rows) for piece in pieces) or len(pieces) == 1
