"""Workers as threads of one process: everything of a fleet but torch.distributed, in milliseconds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime_driver import Session
from runtime_driver.fleet import Workers
from runtime_driver.fleet.messages import Message


@dataclass
class Hub:
    """Where threads meet. ``change``: what becomes of a message, from the worker that sends it."""

    size: int
    change: Callable[[int, bytes], bytes] = lambda worker, data: data
    barrier: threading.Barrier = field(init=False)
    slots: list[bytes] = field(init=False)
    gathered: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, self._all_here, timeout=30)
        self.slots = [b""] * self.size

    def _all_here(self) -> None:
        self.gathered = list(self.slots)


@dataclass
class ThreadChannel:
    hub: Hub
    rank: int

    @property
    def size(self) -> int:
        return self.hub.size

    def gather(self, data: bytes) -> list[bytes]:
        self.hub.slots[self.rank] = self.hub.change(self.rank, data)
        self.hub.barrier.wait()
        return self.hub.gathered

    def broadcast(self, data: bytes) -> bytes:
        return self.gather(data)[0]

    def close(self) -> None: ...


def poison(worker: int, change: Callable[[Message], Message]) -> Callable[[int, bytes], bytes]:
    """Lets one worker send something else than what it computed."""

    def changed(sender: int, data: bytes) -> bytes:
        if sender != worker or len(data) != 36:  # a message of two queries
            return data
        return change(Message.unpack(data)).pack()

    return changed


def fit(
    sessions: Sequence[Session], batches: Callable[[int], Any], steps: int, hub: Hub | None = None, **options: Any
) -> list[Any]:
    """Train, each session in a thread of its own; what `fit` returned or raised, and the workers, by rank."""
    hub = Hub(len(sessions)) if hub is None else hub
    own = {name: options.pop(name) for name in ("mode", "combine", "limit", "hash_every") if name in options}
    ended: list[Any] = [None] * len(sessions)

    def work(rank: int) -> None:
        workers = Workers(channel=ThreadChannel(hub, rank), **own)
        try:
            ended[rank] = (
                sessions[rank].fit(batches(rank), steps, progress=False, workers=workers, **options),
                workers,
            )
        except BaseException as error:  # noqa: BLE001 - it is what the test looks at
            ended[rank] = (error, workers)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(sessions))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return ended
