import fcntl
import hashlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from experiments.longbench_qa.download import fetch

CONTENT = bytes(range(256)) * 20
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HALF = len(CONTENT) // 2


class Server:
    """An HTTP server on this machine. `answers` are used up one a request; the last one stays."""

    def __init__(self) -> None:
        # An error's status, "whole", "half" (it hangs up in the middle), "moved" or "another range".
        self.answers: list[int | str] = ["whole"]
        self.ranges = True
        self.asked: list[str | None] = []  # the Range of each request
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/data.zip"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        asked = request.headers.get("Range")
        self.asked.append(asked)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.ranges else 0
        if isinstance(answer, int):
            return request.send_error(answer)
        if start >= len(CONTENT):
            return request.send_error(416)
        request.send_response(302 if answer == "moved" else 206 if start else 200)
        if answer == "moved":
            request.send_header("Location", self.url)
            return request.end_headers()
        if start:
            shown = start + 1 if answer == "another range" else start
            request.send_header("Content-Range", f"bytes {shown}-{len(CONTENT) - 1}/{len(CONTENT)}")
        request.send_header("Content-Length", str(len(CONTENT) - start))
        request.end_headers()
        request.wfile.write(CONTENT[start:HALF] if answer == "half" else CONTENT[start:])


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.http.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.http.shutdown()
    server.http.server_close()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"data.zip.lock"}


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError, match=r"\S") as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_whole(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "data.zip"
    assert fetch(server.url, path, SHA256) == path
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == {"data.zip"}
    assert server.asked == [None]


def test_already_there(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(CONTENT)
    assert fetch(server.url, tmp_path / "data.zip", SHA256).read_bytes() == CONTENT
    assert server.asked == []
    assert [path.name for path in tmp_path.iterdir()] == ["data.zip"]  # nothing is written: it may be read-only


@pytest.mark.parametrize("ranges", [True, False])  # a server without ranges starts over
def test_a_broken_transfer_goes_on_where_it_was(server: Server, tmp_path: Path, ranges: bool) -> None:
    server.ranges = ranges
    server.answers = ["half", "moved", "whole"]
    assert fetch(server.url, tmp_path / "data.zip", SHA256).read_bytes() == CONTENT
    assert server.asked == [None, f"bytes={HALF}-", f"bytes={HALF}-"]


def test_the_next_call_goes_on_where_the_last_was(server: Server, tmp_path: Path) -> None:
    server.answers = ["half", 503]
    message = refused(lambda: fetch(server.url, tmp_path / "data.zip", SHA256))
    assert f"cannot download {server.url} to {tmp_path / 'data.zip'}: HTTP 503" in message
    assert names(tmp_path) == {"data.zip.part"}
    server.answers = ["whole"]
    assert fetch(server.url, tmp_path / "data.zip", SHA256).read_bytes() == CONTENT
    assert server.asked[-1] == f"bytes={HALF}-"
    assert names(tmp_path) == {"data.zip"}


def test_a_server_that_always_breaks_off(server: Server, tmp_path: Path) -> None:
    server.answers = ["half"]
    server.ranges = False
    message = refused(lambda: fetch(server.url, tmp_path / "data.zip", SHA256))
    assert f"it broke off after {HALF} of {len(CONTENT)} bytes" in message
    assert len(server.asked) == 2  # the second request brought nothing more


def test_another_range_than_asked_for_is_not_appended(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data.zip.part").write_bytes(CONTENT[:HALF])
    server.answers = ["another range", "whole"]
    assert "got another part" in refused(lambda: fetch(server.url, tmp_path / "data.zip", SHA256))
    assert fetch(server.url, tmp_path / "data.zip", SHA256).read_bytes() == CONTENT
    assert server.asked == [f"bytes={HALF}-", None]


def test_a_part_that_was_whole(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data.zip.part").write_bytes(CONTENT)
    assert fetch(server.url, tmp_path / "data.zip", SHA256).read_bytes() == CONTENT
    assert server.asked == [f"bytes={len(CONTENT)}-"]


@pytest.mark.parametrize("part", [b"", b"other bytes", b"x" * len(CONTENT)])
def test_wrong_hash(server: Server, tmp_path: Path, part: bytes) -> None:
    if part:
        (tmp_path / "data.zip.part").write_bytes(part)
    expected = SHA256 if part else "0" * 64
    found = hashlib.sha256(part + CONTENT[len(part) :]).hexdigest()
    message = refused(lambda: fetch(server.url, tmp_path / "data.zip", expected))
    assert message == f"{server.url} has sha256 {found}, expected {expected}: it was not kept"
    assert names(tmp_path) == set()
    assert fetch(server.url, tmp_path / "data.zip", SHA256).read_bytes() == CONTENT


def test_a_wrong_file_already_there_is_left_to_the_user(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "data.zip"
    path.write_bytes(b"mine")
    message = refused(lambda: fetch(server.url, path, SHA256))
    assert message.startswith(f"{path} has sha256 {hashlib.sha256(b'mine').hexdigest()}, expected {SHA256}: remove it")
    assert path.read_bytes() == b"mine"
    assert server.asked == []


def test_not_found(server: Server, tmp_path: Path) -> None:
    server.answers = [404]
    path = tmp_path / "data.zip"
    message = refused(lambda: fetch(server.url, path, SHA256, "give data_dir=FOLDER"))
    by_hand = "put the file there by hand, or give data_dir=FOLDER"
    assert message == f"cannot download {server.url} to {path}: HTTP 404 Not Found; {by_hand}"
    assert len(server.asked) == 1
    assert names(tmp_path) == set()


@pytest.mark.parametrize("listens", [False, True])
def test_nobody_answers(tmp_path: Path, listens: bool) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        if listens:
            mute.listen()
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/data.zip"
        message = refused(lambda: fetch(url, tmp_path / "data.zip", SHA256, timeout=0.1))
    assert message.startswith(f"cannot download {url} to {tmp_path / 'data.zip'}: ")
    assert f"{'timed out' if listens else 'Connection refused'}; put the file there by hand" in message


def test_a_folder_that_cannot_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refused(lambda: fetch(server.url, tmp_path / "file" / "data.zip", SHA256))
    assert f"cannot download {server.url} to {tmp_path / 'file' / 'data.zip'}: " in message


def test_processes_at_once(server: Server, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from experiments.longbench_qa.download import fetch\n"
        "print('ready', flush=True); fetch(sys.argv[1], Path(sys.argv[2]), sys.argv[3])"
    )
    command = [sys.executable, "-c", code, server.url, str(tmp_path / "data.zip"), SHA256]
    root = Path(__file__).resolve().parents[2]
    with (tmp_path / "data.zip.lock").open("w") as lock:  # as if another process were downloading
        fcntl.flock(lock, fcntl.LOCK_EX)
        running = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        assert [process.stdout.readline() for process in running if process.stdout] == ["ready\n"] * 3
        time.sleep(0.2)
        assert server.asked == []
    assert [(process.communicate()[0], process.returncode) for process in running] == [("", 0)] * 3
    assert server.asked == [None]  # one downloaded, the others waited for its file
    assert (tmp_path / "data.zip").read_bytes() == CONTENT
