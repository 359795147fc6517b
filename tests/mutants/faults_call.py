"""Faults around a `generate` call: the seam, padding, results, streaming, fallbacks."""

from mutants.fault import Fault

_AUGMENT, _CALL = "specdec/api.py", "specdec/generate/call.py"
_FALLBACK, _OUTPUTS = "specdec/generate/fallback.py", "specdec/generate/outputs.py"
_COMPAT, _REGISTRY = "specdec/hf/compat.py", "specdec/registry.py"
_GENERATE = "specdec/generate/decode.py"

_PADDED = "tests/hf/test_processors.py::test_left_padded_batches"
_VALUES = "tests/hf/test_outputs.py::test_everything"
_STREAMS = "tests/hf/test_stopping.py -k 'streamer'"
_SEAM = "tests/hf/test_seam.py -k 'augment or restore'"

CALL: tuple[Fault, ...] = (
    # The seam.
    Fault(
        "the_class_is_patched",
        "patches and state that outlive a call",
        _AUGMENT,
        "    model.generate = MethodType(generate, model)  # type: ignore[attr-defined]\n"
        "    return model",
        "    type(model).generate = generate  # type: ignore[attr-defined]\n    return model",
        _SEAM,
    ),
    Fault(
        "restore_leaves_the_wrapper",
        "patches and state that outlive a call",
        _AUGMENT,
        'delattr(model, "generate")',
        "model.generate = type(model).generate.__get__(model)",
        _SEAM,
    ),
    Fault(
        "a_drafter_serves_the_next_call_too",
        "patches and state that outlive a call",
        _REGISTRY,
        "return self.load(name)(self.configure(name, options))",
        "made = self.load(name)(self.configure(name, options))\n"
        '        return self.__dict__.setdefault("made", {}).setdefault(name, made)',
        "tests/hf/test_processors.py::test_prefix_dependent_processors",
    ),
    Fault(
        "settings_of_a_call_stay",
        "patches and state that outlive a call",
        _AUGMENT,
        "    settings = _call_settings(specdec, defaults)\n",
        "    settings = handle.settings = _call_settings(specdec, defaults)\n",
        "tests/hf/test_seam.py -k 'per_call'",
    ),
    Fault(
        "statistics_of_a_failed_call_are_lost",
        "state after an exception",
        _AUGMENT,
        "    try:\n        return plain(self, **kwargs)\n    finally:\n",
        "    result = plain(self, **kwargs)\n    try:\n        return result\n    finally:\n",
        "tests/hf/test_interruptions.py::test_statistics_of_an_interrupted_call",
    ),
    # Padding and limits.
    Fault(
        "padding_is_taken_for_text",
        "left padding",
        "specdec/targets/prompts.py",
        "return [row.nonzero()[:, 0].cpu() for row in self.mask]",
        "return [torch.arange(self.total)] * self.batch",
        _PADDED,
    ),
    Fault(
        "ended_rows_are_padded_with_zero",
        "left padding",
        "specdec/generate/result.py",
        "lengths, pad = state.prompt_lengths, call.ends.pad_id or 0",
        "lengths, pad = state.prompt_lengths, 0",
        _PADDED,
    ),
    Fault(
        "padding_behind_ended_rows_is_not_cached",
        "left padding",
        "specdec/generate/result.py",
        "while any(missing):",
        "while all(missing):",
        "tests/hf/test_caches.py::test_padding_that_the_next_turn_does_not_hide",
    ),
    Fault(
        "a_length_criterion_of_the_users_is_ignored",
        "budget overshoot",
        _CALL,
        "longest = min((n for n in limits if n is not None), default=config.max_length)",
        "longest = config.max_length",
        "tests/hf/test_stopping.py::test_a_users_length_criterion_replaces_the_option",
    ),
    # Processors.
    Fault(
        "a_processor_that_looks_back_is_taken_for_stateless",
        "stateful processors",
        _COMPAT,
        '    "LogitNormalization",\n',
        '    "LogitNormalization",\n    "ForcedEOSTokenLogitsProcessor",\n',
        "tests/hf/test_processors.py::test_prefix_dependent_processors",
    ),
    Fault(
        "an_unknown_processor_is_called_row_by_row",
        "fallback missing",
        _COMPAT,
        "return [_name(p) for p in processors if type(p) not in known]",
        "return []",
        "tests/hf/test_fallthrough.py -k 'unknown_processor or prefix_allowed'",
    ),
    Fault(
        "all_rows_ignore_the_first_rows_padding",
        "sampling options ignored",
        _COMPAT,
        "ignored[row : row + 1]",
        "ignored[:1]",
        "tests/hf/test_processor_edges.py::test_padding_is_not_a_repetition",
    ),
    # Calls that must run plain.
    Fault(
        "right_padding_is_not_noticed",
        "fallback missing",
        _FALLBACK,
        "bool((prompt.mask[:, -1] == 0).any())",
        "bool((prompt.mask[:, -1] == 0).all())",
        "tests/hf/test_fallthrough.py -k 'right_padded or fell_through'",
    ),
    Fault(
        "the_fallback_is_silent",
        "fallback missing",
        _FALLBACK,
        "        FallbackWarning,\n",
        "        UserWarning,\n",
        "tests/hf/test_fallthrough.py -k 'right_padded'",
    ),
    Fault(
        "positions_of_the_users_own_are_ignored",
        "tree positions",
        "specdec/targets/prompts.py",
        "return bool((positions == wanted).all())",
        "return bool((positions >= wanted).all())",
        "tests/hf/test_own_inputs.py -k positions",
    ),
    Fault(
        "holes_in_a_mask_are_not_noticed",
        "fallback missing",
        _FALLBACK,
        "return bool((mask[:, 1:] < mask[:, :-1]).any())",
        "return bool((mask[:, 1:] < mask[:, :-1]).all())",
        "tests/hf/test_fallthrough.py -k 'holes'",
    ),
    # What a call gives back.
    Fault(
        "scores_of_the_node_with_the_steps_number",
        "scores of the wrong row",
        _OUTPUTS,
        "for node in [0, *result.host.paths[row]][: len(tokens)]:",
        "for node in range(len(tokens)):",
        _VALUES,
    ),
    Fault(
        "logits_of_the_first_row",
        "scores of the wrong row",
        _OUTPUTS,
        "_copied_float(result.output.logits[row, node])",
        "_copied_float(result.output.logits[0, node])",
        _VALUES,
    ),
    Fault(
        "hidden_states_of_the_parent",
        "scores of the wrong row",
        _OUTPUTS,
        "tuple(layer[row, node].clone() for layer in hidden)",
        "tuple(layer[row, max(node - 1, 0)].clone() for layer in hidden)",
        _VALUES,
    ),
    Fault(
        "recorded_scores_keep_their_round_alive",
        "memory grows with the text",
        _OUTPUTS,
        "result.picks.scores(row, node).clone()",
        "result.picks.scores(row, node)",
        "tests/hf/test_outputs.py::test_recorder_does_not_keep_whole_trees_alive",
    ),
    Fault(
        "the_streamer_runs_ahead_of_slow_rows",
        "streamed text differs",
        _OUTPUTS,
        "ready = min(unfinished) if unfinished else max(map(state.emitted, rows))",
        "ready = max(map(state.emitted, rows))",
        _STREAMS,
    ),
    Fault(
        "the_streamer_is_given_the_last_step_twice",
        "streamed text differs",
        _OUTPUTS,
        "self._step = ready",
        "self._step = max(ready - 1, 0)",
        _STREAMS,
    ),
    Fault(
        "the_streamer_is_not_told_of_the_end",
        "streamed text differs",
        _GENERATE,
        "self.streamer.end()",
        "self.streamer.end",
        _STREAMS,
    ),
)
