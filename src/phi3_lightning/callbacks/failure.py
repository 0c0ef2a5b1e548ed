"""Which rank failed first, said by every rank, and an end to all of them."""

import atexit
import os
import socket
import sys
import threading
import time
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store
from typing_extensions import override

PREFIX = "phi3_lightning/failure"
"""Where the ranks leave notes for each other, in the store by which they found each other."""

BEAT_SECONDS = 0.5


class RankFailure(pl.Callback):
    """Ends every rank soon after one has failed, and has each say which it was and why.

    Without it the others end with "connection closed by peer", or wait in a collective for half an hour. A rank that
    vanishes without a word, such as one on a host that lost its power, is named as silent. It has to come after
    callbacks that communicate when a run fails, and does nothing on one rank.

    Args:
        patience: Seconds in which ranks hear of each other's failure.
        grace: Seconds after which a rank that still waits for a failed one is ended.
    """

    def __init__(self, patience: float = 5.0, grace: float = 20.0) -> None:
        self.patience = patience
        self.grace = grace
        self._watch: _Watch | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            hosts: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(hosts, socket.gethostname())
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
        asked = isinstance(exception, SIGTERMException | KeyboardInterrupt)
        if asked or trainer.world_size == 1 or not dist.is_initialized():
            return
        # without one where data were still being prepared, and the other ranks cannot have listened
        watch = self._watch or _Watch(trainer.global_rank, [None] * trainer.world_size, self.grace)
        if is_communication(exception):
            exception.add_note(watch.cause(self.patience))
        else:
            cause = f"{type(exception).__name__}: {str(exception)[:2000]}"
            watch.report(cause, self.patience if watch.is_alive() else 0.0)


def is_communication(exception: BaseException) -> bool:
    """Return whether an exception says no more than that another rank could not be reached.

    Args:
        exception: Any.
    """
    return isinstance(exception, dist.DistError) or (isinstance(exception, RuntimeError) and "gloo" in str(exception))


class _Watch(threading.Thread):
    """Shows that this rank lives, and listens for the failure of others."""

    def __init__(self, rank: int, hosts: list[str | None], grace: float) -> None:
        super().__init__(daemon=True, name="rank-failure")
        self.over = threading.Event()
        self._rank = rank
        self._hosts = hosts
        self._grace = grace
        self._store = PrefixStore(PREFIX, _get_default_store())
        self._first: str | None = None

    def run(self) -> None:
        while not self.over.wait(BEAT_SECONDS):
            try:
                self._store.add(f"beat/{self._rank}", 1)
                if self._store.check(["first"]):
                    self._first = self._store.get("first").decode()
                    self._store.add("heard", 1)
                    break
            except dist.DistError:
                return  # rank 0 has ended, well or badly
        # a rank in gloo hears of it by itself, one in NCCL waits on
        if self._first is not None and not self.over.wait(self._grace):
            print(f"error: {self._told()}", file=sys.stderr, flush=True)
            os._exit(1)

    def end(self) -> None:
        """Stop listening: a thread that comes back from the store while the interpreter goes aborts the process."""
        self.over.set()
        self.join(self._grace)

    def report(self, cause: str, patience: float) -> None:
        """Tell the others why this rank fails; rank 0 waits until they have heard, since it keeps the store."""
        try:
            self._store.compare_set("first", "", f"{self._who(self._rank)} failed: {cause}")
            end = time.monotonic() + patience
            while self._rank == 0 and self._store.add("heard", 0) < len(self._hosts) and time.monotonic() < end:
                time.sleep(BEAT_SECONDS / 5)
        except dist.DistError:
            pass  # nobody is left to tell

    def cause(self, patience: float) -> str:
        """Why this rank could not reach another."""
        try:
            before, end = self._beats(), time.monotonic() + patience
            while self._first is None and time.monotonic() < end:
                time.sleep(BEAT_SECONDS / 5)
            if self._first is None:
                alive = [now > then for now, then in zip(self._beats(), before, strict=True)]
                silent = [self._who(rank) for rank, beats in enumerate(alive) if not beats]
                self._first = f"no sign of life from {', '.join(silent) or 'the network'}"
                self._agree_on(self._first, patience)
        except dist.DistError:
            self._first = self._first or f"no sign of life from {self._who(0)}"
        return self._told()

    def _agree_on(self, finding: str, patience: float) -> None:
        self._first = self._store.compare_set("first", "", finding).decode()
        if self._rank == 0:
            time.sleep(min(patience, 4 * BEAT_SECONDS))  # the store goes with this rank

    def _beats(self) -> list[int]:
        return [self._store.add(f"beat/{rank}", 0) for rank in range(len(self._hosts))]

    def _who(self, rank: int) -> str:
        host = self._hosts[rank]
        return f"rank {rank}" if host is None else f"rank {rank} on {host}"

    def _told(self) -> str:
        return f"rank {self._rank} ends because another did: {self._first}"
