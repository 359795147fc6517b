"""Builds what the attacks name: good folders with the library itself, and the hostile ones."""

from __future__ import annotations

import json
from pathlib import Path

from attack.attacks import World
from attack.forks import run
from attack.places import write_good, write_hostile_files, write_locked

_SECONDS = 240.0


def build(root: Path) -> World:
    """Everything below `root`.

    Raises:
        RuntimeError: A command fails on good input.
    """
    good = write_good(root)
    good["ROWS"] = root / "rows.jsonl"
    rows = [{"prompt": f"def f{n}(x):\n", "completion": f"    return x + {n}\n"} for n in range(12)]
    good["ROWS"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    good["ANSWERS"] = root / "answers.jsonl"
    answers = [{"prompt": "count", "answer": f"one two three {n} " * 4} for n in range(4)]
    good["ANSWERS"].write_text("".join(json.dumps(row) + "\n" for row in answers))
    good["DATA"], good["OWN_DATA"] = root / "data", root / "own_data"
    good["RESULTS"] = root / "results.jsonl"
    prepare = ("data", "prepare", "--input", good["ROWS"], "--draft-vocab")
    measure = ("bench", "run", "--arms", "hf", "--limit", "1", "--max-new-tokens", "16",
               "--pairs", "1", "--prompt-tokens", "16")  # fmt: skip
    commands = (
        (*prepare, "64", "--output", good["DATA"]),
        (*prepare, "999", "--output", good["OWN_DATA"], "--target", good["MODEL"]),
        (*measure, "--target", good["MODEL"], "--output", good["RESULTS"]),
    )
    for number, words in enumerate(commands):
        folder = root / f"making-{number}"
        folder.mkdir()
        done = run([str(word) for word in words], folder, streams={}, environment={},
                   seconds=_SECONDS)  # fmt: skip
        if done.code != 0:
            raise RuntimeError(f"{words} ends with {done.code}: {done.err[-2000:]}")
    return World(root, good, write_hostile_files(root / "hostile"), write_locked(root / "locked"))
