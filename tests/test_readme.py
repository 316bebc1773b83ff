"""README's figures are those of the committed results."""

import csv
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def test_the_table_of_results_is_the_committed_summary():
    lines = (REPOSITORY / "README.md").read_text().split("<!-- results:")[1].splitlines()[3:]
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[: lines.index("")]]
    with (REPOSITORY / "results/summary.csv").open(newline="") as file:
        expected = [
            [
                row["variant"],
                f"{float(row['kept_ratio']):.3f}",
                f"{int(row['bytes']) / 1e6:.1f}",
                *(f"{float(row[f'token_perplexity/{text}']):.2f}" for text in ("news", "commons")),
                f"{float(row['acc/last_word']):.3f}",
            ]
            for row in csv.DictReader(file)
        ]
    assert shown == expected
