"""Opens TensorBoard over a run in headless Chromium, and keeps a picture of it.

python scripts/board_screenshot.py runs/quickstart/tensorboard docs/images/tensorboard.png
"""

import argparse
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image
from playwright.sync_api import Page, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",  # root has none
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-gpu",
]  # fmt: skip
"""Keeps the browser to the page that it is given."""

SHOWN = (
    "^(adapter/(relative_norm/q_proj|effective_rank/q_proj|grad_norm/qkv)|data/|forgetting/kl|memory/"
    "|speed/(tokens|peak)|train/(loss|grad)|val/(loss|tok))"
)
"""The charts of the picture: some of each group."""


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """Serve a folder as ``tensorboard --logdir FOLDER --port PORT`` does, while the context lasts.

    Args:
        folder: Event files, or folders of them.

    Yields:
        The address.
    """
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port)]
    server = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_for(address, server)
        yield address
    finally:
        server.terminate()
        server.wait()


def _wait_for(address: str, server: subprocess.Popen[bytes], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"TensorBoard does not answer at {address}")


@contextmanager
def browser(width: int = 1440, height: int = 1570) -> Iterator[Page]:
    """Open a page in headless Chromium, which reaches nothing but this machine.

    Args:
        width: Of the window, in pixels.
        height: Of the window, in pixels.

    Yields:
        The page.
    """
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        try:
            page = chromium.new_page(viewport={"width": width, "height": height})
            page.route("**/*", _local_only)
            yield page
        finally:
            chromium.close()


def _local_only(route: Any) -> None:
    local = route.request.url.startswith(("http://127.0.0.1:", "data:", "blob:"))
    _ = route.continue_() if local else route.abort()


def main() -> None:
    """Take the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logdir", type=Path)
    parser.add_argument("png", type=Path)
    args = parser.parse_args()
    with tensorboard(args.logdir) as address, browser() as page:
        page.goto(f"{address}/?tagFilter={quote(SHOWN)}&smoothing=0#timeseries")
        page.get_by_text("Tags matching filter").first.wait_for()
        page.get_by_text("Enable step selection and data table").click()
        page.get_by_role("button", name="Settings").first.click()
        page.wait_for_timeout(2000)  # curves draw themselves
        page.screenshot(path=args.png)
    with Image.open(args.png) as picture:  # few colours: a quarter of the size
        picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(args.png, optimize=True)
    print(f"{args.png}: {args.png.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
