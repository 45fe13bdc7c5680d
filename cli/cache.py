"""`finetune cache list|clear`: features and decoded photos that are kept for the next run."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.console import print_lines, print_table

app = typer.Typer(no_args_is_help=True, help="Show or clear cached features and photos.")

Folder = Annotated[
    Path | None, typer.Option("--cache-dir", help="Folder of what is cached.", show_default="the user's")
]


@app.command("list")
def list_command(
    cache_dir: Folder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """List cached features and decoded photos, the most recently used first."""
    from finetune.cache import default_cache_dir, list_entries
    from finetune.placement import size

    folder = cache_dir or default_cache_dir()
    entries = list_entries(folder)
    if as_json:
        rows = [{"key": e.key, "bytes": e.bytes, "used": e.used, "about": e.about} for e in entries]
        print(json.dumps(rows, indent=2))
        return
    if not entries:
        print_lines([f"Nothing is cached in {folder}."])
        return
    columns = [("key", "left"), ("size", "right"), ("last used", "left"), ("rows", "right")]
    columns += [("images", "left"), ("network", "left")]
    table = [
        [
            e.key[:12],
            size(e.bytes),
            _date(e.used),
            f"{rows:,}" if isinstance(rows := e.about.get("rows", 0), int) else "?",
            *_named(e.about),
        ]
        for e in entries
    ]
    print_table(str(folder), columns, table)
    print_lines(["", f"{len(entries)} entries, {size(sum(e.bytes for e in entries))}"])


def _date(seconds: float) -> str:
    """Return a time for people; a file may be dated thousands of years ahead."""
    try:
        return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):
        return "?"


def _named(about: dict[str, Any]) -> tuple[str, str]:
    """Return what an entry's images and network are called; entries of an older version say less."""
    images = f"{about.get('data', '?')} {about.get('split', '')}".rstrip()
    numbers = f"{about.get('image_size', '?')} px, {about.get('dtype', '?')}".replace("torch.", "")
    return f"{images}, {about.get('view', '?')}", f"{about.get('arch', '?')}, {numbers}"


@app.command("clear")
def clear_command(cache_dir: Folder = None) -> None:
    """Delete cached features and photos, except those that a run is writing now, and remembered timings."""
    from finetune.cache import clear, default_cache_dir, list_entries
    from finetune.placement import size
    from finetune.precision import forget

    folder = cache_dir or default_cache_dir()
    entries = list_entries(folder)
    freed = clear(folder, entries)
    kept = len(list_entries(folder))
    in_use = f", {kept} in use kept" if kept else ""
    print_lines(
        [
            f"{size(freed)} freed, {len(entries) - kept} entries deleted{in_use}",
            f"{forget(folder)} remembered timings forgotten; the next run measures anew",
        ]
    )
