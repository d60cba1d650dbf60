"""Writing files so that none is ever seen half written: to a temporary name, then renamed."""
import json
import os


def write_json(path: str, content) -> None:
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(content, f, indent=2, ensure_ascii=False)
        f.write("\n")
    os.replace(path + ".tmp", path)
