"""A Windows Job Object with KILL_ON_JOB_CLOSE: its processes end when its last handle is closed, by a crash too.

Each process that a member spawns is a member. It cannot leave, because the job does not allow it; its own jobs are
nested in this one; and the handle is not inherited, so that no member keeps it open. The job does not hold processes
that others spawn for a member: the Task Scheduler, a service, WMI.

Imported on Windows only. Structures are those of the Win32 documentation (winnt.h).
"""

from __future__ import annotations

import sys

__all__ = ["KillOnCloseJob"]

if sys.platform == "win32":
    import ctypes
    from ctypes import wintypes

    _EXTENDED_LIMIT_INFORMATION = 9
    _KILL_ON_JOB_CLOSE = 0x2000
    _DIE_ON_UNHANDLED_EXCEPTION = 0x400  # else a crashed engine waits until a user closes a window
    _PROCESS_SET_QUOTA_AND_TERMINATE = 0x0100 | 0x0001

    class _BasicLimits(ctypes.Structure):
        _fields_ = (
            ("PerProcessUserTimeLimit", wintypes.LARGE_INTEGER),
            ("PerJobUserTimeLimit", wintypes.LARGE_INTEGER),
            ("LimitFlags", wintypes.DWORD),
            ("MinimumWorkingSetSize", ctypes.c_size_t),
            ("MaximumWorkingSetSize", ctypes.c_size_t),
            ("ActiveProcessLimit", wintypes.DWORD),
            ("Affinity", ctypes.c_size_t),
            ("PriorityClass", wintypes.DWORD),
            ("SchedulingClass", wintypes.DWORD),
        )

    class _ExtendedLimits(ctypes.Structure):
        _fields_ = (
            ("BasicLimitInformation", _BasicLimits),
            ("IoInfo", ctypes.c_ulonglong * 6),
            ("ProcessMemoryLimit", ctypes.c_size_t),
            ("JobMemoryLimit", ctypes.c_size_t),
            ("PeakProcessMemoryUsed", ctypes.c_size_t),
            ("PeakJobMemoryUsed", ctypes.c_size_t),
        )

    class KillOnCloseJob:
        """Holds the process `pid`, and what it spawns from now on, in a job that ends with this object."""

        def __init__(self, pid: int) -> None:
            kernel = ctypes.WinDLL("kernel32", use_last_error=True)
            kernel.CreateJobObjectW.restype = wintypes.HANDLE
            kernel.OpenProcess.restype = wintypes.HANDLE
            self._close = kernel.CloseHandle
            self._job: wintypes.HANDLE | None = wintypes.HANDLE(kernel.CreateJobObjectW(None, None))
            if not self._job:
                raise ctypes.WinError(ctypes.get_last_error())
            limits = _ExtendedLimits()
            limits.BasicLimitInformation.LimitFlags = _KILL_ON_JOB_CLOSE | _DIE_ON_UNHANDLED_EXCEPTION
            process = wintypes.HANDLE(kernel.OpenProcess(_PROCESS_SET_QUOTA_AND_TERMINATE, False, pid))
            done = kernel.SetInformationJobObject(
                self._job, _EXTENDED_LIMIT_INFORMATION, ctypes.byref(limits), ctypes.sizeof(limits)
            ) and kernel.AssignProcessToJobObject(self._job, process)
            error = ctypes.WinError(ctypes.get_last_error())
            if process:
                self._close(process)
            if not done:
                self.close()
                raise error

        def close(self) -> None:
            """Close the handle, which ends all processes in the job."""
            job, self._job = self._job, None
            if job:
                self._close(job)
