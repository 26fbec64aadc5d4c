"""The error for mistakes that a user can fix."""


class UserError(ValueError):
    """Wrong input. The message names the value, what was expected and what to do.

    The command line prints the message without a traceback.
    """
