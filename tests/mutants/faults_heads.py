"""Draft heads: drafting, training, checkpoints."""

from mutants.fault import Fault

_HEAD, _DRAFTER = "specdec/heads/eagle3/head.py", "specdec/drafters/head.py"
_GROW = "specdec/drafters/growth.py"
_STEPPED = "specdec/heads/eagle3/stepped.py"
_MASKS, _TTT = "specdec/heads/eagle3/draft_masks.py", "specdec/heads/eagle3/ttt_attention.py"
_OBJECTIVE = "draft_training/specdec_training/objective"
_STORE = "draft_training/specdec_training/run/checkpoints.py"
_CLOCK = "draft_training/specdec_training/run/state.py"

_LOOP = "tests/heads/test_closed_loop.py"
_CHAIN_STEPS = f"{_LOOP}::test_a_chain_steps_through_the_training_states"
_TREE_STEPS = f"{_LOOP}::test_every_path_of_a_tree_is_a_chain"
_MERGED = f"{_LOOP}::test_merged_attention_is_the_dense_one -k float64"
_DRAFTS = "tests/unit/test_eagle3.py::test_trees_hold_the_likeliest_candidates"
_SURE = "tests/unit/test_eagle3.py::test_rows_that_have_ended_hold_no_draft_up"
_DEFINITION = (
    "tests/training/test_train_loss.py::test_loss_and_gradient_are_those_of_the_definition"
)

HEADS = (
    Fault(
        "drafting_stands_one_position_too_far",
        "trainer/inference skew",
        _HEAD,
        "positions = cache.lengths[:, None] - level * (width - 1)",
        "positions = cache.lengths[:, None] - level * (width - 1) + 1",
        _TREE_STEPS,
    ),
    Fault(
        "training_never_moves_on",
        "trainer/inference skew",
        _HEAD,
        "turn = self._rotary(slice(step, step + length),",
        "turn = self._rotary(slice(length),",
        _CHAIN_STEPS,
    ),
    Fault(
        "feedback_after_the_norm_always",
        "trainer/inference skew",
        _HEAD,
        "state.hidden = normed if self.config.feed_post_norm else out",
        "state.hidden = normed",
        _CHAIN_STEPS,
    ),
    Fault(
        "drafted_siblings_see_each_other",
        "tree attention mask",
        _MASKS,
        "own = torch.eye(width, dtype=torch.bool, device=parents.device)",
        "own = torch.ones(width, width, dtype=torch.bool, device=parents.device)",
        _TREE_STEPS,
    ),
    Fault(
        "drafted_levels_stay_in_the_cache",
        "rollback",
        _HEAD,
        "state.cache.set_lengths(state.verified)\n        state.seen, state.levels",
        "state.seen, state.levels",
        _TREE_STEPS,
    ),
    Fault(
        "a_row_that_stands_still_forgets_its_place",
        "ragged batches",
        _HEAD,
        "state.root = out if ends is None else torch.where(ends > 0, out, state.root)",
        "state.root = out",
        f"{_LOOP}::test_a_prompt_in_pieces_is_the_prompt",
    ),
    Fault(
        "a_short_row_hangs_on_the_last_slot_of_the_longest",
        "ragged batches",
        _HEAD,
        "index = (ends - 1).clamp(0, residual.shape[1] - 1)",
        "index = (0 * ends + residual.shape[1] - 1)",
        _TREE_STEPS,
    ),
    Fault(
        "the_last_chunk_of_a_prompt_ends_every_row",
        "ragged batches",
        _HEAD,
        "here = ends > 0\n",
        "here = ends > -99\n",
        f"{_LOOP}::test_a_long_prompt_is_taken_in_by_chunks",
    ),
    Fault(
        "drafting_never_takes_the_normed_residual",
        "trainer/inference skew",
        _STEPPED,
        "residual = normed[:, :, 1] if self._normed_residual else hidden",
        "residual = hidden",
        _CHAIN_STEPS,
    ),
    Fault(
        "drafting_norms_keys_as_queries",
        "trainer/inference skew",
        _STEPPED,
        "attention.q_norm.weight, attention.k_norm.weight",
        "attention.q_norm.weight, attention.q_norm.weight",
        _CHAIN_STEPS,
    ),
    Fault(
        "autocast_narrows_inner_products",
        "trainer/inference skew",
        "specdec/heads/eagle3/norm.py",
        "torch.autocast(one.device.type, enabled=False)",
        "torch.autocast(one.device.type, enabled=torch.is_autocast_enabled(one.device.type))",
        f"{_LOOP}::test_autocast_narrows_no_norm_and_no_attention",
    ),
    Fault(
        "drafting_asks_an_accelerator_how_sure_it_is",
        "host sync",
        _GROW,
        'if not self.confidence_threshold or scores_BW.device.type != "cpu":',
        "if not self.confidence_threshold:",
        _SURE,
    ),
    Fault(
        "rows_that_have_ended_hold_drafts_up",
        "ragged batches",
        _GROW,
        "scores_BW = scores_BW[torch.tensor(drafting)]",
        "scores_BW = scores_BW[:]",
        _SURE,
    ),
    Fault(
        "autocast_reaches_the_draft_head",
        "trainer/inference skew",
        _DRAFTER,
        "if not torch.is_autocast_enabled(kind):",
        "if True:",
        "tests/hf/test_wrappers.py::test_autocast_is_not_the_draft_heads",
    ),
    Fault(
        "the_second_best_of_a_level_is_continued",
        "beam",
        _GROW,
        "scores, best = every.topk(beam)",
        "scores, best = (found[:, -beam:] for found in every.topk(beam + 1))",
        _DRAFTS,
    ),
    Fault(
        "draft_ids_are_taken_for_target_ids",
        "d2t absolute or missing",
        _HEAD,
        "return draft_ids if self.d2t is None else self.d2t.take(draft_ids).add_(draft_ids)",
        "return draft_ids",
        _DRAFTS,
    ),
    Fault(
        "the_features_of_the_nodes_before",
        "features off by one",
        _DRAFTER,
        "nodes = pad(path, (1, 0))[:, :, None]",
        "nodes = pad(path, (0, 1))[:, :, None]",
        "tests/training/test_train_run.py::test_four_texts_learnt_by_heart_are_drafted_whole",
    ),
    Fault(
        "a_level_is_scored_by_itself",
        "tree scores",
        _GROW,
        "every = (scores[:, :, None] + below).flatten(1)",
        "every = below.flatten(1)",
        _DRAFTS,
    ),
    Fault(
        "children_hang_under_another_candidate",
        "parents after reordering",
        _GROW,
        "rank.gather(1, above.clamp(min=0)) + 1)",
        "rank.gather(1, above.clamp(min=0)))",
        _DRAFTS,
    ),
    Fault(
        "the_diagonal_weighs_nothing",
        "TTT attention",
        _TTT,
        "block_lse, lse = lse, torch.logsumexp(torch.stack([lse, *scores]), 0)",
        "block_lse = lse",
        _MERGED,
    ),
    Fault(
        "the_diagonal_has_no_gradient",
        "TTT attention",
        _TTT,
        "d_query.addcmul_(d_score, layout.every(wide(key)))",
        "d_query.addcmul_(d_score, torch.zeros_like(query))",
        _MERGED,
    ),
    Fault(
        "labels_one_slot_too_early",
        "loss mask not shifted with labels",
        f"{_OBJECTIVE}/losses.py",
        "(position - 1 - step).clamp(min=0)",
        "(position - 2 - step).clamp(min=0)",
        _DEFINITION,
    ),
    Fault(
        "tokens_that_cannot_be_drafted_are_learnt",
        "draft vocabulary",
        f"{_OBJECTIVE}/teacher.py",
        "weight = (reached & valid).float()",
        "weight = reached.float()",
        _DEFINITION,
    ),
    Fault(
        "the_damaged_newest_checkpoint_is_trusted",
        "truncated newest is trusted",
        _STORE,
        "if digest_of(folder / name) != wanted:",
        "if False:",
        "tests/training/test_checkpoints.py::test_every_damage_of_every_file_is_noticed",
    ),
    Fault(
        "the_schedule_begins_before_the_first_step",
        "warm-up by time is over before there are steps",
        _CLOCK,
        "self.begun = self.elapsed",
        "self.begun = 0.0",
        "tests/training/test_train_run.py::test_the_schedule_waits_for_the_first_measurement",
    ),
    Fault(
        "a_run_that_lost_its_checkpoints_is_overwritten",
        "a finished head is lost without a word",
        "draft_training/specdec_training/run/trainer.py",
        "refuse_lost_run(folder, damaged=not self._store.is_empty)",
        "pass",
        "tests/training/test_train_command.py::test_a_run_without_its_checkpoints_is_not_overwritten",
    ),
    Fault(
        "layers_are_looked_at_when_the_head_is_written",
        "a run fails at its end for what was known at its start",
        "draft_training/specdec_training/features/layers.py",
        'check_layers(layers, count, "--taps")',
        "pass",
        "tests/training/test_train_command.py::test_what_cannot_be_used_is_refused_before_anything_is_written",
    ),
)
