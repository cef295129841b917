"""Merges the rows of a folder's benchmarks into one table: python bench/collect.py FOLDER

Every FOLDER/*.json that is a list of rows goes into FOLDER/rows.csv, a line each, with the file it came from; a value
like ms: {rmt: {median: 1}} becomes the column ms.rmt.median. Other JSON files stay as they are.
"""

import argparse
import csv
import json
import os
from pathlib import Path


def flat(value: object, name: str = "") -> dict[str, object]:
    """{"a.b": leaf} of nested dicts; lists stay JSON."""
    if not isinstance(value, dict):
        return {name: json.dumps(value) if isinstance(value, list) else value}
    return {k: v for key, part in value.items() for k, v in flat(part, f"{name}.{key}" if name else key).items()}


def rows_of(path: Path) -> list[dict]:
    """The file's rows, none where it holds something else. Raises ValueError for a file that is no JSON."""
    content = json.loads(path.read_text())
    return content if isinstance(content, list) and all(isinstance(row, dict) for row in content) else []


def collect(folder: Path) -> int:
    """Writes rows.csv, whole or not at all. Returns the number of rows."""
    rows = [{"file": path.name} | flat(row) for path in sorted(folder.glob("*.json")) for row in rows_of(path)]
    draft = folder / "rows.csv.part"
    with draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)) or ["file"])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(draft, folder / "rows.csv")
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    print(f"{collect(folder)} rows in {folder / 'rows.csv'}")


if __name__ == "__main__":
    main()
