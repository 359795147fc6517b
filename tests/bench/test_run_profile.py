"""The profile of a run counts single requests, and `paired` has the intervals of the summary."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.fake_results import Fake
from specdec.errors import ConfigError, SpecdecError
from specdec_bench.measure.options import RunOptions, check_run_options
from specdec_bench.measure.profile_of_run import write_run_profile
from specdec_bench.paired import ratio
from specdec_bench.results.records import Setting
from specdec_bench.summary.intervals import Ratio, time_ratio


def test_the_first_setting_of_single_requests_is_taken(tmp_path: Path) -> None:
    arms = {n: a for n, a in Fake().arms.items() if not n.startswith("hf")}
    results = Fake(arms=arms, settings=(Setting(batch=4), Setting(dtype="bfloat16"))).results()
    path = tmp_path / "p.json"
    assert write_run_profile(path, results) == "prompt_lookup"
    found = json.loads(path.read_text())
    assert found["measurement_conditions"]["batch"] == 1
    assert found["measurement_conditions"]["dtype"] == "bfloat16"
    assert sum(c["num_requests"] for c in found["per_category"].values()) == 12
    own = [p for (s, _, arm), p in results.passes.items() if s == 1 and arm == "prompt_lookup"]
    counted = sum(times for p in own for times in p.histogram.values())
    assert sum(found["acceptance_length_histogram"].values()) == counted


def test_batches_alone_are_refused(tmp_path: Path) -> None:
    results = Fake(settings=(Setting(batch=4),)).results()
    with pytest.raises(SpecdecError, match="all settings decode prompts together"):
        write_run_profile(tmp_path / "p.json", results)
    assert not (tmp_path / "p.json").exists()
    options = RunOptions(profile=tmp_path / "p.json", batches=(4, 8))
    with pytest.raises(ConfigError, match="add --batches 1"):
        check_run_options(options)
    check_run_options(replace(options, batches=(4, 1)))
    check_run_options(replace(options, batches=()))


def test_paired_ratios_are_those_of_the_summary() -> None:
    above = [[2.0, 2.2], [4.1, 4.0], [3.0, 3.1], [2.5, 2.4], [5.0, 5.2], [1.0, 1.1]]
    below = [[1.0, 1.1], [2.0, 2.1], [1.4, 1.5], [1.3, 1.2], [2.6, 2.5], [0.5, 0.6]]
    found = ratio(above, below)
    assert isinstance(found, Ratio)
    assert found == time_ratio(above, below, range(6), ["x"] * 6)
    assert found.value == pytest.approx(sum(map(sum, above)) / sum(map(sum, below)))
