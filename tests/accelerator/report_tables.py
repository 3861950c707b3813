"""A report as Markdown."""

from collections.abc import Sequence


def markdown(report: dict, parts: Sequence[str] | None = None) -> str:
    """Writes a report as Markdown.

    Args:
        report: The content of `report.json`.
        parts: The parts that are shown; all by default.

    Returns:
        A line per part, its failures, and its numbers in tables: records with about the same numbers share one.
    """
    lines = [f"{report['date'][:10]}{', in small' if report['tiny'] else ''}, {report['seconds']:.0f} seconds"]
    for name, part in report["parts"].items():
        if parts is not None and name not in parts:
            continue
        lines += ["", summary(name, part)]
        lines += [
            f"- {record['name']}: {record.get('error', 'failed')}" for record in part["records"] if failed(record)
        ]
        for table in grouped(part["records"]):
            lines += ["", *rows(table)]
    return "\n".join(lines)


def summary(name: str, part: dict) -> str:
    """One line about a part."""
    records, error = part["records"], part.get("error")
    passed = sum(not failed(record) for record in records)
    seconds = f" in {part['seconds']:.0f} seconds" if "seconds" in part else ""
    return f"**{name}** {part['state']}{seconds}: {passed} of {len(records)} records{f' ({error})' if error else ''}"


def failed(record: dict) -> bool:
    """Whether a record is that of a check that failed."""
    return record.get("ok", True) is not True


def numbers(record: dict) -> dict:
    """What a record says besides its name and whether its check passed."""
    return {key: value for key, value in record.items() if key not in ("name", "ok", "error")}


def grouped(records: Sequence[dict]) -> list[list[dict]]:
    """Groups records of which at least half the keys are the same."""
    tables = []
    for record in records:
        keys = set(numbers(record))
        if not keys:
            continue
        for table in tables:
            others = set(numbers(table[0]))
            if len(keys & others) >= len(keys | others) / 2:
                table.append(record)
                break
        else:
            tables.append([record])
    return tables


def rows(records: Sequence[dict]) -> list[str]:
    """A Markdown table of a row per record."""
    columns = list(dict.fromkeys(key for record in records for key in numbers(record)))
    lines = [["", *(column.replace("_", " ") for column in columns)], ["---", *("---:" for _ in columns)]]
    lines += [[record["name"], *(cell(record.get(column)) for column in columns)] for record in records]
    return [f"| {' | '.join(line)} |" for line in lines]


def cell(value: object) -> str:
    """A number with three digits; other values as they are."""
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if 100 <= abs(value) < 1e7 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
