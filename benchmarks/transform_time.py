"""Times `mobizo_passes.transform` and each of its stages on Llamas of growing depth, and judges how the time grows.

    python benchmarks/transform_time.py                  6, 12 and 24 narrow layers
    python benchmarks/transform_time.py --full           30 layers of SmolLM2-135M's sizes as well

Weights are random: compiling does not read them. A median over rounds, after one to warm up on a single layer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from benchmarks.step_time import processor

if TYPE_CHECKING:
    from torch import Tensor, nn

LAYERS = (6, 12, 24)
NARROW = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 96}
SMOLLM2 = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
FULL_LAYERS, VOCABULARY, FULL_VOCABULARY = 30, 512, 49152
BATCH, TOKENS, QUERIES = 2, 16, 4
# Seconds that compiling the full model may take on two cores.
BAR = 60.0
# The increment per layer of the deeper half over that of the shallower half: 1 is linear, 2 would be quadratic.
LINEAR = 1.4


def make_model(layers: int, sizes: dict[str, Any], vocabulary: int) -> nn.Module:
    """A random Llama under PEFT, LoRA on q_proj and v_proj, in eval mode."""
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, num_hidden_layers=layers, tie_word_embeddings=True, **sizes
    )  # fmt: skip
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    model: Any = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
    return model.eval()


def make_batch(vocabulary: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, int64 [batch, tokens]; one label per example, the last."""
    import torch

    tokens = torch.randint(0, vocabulary, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(tokens, -100)
    labels[:, -1] = tokens[:, -1]
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


class Stopwatch:
    """Sums the seconds spent in each stage of `transform`, by wrapping the functions that do them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, fn: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = fn(*args, **kwargs)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            return result

        return call


def measure(layers: int, sizes: dict[str, int], vocabulary: int) -> dict[str, Any]:
    """Compile once; returns the seconds of the whole and of each stage, and what came out."""
    from unittest.mock import patch

    import mobizo_passes as mz

    # The function, not the module of the same name, is the package's attribute.
    module, runner = sys.modules["mobizo_passes.transform"], sys.modules["mobizo_passes.program"]
    watch = Stopwatch()
    model, batch = make_model(layers, sizes, vocabulary), make_batch(vocabulary)

    def run_passes(ir: Any, passes: Any, *rest: Any, **more: Any) -> Any:
        wrapped = [watch.timed(one.name, one) for one in passes]
        for timed, one in zip(wrapped, passes, strict=True):
            timed.name = one.name
        return original(ir, wrapped, *rest, **more)

    original = runner.run_passes
    with (
        patch.object(module, "run_passes", run_passes),
        patch.object(module, "capture", watch.timed("export", module.capture)),
        patch.object(module, "discover", watch.timed("discover", module.discover)),
        patch.object(runner, "to_text", watch.timed("history", runner.to_text)),
    ):
        start = time.perf_counter()
        program = mz.transform(model, batch, estimator=mz.TwoSided(queries=QUERIES))
        seconds = time.perf_counter() - start
    stages = {**watch.seconds, "other": seconds - sum(watch.seconds.values())}
    nodes = len(program.exported_program.graph.nodes)
    return {"layers": layers, "seconds": seconds, "stages": stages, "sites": len(program.sites), "nodes": nodes}


def median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run with the median time, so that its stages add up; `rounds` holds the seconds of all."""
    middle = sorted(runs, key=lambda run: run["seconds"])[(len(runs) - 1) // 2]
    return {**middle, "rounds": [run["seconds"] for run in runs]}


def growth(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Least-squares seconds per layer and at zero layers, and how the increments per layer compare."""
    layers, seconds = [row["layers"] for row in rows], [row["seconds"] for row in rows]
    slope, intercept = statistics.linear_regression(layers, seconds)
    steps = [
        (seconds[i + 1] - seconds[i]) / (layers[i + 1] - layers[i]) for i in range(len(rows) - 1)
    ]  # fmt: skip
    ratio = steps[-1] / steps[0]
    result = {"seconds_per_layer": slope, "seconds_at_zero": intercept, "increments_per_layer": steps}
    return {**result, "ratio": ratio, "linear": min(steps) > 0 and ratio <= LINEAR}


def show(result: dict[str, Any], console: Console) -> None:
    rows = [*result["rows"], *([result["full"]] if result["full"] else [])]
    table = Table(title="Seconds of mobizo_passes.transform: Llama under PEFT, q_proj and v_proj, four queries")
    table.add_column("stage")
    for row in rows:
        table.add_column(f"{row['layers']} layers", justify="right")
    for stage in rows[-1]["stages"]:
        table.add_row(stage, *(f"{row['stages'].get(stage, 0):.2f}" for row in rows))
    table.add_row("all", *(f"{row['seconds']:.2f}" for row in rows), style="bold")
    table.add_row("nodes of the step", *(f"{row['nodes']:,}" for row in rows))
    console.print(table)
    fit = result["growth"]
    verdict = "linear" if fit["linear"] else "NOT linear"
    console.print(
        f"{fit['seconds_per_layer']:.2f} s per layer; the increment per layer grows by {fit['ratio']:.2f} × from the "
        f"shallow half to the deep half: {verdict} (bound {LINEAR})"
    )
    if result["full"]:
        seconds = result["full"]["seconds"]
        verdict = "within" if seconds <= BAR else "ABOVE"
        console.print(f"{FULL_LAYERS} layers of SmolLM2-135M: {seconds:.1f} s, {verdict} {BAR:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=list(LAYERS), help="depths, three at least")
    parser.add_argument("--rounds", type=int, default=3, help="rounds per depth (default: 3)")
    parser.add_argument("--full", action="store_true", help="also 30 layers of SmolLM2-135M's sizes, one round")
    parser.add_argument("--out", type=Path, default=Path("out/benchmark"), help="where transform_time.json goes")
    options = parser.parse_args()
    if options.rounds < 1 or len(set(options.layers)) < 3 or min(options.layers) < 1:
        parser.error("--rounds must be at least 1, and --layers three different depths")
    console = Console() if sys.stdout.isatty() else Console(width=120)
    measure(1, NARROW, VOCABULARY)
    rows = []
    for layers in sorted(set(options.layers)):
        console.print(f"{layers} layers")
        rows.append(median([measure(layers, NARROW, VOCABULARY) for _ in range(options.rounds)]))
    result = {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {name: version(name) for name in ("mobizo", "torch", "transformers", "peft")},
        "rows": rows,
        "growth": growth(rows),
        "full": median([measure(FULL_LAYERS, SMOLLM2, FULL_VOCABULARY)]) if options.full else None,
        "load_average_after": os.getloadavg(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out.resolve() / "transform_time.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    show(result, console)
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
