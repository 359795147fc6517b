"""A run that is killed goes on where it stood."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from specdec.errors import ConfigError, SpecdecError
from specdec_bench import RunOptions, read_results, run
from specdec_bench.results.files import is_unfinished
from specdec_bench.results.reading import read_lines
from specdec_bench.results.records import TimeRecord, UnitRecord

PROMPTS = ["import os\nimport sys\n\ndef main(argv=None):\n", "class Stack:\n    def push(self):\n"]


@pytest.fixture
def tasks(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return str(path)


SCRIPT = """
import sys
from pathlib import Path
from specdec_bench import RunOptions, run
run(RunOptions(tasks=(sys.argv[1],), arms=("hf", "prompt_lookup"), output=Path(sys.argv[2]),
               max_new_tokens=24, pairs=int(sys.argv[3]), resume=sys.argv[4] == "resume"))
"""


@pytest.mark.fault
def test_killed_and_resumed_it_has_the_same_units_and_none_twice(
    tasks: str, tmp_path: Path
) -> None:
    path, root = tmp_path / "run.jsonl", Path(__file__).resolve().parents[2]
    paths = os.pathsep.join(map(str, (root, root / "benchmarks")))
    words = [sys.executable, "-c", SCRIPT, tasks, str(path)]
    environment = {**os.environ, "PYTHONPATH": paths}
    process = subprocess.Popen([*words, "500", "start"], env=environment)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
        content = path.read_bytes() if path.exists() else b""
        if content.count(b'"kind":"time"') >= 12:
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert is_unfinished(path)
    with pytest.raises(SpecdecError, match="truncated"):
        read_results(path)
    before = read_lines(path)
    # As if the kill had come in the middle of a line, and of a repeat.
    kept = path.read_bytes()[: before.whole_bytes].splitlines(keepends=True)[:-2]
    path.write_bytes(b"".join(kept) + b'{"setting":0,"uni')
    left = read_lines(path)
    assert left.torn
    begun = 1 + max(r.pair for r in left.records if isinstance(r, TimeRecord))
    subprocess.run([*words, "1", "resume"], env=environment, check=True)
    found = read_results(path)
    assert found.header == before.records[0]
    units = [r for r in before.records if isinstance(r, UnitRecord)]
    assert list(found.units.values()) == units
    timed = Counter((t.arm, t.unit) for t in found.times)
    assert set(timed.values()) == {begun}, "what was begun is finished, and no repeat is twice"
    assert path.read_bytes().startswith(b"".join(kept)), "what was there stays"
    with pytest.raises(ConfigError, match="finished"):
        run(RunOptions(tasks=(tasks,), arms=("hf", "prompt_lookup"), output=path, resume=True))
