"""Heat maps, surfaces and arrows: what they hold, what is drawn, and where it stands in a report."""

import pytest

from picture_samples import arrows, forgetting, matrix, surface
from report_samples import result, tradeoff
from residual_steer.report import Result

EVERY = (matrix(), forgetting(), surface(), surface(paths=(), log=True), arrows())


def test_what_is_saved_is_loaded(tmp_path):
    saved = result(plots=(tradeoff(), *EVERY))
    saved.save(tmp_path / "a.json")
    assert Result.load(tmp_path / "a.json") == saved


@pytest.mark.parametrize("picture", EVERY, ids=lambda picture: type(picture).__name__)
def test_a_picture_is_written_by_the_ending_of_its_name(picture, tmp_path):
    pytest.importorskip("matplotlib")
    picture.save(tmp_path / "new" / "a.svg")
    picture.save(tmp_path / "a.PNG")
    assert f"<title>{picture.title}</title>" in (tmp_path / "new" / "a.svg").read_text()
    assert (tmp_path / "a.PNG").read_bytes()[:4] == b"\x89PNG"
