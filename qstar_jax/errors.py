"""Errors that speak to the user."""


class InputError(ValueError):
    """A file, an option or a model cannot be used; the message names it, what was found, what was expected, the fix.

    The command line prints the message alone (no traceback) and exits with 2.
    """
