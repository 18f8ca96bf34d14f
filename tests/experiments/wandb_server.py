"""As much of a Weights & Biases server as `wandb sync` asks for: it keeps what it is sent."""

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote


@dataclass
class SyncedRun:
    """A run by its id: history lines in order, and files by their name."""

    id: str
    group: str | None = None
    name: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads(self.files["wandb-summary.json"])

    def table(self, key: str) -> dict[str, Any]:
        """`columns` and `data` of the table last logged under this key, from its media file."""
        return json.loads(self.files[self.summary[key]["path"]])


class WandbServer(ThreadingHTTPServer):
    """On a free port of this machine."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.runs: dict[str, SyncedRun] = {}

    def sync(self, folders: list[Path], home: Path) -> None:
        """`wandb sync` of the folders of offline runs; `home`: nothing of the user's settings counts."""
        environment = os.environ | {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40, "HOME": str(home)}
        command = [sys.executable, "-m", "wandb", "sync", "--yes", *(str(folder.resolve()) for folder in folders)]
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("Finished syncing") == len(folders)

    def answer(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL reply."""
        if query == "RunResumeStatus":
            return {
                "model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}, "bucket": self._resume(given)}
            }
        if query == "UpsertBucket":
            run = self.runs.setdefault(given["name"], SyncedRun(given["name"]))
            run.group, run.name = given["groupName"] or run.group, given["displayName"] or run.name
            run.config |= {key: entry["value"] for key, entry in json.loads(given["config"] or "{}").items()}
            project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
            return {"upsertBucket": {"bucket": {"id": run.id, "name": run.id, "project": project}, "inserted": True}}
        if query == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/{given['run']}/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
        if query == "CreateArtifact":  # a table's second copy, said to be there already
            sequence = {"id": "s", "latestArtifact": {"id": "a"}}
            return {"createArtifact": {"artifact": {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}}}
        return {}

    def _resume(self, given: dict[str, Any]) -> dict[str, Any] | None:
        run = self.runs.get(given["name"])
        if run is None:
            return None
        tail = json.dumps([json.dumps(line) for line in run.history[-1:]])
        counts = {"logLineCount": 0, "historyLineCount": len(run.history), "eventsLineCount": 0}
        # wandb takes a run without "t" for one that never started
        texts = {
            "historyTail": tail,
            "eventsTail": "[]",
            "summaryMetrics": "{}",
            "config": "{}",
            "wandbConfig": '{"t": 1}',
        }
        return {"id": run.id, "name": run.id, "displayName": run.name, "tags": [], "notes": None, **counts, **texts}

    def stream(self, run: SyncedRun, files: dict[str, Any]) -> None:
        """History lines replace what is there from their offset on."""
        if sent := files.get("wandb-history.jsonl"):
            run.history[sent["offset"] :] = [json.loads(line) for line in sent["content"]]


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        content = self._content()
        if self.path == "/graphql":
            asked = json.loads(content)
            self._reply({"data": self.server.answer(asked["operationName"], asked.get("variables") or {})})
            return
        if self.path.endswith("/file_stream"):
            run = self.server.runs[self.path.split("/")[-2]]
            self.server.stream(run, json.loads(content).get("files") or {})
        self._reply({})

    def do_PUT(self) -> None:
        _, run, name = unquote(self.path).split("/", 2)
        self.server.runs[run].files[name] = self._content()
        self._reply({})

    def _content(self) -> bytes:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

    def _reply(self, found: dict[str, Any]) -> None:
        content = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A server while inside."""
    with WandbServer() as server:
        server.handle_error = lambda *args: None  # type: ignore[method-assign]  # a client that hangs up
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
