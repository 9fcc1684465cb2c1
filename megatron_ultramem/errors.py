"""The errors that a user is meant to read: raised with one clear message, printed by the CLI without a traceback."""


class UserError(Exception):
    """Something the user can put right. The message names the setting or file, its value, and what would be legal."""


class ConfigError(UserError, ValueError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another one."""


class DataError(UserError):
    """Training data is missing, damaged, or does not fit the tokenizer or the model."""


class CheckpointError(UserError):
    """A checkpoint cannot be written, is missing or damaged, or belongs to another model."""


class TrainingError(UserError):
    """Training cannot go on (for example a loss that is not finite)."""
