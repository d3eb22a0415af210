"""Standard output for our text alone."""

import os
import sys


def keep_stdout() -> None:
    """Sends what libraries print to standard output to standard error, and keeps `sys.stdout` what it was.

    Gloo, which connects CPUs with each other, announces every connection from C++.
    """
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(ours, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
