"Run every benchmark, print the table, write bench.json."
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.boundary import boundary_rows
from bench.boundary_page import page_rows
from bench.checkpoints import checkpoint_rows
from bench.clipping import clipping_rows
from bench.engine import engine_rows
from bench.futures import futures_rows
from bench.journal import journal_rows
from bench.live import live_rows
from bench.proxy import proxy_rows
from bench.senses import sense_rows
from sdalab.training.train import machine

SUITES = {"engine": engine_rows, "clipping": clipping_rows, "journal": journal_rows, "checkpoints": checkpoint_rows, "senses": sense_rows, "boundary": boundary_rows,
          "boundary_page": page_rows, "proxy": proxy_rows, "futures": futures_rows, "live": live_rows}


def shown(row) -> list[str]:
    "A row's cells for the terminal."
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
    met = {None: "", True: "yes", False: "NO"}[row.met]
    return [row.name, f"{row.value:,.3g} {row.unit}", row.against, ratio, row.target, met, row.limit]


def main(names: list[str]):
    "The named suites, or all of them."
    unknown = set(names) - set(SUITES)
    if unknown:
        sys.exit(f"bench: {', '.join(sorted(unknown))}: no such suite; there are {', '.join(SUITES)}")
    console, rows = Console(), []
    for name in names or SUITES:
        for row in SUITES[name]():
            rows.append(row)
            console.print("  ".join(cell for cell in shown(row) if cell), markup=False, highlight=False, soft_wrap=True)
    table = Table("measured", "value", "against", "ratio", "target", "met", "limit", title="bench")
    for row in rows:
        table.add_row(*shown(row))
    console.print(table)
    write(Path("bench.json"), [row.as_dict() for row in rows])
    console.print("wrote bench.json")


def write(path: Path, rows: list[dict]):
    "Write the rows; rows of suites that did not run this time stay, if they are of this machine."
    kept = json.loads(path.read_text()) if path.exists() else {"machine": None, "rows": []}
    fresh = {row["name"] for row in rows}
    old = [row for row in kept["rows"] if row["name"] not in fresh] if kept["machine"] == machine() else []
    path.write_text(json.dumps({"machine": machine(), "rows": old + rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
