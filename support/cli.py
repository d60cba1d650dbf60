"""What the scripts share: options from a dataclass, and one clear sentence for bad input."""
import argparse
import contextlib
import io
import os
import signal
import sys
import time
from dataclasses import field, fields


class DataError(ValueError):
    """Input that cannot be used as it is; the message names the file, the record and the remedy."""


# help texts of the options that several scripts have
HELP = {
    "template": "chat template; auto: the checkpoint's own, else chatml if the tokenizer has its "
                "tokens, else plain",
    "native_calls": "send APIGen's and ShareGPT's calls through the checkpoint's own chat "
                    "template, as tool calls; else they are text",
    "dtype": "precision of matrix products; auto: bfloat16 where the CPU or GPU multiplies it "
             "natively, else float32",
}


def option(default, help: str, low=0, high=2**32, **argparse_arguments):
    """A dataclass field that is also a command-line flag; a number must be in [low, high]."""
    metadata = {"help": help, "range": (low, high), **argparse_arguments}
    return field(default_factory=lambda: default, metadata=metadata)


def parse_options(cls, description: str, argv=None):
    """An instance of the dataclass `cls`, filled from the command line.

    A list option takes several values; a bool is a switch. Exits with code 2, as argparse does,
    on a value that does not fit.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    ranges = {}
    for f in fields(cls):
        default = f.default_factory()
        arguments = dict(f.metadata)
        ranges[f.name] = arguments.pop("range")
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
    with contextlib.nullcontext() if is_first_rank() else contextlib.redirect_stderr(io.StringIO()):
        values = vars(parser.parse_args(argv))
        for name, value in values.items():
            low, high = ranges[name]
            if isinstance(value, (int, float)) and not low <= value <= high:        # NaN is neither
                bound = f"at most {high}" if value > high else f"at least {low}"
                flag = "--" + name.replace("_", "-")
                parser.error(f"{flag} must be {bound}, not {value}")
    return cls(**values)


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def printable(text: str) -> str:
    """Text that may go to a terminal: escape sequences and what shows nothing are spelled out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def run_script(main, *expected: type[Exception]) -> None:
    """Run main(). An expected error becomes one sentence and exit code 2, without a traceback.

    Expected are DataError, the operating system's errors, and those given.
    """
    script = os.path.basename(sys.argv[0])
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:      # closed: else the next open file would take its place
            setattr(sys, name, open(os.devnull, "r+"))      # noqa: SIM115 (open to the end)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")   # for characters that a terminal lacks
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:                 # `| head` has seen enough; what is left goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)                       # as a shell reports SIGPIPE
    except (DataError, OSError, *expected) as e:
        leave(f"{script}: {e}", 2)
    except RuntimeError as e:
        if is_first_rank() or "onnection" not in str(e):
            raise
        leave(f"{script}: rank 0 has left ({e})", 2)
    except KeyboardInterrupt:
        leave(f"{script}: stopped", 130)


def leave(sentence: str, code: int) -> None:
    """Exit with one sentence, which rank 0 says for all ranks.

    Another rank says it if it is still there a little later: rank 0 has not failed then.
    """
    if not is_first_rank():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)   # torchrun's, once rank 0 has left
        time.sleep(3)
    print(printable(sentence), file=sys.stderr, flush=True)
    sys.exit(code)
