"""What the scripts share: options from a dataclass, and one clear sentence for bad input."""
import argparse
import os
import sys
from dataclasses import field, fields


class DataError(ValueError):
    """Input that cannot be used as it is; the message names the file, the record and the remedy."""


def option(default, help: str, low=0, **argparse_arguments):
    """A dataclass field that is also a command-line flag; a number is at least `low`."""
    return field(default_factory=lambda: default, metadata={"help": help, "low": low, **argparse_arguments})


def parse_options(cls, description: str, argv=None):
    """The dataclass `cls` of options, filled from the command line. A list takes several values; a bool is a switch."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    low = {}
    for f in fields(cls):
        default, extra = f.default_factory(), dict(f.metadata)
        low[f.name] = extra.pop("low")
        text = extra.pop("help") + ("" if default is None or default is False or default in ("", []) else f" (default: {default})")
        if isinstance(default, bool):
            extra["action"] = "store_true"
        elif isinstance(default, list):
            extra["nargs"] = "+"
        else:
            extra.setdefault("type", str if default is None else type(default))
        positional = extra.pop("positional", False)
        parser.add_argument(f.name if positional else "--" + f.name.replace("_", "-"), default=default,
                            help=text.replace("%", "%%"), **extra)
    values = vars(parser.parse_args(argv))
    for name, value in values.items():
        if isinstance(value, (int, float)) and not value >= low[name]:
            parser.error(f"--{name.replace('_', '-')} must be at least {low[name]}, not {value}")
    return cls(**values)


def run_script(main, *expected: type[Exception]) -> None:
    """Run main(). An expected error, or one of the operating system's, becomes one sentence and exit code 2, no traceback."""
    try:
        main()
    except (DataError, OSError, *expected) as e:
        print(f"{os.path.basename(sys.argv[0])}: {e}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{os.path.basename(sys.argv[0])}: stopped", file=sys.stderr)
        sys.exit(130)
