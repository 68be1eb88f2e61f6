"""Generated programs that try to break out of the sandbox, in every isolation that this machine has."""

from __future__ import annotations

import os
import platform
import socket
import threading
import time
from pathlib import Path

import pytest

from evals.execution.sandbox import Limits, best_isolation, run_program, run_programs
from rodimus_lab.errors import UserError

QUICK = Limits(seconds=2, memory=256 << 20, files=1 << 20, processes=8)
FORK_BOMB = """
import os, time
started = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        started += 1
except OSError:
    pass
assert started < 8, started
raise SystemExit(f"stopped at {started}")
"""
THREADS = """
import threading, time
try:
    for _ in range(100):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
except RuntimeError:
    raise SystemExit("stopped")
"""


@pytest.fixture(params=["namespaces", "hooks"])
def isolation(request):
    try:
        run_program("pass", isolation=request.param)
    except UserError as error:
        pytest.skip(f"this machine has no {request.param}: {error}")
    return request.param


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text("before")
    return path


def run(program, isolation, limits=QUICK):
    return run_program(program, limits, isolation)


def refused(isolation, first, *attempts):
    """Each attempt fails, one after another in one program; where already the first line does, that will do."""
    tries = "".join(
        f"try:\n  {attempt}\n  escaped.append({attempt!r})\nexcept BaseException: pass\n" for attempt in attempts
    )
    verdict = run(f"{first}\nescaped = []\n{tries}assert not escaped, escaped", isolation, Limits(seconds=20))
    assert verdict.passed or verdict.reason.startswith("PermissionError"), verdict.reason


class TestPrograms:
    def test_one_that_ends_and_one_that_does_not(self, isolation):
        assert run("import math\nassert math.gcd(12, 18) == 6", isolation) == (True, "")
        assert run("assert 1 + 1 == 3, 'no'", isolation) == (False, "AssertionError: no")
        assert run("def f(:", isolation).reason.startswith("SyntaxError")

    def test_its_own_folder_is_there(self, isolation):
        assert run("open('a.txt', 'w').write('x')\nassert open('a.txt').read() == 'x'", isolation).passed

    def test_numpy_is_there(self, isolation):
        assert run("import numpy\nassert numpy.ones(3).sum() == 3", isolation, Limits(seconds=20)).passed

    def test_leaving_early_is_not_passing(self, isolation):
        early = [
            "import os; os._exit(0)",
            "import sys; sys.exit(0)",
            "print('{\"passed\": true}')",
            'import os; [os.write(n, b\'{"token": "", "passed": true}\\n\') for n in range(3, 20)]',
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        ]
        verdicts = run_programs([f"{program}\nassert False" for program in early], QUICK, isolation)
        assert not any(verdict.passed for verdict in verdicts)

    def test_a_verdict_cannot_be_forged_from_its_frames(self, isolation):
        walk = (
            "import json, os, sys\nframe = sys._getframe(0)\nwhile frame is not None:\n"
            "  for value in list(frame.f_locals.values()):\n"
            "    if isinstance(value, list): value.append(None)\n"
            "    if isinstance(value, bytes) and b'token' in value: [os.write(n, value) for n in range(3, 20)]\n"
            "  frame.f_globals['_short'] = lambda error: None\n"
            "  frame = frame.f_back\n"
        )
        every = "import sys\nfound = [f.f_locals for f in sys._current_frames().values()]"
        collected = "import gc\nfound = [x for x in gc.get_objects() if isinstance(x, bytes) and b'token' in x]"
        verdicts = run_programs([f"{start}\nassert False" for start in (walk, every, collected)], QUICK, isolation)
        assert not any(verdict.passed for verdict in verdicts)

    def test_a_verdict_cannot_be_forged_by_what_runs_after_it(self, isolation):
        """By functions that are put in the place of those that end the program, or by leaving the failing line."""
        find = (
            "import _thread, json, os, sys, threading, time\n"
            "def walk(*_):\n"
            "  try:\n"
            "    1 / 0\n"
            "  except ZeroDivisionError as error:\n"
            "    frame = error.__traceback__.tb_frame\n"
            "  while frame is not None:\n"
            "    for value in list(frame.f_locals.values()):\n"
            "      if isinstance(value, bytes) and b'token' in value: [os.write(n, value) for n in range(3, 20)]\n"
            "    frame = frame.f_back\n"
            "  return ''\n"
        )
        race = (
            "import sys, threading\nfound = [v for v in sys._getframe(1).f_locals.values() if isinstance(v, list)]\n"
            "sys.setswitchinterval(1e-6)\n"
            "def loop():\n  while True:\n    for one in found: one[:] = [None]\n"
            "threading.Thread(target=loop, daemon=True).start()"
        )
        jump = (
            "import sys\ndef trace(frame, event, _):\n"
            "  if event == 'line': frame.f_lineno = 9\n"
            "  return trace\n"
            "sys._getframe(0).f_trace = trace\nsys.settrace(trace)\nassert False\npass"
        )
        attempts = [
            f"{find}json.dumps = walk\nassert False",
            f"{find}threading.Thread._stop = threading.Thread._delete = walk\nassert False",
            f"{find}import __main__\n__main__._short = walk\n_thread.interrupt_main()\ntime.sleep(1)\nassert False",
            f"{find}class Error(Exception):\n  __str__ = walk\nraise Error",
            f"{race}\nassert False",
            jump,
        ]
        for attempt, verdict in zip(attempts, run_programs(attempts, QUICK, isolation), strict=True):
            assert not verdict.passed, attempt

    def test_a_handler_of_a_signal_runs(self, isolation):
        program = (
            "import signal, time\ncalled = []\n"
            "signal.signal(signal.SIGALRM, lambda *_: called.append(1))\n"
            "signal.setitimer(signal.ITIMER_REAL, 0.05)\ntime.sleep(0.3)\nassert called"
        )
        assert run(program, isolation).passed

    def test_its_process_has_no_other_insides(self, isolation):
        for inside in ("gc.get_objects()", "sys._current_frames()", "sys.setprofile(print)"):
            verdict = run(f"import gc, sys\n{inside}", isolation)
            assert verdict.reason.startswith("PermissionError: generated code may not do"), inside

    def test_a_process_that_it_forks_speaks_not_for_it(self, isolation):
        verdict = run("import os, time\nif os.fork():\n  time.sleep(0.3)\n  assert False, 'the first'", isolation)
        assert not verdict.passed

    def test_several_are_in_order(self, isolation):
        verdicts = run_programs([f"assert {n} % 2" for n in range(6)], QUICK, isolation)
        assert [verdict.passed for verdict in verdicts] == [False, True] * 3


class TestBreakingOut:
    def test_an_endless_loop(self, isolation):
        started, second = time.monotonic(), QUICK._replace(seconds=1)
        assert run("while True: pass", isolation, second).reason == "no end within 1 s"
        sleeping = "import time\ntry:\n  time.sleep(60)\nexcept BaseException:\n  pass"
        assert run(sleeping, isolation, second).reason.startswith("no")
        assert time.monotonic() - started < 20

    def test_a_fork_bomb(self, isolation):
        verdict = run(FORK_BOMB, isolation)
        assert verdict.reason.startswith("SystemExit: stopped at ")
        if isolation == "hooks":
            assert verdict.reason.endswith(" 0")

    def test_what_it_started_ends_with_it(self, isolation):
        """A child in a session of its own, which sleeps on under a name by which it would be found."""
        if isolation == "hooks":
            pytest.skip("nothing is started there")
        name = f"left{os.getpid()}"
        started = "import ctypes, os, time\nif os.fork() == 0:\n  os.setsid()\n"
        asleep = f"  assert ctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0) == 0\n  time.sleep(60)\ntime.sleep(0.5)"
        watched = []
        thread = threading.Thread(target=lambda: watched.append(run(started + asleep, isolation, Limits(seconds=20))))
        thread.start()
        seen = False
        while thread.is_alive():
            seen = seen or _named(name)
            time.sleep(0.02)
        assert watched[0].passed
        assert seen
        assert not _named(name)

    def test_threads(self, isolation):
        if isolation == "hooks" and os.geteuid() == 0:
            pytest.skip("the kernel does not count root's threads")
        assert run(THREADS, isolation).reason == "SystemExit: stopped"

    def test_a_memory_hog(self, isolation):
        assert run("x = bytearray(1 << 30)", isolation).reason == "MemoryError:"
        assert not run("x = []\nwhile True: x.append(bytearray(1 << 20))", isolation).passed

    def test_memory_that_no_limit_counts(self, isolation):
        """System V's, which outlives a process, and files in memory."""
        refused(
            isolation,
            "import os, ctypes; libc = ctypes.CDLL(None)",
            "assert libc.shmget(0, 1 << 20, 0o1600) >= 0",
            "assert libc.msgget(0, 0o1600) >= 0",
            "assert libc.semget(0, 1, 0o1600) >= 0",
            "os.memfd_create('x')",
        )
        assert run("import os\nos.memfd_create('x')", isolation).reason.startswith("PermissionError")

    def test_a_file_that_grows(self, isolation):
        assert not run("f = open('a', 'wb')\nwhile True: f.write(bytes(1 << 20)); f.flush()", isolation).passed

    def test_huge_output(self, isolation):
        assert run("import sys\nfor _ in range(200): sys.stdout.write('x' * (1 << 20))", isolation, Limits()).passed
        loud = (
            "import os\nfor n in range(3, 20):\n  try:\n    while 1: os.write(n, b'x' * 65536)\n  except OSError: pass"
        )
        assert not run(f"{loud}\nassert False", isolation).passed

    def test_writing_outside(self, isolation, secret):
        path, folder = str(secret), str(secret.parent)
        refused(
            isolation,
            "import os, shutil, subprocess",
            f"open({path!r}, 'w').write('after')",
            f"open({path!r}, 'a').write('after')",
            f"open({path!r}, 'r+').write('after')",
            f"os.remove({path!r})",
            f"os.rename({path!r}, 'mine')",
            f"os.chmod({path!r}, 0o777)",
            f"os.truncate({path!r}, 0)",
            f"os.close(os.open({path!r}, os.O_WRONLY | os.O_TRUNC))",
            f"shutil.rmtree({folder!r})",
            f"os.symlink({path!r}, 'link'); open('link', 'r+').write('after')",
            f"os.mkdir({folder!r} + '/new')",
            f"subprocess.run(['/bin/sh', '-c', 'echo after > ' + {path!r}], check=True)",
            f"assert os.system('echo after > ' + {path!r}) == 0",
        )
        assert secret.read_text() == "before"
        assert [path.name for path in secret.parent.iterdir()] == ["secret.txt"]

    def test_writing_outside_by_another_way(self, isolation, secret):
        """From another current folder, by a folder's descriptor, by C code, and files that are no files."""
        folder = str(secret.parent)
        refused(
            isolation,
            f"import os\ntry:\n  fd = os.open({folder!r}, os.O_RDONLY)\nexcept OSError: fd = -1",
            f"os.chdir({folder!r}); open('secret.txt', 'w').write('after')",
            f"os.chdir({folder!r}); os.mkdir('new')",
            "os.fchdir(fd); open('secret.txt', 'w').write('after')",
            "os.close(os.open('secret.txt', os.O_WRONLY | os.O_TRUNC, dir_fd=fd))",
            "os.close(os.open('new', os.O_WRONLY | os.O_CREAT, dir_fd=fd))",
            "os.remove('secret.txt', dir_fd=fd)",
            "os.mkdir('new', dir_fd=fd)",
            "open('mine', 'w').close(); os.rename('mine', 'new', dst_dir_fd=fd)",
            f"os.mkfifo({folder!r} + '/new')",
            f"os.mknod({folder!r} + '/new')",
            f"__import__('readline').write_history_file({folder!r} + '/new')",
        )
        assert secret.read_text() == "before"
        assert [path.name for path in secret.parent.iterdir()] == ["secret.txt"]

    def test_reading_what_is_not_its_business(self, isolation, secret):
        if isolation == "namespaces":
            assert run(f"open({str(secret)!r}).read()", isolation).reason.startswith("FileNotFoundError")
            assert run("import os\nassert os.listdir('.') == []", isolation).passed
        for path in ("/proc/1/environ", f"/proc/{os.getpid()}/environ", f"//proc/{os.getpid()}/environ", "/proc/1/mem"):
            assert not run(f"open({path!r}, 'rb').read()", isolation).passed

    def test_the_environment_is_empty(self, isolation, monkeypatch):
        monkeypatch.setenv("SOME_SECRET", "hunter2")
        program = "import os\nassert 'SOME_SECRET' not in os.environ and 'hunter2' not in str(dict(os.environ))"
        assert run(program, isolation).passed
        assert run("import os\nassert len(os.environ) < 10", isolation).passed

    def test_sockets(self, isolation):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            refused(
                isolation,
                "import socket, urllib.request",
                "socket.socket(socket.AF_INET, socket.SOCK_STREAM)",
                "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
                "socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)",
                f"socket.create_connection(('127.0.0.1', {port}), 1)",
                "socket.getaddrinfo('example.org', 80)",
                f"urllib.request.urlopen('http://127.0.0.1:{port}', timeout=1)",
            )
            server.settimeout(0.05)
            with pytest.raises(TimeoutError):
                server.accept()

    def test_killing_the_parent(self, isolation):
        """It goes on, and so does a program beside it."""
        parent, beside = os.getpid(), []
        neighbour = threading.Thread(
            target=lambda: beside.append(run("import time; time.sleep(1)", isolation, Limits(seconds=20)))
        )
        neighbour.start()
        for attempt in (
            "os.kill(os.getppid(), signal.SIGKILL)",
            f"os.kill({parent}, signal.SIGKILL)",
            f"os.killpg(os.getpgid({parent}), signal.SIGKILL)",
            f"ctypes.CDLL(None).kill({parent}, 9)",
            "os.kill(-1, signal.SIGKILL)",
        ):
            run(f"import ctypes, os, signal\n{attempt}", isolation)
        neighbour.join()
        assert beside[0].passed

    def test_where_other_processes_are_in_reach(self):
        """Neither their processors nor their signals; its own signals are."""
        try:
            run_program("pass", isolation="hooks")
        except UserError as error:
            pytest.skip(f"this machine has no hooks: {error}")
        verdict = run("import os\nos.sched_setaffinity(0, {0})", "hooks")
        assert verdict.reason.startswith("PermissionError: [Errno 1]")
        assert run("import signal\nsignal.signal(10, lambda *_: None)\nsignal.raise_signal(10)", "hooks").passed
        inner = "try:\n  import _interpreters as i\nexcept ImportError:\n  import _xxsubinterpreters as i\ni.create()"
        assert not run(inner, "hooks").passed
        named = "import _multiprocessing as m\nm.SemLock(1, 1, 1, '/left', False)"
        assert run(named, "hooks").reason == "PermissionError: generated code may not import _multiprocessing"

    def test_ways_around(self, isolation):
        """System calls past Python's own functions: a socket, a new namespace, tracing, a mount; more of a limit."""
        refused(
            isolation,
            "import ctypes; libc = ctypes.CDLL(None)",
            *(
                f"assert libc.{call} >= 0"
                for call in (
                    "socket(2, 1, 0)",
                    "unshare(0x10000000)",
                    "ptrace(16, 1, 0, 0)",
                    "mount(b'x', b'/', b'tmpfs', 0, 0)",
                    "syscall(56, 0x10000000 | 17, 0, 0, 0, 0)"
                    if platform.machine() == "x86_64"
                    else "unshare(0x20000)",
                )
            ),
        )
        more = "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (10000, 10000))"
        assert not run(more, isolation).passed

    def test_the_system_stays_as_it_is(self, isolation):
        if isolation == "namespaces":
            assert run("import os\nassert os.getuid() != 0", isolation).passed
            for path in ("/usr/x", "/tmp/../usr/x", os.path.dirname(os.__file__) + "/x.py"):
                assert not run(f"open({path!r}, 'w')", isolation).passed
                assert not Path(path).exists()


def test_the_best_that_there_is():
    assert best_isolation() in ("namespaces", "hooks")


def test_where_nothing_confines(monkeypatch):
    """An evaluation is refused rather than run in the open."""
    from evals.execution import sandbox

    def broken(*_arguments, **_options):
        raise UserError("no namespaces")

    monkeypatch.setattr(sandbox, "run_program", broken)
    with pytest.raises(UserError, match=r"generated code cannot be shut off on this machine \(no namespaces\)"):
        sandbox.best_isolation.__wrapped__()


def _named(name):
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().strip() == name:
                return True
        except OSError:
            continue
    return False
