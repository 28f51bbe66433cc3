"""Kills one worker of a scoring run at a chosen moment; Python loads this file at its start where it is on the path.

SABOTAGE is one of   batch:N   before-rename:NAME   after-rename:NAME
SABOTAGE_MARK is a file that the first worker to get there makes: it alone dies. Without it each that gets there does.
"""

import os
import signal
from multiprocessing import connection

moment, _, where = os.environ.get("SABOTAGE", "").partition(":")


def die() -> None:
    try:
        if "SABOTAGE_MARK" in os.environ:
            os.close(os.open(os.environ["SABOTAGE_MARK"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


if moment == "batch":
    send = connection.Connection.send
    seen = 0

    def counting_send(self, message):
        global seen
        send(self, message)
        if type(message).__name__ == "Batch":
            seen += 1
            if seen == int(where):
                die()

    connection.Connection.send = counting_send

if moment.endswith("-rename"):
    replace = os.replace

    def deadly_replace(source, target, **options):
        is_there = os.path.basename(target) == where
        if is_there and moment == "before-rename":
            die()
        replace(source, target, **options)
        if is_there:
            die()

    os.replace = deadly_replace
