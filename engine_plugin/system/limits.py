"""The limits that the system sets for this process."""

from __future__ import annotations

import contextlib
import errno
import sys

__all__ = ["NO_FILES", "files_in_use", "raise_file_limit"]

NO_FILES = frozenset({errno.EMFILE, errno.ENFILE})
"""The errors of a process or system that has reached its limit of open files."""

_ENOUGH = 65_536  # some programs close every number below the limit, which they inherit


def raise_file_limit() -> None:
    """Raise the limit of open files as far as allowed; the default is low, for programs that use select."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            with contextlib.suppress(OSError, ValueError):  # macOS has a lower limit than it reports
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def files_in_use(error: OSError) -> str:
    """The message, with the remedy, for an error of NO_FILES."""
    limit = ""
    if sys.platform != "win32" and error.errno == errno.EMFILE:
        import resource

        limit = f"; this process may open {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}"
    return f"{error.strerror}{limit}. Raise the limit of open files (ulimit -n), or send fewer requests at once"
