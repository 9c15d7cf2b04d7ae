"""Random pairs of any Llama shape, written shard by shard, and their screening in a process of its own.

What a model's shape costs does not depend on its weights. `python -m benchmarks.synthetic JSON` is the child process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama with tied embeddings."""

    hidden: int
    layers: int
    heads: int
    kv: int
    neurons: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        """All parameters."""
        return sum(rows * max(columns, 1) for _, rows, columns in tensors(self))


SHAPES = {
    "15M": Shape(288, 6, 6, 6, 768, 32_000),
    "135M": Shape(576, 30, 9, 3, 1536, 49_152),
    "360M": Shape(960, 32, 15, 5, 2560, 49_152),
    "1B": Shape(2048, 16, 32, 8, 8192, 128_256),
    "3B": Shape(3072, 28, 24, 8, 8192, 128_256),
}
"""stories15M, SmolLM2-135M and -360M, Llama-3.2-1B and -3B."""


def tensors(shape: Shape) -> Iterator[tuple[str, int, int]]:
    """(name, rows, columns) of every tensor; norms have 0 columns."""
    width, kv = shape.hidden, shape.kv * (shape.hidden // shape.heads)
    yield "model.embed_tokens.weight", shape.vocabulary, width
    yield "model.norm.weight", width, 0
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}input_layernorm.weight", width, 0
        yield f"{prefix}post_attention_layernorm.weight", width, 0
        for name, rows in (("q_proj", width), ("k_proj", kv), ("v_proj", kv), ("o_proj", width)):
            yield f"{prefix}self_attn.{name}.weight", rows, width
        yield f"{prefix}mlp.gate_proj.weight", shape.neurons, width
        yield f"{prefix}mlp.up_proj.weight", shape.neurons, width
        yield f"{prefix}mlp.down_proj.weight", width, shape.neurons


def write_sides(shape: Shape, where: Path) -> None:
    """Writes config and tokenizer of a shape into a new folder."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.neurons, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv, vocab_size=shape.vocabulary,
        tie_word_embeddings=True, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    end = "<end>"
    words = Tokenizer(models.WordLevel({end: 0}, unk_token=end))
    where.mkdir()
    config.save_pretrained(where)
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end).save_pretrained(where)


def write_trio(shape: Shape, folder: Path, shard_bytes: int = 5_000_000_000) -> None:
    """Writes bf16 folders `base`, `one` and `two` in files of at most `shard_bytes`, as models are published.

    Weights are slices of one random vector, so that gigabytes take seconds; an expert is the base with a little noise.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    pool = torch.empty(1 << 23).normal_(0, 0.02, generator=generator)
    own = {"base": torch.zeros(1), "one": pool.roll(12345) * 0.1, "two": pool.roll(54321) * 0.1}
    shards: list[list[tuple[str, int, int]]] = [[]]
    used = 0
    for name, rows, columns in sorted(tensors(shape)):
        size = rows * max(columns, 1) * 2
        if used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append((name, rows, columns))
        used += size
    for where, noise in own.items():
        write_sides(shape, folder / where)
        values = (pool + noise).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
        weight_map = {}
        for number, names in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            end = 0
            for name, rows, columns in names:
                start, end = end, end + rows * max(columns, 1) * 2
                dims = [rows, columns] if columns else [rows]
                header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [start, end]}
                weight_map[name] = file
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            with (folder / where / file).open("wb") as handle:
                handle.write(len(text).to_bytes(8, "little") + text)
                for start in range(0, end, len(values)):
                    handle.write(memoryview(values)[: end - start])
        if len(shards) > 1:
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / where / "model.safetensors.index.json").write_text(json.dumps(index))


def write_pair(shape: Shape, folder: Path) -> tuple[Path, Path]:
    """Writes a random base and an expert near to it, in bf16, one shard a layer; holds one shard of each in memory."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    shards: dict[str, list[tuple[str, int, int]]] = {}
    for name, rows, columns in tensors(shape):
        shards.setdefault(name.split(".")[2] if ".layers." in name else "outside", []).append((name, rows, columns))
    folders = folder / "base", folder / "expert"
    for where in folders:
        write_sides(shape, where)
        weight_map = {name: f"model-{key}.safetensors" for key, own in shards.items() for name, _, _ in own}
        (where / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for key, own in shards.items():
        pair: tuple[dict[str, torch.Tensor], ...] = ({}, {})
        for name, rows, columns in own:
            size = (rows, columns) if columns else (rows,)
            value = torch.empty(size, dtype=torch.bfloat16).normal_(0 if columns else 1, 0.02, generator=generator)
            pair[0][name] = value
            pair[1][name] = value + torch.empty_like(value).normal_(0, 0.002, generator=generator)
        for where, values in zip(folders, pair, strict=True):
            save_file(values, where / f"model-{key}.safetensors", {"format": "pt"})
    return folders


@dataclass(frozen=True)
class Job:
    """One screening."""

    base: str
    expert: str
    streamed: bool = False
    dtype: str = "float32"
    prompts: int = 8
    tokens: int = 64
    """Of each prompt."""
    batch: int = 4
    layers: int | None = None
    """The anchor's layer; all layers by default."""
    behaviors: int = 1
    """Anchors screened one after another on one loaded model."""
    forwards: bool = False
    """Whether plain forward passes of the whole model are timed as well."""
    scores: str | None = None
    """Where the scores are written (npz)."""


def screen_in_a_process(**options: Any) -> dict[str, float]:
    """Runs a `Job` in a process of its own.

    Returns:
        `peak`: bytes of resident memory at the highest; `loading`, `screening`, `forward` (plain forward passes of the whole
        model over the same batches; 0 where not asked): seconds; `resident`: layers in memory at once; `runs`: forward runs of
        a layer for each layer and batch.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.synthetic", json.dumps(asdict(Job(**options)))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def peak_memory() -> int:
    """The process's highest resident memory so far, in bytes (getrusage would count what its parent had at the start)."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def _child(job: Job) -> dict[str, float]:
    import numpy as np
    import torch

    from mechmerge.localize.bench import Batch, Bench, layer_source
    from mechmerge.localize.measure import Anchor, screen
    from mechmerge.localize.stream import StreamedBench
    from mechmerge.models.checkpoint import Checkpoint
    from mechmerge.models.references import Model, ModelId

    started = time.perf_counter()
    base = Model(id=ModelId(name="base", shards={}), path=Path(job.base))
    bench = StreamedBench(base, job.dtype) if job.streamed else Bench(base, job.dtype)
    runs = 0

    def count(layer: torch.nn.Module, *_: Any) -> None:
        nonlocal runs
        runs += "forward" not in vars(layer)  # a streamed bench passes layers over by shadowing it

    for layer in bench.layers:
        layer.register_forward_hook(count)
    loaded = time.perf_counter()
    arch = bench.checkpoint.arch
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(arch.vocabulary, (job.prompts, job.tokens), generator=generator)
    batches = [Batch(part, torch.ones_like(part)) for part in ids.split(job.batch)]
    source = layer_source(Checkpoint(Path(job.expert)))
    stop = job.layers or arch.layers
    scores = {}
    for i in range(job.behaviors):
        v = torch.randn(arch.hidden, generator=torch.Generator().manual_seed(2 + i))
        scores = screen(bench, batches, [Anchor(stop, v / v.norm())] * len(batches), source)
    screened = time.perf_counter()
    peak, counted, forward = peak_memory(), runs, 0.0
    if job.forwards:
        with torch.no_grad():
            for batch in batches:
                bench.module(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False)
        forward = time.perf_counter() - screened
    if job.scores is not None:
        np.savez(job.scores, allow_pickle=False, **scores)
    return {
        "peak": peak,
        "loading": loaded - started,
        "screening": screened - loaded,
        "forward": forward,
        "runs": counted / (job.behaviors * len(batches) * stop),
        "resident": bench.most if isinstance(bench, StreamedBench) else arch.layers,
    }


if __name__ == "__main__":
    print(json.dumps(_child(Job(**json.loads(sys.argv[1])))))
