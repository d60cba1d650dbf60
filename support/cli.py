"""What the scripts share: options from a dataclass, and one clear sentence for bad input."""
import argparse
import math
import os
import sys
from dataclasses import field, fields


class DataError(ValueError):
    """Input that cannot be used as it is; the message names the file, the record and the remedy."""


def option(default, help: str, low=0, high=math.inf, **argparse_arguments):
    """A dataclass field that is also a command-line flag; a number lies within low and high."""
    metadata = {"help": help, "low": low, "high": high, **argparse_arguments}
    return field(default_factory=lambda: default, metadata=metadata)


def parse_options(cls, description: str, argv=None):
    """An instance of the dataclass `cls`, filled from the command line.

    A list option takes several values; a bool is a switch. Exits with code 2, as argparse does,
    on a value that does not fit.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    lowest = {}
    highest = {}
    for f in fields(cls):
        default = f.default_factory()
        arguments = dict(f.metadata)
        lowest[f.name] = arguments.pop("low")
        highest[f.name] = arguments.pop("high")
        text = arguments.pop("help")
        if default is not None and default is not False and default not in ("", []):
            text += f" (default: {default})"
        if isinstance(default, bool):
            arguments["action"] = "store_true"
        elif isinstance(default, list):
            arguments["nargs"] = "+"
        else:
            arguments.setdefault("type", str if default is None else type(default))
        flag = "--" + f.name.replace("_", "-")
        name = f.name if arguments.pop("positional", False) else flag
        parser.add_argument(name, default=default, help=text.replace("%", "%%"), **arguments)
    values = vars(parser.parse_args(argv))
    for name, value in values.items():
        if not isinstance(value, (int, float)):
            continue
        flag = "--" + name.replace("_", "-")
        if not value >= lowest[name]:                                           # NaN is not, either
            parser.error(f"{flag} must be at least {lowest[name]}, not {value}")
        if value > highest[name]:
            parser.error(f"{flag} must be at most {highest[name]}, not {value}")
    return cls(**values)


def run_script(main, *expected: type[Exception]) -> None:
    """Run main(). An expected error becomes one sentence and exit code 2, without a traceback.

    Expected are DataError, the operating system's errors, and those given.
    """
    script = os.path.basename(sys.argv[0])
    try:
        main()
    except (DataError, OSError, *expected) as e:
        print(f"{script}: {e}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{script}: stopped", file=sys.stderr)
        sys.exit(130)
