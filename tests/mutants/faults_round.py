"""Faults in a round: trees, the walk, picks and noise, stop rules, the loop and its statistics."""

from mutants.fault import Fault

_TREE, _VERIFY = "specdec/round/tree.py", "specdec/round/verify.py"
_WALK = "kernels/specdec_kernels/reference/walk.py"
_PICKERS, _NOISE = "specdec/round/pickers.py", "specdec/round/noise.py"
_STOPS = "specdec/generate/stop_rules.py"
_LOOP, _STATS = "specdec/loop.py", "specdec/stats.py"

_WALKS = "tests/laws/test_walks.py"
_GREEDY_TEXT = "tests/laws/test_text.py::test_fp64 -k 'gemma3-oracle-greedy'"
_SAMPLED_TEXT = "tests/laws/test_text.py::test_fp64 -k 'gemma3-oracle-sampled'"
_PROCESSED_TEXT = "tests/laws/test_text.py::test_fp64 -k 'llama-oracle-processors'"
_ENDS = "tests/laws/test_text.py::test_eos_at_every_depth -k 'gemma3-oracle'"
_ALL_NODES = "tests/hf/test_processors.py::test_all_nodes_at_once"
_STATEFUL = (
    "tests/hf/test_processors.py::test_stateful_processor_sees_each_emitted_prefix_once "
    "tests/hf/test_processors.py::test_stateful_processor_stops_with_the_text"
)
_POSITIONS = "tests/laws/test_rounds.py::test_an_end_at_the_last_position"
_CUTS = "tests/laws/test_rounds.py -k 'limited or deepest'"
_STATS_TESTS = "tests/hf/test_stats.py -k 'add_up or overcounted or drafted_eos'"
_FAILURE = "tests/laws/test_cache.py::test_a_failure_leaves_the_last_commit"

ROUND: tuple[Fault, ...] = (
    # Trees: what a node sees, and where it stands.
    Fault(
        "a_node_does_not_see_its_parent",
        "tree mask",
        _TREE,
        "into[5 + node] = into[5 + row.parents[node]]",
        "into[5 + node] = into[5 + max(row.parents[row.parents[node]], 0)]",
        _GREEDY_TEXT,
    ),
    Fault(
        "siblings_see_each_other",
        "tree mask",
        _TREE,
        "into[5 + node] = into[5 + row.parents[node]]",
        "into[5 + node] = into[4 + node] if node > 1 else into[5]",
        _GREEDY_TEXT,
    ),
    Fault(
        "far_ancestors_are_forgotten_on_the_device",
        "tree mask",
        _TREE,
        "reached *= 2",
        "reached *= 4",
        f"{_WALKS}::test_ancestors_are_the_same_uploaded_and_computed",
    ),
    Fault(
        "a_chain_built_on_the_device_sees_the_future",
        "tree mask",
        _TREE,
        "order[:, None] >= order",
        "order[:, None] >= order - 1",
        "tests/hf/test_caches.py::test_turns_of_a_left_padded_batch",
    ),
    Fault(
        "position_is_the_node_index",
        "tree positions",
        _TREE,
        "into[3, :count] = 1, row.depths()",
        "into[3, :count] = 1, range(count)",
        _GREEDY_TEXT,
    ),
    Fault(
        "padding_nodes_are_live",
        "padded trees",
        _TREE,
        "return nodes < self.sizes[:, None]",
        "return nodes < self.sizes[:, None] + 1",
        _WALKS,
    ),
    Fault(
        "impossible_tokens_are_passed_on",
        "tokens beyond the vocabulary",
        _TREE,
        "fits = depths[node] <= depth and 0 <= self.tokens[node] < vocab_size",
        "fits = depths[node] <= depth",
        _CUTS,
    ),
    Fault(
        "impossible_tokens_of_device_trees_are_passed_on",
        "tokens beyond the vocabulary",
        "specdec/round/sealed.py",
        "tokens = rooted.clamp(0, vocab_size - 1)",
        "tokens = rooted",
        "tests/laws/test_drafter_mistakes.py",
    ),
    Fault(
        "a_cut_tree_is_hung_up_elsewhere",
        "tree mask",
        _TREE,
        "new_index[self.parents[node]] for node in kept[1:]",
        "new_index.get(self.parents[node] - 1, 0) for node in kept[1:]",
        _CUTS,
    ),
    Fault(
        "limits_cut_one_level_too_late",
        "depth limit ignored",
        _TREE,
        "if known and len(self) <= nodes and len(self) <= depth + 1:",
        "if known and len(self) <= nodes:",
        _CUTS,
    ),
    Fault(
        "the_deepest_path_is_the_last_one",
        "tree mask",
        _TREE,
        "path = [depths.index(max(depths))]",
        "path = [len(depths) - 1]",
        _CUTS,
    ),
    # The walk: what is accepted, and what comes after it.
    Fault(
        "the_first_draft_is_accepted_unchecked",
        "greedy acceptance is lossy",
        _VERIFY,
        "node, path = 0, list[int]()",
        "node, path = int(size > 1), [1] * int(size > 1)",
        _GREEDY_TEXT,
    ),
    Fault(
        "any_child_is_accepted",
        "greedy acceptance is lossy",
        _VERIFY,
        "children.get((node, row_picks[node]))",
        "next((c for c in range(node + 1, size) if parents[c] == node), None)",
        _GREEDY_TEXT,
    ),
    Fault(
        "the_bonus_comes_from_the_parent_of_the_last_node",
        "bonus from the wrong row",
        _VERIFY,
        "emitted.append([*(tokens[node] for node in path), row_picks[node]])",
        "emitted.append([*(tokens[n] for n in path), row_picks[(0, 0, *path)[len(path)]]])",
        _GREEDY_TEXT,
    ),
    Fault(
        "the_pending_token_is_the_last_draft",
        "first or last token lost",
        _VERIFY,
        "self.tokens.gather(1, self.length[:, None])",
        "self.tokens.gather(1, (self.length[:, None] - 1).clamp(min=0))",
        _GREEDY_TEXT,
    ),
    Fault(
        "the_last_of_equal_children_wins",
        "duplicate children",
        _VERIFY,
        "for node in range(size - 1, 0, -1):",
        "for node in range(1, size):",
        f"{_WALKS}::test_both_walks_agree",
    ),
    Fault(
        "the_device_accepts_below_a_rejected_node",
        "device walk differs",
        _WALK,
        "carries & (parents == here)",
        "carries & (nodes > here)",
        f"{_WALKS}::test_both_walks_agree",
    ),
    Fault(
        "the_device_drops_the_bonus",
        "device walk differs",
        _WALK,
        "torch.where(steps <= length[:, None], along, -1)",
        "torch.where(steps < length[:, None], along, -1)",
        f"{_WALKS}::test_both_walks_agree",
    ),
    Fault(
        "the_device_walk_asks_the_host",
        "a second copy to the host",
        _VERIFY,
        "trees.sizes, picks, trees.max_depth\n",
        "trees.sizes, picks, trees.max_depth * bool(trees.sizes.any())\n",
        "tests/laws/test_contract.py::test_one_host_copy_a_round",
    ),
    # Picks: processors and noise.
    Fault(
        "noise_of_the_next_step_along_the_path",
        "noise of the wrong step",
        _PICKERS,
        "noise = self._noise.step(index, scores.shape[-1])[row]",
        "noise = self._noise.step(index + 1, scores.shape[-1])[row]",
        _SAMPLED_TEXT,
    ),
    Fault(
        "noise_of_the_root_at_all_nodes",
        "noise of the wrong step",
        _PICKERS,
        "tape.gather(1, index)",
        "tape.gather(1, torch.zeros_like(index))",
        _ALL_NODES,
    ),
    Fault(
        "noise_of_the_first_row",
        "noise of the wrong row",
        _PICKERS,
        "noise = self._noise.step(index, scores.shape[-1])[row]",
        "noise = self._noise.step(index, scores.shape[-1])[0]",
        _SAMPLED_TEXT,
    ),
    Fault(
        "the_generator_is_not_set_back",
        "seed and generator",
        _NOISE,
        "self._generator.set_state(self._states[steps])",
        "self._states[steps]",
        _ALL_NODES,
    ),
    Fault(
        "noise_is_forgotten_when_the_fastest_row_used_it",
        "seed and generator",
        _PICKERS,
        "self._noise.release(min(emitted))",
        "self._noise.release(max(emitted))",
        _SAMPLED_TEXT,
    ),
    Fault(
        "noise_is_never_forgotten",
        "memory grows with the text",
        _NOISE,
        "for step in [s for s in self._draws if s < below]:",
        "for step in [s for s in self._draws if s < below - 1000]:",
        "tests/hf/test_outputs.py::test_long_generation_keeps_its_memory",
    ),
    Fault(
        "processors_are_called_twice_a_token",
        "stateful processors",
        _PICKERS,
        "        scores = self._processed(row, index, logits)\n        self._walked",
        "        self._processed(row, index, logits)\n"
        "        scores = self._processed(row, index, logits)\n        self._walked",
        _STATEFUL,
    ),
    Fault(
        "processors_see_tokens_after_the_end",
        "stateful processors",
        _PICKERS,
        "if stops.is_final(row, index, token):",
        "if stops.is_final(row, index, token) and node == 0:",
        _STATEFUL,
    ),
    Fault(
        "processors_see_the_prefix_of_the_round",
        "stateful processors",
        _PICKERS,
        "process(self._prefix.row(row, index), scores)",
        "process(self._prefix.row(row, index - int(node > 0)), scores)",
        _PROCESSED_TEXT,
    ),
    Fault(
        "processors_write_into_the_logits",
        "stateful processors",
        _PICKERS,
        "logits[None].to(copy=True, dtype=torch.float32)",
        "logits[None].float()",
        "tests/hf/test_processor_edges.py::test_in_place_changes_do_not_reach_the_logits",
    ),
    Fault(
        "warpers_are_left_out_at_all_nodes",
        "sampling options ignored",
        _PICKERS,
        "flat = self._processors(no_ids, scores.reshape(batch * size, vocab))",
        "flat = scores.reshape(batch * size, vocab)",
        _ALL_NODES,
    ),
    # Stop rules.
    Fault(
        "an_eos_inside_a_block_is_passed_over",
        "EOS inside a block",
        _STOPS,
        "if self.is_final(row, start + kept - 1, row_tokens[kept - 1]):",
        "if self.is_final(row, start + kept - 1, row_tokens[-1]):",
        _ENDS,
    ),
    Fault(
        "only_one_eos_id_counts",
        "EOS inside a block",
        _STOPS,
        "token in self._ends.eos_ids",
        "token in sorted(self._ends.eos_ids)[:1]",
        "tests/hf/test_stopping.py::test_several_eos_ids",
    ),
    Fault(
        "one_token_beyond_the_limit",
        "budget overshoot",
        _STOPS,
        "index + 1 >= self._ends.max_new_tokens",
        "index >= self._ends.max_new_tokens",
        _GREEDY_TEXT,
    ),
    Fault(
        "tokens_after_the_end_are_emitted",
        "EOS inside a block",
        _STOPS,
        "tokens.append(row_tokens[:kept])",
        "tokens.append(row_tokens if kept else [])",
        "tests/hf/test_stopping.py -k 'eos_at_every or text_streamer'",
    ),
    Fault(
        "the_cache_keeps_nodes_after_the_end",
        "one cache row too many",
        _STOPS,
        "paths.append(verdict.paths[row][: max(kept - 1, 0)])",
        "paths.append(verdict.paths[row])",
        "tests/laws/test_cache.py::test_cache_is_a_fresh_prefill_after_every_round -k 'gemma3-'",
    ),
    Fault(
        "criteria_are_asked_twice_a_token",
        "stateful criteria",
        _STOPS,
        "answer = self._answers.get((row, index))",
        "answer = None",
        "tests/hf/test_stopping.py -k 'custom_criterion'",
    ),
    Fault(
        "criteria_see_the_text_without_its_last_token",
        "stateful criteria",
        _STOPS,
        "ids = self._prefix.row(row, index + 1)",
        "ids = self._prefix.row(row, index)",
        "tests/hf/test_stopping.py -k 'custom_criterion'",
    ),
    # The loop.
    Fault(
        "the_first_token_is_dropped",
        "first or last token lost",
        _LOOP,
        "        self._advance(result)\n        call.stats",
        "        self._advance(result)\n        [row.pop() for row in state.tokens]\n"
        "        call.stats",
        _GREEDY_TEXT,
    ),
    Fault(
        "the_first_token_comes_twice",
        "first or last token lost",
        _LOOP,
        "        self._advance(result)\n        call.stats",
        "        self._advance(result)\n        [row.append(row[-1]) for row in state.tokens]\n"
        "        call.stats",
        _GREEDY_TEXT,
    ),
    Fault(
        "what_was_emitted_is_committed_after_the_drafter_saw_it",
        "state after an exception",
        _LOOP,
        "            rounds.commit(result)\n            rounds.observe(result)\n",
        "            rounds._advance(result)\n            rounds.observe(result)\n"
        "            target.commit(result.verdict.path, result.host.paths, result.rows)\n",
        f"{_FAILURE} -k 'observe or on_round'",
    ),
    Fault(
        "an_exception_leaves_the_generator_ahead",
        "state after an exception",
        _LOOP,
        "            self.call.picker.finish(",
        "            failed or self.call.picker.finish(",
        "tests/hf/test_interruptions.py -k drawn_ahead",
    ),
    Fault(
        "exceptions_are_swallowed",
        "state after an exception",
        _LOOP,
        "                    self.drafter.end(self.seen)\n",
        "                    self.drafter.end(self.seen)\n            return True\n",
        f"{_FAILURE} -k 'observe or on_round'",
    ),
    Fault(
        "device_drafters_may_pass_the_last_position",
        "depth limit ignored",
        _LOOP,
        "return trees if fits else TreeBatch.roots(state.pending)",
        "return trees",
        _POSITIONS,
    ),
    Fault(
        "roots_of_device_trees_are_believed",
        "a drafter changes the text",
        "specdec/round/sealed.py",
        "torch.cat([pending[:, None], trees.tokens[:, 1:].long()], dim=1)",
        "torch.cat([trees.tokens[:, :1], trees.tokens[:, 1:].long()], dim=1)",
        "tests/laws/test_drafter_mistakes.py",
    ),
    Fault(
        "top_candidates_of_the_next_node",
        "the drafter is shown the wrong row",
        _LOOP,
        "node_topk = output.logits.topk(needs.node_topk, -1)",
        "node_topk = output.logits.roll(1, 1).topk(needs.node_topk, -1)",
        "tests/laws/test_contract.py::test_needs_are_met",
    ),
    # Statistics.
    Fault(
        "the_histogram_counts_tokens_after_the_end",
        "statistics count cut tokens",
        _STATS,
        "self.histogram[len(tokens)] += 1",
        "self.histogram[len(verdict.sources[row]) + 1] += 1",
        _STATS_TESTS,
    ),
    Fault(
        "sources_win_tokens_after_the_end",
        "statistics count cut tokens",
        _STATS,
        "won = verdict.sources[row][: len(tokens)]",
        "won = verdict.sources[row]",
        _STATS_TESTS,
    ),
    Fault(
        "tau_leaves_out_the_bonus",
        "statistics count cut tokens",
        _STATS,
        "return sum(n * times for n, times in self.histogram.items()) / max(emitting, 1)",
        "return sum((n - 1) * times for n, times in self.histogram.items()) / max(emitting, 1)",
        _STATS_TESTS,
    ),
)
