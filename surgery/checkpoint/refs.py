"""Turn what a user typed into a local path: a path, or `org/name[@revision]` on the hub."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import CheckpointError

HUB_REF = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?", re.ASCII)
WEIGHT_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*"]
PICKLE_PATTERNS = ["*.bin", "*.pt", "*.pth"]


@dataclass(frozen=True, slots=True)
class Resolved:
    """A local path and, for a hub ref, the commit it was resolved to."""

    path: Path
    revision: str | None = None


def resolve(ref: str | Path, *, allow_download: bool = False, pickles: bool = False) -> Resolved:
    """Resolve a ref to a local file or directory.

    An existing path always wins. `org/name` and `org/name@rev` are looked up in the hub's local
    cache, and fetched only with `allow_download` (and never under HF_HUB_OFFLINE=1); of a
    model that has pickled weights too, those only with `pickles`.

    Raises:
        CheckpointError: no such path, or the hub ref is not in the cache and may not be fetched.
    """
    path = Path(ref).expanduser()
    if os.path.lexists(path):
        return Resolved(path)
    text = str(ref)
    if text.startswith((".", "/", "~")) or not HUB_REF.fullmatch(text):
        raise CheckpointError(text, "does not exist", "name a .safetensors file or a directory")
    patterns = WEIGHT_PATTERNS + PICKLE_PATTERNS * pickles
    return _from_hub(text, patterns, allow_download=allow_download)


def split_ref(ref: str | Path) -> tuple[str, ...]:
    """Split `BASE+ADAPTER+...` into its refs; an existing path is one ref, whatever its name.

    Where a path holds a plus sign itself, the longest one that exists is taken.
    """
    words = str(ref).split("+")
    found, at = [], 0
    while at < len(words):
        ends = range(len(words), at, -1)
        end = next((e for e in ends if _exists("+".join(words[at:e]))), at + 1)
        found.append("+".join(words[at:end]))
        at = end
    return tuple(found)


def pinned(ref: str, revision: str | None) -> str:
    """Return a ref with the commits it was resolved to, as `Checkpoint.revision` tells them."""
    if not revision:
        return ref
    refs = split_ref(ref)
    commits = revision.split("+")
    pairs = zip(refs, commits, strict=True) if len(refs) == len(commits) else ((ref, revision),)
    return "+".join(f"{r.partition('@')[0]}@{c}" if c else r for r, c in pairs)


def _exists(path: str) -> bool:
    return bool(path) and os.path.lexists(Path(path).expanduser())


def _from_hub(ref: str, patterns: list[str], *, allow_download: bool) -> Resolved:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, _, revision = ref.partition("@")
    try:
        found = snapshot_download(
            name,
            revision=revision or None,
            local_files_only=not allow_download,
            allow_patterns=patterns,
        )
    except LocalEntryNotFoundError as error:
        fact = "is no local path, and the hub's local cache does not hold it"
        remedy = "check the path, or fetch it with --allow-download"
        if allow_download:
            fact, remedy = "could not be fetched from the hub", "check the network, or log in"
        raise CheckpointError(ref, fact, remedy) from error
    except Exception as error:  # the hub client raises requests', httpx' and its own errors
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(ref, f"could not be fetched from the hub ({first})") from error
    return Resolved(Path(found), Path(found).name)
