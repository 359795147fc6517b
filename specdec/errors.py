"""What the library raises and warns with: what was wrong, the value, and what to do."""


class SpecdecError(ValueError):
    """Base of every error that specdec raises on purpose."""


class ConfigError(SpecdecError):
    """An option is unknown or out of range."""


class UnsupportedModelError(SpecdecError):
    """The object is not a decoder-only language model that `generate` can drive."""


class DrafterError(SpecdecError):
    """A drafter broke its contract: malformed tree, token outside the vocabulary."""


class FallbackWarning(UserWarning):
    """This call ran as plain `generate`; the message says why."""
