"""The errors a user can act on: one line that says what is wrong, where, and what to do."""


class PrepError(Exception):
    """Bad input or a failed check; the message is one line. silent: another process of the job prints it."""

    exit_code = 2  # of the command line
    silent = False


class StoreError(PrepError):
    """A store is missing, incomplete, damaged or holds something else than was asked of it."""


class Interrupted(KeyboardInterrupt):
    """A signal ended a run after its state was stored. Like Ctrl-C, `except Exception` lets it pass.

    exit_code: the shell's for that signal; silent: another process of the job prints the message.
    """

    def __init__(self, message: str, signal: int, silent: bool = False):
        super().__init__(message)
        self.exit_code, self.silent = 128 + signal, silent
