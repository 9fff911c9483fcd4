"""The README, followed literally in an empty folder: every shell command in it works, the demonstration included."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_there_are_two_commands_to_set_up() -> None:
    section = (ROOT / "README.md").read_text().split("## Set up")[1].split("\n## ")[0]
    commands = "".join(re.findall(r"^```bash\n(.*?)^```", section, re.S | re.M)).splitlines()
    assert len(commands) == 2


@pytest.mark.slow
def test_readme_commands_work_in_an_empty_folder(tmp_path: Path) -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout to clone")
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "farspan")], check=True)
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    script = "set -euo pipefail\n" + "".join(blocks)
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path / "farspan", capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    # What the demonstration promises.
    run = tmp_path / "farspan" / "runs" / "demo"
    result = json.loads((run / "evaluation" / "evaluation.json").read_text())
    bits = result["bits"]["bits_per_byte"]
    ngram = next(found["bits_per_byte"] for found in result["baselines"] if "gram" in found["name"])
    assert bits < min(1.80, ngram), (bits, ngram)
    assert (run / "report.html").is_file()
    share = re.search(r"([\d.]+)% of \d+ complete lines read as Python", done.stdout + done.stderr)
    assert share is not None and float(share[1]) >= 60, share
    assert f"Report: {run / 'report.html'}" in done.stdout
