"""Faults that random calls of `generate` found: odd layouts, exceptions, odd requests."""

from mutants.fault import Fault

_FALLBACK, _PICKERS = "specdec/generate/fallback.py", "specdec/round/pickers.py"
_LAYOUTS = "tests/hf/test_odd_layouts.py"
_RAISES = "tests/hf/test_interruptions.py::test_a_call_that_ends_in_the_middle"

FUZZ: tuple[Fault, ...] = (
    Fault(
        "a_cache_of_other_rows_is_adopted",
        "fallback missing",
        _FALLBACK,
        "if cached is not None and cached != prompt.batch:",
        "if cached is not None and cached > prompt.batch:",
        f"{_LAYOUTS} -k 'other_rows'",
    ),
    Fault(
        "a_dropped_mask_is_not_measured",
        "fallback missing",
        _FALLBACK,
        "if prompt.total not in (prompt.given, prompt.past + prompt.given):",
        "if prompt.mask is not None and "
        "prompt.total not in (prompt.given, prompt.past + prompt.given):",
        f"{_LAYOUTS} -k 'mask_of_ones'",
    ),
    Fault(
        "chains_are_asked_before_the_layout",
        "fallback missing",
        _FALLBACK,
        "    reason = _why_layout(call)  # what the checks after it read rows and slots from\n",
        "    reason = None if found.mode == 'chain' else _why_layout(call)\n",
        f"{_LAYOUTS} -k 'without_a_token'",
    ),
    Fault(
        "an_empty_batch_is_decoded",
        "fallback missing",
        _FALLBACK,
        "if not prompt.batch:",
        "if prompt.batch is None:",
        f"{_LAYOUTS} -k 'without_rows'",
    ),
    Fault(
        "an_odd_chunk_size_is_taken_for_none",
        "fallback missing",
        _FALLBACK,
        "isinstance(chunk, int) and chunk > 0",
        "isinstance(chunk, int) and chunk >= 0",
        f"{_LAYOUTS} -k 'odd_chunks'",
    ),
    Fault(
        "half_a_token_is_rounded_down",
        "budget overshoot",
        "specdec/hf/compat.py",
        "limit: float = criterion.max_length",
        "limit: float = int(criterion.max_length)",
        f"{_LAYOUTS} -k 'half_a_token'",
    ),
    Fault(
        "streams_are_taken_for_rows",
        "scores of the wrong row",
        _FALLBACK,
        "if call.wanted.hidden_states and streams > 1:",
        "if call.wanted.hidden_states and streams < 1:",
        f"{_LAYOUTS} -k 'streams'",
    ),
    Fault(
        "empty_stop_strings_are_dropped",
        "other errors than plain's",
        "specdec/api.py",
        "if strings is None or tokenizer is None:",
        "if not strings or tokenizer is None:",
        f"{_LAYOUTS} -k 'stop_strings'",
    ),
    Fault(
        "a_failed_walk_gives_its_noise_back",
        "state after an exception",
        _PICKERS,
        "self._noise.finish(max(steps, self._chosen))",
        "self._noise.finish(steps)",
        f"{_RAISES} -k 'processor and sampled'",
    ),
    Fault(
        "the_first_token_of_a_failed_call_is_undrawn",
        "state after an exception",
        _PICKERS,
        "self._chosen = max(self._chosen, *steps, 0)",
        "self._chosen = 0",
        f"{_RAISES} -k 'criterion and sampled'",
    ),
    Fault(
        "a_static_cache_of_another_shape_is_taken",
        "other errors than plain's",
        "specdec/caches/user_cache.py",
        "if given is not None and given != own:",
        "if given is not None and given == own == ():",
        "tests/hf/test_static_cache.py -k 'another_model'",
    ),
)
