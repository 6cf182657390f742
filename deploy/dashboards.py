"""Tables of panels -> deploy/grafana/operators.json and scientists.json, dashboards that Grafana takes as they are.

`python deploy/dashboards.py` writes them; tests/test_dashboards.py fails where one is stale, and asks a real Prometheus what they ask.
"""

from __future__ import annotations

import json
from pathlib import Path

from dashboard_operators import OPERATORS
from dashboard_panels import dashboard
from dashboard_scientists import SCIENTISTS

FOLDER = Path(__file__).parent / "grafana"


def pages() -> dict[str, str]:
    """Name of each file below deploy/grafana -> its content."""
    made = {"operators.json": OPERATORS, "scientists.json": SCIENTISTS}
    return {name: json.dumps(dashboard(one), indent=1) + "\n" for name, one in made.items()}


def write() -> None:
    for name, content in pages().items():
        (FOLDER / name).write_text(content)


if __name__ == "__main__":
    write()
