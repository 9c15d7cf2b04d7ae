"""Runs mergekit 0.1.5's planner and executor (https://github.com/arcee-ai/mergekit) in process.

The YAML that is executed is the one that `recipe/emit.py` emits, for our method and for mergekit's own alike. Tensor names come
from the checkpoints: mergekit's tables ask for buffers that today's GPT-NeoX checkpoints lack.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from mechmerge.merge.files import SHARD_BYTES
from mechmerge.merge.probe import probe
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.load import quiet
from mechmerge.progress import SILENT, Progress, track


def execute(
    text: str,
    base: Checkpoint,
    experts: list[Checkpoint],
    out: Path,
    seed: int | None = None,
    progress: Progress = SILENT,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Runs mergekit YAML with mergekit's planner and executor; writes the shards into `out`.

    Args:
        text: the YAML; its models are local folders.
        base: the base, whose tensors are all written and no others.
        experts: the other models.
        out: folder for the shards.
        seed: of torch's generator, for methods that draw at random (tensors are drawn in the order of their names).
        progress: told about tensors.
        shard_bytes: largest shard that is written.

    Raises:
        MissingError: mergekit is not the version that this was written for.
    """
    with _quiet_mergekit():
        probe()
        from mergekit.architecture.base import ModelArchitecture, ModuleArchitecture, ModuleDefinition, WeightInfo
        from mergekit.config import MergeConfiguration
        from mergekit.graph import Executor
        from mergekit.io.tasks import LoaderCache, SaveTensor
        from mergekit.merge import MergeOptions
        from mergekit.plan import MergePlanner

        import mechmerge.merge.method  # noqa: F401 - registers our method

        aliases = {
            name: tuple(sorted({c.stored[name] for c in (base, *experts)} - {name})) or None for name in sorted(base.entries)
        }

        class Tensors(ModuleArchitecture):  # type: ignore[misc]  # mergekit is untyped
            """All tensors of the checkpoint, none of them repeated by layer."""

            def pre_weights(self, config: Any) -> list[Any]:
                return [WeightInfo(name=name, aliases=names) for name, names in aliases.items()]

            def post_weights(self, config: Any) -> list[Any]:
                return []

            def layer_weights(self, index: int, config: Any) -> list[Any]:
                return []

            def num_layers(self, config: Any) -> int:
                return 0

        architecture = ModelArchitecture(
            modules={"default": ModuleDefinition(architecture=Tensors())}, architectures=[], model_type=""
        )
        configuration = MergeConfiguration.model_validate(yaml.safe_load(text))
        options = MergeOptions(
            quiet=True, write_model_card=False, copy_tokenizer=False, out_shard_size=shard_bytes, device="cpu"
        )
        # mergekit keeps loaders by path for the life of the process: a folder replaced meanwhile would be read as it was.
        LoaderCache.loaders.clear()
        try:
            LoaderCache().setup(options=options)
            config = configuration.base_model.config(trust_remote_code=False)
            targets = MergePlanner(configuration, architecture, options, config).plan_to_disk(out_path=str(out))
            count = sum(isinstance(target, SaveTensor) for target in targets)
            with torch.random.fork_rng(devices=[]):
                if seed is not None:
                    torch.manual_seed(seed)
                done = Executor(targets, math_device="cpu", storage_device="cpu").run(quiet=True)
                for _ in track((task for task, _ in done if isinstance(task, SaveTensor)), "merging", count, progress):
                    pass
        finally:
            LoaderCache.loaders.clear()


@contextlib.contextmanager
def _quiet_mergekit() -> Iterator[None]:
    """Keeps mergekit's log and the warnings of its imports off the terminal; its errors are exceptions all the same."""
    log = logging.getLogger("mergekit")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        log.setLevel(before)
