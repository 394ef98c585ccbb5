"""A process that has imported the libraries, and forks for each command: imports take most of a short command's time.

Ours are imported by each command anew, so that a command that forgets an import still fails.

    python -m tests.warm SOCKET        serve; `shims` writes executables that send their command line to it
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path

LIBRARIES = (
    "torch.export",
    "executorch.exir",
    "transformers.modeling_utils",
    "transformers.models.llama",
    "peft",
    "typer",
)

# Not `python -m tests.warm`: the standard library alone starts in milliseconds.
_SHIM = """#!{python} -SE
import array, json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({path!r})
    request = json.dumps([{name!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(request)
    server.shutdown(socket.SHUT_WR)
    answer = server.recv(1)
sys.exit(answer[0] if answer else "the command's process was killed")
"""


def shims(directory: Path, path: Path, names: tuple[str, ...] = ("mobizo", "python")) -> None:
    """Write executables of these names that run their command line in a fork of the server at `path`."""
    directory.mkdir()
    for name in names:
        shim = directory / name
        shim.write_text(_SHIM.format(python=sys.executable, path=str(path), name=name), encoding="utf-8")
        shim.chmod(0o755)


def freeze_imports() -> None:
    """Collecting garbage takes a seventh of the time: what is imported stays, and graphs are made by the thousand."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 10, 10)


def serve(path: str) -> None:
    """Import the libraries, listen at `path`, and fork for each connection until terminated."""
    for name in LIBRARIES:
        importlib.import_module(name)
    freeze_imports()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                code = 1
                try:
                    code = _run(connection)
                finally:
                    connection.sendall(bytes([code & 0xFF]))
                    os._exit(0)
            connection.close()


def _run(connection: socket.socket) -> int:
    size, descriptors, _, _ = socket.recv_fds(connection, 8, 3)
    request = b""
    while len(request) < int.from_bytes(size, "big"):
        request += connection.recv(1 << 16)
    name, arguments, directory, environment = json.loads(request)
    for place, descriptor in enumerate(descriptors):
        os.dup2(descriptor, place)
    # The streams of the server's own start remember what they were open for.
    sys.stdin, sys.stdout, sys.stderr = (open(place, mode) for place, mode in enumerate("rww"))  # noqa: PTH123, SIM115
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [each for each in environment.get("PYTHONPATH", "").split(os.pathsep) if each not in sys.path]
    try:
        _command(name, arguments)
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException:  # noqa: BLE001  (what Python does with it at the end of a process)
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _command(name: str, arguments: list[str]) -> None:
    if name == "mobizo":
        sys.argv = ["mobizo", *arguments]
        importlib.import_module("mobizo_cli.main").run()
        return
    while arguments[0] == "-W":
        arguments = arguments[2:]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
