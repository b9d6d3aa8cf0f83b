# SPDX-License-Identifier: Apache-2.0
"""Compile kernels, or load them from CuPy's cache folder; in several processes, since NVRTC is serial within one.

The other processes compile into the cache folder, from which this one loads. They are started when a first kernel was
not in the folder, take kernels from the end of the list while this process goes on from its beginning, and see no GPU.
What they do not manage, this process does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from cupy_router import compiler, kernel_cache, kernel_log
from cupy_router.kernel_log import KernelReady
from cupy_router.kernel_plan import Wanted

Progress = Callable[[int, int], object]

MOST = 8  # processes, unless more are asked for
PATIENCE = 120.0  # seconds for the last kernel of each process
_REPLY = "cupy_router: "


def make_ready(
    wanted: Sequence[Wanted], device: tuple[str, int], progress: Progress | None = None, workers: int | None = None
) -> tuple[KernelReady, ...]:
    """Compile kernels, or load them from the cache folder, and return those that were not ready.

    workers: the number of processes, this one included; by default one for each CPU, at most 8.
    """
    ready: list[KernelReady] = []
    report = progress or (lambda done, total: None)
    workers = min(MOST, _cpus()) if workers is None else workers
    todo = deque(wanted)
    others: Workers | None = None
    done = 0

    def load(one: Wanted) -> None:
        nonlocal done
        compiler.compile(one.kernel, one.function, dict(one.macros), device, dict(one.headers))
        done += 1
        report(done, len(wanted))

    stop = kernel_log.on_compile(ready.append)
    try:
        report(0, len(wanted))
        while (one := _first(todo)) is not None:
            load(one)
            spare = min(workers, len(todo)) - 1
            if others is None and spare > 0 and ready and ready[-1].compiled:
                others = Workers(todo, device, spare)
        for one in others.finish() if others else ():
            load(one)
    finally:
        stop()
        if others:
            others.kill()
    found = {_key(one): one for one in ready}
    milliseconds = others.milliseconds if others else {}
    return tuple(
        replace(found[one], compiled=True, milliseconds=milliseconds[one]) if one in milliseconds else found[one]
        for one in wanted
        if one in found
    )


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _key(one: KernelReady) -> Wanted:
    return Wanted(one.kernel, one.function, one.macros, one.headers)


def _first(todo: deque[Wanted]) -> Wanted | None:
    try:
        return todo.popleft()
    except IndexError:  # another thread was faster than a look at the length
        return None


class Workers:
    """Processes that compile the last kernels of a list into the cache folder, each with a thread that feeds it."""

    def __init__(self, todo: deque[Wanted], device: tuple[str, int], count: int) -> None:
        self.milliseconds: dict[Wanted, float] = {}  # of what they compiled
        self._todo = todo
        self._taken: list[Wanted] = []
        self._lock = threading.Lock()
        self._busy: set[subprocess.Popen[str]] = set()
        self._processes: list[subprocess.Popen[str]] = []
        self._threads: list[threading.Thread] = []
        target = _target(device)
        if target is None:
            return
        self._target = target
        self._sources = {one: compiler.expand(one.kernel, one.macros, one.headers) for one in tuple(todo)}
        for _ in range(count):
            try:
                process = _start()
            except OSError:  # too many processes, no memory
                break
            self._processes.append(process)
            self._threads.append(threading.Thread(target=self._feed, args=(process,), daemon=True))
            self._threads[-1].start()

    def finish(self) -> list[Wanted]:
        """Wait for the kernels in work, and return all that were taken from the list."""
        with self._lock:
            idle = [process for process in self._processes if process not in self._busy]
        for process in idle:  # it may not even have started
            process.kill()
        for thread in self._threads:
            thread.join(PATIENCE)
        return self._taken

    def kill(self) -> None:
        for process in self._processes:
            process.kill()

    def _feed(self, process: subprocess.Popen[str]) -> None:
        with process:
            reply = _reply(process)  # that it has started
            while reply is not None and (one := self._last(process)) is not None:
                reply = _reply(process, [self._sources[one], compiler.OPTIONS, *self._target])
                if reply is not None and reply["compiled"]:
                    self.milliseconds[one] = reply["milliseconds"]

    def _last(self, process: subprocess.Popen[str]) -> Wanted | None:
        with self._lock:
            self._busy.discard(process)
            if not self._todo:
                return None
            one = self._todo.pop()
            self._busy.add(process)
            self._taken.append(one)
            return one


def _target(device: tuple[str, int]) -> tuple[str, tuple[str, str]] | None:
    """Return what CuPy compiles for on a device: its architecture and options; None if it keeps nothing in a folder."""
    in_memory = os.environ.get(kernel_cache.IN_MEMORY) == "1"
    if not isinstance(compiler.backend(device[0]), compiler.CudaBackend) or in_memory or not sys.executable:
        return None
    cupy = compiler.require_cuda()
    try:
        with cupy.cuda.Device(device[1]):
            architecture = cupy.cuda.compiler._get_arch()
            return architecture, cupy.cuda.compiler._get_arch_for_options_for_nvrtc(architecture)
    except (AttributeError, TypeError):  # they are not public
        return None


def _start() -> subprocess.Popen[str]:
    """Not by multiprocessing, which would run the user's script once more."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", __name__],
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
    )  # fmt: skip


def _reply(process: subprocess.Popen[str], job: Any = None) -> dict[str, Any] | None:
    """Return the next reply of a process, to a job if there is one; None if it has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if job is not None:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        lines = (line for line in process.stdout if line.startswith(_REPLY))  # imports may print others
        found = next(lines, None)
        return None if found is None else dict(json.loads(found.removeprefix(_REPLY)))
    except (OSError, ValueError):
        return None


# -- The other process -------------------------------------------------------------------------------------------------


class _Log:
    written = False

    def write(self, text: str) -> None:
        self.written = True


class _NotLoaded:
    """In the place of CuPy's module: machine code is kept in the folder before it is loaded, which needs a GPU."""

    def load(self, machine_code: bytes) -> None:
        pass

    def _set_mapping(self, mapping: Any) -> None:
        pass


def main() -> None:
    """Compile one text for each line of the input, into CuPy's cache folder, and say so. Ends with the input."""
    import cupy

    of_cupy = cupy.cuda.compiler
    of_cupy.function = SimpleNamespace(Module=_NotLoaded)
    _say({})
    for line in sys.stdin:
        source, options, architecture, given = json.loads(line)
        of_cupy._get_arch_for_options_for_nvrtc = lambda arch=None, given=tuple(given): given
        log, begin = _Log(), time.perf_counter()
        of_cupy._compile_module_with_cache(source, tuple(options), arch=architecture, log_stream=log)
        _say({"compiled": log.written, "milliseconds": (time.perf_counter() - begin) * 1000})


def _say(reply: dict[str, Any]) -> None:
    sys.stdout.write(f"{_REPLY}{json.dumps(reply)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
