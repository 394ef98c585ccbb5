"""SmolLM2-135M learns from twenty clients that keep their sentences, beside one process that has them all.

The clients are simulated by Flower's own engine (`pip install 'flwr[simulation]'`). Each has a shard of the demo's film
reviews, nine tenths of it of one label, and in each round three in ten of them do not answer. What travels are seeds
and projected gradients. The closing table has the accuracy on sentences that nobody trained on, beside one process that
takes as many steps, with as many sentences in each and with one client's batch in each.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import random
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

import runtime_driver
from examples.packaged import Sentence, load_sentences
from runtime_driver.format.seeds import step_seed

if TYPE_CHECKING:
    from torch import Tensor

    from runtime_driver.fleet.flower import Server

demo = importlib.import_module("examples.01_train_sentiment")

#: Of a client; a step of all of them is a large batch anyway.
BATCH = 2
STEPS = 120
DEMO_HELD_OUT = 400
AWAY = "this client is away"


def compile_program(path: Path) -> None:
    """The demo's program of forward passes only, for smaller batches."""
    import lowering

    program = demo.build_program(demo.FORWARD_ONLY, batch=BATCH)
    lowering.lower(program, target="xnnpack").save(path)


def shards(sentences: tuple[Sentence, ...], clients: int, skew: float) -> list[list[Sentence]]:
    """Shards of equal size, whole batches, that share no sentence; `skew` of each is of one label, which alternates."""
    by_label = {label: [each for each in sentences if each.positive is label] for label in (True, False)}
    size = min(map(len, by_label.values())) // clients // BATCH * BATCH
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
        raise ConnectionError(AWAY)
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
        journal=journal,
        seed=options.seed,
        local_steps=options.local_steps,
        combine="mean",  # they are all ours
        deadline=None,
    )
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # a traceback for each client that is away
    warnings.filterwarnings("ignore", message=f".*{AWAY}")
    run_simulation(
        flower.server_app(lambda context: server),
        flower.client_app(program, partial(client_batches, own=own, away=options.away)),
        options.clients,
        backend_config={
            "init_args": {"num_cpus": options.processes, "object_store_memory": 2**28, "log_to_driver": False},
            # Flower gives these to Ray. Without restarts, a process that dies is given clients for the rest of the run.
            "client_resources": {"num_cpus": 1, "max_restarts": -1},
        },
    )
    return server


def train_alone(
    session: runtime_driver.Session, batches: list[dict[str, Tensor]], at_once: int, options: argparse.Namespace
) -> None:
    """One process with everybody's sentences: each step takes the mean over `at_once` batches, as the server does."""
    for step in range(options.steps):
        seed = step_seed(options.seed, step)
        taken = [batches[number % len(batches)] for number in range(step * at_once, (step + 1) * at_once)]
        found = [session.step(each, lr=options.lr, seed=seed, update=False) for each in taken]
        session.apply(
            seed, options.lr, [fmean(each) for each in zip(*(f.projected_gradients for f in found), strict=True)]
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--clients", type=int, default=20, help="clients in all")
    parser.add_argument("--away", type=float, default=0.3, help="share of them that does not answer in a round")
    parser.add_argument("--skew", type=float, default=0.9, help="share of a client's sentences that are of one label")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--local-steps", type=int, default=5, help="steps of a client in a round")
    parser.add_argument("--lr", type=float, default=demo.FORWARD_ONLY.learning_rate)
    parser.add_argument("--eval-size", type=int, default=400, help="held-out sentences, never trained on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="in which clients run, side by side")
    parser.add_argument("--program", type=Path, help="a program of an earlier run; default: compile one")
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

    # The demo's learning rate was chosen beside its held-out sentences: these are others.
    split, words = load_sentences(held_out=DEMO_HELD_OUT + options.eval_size), demo.word_ids()
    held_out = demo.batches(split.held_out[DEMO_HELD_OUT:], BATCH)
    parts = shards(split.train, options.clients, options.skew)
    together = [sentence for part in parts for sentence in part]
    random.Random(options.seed).shuffle(together)

    table = Table(title=f"Accuracy on {options.eval_size} held-out sentences, after {options.steps} steps")
    for column in ("", "accuracy", "sentences a step", "seconds"):
        table.add_column(column)

    def add_row(name: str, session: runtime_driver.Session, sentences: float, started: float | None) -> None:
        seconds = "" if started is None else f"{time.monotonic() - started:.0f}"
        session.release()  # one method at a time: each keeps its own packed copy of the weights
        accuracy = session.evaluate(held_out, label_ids=words, loss=False).accuracy
        session.release()
        console.print(f"{name}: {accuracy:.3f}")
        table.add_row(name, f"{accuracy:.3f}", f"{sentences:.1f}", seconds)

    add_row("before training", runtime_driver.Session(program), 0, None)
    journal = out / "federated.jsonl"
    journal.unlink(missing_ok=True)
    started = time.monotonic()
    server = train_together(program, journal, [demo.batches(part, BATCH) for part in parts], options)
    session = runtime_driver.Session(program)
    session.replay(journal)
    session.save_adapter(out / "adapter")
    given = sum(len(record.contributions) for record in runtime_driver.read_journal(journal).records) / options.steps
    add_row(f"{options.clients} clients, simulated", session, given * BATCH, started)
    for at_once in (round(given), 1):
        started, session = time.monotonic(), runtime_driver.Session(program)
        train_alone(session, demo.batches(together[: options.steps * at_once * BATCH], BATCH), at_once, options)
        add_row("one process, all sentences", session, at_once * BATCH, started)
    console.print(table)
    console.print(
        f"{given:.1f} clients contributed to a step, {sum(server.dropped.values())} answers were missing; "
        f"{server.up_bytes + server.down_bytes:,} bytes in messages, up and down, all clients together"
    )


if __name__ == "__main__":
    main()
