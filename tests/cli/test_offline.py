"""With a base in a local folder nothing needs the network: every socket but loopback is blocked."""

import socket

import pytest

from cli.conftest import QUICK, TINY

LOOPBACK = ("127.", "::1", "localhost")


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Forked runs inherit the block; an attempt is refused, and recorded in a file."""
    tried = tmp_path / "tried.txt"
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def refuse(address):
        if isinstance(address, str | bytes) or str(address[0]).startswith(LOOPBACK):
            return  # a socket of this machine
        with tried.open("a") as file:
            file.write(f"{address}\n")
        raise OSError("the network is blocked")

    def guarded_connect(self, address):
        refuse(address)
        return connect(self, address)

    def guarded_resolve(host, *args, **kwargs):
        refuse((host or "localhost",))
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_resolve)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return tried


def test_fit_resume_predict_and_export_need_no_network(cli, tmp_path, no_network):
    cli("fit", *QUICK, "--trainer.max_steps=2")
    assert "resuming after step 2" in cli("fit", *QUICK, "--trainer.max_steps=4").text
    cli("predict", *QUICK, f"--data.predict={TINY}/prompts.jsonl")
    for kind in ("peft", "merged"):
        cli("export", "--ckpt_path=runs/phi3-lora/checkpoints/last.ckpt", f"--output_dir={kind}", f"--format={kind}")
    assert not no_network.exists(), no_network.read_text()


def test_the_network_block_refuses_connections(no_network):
    with pytest.raises(OSError, match="blocked"):
        socket.create_connection(("huggingface.co", 443), timeout=1)
    assert "huggingface.co" in no_network.read_text()
