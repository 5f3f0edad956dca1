"""Downloads against a server on this machine that does everything a server may do wrong."""

from __future__ import annotations

import hashlib
import http.server
import multiprocessing
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file

from deitfast.errors import DeitfastError
from deitfast.files import cache_folder
from deitfast.model import download
from deitfast.model.download import fetch
from deitfast.model.factory import create_model
from deitfast.model.weights import published_weights
from deitfast.model.zoo import VARIANTS

CONTENT = bytes(range(256)) * 4096  # 1 MiB
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT, with Range, under names that say what goes wrong."""

    requests: ClassVar[list[tuple[str, str | None]]] = []
    files: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        name, wanted = self.path.strip("/"), self.headers.get("Range")
        self.requests.append((name, wanted))
        content = self.files.get(name, CONTENT)
        if name.startswith("missing"):
            self.send_error(404)
            return
        if name.startswith("page"):
            content = b"\n<!DOCTYPE html><html><body>Please log in</body></html>"
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if name.startswith("ignores"):
            start = 0
        if start > len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        if name.startswith("breaks"):  # a third of the file at a time
            body = body[: len(content) // 3]
        if name.startswith(("truncated", "ignores")):  # never past its middle
            body = body[: max(len(content) // 2 - start, 0)]
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("http_proxy", "HTTP_PROXY", "DEITFAST_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "_PAUSE_S", 0.0)
    Server.requests, Server.files = [], {}
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def refused(url: str, folder: Path, sha256: str = "") -> str:
    """The message of a download that fails and leaves nothing behind."""
    with pytest.raises(DeitfastError) as raised:
        fetch(url, folder, sha256)
    assert "\n" not in str(raised.value)
    assert not folder.exists() or list(folder.iterdir()) == []
    return str(raised.value)


def test_a_file_is_fetched_once(server: str, tmp_path: Path) -> None:
    path = fetch(f"{server}/weights.bin", tmp_path / "new", DIGEST)
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["weights.bin"]
    assert fetch(f"{server}/weights.bin", tmp_path / "new", DIGEST) == path
    assert len(Server.requests) == 1


def test_a_broken_connection_is_resumed(server: str, tmp_path: Path) -> None:
    assert fetch(f"{server}/breaks.bin", tmp_path, DIGEST).read_bytes() == CONTENT
    third = len(CONTENT) // 3
    assert [wanted for _, wanted in Server.requests] == [
        None,
        f"bytes={third}-",
        f"bytes={2 * third}-",
        f"bytes={3 * third}-",
    ]


def test_the_part_of_a_killed_process_is_resumed(server: str, tmp_path: Path) -> None:
    (tmp_path / "weights.bin.part").write_bytes(CONTENT[:1000])
    assert fetch(f"{server}/weights.bin", tmp_path, DIGEST).read_bytes() == CONTENT
    assert Server.requests == [("weights.bin", "bytes=1000-")]
    assert [p.name for p in tmp_path.iterdir()] == ["weights.bin"]


@pytest.mark.parametrize("part", [b"of another file", CONTENT + b"more", CONTENT])
def test_a_part_of_another_file_is_fetched_anew(part: bytes, server: str, tmp_path: Path) -> None:
    (tmp_path / "weights.bin.part").write_bytes(part)
    assert fetch(f"{server}/weights.bin", tmp_path, DIGEST).read_bytes() == CONTENT


def test_a_server_without_ranges(server: str, tmp_path: Path) -> None:
    (tmp_path / "plain.bin.part").write_bytes(b"x" * 10)
    Server.files["plain.bin"] = CONTENT
    assert fetch(f"{server}/plain.bin", tmp_path, DIGEST).read_bytes() == CONTENT
    assert "broke off" in refused(f"{server}/ignores.bin", tmp_path / "other")


def test_what_a_server_may_do_wrong_is_one_line_and_leaves_nothing(server: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    assert "broke off" in refused(f"{server}/truncated.bin", folder)
    assert "answered 404" in refused(f"{server}/missing.bin", folder)
    assert "a page of HTML" in refused(f"{server}/page.pth", folder)
    wrong = refused(f"{server}/weights.bin", folder, "0" * 64)
    assert DIGEST in wrong
    assert "expected " + "0" * 64 in wrong
    Server.files["empty.bin"] = b""
    assert "an empty file" in refused(f"{server}/empty.bin", folder)
    assert "names no file" in refused(f"{server}/", folder)


def test_the_hash_in_a_name_counts(server: str, tmp_path: Path) -> None:
    assert fetch(f"{server}/model-{DIGEST[:8]}.pth", tmp_path).name == f"model-{DIGEST[:8]}.pth"
    assert "expected a1311bcf" in refused(f"{server}/model-a1311bcf.pth", tmp_path / "other")


def test_no_network(server: str, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert "Connection refused" in refused(f"{address}/weights.bin", tmp_path / "cache")


@pytest.mark.parametrize("name", ["DEITFAST_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_uses_what_is_there(name: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert "forbids fetching" in refused(f"{server}/weights.bin", tmp_path)
    assert Server.requests == []
    (tmp_path / "weights.bin").write_bytes(b"there")
    assert fetch(f"{server}/weights.bin", tmp_path).read_bytes() == b"there"


def test_a_folder_that_cannot_be_written(server: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DeitfastError, match="Set DEITFAST_HOME"):
        fetch(f"{server}/weights.bin", tmp_path / "file" / "folder")


def test_many_processes_download_once(server: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fetch, args=(f"{server}/weights.bin", tmp_path, DIGEST)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(Server.requests) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["weights.bin"]


def test_published_weights_go_where_deitfast_home_says(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    name = "deit_digits_patch4_16"
    torch.manual_seed(0)
    model = create_model(name)
    save_file(model.state_dict(), tmp_path / "weights")
    Server.files[f"{name}.pth"] = (tmp_path / "weights").read_bytes()
    monkeypatch.setitem(VARIANTS, name, replace(VARIANTS[name], url=f"{server}/{name}.pth"))
    monkeypatch.setenv("DEITFAST_HOME", str(tmp_path / "home"))
    loaded = create_model(name, pretrained=True)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert (
        published_weights(name) == cache_folder("weights") / f"{name}.pth" == tmp_path / "home/weights" / f"{name}.pth"
    )
    assert len(Server.requests) == 1
