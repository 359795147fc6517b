"""Faults in what fused tree attention is told, and in who is believed to have called it."""

from mutants.fault import Fault

_SEAM, _COMPAT = "specdec/targets/tree_attention.py", "specdec/hf/compat.py"
_LAW = "tests/laws/test_kernels.py"
_CALLS = "tests/hf/test_fused_attention.py"

SEAM: tuple[Fault, ...] = (
    Fault(
        "tree_attention_is_told_a_wider_window",
        "sliding window",
        _COMPAT,
        "return (0, span) if kind == _CHUNKED else (span, 0)",
        "return (0, span) if kind == _CHUNKED else (span and span + 1, 0)",
        f"{_LAW} -k 'test_text and mistral_sw'",
    ),
    Fault(
        "tree_attention_is_told_no_chunk",
        "sliding window",
        _COMPAT,
        "return (0, span) if kind == _CHUNKED else (span, 0)",
        "return (0, 0) if kind == _CHUNKED else (span, 0)",
        f"{_LAW} -k 'test_text and llama4'",
    ),
    Fault(
        "a_placeholder_stands_for_another_layer_type",
        "sliding window",
        _SEAM,
        "return self._spans[shape[3] - 1]",
        "return self._spans[-shape[3]]",
        f"{_LAW} -k 'test_text and gemma3-oracle-greedy-1'",
    ),
    Fault(
        "the_prefix_of_tree_attention_is_one_short",
        "tree mask",
        "specdec/targets/tree_target.py",
        "tree = Tree(words, depth, trees.sizes, cache.lengths)",
        "tree = Tree(words, depth, trees.sizes, cache.lengths - 1)",
        f"{_LAW} -k 'dense_masks and llama and alone'",
    ),
    Fault(
        "calls_of_tree_attention_are_not_counted",
        "tree mask",
        _SEAM,
        "if self.calls < layers:",
        "if self.calls < 0:",
        f"{_LAW} -k who_does_not_ask",
    ),
    Fault(
        "another_thread_is_given_our_attention",
        "tree mask",
        "specdec/hf/attention.py",
        "attend = _own(module, attention_name(module.config))",
        'attend = _own(module, "sdpa")',
        f"{_CALLS} -k another_thread",
    ),
    Fault(
        "the_first_to_finish_takes_the_name_from_all",
        "tree mask",
        "specdec/hf/attention.py",
        "        if not loan.borrowers:\n            config",
        "        if loan.borrowers >= 0:\n            config",
        f"{_CALLS} -k another_thread",
    ),
)
