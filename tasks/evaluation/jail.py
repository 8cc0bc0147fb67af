"""Runs one untrusted Python program in this process, after giving up everything it does not need.

Started by sandbox.py as a script of its own, with the standard library alone: `jail.py SETTINGS`,
the program in program.py of the working directory, the verdict on a pipe. In order: resource
limits; no capabilities, so that of root only the name is left; no way to gain privileges; Landlock,
by which no file is written outside the working directory and TCP is off; a seccomp filter against
new processes and programs, sockets, signals to others, memory that escapes the limit, and mounts.
All of it is inherited and cannot be undone.
"""

import ctypes
import json
import os
import platform
import resource
import sys

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_CAPABILITY_VERSION = 0x20080522

# --- Landlock: the same system calls on every architecture

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
# Bits of everything that changes files, with the first version that knows them.
_WRITE_FILE, _TRUNCATE = 1 << 1, 1 << 14
_CHANGES = (_WRITE_FILE | 0b1111111110000, (1 << 13, 2), (_TRUNCATE, 3))
_TCP = 0b11  # bind and connect, from version 4


class _Ruleset(ctypes.Structure):
  _fields_ = (('files', ctypes.c_uint64), ('tcp', ctypes.c_uint64))


class _Beneath(ctypes.Structure):
  _pack_ = 1
  _fields_ = (('allowed', ctypes.c_uint64), ('parent', ctypes.c_int32))


def landlock_version() -> int:
  """0 where the kernel has none or it is switched off."""
  return max(0, _LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def _call(result: int, what: str) -> int:
  if result < 0:
    raise OSError(ctypes.get_errno(), f'{what}: {os.strerror(ctypes.get_errno())}')
  return result


def _restrict_files(directory: str) -> None:
  version = landlock_version()
  changes = _CHANGES[0] | sum(bits for bits, since in _CHANGES[1:] if version >= since)
  rules = _Ruleset(changes, _TCP if version >= 4 else 0)
  size = ctypes.c_size_t(16 if version >= 4 else 8)
  ruleset = _call(_LIBC.syscall(_CREATE_RULESET, ctypes.byref(rules), size, 0), 'landlock')
  for path, allowed in ((directory, changes), ('/dev/null', _WRITE_FILE)):
    beneath = _Beneath(allowed, os.open(path, os.O_PATH | os.O_CLOEXEC))
    _call(_LIBC.syscall(_ADD_RULE, ruleset, 1, ctypes.byref(beneath), 0), 'landlock')
    os.close(beneath.parent)
  _call(_LIBC.syscall(_RESTRICT_SELF, ruleset, 0), 'landlock')
  os.close(ruleset)


# --- seccomp

_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _ENOSYS = 1, 38
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_CLONE_THREAD = 0x10000
_X32 = 0x40000000

# What is refused, with numbers on x86_64 and aarch64; None where it does not exist.
_REFUSED = {
  'fork': (57, None), 'vfork': (58, None), 'execve': (59, 221), 'execveat': (322, 281),
  'socket': (41, 198), 'socketpair': (53, 199), 'connect': (42, 203), 'bind': (49, 200),
  'kill': (62, 129), 'tkill': (200, 130), 'pidfd_send_signal': (424, 424), 'pidfd_open': (434, 434),
  'rt_sigqueueinfo': (129, 138), 'ptrace': (101, 117), 'process_vm_readv': (310, 270),
  'process_vm_writev': (311, 271), 'prlimit64': (302, 261), 'setrlimit': (160, 164),
  'setpriority': (141, 140), 'memfd_create': (319, 279), 'memfd_secret': (447, 447),
  'shmget': (29, 194), 'shmat': (30, 196), 'msgget': (68, 186), 'semget': (64, 190),
  'mq_open': (240, 180), 'mount': (165, 40), 'umount2': (166, 39), 'pivot_root': (155, 41),
  'chroot': (161, 51), 'unshare': (272, 97), 'setns': (308, 268), 'open_tree': (428, 428),
  'move_mount': (429, 429), 'fsopen': (430, 430), 'bpf': (321, 280), 'perf_event_open': (298, 241),
  'userfaultfd': (323, 282), 'io_uring_setup': (425, 425), 'keyctl': (250, 219),
  'add_key': (248, 217), 'chmod': (90, None), 'fchmod': (91, 52), 'fchmodat': (268, 53),
  'fchmodat2': (452, 452), 'chown': (92, None), 'fchown': (93, 55), 'lchown': (94, None),
  'fchownat': (260, 54), 'setxattr': (188, 5), 'lsetxattr': (189, 6), 'fsetxattr': (190, 7),
  'utimensat': (280, 88), 'utimes': (235, None), 'utime': (132, None), 'reboot': (169, 142),
  'init_module': (175, 105), 'finit_module': (313, 273), 'kexec_load': (246, 104),
  'sethostname': (170, 161), 'settimeofday': (164, 170), 'clock_settime': (227, 112),
  'swapon': (167, 224), 'swapoff': (168, 225), 'quotactl': (179, 60), 'acct': (163, 89),
}  # fmt: skip
_MACHINES = {'x86_64': (0, 0xC000003E, 56, 435), 'aarch64': (1, 0xC00000B7, 220, 435)}


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
  if platform.machine() not in _MACHINES or not os.path.exists('/proc/self/status'):
    return False
  with open('/proc/self/status') as status:
    return any(line.startswith('Seccomp:') for line in status)


def _filter_calls() -> None:
  column, architecture, clone, clone3 = _MACHINES[platform.machine()]
  code = [
    (_LOAD, 0, 0, 4),
    (_JUMP_EQUAL, 1, 0, architecture),
    (_RETURN, 0, 0, _KILL),
    (_LOAD, 0, 0, 0),
  ]
  if column == 0:
    code += [(_JUMP_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
  for number in (numbers[column] for numbers in _REFUSED.values()):
    if number is not None:
      code += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | _EPERM)]
  # The C library falls back to clone, whose flags a filter can read: threads may be, processes not.
  code += [(_JUMP_EQUAL, 0, 1, clone3), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]
  code += [(_JUMP_EQUAL, 0, 3, clone), (_LOAD, 0, 0, 16), (_JUMP_BITS, 1, 0, _CLONE_THREAD)]
  code += [(_RETURN, 0, 0, _ERRNO | _EPERM), (_RETURN, 0, 0, _ALLOW)]
  instructions = (_Instruction * len(code))(*(_Instruction(*step) for step in code))
  program = _Program(len(code), instructions)
  pointer = ctypes.byref(program)
  _call(_LIBC.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, pointer, 0, 0), 'seccomp')


# --- all of it


def _limit(cpu_seconds: int, memory: int, file_size: int) -> None:
  for name, value in (
    ('RLIMIT_CPU', cpu_seconds),
    ('RLIMIT_AS', memory),
    ('RLIMIT_FSIZE', file_size),
    ('RLIMIT_NOFILE', 64),
    ('RLIMIT_CORE', 0),
  ):
    resource.setrlimit(getattr(resource, name), (value, value))


class _CapabilityHead(ctypes.Structure):
  _fields_ = (('version', ctypes.c_uint32), ('pid', ctypes.c_int))


def _drop_capabilities() -> None:
  """All of them. The user stays: another one might not be allowed to read this interpreter."""
  head, none = _CapabilityHead(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
  _call(_LIBC.capset(ctypes.byref(head), ctypes.byref(none)), 'capset')


def lock_up(directory: str, cpu_seconds: int, memory: int, file_size: int) -> None:
  """Gives up everything; see the module's docstring. There is no way back."""
  os.chdir(directory)
  os.umask(0o077)
  _limit(cpu_seconds, memory, file_size)
  _drop_capabilities()
  _call(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 'no_new_privs')
  _restrict_files(directory)
  _filter_calls()


def main() -> None:
  settings = json.loads(sys.argv[1])
  verdict, secret = settings.pop('verdict'), settings.pop('secret')
  sys.argv[:] = ['program.py']
  lock_up(**settings)
  with open('program.py', encoding='utf-8') as file:
    source = file.read()
  try:
    exec(compile(source, 'program', 'exec'), {'__name__': '__main__'})
    found = secret
  # Whatever it raises, SystemExit with 0 included, it has not run to its end.
  except BaseException as error:  # noqa: BLE001
    found = f'{type(error).__name__}: {error}'[:500]
  os.write(verdict, found.encode(errors='replace'))
  os._exit(0)  # threads it left behind are not waited for


if __name__ == '__main__':
  main()
