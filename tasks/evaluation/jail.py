"""Locks the calling process in: what it gives up here, it and its threads never get back.

Standard library alone. In order: limits of memory, processor time, threads and open files; no
capabilities, so that of root only the name is left; no way to gain privileges; Landlock, by which
no file is written or made, none but the interpreter's own libraries is read, and TCP is off; a
seccomp filter that allows the system calls of a computing Python program and refuses all others,
those that kernels will yet gain included. Of the calls it allows, none acts on another process, on
a file that is not open, or on the process's own limits. What files and processes there are can
still be seen (`stat`), not what is in them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import signal
import sys
import sysconfig

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_GET_SECCOMP, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 21, 22, 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION = 0x20080522
_THREADS = 64
# A stretch of user ids that belong to nobody, kept free for passing services.
_FREE_USERS = range(61184, 65520)


def _call(result: int, what: str) -> int:
  if result < 0:
    raise OSError(ctypes.get_errno(), f'{what}: {os.strerror(ctypes.get_errno())}')
  return result


# --- Landlock: the same system calls on every architecture

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
# All rights to files, with the first version that knows them: execute to make, refer, truncate,
# device commands.
_FILE_RIGHTS = (((1 << 13) - 1, 1), (1 << 13, 2), (1 << 14, 3), (1 << 15, 5))
_SHARED = ('/lib', '/lib64', '/usr/lib', '/usr/lib64', '/usr/local/lib', '/usr/share/zoneinfo')
_TCP = 0b11  # bind and connect, from version 4
_SCOPES = 0b11  # abstract sockets and signals, from version 6


class _Ruleset(ctypes.Structure):
  _fields_ = (('files', ctypes.c_uint64), ('tcp', ctypes.c_uint64), ('scoped', ctypes.c_uint64))


class _Beneath(ctypes.Structure):
  _pack_ = 1
  _fields_ = (('allowed', ctypes.c_uint64), ('parent', ctypes.c_int32))


def landlock_version() -> int:
  """0 where the kernel has none or it is switched off."""
  return max(0, _LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def _libraries() -> list[str]:
  """Directories that lie under Python's own: its modules, and the shared libraries beside them."""
  paths = sysconfig.get_paths()
  own = [paths[name] for name in ('stdlib', 'platstdlib', 'purelib', 'platlib')]
  return [os.path.join(sys.base_prefix, 'lib'), *own]


def module_path() -> list[str]:
  """Those directories of sys.path that can still be read when locked in."""
  trees = [os.path.realpath(path) + os.sep for path in (*_libraries(), *_SHARED)]
  within = lambda path: any((os.path.realpath(path) + os.sep).startswith(tree) for tree in trees)
  return [path for path in sys.path if within(path)]


def _readable() -> dict[str, int]:
  found = dict.fromkeys((*_libraries(), *_SHARED), _READ_FILE | _READ_DIR)
  files = ('/etc/ld.so.cache', '/etc/localtime', '/dev/zero', '/dev/random', '/dev/urandom')
  return {**found, **dict.fromkeys(files, _READ_FILE), '/dev/null': _READ_FILE | _WRITE_FILE}


def _restrict_files() -> None:
  version = landlock_version()
  rights = sum(bits for bits, since in _FILE_RIGHTS if version >= since)
  rules = _Ruleset(rights, _TCP if version >= 4 else 0, _SCOPES if version >= 6 else 0)
  size = ctypes.c_size_t(24 if version >= 6 else 16 if version >= 4 else 8)
  ruleset = _call(_LIBC.syscall(_CREATE_RULESET, ctypes.byref(rules), size, 0), 'landlock')
  for path, allowed in _readable().items():
    try:
      beneath = _Beneath(allowed, os.open(path, os.O_PATH | os.O_CLOEXEC))
    except FileNotFoundError:
      continue
    _call(_LIBC.syscall(_ADD_RULE, ruleset, 1, ctypes.byref(beneath), 0), 'landlock')
    os.close(beneath.parent)
  _call(_LIBC.syscall(_RESTRICT_SELF, ruleset, 0), 'landlock')
  os.close(ruleset)


# --- seccomp

_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _ENOSYS = 1, 38
_LOAD, _AND, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_BITS, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_X32 = 0x40000000
# Column of the tables below, and how the kernel names the architecture.
_MACHINES = {'x86_64': (0, 0xC000003E), 'aarch64': (1, 0xC00000B7)}

# Allowed whatever the arguments; numbers on x86_64 and aarch64, None where it does not exist.
_ALLOWED = {
  'read': (0, 63), 'write': (1, 64), 'futex': (202, 98), 'mmap': (9, 222), 'munmap': (11, 215),
  'brk': (12, 214), 'mremap': (25, 216), 'mprotect': (10, 226), 'madvise': (28, 233),
  'newfstatat': (262, 79), 'fstat': (5, 80), 'lseek': (8, 62), 'close': (3, 57),
  'getdents64': (217, 61), 'readv': (19, 65), 'writev': (20, 66), 'pread64': (17, 67),
  'stat': (4, None), 'lstat': (6, None), 'statx': (332, 291), 'access': (21, None),
  'faccessat': (269, 48), 'faccessat2': (439, 439), 'readlink': (89, None), 'readlinkat': (267, 78),
  'getcwd': (79, 17), 'chdir': (80, 49), 'umask': (95, 166), 'close_range': (436, 436),
  'dup': (32, 23), 'dup2': (33, None), 'dup3': (292, 24), 'pipe': (22, None), 'pipe2': (293, 59),
  'poll': (7, None), 'ppoll': (271, 73), 'select': (23, None), 'pselect6': (270, 72),
  'epoll_create1': (291, 20), 'epoll_ctl': (233, 21), 'epoll_wait': (232, None),
  'epoll_pwait': (281, 22), 'eventfd2': (290, 19), 'msync': (26, 227), 'mincore': (27, 232),
  'set_robust_list': (273, 99), 'rseq': (334, 293), 'set_tid_address': (218, 96),
  'rt_sigaction': (13, 134), 'rt_sigprocmask': (14, 135), 'rt_sigreturn': (15, 139),
  'sigaltstack': (131, 132), 'rt_sigpending': (127, 136), 'rt_sigtimedwait': (128, 137),
  'pause': (34, None), 'alarm': (37, None), 'setitimer': (38, 103), 'getitimer': (36, 102),
  'nanosleep': (35, 101), 'clock_nanosleep': (230, 115), 'restart_syscall': (219, 128),
  'clock_gettime': (228, 113), 'clock_getres': (229, 114), 'gettimeofday': (96, 169),
  'time': (201, None), 'times': (100, 153), 'getrusage': (98, 165), 'getrlimit': (97, 163),
  'getpid': (39, 172), 'gettid': (186, 178), 'getppid': (110, 173), 'getpgrp': (111, None),
  'getuid': (102, 174), 'geteuid': (107, 175), 'getgid': (104, 176), 'getegid': (108, 177),
  'getresuid': (118, 148), 'getresgid': (120, 150), 'getgroups': (115, 158), 'uname': (63, 160),
  'sysinfo': (99, 179), 'getrandom': (318, 278), 'getcpu': (309, 168), 'sched_yield': (24, 124),
  'sched_get_priority_max': (146, 125), 'sched_get_priority_min': (147, 126),
  'exit': (60, 93), 'exit_group': (231, 94),
}  # fmt: skip
_OPENS = {'open': ((2, None), 1), 'openat': ((257, 56), 2)}  # and which argument has the flags
_CLONE3 = 435
# Allowed where an argument (its number comes first) has one of these values.
_CHOSEN = {
  'clone': ((56, 220), 0, (0x3D0F00, 0x7D0F00)),  # threads, as glibc and musl make them
  'prctl': ((157, 167), 0, (15, 16)),  # the name of a thread
  'fcntl': ((72, 25), 1, (0, 1, 2, 3, 1030)),  # duplicates, close-on-exec, reading flags
  # Reading a terminal's form, how much there is to read, close-on-exec, non-blocking.
  'ioctl': ((16, 29), 1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),
}
_TGKILL, _GET_AFFINITY, _PRLIMIT = (234, 131), (204, 123), (302, 261)
_FCNTL_SETFL, _O_ASYNC, _O_TRUNC = 4, 0o20000, 0o1000

_Step = tuple[int, int, int, int]


class _Instruction(ctypes.Structure):
  _fields_ = (
    ('code', ctypes.c_ushort),
    ('yes', ctypes.c_ubyte),
    ('no', ctypes.c_ubyte),
    ('value', ctypes.c_uint32),
  )


class _Program(ctypes.Structure):
  _fields_ = (('length', ctypes.c_ushort), ('code', ctypes.POINTER(_Instruction)))


def has_seccomp() -> bool:
  """Whether this kernel and machine can filter system calls."""
  known = platform.machine() in _MACHINES and ctypes.sizeof(ctypes.c_void_p) == 8
  return known and _LIBC.prctl(_PR_GET_SECCOMP, 0, 0, 0, 0) >= 0


def _argument(number: int, high: bool = False) -> _Step:
  return (_LOAD, 0, 0, 16 + 8 * number + 4 * high)


_YES, _NO = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | _EPERM)


def _if_call(number: int | None, *then: _Step) -> list[_Step]:
  """Steps for one system call; they must end by returning."""
  return [] if number is None else [(_JUMP_EQUAL, 0, len(then), number), *then]


def _one_of(argument: int, values: tuple[int, ...]) -> list[_Step]:
  checks = [step for value in values for step in ((_JUMP_EQUAL, 0, 1, value), _YES)]
  return [_argument(argument), *checks]


def filter_steps(column: int, architecture: int, pid: int) -> list[_Step]:
  """The filter: instructions of the classic Berkeley packet filter.

  Args:
    column: which numbers of system calls.
    architecture: how the kernel names it; any other is ended.
    pid: of this process, which may send signals to itself.
  """
  code = [(_LOAD, 0, 0, 4), (_JUMP_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL)]
  code.append((_LOAD, 0, 0, 0))
  if column == 0:
    code += [(_JUMP_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
  for numbers in _ALLOWED.values():
    code += _if_call(numbers[column], _YES)
  for numbers, flags in _OPENS.values():
    # Truncating a file that is opened for reading is not writing to older versions of Landlock.
    steps = [_argument(flags), (_AND, 0, 0, _O_TRUNC | 3), (_JUMP_EQUAL, 1, 0, _O_TRUNC)]
    code += _if_call(numbers[column], *steps, (_JUMP_EQUAL, 0, 1, _O_TRUNC | 3), _NO, _YES)
  set_flags = [(_JUMP_EQUAL, 0, 3, _FCNTL_SETFL), _argument(2), (_JUMP_BITS, 1, 0, _O_ASYNC), _YES]
  for name, (numbers, argument, values) in _CHOSEN.items():
    more = set_flags if name == 'fcntl' else []
    code += _if_call(numbers[column], *_one_of(argument, values), *more, _NO)
  code += _if_call(_TGKILL[column], *_one_of(0, (pid,)), _NO)
  code += _if_call(_GET_AFFINITY[column], *_one_of(0, (0, pid)), _NO)
  # Limits of this process may be read: no pointer to new ones.
  own = [_argument(0), (_JUMP_EQUAL, 1, 0, 0), (_JUMP_EQUAL, 0, 5, pid)]
  null = [_argument(2), (_JUMP_EQUAL, 0, 3, 0), _argument(2, high=True), (_JUMP_EQUAL, 0, 1, 0)]
  code += _if_call(_PRLIMIT[column], *own, *null, _YES, _NO)
  # The C library falls back to clone, whose flags a filter can read.
  code += _if_call(_CLONE3, (_RETURN, 0, 0, _ERRNO | _ENOSYS))
  return [*code, _NO]


def _filter_calls() -> None:
  code = filter_steps(*_MACHINES[platform.machine()], os.getpid())
  instructions = (_Instruction * len(code))(*(_Instruction(*step) for step in code))
  pointer = ctypes.byref(_Program(len(code), instructions))
  _call(_LIBC.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, pointer, 0, 0), 'seccomp')


# --- all of it


def _tasks_of_user() -> int:
  """Threads of all processes of the real user."""
  total, user = 0, os.getuid()
  for name in os.listdir('/proc'):
    with contextlib.suppress(OSError):  # it has ended
      if name.isdigit() and os.stat(f'/proc/{name}').st_uid == user:
        total += os.stat(f'/proc/{name}/task').st_nlink - 2
  return total


def _limit_threads() -> None:
  """The kernel counts a user's threads, and root's not at all, so root takes a user of its own.

  The effective user stays: another one might not be allowed to read this interpreter. A user who
  cannot change is counted with the threads there are now.
  """
  threads = _THREADS
  try:
    os.setresuid(_FREE_USERS[os.getpid() % len(_FREE_USERS)], -1, -1)
  except OSError:
    threads += _tasks_of_user()
  _lower(resource.RLIMIT_NPROC, threads)


def _lower(limit: int, value: int) -> None:
  hard = resource.getrlimit(limit)[1]
  value = value if hard == resource.RLIM_INFINITY else min(value, hard)
  resource.setrlimit(limit, (value, value))


class _CapabilityHead(ctypes.Structure):
  _fields_ = (('version', ctypes.c_uint32), ('pid', ctypes.c_int))


def _drop_capabilities() -> None:
  head, none = _CapabilityHead(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
  _call(_LIBC.capset(ctypes.byref(head), ctypes.byref(none)), 'capset')


def die_with(parent: int) -> None:
  """This process is killed when its parent ends, however that ends."""
  _call(_LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0), 'pdeathsig')
  if os.getppid() != parent:
    os._exit(1)


def lock_up(parent: int, cpu_seconds: int, memory: int) -> None:
  """Gives up everything; see the module's docstring.

  Args:
    parent: process with which this one ends.
    cpu_seconds: processor time from the start of the process.
    memory: bytes of address space.

  Raises:
    OSError: the system does not allow it; nothing may be run.
  """
  os.chdir('/')
  _limit_threads()
  _lower(resource.RLIMIT_CPU, cpu_seconds)
  _lower(resource.RLIMIT_AS, memory)
  _lower(resource.RLIMIT_NOFILE, 64)
  for name in ('FSIZE', 'CORE', 'MEMLOCK', 'MSGQUEUE'):
    _lower(getattr(resource, f'RLIMIT_{name}'), 0)
  _drop_capabilities()
  die_with(parent)
  _call(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 'no_new_privs')
  _restrict_files()
  _filter_calls()
