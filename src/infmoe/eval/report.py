"""The report of a run: one self-contained HTML page that says what was measured and how."""

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infmoe.layers.point import Point

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100% } pre { background: #f4f4f4; padding: .8rem; white-space: pre-wrap }
table { border-collapse: collapse; font-size: .9rem } td, th { padding: .2rem .7rem; text-align: right }
tr { border-bottom: 1px solid #ddd } td:first-child, th:first-child { text-align: left } .note { color: #555 }
"""

# column title -> (key, format)
SWEEP_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("loss (nats)", "loss", "{:.4f}"),
    ("± s.e.", "loss_se", "{:.4f}"),
    ("Δ", "delta", "{:+.4f}"),
    ("± s.e. Δ", "delta_se", "{:.4f}"),
    ("Δ", "increase", "{:+.4f}"),
    ("± s.e. Δ", "increase_se", "{:.4f}"),
    ("union", "union_ratio", "{:.3f}"),
    ("overlap", "overlap_ratio", "{:.3f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("MFLOPs executed", "flops_executed", "{:.3f}"),
    ("MFLOPs ideal", "flops_ideal", "{:.3f}"),
    ("decode ms", "decode_ms", "{:.2f}"),
    ("ms per token", "token_ms", "{:.2f}"),
    ("95 % below", "token_ms_p95", "{:.2f}"),
)


def table_cells(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of a table of points; columns that no row has are left out."""
    columns = [c for c in SWEEP_COLUMNS if any(row.get(c[1]) is not None for row in rows)]
    cells = []
    for row in rows:
        values = [row.get(key) for _, key, _ in columns]
        scaled = [
            None if v is None else v / 1e6 if key.startswith("flops") else v
            for v, (_, key, _) in zip(values, columns, strict=True)
        ]
        texts = [
            "" if value is None else form.format(value) for value, (_, _, form) in zip(scaled, columns, strict=True)
        ]
        marks = (" *" if row["is_reference"] else "") + (" •" if row.get("on_frontier") else "")
        cells.append([Point.of(row).label() + marks, *texts])
    return ["point", *(title for title, _, _ in columns)], cells


def markdown_points(rows: Sequence[dict[str, Any]]) -> str:
    """The same as a table in Markdown."""
    titles, cells = table_cells(rows)
    rule = ["---", *("---:" for _ in titles[1:])]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in (titles, rule, *cells)]  # schedules have bars
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines() if line]


def write_report(
    path: Path,
    *,
    title: str,
    introduction: str,
    pictures: Sequence[tuple[Path, str]],
    rows: Sequence[dict[str, Any]],
    samples: Sequence[tuple[str, str]],
    provenance: dict[str, Any],
) -> Path:
    """Write the page.

    Args:
        path: the `.html` file.
        title: its heading.
        introduction: a paragraph.
        pictures: files, each with a caption; embedded.
        rows: the sweep's points (see `evaluate_points`).
        samples: generated texts, each with what made it.
        provenance: see `infmoe.provenance`.
    """
    titles, cells = table_cells(rows)
    head = "".join(f"<th>{html.escape(t)}</th>" for t in titles)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in cells)
    images = "".join(
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,'
        f'{base64.b64encode(picture.read_bytes()).decode()}"><figcaption class="note">{html.escape(caption)}'
        "</figcaption></figure>"
        for picture, caption in pictures
    )
    texts = "".join(f"<p class=note>{html.escape(what)}</p><pre>{html.escape(text)}</pre>" for what, text in samples)
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><p>{html.escape(introduction)}</p>{images}"
        f"<h2>The dials</h2><table><tr>{head}</tr>{body}</table>"
        "<p class=note>Loss in nats per token over fixed windows of held-out documents; s.e. over windows; "
        "Δ is the difference to the reference point (*), paired over windows. FLOPs per token, forward, whole "
        "model, router counted: executed is what the paths run that skip nothing (every neuron, then the mask), ideal "
        "is what running only the measured union of the K masks takes.</p>"
        f"<h2>Text</h2>{texts}"
        f"<h2>How it was made</h2><pre>{html.escape(json.dumps(provenance, indent=1))}</pre></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)
    return path
