"""Planted faults of the benchmark harness: figures that flatter, checks that let pass."""

from mutants.fault import Fault

_BENCH, _TESTS = "benchmarks/specdec_bench", "tests/bench"

BENCH = (
    Fault(
        "a_wrong_text_keeps_the_speed_ups",
        "a figure is printed beside a wrong text",
        f"{_BENCH}/summary/summarize.py",
        "if self._why_none(slower, faster) or (self._wrong_texts and not is_noise):",
        "if self._why_none(slower, faster):",
        f"{_TESTS}/test_summary.py::test_wrong_text_shows_no_speedup_anywhere",
    ),
    Fault(
        "what_is_no_number_is_no_wrong_text",
        "a check that NaN passes",
        f"{_BENCH}/checks/teacher_forced.py",
        "return ~(self.regrets <= NOISE_FACTOR * self.noise)",
        "return self.regrets > NOISE_FACTOR * self.noise",
        f"{_TESTS}/test_text_check.py::test_scores_that_are_no_numbers_are_wrong",
    ),
    Fault(
        "the_gate_wants_the_lower_end",
        "a gate that fails on noise",
        f"{_BENCH}/gate/judge.py",
        "if speed.high < limit",
        "if speed.low < limit",
        f"{_TESTS}/test_gate.py",
    ),
    Fault(
        "the_gate_does_not_look_at_acceptance",
        "a check that cannot fail",
        f"{_BENCH}/gate/judge.py",
        "if tau is not None and tau.high < 1 - _TAU_TOLERANCE:",
        "if tau is not None and tau.high < 0:",
        f"{_TESTS}/test_gate.py::test_a_drop_of_acceptance_fails",
    ),
    Fault(
        "a_store_holds_the_answer",
        "answers leak into their own drafts",
        f"{_BENCH}/measure/arms.py",
        "            if bench.folds[other.index] == bench.folds[first.index]:\n"
        "                continue\n",
        "",
        f"{_TESTS}/test_units.py::test_a_store_never_holds_texts_of_the_units_own_cluster",
    ),
    Fault(
        "a_cut_off_file_is_a_result",
        "half a file is read as a whole one",
        f"{_BENCH}/results/reading.py",
        "    if not isinstance(end, EndRecord):\n",
        "    if not found.records:\n",
        f"{_TESTS}/test_record_files.py::test_without_its_last_lines_a_file_is_refused",
    ),
    Fault(
        "looping_text_counts",
        "repetition makes every method look good",
        f"{_BENCH}/measure/units.py",
        "cut = loop_start(text) or end",
        "cut = end",
        f"{_TESTS}/test_units.py::test_a_text_counts_up_to_its_end_its_loop_or_the_limit",
    ),
    Fault(
        "marginal_rates_forget_the_bonus",
        "tau and acceptance rates disagree",
        f"{_BENCH}/summary/acceptance.py",
        "return tuple(count / self.rounds for count in self._survivors()[1:])",
        "return tuple(count / self.rounds for count in self._survivors()[:-1])",
        f"{_TESTS}/test_acceptance.py::test_the_identity_holds_for_any_histogram",
    ),
    Fault(
        "a_budget_is_told_nothing",
        "a controller that cannot learn",
        "specdec/loop.py",
        "            call.budget.observe(record)\n",
        "",
        "tests/unit/test_cost.py::test_a_budget_learns_once_a_round_and_changes_the_speed_alone",
    ),
)
