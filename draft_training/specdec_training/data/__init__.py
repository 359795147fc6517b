"""Rows in, prepared data out: conversations, tokens, loss masks, and what is wrong with them."""
