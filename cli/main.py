"""The `finetune` command: its sub-commands, and the one place where an error becomes a line and an exit code.

Nothing here imports torch: `finetune --help` answers at once.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from cli import baseline, cache, check, compare, demo, doctor, export, init, layers, plan, predict, report, run, sweep
from cli import eval as evaluating
from cli import list as listing
from cli import weights as weight_files
from finetune.allocator import tune_allocator
from finetune.launch import is_first_here, require_alone
from weights.errors import FinetuneError, StoppedError, UsageError

SHARED = ("run", "baseline")
"""The commands that several processes can share."""


class Commands(TyperGroup):
    """The group of sub-commands, which prints a FinetuneError as one line and exits with its code."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run the sub-command."""
        try:
            return super().invoke(ctx)
        except FinetuneError as error:
            from cli.console import print_error

            # All processes of a machine have the same command line, and one is enough to say what is wrong with it.
            if not error.told and (is_first_here() or not isinstance(error, UsageError)):
                print_error(str(error))
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:  # before a run begins, and in commands that leave nothing half-done
            raise typer.Exit(StoppedError.exit_code) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune a pretrained image classifier: the layers that do not train are computed once.",
)
app.command("check")(check.check_command)
app.command("init")(init.init_command)
app.command("plan")(plan.plan_command)
app.command("run")(run.run_command)
app.command("sweep")(sweep.sweep_command)
app.command("baseline")(baseline.baseline_command)
app.command("layers")(layers.layers_command)
app.command("eval")(evaluating.eval_command)
app.command("predict")(predict.predict_command)
app.command("export")(export.export_command)
app.command("report")(report.report_command)
app.command("compare")(compare.compare_command)
app.command("list")(listing.list_command)
app.command("demo")(demo.demo_command)
app.command("doctor")(doctor.doctor_command)
app.add_typer(cache.app, name="cache")
app.add_typer(weight_files.app, name="weights")


@app.callback(invoke_without_command=True)
def version_callback(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Show the version and exit.", is_eager=True),
) -> None:
    """Fine-tune a pretrained image classifier: the layers that do not train are computed once."""
    if version:
        from importlib.metadata import version as version_of

        print(f"finetune {version_of('finetune-timm')}")
        raise typer.Exit
    if context.invoked_subcommand not in SHARED:
        require_alone(context.invoked_subcommand or "")


def main() -> None:
    """Run the command line."""
    tune_allocator()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # Names of classes and files that the terminal's or the pipe's encoding lacks become escapes, not an error.
        sys.stdout.reconfigure(errors="backslashreplace")
    code: Any = 0
    try:
        app(prog_name="finetune")
    except SystemExit as ended:
        code, error = ended.code, _output_error("")
    except OSError:
        error = _output_error("\n")  # of what failed, nothing is left to be written again
        if error is None:
            raise
    if error is not None:
        if error.errno != errno.EPIPE:  # whoever read it has seen enough
            from cli.console import print_error

            print_error(
                f"Standard output cannot be written ({error.strerror}); send it elsewhere, or make room. Files that "
                "were written are kept."
            )
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still holds
        code = code or 1
    sys.exit(code)


def _output_error(text: str) -> OSError | None:
    """Return what keeps a text, after all that went before, from standard output, if anything does."""
    if sys.stdout is None:  # closed before this program began: nobody wants to read it
        return None
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        return error
    return None


if __name__ == "__main__":
    main()
