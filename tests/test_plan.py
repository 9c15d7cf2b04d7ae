"""Plans: sizes parsed and counted, streaming chosen by the limit, least memory said, and stages that keep to it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from mechmerge.cli.common import memory_guard
from mechmerge.cli.main import cli
from mechmerge.errors import InputError, MissingError
from mechmerge.localize.effect_file import EFFECT_KINDS
from mechmerge.localize.effects import measure_effects
from mechmerge.localize.plan import (
    FIXED,
    Demand,
    Rates,
    Sizes,
    Step,
    free_memory,
    in_memory_bytes,
    make_plan,
    measure_rates,
    parse_size,
    show_size,
    streamed_bytes,
)
from mechmerge.localize.plan_steps import plan_effects, plan_localize
from mechmerge.localize.scores import read_scores
from mechmerge.localize.stage import LocalizeSettings, localize
from mechmerge.localize.stream import StreamedBench, open_bench
from mechmerge.models.references import Model
from tests import test_effects, test_localize

LLAMA_3B = Sizes(28, 3072, 8192, 100_669_440, 25_165_824, 128_256, 3_212_749_824, 6_425_499_648)
DEMAND = Demand(graph=256, kept=1024, positions=0)
RATES = Rates(1e11, 1e10, 1e9)
STEPS = [Step("one", 1000, again=500, reads=2, loads=1), Step("two", 100, tokens_one_by_one=10)]


def plan(limit: int, dtype: str = "float32"):  # type: ignore[no-untyped-def]
    return make_plan(LLAMA_3B, STEPS, DEMAND, 50.0, dtype, 4, limit, RATES)


@pytest.mark.parametrize(
    ("text", "size"), [("4GB", 4_000_000_000), ("512mb", 512_000_000), ("1.5 GiB", 1_610_612_736), ("2TB", 2 * 10**12)]
)
def test_sizes_are_parsed(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["4", "GB", "-1GB", "0MB", "4 potatoes", "", "1e9GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="memory: expected a size such as 4GB or 512MB"):
        parse_size(text)


def test_a_shown_size_would_do_as_a_limit() -> None:
    for size in (1, 999_999, 350_000_001, 1_850_000_001, 12_345_678_901):
        assert parse_size(show_size(size).replace(" ", "")) >= size


def test_the_limit_decides_whether_the_model_is_streamed() -> None:
    whole, least = in_memory_bytes(LLAMA_3B, DEMAND, 4), streamed_bytes(LLAMA_3B, DEMAND, 4)
    assert whole > 4 * LLAMA_3B.total > 4e9 > least > 8 * LLAMA_3B.layer
    inside, beyond = plan(whole), plan(whole - 1)
    assert (inside.streamed, inside.kept, inside.peak) == (False, 0, whole)
    assert beyond.streamed
    assert least < beyond.peak <= whole
    assert beyond.kept > 0
    assert plan(least).kept == 0
    with pytest.raises(InputError) as error:
        plan(least - 1)
    assert f"at least {show_size(least)} for this model in float32; found" in str(error.value)
    assert "--memory" in str(error.value)
    assert streamed_bytes(LLAMA_3B, DEMAND, 2) < least, "bfloat16 takes less"


def test_costs_add_up() -> None:
    costs = plan(10**12).costs
    assert [c.forwards for c in costs] == [20, 2]
    assert [c.read for c in costs] == [LLAMA_3B.stored, 0]
    work = 1000 * 2 * LLAMA_3B.layer * 28 / 1e11
    assert costs[0].seconds == pytest.approx(work + LLAMA_3B.stored / 1e9)
    assert costs[1].seconds == pytest.approx(work / 10 + 10 * 4 * LLAMA_3B.total / 1e10)
    streamed = plan(5_000_000_000)
    assert [c.forwards for c in streamed.costs] == [30, 2]
    assert [c.read for c in streamed.costs] == [2 * LLAMA_3B.stored, 0]
    assert streamed.total.forwards == 32


@pytest.mark.parametrize("field", ["graph", "kept", "positions"])
def test_more_demand_takes_more_memory(field: str) -> None:
    more = dataclasses.replace(DEMAND, **{field: 100_000})
    assert in_memory_bytes(LLAMA_3B, more, 4) > in_memory_bytes(LLAMA_3B, DEMAND, 4)
    assert streamed_bytes(LLAMA_3B, more, 4) > streamed_bytes(LLAMA_3B, DEMAND, 4)


def test_sizes_and_rates_of_a_checkpoint(base: Model) -> None:
    checkpoint = base.checkpoint()
    sizes = Sizes.of(checkpoint)
    assert sizes.total == sum(int(np.prod(shape)) for shape in checkpoint.shapes.values())
    assert sizes.stored == 4 * sizes.total
    assert sizes.total == sizes.layers * sizes.layer + sizes.head + sizes.hidden
    assert sizes.tensor == 48 * 32
    rates = measure_rates(checkpoint, "float32", seconds=0.01)
    assert min(rates.operations, rates.memory, rates.disk) > 0


def test_free_memory_is_that_of_the_machine_and_its_container(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:   9000 kB\nMemAvailable:   5000 kB\n")
    assert free_memory(root=tmp_path) == 5_120_000
    (group / "memory.current").write_text("900000\n")
    (group / "memory.stat").write_text("anon 600000\ninactive_file 300000\n")
    (group / "memory.max").write_text("max\n")
    assert free_memory(root=tmp_path) == 5_120_000
    (group / "memory.max").write_text("1000000\n")
    assert free_memory(root=tmp_path) == 400_000
    (group / "memory.max").write_text("500000\n")
    assert free_memory(root=tmp_path) == 1
    assert free_memory() > 1_000_000


def test_a_streamed_localization_gives_the_same_file(base: Model, expert: Model, tmp_path: Path) -> None:
    update = {"verify": 2, "curve_seeds": 2, "output_prompts": 2, "sources": ("anchor", "loss")}
    settings = test_localize.SETTINGS.model_copy(update=update)
    behavior = test_localize.behavior()
    whole = plan_localize(base.checkpoint(), [behavior], settings)
    assert not whole.streamed
    small = settings.model_copy(update={"memory": whole.peak - 1})
    plan = plan_localize(base.checkpoint(), [behavior], small)
    assert plan.streamed
    assert isinstance(open_bench(base, "float32", "cpu", plan), StreamedBench)
    ones = localize(base, expert, [behavior], tmp_path / "memory", settings)
    others = localize(base, expert, [behavior], tmp_path / "streamed", small)
    assert len(ones) == 2
    for wanted, found in zip(map(read_scores, ones), map(read_scores, others), strict=True):
        for name, values in wanted.arrays.items():
            assert np.abs(np.nan_to_num(values) - np.nan_to_num(found.arrays[name])).max() <= 1e-6, name
        assert wanted.metadata.curves is not None
        assert wanted.metadata.curves.lift == pytest.approx(found.metadata.curves.lift, abs=1e-6)  # type: ignore[union-attr]


def test_streamed_effects_equal_those_in_memory(base: Model, expert: Model, second_expert: Model, tmp_path: Path) -> None:
    settings, rows = test_effects.SETTINGS, test_effects.rows()
    told = [(row.expert, row.members) for row in rows]
    small = settings.model_copy(update={"memory": plan_effects(base.checkpoint(), 2, told, settings).peak - 1})
    assert plan_effects(base.checkpoint(), 2, told, small).streamed
    experts = {"a": expert, "b": second_expert}
    one = measure_effects(base, experts, rows, tmp_path / "memory.safetensors", settings)
    other = measure_effects(base, experts, rows, tmp_path / "streamed.safetensors", small)
    for kind in EFFECT_KINDS:
        if f"{kind}.effect" in one.arrays:
            assert np.abs(one.arrays[f"{kind}.effect"] - other.arrays[f"{kind}.effect"]).max() <= 1e-6, kind
    assert [b.loss_end for b in one.metadata.behaviors] == pytest.approx([b.loss_end for b in other.metadata.behaviors])


def test_the_memory_limit_is_no_part_of_the_units(base: Model, expert: Model, tmp_path: Path) -> None:
    """What one call finished, another with more memory goes on from."""
    from mechmerge.localize.stage import _Localizer
    from mechmerge.progress import SILENT

    folders = {
        _Localizer(base, expert, tmp_path, LocalizeSettings(memory=memory), SILENT).units(test_localize.behavior()).folder
        for memory in (None, 10**9, 10**10)
    }
    assert len(folders) == 1


def localize_arguments(base: Model, expert: Model, tmp_path: Path) -> list[str]:
    behavior = tmp_path / "loud.yaml"
    behavior.write_text(
        "name: loud\nanswer_tokens: 6\npairs:\n"
        + "".join(
            f"- {{with: 'Describe {t}. Loud.', without: 'Describe {t}.', topic: {t}}}\n" for t in ("tea", "rain", "ice", "sun")
        )
    )
    return [
        "localize",
        str(base.path),
        str(expert.path),
        "--behavior",
        str(behavior),
        "--out",
        str(tmp_path / "out"),
        "--quiet",
    ]


def test_plan_prints_and_measures_nothing(
    base: Model, expert: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = localize_arguments(base, expert, tmp_path)
    cli.main([*arguments, "--plan", "--format", "json"], standalone_mode=False)
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["mode"] == "in memory"
    assert plan["memory"] > FIXED
    assert [step["step"] for step in plan["steps"]][:2] == ["loud: states of base and expert", "loud on the anchor: screening"]
    assert plan["total"]["forwards"] == pytest.approx(sum(step["forwards"] for step in plan["steps"]), abs=len(plan["steps"]))
    assert plan["total"]["seconds"] >= 0
    cli.main([*arguments, "--plan", "--memory", "64GB"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "time (estimate)" in shown
    assert "limit 64.0 GB" in shown
    assert not (tmp_path / "out").exists()
    effects = ["effects", str(base.path), f"a={expert.path}", "--behavior", f"{tmp_path / 'loud.yaml'}=a", "--plan"]
    cli.main([*effects, "--out", str(tmp_path / "effects.safetensors"), "--format", "json"], standalone_mode=False)
    assert "effects at 14 nodes" in capsys.readouterr().out
    assert not (tmp_path / "effects.safetensors").exists()


def test_too_small_a_limit_says_the_least_that_would_do(base: Model, expert: Model, tmp_path: Path) -> None:
    arguments = localize_arguments(base, expert, tmp_path)
    with pytest.raises(
        InputError, match=r"memory: expected at least \d+ MB for this model in float32; found 1 MB; raise --memory"
    ):
        cli.main([*arguments, "--memory", "1MB"], standalone_mode=False)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), RuntimeError("CUDA out of memory.")],
)
def test_out_of_memory_becomes_one_line(error: Exception) -> None:
    with (
        pytest.raises(MissingError, match=r"set --memory \(such as 4GB\).*--dtype bfloat16 or fewer --prompts"),
        memory_guard(),
    ):
        raise error


def test_other_errors_pass_the_guard() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_guard():
        raise RuntimeError("shapes do not match")
