"""Functions in processes of their own: copies of one that has imported what takes long, but nothing of this library."""

import contextlib
import io
import multiprocessing
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["torch.distributed.fsdp", "timm", "peft", "transformers.models.llama.modeling_llama"]
)


def started(function, *arguments):
    """Start a function of a module; return its process, which can be killed."""
    process = _processes.Process(target=function, args=arguments)
    process.start()
    return process


def apart(function, *arguments):
    """Return what a function of a module returns in a process of its own, or raise what it raises."""
    with ProcessPoolExecutor(1, mp_context=_processes) as pool:
        return pool.submit(function, *arguments).result(timeout=600)


def printed(code, folder=".", paths=()):
    """Return what a script prints, and what it says of warnings, run in a folder, with these places to import from."""
    return apart(_run, code, str(folder), [str(path) for path in paths])


def _run(code, folder, paths):
    assert not any(name.partition(".")[0] == "residual_steer" for name in sys.modules)
    os.chdir(folder)
    sys.path[:0] = paths
    warnings.simplefilter("always")
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        exec(code, {"__name__": "__main__"})
    return out.getvalue(), errors.getvalue()
