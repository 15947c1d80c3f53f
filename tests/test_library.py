"""A library of fields: what a row gets, whatever was loaded, evicted, changed or broken meanwhile."""

import json
import random
import shutil
import threading
import warnings

import pytest
import torch

import residual_steer as rs
from fields import IMAGES, shake, vit
from residual_steer._field_file import TENSORS

NAMES = [f"f{index}" for index in range(6)]


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """Six fields on disk, and what a model computes under each of them and under none."""
    folder, expected, model = tmp_path_factory.mktemp("library"), {None: vit()(IMAGES).detach()}, vit()
    for seed, name in enumerate(NAMES):
        rs.steer(model, rank=2 + seed % 2, name=name, activation=("gelu", "tanh")[seed % 2])
        torch.manual_seed(seed)
        shake(model)
        rs.save(model, folder / name)
        expected[name] = model(IMAGES).detach()
    return folder, expected


@pytest.fixture
def made(disk, tmp_path):
    folder, expected = disk
    shutil.copytree(folder, tmp_path / "library")
    model = vit()
    return rs.library(model, tmp_path / "library", slots=3), model, tmp_path / "library", expected


@torch.no_grad()
def check(model, rows, expected, errors=()):
    output = model(IMAGES)
    for row, name in enumerate(rows):
        right = expected[None if row in errors else name][row]
        torch.testing.assert_close(output[row], right, rtol=1e-4, atol=1e-4)


def test_fields_are_loaded_when_a_row_names_them_and_the_least_recent_goes(made):
    library, model, _, expected = made
    assert library.names == NAMES
    assert library.loaded == []
    for rows, loaded in (
        (["f0", "f1"], ["f0", "f1"]),
        (["f2", None], ["f0", "f1", "f2"]),
        (["f0", "f3"], ["f2", "f0", "f3"]),
        (["f5", "f4"], ["f3", "f5", "f4"]),
        (["f3", "f3"], ["f5", "f4", "f3"]),
    ):
        with library.use(rows) as errors:
            assert errors == {}
            check(model, rows, expected)
        assert library.loaded == loaded
        assert {rs.fields(model)[i].name for i in range(len(rs.fields(model)))} == set(loaded)
        assert torch.equal(model(IMAGES), expected[None])
        assert not any(p.requires_grad for p in model.parameters())
    for mix in ("f1", {"f1": 1.0}, ("f1", "f1")):
        with library.use(mix):
            check(model, ["f1", "f1"], expected)
    with library.use(None):
        check(model, [None, None], expected)
    with library.use([None, None]):
        check(model, [None, None], expected)


def damage(folder):
    data = bytearray((folder / TENSORS).read_bytes())
    data[-3] ^= 255
    (folder / TENSORS).write_bytes(data)


BROKEN = {
    "flipped": damage,
    "cut": lambda folder: (folder / TENSORS).write_bytes(b"\0" * 20),
    "gone": shutil.rmtree,
    "words": lambda folder: (folder / "steering.json").write_text(json.dumps([1])),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_is_the_error_of_its_row(made, how):
    library, model, folder, expected = made
    with library.use(["f0", "f1"]):
        pass
    BROKEN[how](folder / "f1")
    with pytest.warns(UserWarning, match="rows 1 get the frozen model"):
        chosen = library.use(["f0", "f1"])
    assert list(chosen.errors) == [1]
    assert isinstance(chosen.errors[1], rs.SteerError)
    with chosen as errors:
        check(model, ["f0", "f1"], expected, errors)
    with pytest.warns(UserWarning, match="rows 0, 1"):
        chosen = library.use(["../f1", "f9"])
    with chosen as errors:
        check(model, ["f1", "f9"], expected, errors)
    for mix in ("f1", {"f0": 1.0, "f1": 1.0}):
        with library.use("f0"):
            with pytest.raises(rs.SteerError):
                library.use(mix)
            check(model, ["f0", "f0"], expected)


def test_a_file_that_changed_is_loaded_again(made):
    library, model, folder, expected = made
    with library.use(["f0", "f1"]):
        check(model, ["f0", "f1"], expected)
    other = rs.load(vit(), folder / "f2", "f0")
    rs.save(other, folder / "f0")
    with library.use(["f0", "f1"]):
        check(model, ["f2", "f1"], expected)


def test_selections_nest_even_if_what_was_selected_was_evicted(made):
    library, model, folder, expected = made
    with library.use(["f0", "f1"]):
        with library.use(["f2", "f3"]):
            with library.use(["f4", "f5"]):
                check(model, ["f4", "f5"], expected)
            check(model, ["f2", "f3"], expected)
        check(model, ["f0", "f1"], expected)
        shutil.rmtree(folder / "f0")
        with (
            pytest.raises(rs.SteerError, match="what was selected is off now: no field 'f0'"),
            library.use("f5"),
            library.use(["f4", "f3"]),
        ):
            pass
        check(model, [None, None], expected)


def test_what_no_batch_can_have_is_refused(made):
    library, model, folder, expected = made
    with library.use(["f0", "f1"]):
        for mix, words in (
            (["f1", "f2", "f3", "f4"], "3 slots, and 4 fields"),
            ([], "an empty one"),
            (["f1", 3], "received 3"),
            (7, "received 7"),
        ):
            with pytest.raises(rs.SteerError, match=words):
                library.use(mix)
            check(model, ["f0", "f1"], expected)
    for arguments, words in (({"slots": 0}, "`slots` is an integer"), ({"folder": folder / "f9"}, "is none")):
        with pytest.raises(rs.SteerError, match=words):
            rs.library(**{"model": model, "folder": folder, **arguments})


def test_fields_of_others_stay_and_are_not_taken_for_its_own(made):
    library, model, _, expected = made
    rs.steer(model, rank=2, name="f0")
    rs.steer(model, rank=2, name="mine")
    with pytest.warns(UserWarning, match="that the library did not load"):
        chosen = library.use(["f0", "f1"])
    with chosen as errors:
        check(model, ["f0", "f1"], expected, errors)
    assert rs.summary(model).acting == "mine"
    for rows in (["f2", "f3"], ["f4", "f5"]):
        with library.use(rows):
            check(model, rows, expected)
    rs.unsteer(model, "f5")
    with library.use(["f5", "f4"]):
        check(model, ["f5", "f4"], expected)
    assert {"f0", "mine"} <= {field.name for field in rs.fields(model)}


def test_a_field_that_took_the_place_of_its_own_is_not_taken_for_it(made):
    library, model, _, expected = made
    library.use("f0")
    rs.unsteer(model, "f0")
    rs.steer(model, rank=2, name="f0")
    assert library.loaded == []
    with pytest.raises(rs.SteerError, match="that the library did not load"):
        library.use("f0")
    with pytest.warns(UserWarning, match="that the library did not load"):
        chosen = library.use(["f0", "f1"])
    check(model, ["f0", "f1"], expected, chosen.errors)


def test_what_was_trained_since_does_not_go_out_without_a_word(made):
    library, model, folder, expected = made
    library.use("f0")
    shake(model, "f0")
    library.use(["f1", "f2"])
    with pytest.warns(UserWarning, match=r"'f0' was changed since .* and goes out unsaved"):
        library.use("f3")
    library.use("f0")
    check(model, ["f0", "f0"], expected)
    shake(model, "f0")
    rs.save(model, folder / "f0", "f0")
    trained = model(IMAGES).detach()
    library.use(["f4", "f5"])
    library.use("f1")  # no warning, since it is on disk
    library.use("f0")
    torch.testing.assert_close(model(IMAGES).detach(), trained)


def test_a_field_in_which_rows_cannot_differ_is_its_rows_error(made):
    library, model, folder, expected = made
    other = rs.steer(vit(), rank=2, name="inner", train="blocks.0.norm1")
    rs.save(shake(other), folder / "inner")
    with pytest.warns(UserWarning, match="cannot differ"):
        chosen = library.use(["inner", "f0"])
    assert list(chosen.errors) == [0]
    with chosen as errors:
        check(model, ["inner", "f0"], expected, errors)


def test_threads_wait_for_each_other(made):
    library, model, _, expected = made
    found = []

    def serve(seed):
        draw = random.Random(seed)
        try:
            for _ in range(6):
                rows = draw.choices([*NAMES, None], k=2)
                with library.use(rows):
                    check(model, rows, expected)
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == []


def test_a_soak_of_seconds_finds_nothing_wrong(tmp_path, capsys):
    from programs import soak_library

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert soak_library.main(["--minutes", "0.02", "--fields", "6", "--slots", "3", "--folder", str(tmp_path)]) == 0
    assert "0 wrong rows" in capsys.readouterr().out
