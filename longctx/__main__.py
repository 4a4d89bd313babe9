"""`python -m longctx` is `longctx`."""

from longctx.cli.main import main

if __name__ == "__main__":
    main()
