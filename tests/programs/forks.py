"""Copies of this process, which has imported what a program needs: that takes most of the time of a short one."""

import os
import traceback


def fork(work, *arguments, **environment):
    """Do some work in a copy of this process; return its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ.update(environment)
        work(*arguments)
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(child):
    """Wait for a copy; return its status, below zero if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
