"""How workers reach each other: two collective operations on bytes, over torch.distributed."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

from runtime_driver.errors import FleetError, WorkerLostError

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]


class Channel(Protocol):
    """What :class:`runtime_driver.fleet.Workers` needs of a transport. All workers call the same in the same order."""

    @property
    def rank(self) -> int:
        """This worker's number."""
        ...

    @property
    def size(self) -> int:
        """How many workers there are."""
        ...

    def gather(self, data: bytes) -> list[bytes]:
        """Every worker's bytes, in the order of ranks, on every worker; all give equally many."""
        ...

    def broadcast(self, data: bytes) -> bytes:
        """Worker 0's bytes on every worker."""
        ...

    def close(self) -> None:
        """Leave the group."""
        ...


class TorchChannel:
    """gloo on CPU, in the group that torchrun describes in the environment, or in the one that exists already."""

    def __init__(self, timeout: float) -> None:
        """Join; ``timeout``: seconds after which a worker that does not answer is lost.

        Raises:
            FleetError: not started by torchrun, and no group exists.
        """
        import torch.distributed as dist
        from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
        from torch.distributed.rendezvous import rendezvous

        if not dist.is_available():
            raise FleetError("This build of PyTorch has no torch.distributed. Install one that does.")
        self._ours = not dist.is_initialized()
        if self._ours:
            missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
            if missing:
                raise FleetError(
                    f"Several workers need what torchrun sets; {', '.join(missing)} are not in the environment. Start "
                    "with `torchrun --nproc-per-node N -m mobizo_cli train ...`."
                )
            wait = timedelta(seconds=timeout)
            store, rank, size = next(rendezvous("env://", timeout=wait))
            # torchrun keeps one store over all restarts, with the addresses of processes that are gone.
            fresh = PrefixStore(_generation(store, rank, size, timeout), store)
            dist.init_process_group("gloo", store=fresh, rank=rank, world_size=size, timeout=wait)
        self._dist = dist
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def gather(self, data: bytes) -> list[bytes]:
        """See :class:`Channel`. Raises :class:`WorkerLostError`."""
        import torch

        own = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        self._collectively(lambda: self._dist.all_gather(everyone, own))
        return [bytes(each.tolist()) for each in everyone]

    def broadcast(self, data: bytes) -> bytes:
        """See :class:`Channel`. Raises :class:`WorkerLostError`."""
        import torch

        length = torch.tensor([len(data)])
        self._collectively(lambda: self._dist.broadcast(length, 0))
        whole = torch.frombuffer(bytearray(data), dtype=torch.uint8) if self.rank == 0 and data else None
        if whole is None:
            whole = torch.empty(int(length), dtype=torch.uint8)
        if whole.numel():
            self._collectively(lambda: self._dist.broadcast(whole, 0))
        return whole.numpy().tobytes()

    def close(self) -> None:
        """Leave the group, if it was joined here."""
        if self._ours and self._dist.is_initialized():
            self._dist.destroy_process_group()

    def _collectively(self, call: Callable[[], object]) -> None:
        try:
            call()
        except RuntimeError as error:
            raise WorkerLostError(self.rank, str(error)) from error


def _generation(store: Store, rank: int, size: int, timeout: float) -> str:
    """A name that the workers of this start have in common, and those of no earlier one.

    Worker 0 draws it, and answers whoever says hello; what a process that is gone left in the store answers nothing.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"mobizo/hello/{rank}", own)
        name = store.get(f"mobizo/welcome/{own}").decode()
        store.set(f"mobizo/here/{name}/{rank}", "1")
        return name
    expected, ends = set(range(1, size)), time.monotonic() + timeout
    while expected:
        for other in list(expected):
            if store.check([f"mobizo/here/{own}/{other}"]):
                expected.discard(other)
            elif store.check([f"mobizo/hello/{other}"]):
                store.set(f"mobizo/welcome/{store.get(f'mobizo/hello/{other}').decode()}", own)
        if time.monotonic() > ends:
            raise WorkerLostError(rank, f"worker {min(expected)} did not start within {timeout:.0f} s.")
        time.sleep(0.01)
    return own
