"""The GPU hour: each piece has a limit and leaves its result, and what has passed is not run again."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

from contenders.phases import Phases

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_checks.py"


@pytest.fixture(scope="module")
def checks():
    spec = importlib.util.spec_from_file_location("gpu_checks", SCRIPT)
    module = sys.modules["gpu_checks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def test_pieces_leave_their_results_and_the_rest_runs_on(checks, tmp_path, capfd):
    count = tmp_path / "count"
    tally = f"open({str(count)!r}, 'a').write('x'); print('a line')"
    pieces = [
        checks.Piece("fine", python(tally)),
        checks.Piece("broken", python("raise SystemExit('no')")),
        checks.Piece("endless", python("import time; print('begun', flush=True); time.sleep(60)"), limit=0.5),
        checks.Piece("last", python(tally)),
    ]
    start = time.monotonic()
    assert checks.run_all(pieces, tmp_path, "CPU", 60) == ["broken", "endless"]
    assert time.monotonic() - start < 30
    assert "a line" in capfd.readouterr().out
    assert (tmp_path / "endless.log").read_text() == "begun\n"
    outcomes = {name: result.outcome for name, result in checks.earlier(tmp_path).items()}
    assert outcomes == {"fine": "passed", "broken": "failed", "endless": "ended", "last": "passed"}
    summary = (tmp_path / "summary.md").read_text()
    assert [line.split(" | ")[0] for line in summary.splitlines()[2:]] == ["| fine", "| broken", "| endless", "| last"]
    assert count.read_text() == "xx"
    # again, with the broken one repaired: what has passed is left alone
    pieces[1:3] = [checks.Piece("broken", python("")), checks.Piece("endless", python(""))]
    assert checks.run_all(pieces, tmp_path, "CPU", 60) == []
    assert count.read_text() == "xx"


def test_the_last_piece_is_ended_with_the_hour_and_none_begins_after(checks, tmp_path):
    pieces = [checks.Piece(name, python("import time; time.sleep(60)")) for name in ("first", "second")]
    assert checks.run_all(pieces, tmp_path, "CPU", 0.5) == ["first", "second"]
    assert list(checks.earlier(tmp_path)) == ["first"]
    assert not (tmp_path / "second.log").exists()


def test_every_piece_has_a_name_of_its_own_and_at_most_eight_minutes(checks, tmp_path):
    pieces = list(checks.pieces(tmp_path, dry=True))
    names = [checks.slug(piece.name) for piece in pieces]
    assert len(set(names)) == len(names)
    assert max(piece.limit for piece in pieces) <= 480


def test_a_phase_within_another_counts_for_itself(tmp_path, monkeypatch):
    ticks = iter([1.0, 3.0, 7.0, 15.0, 31.0])
    monkeypatch.setattr("contenders.phases.time.time", lambda: next(ticks))
    phases = Phases("start", 0.0)
    with phases.phase("training"), phases.phase("validation"):
        pass
    phases.write(str(tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text()) == {"start": 17.0, "training": 10.0, "validation": 4.0}


def test_the_dry_form_runs_every_piece(checks, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--dry", "--output", str(tmp_path)])
    checks.main()
    outcomes = {result.outcome for result in checks.earlier(tmp_path).values()}
    assert outcomes == {"passed"}
