"""Progress for people: a live bar on a terminal, nothing where output is read by a program."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def data_progress(*, quiet: bool = False) -> Iterator[Callable[[Any], None]]:
    """A status line for `infmoe.data.prepare`; yields its callback."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    with Console(stderr=True).status("reading") as status:

        def update(progress: Any) -> None:
            if progress.stage == "tokenizer":
                status.update("training the tokenizer")
            else:
                megabytes = f"{progress.text_bytes / 1e6:,.1f} MB"
                status.update(f"{progress.documents:,} documents, {megabytes}, {progress.tokens:,} tokens")

        yield update


@contextmanager
def step_progress(what: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A bar over equal steps; yields the callback that takes one, with what the bar is to say.

    It is drawn by that callback alone: a thread that draws would share the processor with what is timed.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task(what, total=total)
        bar.refresh()
        yield lambda said: bar.update(task, advance=1, description=said, refresh=True)


@contextmanager
def point_progress(total: int, *, quiet: bool = False) -> Iterator[Callable[[Any], None]]:
    """A bar over the points of a sweep; yields the callback to call after each."""
    with step_progress("evaluating", total, quiet=quiet) as step:
        yield lambda point: step(point.label())
