"""When a rank fails, every rank names it and ends."""

import atexit
import os
import socket
import sys
import threading
import time
from contextlib import suppress

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store
from typing_extensions import override

from phi3_lightning.distributed.collectives import all_gather_object

PREFIX = "phi3_lightning/failure"
"""Prefix of the keys that the ranks exchange, in the store of the process group."""

HEARTBEAT_SECONDS = 0.5


class RankFailure(pl.Callback):
    """Ends every rank soon after one has failed, with an error that names that rank and its exception.

    Without it the others end with "connection closed by peer", or wait in a collective for half an hour. A rank that
    vanishes without an exception, such as one on a host that lost its power, is named as silent. The callback has to
    come after those that communicate when a run fails, and does nothing on one rank.

    Args:
        patience: Seconds to wait for news of a failure.
        grace: Seconds after which a rank that still waits for a failed one is ended.
    """

    def __init__(self, patience: float = 5.0, grace: float = 20.0) -> None:
        self.patience = patience
        self.grace = grace
        self._watch: _Watch | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            hosts = all_gather_object(trainer, socket.gethostname())
            self._watch = _Watch(trainer.global_rank, hosts, self.grace)
            self._watch.start()
            atexit.register(self._watch.end)  # after an exception there is no teardown

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._watch is not None:
            self._watch.end()
            atexit.unregister(self._watch.end)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        requested = isinstance(exception, SIGTERMException | KeyboardInterrupt)
        if requested or trainer.world_size == 1 or not dist.is_initialized():
            return
        # there is no watch while data are being prepared, when the other ranks do not listen either
        watch = self._watch or _Watch(trainer.global_rank, [None] * trainer.world_size, self.grace)
        if is_communication(exception):
            if self._watch is None and trainer.global_rank != 0:
                # the store has gone with rank 0, and a question to it prints a C++ stack below the error of rank 0
                note = f"rank {trainer.global_rank} ends because another did while the data were being prepared"
            else:
                note = watch.cause(self.patience)
            exception.add_note(note)
        else:
            cause = f"{type(exception).__name__}: {str(exception)[:2000]}"
            watch.report(cause, self.patience if watch.is_alive() else 0.0)


def is_communication(exception: BaseException) -> bool:
    """Return whether an exception means no more than that another rank could not be reached."""
    return isinstance(exception, dist.DistError) or (isinstance(exception, RuntimeError) and "gloo" in str(exception))


class _Watch(threading.Thread):
    """Sends heartbeats of this rank, and listens for the failure of others."""

    def __init__(self, rank: int, hosts: list[str | None], grace: float) -> None:
        super().__init__(daemon=True, name="rank-failure")
        self.over = threading.Event()
        self._rank = rank
        self._hosts = hosts
        self._grace = grace
        self._store = PrefixStore(PREFIX, _get_default_store())
        self._first: str | None = None

    def run(self) -> None:
        while not self.over.wait(HEARTBEAT_SECONDS):
            try:
                self._store.add(f"beat/{self._rank}", 1)
                if self._store.check(["first"]):
                    self._first = self._store.get("first").decode()
                    self._store.add("heard", 1)
                    break
            except dist.DistError:
                return  # rank 0 has ended
        # a collective of gloo fails by itself, one of NCCL waits on
        if self._first is not None and not self.over.wait(self._grace):
            print(f"error: {self._message()}", file=sys.stderr, flush=True)
            os._exit(1)

    def end(self) -> None:
        """Stop listening: a thread that returns from the store while the interpreter shuts down aborts the process."""
        self.over.set()
        self.join(self._grace)

    def report(self, cause: str, patience: float) -> None:
        """Send the others the cause of this rank's failure; rank 0, which keeps the store, waits until they have it."""
        with suppress(dist.DistError):  # the other ranks have ended
            self._store.compare_set("first", "", f"{self._who(self._rank)} failed: {cause}")
            end = time.monotonic() + patience
            while self._rank == 0 and self._store.add("heard", 0) < len(self._hosts) and time.monotonic() < end:
                time.sleep(HEARTBEAT_SECONDS / 5)

    def cause(self, patience: float) -> str:
        """Return why this rank could not reach another."""
        try:
            before, end = self._beats(), time.monotonic() + patience
            while self._first is None and time.monotonic() < end:
                time.sleep(HEARTBEAT_SECONDS / 5)
            if self._first is None:
                alive = [now > then for now, then in zip(self._beats(), before, strict=True)]
                silent = [self._who(rank) for rank, beats in enumerate(alive) if not beats]
                self._first = f"no sign of life from {', '.join(silent) or 'the network'}"
                self._first = self._store.compare_set("first", "", self._first).decode()
                if self._rank == 0:
                    time.sleep(min(patience, 4 * HEARTBEAT_SECONDS))  # the store goes with this rank
        except dist.DistError:
            self._first = self._first or f"no sign of life from {self._who(0)}"
        return self._message()

    def _beats(self) -> list[int]:
        return [self._store.add(f"beat/{rank}", 0) for rank in range(len(self._hosts))]

    def _who(self, rank: int) -> str:
        host = self._hosts[rank]
        return f"rank {rank}" if host is None else f"rank {rank} on {host}"

    def _message(self) -> str:
        return f"rank {self._rank} ends because another did: {self._first}"
