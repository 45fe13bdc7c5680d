"""What the `finetune` command calls, and `python -m cli` where its script is not at hand, as with `torchrun -m cli`."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C while it is being imported ends it without a traceback."""
    try:
        from cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
