"""`python -m cli`: the command line where its script is not at hand, as with `torchrun -m cli`."""

from cli.main import main

if __name__ == "__main__":
    main()
