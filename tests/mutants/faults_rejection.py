"""Faults in rejection sampling: the draft's law, acceptance and the residual."""

from mutants.fault import Fault

_REJECTION, _PICKERS = "specdec/round/rejection.py", "specdec/round/pickers.py"
_NOISE = "specdec/round/noise.py"
_TESTS = "tests/unit/test_rejection.py"

REJECTION: tuple[Fault, ...] = (
    Fault(
        "a_draft_always_stands",
        "greedy accept by p >= q instead of argmax",
        _REJECTION,
        "    stands = uniforms < acceptance(target_law, draft_law, drafted)",
        "    stands = drafted >= 0",
        _TESTS,
    ),
    Fault(
        "a_rejected_token_is_replaced_from_p",
        "residual wrong or zero-sum",
        _REJECTION,
        "    return torch.where(left.sum(-1, keepdim=True) > 0, left, target_law)",
        "    return target_law + 0 * left",
        _TESTS,
    ),
    Fault(
        "nothing_left_gives_no_number",
        "residual wrong or zero-sum",
        _REJECTION,
        "    return torch.where(left.sum(-1, keepdim=True) > 0, left, target_law)",
        "    return left / left.sum(-1, keepdim=True)",
        _TESTS,
    ),
    Fault(
        "the_law_of_the_next_draft",
        "q is not the law the draft was sampled from",
        _REJECTION,
        "    return drafted, trees.draft_law.roll(-1, 1)",
        "    return drafted, trees.draft_law",
        _TESTS,
    ),
    Fault(
        "the_bonus_is_drawn_as_a_replacement",
        "bonus from the wrong row",
        _REJECTION,
        "    proposed = torch.where((drafted >= 0)[..., None], draft_law, 0)",
        "    proposed = draft_law",
        _TESTS,
    ),
    Fault(
        "the_law_before_the_processors",
        "sampling parameters applied to draft/target inconsistently",
        _PICKERS,
        "            law = rejection.law_of(scores)",
        "            law = rejection.law_of(logits.float())",
        _TESTS,
    ),
    Fault(
        "the_tape_is_never_left",
        "seed ignored / shared RNG / depends on batch",
        _NOISE,
        "        self._left = True\n        self._states.clear()",
        "        pass",
        _TESTS,
    ),
)
