"""The process in which a generated program runs. Started as a script by `sandbox.py`; stands on nothing of the project.

An order comes on standard input (JSON: the program, its limits, the isolation); the verdict goes to standard output.
With `namespaces`, the program has a root of its own (the interpreter's folders, read-only, and an empty folder in
memory), no other process in sight and no network interface. With `hooks` it shares the machine's view, and Python's
audit events, and Landlock where the kernel has it, refuse what namespaces would hide. Both run under resource limits
and a filter of system calls. What proves that a program came to its end is out of sight of its own frames.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from collections import deque
from functools import partial
from operator import call
from typing import Any

NEW_NS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = (
    0x20000,
    0x4000000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
MOUNT_SETATTR, PIVOT_ROOT = 442, {"x86_64": 155, "aarch64": 41}
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 22, 38
CAPABILITY_VERSION = 0x20080522
NOBODY = 65534
FIRST_UID = 2_000_000  # Each program has an id of its own, so that one's processes do not count as another's.
# Calls that are refused: sockets, other namespaces and mounts, other processes' memory, and ways around this filter;
# and memory that no limit counts (shmget, msgget, semget, memfd_create, memfd_secret).
REFUSED = {
    "x86_64": (
        41, 53, 425, 272, 308, 165, 428, 429, 430, 101, 310, 311, 298, 321, 250, 248, 249, 303, 304, 323, 438,
        29, 68, 64, 319, 447,
    ),
    "aarch64": (
        198, 199, 425, 97, 268, 40, 428, 429, 430, 117, 270, 271, 241, 280, 219, 217, 218, 264, 265, 282, 438,
        194, 186, 190, 279, 447,
    ),
}  # fmt: skip
# Besides, where nothing hides the other files: mknod, mknodat, openat2.
NODES = {"x86_64": (133, 259, 437), "aarch64": (33, 437)}
# The calls that take a folder's descriptor first (openat, mkdirat, unlinkat, linkat, symlinkat, fchmodat, fchownat),
# and those that take a second one after a name (renameat, renameat2): no folder but the current one is let through.
AT_CALLS = {"x86_64": (257, 258, 263, 265, 266, 268, 260), "aarch64": (56, 34, 35, 37, 36, 53, 54)}
RENAMES = {"x86_64": (264, 316), "aarch64": (38, 276)}
# Landlock's calls (create a set of rules, add one, take it on) and every right to change files in its first version.
LANDLOCK, CHANGING, BENEATH = (444, 445, 446), 0b1111111110010, 1
# Besides, where nothing hides the other processes: kill, tkill, pidfd_send_signal, pidfd_open, setpriority, prlimit64,
# rt_sigqueueinfo, rt_tgsigqueueinfo, ioprio_set, migrate_pages, move_pages, sched_*; fork and vfork.
SIGNALS = {
    "x86_64": (62, 200, 424, 434, 141, 302, 129, 297, 251, 256, 279, 142, 144, 203, 314, 57, 58),
    "aarch64": (129, 130, 424, 434, 140, 261, 138, 240, 30, 238, 239, 118, 119, 122, 274),
}
# tgkill, by which a process also signals itself.
SIGNAL_THREAD = {"x86_64": 234, "aarch64": 131}
CLONE = {"x86_64": 56, "aarch64": 220}
CLONE3, CLONE_THREAD, CLONE_NEW = 435, 0x10000, 0x7E020000
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x50000
EPERM, ENOSYS = 1, 38
LOAD, JUMP_EQUAL, JUMP_ABOVE, JUMP_SET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
DENIED_EVENTS = (
    "socket.",
    "subprocess.",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "os.system",
    "os.kill",
    "pty.",
    "ctypes.",
    "os.chown",
    "os.chmod",
    "os.chflags",
    "os.link",
    "os.symlink",
    "os.mount",
    "os.setxattr",
    "shutil.chown",
    "resource.",
    "sqlite3.",
    "urllib.",
    "http.",
    "ftplib.",
    "smtplib.",
    "syslog.",
    "signal.pthread_kill",
    "sys.addaudithook",
    "cpython.PyInterpreterState_New",
)
# Of Python's own insides, in every isolation: where what knows the proof could be found, or led past a failure.
INSIDES = {
    "sys._current_frames",
    "sys._current_exceptions",
    "sys.settrace",
    "sys.setprofile",
    "sys.monitoring.register_callback",
    "gc.get_objects",
    "gc.get_referrers",
    "gc.get_referents",
}
# Modules whose C code opens files by name without an event.
UNSEEN = {"readline", "_ssl", "_gdbm", "_dbm", "_curses", "_tkinter", "_posixshmem", "_multiprocessing"}
IN_FOLDER = ("os.chdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.utime", "shutil.rmtree")


def main(verdict: int) -> None:
    order = json.loads(sys.stdin.buffer.read())
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    libc = ctypes.CDLL(None, use_errno=True)
    if order["isolation"] == "namespaces":
        _isolate(libc, order)
    elif os.geteuid() == 0 and all(map(_open_to_all, [os.__file__, *order["paths"]])):
        os.chown(order["folder"], FIRST_UID + os.getpid(), -1)
        _become(FIRST_UID + os.getpid())
    os.chdir(order["folder"])
    _limit(libc, order)
    _run(order, verdict)


def _open_to_all(path: str) -> bool:
    while (path := os.path.dirname(path)) != os.path.dirname(path):
        if not os.stat(path).st_mode & 1:
            return False
    return True


def _check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _isolate(libc: Any, order: dict[str, Any]) -> None:
    """Enter new namespaces, as the first process of its own there; returns in a child of that process."""
    root = os.geteuid() == 0 and libc.unshare(NEW_NS | NEW_UTS | NEW_IPC | NEW_PID | NEW_NET) == 0
    if not root:
        user, group = os.geteuid(), os.getegid()
        _check(libc.unshare(NEW_USER | NEW_NS | NEW_UTS | NEW_IPC | NEW_PID | NEW_NET), "unshare")
        for name, text in (
            ("uid_map", f"{NOBODY} {user} 1"),
            ("setgroups", "deny"),
            ("gid_map", f"{NOBODY} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _new_root(libc, order)
    _wait_for_child(libc)  # The one who waits is outside the new process namespace.
    os.setsid()
    _wait_for_child(libc)  # The one who waits is its first process: with it all others end.
    if root:
        _become(FIRST_UID + order["serial"])


def _wait_for_child(libc: Any) -> None:
    """Fork; the parent waits and ends with its child, the child goes on and dies with its parent."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0x7F)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _new_root(libc: Any, order: dict[str, Any]) -> None:
    """A file system of the folders in `order["readable"]`, read-only, and an empty writable one."""

    def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
        texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
        _check(libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]), f"mount {target}")

    mount("none", "/", None, MS_REC | MS_PRIVATE)
    new = order["root"]
    mount("tmpfs", new, "tmpfs", MS_NOSUID | MS_NODEV, f"size={order['files']},nr_inodes=4096,mode=755")
    for path in order["readable"]:
        if os.path.islink(path):
            os.makedirs(new + os.path.dirname(path), exist_ok=True)
            os.symlink(os.readlink(path), new + path)
        elif os.path.exists(path):
            if os.path.isdir(path):
                os.makedirs(new + path, exist_ok=True)
            else:
                os.makedirs(new + os.path.dirname(path), exist_ok=True)
                open(new + path, "w").close()
            mount(path, new + path, None, MS_BIND | MS_REC)
            attributes = struct.pack("QQQQ", ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV, 0, 0, 0)
            target = os.fsencode(new + path)
            _check(
                libc.syscall(MOUNT_SETATTR, AT_FDCWD, target, AT_RECURSIVE, attributes, len(attributes)),
                "mount_setattr",
            )
    work = new + order["folder"]
    os.makedirs(work, exist_ok=True)
    os.chmod(work, 0o777)
    old = new + "/.old"
    os.mkdir(old)
    _check(libc.syscall(PIVOT_ROOT[platform.machine()], os.fsencode(new), os.fsencode(old)), "pivot_root")
    os.chdir("/")
    _check(libc.umount2(b"/.old", MNT_DETACH), "umount")
    os.rmdir("/.old")


def _become(user: int) -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(user, user, user)


def _limit(libc: Any, order: dict[str, Any]) -> None:
    for name, most in {
        "AS": order["memory"],
        "CPU": order["seconds"] + 1,
        "FSIZE": order["files"],
        "NOFILE": 64,
        "NPROC": order["processes"],
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }.items():
        if (number := getattr(resource, f"RLIMIT_{name}", None)) is not None:
            resource.setrlimit(number, (most, most))
    if platform.system() == "Linux":
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        for capability in range(64):
            libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
        libc.capset(struct.pack("Ii", CAPABILITY_VERSION, 0), struct.pack("6I", *[0] * 6))
        _check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
        if order["isolation"] == "hooks" and platform.machine() in AUDIT_ARCH:
            _lock_land(libc, order["folder"])
        if platform.machine() in AUDIT_ARCH:
            _filter_calls(libc, platform.machine(), alone=order["isolation"] == "namespaces")


def _filter_calls(libc: Any, machine: str, alone: bool) -> None:
    """A filter in the kernel's BPF: refused calls give EPERM; another architecture's calling convention kills."""

    def line(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    lines = [line(LOAD, 4), line(JUMP_EQUAL, AUDIT_ARCH[machine], 1), line(RETURN, KILL), line(LOAD, 0)]
    if machine == "x86_64":
        lines += [line(JUMP_ABOVE, 0x40000000, 0, 1), line(RETURN, KILL)]
    for number in REFUSED[machine] + (() if alone else SIGNALS[machine] + NODES[machine]):
        lines += [line(JUMP_EQUAL, number, 0, 1), line(RETURN, ERRNO | EPERM)]
    if not alone:
        lines += [line(JUMP_EQUAL, SIGNAL_THREAD[machine], 0, 4), line(LOAD, 16), line(JUMP_EQUAL, os.getpid(), 1)]
        lines += [line(RETURN, ERRNO | EPERM), line(RETURN, ALLOW)]
    here = AT_FDCWD & 0xFFFFFFFF
    for number, places in (
        [] if alone else [(n, (16,)) for n in AT_CALLS[machine]] + [(n, (16, 32)) for n in RENAMES[machine]]
    ):
        lines.append(line(JUMP_EQUAL, number, 0, 3 * len(places) + 1))
        for place in places:
            lines += [line(LOAD, place), line(JUMP_EQUAL, here, 1), line(RETURN, ERRNO | EPERM)]
        lines.append(line(RETURN, ALLOW))
    lines += [line(JUMP_EQUAL, CLONE3, 0, 1), line(RETURN, ERRNO | ENOSYS)]
    lines += [line(JUMP_EQUAL, CLONE[machine], 0, 5 if not alone else 3), line(LOAD, 16)]
    lines += [line(JUMP_SET, CLONE_NEW, 0, 1), line(RETURN, ERRNO | EPERM)]
    if not alone:  # Threads only.
        lines += [line(JUMP_SET, CLONE_THREAD, 1), line(RETURN, ERRNO | EPERM)]
    lines.append(line(RETURN, ALLOW))
    text = ctypes.create_string_buffer(b"".join(lines))
    program = struct.pack("HxxxxxxP", len(lines), ctypes.addressof(text))
    _check(libc.prctl(PR_SET_SECCOMP, 2, program, 0, 0), "seccomp")


def _refuse_insides() -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in INSIDES:
            raise PermissionError(f"generated code may not do {event}")

    sys.addaudithook(hook)


def _refuse(folder: str) -> None:
    """Python's own events, for what the file permissions of this user would let through."""
    inside = folder + os.sep
    real, text = os.path.realpath, os.fsdecode

    def writable(path: Any) -> bool:
        return isinstance(path, str | bytes | os.PathLike) and (real(text(path)) + os.sep).startswith(inside)

    def hidden(path: Any) -> bool:
        return isinstance(path, str | bytes | os.PathLike) and (real(text(path)) + os.sep).startswith("/proc/")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = (flags or 0) & WRITING or set(mode or "") & set("wax+")
            if (writes and not writable(path)) or hidden(path):
                raise PermissionError(f"generated code may not open {path!r}")
        elif event == "import" and arguments[0] in UNSEEN:
            raise PermissionError(f"generated code may not import {arguments[0]}")
        elif event.startswith(DENIED_EVENTS):
            raise PermissionError(f"generated code may not do {event}")
        elif event.startswith(IN_FOLDER):
            paths = [argument for argument in arguments if isinstance(argument, str | bytes | os.PathLike)]
            if not paths or not all(map(writable, paths)):
                raise PermissionError(f"generated code may not do {event} there")

    sys.addaudithook(hook)


def _lock_land(libc: Any, folder: str) -> None:
    """Let the kernel refuse every change of files outside the folder, where it can (Landlock, Linux 5.13)."""
    create, add, take_on = LANDLOCK
    attributes = struct.pack("Q", CHANGING)
    rules = libc.syscall(create, attributes, len(attributes), 0)
    if rules < 0:
        return
    below = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    _check(libc.syscall(add, rules, BENEATH, struct.pack("=Qi", CHANGING, below), 0), "landlock_add_rule")
    _check(libc.syscall(take_on, rules, 0), "landlock_restrict_self")
    os.close(below)
    os.close(rules)


def _run(order: dict[str, Any], verdict: int) -> None:
    """Execute the program; only one that runs to its end has passed. What it prints goes nowhere.

    The proof is out of reach of frames and modules: C code alone holds it and writes it behind the program's end, and
    nothing that the program may have put in another's place is called between the two.
    """
    sys.path[:] = [*(path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))), *order["paths"]]
    program = order.pop("program")
    write, leave = os.write, os._exit
    if order["isolation"] == "hooks" and "numpy" in program:
        import numpy  # noqa: F401  (Its own import needs what is refused from here on.)
    _refuse_insides()  # First: the other refuses further hooks, in silence.
    if order["isolation"] == "hooks":
        _refuse(order["folder"])
    reasons: list[str] = []
    in_turn: Any = call
    write(verdict, b'{"ready": true}\n')  # From here on its time is counted.
    try:
        deque(
            map(
                in_turn,
                (
                    partial(_execute, program, reasons),
                    partial(write, verdict, json.dumps({"token": order.pop("token"), "passed": True}).encode() + b"\n"),
                ),
            ),
            maxlen=0,
        )
    except BaseException:
        write(verdict, json.dumps({"reason": reasons[-1] if reasons else "ended before its end"}).encode() + b"\n")
    leave(0)


def _execute(program: str, reasons: list[str]) -> None:
    """Run the program to its end, or add why it has none to `reasons` and raise. A process that it forks ends here."""
    namespace: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    short, leave, getpid, first = _short, os._exit, os.getpid, os.getpid()  # What it puts in their places is not used.
    try:
        exec(compile(program, "<program>", "exec", dont_inherit=True), namespace)
    except BaseException as error:
        reasons.append(short(error))
        raise
    finally:
        if getpid() != first:
            leave(0)


def _short(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}".strip()[:200]
    except BaseException:
        return "an exception that cannot be printed"


if __name__ == "__main__":
    outlet = os.dup(1)
    try:
        main(outlet)
    except BaseException as error:
        os.write(outlet, json.dumps({"broken": _short(error)}).encode() + b"\n")
        os._exit(3)
