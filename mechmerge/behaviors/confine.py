"""Confining this very process for good, by what the Linux kernel offers to every user: no set-up, no rights, no container.

- `isolate`: namespaces of its own (user, network, processes, IPC): no network device, no other process in sight.
- `restrict_files`: Landlock (https://docs.kernel.org/userspace-api/landlock.html): what may be read and written, nothing else.
- `filter_calls`: a seccomp filter (https://docs.kernel.org/userspace-api/seccomp_filter.html): no socket, no new process or
  thread, no signal, no change of owner, mode or limits; on wish no opening of files for writing.
- `limit`: resource limits. `drop_capabilities`: none are left, not even those of root.

Each says whether the kernel did it. Where one is not there another covers for it as far as it can; `sandbox_child` decides
what is enough. Nothing here imports more than the standard library, and nothing can be undone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import struct
from collections.abc import Iterable

_USER, _NETWORK, _PROCESSES, _IPC = 0x10000000, 0x40000000, 0x20000000, 0x08000000  # CLONE_NEW…
_SET_DUMPABLE, _NO_NEW_PRIVILEGES, _SET_SECCOMP, _DEATH_SIGNAL = 4, 38, 22, 1  # prctl
_KILL, _REFUSE, _ALLOW = 0x80000000, 0x00050000 | 1, 0x7FFF0000  # what a filter returns; 1 is EPERM
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # system calls, the same everywhere
_READ, _WRITE = (1 << 2) | (1 << 3), (1 << 1) | (1 << 14)  # Landlock: read a file or folder; write and truncate
ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""Machine: its audit number, and its column in the tables below."""
CALLS = {
    # network, and io_uring, which goes around filters
    "socket": (41, 198), "socketpair": (53, 199), "io_uring_setup": (425, 425),
    # processes and threads, programs, signals
    "clone": (56, 220), "clone3": (435, 435), "fork": (57, None), "vfork": (58, None), "execve": (59, 221),
    "execveat": (322, 281), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434), "setsid": (112, 157),
    "setpgid": (109, 154), "prctl": (157, 167),
    # other processes' memory, files, limits and times
    "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "prlimit64": (302, 261), "setrlimit": (160, 164),
    "setpriority": (141, 140), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122), "ioprio_set": (251, 30), "migrate_pages": (256, 238), "move_pages": (279, 239),
    # owners, modes, times and attributes of files, which Landlock does not cover
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "setxattrat": (463, 463), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "removexattrat": (466, 466), "file_setattr": (469, 469), "open_by_handle_at": (304, 265), "openat2": (437, 437),
    "mknod": (133, None), "mknodat": (259, 33),
    # what outlives a process
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218),
    # the machine itself
    "unshare": (272, 97), "setns": (308, 268), "chroot": (161, 51), "pivot_root": (155, 41), "mount": (165, 40),
    "umount2": (166, 39), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432),
    "mount_setattr": (442, 442), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "fanotify_init": (300, 262), "acct": (163, 89), "quotactl": (179, 60), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171), "sethostname": (170, 161),
    "setdomainname": (171, 162), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "personality": (135, 92), "syslog": (103, 116), "iopl": (172, None), "ioperm": (173, None), "vhangup": (153, 58),
}  # fmt: skip
"""System calls that are refused, by name: their numbers on x86_64 and aarch64."""
CHANGES = {
    "unlink": (87, None), "unlinkat": (263, 35), "rmdir": (84, None), "rename": (82, None), "renameat": (264, 38),
    "renameat2": (316, 276), "mkdir": (83, None), "mkdirat": (258, 34), "link": (86, None), "linkat": (265, 37),
    "symlink": (88, None), "symlinkat": (266, 36), "truncate": (76, 45), "creat": (85, None),
}  # fmt: skip
"""System calls that change files by name: refused as well where Landlock is not there."""
OPENS = {"open": ((2, None), 1), "openat": ((257, 56), 2)}
"""System calls that open files, and which of their arguments holds the flags."""
_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def isolate() -> bool:
    """New user, network, IPC and process namespaces (the latter for children alone); False where the kernel refuses."""
    libc = _libc()
    user, group = os.getuid(), os.getgid()
    if not hasattr(libc, "unshare") or libc.unshare(_USER | _NETWORK | _PROCESSES | _IPC):
        return False
    # Own ids stay what they are; without the maps files are still reached, under the overflow id.
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as handle:
            handle.write(text)
    return True


def limit(seconds: int, memory: int, file_size: int = 1 << 24) -> None:
    """Hard limits: CPU seconds, bytes of address space, bytes of a file, 64 open files, no new process, no core dump."""
    wanted = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: file_size,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = most if hard == resource.RLIM_INFINITY else min(most, hard)
        # macOS takes no limit of the address space.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (value, value))


def drop_capabilities() -> None:
    """Gives up every capability (root's, and those within a new user namespace)."""
    libc = _libc()
    if hasattr(libc, "capset"):
        libc.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6))


def hide() -> None:
    """No process of the same user may look into this one's memory or open files."""
    libc = _libc()
    if hasattr(libc, "prctl"):
        libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0)


def die_with_parent() -> None:
    """The kernel kills this process when its parent dies."""
    libc = _libc()
    if hasattr(libc, "prctl"):
        libc.prctl(_DEATH_SIGNAL, 9, 0, 0, 0)


def restrict_files(read: Iterable[str], write: str | None) -> bool:
    """Landlock: files can be read beneath `read`, read and written beneath `write`, and nowhere else.

    No TCP port, no signal and no abstract socket of processes outside either, where the kernel knows how. False where
    Landlock is not there.
    """
    libc = _libc()
    if not hasattr(libc, "prctl"):
        return False
    version = libc.syscall(_LANDLOCK_CREATE, None, 0, 1)
    if version < 3:  # truncation is covered from version 3 on
        return False
    files = (1 << (16 if version >= 5 else 15)) - 1
    attributes = struct.pack("QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    attributes = attributes[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = libc.syscall(_LANDLOCK_CREATE, attributes, len(attributes), 0)
    if ruleset < 0:
        return False
    try:
        device = _READ & ~(1 << 3) | _WRITE
        rules = [(path, _READ if os.path.isdir(path) else 1 << 2) for path in read] + [("/dev/null", device)]
        if write is not None:
            rules.append((write, (1 << 13) - 1 & ~1 | _WRITE))  # all but executing
        return all(_allow(libc, ruleset, path, rights & files) for path, rights in rules if os.path.exists(path)) and (
            libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0 and libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0) == 0
        )
    finally:
        os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> bool:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return bool(libc.syscall(_LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", rights, descriptor), 0) == 0)
    finally:
        os.close(descriptor)


def filter_calls(*, writes: bool, allowed: Iterable[str] = ()) -> bool:
    """Refuses the system calls of `CALLS` (with EPERM), and where `writes` is False all that change files by name or open
    them for writing. False where the kernel or this architecture has no filter.

    Args:
        writes: whether files may be written (where Landlock says which).
        allowed: calls of `CALLS` that stay allowed.
    """
    libc = _libc()
    if platform.machine() not in ARCHITECTURES or not hasattr(libc, "prctl") or ctypes.sizeof(ctypes.c_void_p) != 8:
        return False
    code = _program(writes, frozenset(allowed))
    program = ctypes.create_string_buffer(code)
    header = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(program))
    return bool(libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0 and libc.prctl(_SET_SECCOMP, 2, header, 0, 0) == 0)


def _program(writes: bool, allowed: frozenset[str]) -> bytes:
    """The filter as classic BPF: architecture, then the call's number against each that is refused."""
    audit, column = ARCHITECTURES[platform.machine()]
    load, equal, greater, bits, stop = 0x20, 0x15, 0x35, 0x45, 0x06
    refused = [numbers[column] for name, numbers in CALLS.items() if name not in allowed]
    opens = [] if writes else [(numbers[column], place) for numbers, place in OPENS.values()]
    refused += [] if writes else [numbers[column] for numbers in CHANGES.values()]
    lines = [(load, 0, 0, 4), (equal, 1, 0, audit), (stop, 0, 0, _KILL), (load, 0, 0, 0)]
    lines += [(greater, 0, 1, 0x40000000), (stop, 0, 0, _REFUSE)]  # the x32 numbers of x86_64
    for number in refused:
        if number is not None:
            lines += [(equal, 0, 1, number), (stop, 0, 0, _REFUSE)]
    for number, place in opens:
        if number is not None:
            lines += [(equal, 0, 4, number), (load, 0, 0, 16 + 8 * place), (bits, 0, 1, _FLAGS), (stop, 0, 0, _REFUSE)]
            lines += [(stop, 0, 0, _ALLOW)]
    lines += [(stop, 0, 0, _ALLOW)]
    return b"".join(struct.pack("HBBI", code, yes, no, value) for code, yes, no, value in lines)
