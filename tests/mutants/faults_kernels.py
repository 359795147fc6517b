"""Faults in the kernels: masks, splits and their combination, offsets, the order of sums.

Three more change nothing that a caller sees, and are no faults: a program whose last split ends at
its own end instead of the prefix's (the shares are cut so that the two agree), queries of padded
nodes that are loaded (their rows are set to zero at the end), and weights of unseen keys that are
not set to zero (as long as a row sees something, they fade to nothing when it does, and a split in
which it sees nothing has a log-sum-exp near -1e30).
"""

from mutants.fault import Fault

_PROGRAMS = "kernels/specdec_kernels/fused/attention_programs.py"
_ORDERED = "kernels/specdec_kernels/fused/ordered_programs.py"
_TESTS = "tests/kernels/interpreted/test_tree_attention.py"
_BITS = "tests/kernels/interpreted/test_ordered_attention.py"

_WINDOWS = f"{_TESTS}::test_features -k 'window'"
_CHUNKS = f"{_TESTS}::test_features -k 'chunks'"
_SINKS = f"{_TESTS}::test_features -k 'sinks'"
_RAGGED = f"{_TESTS}::test_features -k 'ragged'"
_FLOAT8 = f"{_TESTS}::test_a_float8_cache_with_a_factor_a_head"
_LARGE = f"{_TESTS}::test_shapes -k '64-129'"

KERNELS = (
    # What a row sees.
    Fault(
        "a_window_is_one_wider",
        "window off by one",
        _PROGRAMS,
        "depth - WINDOW + 1",
        "depth - WINDOW",
        _WINDOWS,
    ),
    Fault(
        "a_window_is_one_narrower",
        "window off by one",
        _PROGRAMS,
        "depth - WINDOW + 1",
        "depth - WINDOW + 2",
        _WINDOWS,
    ),
    Fault(
        "in_the_prefix_a_window_is_one_wider",
        "window off by one",
        _PROGRAMS,
        "(slot - prefix)[None, :] >= first[:, None]",
        "(slot - prefix)[None, :] >= first[:, None] - 1",
        _WINDOWS,
    ),
    Fault(
        "in_the_tree_a_window_is_one_narrower",
        "window off by one",
        _PROGRAMS,
        "depth[None, :] >= first[:, None]",
        "depth[None, :] > first[:, None]",
        _WINDOWS,
    ),
    Fault(
        "in_the_tree_a_window_counts_nodes",
        "node index taken for position",
        _PROGRAMS,
        "depth = tl.load(Depth + b * d_b + other * d_t, mask=other < size, other=0)",
        "depth = other",
        _WINDOWS,
    ),
    Fault(
        "a_chunk_is_that_of_the_prefix",
        "chunk of another position",
        _PROGRAMS,
        "depth - (prefix + depth - start) % CHUNK",
        "depth - (prefix - start) % CHUNK",
        _CHUNKS,
    ),
    Fault(
        "chunks_count_padding",
        "left padding",
        _PROGRAMS,
        "(prefix + depth - start) % CHUNK",
        "(prefix + depth) % CHUNK",
        _CHUNKS,
    ),
    Fault(
        "left_padding_is_read",
        "left padding",
        _PROGRAMS,
        "tl.load(Start + b).to(tl.int32) if HAS_START else 0",
        "tl.load(Start + b).to(tl.int32) * 0 if HAS_START else 0",
        f"{_TESTS}::test_features -k 'left_padding or padding'",
    ),
    Fault(
        "the_last_committed_key_is_lost",
        "boundary of the prefix",
        _PROGRAMS,
        "tl.where(busy, tl.minimum(high, prefix), low)",
        "tl.where(busy, tl.minimum(high, prefix - 1), low)",
        _RAGGED,
    ),
    Fault(
        "splits_leave_keys_out",
        "boundary of a split",
        _PROGRAMS,
        "oldest + (split + 1) * width",
        "oldest + (split + 1) * width - 1",
        f"{_TESTS}::test_more_splits_than_tiles",
    ),
    Fault(
        "bit_63_is_lost",
        "ancestor words",
        _PROGRAMS,
        "(other % 64)[None, :]",
        "tl.minimum(other % 64, 62)[None, :]",
        f"{_TESTS}::test_shapes -k '64-0'",
    ),
    Fault(
        "the_second_word_is_the_first",
        "ancestor words",
        _PROGRAMS,
        "begin // 64 * w_w",
        "begin // 64 * 0",
        f"{_TESTS}::test_features -k 'words'",
    ),
    Fault(
        "keys_of_the_tree_lie_at_their_positions",
        "node index taken for position",
        _PROGRAMS,
        "word = tl.load(Words + b * w_b + node * w_t",
        "other = tl.load(Depth + b * d_b + other * d_t, mask=other < size, other=0)\n"
        "        word = tl.load(Words + b * w_b + node * w_t",
        _RAGGED,
    ),
    # Where things lie.
    Fault(
        "the_page_of_the_slot_before",
        "pages",
        _PROGRAMS,
        "Table + (slot // PAGE) * t_p",
        "Table + (tl.maximum(slot - 1, 0) // PAGE) * t_p",
        f"{_TESTS}::test_features -k 'pages'",
    ),
    Fault(
        "pages_of_the_first_row",
        "pages",
        _PROGRAMS,
        "Table += b * t_b",
        "Table += 0 * t_b",
        f"{_TESTS}::test_features -k 'pages'",
    ),
    Fault(
        "offsets_of_slots_have_32_bits",
        "offsets overflow",
        _PROGRAMS,
        "k_at, v_at = slot.to(tl.int64) * k_s, slot.to(tl.int64) * v_s",
        "k_at, v_at = slot * k_s, slot * v_s",
        f"{_TESTS}::test_offsets_beyond_32_bits",
    ),
    Fault(
        "offsets_of_rows_have_32_bits",
        "offsets overflow",
        _PROGRAMS,
        "K, V = K + b * k_b, V + b * v_b",
        "K, V = K + b.to(tl.int32) * k_b, V + b.to(tl.int32) * v_b",
        f"{_TESTS}::test_offsets_beyond_32_bits",
    ),
    Fault(
        "query_heads_in_another_order",
        "grouped heads",
        _PROGRAMS,
        "(head * GROUP + row % GROUP) * q_h",
        "(head + row % GROUP * HEADS) * q_h",
        _RAGGED,
    ),
    # The softmax.
    Fault(
        "the_sum_does_not_fade",
        "online softmax",
        _PROGRAMS,
        "total = total * fade + tl.sum(weight, 1)",
        "total = total + tl.sum(weight, 1)",
        _LARGE,
    ),
    Fault(
        "values_do_not_fade",
        "online softmax",
        _PROGRAMS,
        "mixed = mixed * fade[:, None] +",
        "mixed = mixed +",
        _LARGE,
    ),
    Fault(
        "the_cap_is_of_scores_without_their_scale",
        "softcap",
        _PROGRAMS,
        "x = products * (scale / SOFTCAP)",
        "x = products / SOFTCAP",
        f"{_TESTS}::test_features -k 'softcap'",
    ),
    Fault(
        "keys_are_scaled_as_those_of_the_first_head",
        "factors of float8",
        _PROGRAMS,
        "tl.load(KScale + head)",
        "tl.load(KScale)",
        _FLOAT8,
    ),
    Fault(
        "values_are_not_scaled",
        "factors of float8",
        _PROGRAMS,
        "out = out * tl.load(VScale + head)",
        "out = out * 1.0",
        _FLOAT8,
    ),
    # What puts splits together.
    Fault(
        "an_empty_split_counts",
        "splits",
        _PROGRAMS,
        'most + tl.log2(weights), float("-inf"))',
        "most + tl.log2(weights), 0.0)",
        f"{_TESTS}::test_more_splits_than_tiles",
    ),
    Fault(
        "all_splits_count_the_same",
        "splits",
        _PROGRAMS,
        "total += weight",
        "total += 1.0",
        f"{_TESTS}::test_more_splits_than_tiles",
    ),
    Fault(
        "sinks_take_no_weight",
        "sinks",
        _PROGRAMS,
        "total = tl.exp2(sink - most)",
        "total = tl.exp2(sink - most) * 0.0",
        _SINKS,
    ),
    Fault(
        "sinks_of_the_first_heads",
        "sinks",
        _PROGRAMS,
        "most = tl.load(Sinks + query,",
        "most = tl.load(Sinks + row % GROUP,",
        _SINKS,
    ),
    Fault(
        "sinks_to_another_base",
        "sinks",
        _PROGRAMS,
        "other=0.0).to(tl.float32) * LOG2E",
        "other=0.0).to(tl.float32)",
        _SINKS,
    ),
    Fault(
        "the_log_sum_exp_is_to_base_2",
        "log-sum-exp",
        _PROGRAMS,
        "(most + tl.log2(total)) / LOG2E",
        "(most + tl.log2(total))",
        _RAGGED,
    ),
    Fault(
        "padding_holds_what_was_there",
        "padded nodes",
        _PROGRAMS,
        "out = tl.where(live[:, None], out, 0.0)",
        "out = out * 1.0",
        _RAGGED,
    ),
    # The order of positions.
    Fault(
        "ancestors_are_looked_up_by_depth_alone",
        "node index taken for position",
        _ORDERED,
        "slot = prefix + tl.where(ahead < 0, ahead, other)",
        "slot = prefix + ahead",
        f"{_BITS}::test_right",
    ),
    Fault(
        "what_is_stored_of_a_split_is_forgotten",
        "splits",
        _ORDERED,
        "stored = row < tl.where(low < high, GROUP, 0)",
        "stored = row < tl.where(low < high, 0, 0)",
        f"{_BITS}::test_right",
    ),
    Fault(
        "keys_of_a_tile_come_in_another_order",
        "bits depend on more than the row",
        _ORDERED,
        "slot = start + tile * KEYS + tl.arange(0, KEYS)\n",
        "slot = start + tile * KEYS + KEYS - 1 - tl.arange(0, KEYS)\n",
        f"{_BITS}::test_bits_depend_on_the_row_alone",
    ),
    Fault(
        "a_split_is_two_where_the_tree_begins",
        "bits depend on more than the row",
        _ORDERED,
        "        for tile in range(tl.maximum(split * SPAN, whole)",
        "        most, total, mixed = _merged(most, total, mixed, m, t, x)\n"
        "        m, t, x = _nothing(ROWS, PAD_V)\n"
        "        for tile in range(tl.maximum(split * SPAN, whole)",
        f"{_BITS}::test_bits_depend_on_the_row_alone",
    ),
)
