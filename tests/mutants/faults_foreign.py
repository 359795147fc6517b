"""Draft heads of other programs: what was copied, what was assumed, what must not be replaced."""

from mutants.fault import Fault

_DIALECTS, _ROPE = "specdec/heads/checkpoints/read_dialects.py", "specdec/heads/checkpoints/rope.py"
_SIZES, _SAVING = "specdec/heads/checkpoints/tensor_sizes.py", "specdec/heads/checkpoints/save.py"
_PROMISE, _READY = "specdec/heads/promise.py", "specdec/heads/ready.py"
_FIELDS, _SAID = "tests/heads/test_foreign_fields.py", "tests/heads/test_head_warnings.py"
_PLACES = "tests/heads/test_convert_places.py"

FOREIGN = (
    Fault(
        "a_window_of_the_target_becomes_the_heads",
        "fields of another model",
        _DIALECTS,
        'elif parsed.dialect != "nemo" and types == ["sliding_attention"]:',
        'elif types and types[0] == "sliding_attention":',
        f"{_FIELDS}::test_what_was_copied_means_nothing",
    ),
    Fault(
        "the_first_type_of_layer_gives_the_rotary_base",
        "fields of another model",
        _ROPE,
        "kind = _FULL if _FULL in types else next(iter(types))",
        "kind = next(iter(types))",
        f"{_FIELDS}::test_what_the_tensors_contradict_is_said",
    ),
    Fault(
        "sizes_of_the_target_win_over_the_tensors",
        "fields of another model",
        _SIZES,
        "if shown is None or shown == said:",
        "if shown is None or shown != 0:",
        f"{_FIELDS}::test_nemos_files_load_for_every_target",
    ),
    Fault(
        "the_stated_width_of_a_head_always_wins",
        "fields of another model",
        _SIZES,
        "key=votes.count, reverse=True)",
        "key=votes.index)",
        f"{_FIELDS}::test_what_the_tensors_contradict_is_said -k width",
    ),
    Fault(
        "a_flag_that_is_set_is_read_after_the_files",
        "a user's word comes too late",
        _DIALECTS,
        "found = {name: value for name, value in fields.items() if name not in replaced}",
        "found = dict(fields)",
        f"{_FIELDS}::test_what_a_user_says_is_read_first",
    ),
    Fault(
        "norm_output_means_the_norm_before_lm_head",
        "one word, two meanings",
        _DIALECTS,
        '"feed_post_norm",\n            True,',
        '"feed_post_norm",\n            False,',
        f"{_FIELDS}::test_norm_output_means_what_engines_mean",
    ),
    Fault(
        "assumptions_are_kept_to_ourselves",
        "silent loss of speed",
        _READY,
        "    if assumed:",
        "    if not assumed:",
        f"{_SAID}::test_augment_says_what_it_assumed",
    ),
    Fault(
        "only_first_tokens_are_held_to_the_promise",
        "silent loss of speed",
        _PROMISE,
        "found[:, 1:].sum(1)",
        "found[:, 1:1].sum(1)",
        f"{_SAID}::test_a_head_that_is_run_wrong_is_found_out -k greedy",
    ),
    Fault(
        "what_was_drawn_stands_for_what_is_best",
        "false alarm",
        _PROMISE,
        "best = logits.gather(1, index).argmax(-1).to(nodes.device)",
        "best = verdict.tokens[: len(rows), :width]",
        f"{_SAID}::test_a_good_head_keeps_its_promise -k hot",
    ),
    Fault(
        "numbers_that_are_none_are_loaded",
        "damaged files",
        "specdec/heads/checkpoints/load.py",
        "    check_numbers(read)\n",
        "    check_numbers({})\n",
        f"{_FIELDS}::test_numbers_that_are_none_are_refused",
    ),
    Fault(
        "convert_replaces_what_is_there",
        "files are lost",
        _SAVING,
        "if taken and not overwrite:",
        "if taken and overwrite is None:",
        f"{_PLACES}::test_convert_replaces_a_head_only_when_it_is_told_to",
    ),
    Fault(
        "a_link_to_the_source_is_another_place",
        "files are lost",
        _SAVING,
        "real = place.resolve()",
        "real = place",
        f"{_PLACES}::test_convert_never_writes_onto_its_source",
    ),
)
