"""A process that does what its arguments say, in their order; then it waits for the end of stdin and exits with 0.

print:TEXT, err:TEXT     write a line (err0: without its end)
ready:PATH               create a file that holds the pid
listen:PATH              the same by a unix socket that accepts connections
flood:FD:MIB:lines|solid write that much, in lines of 63 characters or as one line
slow:COUNT:SECONDS       print a line of progress COUNT times, SECONDS apart
burn:SECONDS             compute in silence; idle:SECONDS does nothing
until:PATH               wait for a file
ignore-term, ignore-stdin   go on in spite of SIGTERM, of the end of stdin
grandchild:PATH          spawn a child that ignores SIGTERM and the end of stdin, keeps our pipes open, and writes its
                         pid to PATH; loner:PATH the same in a session of its own
stdin:PATH               write a line of stdin to a file
exit:N, die:SIGNAL       end

No such process outlives its minute, whatever a test does.
"""

from __future__ import annotations

import os
import signal
import sys
import time


def announce(path: str, text: str) -> None:
    with open(path + ".new", "w") as file:  # noqa: PTH123  # pathlib would double the time to start
        file.write(text)
    os.replace(path + ".new", path)  # noqa: PTH105


def flood(fd: int, mebibytes: int, kind: str) -> None:
    block = b"x" * 65536 if kind == "solid" else (b"y" * 63 + b"\n") * 1024
    for _ in range(mebibytes * 16):
        left = memoryview(block)
        while left:
            left = left[os.write(fd, left) :]


def spawn_grandchild(path: str, *, alone: bool) -> None:
    import subprocess

    receive, send = os.pipe()
    actions = ["ignore-term", "ignore-stdin", "ready:" + path, f"close:{send}"]
    subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, *actions], pass_fds=[send], start_new_session=alone, stdin=sys.stdin
    )
    os.close(send)
    while os.read(receive, 1):
        pass
    os.close(receive)


def listen(path: str) -> None:
    import socket
    import threading

    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()

    def serve() -> None:
        while True:
            server.accept()[0].close()

    threading.Thread(target=serve, daemon=True).start()


def work(name: str, argument: str) -> None:
    first, _, second = argument.partition(":")
    if name == "print":
        os.write(1, argument.encode() + b"\n")
    elif name in ("err", "err0"):
        os.write(2, argument.encode() + (b"\n" if name == "err" else b""))
    elif name == "ready":
        announce(argument, str(os.getpid()))
    elif name == "listen":
        listen(argument)
    elif name == "flood":
        mebibytes, _, kind = second.partition(":")
        flood(int(first), int(mebibytes), kind)
    elif name == "slow":
        for number in range(int(first)):
            time.sleep(float(second))
            os.write(2, b"loading %d\n" % number)
    elif name == "burn":
        end = time.monotonic() + float(argument)
        while time.monotonic() < end:
            pass
    else:
        control(name, argument)


def control(name: str, argument: str) -> None:
    if name == "idle":
        time.sleep(float(argument))
    elif name == "until":
        while not os.path.exists(argument):  # noqa: PTH110
            time.sleep(0.005)
    elif name == "ignore-term":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif name in ("grandchild", "loner"):
        spawn_grandchild(argument, alone=name == "loner")
    elif name == "close":
        os.close(int(argument))
    elif name == "stdin":
        announce(argument, sys.stdin.readline())
    elif name == "exit":
        os._exit(int(argument))
    elif name == "die":
        os.kill(os.getpid(), getattr(signal, argument))
        time.sleep(1000)
    else:
        raise SystemExit(f"no such action: {name}")


def main(actions: list[str]) -> None:
    if hasattr(signal, "alarm"):
        signal.alarm(1000)
    for action in actions:
        name, _, argument = action.partition(":")
        if name != "ignore-stdin":
            work(name, argument)
    if "ignore-stdin" in actions:
        time.sleep(1000)
    while os.read(0, 4096):
        pass


if __name__ == "__main__":
    main(sys.argv[1:])
