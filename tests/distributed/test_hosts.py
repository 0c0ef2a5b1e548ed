"""Two hosts, as two network namespaces with a cable between them, over real TCP; one of them dies."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cli.conftest import QUICK, REPOSITORY
from phi3_lightning.checkpoint.io import read_checkpoint

from .programs import LAST, LENGTH, STEPS, running, same, wait_for
from .ranks import free_port

pytestmark = pytest.mark.slow


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@dataclass
class Host:
    """A network namespace with one interface."""

    name: str
    address: str

    @property
    def interface(self) -> str:
        return f"{self.name}-eth"

    def command(self, *program: str) -> tuple[str, ...]:
        named = f'hostname {self.name} && exec "$@"'
        return ("ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", named, "sh", *program)


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("network namespaces need iproute2 and util-linux: apt-get install -y iproute2")
    tag = f"p{os.getpid() % 10_000}"
    both = [Host(f"{tag}{letter}", f"10.213.7.{number}") for number, letter in enumerate("ab", start=1)]
    try:
        for host in both:
            ip("netns", "add", host.name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be created here: {error.stderr.decode().strip()}")
    try:
        ip("link", "add", both[0].interface, "netns", both[0].name, "type", "veth",
           "peer", "name", both[1].interface, "netns", both[1].name)  # fmt: skip
        for host in both:
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.interface)
            ip("-n", host.name, "link", "set", host.interface, "up")
            ip("-n", host.name, "link", "set", "lo", "up")
        yield both
    finally:
        for host in both:  # the cable goes with them
            subprocess.run(["ip", "netns", "delete", host.name], check=False, capture_output=True)


OPTIONS = (
    "fit", *QUICK, *LENGTH, "--checkpoint.every_n_steps=5", "--run=bot", "--data.cache_dir=cache",
    "--config=timeout.yaml",
)  # fmt: skip
TIMEOUT = """
trainer:
  strategy: {class_path: lightning.pytorch.strategies.DDPStrategy, init_args: {timeout: "0:00:15"}}
"""


def sent(host: Host) -> int:
    """Bytes that have left the host."""
    file = f"/sys/class/net/{host.interface}/statistics/tx_bytes"
    shown = subprocess.run(["ip", "netns", "exec", host.name, "cat", file], check=True, capture_output=True)
    return int(shown.stdout)


def test_a_run_resumes_after_a_host_dies(hosts, uninterrupted, tmp_path):
    def on(rank: int, folder: Path, port: int):
        environment = {
            "MASTER_ADDR": hosts[0].address, "MASTER_PORT": str(port), "NODE_RANK": str(rank), "LOCAL_RANK": "0",
            "GLOO_SOCKET_IFNAME": hosts[rank].interface, "WORLD_SIZE": "2",
        }  # fmt: skip
        program = (sys.executable, str(REPOSITORY / "cli.py"), *OPTIONS, "--trainer.num_nodes=2")
        return running(folder, *hosts[rank].command(*program), **environment)

    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "timeout.yaml").write_text(TIMEOUT)
    port = free_port()
    with on(0, cut, port) as (first, text), on(1, cut, port) as (second, _):
        wait_for(lambda: (cut / LAST).exists(), text)
        ip("-n", hosts[1].name, "link", "set", hosts[1].interface, "down")  # no message reaches the other host
        os.kill(second.pid, signal.SIGKILL)
        before = time.monotonic()
        assert first.wait(60) == 1, text()
        print(f"ended after {time.monotonic() - before:.0f} s, with a timeout of 15 s")
        assert f"no sign of life from rank 1 on {hosts[1].name}" in text().strip().splitlines()[-1]
    done = read_checkpoint(cut / LAST)["global_step"]
    assert 5 <= done < STEPS

    ip("-n", hosts[1].name, "link", "set", hosts[1].interface, "up")
    port, before = free_port(), sent(hosts[1])
    with on(0, cut, port) as (first, text), on(1, cut, port) as (second, other):
        assert first.wait(100) == 0, text()
        assert second.wait(30) == 0, other()
        assert f"resuming after step {done}" in text()
    state = read_checkpoint(cut / LAST)["state_dict"]
    adapter = sum(tensor.nbytes for tensor in state.values())
    wire = (sent(hosts[1]) - before) / adapter / (STEPS - done)
    print(f"{wire:.2f} adapters left a host a step")
    assert 0.9 < wire < 1.3  # of two ranks each sends half for the sum and half of the sum: one adapter, and headers
    assert same(uninterrupted, cut)
