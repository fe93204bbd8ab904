"""The errors that commands tell in one line. Standard library only, so that what renders or measures needs no yaml to fail."""


class UserError(Exception):
    """Bad input, told in one line: what is wrong, and where. Commands print it and exit with code 2."""


class RunError(Exception):
    """Work that cannot go on though its input was good, told in one line. Commands print it and exit with code 1."""
