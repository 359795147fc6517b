"""Training rows: their fields, and which of their tokens are learnt."""

from mutants.fault import Fault

_HERE = "draft_training/specdec_training/data"
_TURNS, _ROWS = f"{_HERE}/turns.py", f"{_HERE}/conversations.py"
_SPANS, _TOKENS, _CHAT = f"{_HERE}/answer_spans.py", f"{_HERE}/token_spans.py", f"{_HERE}/chat.py"
_ANSWERS = f"{_HERE}/regenerate.py"

_FIELDS, _MASKS = "tests/training/test_data_fields.py", "tests/training/test_data_masks.py"
_REFUSED = f"{_FIELDS}::test_what_would_change_the_meaning_is_a_bad_row"
_KEPT = f"{_FIELDS}::test_every_format_gives_its_turns_and_survives_its_column"
_SEEN = f"{_FIELDS}::test_regenerated_answers_see_every_field"

DATA = (
    Fault(
        "unknown_fields_are_dropped_in_silence",
        "a field of a row that changes its meaning is dropped",
        _TURNS,
        "(name in BOOKKEEPING or name.startswith",
        "(name not in () or name.startswith",
        _REFUSED,
    ),
    Fault(
        "fields_of_a_turn_are_dropped",
        "a field of a row that changes its meaning is dropped",
        _TURNS,
        'turn = Turn(role, text, tuple(_fields(rest, f"a turn of {role}").items()), weight)',
        'turn = Turn(role, text, tuple(_fields(rest, f"a turn of {role}").items())[:0], weight)',
        _KEPT,
    ),
    Fault(
        "answers_of_weight_zero_are_learnt",
        "a field of a row that changes its meaning is dropped",
        _TURNS,
        'return self.role == "assistant" and self.weight == 1',
        'return self.role == "assistant"',
        f"{_FIELDS}::test_an_answer_of_weight_zero_is_context",
    ),
    Fault(
        "weights_do_not_survive_the_column",
        "a field of a row that changes its meaning is dropped",
        _TURNS,
        'return whole if self.weight == 1 else whole | {"weight": self.weight}',
        "return whole",
        _KEPT,
    ),
    Fault(
        "a_second_system_prompt_wins",
        "a field of a row that changes its meaning is dropped",
        _ROWS,
        "if len({text.strip() for text in texts}) > 1:",
        "if len({text.strip() for text in texts}) > 2:",
        _REFUSED,
    ),
    Fault(
        "what_the_template_leaves_out_is_not_noticed",
        "a field of a row that changes its meaning is dropped",
        _SPANS,
        "if name in links or self._shows(self._without(index, name)):",
        "if name in links or self._shows(replace(self, turns=self.turns[:0])):",
        f"{_FIELDS}::test_fields_that_the_template_leaves_out_are_bad_by_name",
    ),
    Fault(
        "thoughts_that_the_whole_text_lacks_count_as_learnt",
        "a field of a row that changes its meaning is dropped",
        _SPANS,
        "if index in learnt:",
        "if index in ():",
        f"{_FIELDS}::test_thoughts_that_are_dropped_from_earlier_turns",
    ),
    Fault(
        "tools_are_forgotten_after_the_first_answer",
        "a field of a row that changes its meaning is dropped",
        _ANSWERS,
        "task = Task(key, group, [], messages, tools=row.tools)",
        "task = Task(key, group, [], messages)",
        _SEEN,
    ),
    Fault(
        "a_result_follows_a_call_that_was_not_made",
        "a conversation that contradicts itself",
        _ANSWERS,
        "own = row.messages[this] if row.messages[this].calls_tools else None",
        "own = None",
        _SEEN,
    ),
    Fault(
        "tools_do_not_make_another_question",
        "held-out prompts that were trained on",
        _ROWS,
        "asked: list[Any] = [self.prompt, self.prompt_ids, *self.tools]",
        "asked: list[Any] = [self.prompt, self.prompt_ids]",
        f"{_FIELDS}::test_a_field_makes_another_row",
    ),
    Fault(
        "a_token_holds_the_end_of_an_answer_and_the_next_turn",
        "loss mask",
        _CHAT,
        "cuts = sorted({end for at, end in tokens.torn.items() if mask[at]})",
        "cuts = sorted({end for at, end in tokens.torn.items() if not mask[at]})",
        f"{_MASKS}::test_a_token_never_reaches_from_an_answer_into_what_follows",
    ),
    Fault(
        "spaces_without_offsets_belong_to_what_follows",
        "loss mask",
        _TOKENS,
        "start = min(first, reached) if first == end else first",
        "start = first",
        f"{_MASKS}::test_spaces_that_offsets_leave_out",
    ),
    Fault(
        "only_the_first_byte_of_a_character_is_learnt",
        "loss mask",
        _TOKENS,
        "is_inside = span < len(spans) and end > spans[span][0]",
        "is_inside = span < len(spans) and end > max(spans[span][0], reached - (at == 0))",
        f"{_MASKS}::test_every_byte_of_the_last_character_is_learnt",
    ),
    Fault(
        "spans_of_earlier_turns_count_as_the_last_ones",
        "loss mask",
        _SPANS,
        "found += spans[before:after]",
        "found += spans[after - 1 : after]",
        f"{_MASKS}::test_several_spans_of_a_turn",
    ),
)
