"""Exceptions that end a command with one message."""


class InputError(ValueError):
    """Wrong input: the message names the file or field, what was found, and what would be right.

    Command lines print the message alone and exit with code 2; a traceback is kept for real bugs.
    """


class WrongAnswersError(Exception):
    """Answers with a draft are not the target's own. Everything is finished and written before it is raised; command
    lines print the message and exit with code 1.
    """
