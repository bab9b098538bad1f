"""Hub refs: from the local cache without a network, and fetched only when asked for."""

from __future__ import annotations

import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(structure, tmp_path: Path) -> Path:
    """A hub cache that holds org/tiny at one commit, files as links to blobs."""
    repo = tmp_path / "cache" / "models--org--tiny"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(structure("llama").iterdir())):
        shutil.copyfile(file, repo / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    return repo.parent


def surgery(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command line in a process of its own: the hub client reads its settings at import."""
    return subprocess.run(
        [sys.executable, "-m", "surgery", *words],
        env={"PYTHONPATH": str(REPO), "PATH": "", "HF_HUB_DISABLE_TELEMETRY": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_cached_model_is_opened_without_a_network_and_its_commit_recorded(
    cache: Path, tmp_path: Path
) -> None:
    for ref in ("org/tiny", "org/tiny@main", f"org/tiny@{COMMIT}"):
        out = tmp_path / ref.replace("/", "-")
        done = surgery(
            *("stack", ref, "--factor", "2", "-o", str(out)),
            HF_HUB_CACHE=str(cache),
            HF_HUB_OFFLINE="1",
        )
        assert done.returncode == 0, done.stderr
        record = json.loads((out / "surgery.json").read_text())
        assert record["inputs"][0]["ref"] == ref
        assert record["inputs"][0]["revision"] == COMMIT


def test_an_existing_path_wins_over_a_ref(structure, tmp_path, monkeypatch) -> None:
    from surgery.checkpoint import open_checkpoint

    shutil.copytree(structure("llama"), tmp_path / "org" / "tiny@main")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("org/tiny@main").revision is None


@pytest.mark.parametrize(
    ("words", "offline", "told"),
    [
        (["org/absent"], "0", "fetch it with --allow-download"),
        (["org/absent", "--allow-download"], "1", "could not be fetched from the hub"),
        (["org/tiny@absent"], "0", "the hub's local cache does not hold it"),
    ],
)
def test_what_the_cache_does_not_hold_is_told_in_one_sentence(
    cache: Path, words: list[str], offline: str, told: str
) -> None:
    done = surgery("inspect", *words, HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE=offline)
    assert done.returncode == 1
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


class StandIn(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download asks for."""

    folder: Path

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        files = sorted(self.folder.iterdir())
        if path.startswith(f"/api/models/org/tiny/tree/{COMMIT}"):
            tree = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": f"{i:040x}"}
                for i, p in enumerate(files)
            ]
            data = json.dumps(tree).encode()
        elif path.startswith("/api/models/org/tiny"):
            siblings = [{"rfilename": p.name} for p in files]
            data = json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode()
        elif path.startswith("/org/tiny/resolve/"):
            data = (self.folder / path.rsplit("/", 1)[1]).read_bytes()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{abs(hash(path)):040x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


@pytest.fixture
def hub(structure) -> Iterator[str]:
    """The address of a stand-in for the hub on this machine."""
    handler = type("Handler", (StandIn,), {"folder": structure("llama")})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join(5)


def test_a_model_is_fetched_only_when_allowed(hub: str, tmp_path: Path) -> None:
    settings = {"HF_ENDPOINT": hub, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    assert surgery("inspect", "org/tiny", **settings).returncode == 1
    assert not list(tmp_path.rglob("*.safetensors"))
    done = surgery("inspect", "org/tiny", "--allow-download", **settings)
    assert done.returncode == 0, done.stderr
    assert surgery("inspect", "org/tiny", **{**settings, "HF_HUB_OFFLINE": "1"}).returncode == 0
