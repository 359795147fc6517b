"""Faults in chain mode: snapshots, re-feeding, and models that only take one path a row."""

from mutants.fault import Fault

_TARGET, _CACHE, _STEPS = (
    "specdec/targets/chain_target.py",
    "specdec/caches/state_cache.py",
    "specdec/hf/steps.py",
)
_TEXT = "tests/laws/test_text.py::test_fp64 -k 'qwen3_5 and oracle and greedy or bloom and oracle and greedy'"  # noqa: E501

CHAIN: tuple[Fault, ...] = (
    Fault(
        "a_state_keeps_rejected_tokens",
        "cache rollback keeps rejected rows or trims too many",
        _CACHE,
        "                        tensor[back] = held[name][index][back]",
        "                        pass",
        "tests/unit/test_state_cache.py",
    ),
    Fault(
        "a_state_is_remembered_by_reference",
        "cache rollback keeps rejected rows or trims too many",
        _CACHE,
        "return {key: v.clone() if isinstance(v, Tensor) else v for key, v in states.items()}",
        "return dict(states)",
        "tests/unit/test_state_cache.py",
    ),
    Fault(
        "nothing_is_fed_again",
        "recurrent / hybrid / static / quantised caches",
        _TARGET,
        "            len(tokens) - 1 - covered if active else 0",
        "            0",
        _TEXT,
    ),
    Fault(
        "a_filled_row_advances_its_state",
        "recurrent / hybrid / static / quantised caches",
        _TARGET,
        "            right = [count if count == self._fed else 0 for count in right]",
        "            right = [self._fed if count else 0 for count in right]",
        _TEXT,
    ),
    Fault(
        "rows_are_not_aligned_again",
        "per-row acceptance differs in a batch",
        _CACHE,
        "        into = moved.select(row_dim, row).narrow(dim, width - held, held)",
        "        into = moved.select(row_dim, row).narrow(dim, 0, held)",
        "tests/unit/test_state_cache.py",
    ),
    Fault(
        "padding_in_front_is_seen",
        "left padding / position ids",
        _CACHE,
        "        return (slots >= torch.tensor(self.padding, device=device)[:, None]).long()",
        "        return (slots >= 0 * torch.tensor(self.padding, device=device)[:, None]).long()",
        _TEXT,
    ),
    Fault(
        "positions_forget_what_was_emitted",
        "position ids in the tree (depth vs index)",
        _TARGET,
        "start = known[..., -1] + 1 + torch.tensor(fed, device=known.device)",
        "start = known[..., -1] + 1 + 0 * torch.tensor(fed, device=known.device)",
        _TEXT,
    ),
    Fault(
        "logits_of_another_row_that_lags",
        "logprobs / scores of the wrong row",
        _TARGET,
        "first = torch.tensor(missing, device=logits.device) - min(missing)",
        "first = 0 * torch.tensor(missing, device=logits.device)",
        _TEXT,
    ),
    Fault(
        "fed_again_in_the_wrong_place",
        "draft input shift at prefill / chunk borders / prefix reuse",
        _TARGET,
        "            row[covered : covered + count] + [0] * (again - count)",
        "            row[covered + 1 : covered + count + 1] + [0] * (again - count)",
        _TEXT,
    ),
    Fault(
        "an_exception_leaves_the_state_ahead",
        "state leaks between calls",
        _TARGET,
        "        self.cache.put_back()",
        "        pass",
        "tests/laws/test_chain.py -k failure",
    ),
    Fault(
        "the_budget_does_not_pay_for_what_is_fed_again",
        "budget overshoot",
        "specdec/loop.py",
        "budget = max(min(budget, self.drafter.max_nodes) - target.refeed, 0)",
        "budget = min(budget, self.drafter.max_nodes)",
        "tests/laws/test_chain.py -k budget",
    ),
    Fault(
        "the_returned_cache_is_not_settled",
        "recurrent / hybrid / static / quantised caches",
        "specdec/generate/result.py",
        "[tail[:-1] for tail in tails], any(call.wanted)",
        "[], any(call.wanted)",
        "tests/hf/test_chain_caches.py -k returned",
    ),
    Fault(
        "a_models_own_count_of_logits_stands",
        "logprobs / scores of the wrong row",
        _STEPS,
        '        inputs["logits_to_keep"] = heads',
        "        pass",
        "tests/laws/test_text.py::test_fp64 -k 'falcon_h1 and oracle and greedy' -m ''",
    ),
)
