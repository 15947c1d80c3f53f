"""Copies of this process, which has imported what a program needs: that takes most of the time of a short one."""

import os
import socket
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


def torchrun(processes, work, *arguments):
    """Do some work in so many copies, which find each other as torchrun would have it; return how each ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    group |= {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return [ended(child) for child in [fork(work, *arguments, **group, **rank) for rank in ranks]]
