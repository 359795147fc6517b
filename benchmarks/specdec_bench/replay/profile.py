"""What a replay accepted, as `speculation_profile.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specdec.artifacts.atomic_files import make_folder
from specdec.errors import ConfigError
from specdec_bench.replay.methods import ReplayMethod, config_of
from specdec_bench.replay.replay import Replayed, by_category
from specdec_bench.summary.acceptance import Acceptance
from specdec_bench.summary.speculation_profile import (
    Measured,
    build_profile,
    draft_length,
    write_profile,
)


def write_replay_profile(
    path: Path,
    method: ReplayMethod,
    files: Sequence[Mapping[str, Sequence[Replayed]]],
    conditions: Mapping[str, Any],
) -> None:
    """Writes the profile of one method over all files.

    Args:
        path: Where to.
        method: Whose.
        files: Method -> what it did with each answer, file by file.
        conditions: What is needed to read the figures.

    Raises:
        SpecdecError: No answer has a round, or the file cannot be written.
    """
    replayed = [one for found in files for one in found[method.name]]
    whole = Acceptance.of_requests([one.counts for one in replayed])
    measured = Measured(
        method=method.method,
        num_speculative_tokens=max(draft_length(config_of(method)), whole.positions, 1),
        by_category={
            name: Acceptance.of_requests([one.counts for one in found])
            for name, found in by_category(replayed).items()
            if any(any(one.counts.histogram.values()) for one in found)
        },
        conditions={**conditions, "replayed": True},
    )
    try:
        make_folder(path.expanduser().absolute().parent)
    except OSError as problem:
        raise ConfigError(f"cannot write {path}: {problem.strerror or problem}") from problem
    write_profile(path.expanduser(), build_profile(whole, measured))
