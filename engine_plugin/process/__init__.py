"""Supervision of subprocesses and all their descendants: spawn, watch, restart, end. Where to look:

engine_process  the state machine of an engine process: its crashes (`_serve`), hangs (`_watch`), restarts and end
run             one run of an engine process: its output, its exit code, and how it failed
health          health checks in a row, and whether a silent process uses the processor
restarts        the back-off and the limit of restarts
child           one subprocess with its pipes, and the end of its whole tree
lines           the lines of a subprocess's output
tree            process trees, per operating system
records         files by which the processes of a killed plugin are found again
guard           the parent of a foreign program, which ends with the plugin; runners call `arm` instead
ports, memory   free ports and who holds one; free memory, and whether a process died for lack of it
python, environ command and environment of helper programs
entry           stdin and failures of helper programs

No imports here, because engine processes import the guard from this package.
"""
