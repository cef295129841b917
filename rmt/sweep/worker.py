"""A worker process of the local engine: takes run folders on its standard input, a line each, answers with rows.

`python -m rmt.sweep.worker CORES`: numbers with commas, which this process is pinned to and has as many threads as. It
ends with its input: a driver that is killed leaves no worker behind.
"""

import json
import os
import queue
import sys
import threading


def _listen(waiting: queue.SimpleQueue) -> None:
    for line in sys.stdin:
        waiting.put(line.strip())
    # The driver is gone, or done. A run that is under way goes on from its resume file another time.
    os._exit(0)


def main(cores: str) -> None:
    """Never returns."""
    chosen = [int(core) for core in cores.split(",")]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, chosen)
    # Answers have the first output for themselves; what runs print goes to their logs, and the rest to this worker's.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(waiting,), daemon=True).start()
    import torch

    from ..memory import keep_freed_memory
    from .work import execute

    torch.set_num_threads(len(chosen))
    keep_freed_memory()
    while True:
        row = execute(waiting.get())
        answers.write(json.dumps(row) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
