"""`finetune weights list|fetch|verify|convert`: the weight files on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cli.console import print_lines, print_table
from cli.options import require_folder

app = typer.Typer(no_args_is_help=True, help="List, fetch, verify or convert weight files.")

Folder = Annotated[
    Path | None, typer.Option("--weights-dir", help="Local model directory.", show_default="$FINETUNE_WEIGHTS")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there.")]


@app.command("list")
def list_command(weights_dir: Folder = None, as_json: AsJson = False) -> None:
    """List the weight files of the local model directory, the torch hub cache and the Hugging Face cache.

    Of the caches only files that timm knows are listed. A sha256 that is recorded nowhere is computed.
    """
    from finetune.placement import size
    from weights.inventory import searched_places, weight_files

    files = weight_files(weights_dir)
    rows = [one.as_dict() for one in files]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    places = searched_places(weights_dir)
    if not files:
        print_lines([f"No weights in {', '.join(places)}; finetune weights fetch gets some."])
        return
    columns = [("arch", "left"), ("size", "right"), ("sha256", "left"), ("licence", "left"), ("where", "left")]
    table = [[row["arch"], size(row["bytes"]), row["sha256"][:12], row["licence"], row["source"]] for row in rows]
    print_table(f"{len(files)} weight file{'' if len(files) == 1 else 's'}", columns, table)
    print_lines(["", f"{size(sum(one.bytes for one in files))} in {', '.join(places)}"])


@app.command("fetch")
def fetch_command(
    arch: Annotated[str, typer.Argument(help="Any timm architecture, with or without a pretrained tag.")],
    weights_dir: Folder = None,
    force: Force = False,
) -> None:
    """Put pretrained weights into the local model directory, from the caches or from the network.

    The file is checked before it is kept: its sha256 where one is published, every tensor, and that they fit.

    Example: finetune weights fetch resnet50.a1_in1k --weights-dir models
    """
    from finetune.placement import size
    from weights.arch import resolve_arch
    from weights.keep import fetch
    from weights.verify import tensor_count

    kept = fetch(resolve_arch(arch), weights_dir, force=force)
    print_lines(
        [
            f"{kept.path} ({size(kept.path.stat().st_size)}, {tensor_count(kept.tensors)}, {kept.source})",
            f"sha256 {kept.sha256}",
        ]
    )


@app.command("verify")
def verify_command(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help="Weight files or folders of them; without any, all that `list` shows.", show_default=False),
    ] = None,
    arch: Annotated[
        str | None, typer.Option(help="Whose weights they should be.", show_default="what each file states")
    ] = None,
    weights_dir: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Read weight files whole: their sha256 against the recorded one, every tensor, and that they fit their network.

    The exit code is 1 when a file is damaged or its tensors do not fit. Nothing is changed.

    Example: finetune weights verify models
    """
    from weights.arch import resolve_arch
    from weights.inventory import files_to_verify
    from weights.verify import verify

    wanted = resolve_arch(arch) if arch else None
    verdicts = [verify(file, wanted) for file in files_to_verify(paths or [], weights_dir)]
    bad = [one for one in verdicts if not one.ok]
    if as_json:
        print(json.dumps([one.as_dict() for one in verdicts], indent=2))
    else:
        lines = [f"{'ok' if one.ok else 'problem':<8} {one.file.path}: {one.sentence()}" for one in verdicts]
        print_lines([*lines, "", f"{len(verdicts) - len(bad)} of {len(verdicts)} sound"])
    if bad:
        raise typer.Exit(1)


@app.command("convert")
def convert_command(
    path: Annotated[Path, typer.Argument(help="A .pth, .pth.tar, .pt, .bin or .ckpt file.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option(help="The file to write.", show_default="beside it, as .safetensors")
    ] = None,
    force: Force = False,
) -> None:
    """Write a file of torch.save as safetensors: the tensors alone, without wrappers' prefixes.

    No code of the file is run. A file that holds more than tensors and plain values is refused.

    Example: finetune weights convert checkpoint.pth.tar --output resnet18.safetensors
    """
    from finetune.placement import size
    from weights.keep import convert
    from weights.verify import tensor_count

    if output is not None:
        require_folder(output, "--output")
    kept = convert(path, output, force=force)
    print_lines(
        [
            f"{kept.path} ({size(kept.path.stat().st_size)}, {tensor_count(kept.tensors)} of {kept.source})",
            f"sha256 {kept.sha256}",
        ]
    )
