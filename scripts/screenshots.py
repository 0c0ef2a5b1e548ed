"""The pictures of the documentation, of a run of the quickstart: TensorBoard, a page of preview, the report of a test.

    make quickstart
    python scripts/screenshots.py

Pages are opened in headless Chromium, which reaches nothing but this machine.
"""

import argparse
import socket
import subprocess
import sys
import tempfile
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
    "^(adapter/(relative_norm/q_proj|effective_rank/q_proj|grad_norm/qkv)|base_drift/kl|memory/"
    "|speed/(tokens|mfu|packing)|train/(loss|grad)|val/(loss|tok))"
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


def photograph_board(page: Page, logdir: Path, png: Path) -> None:
    """Keep a picture of TensorBoard's curves.

    Args:
        page: A page of the browser.
        logdir: The event files.
        png: Where the picture goes.
    """
    with tensorboard(logdir) as address:
        page.goto(f"{address}/?tagFilter={quote(SHOWN)}&smoothing=0#timeseries")
        page.get_by_text("Tags matching filter").first.wait_for()
        page.get_by_text("Enable step selection and data table").click()
        page.get_by_role("button", name="Settings").first.click()
        page.wait_for_timeout(2000)  # curves draw themselves
        page.screenshot(path=png)


def photograph_page(page: Page, html: Path, png: Path, width: int = 1100, height: int = 1000) -> None:
    """Keep a picture of the top of a self-contained page.

    Args:
        page: A page of the browser.
        html: The page's file.
        png: Where the picture goes.
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.
    """
    page.set_viewport_size({"width": width, "height": height})
    page.goto("about:blank")
    page.set_content(html.read_text(encoding="utf-8"))
    page.screenshot(path=png)


def _command(*arguments: str) -> None:
    subprocess.run([sys.executable, "cli.py", *arguments], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="the folder of the run")
    parser.add_argument("--folder", type=Path, default=Path("docs/images"), help="where the pictures go")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    config = str(args.run / "config.yaml")
    with tempfile.TemporaryDirectory() as made, browser() as page:
        _command("preview", "--config", config, "--html", f"{made}/preview.html")
        report = Path(made) / args.run.name  # which the page has for a title
        _command("test", "--config", config, "--evaluation.folder", str(report), "--trainer.logger", "false")
        photograph_board(page, args.run / "tensorboard", args.folder / "tensorboard.png")
        photograph_page(page, Path(made) / "preview.html", args.folder / "preview.png")
        photograph_page(page, report / "test.html", args.folder / "report.png")
    for png in sorted(args.folder.glob("*.png")):
        with Image.open(png) as picture:  # few colours: a quarter of the size
            picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(png, optimize=True)
        print(f"{png}: {png.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
