"""Local task files, checked: llm-foundry's jsonl layouts and HellaSwag's plain text.

The prompts are lm-eval's: ARC "Question: ...\\nAnswer:", BoolQ passage, question and "Answer:", OpenBookQA and
HellaSwag the bare stem, WinoGrande two contexts and one continuation.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infmoe.errors import InfMoEError
from infmoe.eval.zero_shot.tasks import Column

_HELLASWAG_LINES = 6


@dataclass
class LocalTask:
    """A file's items.

    Attributes:
        column: what it is.
        path: the file.
        docs: one dict an item: `contexts` and `continuations` (one of the two has one entry for all answers),
            `choices` (the answers' texts) and `gold`.
        notes: what was found and mended or left out, by name.
    """

    column: Column
    path: Path
    docs: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)

    def note(self, what: str) -> None:
        """Count one more of these."""
        self.notes[what] = self.notes.get(what, 0) + 1


def read_local(column: Column, folder: Path) -> LocalTask:
    """Read a task's file.

    Repeated answers are scored once (ARC pads some items to four); repeated and empty items are counted, the empty
    ones left out.

    Raises:
        InfMoEError: no such file, or a line that is no item.
    """
    if column.file is None:
        raise InfMoEError(f"{column.name} has no local file: leave out --tasks-dir to take it from the Hub")
    path = folder / column.file
    task = LocalTask(column, path)
    seen = set()
    try:
        raw = list(_hellaswag(path) if column.task == "hellaswag" else _jsonl(path))
    except OSError as error:
        raise InfMoEError(
            f"cannot read {path} ({error.strerror}): put the file there, or give another --tasks-dir"
        ) from error
    except UnicodeDecodeError as error:
        raise InfMoEError(f"{path} is not UTF-8 at byte {error.start}: restore the file") from error
    for number, values in raw:
        doc = _doc(column, values, f"{path}:{number}")
        if not all(text.strip() for text in (*doc["contexts"], *doc["continuations"], *doc["choices"])):
            task.note("empty, left out")
            continue
        fingerprint = json.dumps(doc)
        if fingerprint in seen:
            task.note("repeated items")
        seen.add(fingerprint)
        if len(doc["contexts"]) == 1 and len(set(doc["choices"])) < len(doc["choices"]):
            task.note("repeated answers, scored once")
            doc = _distinct(doc)
            if len(doc["choices"]) < 2:
                raise InfMoEError(f"{path}:{number}: all answers are the same: restore the file")
        task.docs.append(doc)
    if not task.docs:
        raise InfMoEError(f"{path} holds no items: restore the file")
    return task


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except ValueError as error:
                raise InfMoEError(f"{path}:{number}: no JSON: restore the file") from error
            if not isinstance(values, dict):
                raise InfMoEError(f"{path}:{number}: no JSON object: restore the file")
            yield number, values


def _hellaswag(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = path.read_text(encoding="utf-8").split("\n")  # `splitlines` knows too many line ends
    while lines and not lines[-1].strip():
        lines.pop()
    if len(lines) % _HELLASWAG_LINES:
        raise InfMoEError(f"{path}: {len(lines)} lines are no multiple of {_HELLASWAG_LINES}: restore the file")
    for start in range(0, len(lines), _HELLASWAG_LINES):
        query, gold, *choices = lines[start : start + _HELLASWAG_LINES]
        if not gold.strip().isdecimal():
            raise InfMoEError(f"{path}:{start + 2}: no label: restore the file")
        yield start + 1, {"query": query, "choices": choices, "gold": int(gold)}


def _doc(column: Column, values: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        if column.task == "winogrande":
            options, rest = values["context_options"], values["continuation"]
            contexts, choices, continuations = list(options), list(options), [" " + rest]
        else:
            if not isinstance(values["query"], str) or not isinstance(values["choices"], list):
                raise TypeError("query must be a text, choices a list")
            contexts, choices = [_prompt(column, values["query"])], list(values["choices"])
            continuations = [" " + choice for choice in choices]
        gold = values["gold"]
    except (KeyError, TypeError, AttributeError) as error:
        raise InfMoEError(f"{where}: no item of {column.name} ({error}): restore the file") from error
    if not all(isinstance(text, str) for text in (*contexts, *choices)) or len(choices) < 2:
        raise InfMoEError(f"{where}: an item needs two answers at least, all texts: restore the file")
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise InfMoEError(f"{where}: label {gold!r} is none of the {len(choices)} answers: restore the file")
    return {"contexts": contexts, "continuations": continuations, "choices": choices, "gold": gold}


def _prompt(column: Column, query: str) -> str:
    if column.task == "boolq":
        return query.removeprefix("Passage: ").rstrip() + ("" if query.rstrip().endswith("?") else "?") + "\nAnswer:"
    if column.task.startswith("arc"):
        return f"{query}\nAnswer:"
    return query


def _distinct(doc: dict[str, Any]) -> dict[str, Any]:
    """The item with each answer once; the label points to the first of its text."""
    choices = list(dict.fromkeys(doc["choices"]))
    continuations = list(dict.fromkeys(doc["continuations"]))
    gold = choices.index(doc["choices"][doc["gold"]])
    return {"contexts": doc["contexts"], "continuations": continuations, "choices": choices, "gold": gold}
