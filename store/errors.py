"""The errors a user can act on: one line that says what is wrong, where, and what to do."""


class PrepError(Exception):
    """Bad input or a failed check; the message is one line and the command line exits with code 2."""


class StoreError(PrepError):
    """A store is missing, incomplete, damaged or holds something else than was asked of it."""
