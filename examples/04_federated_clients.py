"""SmolLM2-135M learns from twenty clients that keep their sentences, beside one process that has them all.

The clients are simulated by Flower's own engine (`pip install 'flwr[simulation]'`). Each has a shard of the demo's film
reviews, nine tenths of it of one label, and three in ten of those that a round asks do not answer. What travels are
seeds and projected gradients. The closing table has the accuracy on sentences that nobody trained on.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import random
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

import runtime_driver
from examples.packaged import Sentence, load_sentences

if TYPE_CHECKING:
    from torch import Tensor

    from runtime_driver.fleet.flower import Server

demo = importlib.import_module("examples.01_train_sentiment")

#: The fewer values are trained, the more a random direction says of the gradient, and the larger a step may be.
UPPER_LAYERS, LEARNING_RATE = 4, 1.0


def compile_program(path: Path) -> None:
    """The demo's model and loss, as directional derivatives of 3,072 values."""
    import lowering
    import mobizo_passes as mz

    estimator = mz.ForwardGradient(queries=demo.QUERIES)
    program = demo.build_program(demo.FORWARD_ONLY, UPPER_LAYERS, estimator=estimator, rank=1)
    lowering.lower(program, target="xnnpack").save(path)


def shards(sentences: tuple[Sentence, ...], clients: int, skew: float) -> list[list[Sentence]]:
    """Shards of equal size that share no sentence; `skew` of each is of one label, which alternates."""
    by_label = {label: [each for each in sentences if each.positive is label] for label in (True, False)}
    size = min(map(len, by_label.values())) // clients
    found = []
    for client in range(clients):
        mostly = client % 2 == 0
        most = round(size * skew)
        shard = [by_label[mostly].pop() for _ in range(most)] + [by_label[not mostly].pop() for _ in range(size - most)]
        random.Random(client).shuffle(shard)
        found.append(shard)
    return found


def client_batches(context: Any, own: list[list[dict[str, Tensor]]], away: float) -> list[dict[str, Tensor]]:
    """This client's batches. An exception is what Flower's engine knows of a client that went away."""
    if random.random() < away:
        raise ConnectionError("this client is away")
    return own[context.node_config["partition-id"]]


def train_together(
    program: Path, journal: Path, own: list[list[dict[str, Tensor]]], options: argparse.Namespace
) -> Server:
    """Train under Flower's simulation; returns the server, which has counted."""
    from flwr.simulation import run_simulation

    from runtime_driver.fleet import flower

    server = flower.Server(
        program,
        options.steps,
        lr=options.lr,
        eps=epsilon(program),
        journal=journal,
        seed=options.seed,
        local_steps=options.local_steps,
        clients=options.asked,
        combine="mean",  # they are all ours
        deadline=None,
    )
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # a traceback for each client that is away
    run_simulation(
        flower.server_app(lambda context: server),
        flower.client_app(program, partial(client_batches, own=own, away=options.away)),
        options.clients,
        backend_config={
            "init_args": {"num_cpus": options.processes, "log_to_driver": False},
            "client_resources": {"num_cpus": 1},
        },
    )
    return server


def epsilon(program: Path) -> float | None:
    """The demo's, for a program that perturbs."""
    inputs = runtime_driver.Session(program).manifest.methods["step"].inputs
    return demo.FORWARD_ONLY.epsilon if any(each.role == "eps" for each in inputs) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--clients", type=int, default=20, help="clients in all")
    parser.add_argument("--asked", type=int, default=3, help="clients that a round asks")
    parser.add_argument("--away", type=float, default=0.3, help="share of those that do not answer")
    parser.add_argument("--skew", type=float, default=0.9, help="share of a client's sentences that are of one label")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--local-steps", type=int, default=4, help="steps of a client in a round")
    parser.add_argument("--lr", type=float, default=LEARNING_RATE)
    parser.add_argument("--eval-size", type=int, default=200, help="held-out sentences, never trained on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="in which clients run, side by side")
    parser.add_argument("--program", type=Path, help="a program of the demo's model; default: compile one")
    parser.add_argument("--out", type=Path, default=Path("out/federated"), help="directory for all that it writes")
    options = parser.parse_args()
    if any(importlib.util.find_spec(name) is None for name in ("flwr", "ray")):
        sys.exit("this example needs Flower's simulation engine: pip install 'flwr[simulation]'")
    console = Console() if Console().is_terminal else Console(width=120)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    program: Path = (options.program or out / "forward-gradient.pte").absolute()
    if options.program is None:
        console.print("compiling SmolLM2-135M, directional derivatives, for XNNPACK")
        demo.elsewhere(compile_program, program)

    split, words = load_sentences(held_out=options.eval_size), demo.word_ids()
    parts = shards(split.train, options.clients, options.skew)
    together = [sentence for part in parts for sentence in part]
    random.Random(options.seed).shuffle(together)
    held_out = demo.batches(split.held_out)
    # As many sentences as the run can use, and no more: tokenizing takes time.
    needed = options.steps * demo.BATCH

    session = runtime_driver.Session(program)

    def accuracy() -> float:
        session.release()
        found = session.evaluate(held_out, label_ids=words, loss=False).accuracy
        session.release()
        assert found is not None
        return found

    table = Table(title=f"Accuracy on {options.eval_size} held-out sentences, after {options.steps} steps")
    for column in ("", "accuracy", "sentences seen", "seconds"):
        table.add_column(column)
    before = accuracy()
    console.print(f"accuracy before training: {before:.3f}")
    table.add_row("before training", f"{before:.3f}", "0", "")

    console.print(f"one process with everybody's sentences: {options.steps} steps")
    started = time.monotonic()
    run = {"lr": options.lr, "eps": epsilon(program), "seed": options.seed}
    session.fit(demo.batches(together[:needed]), steps=options.steps, progress=False, **run)
    seconds, alone = time.monotonic() - started, accuracy()
    console.print(f"accuracy of one process: {alone:.3f}")
    table.add_row("one process, all sentences", f"{alone:.3f}", f"{needed}", f"{seconds:.0f}")

    console.print(f"{options.clients} clients, {options.asked} asked in a round of {options.local_steps} steps")
    journal = out / "federated.jsonl"
    journal.unlink(missing_ok=True)
    started = time.monotonic()
    own = [demo.batches(part[:needed]) for part in parts]
    server = train_together(program, journal, own, options)
    seconds = time.monotonic() - started
    session = runtime_driver.Session(program)
    session.replay(journal)
    session.save_adapter(out / "adapter")
    given = sum(len(record.contributions) for record in runtime_driver.read_journal(journal).records)
    table.add_row(
        f"{options.clients} clients, simulated", f"{accuracy():.3f}", f"{given * demo.BATCH}", f"{seconds:.0f}"
    )
    console.print(table)
    missing = sum(server.dropped.values())
    console.print(
        f"{given / options.steps:.1f} clients contributed to a step, {missing} answers were missing; "
        f"{server.up_bytes + server.down_bytes:,} bytes in messages, up and down, all clients together"
    )


if __name__ == "__main__":
    main()
