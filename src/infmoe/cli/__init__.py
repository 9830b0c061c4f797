"""The command line: one function per command, heavy imports inside, so that `--help` is instant."""

import os
import re
import sys
from collections.abc import Sequence

import typer

from infmoe.cli import evidence, training, using  # noqa: F401 - their commands register themselves
from infmoe.cli.app import app
from infmoe.errors import InfMoEError

__all__ = ["app", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a mistake that the user can mend ends in one line on stderr.

    Args:
        argv: the words after `infmoe`; None: this process's own.

    Returns:
        The exit code: 0, 1 where the reader of the output has gone, 2 for a mistake, 3 where training diverged,
        130 after Ctrl-C.
    """
    # our own lines say what matters; transformers reads this when it is first imported
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        command = typer.main.get_command(app)
        with command.make_context("infmoe", words) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as done:
        return done.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # else Python would complain when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        message = _mendable(error) or _out_of_memory(error, words)
        if message is None:
            raise
        print(f"error: {_in_options(' '.join(message.splitlines()), words)}", file=sys.stderr)
        return error.exit_code if isinstance(error, InfMoEError) else 2
    return 0


def _in_options(message: str, words: Sequence[str]) -> str:
    """The message with the library's name of an option that was given, num_samples, as it was given, --num-samples."""
    for option in {word.partition("=")[0] for word in words if word.startswith("--")}:
        name = option[2:].replace("-", "_")
        if "_" in name:  # any other is a word like others
            message = re.sub(rf"(?<![\w.'/-]){re.escape(name)}(?![\w.'/=-])", option, message)
    return message


def _out_of_memory(error: Exception, words: Sequence[str]) -> str | None:
    """What to lower where the device's memory is full; None: that is not what happened."""
    torch = sys.modules.get("torch")  # whoever raised it has imported it
    if torch is None or not isinstance(error, torch.OutOfMemoryError):
        return None
    command = typer.main.get_command(app)
    assert isinstance(command, typer.core.TyperGroup)
    options = {name for parameter in command.commands[words[0]].params for name in parameter.opts}
    remedies = {
        "--batch-size": "a smaller --batch-size",
        "--rows": "fewer --rows",
        "--dtype": "--dtype bfloat16",
        "--device": "--device cpu",
    }
    known = [remedy for option, remedy in remedies.items() if option in options]
    return f"the device's memory is full: {'give ' if known else ''}{' or '.join(known) or 'take one with more'}"


def _mendable(error: Exception) -> str | None:
    """What to tell the user about a mistake of theirs, or of their machine's; None: it is ours."""
    if isinstance(error, InfMoEError):
        return str(error)
    if isinstance(error, OSError):
        where = "" if error.filename is None else f"{error.filename}: "
        return where + (error.strerror or str(error).partition("\n")[0])
    if hasattr(error, "format_message"):  # a word on the command line that typer does not know
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context is not None else ""
        return error.format_message().rstrip(".") + hint
    if type(error).__module__.startswith("huggingface_hub"):
        # transformers' strict configs wrap what a check raised
        return str(error.__cause__ or error).strip().splitlines()[-1].strip()
    return None
