"""One file from a URL into a cache: resumed where it broke off, checked by its sha256, put in place in one step."""

import fcntl
import hashlib
import http.client
import logging
import shutil
import urllib.error
import urllib.request
from pathlib import Path

CHUNK = 1 << 20  # bytes
NOTHING_LEFT = 416  # HTTP: the range asked for begins at or after the file's end

log = logging.getLogger(__name__)


def fetch(url: str, path: Path, sha256: str, alternative: str = "", timeout: float = 30.0) -> Path:
    """Make `path` the file at `url`, and return it. If it is there already, nothing is downloaded.

    What has come is kept in `path` + ".part": a later request, in this call or the next, asks for the rest (HTTP
    Range). A lock (`path` + ".lock", left behind) lets one process at a time download; the others wait for its file.

    Args:
        sha256: what the file must have, in hexadecimal.
        alternative: what a user can do who cannot download and will not put the file at `path` by hand.
        timeout: seconds of silence after which a server counts as gone.

    Raises ValueError, one line, if the file cannot be had, or if it or one already there has another sha256.
    """
    if _is_there(path, sha256):
        return path
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f"{path.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_there(path, sha256):  # another process may have put it there while this one waited
                log.info("downloading %s to %s", url, path)
                _download(url, part, timeout)
                if (found := _sha256(part)) != sha256:
                    part.unlink()
                    raise ValueError(f"{url} has sha256 {found}, expected {sha256}: it was not kept")
                part.replace(path)
    except (OSError, http.client.HTTPException) as error:
        by_hand = f"put the file there by hand{alternative and ', or ' + alternative}"
        raise ValueError(f"cannot download {url} to {path}: {_reason(error)}; {by_hand}") from error
    return path


def _is_there(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    if (found := _sha256(path)) != sha256:
        raise ValueError(f"{path} has sha256 {found}, expected {sha256}: remove it, or put the right file there")
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(url: str, part: Path, timeout: float) -> None:
    """Fill `part`, with further requests for as long as each brings something."""
    while True:
        before = _size(part)
        try:
            return _request(url, part, timeout)
        except urllib.error.URLError:  # not found, refused: no use asking again
            raise
        except (OSError, http.client.HTTPException):  # it broke off
            if _size(part) <= before:
                raise


def _request(url: str, part: Path, timeout: float) -> None:
    start = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == NOTHING_LEFT and start:
            return
        raise
    with response:
        resumed = response.status == http.client.PARTIAL_CONTENT
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            part.unlink()
            raise ConnectionError(f"asked for the rest from byte {start}, got another part")
        with part.open("ab" if resumed else "wb") as file:  # a server without Range sends all of it again
            total = file.tell() + int(response.headers.get("Content-Length", 0))
            shutil.copyfileobj(response, file, CHUNK)
            if file.tell() < total:
                raise ConnectionError(f"it broke off after {file.tell()} of {total} bytes, the next try goes on there")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return str(error) or type(error).__name__
