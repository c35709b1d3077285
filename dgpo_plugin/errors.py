"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """Bad input. Its text is one line that says what is wrong, where, and what to do.

    The command lines print it without a traceback and exit with code 2.
    """


class Stopped(Exception):
    """A run was told to stop, and did, with everything saved; the message says how to go on."""


class StopNow(Exception):
    """Raised inside an iteration, by whoever watches a run, to end it there; what was done before it is saved."""
