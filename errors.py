"""The errors a user can act on: one line that says what is wrong, where, and what to do."""


class PrepError(Exception):
    """Bad input or a failed check; the message is one line. silent: another process of the job says it."""

    exit_code = 2  # of the command line
    silent = False


class StoreError(PrepError):
    """A store is missing, incomplete, damaged or holds something else than was asked of it."""
