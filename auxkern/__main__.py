"""``python -m auxkern COMMAND``, as torchrun's ``-m auxkern COMMAND``: the console command."""

from auxkern.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
