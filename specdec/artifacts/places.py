"""Where a model or a draft head lies that a user named: the bundled ones, a folder, or the hub.

Opens nothing but folders and imports nothing heavy, so that a wrong name is refused at once. What
is in the files is `model_files`' and `heads`' to judge.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from specdec.errors import ConfigError, SpecdecError

TOY = "demo"
"""Names the bundled model where a model is asked for, and the bundled head where a head is."""

# Of Hugging Face: letters, digits, "-", "_" and ".", with at most one owner before the name.
_HUB_ID = re.compile(
    r"(?!.*(?:--|\.\.))[A-Za-z0-9_][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.-]*)?"
)
_LONGEST_ID = 96
_SHOWN = 200  # characters of a name in a message


@dataclass(frozen=True)
class Kind:
    """What is looked for.

    Attributes:
        what: What it is called in messages, as in "model".
        bundled: Finds the one that comes with the package.
        has_owner: Its hub ids name one; without, they are taken for folders that are missing.
    """

    what: str
    bundled: Callable[[], Path]
    has_owner: bool = False


@dataclass(frozen=True)
class Place:
    """Where something lies.

    Attributes:
        name: A path, or a hub id.
        is_folder: Which of the two.
    """

    name: str
    is_folder: bool


def target_path() -> Path:
    """Folder of the bundled model, in Hugging Face's format.

    Raises:
        SpecdecError: The folder is not there, or has no model in it.
    """
    remedy = "python -m specdec.demo.build_target"
    return _bundled("target", "the bundled demo target is missing: no model", remedy)


def head_path() -> Path:
    """Folder of the bundled EAGLE-3 head, trained for the bundled model.

    Raises:
        SpecdecError: The folder is not there, or has no head in it.
    """
    return _bundled("head", "the bundled draft head is missing: nothing", "make demo-head")


def _bundled(folder: str, missing: str, remedy: str) -> Path:
    path = Path(__file__).parents[1] / "demo" / folder
    if not (path / "config.json").is_file():
        raise SpecdecError(
            f"{missing} in {path}; install specdec again, or train it with `{remedy}`"
        )
    return path


MODEL = Kind("model", target_path)
DRAFT_MODEL = Kind("draft model", target_path)
DRAFT_HEAD = Kind("draft head", head_path, has_owner=True)


def locate(name: str, kind: Kind = MODEL) -> Place:
    """The folder or the hub id that a name means; a folder called "demo" is named "./demo".

    Args:
        name: As the user wrote it.
        kind: What it should name.

    Raises:
        ConfigError: It can name neither, or the folder holds nothing of the kind.
    """
    what = kind.what
    if name == TOY:
        return Place(str(kind.bundled()), True)
    if not name.strip():
        raise ConfigError(f"the {what}'s name is empty; give a folder or a hub id")
    try:
        name.encode()
        path = Path(name).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
        is_whole = is_folder and (path / "config.json").is_file()
    except (OSError, RuntimeError, ValueError) as problem:  # RuntimeError: no such user after ~
        reason = getattr(problem, "strerror", None) or getattr(problem, "reason", None) or problem
        raise ConfigError(f"cannot look for the {what} {shown(name)}: {reason}") from problem
    if is_folder and not is_whole:
        raise ConfigError(f"{shown(name)} holds no {what}: there is no config.json in it")
    if is_folder:
        return Place(str(path), True)
    if exists:
        raise ConfigError(f"{shown(name)} is a file; give the {what}'s folder or a hub id")
    if not is_hub_id(name) or (kind.has_owner and "/" not in name):
        raise ConfigError(f"there is no folder {shown(name)}; give the {what}'s folder or a hub id")
    return Place(name, False)


def is_hub_id(name: str) -> bool:
    """Whether a name can be one on the Hugging Face hub."""
    return len(name) <= _LONGEST_ID and _HUB_ID.fullmatch(name) is not None


def shown(name: str) -> str:
    """A name in a message: quoted, and not a novel."""
    return repr(name if len(name) <= _SHOWN else f"{name[:_SHOWN]}...")
