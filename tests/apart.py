"""Functions in processes of their own: copies of one that has imported what takes long, but nothing of this library."""

import contextlib
import io
import multiprocessing
import os
import sys
import traceback
import warnings

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["torch.distributed.fsdp", "timm", "peft", "transformers.models.llama.modeling_llama"]
)
_LONG = 600  # seconds
OF_THE_HUB = {"huggingface_hub", "accelerate", "datasets", "peft", "timm", "transformers"}


def killed(function, *arguments, when=None):
    """Start a function of a module, and kill it at some moment, unless it kills itself; return how it ended."""
    process = _processes.Process(target=function, args=arguments)
    process.start()
    if when is not None:
        when()
        process.kill()
    process.join(_LONG)
    return process.exitcode


def apart(function, *arguments):
    """Return what a function of a module returns in a process of its own; raise if it fails."""
    answer, send = _processes.Pipe(duplex=False)
    process = _processes.Process(target=_answered, args=(send, function, arguments))
    process.start()
    send.close()
    try:
        value, error = answer.recv() if answer.poll(_LONG) else (None, "it does not end")
    finally:
        process.kill()
        process.join()
    assert error is None, error
    return value


def _answered(send, function, arguments):
    try:
        answer = function(*arguments), None
    except BaseException:
        answer = None, traceback.format_exc()
    send.send(answer)


def printed(code, folder=".", paths=(), **hub):
    """Return what a script prints, and what it says of warnings, run in a folder, with these places to import from.

    With variables of the Hub it has these alone, and imports afresh what reads them.
    """
    return apart(_run, code, str(folder), [str(path) for path in paths], hub)


def _run(code, folder, paths, hub):
    assert not any(name.partition(".")[0] == "residual_steer" for name in sys.modules)
    if hub:
        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
            del os.environ[name]
        os.environ.update(hub, NO_PROXY="127.0.0.1", HF_HUB_DISABLE_TELEMETRY="1")
        for name in [name for name in sys.modules if name.partition(".")[0] in OF_THE_HUB]:
            del sys.modules[name]
    os.chdir(folder)
    sys.path[:0] = paths
    warnings.simplefilter("always")
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        exec(code, {"__name__": "__main__"})
    return out.getvalue(), errors.getvalue()
