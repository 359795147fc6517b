"""Servers of other engines: how they are asked, and how they count what was accepted."""
