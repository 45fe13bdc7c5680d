"""A server of files on this machine, in place of the servers that weights come from.

Import with `from make_server import ...`.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest


@dataclass
class Server:
    """A server that gives the files it knows, and 404 for others.

    Attributes:
        address: of the server.
        files: path on the server → content.
        digests: path → the sha256 that the server states, where it is not the content's.
        moved: path → the address that the server sends to instead.
        asked: what it was asked for, such as "GET /a.pth".
    """

    address: str
    files: dict[str, bytes] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


@contextmanager
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Run a server until the block ends; it speaks as the Hugging Face hub does."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            running.asked.append(f"{self.command} {self.path}")
            content = running.files.get(self.path)
            elsewhere = running.moved.get(self.path)
            self.send_response(302 if elsewhere else 404 if content is None else 200)
            if elsewhere:
                self.send_header("Location", elsewhere)
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            else:
                digest = running.digests.get(self.path, hashlib.sha256(content).hexdigest())
                self.send_header("ETag", f'"{digest}"')
                self.send_header("X-Repo-Commit", "c" * 40)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if content and body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        running = Server(f"http://127.0.0.1:{http.server_port}")
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        http.shutdown()
        thread.join()


def empty_caches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give torch hub and the Hugging Face client empty caches, and the latter an address where nothing listens.

    Args:
        folder: gets `torch/hub` and `hub`.
        monkeypatch: puts everything back.
    """
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    monkeypatch.delenv("FINETUNE_WEIGHTS", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
    hub_at(monkeypatch, "http://127.0.0.1:9")


def hub_at(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Let the Hugging Face client ask this address."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
