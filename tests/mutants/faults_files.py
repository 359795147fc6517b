"""Faults in files that others may share, spoil or fill, and in what a benchmark's report shows.

None of them changes a text; they lose a call, mix up lines, or trust a stranger's folder.
"""

from mutants.fault import Fault

_TRACE, _FOLDER = "specdec/generate/trace.py", "specdec/sources/store_folder.py"
_APPEND = "specdec/artifacts/append_file.py"
_TRACE_TESTS, _FOLDER_TESTS = "tests/hf/test_trace.py", "tests/unit/test_store_folder.py"

FILES: tuple[Fault, ...] = (
    Fault(
        "a_failing_trace_warns_in_every_call",
        "files that fail",
        _TRACE,
        "        if name in self._failed:\n            return\n",
        "",
        _TRACE_TESTS,
    ),
    Fault(
        "half_a_line_stays_on_a_full_disk",
        "torn lines",
        _APPEND,
        "            if end == found.st_size:",
        "            if end > found.st_size:",
        _TRACE_TESTS,
    ),
    Fault(
        "cutting_half_a_line_takes_another_writers",
        "torn lines",
        _APPEND,
        "            if end == found.st_size:",
        "            if end >= 0:",
        _TRACE_TESTS,
    ),
    Fault(
        "two_processes_write_one_file",
        "locks that let in",
        _APPEND,
        "        if not is_ours:\n            raise BusyError(path)\n",
        "",
        "tests/bench/test_record_files.py::test_two_writers_are_one_too_many",
    ),
    Fault(
        "an_odd_name_of_a_trace_ends_the_call",
        "files that fail",
        _TRACE,
        "except (OSError, ValueError, RuntimeError) as failure:  # also from odd names",
        "except OSError as failure:",
        _TRACE_TESTS,
    ),
    Fault(
        "the_stores_own_folder_is_not_checked",
        "a stranger's folder is trusted",
        _FOLDER,
        "for place in (folder, folder / space, folder / space / fingerprint):",
        "_make(folder)\n    for place in (folder / space, folder / space / fingerprint):",
        _FOLDER_TESTS,
    ),
    Fault(
        "a_link_is_taken_for_the_folder_it_leads_to",
        "a stranger's folder is trusted",
        _FOLDER,
        "found = folder.lstat()",
        "found = folder.stat()",
        _FOLDER_TESTS,
    ),
    Fault(
        "folders_are_checked_when_the_store_is_opened_only",
        "a stranger's folder is trusted",
        "specdec/sources/suffix_store.py",
        "        folder = open_folder(self._place, self._space, self._fingerprint)\n"
        "        if self._opened is None:\n",
        "        if self._opened is None:\n"
        "            folder = open_folder(self._place, self._space, self._fingerprint)\n",
        _FOLDER_TESTS,
    ),
    Fault(
        "anybody_may_swap_the_folder_above",
        "a stranger's folder is trusted",
        _FOLDER,
        "for place in (resolved, *resolved.parents):",
        "for place in (resolved,):",
        _FOLDER_TESTS,
    ),
    Fault(
        "plain_generate_is_measured_on_demand_only",
        "benchmarks",
        "benchmarks/specdec_bench/measure/runner.py",
        "if PLAIN not in {spec.method for spec in wanted} | self.extra_arms.keys():",
        "if not wanted:",
        "tests/bench/test_runner.py::test_plain_generate_is_always_there",
    ),
    Fault(
        "names_end_after_their_first_lines",
        "benchmarks",
        "benchmarks/specdec_bench/report/svg.py",
        "len(lines) < _MOST_LINES - 1",
        "len(lines) < 1",
        "tests/bench/test_report_names.py",
    ),
)
