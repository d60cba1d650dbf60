"""Records out of JSON files of any size, and one sentence for whatever is wrong with a file."""
import contextlib
import json
import os
import re

from tqdm import tqdm

from support.cli import DataError

LONGEST_RECORD = 2**28      # characters; what is longer is not read into memory
LFS_POINTER = "version https://git-lfs.github.com/spec/"
COPY_AGAIN = "copy it from the model's release"


# --------------------------------------------------------------------------------------------------
# One sentence for what is wrong

@contextlib.contextmanager
def reading(where: str, remedy: str):
    """Turn whatever goes wrong with the content of somebody's file into one DataError.

    where: the file, and the record if there is one. The body only reads, so that a fault in it is
    a fault of the content: a ValueError, a missing key, too deep a nesting, too little memory, an
    error of tokenizers, which raises plain Exceptions and panics. A DataError raised in the body
    says what is wrong and what to do; it gets only the `where`.
    """
    try:
        yield
    except DataError as e:
        raise DataError(f"{where}: {e}") from None
    except BaseException as e:
        if isinstance(e, Exception) or type(e).__name__ == "PanicException":
            raise DataError(f"{where} {fault(e)}; {remedy}.") from None
        raise


def fault(error: BaseException) -> str:
    """What is wrong with a file, as the end of a sentence that began with its name."""
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror or error})"
    if isinstance(error, UnicodeDecodeError):
        return "cannot be read (not UTF-8 text)"
    if isinstance(error, UnicodeEncodeError):
        half = ascii(error.object[error.start])
        return f"holds half a character ({half}, a surrogate without its pair)"
    if isinstance(error, json.JSONDecodeError):
        if error.doc.startswith(LFS_POINTER):
            return "is a git-lfs pointer, not the file itself: run git lfs pull"
        return f"is not JSON ({error.msg})"
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    if isinstance(error, MemoryError):
        return "needs more memory than there is"
    if isinstance(error, KeyError):
        return f"lacks {error}, which its format has"
    message = " ".join(str(error).split())[:300]
    return f"does not follow its format ({message})"


# --------------------------------------------------------------------------------------------------
# One object per file

def read_object(path: str) -> dict:
    """The one JSON object that a file holds."""
    content = next((record for _, record in read_records(path)), None)
    if not isinstance(content, dict):
        raise DataError(f"{path} does not hold one JSON object; fetch the benchmark's file again.")
    return content


def read_text(path: str) -> str:
    """The text of a small file of a model; a byte order mark is no part of it."""
    with reading(path, COPY_AGAIN), open(path, encoding="utf-8-sig") as file:
        text = file.read()
    if text.startswith(LFS_POINTER):
        raise DataError(f"{path} is a git-lfs pointer, not the file itself; run git lfs pull.")
    return text


def read_settings(path: str) -> dict:
    """The JSON object that a file of a model holds; {} where there is no such file."""
    if not os.path.exists(path):
        return {}
    text = read_text(path)
    with reading(path, COPY_AGAIN):
        settings = json.loads(text)
    if not isinstance(settings, dict):
        raise DataError(f"{path} holds no JSON object; {COPY_AGAIN}.")
    return settings


# --------------------------------------------------------------------------------------------------
# Many records per file

def read_records(path: str, progress: bool = False, longest: int = LONGEST_RECORD):
    """Yield (where, record) of a JSON list or a JSON Lines file of any size, holding little more
    than one record in memory. A record may have `longest` characters."""
    try:
        with (
            open(path, encoding="utf-8-sig") as file,
            tqdm(desc=f"read {path}", total=os.path.getsize(path), unit="B", unit_scale=True,
                 disable=not progress, delay=1) as bar,
        ):
            head = file.read(2**16).lstrip()
            file.seek(0)
            if head.startswith("["):
                for number, record in enumerate(list_elements(file, bar, longest), 1):
                    yield f"{path}, record {number}", record
            elif head.split("\n")[0].strip() == "{":    # a single record over several lines
                text = file.read(longest + 1)
                check_length(text, longest, file, line=1)
                yield f"{path}, record 1", decode(json.loads, text)
            else:
                for number, record in json_lines(file, bar, longest):
                    yield f"{path}, line {number}", record
    except json.JSONDecodeError as e:
        raise DataError(f"{path}, line {e.lineno}: {fault(e).removeprefix('is ')}; "
                        "fix the line, or export the file again.") from None
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path} {fault(e)}; check the file.") from None


def check_length(text: str, longest: int, file, line: int) -> None:
    if len(text) > longest:
        raise DataError(f"{file.name}, line {line}: a record of more than {longest:,} characters; "
                        "split or remove it.")


def decode(function, text: str, *position):
    """function(text, *position) of the json module, with every fault as a JSONDecodeError."""
    try:
        return function(text, *position)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        message = "nested too deeply"
    except ValueError:
        message = "a number with too many digits"
    raise json.JSONDecodeError(message, text, *(position or [0]))


def json_lines(file, bar, longest: int):
    """Yield (line number, record) of JSON Lines; a JSONDecodeError has the line of the file."""
    number = 0
    while line := file.readline(longest + 1):
        number += 1
        check_length(line, longest, file, number)
        bar.update(len(line))
        if not line.strip():
            continue
        try:
            yield number, decode(json.loads, line)
        except json.JSONDecodeError as e:
            e.lineno = number
            raise


SEPARATOR = re.compile(r"\s*([\[,\]]?)\s*")
LIST_END = object()


def list_elements(file, bar, longest: int = LONGEST_RECORD):
    """Yield the elements of one JSON list, read a megabyte at a time.

    A JSONDecodeError has the line of the file; one is raised, too, for text after the list.
    """
    text = ""               # what is held of the file ...
    line = 1                # ... from this line on ...
    position = 0            # ... and yielded up to here
    expected = "["          # what stands before the next element
    file_ended = False
    while True:
        # Decode the next element, if the text that is held has all of it.
        try:
            element, end = next_element(text, position, expected)
            is_complete = end < len(text)           # 12 may go on as 123, and text follow a list
        except json.JSONDecodeError as e:
            # Text that is cut off breaks in an open string, or within the few characters of an
            # escape or a literal before its end.
            is_complete = e.pos <= len(text) - 16 and not e.msg.startswith("Unterminated")
            if is_complete or file_ended:
                e.lineno = line + text.count("\n", 0, e.pos)
                raise

        # Yield it, or read on.
        if is_complete or file_ended:
            if element is LIST_END:
                return
            yield element
            position = end
            expected = ","
        else:
            check_length(text[position:], longest, file, line + text.count("\n", 0, position))
            chunk = file.read(max(2**20, len(text) - position))
            bar.update(len(chunk))
            file_ended = not chunk
            line += text.count("\n", 0, position)
            text = text[position:] + chunk
            position = 0


def next_element(text: str, position: int, expected: str):
    """(element, its end) of the JSON list that `text` holds from `position` on; LIST_END, too."""
    separator = SEPARATOR.match(text, position)
    mark = separator[1]
    start = separator.end()
    is_empty_list = expected == "[" and mark == "[" and text.startswith("]", start)
    if mark == "]" or is_empty_list:
        end = start + is_empty_list
        rest = text[end:].lstrip()
        if rest:
            rest_start = len(text) - len(rest)
            raise json.JSONDecodeError("text after the end of the list", text, rest_start)
        return LIST_END, len(text)
    if mark != expected:
        raise json.JSONDecodeError(f"Expecting {expected!r} delimiter", text, start)
    return decode(json.JSONDecoder().raw_decode, text, start)
