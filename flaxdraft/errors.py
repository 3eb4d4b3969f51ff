"""The one exception that means: the user can mend this."""


class InputError(ValueError):
    """Wrong input: the message names the file or field, what was found, and what would be right.

    Command lines print the message alone and exit with code 2; a traceback is kept for real bugs.
    """
