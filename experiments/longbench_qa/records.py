"""A cell's folder: config.json says what it is, predictions.jsonl holds a line a sample, metrics.json the result.

What is there is never overwritten: a run adds the samples that are missing, or refuses a folder that is not its own.

The three files have one format, with a number. It changes with the keys of a cell's identity, with those of a sample,
and with what one of them means, so that no folder holds records of two kinds. A new key of metrics.json alone, which
every run writes anew, does not change it.
"""

import fcntl
import json
import os
import socket
import threading
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any

FORMAT = 3  # a folder of another format is refused, not converted
SAMPLE_KEYS = {"id", "prediction", "answers", "score", "error"}

# Numbers of a sample: those that metrics.json has means of, and those of which the largest counts.
MEANS = (
    "prompt_tokens",
    "generated_tokens",
    "compressed_tokens",
    "budget_tokens",
    "kept_tokens",
    "answer_kept",
    "cache_bytes",
    "bookkeeping_bytes",
    "prefill_ms",
    "decode_ms_per_token",
)
MAXIMA = ("weights_bytes", "prefill_peak_bytes", "decode_peak_bytes", "total_peak_bytes", "cache_bytes")
NUMBERS = tuple(dict.fromkeys((*MEANS, *MAXIMA)))


class CellRecords:
    """One process's hold on a cell's folder. Use as a context manager.

    Raises ValueError, one line, if the folder cannot be written, is in use, or holds something else.

    Attributes:
        samples: the recorded samples by id.
        metrics: metrics.json as an earlier run left it, empty if none did.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self.identity = json.loads(json.dumps({"format": FORMAT, **identity}))  # as it will be read back
        self.config_path = folder / "config.json"
        self.predictions_path = folder / "predictions.jsonl"
        self.metrics_path = folder / "metrics.json"
        self.samples: dict[str, dict[str, Any]] = {}
        self.metrics: dict[str, Any] = {}
        self._writing = threading.RLock()
        self._held: IO[str] | None = None

    def __enter__(self) -> "CellRecords":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._held = _hold(self.folder / ".lock")
            if self.config_path.exists():
                self.refuse_other_cell()
                self.metrics = self._read_metrics()
            elif self.predictions_path.exists():
                raise ValueError(f"{self.folder} has predictions.jsonl but no config.json: not a cell of this harness")
            else:
                _write_whole(self.config_path, self.identity)
            self.samples = self._read_predictions()
        except OSError as error:
            self.__exit__(None, None, None)
            raise ValueError(f"cannot write to {self.folder}: {error.strerror}") from error
        except ValueError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._held is not None:
            self._held.close()  # and with it the lock
            self._held = None

    def refuse_other_cell(self) -> None:
        """Raise ValueError if config.json, which is there, is not this cell's; needs no hold on the folder."""
        found, mine = _read_object(self.config_path), self.identity
        different = sorted(key for key in mine.keys() | found.keys() if mine.get(key) != found.get(key))
        if different:
            changes = "; ".join(f"{key}: {found.get(key)} there, {mine.get(key)} now" for key in different)
            raise ValueError(f"{self.folder} holds another cell ({changes}): give another output_dir")

    def _read_metrics(self) -> dict[str, Any]:
        return _read_object(self.metrics_path) if self.metrics_path.exists() else {}

    def _read_predictions(self) -> dict[str, dict[str, Any]]:
        if not self.predictions_path.exists():
            return {}
        content = self.predictions_path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        samples: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            where = f"{self.predictions_path}, line {number}"
            try:
                sample = json.loads(line)
            except ValueError:
                raise ValueError(f"{where}: not a record of this harness (not JSON)") from None
            if not isinstance(sample, dict) or not sample.keys() >= SAMPLE_KEYS:
                raise ValueError(f"{where}: not a record of this harness")
            if sample["id"] in samples:
                raise ValueError(f"{where}: sample {sample['id']!r} is there twice")
            samples[sample["id"]] = sample
        if len(whole) < len(content):  # a line cut short by a crash: done again
            os.truncate(self.predictions_path, len(whole))
        return samples

    def add(self, sample: dict[str, Any]) -> None:
        """Append a sample's record and flush it to disk before returning."""
        line = (json.dumps(sample, ensure_ascii=False) + "\n").encode()
        with self._writing:
            try:
                with self.predictions_path.open("ab", buffering=0) as file:
                    end = file.tell()
                    try:
                        if file.write(line) < len(line):
                            raise OSError(0, "no room for a whole record")
                        os.fsync(file.fileno())
                    except OSError:
                        os.truncate(self.predictions_path, end)
                        raise
            except OSError as error:
                kept = f"the {len(self.samples)} samples recorded before are intact"
                raise ValueError(f"cannot write to {self.predictions_path}: {error.strerror}; {kept}") from error
            self.samples[sample["id"]] = sample

    def stop_adding(self) -> None:
        """From now on only this thread writes, until the process ends: what it reads stays what is on disk."""
        self._writing.acquire()

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Write metrics.json in one step."""
        with self._writing:
            try:
                _write_whole(self.metrics_path, metrics)
            except OSError as error:
                raise ValueError(f"cannot write {self.metrics_path}: {error.strerror}") from error


def _hold(path: Path) -> IO[str]:
    """Lock a file for this process, however it ends; raises ValueError that names who holds it."""
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ValueError(f"{path.parent} is being written by {holder}") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC")
    file.flush()
    return file


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object of this format. Raises ValueError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version = found["format"]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} was not written by this harness") from None
    if version != FORMAT:
        raise ValueError(f"{path} is of format {version}, this version writes format {FORMAT}")
    return found


def _write_whole(path: Path, content: dict[str, Any]) -> None:
    scratch = path.with_suffix(".tmp")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
