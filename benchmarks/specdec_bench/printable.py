"""Text that others wrote, made safe for a terminal."""


def printable(text: str) -> str:
    """`text` without what would move the cursor, change colours or turn the direction of reading.

    Names come from prompt files, and errors from servers.
    """
    return "".join(c if c == "\n" or c.isprintable() else "\ufffd" for c in text)
