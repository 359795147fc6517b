"""Faults in the kernels that are not attention, and in TTT attention and the loss on a GPU."""

from mutants.fault import Fault

_KERNELS = "kernels/specdec_kernels"
_FUSED, _REFERENCE = f"{_KERNELS}/fused", f"{_KERNELS}/reference"
_BLOCK = "specdec/heads/eagle3/causal_block.py"

_WALKS = "tests/kernels/test_words_and_walk.py"
_COMMIT = "tests/kernels/test_commit.py"
_ROWS = "tests/kernels/test_rows.py"
_LOSS = "tests/kernels/test_loss.py"
_TTT = "tests/kernels/test_ttt.py"
_TRITON_ROUND = "tests/kernels/interpreted/test_round_kernels.py"
_TRITON_ROWS = "tests/kernels/interpreted/test_row_kernels.py"

KERNEL_ROWS: tuple[Fault, ...] = (
    # Words and depths.
    Fault(
        "bit_63_is_left_out",
        "ancestor words",
        f"{_FUSED}/words.py",
        "(at < first + 64)",
        "(at < first + 63)",
        f"{_TRITON_ROUND}::test_words",
    ),
    Fault(
        "the_second_word_begins_early",
        "ancestor words",
        f"{_FUSED}/words.py",
        "first = word * 64",
        "first = word * 63",
        f"{_TRITON_ROUND}::test_words",
    ),
    Fault(
        "the_last_word_counts_the_depth",
        "ancestor words",
        f"{_FUSED}/words.py",
        "if word == 0:",
        "if word == tl.num_programs(1) - 1:",
        f"{_TRITON_ROUND}::test_words",
    ),
    Fault(
        "the_second_word_repeats_the_first",
        "ancestor words",
        f"{_REFERENCE}/words.py",
        "(bits.view(batch, size, count, WORD) << shift)",
        "(bits.view(batch, size, count, WORD)[:, :, :1] << shift).expand(-1, -1, count, -1)",
        f"{_WALKS}::test_words_are_the_ancestor_mask",
    ),
    # The walk.
    Fault(
        "the_last_twin_is_accepted",
        "equal siblings",
        f"{_FUSED}/walk.py",
        "tl.min(tl.where(carries & (parent == here), node, BLOCK), 0)",
        "tl.max(tl.where(carries & (parent == here), node, -1), 0)",
        f"{_TRITON_ROUND}::test_the_walk_on_500_trees",
    ),
    Fault(
        "the_last_twin_is_accepted_in_torch",
        "equal siblings",
        f"{_REFERENCE}/walk.py",
        "nodes, count).amin(1, keepdim=True)",
        "nodes, -1).amax(1, keepdim=True) % (count + 1)",
        f"{_WALKS}::test_the_walk_is_that_of_the_host_on_10000_trees",
    ),
    Fault(
        "the_walk_goes_deeper_than_there_is_room",
        "walk",
        f"{_FUSED}/walk.py",
        "(depth < max_depth)",
        "(depth <= max_depth)",
        f"{_TRITON_ROUND}::test_the_walk_on_500_trees",
    ),
    Fault(
        "padding_is_accepted_on_the_device",
        "padding",
        f"{_REFERENCE}/walk.py",
        "(nodes < size[:, None])",
        "(nodes < count)",
        f"{_WALKS}::test_the_walk_is_that_of_the_host_on_10000_trees",
    ),
    Fault(
        "a_pick_that_was_not_made_matches",
        "walk",
        f"{_REFERENCE}/walk.py",
        "(wanted >= 0) & ",
        "",
        f"{_WALKS}::test_a_pick_below_zero_matches_no_token",
    ),
    Fault(
        "the_root_emits_nothing",
        "walk",
        f"{_FUSED}/walk.py",
        "mask=path >= 0, other=-1)",
        "mask=path > 0, other=-1)",
        f"{_TRITON_ROUND}::test_the_walk_on_500_trees",
    ),
    # The commit.
    Fault(
        "commit_one_slot_off",
        "commit",
        f"{_FUSED}/commit.py",
        "target = start + depth.to",
        "target = start + (depth - 1).to",
        f"{_TRITON_ROUND}::test_commit",
    ),
    Fault(
        "commit_writes_over_what_it_has_yet_to_read",
        "commit",
        f"{_FUSED}/commit.py",
        "depth = first + 1 + tl.arange(0, SLOTS)",
        "depth = (most - 1) // SLOTS * SLOTS - first + 1 + tl.arange(0, SLOTS)",
        f"{_TRITON_ROUND}::test_commit",
    ),
    Fault(
        "commit_keeps_what_the_stop_rules_cut",
        "commit",
        f"{_FUSED}/commit.py",
        "kept = depth <= length",
        "kept = depth <= most",
        f"{_TRITON_ROUND}::test_commit",
    ),
    Fault(
        "commit_takes_a_slot_s_stride_for_a_head_s",
        "commit",
        f"{_FUSED}/commit.py",
        "head * tl.load(entry + 2)",
        "head * tl.load(entry + 3)",
        f"{_TRITON_ROUND}::test_commit",
    ),
    Fault(
        "commit_moves_a_part_of_wide_heads",
        "commit",
        f"{_FUSED}/commit.py",
        "range(0, dim, UNITS)",
        "range(0, UNITS, UNITS)",
        f"{_TRITON_ROUND}::test_commit",
    ),
    Fault(
        "the_prefix_forgets_the_root",
        "commit",
        f"{_KERNELS}/commit.py",
        "prefix.add_(length + 1)",
        "prefix.add_(length.clamp(min=0))",
        f"{_COMMIT}::test_slots_move_and_prefixes_advance",
    ),
    # Rows of logits.
    Fault(
        "minus_zero_is_less_than_zero",
        "ties",
        f"{_FUSED}/picks.py",
        "tl.where(value == 0, 0.0, value)",
        "tl.where(value == 0, value, value)",
        f"{_TRITON_ROWS}::test_row_argmax",
    ),
    Fault(
        "the_highest_of_equal_tokens",
        "ties",
        f"{_REFERENCE}/picks.py",
        "wide.sort(dim=-1, descending=True, stable=True).indices[:, :count]",
        "wide.shape[1] - 1 - wide.flip(-1).argsort(descending=True, stable=True)[:, :count]",
        f"{_ROWS}::test_expansion_is_a_stable_order_of_log_probabilities",
    ),
    Fault(
        "the_softmax_has_another_temperature",
        "sampled picks",
        f"{_FUSED}/picks.py",
        "tl.exp(x - top) / total / e",
        "tl.exp((x - top) * 0.5) / total / e",
        f"{_TRITON_ROWS}::test_sampled_picks",
    ),
    Fault(
        "every_node_races_with_the_root_s_noise",
        "sampled picks",
        f"{_FUSED}/picks.py",
        "level * noise_level",
        "0 * noise_level",
        f"{_TRITON_ROWS}::test_sampled_picks",
    ),
    Fault(
        "scores_without_the_path_above",
        "expansion",
        f"{_FUSED}/picks.py",
        "base = tl.load(Scores + row * score_stride)",
        "base = 0.0 * tl.load(Scores + row * score_stride)",
        f"{_TRITON_ROWS}::test_expansion",
    ),
    Fault(
        "padding_counts_in_the_norm",
        "norm",
        f"{_FUSED}/head.py",
        "tl.sum(x * x, 0) / size",
        "tl.sum(x * x, 0) / BLOCK",
        f"{_TRITON_ROWS}::test_norm",
    ),
    Fault(
        "all_tokens_in_one_slot",
        "cache write",
        f"{_FUSED}/head.py",
        ".to(tl.int64) + token",
        ".to(tl.int64) + token * 0",
        f"{_TRITON_ROWS}::test_rotation_into_the_cache",
    ),
    # The loss and TTT attention.
    Fault(
        "the_gradient_of_half_a_distribution",
        "loss",
        f"{_FUSED}/loss.py",
        "gradient = p * mass - q",
        "gradient = p - q",
        f"{_TRITON_ROWS}::test_loss",
    ),
    Fault(
        "a_step_is_compared_with_the_row_of_another",
        "loss",
        f"{_FUSED}/loss.py",
        "(row // steps) * target_row",
        "(row % steps) * target_row",
        f"{_TRITON_ROWS}::test_loss",
    ),
    Fault(
        "the_weight_learns_from_the_last_chunk",
        "loss",
        f"{_KERNELS}/loss.py",
        "d_weight += gradient.T @ scaled",
        "d_weight.copy_(gradient.T @ scaled)",
        f"{_LOSS}::test_loss_and_gradients_are_those_of_dense_autograd",
    ),
    Fault(
        "flash_attention_s_window_is_one_wider",
        "TTT attention",
        _BLOCK,
        "layout.window - 1 - layout.shift",
        "layout.window - layout.shift",
        f"{_TTT}::test_every_engine_is_dense_attention -k flash",
    ),
    Fault(
        "documents_run_into_each_other",
        "TTT attention",
        _BLOCK,
        "found |= {row * length + at for document in documents for at in document}",
        "found |= {row * length + at for document in documents for at in document[:0]}",
        f"{_TTT}::test_every_engine_is_dense_attention -k flash",
    ),
    Fault(
        "the_block_s_own_log_sum_exp_in_the_gradient",
        "TTT attention",
        _BLOCK,
        "share = (scores - lse[:, :, at, None]).exp()",
        "share = (scores - scores.logsumexp(-1, keepdim=True)).exp()",
        f"{_TTT}::test_every_engine_is_dense_attention -k plain",
    ),
)
