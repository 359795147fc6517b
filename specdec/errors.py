"""What the library raises and warns with: what was wrong, the value, and what to do."""


class SpecdecError(ValueError):
    """Base of every error that specdec raises on purpose."""


class ConfigError(SpecdecError):
    """An option is unknown or out of range."""


class UnsupportedModelError(SpecdecError):
    """The object is not a decoder-only language model that `generate` can drive."""


class VocabularyMismatchError(SpecdecError):
    """A draft's token ids do not mean what the target's mean."""


class DrafterError(SpecdecError):
    """A drafter broke its contract: malformed tree, token outside the vocabulary."""


class FallbackWarning(UserWarning):
    """This call ran as plain `generate`; the message says why."""


class UntestedVersionWarning(UserWarning):
    """The installed transformers is newer than any that this version was tested with."""


class DraftWarning(UserWarning):
    """A drafter proposes nothing for some row from here on; the message says why."""


class HeadWarning(UserWarning):
    """A draft head was read with something assumed, or drafts far worse than it promises."""
