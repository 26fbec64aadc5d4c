"""The error that a user can mend."""


class UserError(ValueError):
    """Wrong input. The message names the value, what was expected and what to do; the command line prints it alone."""
