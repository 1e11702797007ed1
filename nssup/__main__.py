"""`nssup` and `python -m nssup`: the quick way for the hot verbs, the whole command line for the rest."""

import sys


def main(argv: "list[str] | None" = None) -> int:
    """The exit code of `nssup ARGV...` (default: sys.argv's)."""
    if argv is None:
        argv = sys.argv[1:]
    if argv[:1] == ["ctl"]:
        from nssup import fast

        code = fast.run(argv[1:])
        if code is not None:
            return code
    from nssup import cli

    return cli.main(argv)


if __name__ == "__main__":
    sys.exit(main())
