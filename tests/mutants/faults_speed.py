"""Faults that cost only speed: the text stays right, and no law can see them.

What catches them are references of what each drafter does, step by step, and pinned rounds.
"""

from mutants.fault import Fault

_LOOKAHEAD, _POOL = "specdec/drafters/lookahead.py", "specdec/sources/ngram_pool.py"
_JACOBI, _RECYCLING = "specdec/drafters/jacobi.py", "specdec/drafters/recycling.py"
_LOOKUP, _INDEX = "specdec/drafters/prompt_lookup.py", "specdec/sources/ngram_index.py"
_SUFFIX, _DRAFT = "specdec/drafters/suffix.py", "specdec/drafters/draft_model/drafter.py"
_GROWTH, _AUTOMATON = "specdec/sources/suffix_draft.py", "specdec/sources/suffix_index.py"
_EAGLE, _STEPPED = "specdec/drafters/head.py", "specdec/heads/eagle3/stepped.py"
_GROW = "specdec/drafters/growth.py"
_TREE = "specdec/round/tree.py"

_STEPS = "tests/drafting/test_lookahead_steps.py"
_PAPER = f"{_STEPS}::test_every_step_is_the_papers"
_CHAINS = f"{_STEPS}::test_one_chain_at_a_time"
_FREE = "tests/drafting/test_free_drafts.py"
_TREES = "tests/drafting/test_eagle3_trees.py::test_the_bundled_heads_trees -k 'not -2]'"
_AHEAD = "tests/drafting/test_draft_chains.py::test_rows_of_a_tree_target -k '[1-'"
_ROUNDS = "tests/drafting/test_pinned_rounds.py::test_rounds_are_the_pinned_ones"


def _slow(name: str, file: str, old: str, new: str, tests: str) -> Fault:
    return Fault(name, "costs only speed", file, old, new, tests)


SPEED: tuple[Fault, ...] = (
    _slow(
        "the_window_loses_its_last_column",
        _LOOKAHEAD,
        "self.levels = [moved[0][1:], *moved[1:]]",
        "self.levels = [moved[0][:-1], *moved[1:]]",
        _PAPER,
    ),
    _slow(
        "the_warm_up_loses_its_last_column",
        _LOOKAHEAD,
        "fresh = new if len(self.levels) == 1 else new[1:]",
        "fresh = new if len(self.levels) == 1 else new[:-1]",
        _PAPER,
    ),
    _slow(
        "a_new_level_is_filled_from_the_level_above",
        _LOOKAHEAD,
        "moved = [*self.levels[1:], new]",
        "moved = [*self.levels[1:], list(self.levels[-1])]",
        _PAPER,
    ),
    _slow(
        "a_window_ngram_is_keyed_one_column_off",
        _LOOKAHEAD,
        "self.levels[0][column - 1]",
        "self.levels[0][min(column, len(self.levels[0]) - 1)]",
        _PAPER,
    ),
    _slow(
        "a_window_ngram_lacks_its_newest_token",
        _LOOKAHEAD,
        "gram = [*(level[column] for level in self.levels[1:]), token]",
        "gram = [*(level[column] for level in self.levels[1:])] or [token]",
        _PAPER,
    ),
    _slow(
        "no_harvest_keeps_tails",
        _LOOKAHEAD,
        "keep = pool.add_with_tails if with_tails else pool.add",
        "keep = pool.add_with_tails",
        _PAPER,
    ),
    _slow(
        "the_window_is_not_shown_all_its_columns",
        _LOOKAHEAD,
        "self._heads = above[1:] if warming_up_level_0 else above",
        "self._heads = above",
        _PAPER,
    ),
    _slow(
        "a_chain_starts_where_the_last_one_did",
        _LOOKAHEAD,
        "outcome.picks[len(outcome.path) + 1 : len(tree)]",
        "outcome.picks[1 : len(tree)]",
        _CHAINS,
    ),
    _slow(
        "text_ngrams_end_one_token_early",
        _POOL,
        "range(max(start, ngram - 1), len(text))",
        "range(max(start, ngram - 1), len(text) - 1)",
        _PAPER,
    ),
    _slow(
        "the_oldest_guess_goes_first",
        _POOL,
        "list(self._followers.get(key, {}).items())[::-1]",
        "list(self._followers.get(key, {}).items())",
        _PAPER,
    ),
    _slow(
        "a_guess_seen_again_stays_old",
        _POOL,
        "entries.pop(gram, None)\n        entries[gram]",
        "entries[gram]",
        _PAPER,
    ),
    _slow(
        "a_block_does_not_move_on",
        _JACOBI,
        "picks[len(outcome.path) + 1 : end + 1]",
        "picks[1 : end + 1]",
        f"{_FREE}::test_jacobi",
    ),
    _slow(
        "runs_are_kept_from_the_root_on",
        _JACOBI,
        "for node in reversed(range(len(tree))):",
        "for node in range(len(tree)):",
        f"{_FREE}::test_jacobi",
    ),
    _slow(
        "the_shortest_match_wins",
        _INDEX,
        "in zip(reversed(self._sizes), reversed(self._ends), strict=True):",
        "in zip(self._sizes, self._ends, strict=True):",
        f"{_FREE}::test_prompt_lookup",
    ),
    _slow(
        "the_earliest_match_wins",
        _INDEX,
        "ends[tuple(self._text[end - size : end])] = end",
        "ends.setdefault(tuple(self._text[end - size : end]), end)",
        f"{_FREE}::test_prompt_lookup",
    ),
    _slow(
        "a_match_is_trusted_by_its_position",
        _LOOKUP,
        "self.config.tokens_per_match * self._index.match()[1]",
        "self.config.tokens_per_match * self._index.match()[0]",
        f"{_FREE}::test_prompt_lookup",
    ),
    _slow(
        "candidates_are_of_the_last_node_with_a_token",
        _RECYCLING,
        "torch.searchsorted(ordered, rows)",
        "torch.searchsorted(ordered, rows, right=True) - 1",
        f"{_FREE}::test_recycling -k 'trees and bigrams'",
    ),
    _slow(
        "a_node_takes_the_candidates_of_its_parent",
        _RECYCLING,
        "found.flatten(0, 1)[order[",
        "found.roll(1, 1).flatten(0, 1)[order[",
        f"{_FREE}::test_recycling -k 'trees and bigrams'",
    ),
    _slow(
        "prompts_seed_what_came_first",
        _RECYCLING,
        "list(found)[::-1][:width]",
        "list(found)[:width]",
        f"{_FREE}::test_recycling -k 'trees and bigrams'",
    ),
    _slow(
        "frequency_does_not_count",
        _GROWTH,
        "preference = (-weight * times, view.source, -latest, self._made)",
        "preference = (-weight, view.source, -latest, self._made)",
        f"{_FREE}::test_suffix",
    ),
    _slow(
        "a_context_is_thought_one_token_longer",
        _GROWTH,
        "weight = probability / (total + view.novelty / match.length)",
        "weight = probability / (total + view.novelty / (match.length + 1))",
        f"{_FREE}::test_suffix",
    ),
    _slow(
        "suffixes_follow_the_older_of_two_equals",
        _GROWTH,
        "view.source, -latest, self._made)",
        "view.source, latest, self._made)",
        f"{_FREE}::test_suffix",
    ),
    _slow(
        "a_suffix_match_is_one_token_short",
        _SUFFIX,
        "int(config.nodes_per_match * longest)",
        "int(config.nodes_per_match * (longest - 1))",
        f"{_FREE}::test_suffix",
    ),
    _slow(
        "a_level_is_drafted_below_the_wrong_nodes",
        "specdec/drafters/draft_model/runner.py",
        "parents.append(below + above)",
        "parents.append(0 * below + above)",
        _AHEAD,
    ),
    _slow(
        "the_draft_believes_it_holds_one_token_more",
        _DRAFT,
        "self._known[row] += min(len(path), self._stepped)",
        "self._known[row] += min(len(path), self._stepped + 1)",
        _AHEAD,
    ),
    _slow(
        "a_tree_is_sorted_by_the_last_step_alone",
        _GROW,
        "every = (scores[:, :, None] + below).flatten(1)",
        "every = (0 * scores[:, :, None] + below).flatten(1)",
        _TREES,
    ),
    _slow(
        "the_second_best_path_is_not_continued",
        _GROW,
        "scores, best = every.topk(beam)",
        "scores, best = (one[:, [0, *range(2, beam + 1)]] for one in every.topk(beam + 1))",
        _TREES,
    ),
    _slow(
        "a_level_continues_below_the_wrong_nodes",
        _GROW,
        "tokens, parents, frontier = ids.gather(1, best), best // width, count + best",
        "tokens, parents, frontier = ids.gather(1, best), best % len(scores[0]), count + best",
        _TREES,
    ),
    _slow(
        "features_are_those_of_the_node_before",
        _EAGLE,
        "nodes = pad(path, (1, 0))[:, :, None]",
        "nodes = (pad(path, (1, 0)) - 1).clamp(min=0)[:, :, None]",
        _TREES,
    ),
    _slow(
        "prompt_features_stand_one_slot_late",
        _EAGLE,
        "tokens = [torch.cat([*own, after[row]])[1:] if own else empty",
        "tokens = [torch.cat([*own, after[row]])[:-1] if own else empty",
        _TREES,
    ),
    _slow(
        "a_chain_is_scored_by_its_last_step_alone",
        _GROW,
        "scores.append(scores[-1] + best)",
        "scores.append(best)",
        _TREES,
    ),
    _slow(
        "a_step_reads_the_embedding_in_place_of_the_state",
        _STEPPED,
        "residual = normed[:, :, 1] if self._normed_residual else hidden",
        "residual = normed[:, :, 1] if self._normed_residual else embeds",
        _TREES,
    ),
    _slow(
        "the_last_of_the_deepest_paths_is_kept",
        _TREE,
        "path = [depths.index(max(depths))]",
        "path = [len(depths) - 1 - depths[::-1].index(max(depths))]",
        _CHAINS,
    ),
    _slow(
        "a_full_tree_ends_one_node_early",
        _TREE,
        "if limit is not None and len(self) >= limit and",
        "if limit is not None and len(self) >= limit - 1 and",
        _PAPER,
    ),
    _slow(
        "trees_stop_two_tokens_before_the_end",
        "specdec/contracts.py",
        "left = self.max_new_tokens - self.emitted(row) - 1",
        "left = self.max_new_tokens - self.emitted(row) - 3",
        f"{_ROUNDS} -k 'tree-greedy and not eagle3 and not draft_model'",
    ),
)
