"""Faults in what the command line does with bad input: unbounded reads, silent nonsense."""

from mutants.fault import Fault

_FILES, _MODEL = "specdec/artifacts/input_files.py", "specdec/artifacts/model_files.py"
_CHECKS, _PLACES, _HUB = (
    "specdec/cli/option_checks.py",
    "specdec/artifacts/places.py",
    "specdec/artifacts/hub.py",
)
_GENERATE, _REGISTRY = "specdec/cli/generate.py", "specdec/registry.py"

_BAD = "tests/cli/test_bad_input.py"
_WEIGHTS = "specdec/audit/broken_weights.py"

CLI = (
    Fault(
        "a_device_is_as_large_as_it_says",
        "an unbounded read",
        _FILES,
        "if max(len(content), found.st_size) > most:",
        "if found.st_size > most:",
        f"{_BAD}::test_files_are_read_up_to_a_bound",
    ),
    Fault(
        "a_pipe_without_a_writer_is_waited_for",
        "an unbounded read",
        _FILES,
        'os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)',
        "os.O_RDONLY",
        f"{_BAD}::test_what_is_no_text",
        endless=True,
    ),
    Fault(
        "weights_that_are_missing_are_made_up",
        "nonsense instead of an error",
        _MODEL,
        'missing = sorted(found["missing_keys"])',
        "missing = []",
        f"{_BAD} -k 'weights_that_are_missing'",
    ),
    Fault(
        "infinite_weights_are_taken_for_large_ones",
        "nonsense instead of an error",
        _WEIGHTS,
        "ends.sum() + (ends * 0).sum()",
        "ends.nan_to_num(posinf=1e30, neginf=-1e30).sum()",
        f"{_BAD} -k 'not_finite_are_named'",
    ),
    Fault(
        "sums_that_overflow_are_taken_for_infinite_weights",
        "an error that is none",
        _WEIGHTS,
        "ends = torch.stack(tensor.detach().aminmax()).double()",
        "ends = torch.stack(tensor.detach().aminmax()) * 2",
        "tests/unit/test_broken_weights.py::test_large_and_odd_weights_are_no_broken_ones",
    ),
    Fault(
        "sizes_are_only_bounded_from_below",
        "an allocation by what a file says",
        _MODEL,
        "if not whole or not least <= value <= most:",
        "if not whole or value < least:",
        f"{_BAD}::test_every_command_refuses_such_a_configuration -k 'inspect or prepare'",
        endless=True,
    ),
    Fault(
        "methods_are_looked_up_late",
        "a late error",
        _CHECKS,
        'elif isinstance(value, str) and name == "method":',
        'elif isinstance(value, str) and name == "methods":',
        f"{_BAD}::test_wrong_arguments_are_answered_without_torch -k 'nope'",
    ),
    Fault(
        "the_hub_is_asked_again_and_again",
        "retries that nobody asked for",
        _HUB,
        "yield silence is not None",
        "yield False",
        f"{_BAD} -k 'the_cache_holds'",
    ),
    Fault(
        "demo_is_the_model_where_a_head_is_named",
        "a name that means something else",
        _PLACES,
        'DRAFT_HEAD = Kind("draft head", head_path, has_owner=True)',
        'DRAFT_HEAD = Kind("draft head", target_path, has_owner=True)',
        f"{_BAD}::test_demo_is_the_bundled_model_or_head",
    ),
    Fault(
        "the_newest_turn_is_forgotten",
        "the wrong end of a chat",
        _GENERATE,
        "min(first + 2, len(messages) - 1)",
        "first + 2",
        "tests/cli/test_chat.py::test_the_newest_turn_is_never_forgotten",
    ),
    Fault(
        "the_system_turn_is_forgotten",
        "the wrong end of a chat",
        _GENERATE,
        'first = int(messages[0]["role"] == "system")',
        "first = 0",
        "tests/cli/test_chat.py::test_the_oldest_turns_are_forgotten",
    ),
    Fault(
        "any_text_names_a_method",
        "a name that is none",
        _REGISTRY,
        "if not isinstance(name, str) or not name.isidentifier():",
        "if not isinstance(name, str):",
        f"{_BAD}::test_methods_are_named_by_identifiers",
    ),
)
