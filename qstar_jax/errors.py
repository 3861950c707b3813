"""Errors that speak to the user."""


class InputError(ValueError):
    """The user's file, option or model cannot be used; the message names it, what was found, what was expected, the fix.

    The command line prints the message alone (no traceback) and exits with 2.
    """
