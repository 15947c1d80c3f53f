"""A thousand damaged, foreign and hostile folders: refused with a SteerError, or exactly the field that they say."""

import copy
import json
import random
import struct
import tracemalloc
import warnings

import pytest
import safetensors.torch
import torch

import residual_steer as rs
from fields import assert_as, rewrite, save_one, shake, snapshot, vit
from residual_steer._controller import steering_of
from residual_steer._format import DESCRIPTION, TENSORS, digest, open_field

CASES = 1000
KEY = "residual_steer"
NUMBERS = [0, -1, 1, 3, 2**31, 2**60, 2**64, -(2**63), 10**30, 10**400, 0.5, 1e308, float("nan"), float("inf")]
ODD = [*NUMBERS, None, True, False, "", "x", "a" * 10**5, "\ud800", "\0", "é", [], {}, [[]], [1, "2"], {"a": {"b": {}}}]


def split(content):
    """Take a tensor file apart: its header, and the bytes of the tensors."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header, data, pad=True):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8 if pad else 0)
    return struct.pack("<Q", len(text)) + text + data


def places(value, path=()):
    """Return the path of every entry in nested JSON."""
    found = [path]
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        found += places(part, (*path, key))
    return found


def change_json(chance, value, odd=ODD):
    """Drop, rename, double, exchange or overwrite one entry, or move a number a little."""
    value = copy.deepcopy(value)
    *path, last = chance.choice(places(value)[1:])
    inside = value
    for key in path:
        inside = inside[key]
    what = chance.choice(["drop", "rename", "overwrite", "overwrite", "overwrite", "nudge", "exchange"])
    if what == "drop":
        del inside[last]
    elif what == "rename" and isinstance(inside, dict):
        inside[chance.choice(["", "x", f"module.{last}", f"_orig_mod.{last}", f"{last}\0", "é"])] = inside.pop(last)
    elif what == "nudge" and type(inside[last]) in {int, float}:
        inside[last] += chance.choice([1, -1, 8, -8])
    elif what == "exchange":
        other = chance.choice([*(inside if isinstance(inside, dict) else range(len(inside)))])
        inside[last], inside[other] = inside[other], inside[last]
    else:
        inside[last] = copy.deepcopy(chance.choice(odd))
    return value


def change_bytes(chance, content):
    """Flip bits, insert, remove, repeat or overwrite bytes, or cut at either end."""
    content = bytearray(content)
    at = chance.randrange(len(content) + 1)
    size = chance.choice([1, 2, 8, 100])
    match chance.choice(["flip", "flip", "insert", "remove", "repeat", "zero", "tail", "head", "empty", "append"]):
        case "flip":
            for _ in range(size):
                content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        case "insert":
            content[at:at] = chance.randbytes(size)
        case "remove":
            del content[at : at + size]
        case "repeat":
            content[at:at] = content[max(at - size, 0) : at]
        case "zero":
            content[at : at + size] = bytes(size)
        case "tail":
            del content[at:]
        case "head":
            del content[:at]
        case "empty":
            content.clear()
        case "append":
            content += chance.choice([b"\0", b" ", b"\n", chance.randbytes(size)])
    return bytes(content)


def odd_text(chance, text):
    """Write JSON as no library does."""
    return chance.choice(
        [
            b"[" * chance.choice([3, 900, 10**5]) + text,
            b'{"a":' * 10**4 + b"1" + b"}" * 10**4,
            b"{}",
            b"null",
            b"",
            b"\xff\xfe" + text,
            text.decode().encode("utf-16"),
            b"\xef\xbb\xbf" + text,
            text.replace(b'"', b"'"),
            text + text,
            text.replace(b"{", b'{"format": "x", ', 1),  # a key that stands there twice
            text.replace(b"{", b'{"residual_steer": 1, ', 1),
            text.replace(b'"field"', b'"field": {}, "field"', 1),
            text.replace(b"0", b"NaN", 1),
            text.replace(b"1", b"9" * 5000, 1),
            text.replace(b"a", b"\xff", 1),
            text.replace(b"a", b"\\ud800", 1),
        ]
    )


class Folder:
    """The two files of a field, ready to be changed."""

    def __init__(self, path):
        self.text = (path / DESCRIPTION).read_bytes()
        self.content = (path / TENSORS).read_bytes()

    def write(self, path):
        (path / DESCRIPTION).write_bytes(self.text)
        (path / TENSORS).write_bytes(self.content)

    def sign(self, described):
        """Put a description in both files, with a digest that holds, where one can be made."""
        header, data = split(self.content)
        try:
            described["sha256"] = digest(described, tensors_of(header, data))
        except Exception:  # what was made of the description is none
            described["sha256"] = "0" * 64
        self.text = json.dumps(described).encode()
        header["__metadata__"] = {KEY: json.dumps(described)}
        self.content = join(header, data)


TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32}


def tensors_of(header, data):
    """Read tensors as the header says, without the library's own reader."""
    found = {}
    for key, entry in header.items():
        if key != "__metadata__":
            start, end = entry["data_offsets"]
            flat = torch.frombuffer(bytearray(data[start:end]), dtype=TYPES[entry["dtype"]])
            found[key] = flat.reshape(entry["shape"])
    return found


def mutate(chance, folder, other):
    """Change one thing, or a few, in one of the files or in both; name the kind of change."""
    kind = chance.choice(
        ["bytes", "bytes", "head", "text bytes", "text", "header", "signed", "signed", "signed header", "signed data",
         "signed types", "odd text", "odd header", "odd metadata", "claims", "swapped", "mixed", "prefixed"]
    )  # fmt: skip
    header, data = split(folder.content)
    described = json.loads(folder.text)
    match kind:
        case "bytes":
            folder.content = change_bytes(chance, folder.content)
        case "head":
            length = chance.choice([0, 1, 7, 2**31, 2**60, 2**63, 2**64 - 1, len(data), len(folder.content)])
            folder.content = struct.pack("<Q", length) + folder.content[8:]
        case "text bytes":
            folder.text = change_bytes(chance, folder.text)
        case "text":
            folder.text = json.dumps(change_json(chance, described)).encode()
        case "header":
            folder.content = join(change_json(chance, header), data, pad=chance.random() < 0.5)
        case "signed":
            for _ in range(chance.choice([1, 1, 1, 2])):
                described = change_json(chance, described)
            folder.sign(described)
        case "signed header":
            changed = change_json(chance, header)
            changed["__metadata__"] = {}
            folder.content = join(changed, data)
            folder.sign(described)
        case "signed data":
            start = chance.randrange(len(data))
            folder.content = join(header, data[:start] + chance.randbytes(1) + data[start + 1 :])
            folder.sign(described)
        case "signed types":
            tensors = tensors_of(header, data)
            key = chance.choice([*tensors])
            tensors[key] = tensors[key].mul(chance.choice([1, 1e38])).to(chance.choice([*TYPES.values(), torch.bool]))
            described["sha256"] = digest(described, tensors)
            folder.text = json.dumps(described).encode()
            folder.content = safetensors.torch.save(tensors, {KEY: folder.text.decode()})
        case "odd text":
            folder.text = odd_text(chance, folder.text)
        case "odd header":
            folder.content = join(odd_text(chance, json.dumps(header).encode()), data)
        case "odd metadata":
            text = odd_text(chance, header["__metadata__"][KEY].encode())
            header["__metadata__"][KEY] = chance.choice([text.decode(errors="replace"), 5, None, ["x"], {}])
            folder.content = join(header, data)
        case "claims":
            key = chance.choice([key for key in header if key != "__metadata__"])
            size = chance.choice([2**20, 2**40, 2**60, 2**64, -4, 10**40])
            entry = header[key]
            match chance.choice(["shape", "shapes", "end", "all", "new"]):
                case "shape":
                    entry["shape"] = [size]
                case "shapes":
                    entry["shape"] = [size, 2**33, 2**33]
                case "end":
                    entry["data_offsets"][1] = entry["data_offsets"][0] + size
                case "all":
                    entry |= {"shape": [size // 4], "data_offsets": [0, size]}
                case "new":
                    end = len(data)
                    header["blocks.1.up.weight"] = {
                        "dtype": "F32",
                        "shape": [size],
                        "data_offsets": [end, end + 4 * size],
                    }
            folder.content = join(header, data)
        case "swapped":
            folder.text, folder.content = folder.content, folder.text
        case "mixed":
            if chance.random() < 0.5:
                folder.text = other.text
            else:
                _, foreign = split(other.content)
                folder.content = join(header, (foreign + data)[: len(data)])
        case "prefixed":
            wrap = chance.choice([lambda key: f"module.{key}", lambda key: key.replace(".up.", "._orig_mod.up.")])
            named = {key if key == "__metadata__" else wrap(key): entry for key, entry in header.items()}
            folder.content = join(named, data)
    return kind


def contents(model):
    """Return what a field is: its options and every tensor of it."""
    base, state = steering_of(model)
    (spec,) = state.specs.values()
    return spec, {key: tensor.detach().clone() for key, tensor in state.tensors(base, spec.name).items()}


def says(path):
    """Return the field that the files say, read without the model."""
    header, data = split((path / TENSORS).read_bytes())
    return open_field(path).spec, tensors_of(header, data)


def same_bits(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()


@pytest.mark.parametrize("part", range(4))
def test_a_thousand_changed_folders_are_refused_or_say_what_they_give(tmp_path, part):
    original, _ = save_one(tmp_path / "field")
    rs.save(shake(rs.steer(vit(), rank=4, train="head"), None), tmp_path / "other")
    rs.load(model := vit(), original)
    expected = contents(model)
    rs.unsteer(model)
    before = snapshot(model)
    place = tmp_path / "changed"
    place.mkdir()
    outcomes, kinds = {"refused": 0, "same": 0, "another": 0}, set()
    for case in range(part * CASES // 4, (part + 1) * CASES // 4):
        chance = random.Random(case)
        folder = Folder(original)
        kind = mutate(chance, folder, Folder(tmp_path / "other"))
        kinds.add(kind)
        folder.write(place)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of another class or config
                rs.load(model, place)
        except rs.SteerError:
            outcomes["refused"] += 1
            assert_as(model, before)
            continue
        except BaseException as error:
            raise AssertionError(f"case {case}, {kind}") from error
        spec, tensors = contents(model)
        rs.unsteer(model)
        if spec == expected[0] and all(same_bits(tensors[key], value) for key, value in expected[1].items()):
            outcomes["same"] += 1
            continue
        outcomes["another"] += 1
        assert kind.startswith("signed"), f"case {case}, {kind}, gave another field than was saved"
        said, inside = says(place)
        assert spec == said, f"case {case}"
        for key, value in tensors.items():
            assert same_bits(value, inside[key].to(value.dtype)), f"case {case}, {key}"
    assert min(outcomes.values()) > 0, outcomes
    assert len(kinds) == 16, kinds
    assert_as(model, before)


def enlarge(folder, key, shape, size):
    """Let a tensor claim a shape and a size, and make the file as long as that, without a byte on the disk."""
    header, data = split((folder / TENSORS).read_bytes())
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] > header[key]["data_offsets"][0]:
            entry["data_offsets"] = [at + size for at in entry["data_offsets"]]
    header[key] |= {
        "shape": shape,
        "data_offsets": [header[key]["data_offsets"][0], header[key]["data_offsets"][1] + size],
    }
    (folder / TENSORS).write_bytes(join(header, data))
    with open(folder / TENSORS, "r+b") as file:
        file.truncate(file.seek(0, 2) + size)


HUGE = {
    "a tensor larger than the model's": (
        lambda f: enlarge(f, "train.head.weight", [2**30 + 160], 2**32),
        r"train\.head\.weight has shape \(1073741984,\); this model needs \(5, 32\)",
    ),
    "more bytes than its shape takes": (
        lambda f: enlarge(f, "train.head.weight", [5, 32], 2**32),
        "deserializing header: invalid",
    ),
    "a header as long as the file": (
        lambda f: ((f / TENSORS).write_bytes(struct.pack("<Q", 2**32)), enlarge_file(f, 2**32 + 8)),
        "header too large",
    ),
    "bytes after the tensors": (lambda f: enlarge_file(f, 2**32), "file not fully covered"),
    "a rank that needs gigabytes": (
        lambda f: rewrite(f, None, lambda described: described["field"].update(ranks={"0": 2**30})),
        "`rank` is an integer from 1 to 32, the width; received 1073741824",
    ),
    "blocks by the thousand": (
        lambda f: rewrite(f, None, lambda d: d["backbone"].update(blocks=10**4, widths=[*range(1, 10**4 + 1)])),
        r"10000 blocks of width 1, 2, 3, 4, 5, 6, …; this model has vit, 3 blocks",
    ),
}


def enlarge_file(folder, size):
    with open(folder / TENSORS, "r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize("huge", HUGE)
def test_what_would_take_gigabytes_is_refused_before_it_takes_them(tmp_path, huge):
    folder, _ = save_one(tmp_path / "field")
    make, message = HUGE[huge]
    make(folder)
    model = vit()
    before = snapshot(model)
    tracemalloc.start()
    try:
        with pytest.raises(rs.SteerError, match=message):
            rs.load(model, folder)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()
    assert_as(model, before)
