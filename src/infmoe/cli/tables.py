"""Tables of points on a terminal or in a pipe."""

import json
from collections.abc import Sequence
from typing import Any


def show_points(result: dict[str, Any], as_json: bool) -> None:
    """Print the points of a sweep or frontier as a table, or the whole as one JSON object."""
    if as_json:
        print(json.dumps(result))
        return
    from rich.console import Console
    from rich.table import Table

    from infmoe.eval.report import table_cells

    titles, cells = table_cells(result["points"])
    console = Console(highlight=False)
    # a pipe gets whole lines; on a narrow terminal titles are broken at spaces, and no figure ever is
    columns = [[title, *(row[i] for row in cells)] for i, title in enumerate(titles)]
    if console.is_terminal and _width(columns) > console.width:
        columns = [[title.replace(" ", "\n"), *column] for title, *column in columns]
    console.width = max(console.width, _width(columns))
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, (title, *_) in enumerate(columns):
        table.add_column(title, justify="right" if i else "left")
    for row in cells:
        table.add_row(*row)
    console.print(table)
    print(
        f"* reference of Δ; {result['windows']} windows of {result['window']} tokens, split 'val' of "
        f"{result['data']};\nloss in nats per token; union: share of the FFN that a token uses; "
        "MFLOPs per token, forward"
    )


def show_budgets(rows: Sequence[dict[str, Any]]) -> None:
    """Print what became of each budget that was tried."""
    for row in rows:
        regret = "-" if row["regret"] is None else f"{row['regret']:+.4f}"
        print(
            f"budget {row['budget_ms']:.2f} ms: met by {row['met']:.1%} of {row['steps']} tokens with {row['picked']}; "
            f"regret {regret} nats"
        )


def _width(columns: Sequence[Sequence[str]]) -> int:
    """Characters of a table of these columns, two between any two."""
    return sum(max(len(line) for cell in column for line in cell.split("\n")) + 2 for column in columns)
