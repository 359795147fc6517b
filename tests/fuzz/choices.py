"""What calls are drawn from: values of every option, as source, with how often it is given."""

from __future__ import annotations

from collections.abc import Mapping

from helpers.names import CACHE

Table = Mapping[str, tuple[float, tuple[str, ...]]]
"""Per option, its probability and the source of its values."""

SAMPLING: Table = {
    "temperature": (0.5, ("0.3", "0.7", "1.0", "1.5", "0.01", "1")),
    "top_k": (0.5, ("0", "1", "5", "20", "500")),
    "top_p": (0.3, ("0.9", "0.5", "0.05", "1.0")),
    "min_p": (0.15, ("0.02", "0.2", "1.0")),
    "top_h": (0.04, ("0.4", "0.9")),
    "typical_p": (0.12, ("0.95", "0.3")),
    "epsilon_cutoff": (0.08, ("3e-3", "0.2")),
    "eta_cutoff": (0.08, ("3e-3", "0.2")),
}

PROCESSORS: Table = {
    "repetition_penalty": (0.2, ("1.2", "0.7", "1.05")),
    "no_repeat_ngram_size": (0.15, ("1", "2", "3")),
    "encoder_repetition_penalty": (0.03, ("1.3",)),
    "encoder_no_repeat_ngram_size": (0.03, ("2",)),
    "bad_words_ids": (0.12, ("[[5], [7, 8]]", "[[t] for t in range(20, 40)]", "[[3, 4, 5]]")),
    "sequence_bias": (0.1, ("[[[9], 2.0], [[10, 11], -3.0]]", "{(9,): 2.5, (30, 31): 4.0}")),
    "forced_bos_token_id": (0.06, ("4",)),
    "forced_eos_token_id": (0.08, ("6", "[6, 4]")),
    "suppress_tokens": (0.1, ("[12, 13]", "list(range(3, 50))")),
    "begin_suppress_tokens": (0.1, ("[14, 20]", "list(range(40, 90))")),
    "exponential_decay_length_penalty": (0.08, ("(4, 1.3)", "(0, 1.01)")),
    "min_length": (0.08, ("12", "20")),
    "min_new_tokens": (0.12, ("3", "9")),
    "renormalize_logits": (0.12, ("True",)),
    "remove_invalid_values": (0.08, ("True",)),
    "guidance_scale": (0.04, ("1.0", "1.5")),
    "watermarking_config": (0.02, ("WatermarkingConfig(bias=2.5, context_width=1)",)),
    "prefix_allowed_tokens_fn": (
        0.04,
        ("lambda row, ids: list(range(3, 60))", "lambda row, ids: [len(ids) % 90, 7 + row, 40]"),
    ),
}

CUSTOM: Table = {
    "logits_processor": (
        0.1,
        (
            "LogitsProcessorList([Nudge()])",
            "LogitsProcessorList([Banning()])",
            "LogitsProcessorList([Nudge(), Banning()])",
            "LogitsProcessorList([lambda ids, scores: scores - ids[:, :1]])",
            "LogitsProcessorList([FailAt(3)])",
            "[Nudge()]",
        ),
    ),
    "stopping_criteria": (
        0.12,
        (
            "StoppingCriteriaList([EndAt(13)])",
            "StoppingCriteriaList([EndOn(25)])",
            "StoppingCriteriaList([Counting(4)])",
            "StoppingCriteriaList([Unsure(16), EndOn(9)])",
            "StoppingCriteriaList([FailAt(3)])",
            "StoppingCriteriaList([MaxLengthCriteria(17)])",
            "StoppingCriteriaList([EosTokenCriteria(11)])",
            "[EndOn(25)]",
        ),
    ),
    "streamer": (0.12, ("Stream()", "Stream()", "FailAt(3)")),
}

OUTPUTS: Table = {
    "output_scores": (0.35, ("True",)),
    "output_logits": (0.25, ("True",)),
    "output_hidden_states": (0.25, ("True",)),
    "output_attentions": (0.03, ("True",)),
}

CACHES = (
    "DynamicCache()",
    "DynamicCache(config=model.config)",
    "StaticCache(config=model.config, max_cache_len=80)",
    "StaticCache(config=model.config, max_cache_len=30)",
)

OWN_CACHES: Table = {
    "use_cache": (0.06, ("False", "True")),
    "cache_implementation": (
        0.1,
        (
            "'dynamic'",
            "'static'",
            "'hybrid'",
            "'sliding_window'",
            "'hybrid_chunked'",
            "'dynamic_full'",
        ),
    ),
}

REST: Table = {
    "prefill_chunk_size": (0.05, ("1", "3", "8", "100")),
    "synced_gpus": (0.01, ("False",)),
    "disable_compile": (0.02, ("True",)),
    "logits_to_keep": (0.01, ("1", "0")),
    "bos_token_id": (0.02, ("3",)),
    "return_dict": (0.01, ("True",)),
}

OTHER_DECODERS: tuple[Mapping[str, str], ...] = (
    {"num_beams": "2"},
    {"num_beams": "3", "num_return_sequences": "2"},
    {"num_beams": "1"},
    {"prompt_lookup_num_tokens": "3"},
    {"assistant_model": "draft(family, dtype)"},
    {"assistant_early_exit": "1"},
    {"custom_generate": "lambda model, input_ids, **kwargs: input_ids"},
)

INVALID: tuple[Mapping[str, str], ...] = (
    {"temperature": "-1.0"}, {"temperature": "0.0"}, {"temperature": "'hot'"},
    {"top_p": "2.0"}, {"top_k": "-1"}, {"top_k": "1.5"}, {"min_p": "-0.5"}, {"typical_p": "0.0"},
    {"typical_p": "3.0"}, {"epsilon_cutoff": "-0.1"}, {"eta_cutoff": "2.0"},
    {"repetition_penalty": "-1.0"}, {"repetition_penalty": "0"}, {"no_repeat_ngram_size": "-2"},
    {"max_new_tokens": "0"}, {"max_new_tokens": "-3"}, {"max_new_tokens": "'many'"},
    {"max_new_tokens": "None", "max_length": "1"}, {"max_length": "0"}, {"max_new_tokens": "2.5"},
    {"min_length": "-1"}, {"min_new_tokens": "50"}, {"num_beams": "0"},
    {"num_return_sequences": "2", "do_sample": "False"}, {"num_return_sequences": "0"},
    {"bad_words_ids": "[[]]"}, {"bad_words_ids": "[]"}, {"bad_words_ids": "[[-1]]"},
    {"bad_words_ids": "[[200000]]"}, {"sequence_bias": "{}"}, {"sequence_bias": "[[[9], 'much']]"},
    {"sequence_bias": "{(200000,): 2.0}"},
    {"suppress_tokens": "[200000]"}, {"forced_eos_token_id": "200000"}, {"eos_token_id": "-1"},
    {"eos_token_id": "'end'"}, {"eos_token_id": "[]"}, {"eos_token_id": "torch.tensor([5, 9])"},
    {"pad_token_id": "-1"}, {"pad_token_id": "200000"}, {"eos_token_id": "1.5"},
    {"stop_strings": "'a'"}, {"stop_strings": "[]", "tokenizer": "tokenizer_of(family)"},
    {"stop_strings": "['']", "tokenizer": "tokenizer_of(family)"},
    {"input_ids": "torch.zeros(1, 0, dtype=torch.long)"}, {"input_ids": "torch.tensor([3, 4, 5])"},
    {"input_ids": "torch.tensor([[[3, 4, 5]]])"}, {"input_ids": "torch.tensor([[3.0, 4.0]])"},
    {"input_ids": "torch.tensor([[3, 200000]])"}, {"input_ids": "torch.tensor([[3, -1]])"},
    {"input_ids": "[[3, 4, 5]]"}, {"input_ids": "torch.tensor([[3, 4]], dtype=torch.int32)"},
    {"input_ids": "None"}, {"input_ids": "torch.zeros(0, 4, dtype=torch.long)"},
    {"inputs": "rows(1, [4])", "input_ids": "rows(1, [4])"},
    {"inputs_embeds": "torch.zeros(1, 4, 7)"},
    {"attention_mask": "torch.ones(1, 3)"}, {"attention_mask": "torch.zeros(1, 5).long()"},
    {"attention_mask": "torch.ones(1, 1, 5, 5)"}, {"attention_mask": "'all'"},
    {"position_ids": "torch.arange(3)"}, {"position_ids": "torch.zeros(1, 40).long()"},
    {CACHE: "()"}, {CACHE: "((torch.zeros(1), torch.zeros(1)),)"},
    {CACHE: "'cache'"}, {"cache_implementation": "'nonsense'"},
    {"cache_implementation": "'static'", CACHE: "DynamicCache()"},
    {"generation_config": "'greedy'"}, {"generation_config": "{}"},
    {"logits_processor": "Nudge()"}, {"logits_processor": "[5]"}, {"stopping_criteria": "EndAt(9)"},
    {"stopping_criteria": "[5]"}, {"streamer": "5"}, {"streamer": "Stream()", "num_beams": "2"},
    {"no_such_option": "1"}, {"pixel_values": "torch.zeros(1)"}, {"token_type_ids": "rows(1, [4])"},
    {"prefix_allowed_tokens_fn": "lambda row, ids: []"}, {"prefix_allowed_tokens_fn": "5"},
    {"prefill_chunk_size": "0"}, {"prefill_chunk_size": "-4"}, {"use_cache": "'yes'"},
    {"do_sample": "'yes'"}, {"return_dict_in_generate": "None"}, {"output_scores": "5"},
    {"exponential_decay_length_penalty": "(1,)"}, {"exponential_decay_length_penalty": "5"},
    {"guidance_scale": "0.5"}, {"watermarking_config": "5"}, {"renormalize_logits": "5"},
    {"max_time": "-1.0"}, {"custom_generate": "5"}, {"assistant_model": "5"},
)  # fmt: skip

CONFIGURED = {
    *SAMPLING, *PROCESSORS, *OUTPUTS, *OWN_CACHES, "do_sample", "max_new_tokens", "max_length",
    "eos_token_id", "pad_token_id", "stop_strings", "num_return_sequences", "num_beams",
    "return_dict_in_generate", "prefill_chunk_size", "prompt_lookup_num_tokens", "min_length",
} - {"prefix_allowed_tokens_fn"}  # fmt: skip
"""Options that a `GenerationConfig` holds."""

STOPS = ("'A'", "['AB', 'x', '9']", "['q', 'Z', 'm', '(', ')', '!']")
DEMO_STOPS = ("'\\n\\n'", "['self.', 'return']", "[')', '=', ':']", "'zzzz'")

_SEED = (0.2, ("1", "7"))
_DRAFT, _HEAD = (1.0, ("draft(family, dtype)",)), (1.0, ("head(family, dtype)",))

TOLD: Table = {"truth": (1.0, ("truth",)), "lie_every": (0.7, ("5", "3", "1000"))}
"""Options of the drafters that are told the text."""

METHODS: Mapping[str, Table] = {
    "none": {},
    "lookahead": {
        "window": (0.7, ("1", "2", "4", "15")), "ngram": (0.7, ("2", "3", "5")),
        "guesses": (0.7, ("1", "4", "9")), "pool_from_prompt": (0.3, ("False",)),
        "extend_guesses": (0.3, ("False",)), "harvest": (0.3, ("False",)),
        "keep_pool": (0.4, ("True",)), "seed": _SEED,
    },
    "jacobi": {
        "block": (0.7, ("1", "6", "16")), "recycle": (0.7, ("0", "2")),
        "ngram": (0.7, ("2", "4")), "seed": _SEED,
    },
    "prompt_lookup": {
        "max_ngram": (0.5, ("1", "3")), "num_draft_tokens": (0.7, ("1", "4", "20")),
        "tokens_per_match": (0.5, ("1", "5")),
    },
    "suffix": {
        "max_depth": (0.5, ("4", "12")), "max_nodes": (0.5, ("3", "20")),
        "nodes_per_match": (0.5, ("1.0", "8.0")), "min_probability": (0.5, ("1e-6", "0.5")),
    },
    "draft_model": {
        "draft": _DRAFT, "num_draft_tokens": (0.7, ("1", "3", "8")),
        "top_k": (0.6, ("1", "2", "4")), "beam": (0.4, ("2",)), "nodes": (0.3, ("3",)),
    },
    "eagle3": {
        "draft": _HEAD, "depth": (0.7, ("1", "3")), "top_k": (0.7, ("1", "3")),
        "nodes": (0.7, ("3", "9")), "confidence_threshold": (0.2, ("0.01",)),
    },
    "recycling": {
        "top_k": (0.7, ("1", "3")), "nodes": (0.7, ("4", "12")), "depth": (0.5, ("2", "5")),
        "from_prompt": (0.3, ("False",)), "keep_matrix": (0.4, ("True",)),
    },
    "device_bigrams": TOLD,
}  # fmt: skip
"""Every method and its options; those of one that is registered later are its defaults."""
