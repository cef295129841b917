"""Progress on long work: a live bar on a terminal, plain lines elsewhere."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[Callable[[int, str | None], None]]:
    """Yields `advance(done, text=None)`: sets how much is done; `text` stands beside the bar, or is a line of its own.

    A terminal gets one bar with elapsed and remaining time, which stays when the work ends.
    """
    from rich import progress as rich
    from rich.console import Console

    console = Console()
    if not console.is_terminal:

        def line(done: int, text: str | None = None) -> None:
            if text is not None:
                print(f"{label} {done}/{total}  {text}", flush=True)

        yield line
        return
    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn())
    columns += (rich.TimeElapsedColumn(), rich.TimeRemainingColumn(), rich.TextColumn("{task.fields[text]}"))
    with rich.Progress(*columns, console=console) as bars:
        task = bars.add_task(label, total=total, completed=done, text="")

        def advance(done: int, text: str | None = None) -> None:
            bars.update(task, completed=done, **({} if text is None else {"text": text}))

        yield advance
