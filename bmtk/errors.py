"""Errors that a user can mend, told apart from faults of our own."""


class UserError(ValueError):
    """Bad input: a setting, file, row or model that the message names, with what is allowed and the remedy.

    The recipes and the command show its message as one line and exit with status 1.  Every other exception keeps its
    traceback, because it is a fault of bmtk.
    """
