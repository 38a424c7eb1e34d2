"""Is a table of labels right? In DuckDB's SQL, with nothing of cnnray's.

What is wrong comes out as lines of text: no line, nothing wrong.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import Path

import duckdb
import pyarrow as pa

CHECKS = {
    "rows of images that were never there": """
        SELECT count(*) FROM rows ANTI JOIN expected USING (key)""",
    "images without a row": """
        SELECT count(*) FROM expected ANTI JOIN rows USING (key)""",
    "ids with more than one row": """
        SELECT count(*) FROM (SELECT key, etag FROM rows GROUP BY ALL HAVING count(*) > 1)""",
    "rows with a wrong label or code": """
        SELECT count(*) FROM rows JOIN expected USING (key)
        WHERE coalesce(rows.label, rows.error_code) IS DISTINCT FROM expected.answer""",
    "rows whose status does not fit": """
        SELECT count(*) FROM rows
        WHERE CASE status WHEN 'ok' THEN label IS NULL OR error_code IS NOT NULL
                          WHEN 'error' THEN label IS NOT NULL OR error_code IS NULL
                          ELSE true END""",
    "confidences outside of [0, 1]": """
        SELECT count(*) FROM rows WHERE NOT coalesce(confidence, 0) BETWEEN 0 AND 1""",
}


def find_problems(table: Path, answers: Mapping[str, str]) -> list[str]:
    """What is wrong with the labels in a folder; ``answers``: key → its label or error code."""
    expected = pa.table({"key": [*answers], "answer": [*answers.values()]})  # noqa: F841
    strangers = [
        f"{path} under data/ is no part"
        for path in sorted(glob.glob(f"{table}/data/**/*", recursive=True, include_hidden=True))
        if Path(path).is_file() and not path.endswith(".parquet")
    ]
    with duckdb.connect() as connection:
        connection.execute(
            f"CREATE VIEW rows AS SELECT * FROM read_parquet('{table}/data/**', union_by_name=true)"
        )
        connection.register("expected", expected)
        counts = {what: connection.sql(sql).fetchall()[0][0] for what, sql in CHECKS.items()}
    return strangers + [f"{count} {what}" for what, count in counts.items() if count]
