"""Result files: what a run wrote down, and how it is read again."""
