"""What each column of the paper's Table 1 means here: one table for code and docs."""

from dataclasses import dataclass

from infmoe.errors import InfMoEError, unknown_name

Z = 1.96  # of a 95 % interval over hundreds of items


@dataclass(frozen=True)
class Column:
    """One task.

    Attributes:
        name: the column's heading, as the paper prints it.
        task: lm-eval's own task.
        metric: what the column shows: "acc", the share of items whose right answer has the highest log-likelihood.
            The paper's figures fit it.
        version: of lm-eval's task.
        chance: accuracy of guessing.
        items: of the split that is scored: the test split, the validation split where that has no labels.
        file: the local file's name, or None where there is none.
        per_char: whether lm-eval reports "acc_norm" (per character of the answer) for it too.
        fixed_answers: whether all items have the same answers ("no", "yes"), one of which a model may prefer blindly.
        after_passage: what follows a passage that several items may share; None: items of one context are taken
            to share it; where the answers stand in the contexts, those of one pair of answers after the same two words.
    """

    name: str
    task: str
    metric: str
    version: float
    chance: float
    items: int
    file: str | None
    per_char: bool = False
    fixed_answers: bool = False
    after_passage: str | None = None


COLUMNS: tuple[Column, ...] = (
    Column("BoolQ", "boolq", "acc", 2.0, 0.5, 3270, "boolq.jsonl", fixed_answers=True, after_passage="\nQuestion:"),
    Column("HellaSwag", "hellaswag", "acc", 1.0, 0.25, 10042, "hellaswag_val.txt", per_char=True),
    Column("WinoGrande", "winogrande", "acc", 1.0, 0.5, 1267, "winogrande.jsonl"),
    Column("ARC-e", "arc_easy", "acc", 1.0, 0.25, 2376, "arc_easy.jsonl", per_char=True),
    Column("ARC-c", "arc_challenge", "acc", 1.0, 0.25, 1172, "arc_challenge.jsonl", per_char=True),
    Column("OBQA", "openbookqa", "acc", 1.0, 0.25, 500, "openbook_qa.jsonl", per_char=True),
    Column("RACE-high", "race", "acc", 3.0, 0.25, 1045, None),
)
# Reading comprehension where RACE can't be had: never shown under its name.
SAT = Column(
    "SAT-en", "sat_en", "acc", 1.0, 0.25, 206, "agi_eval_sat_en.jsonl", fixed_answers=True, after_passage="\nQ:"
)
ALL = {column.task: column for column in (*COLUMNS, SAT)}


def columns_named(text: str, *, local: bool) -> list[Column]:
    """The tasks of a command line: "paper", or lm-eval's names separated by commas.

    Args:
        text: what was given.
        local: whether they come from files: then SAT-en stands where RACE can't.

    Raises:
        InfMoEError: an unknown task, or SAT-en where there are no files.
    """
    if text == "paper":
        return [column if column.file or not local else SAT for column in COLUMNS]
    chosen = []
    for name in dict.fromkeys(text.split(",")):
        if name.strip() not in ALL:
            raise unknown_name("task", name.strip(), [*ALL, "paper"])
        if ALL[name.strip()] is SAT and not local:
            raise InfMoEError("sat_en has a local file only: give --tasks-dir, or take race from the Hub")
        chosen.append(ALL[name.strip()])
    return chosen
