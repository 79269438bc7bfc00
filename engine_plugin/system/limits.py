"""What the system lets this process have."""

from __future__ import annotations

import contextlib
import errno
import sys

__all__ = ["NO_FILES", "files_in_use", "raise_file_limit"]

NO_FILES = frozenset({errno.EMFILE, errno.ENFILE})
"""The error numbers of a process, or a system, that may open no more files."""

_ENOUGH = 65_536  # some programs, which inherit the limit, close every number below it


def raise_file_limit() -> None:
    """Let this process open as many files as it may; the usual limit is low for programs that use select."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            with contextlib.suppress(OSError, ValueError):  # macOS has a lower limit than it says
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def files_in_use(error: OSError) -> str:
    """What is wrong and what to do, for an error of NO_FILES."""
    limit = ""
    if sys.platform != "win32" and error.errno == errno.EMFILE:
        import resource

        limit = f"; this process may open {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}"
    return f"{error.strerror}{limit}. Raise the limit of open files (ulimit -n), or send fewer requests at once"
