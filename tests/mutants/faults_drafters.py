"""Faults in drafters and their sources, and in the rule for half precision.

A drafter cannot change the text, so what counts here is what it may break around it: lists that are
not its own, roots that are not pending, budgets, and the sources' own promises.
"""

from mutants.fault import Fault

_BASE, _INDEX = "specdec/drafters/row.py", "specdec/sources/ngram_index.py"
_POOL, _EXACTNESS = "specdec/sources/ngram_pool.py", "specdec/audit/exactness.py"

DRAFTERS: tuple[Fault, ...] = (
    Fault(
        "a_drafter_is_given_the_loops_own_list",
        "a drafter changes the text",
        _BASE,
        "self.rows.append(self.Row(list(tokens), self))",
        "self.rows.append(self.Row(tokens, self))",
        "tests/hf/test_attacks.py::test_a_drafter_owns_what_it_is_given",
    ),
    Fault(
        "a_tree_may_hang_below_any_token",
        "a drafter changes the text",
        _BASE,
        "tree.tokens[0] != pending",
        "len(tree) == 0",
        "tests/laws/test_drafter_mistakes.py",
    ),
    Fault(
        "a_tree_may_be_one_node_larger_than_the_budget",
        "budget overshoot",
        _BASE,
        "return tree.limited(budget + 1, state.room(index), state.vocab_size)",
        "return tree.limited(budget + 2, state.room(index), state.vocab_size)",
        "tests/laws/test_text.py::test_budgets -k 'gemma3-oracle'",
    ),
    Fault(
        "the_suffix_finds_itself",
        "sources",
        _INDEX,
        "range(self._indexed + 1, len(self._text))",
        "range(self._indexed + 1, len(self._text) + 1)",
        "tests/unit/test_sources.py",
    ),
    Fault(
        "the_pool_forgets_its_newest_guess",
        "sources",
        _POOL,
        "for oldest in list(entries)[: len(entries) - self._guesses]:",
        "for oldest in list(entries)[self._guesses :]:",
        "tests/unit/test_sources.py",
    ),
    Fault(
        "a_shared_pool_is_read_while_it_is_written",
        "calls in threads",
        _POOL,
        "for oldest in list(entries)[: len(entries) - self._guesses]:\n"
        "                entries.pop(oldest, None)",
        "for _ in range(1):\n                del entries[next(iter(entries))]",
        "tests/unit/test_shared_pool.py::test_another_writer_in_the_middle_of_an_entry",
    ),
    Fault(
        "near_ties_are_judged_too_kindly",
        "half precision",
        _EXACTNESS,
        "NOISE_FACTOR = 2.0",
        "NOISE_FACTOR = 200.0",
        "tests/unit/test_exactness.py",
    ),
    Fault(
        "the_reference_is_not_exact",
        "half precision",
        _EXACTNESS,
        "return reference.double().eval()",
        "return reference.eval()",
        "tests/unit/test_audit.py",
    ),
)
