"""Damaged, foreign and hostile folders, a thousand at random: refused, or exactly the field that they describe."""

import copy
import json
import random
import shutil
import struct
import tracemalloc
import warnings

import pytest
import safetensors.torch
import torch

import residual_steer as rs
from fields import assert_as, refused, rewrite, save_one, shake, snapshot, vit
from residual_steer._controller import steering_of
from residual_steer._field_file import DESCRIPTION, TENSORS, digest, open_field

CASES = 1000
KEY = "residual_steer"
NUMBERS = [0, -1, 1, 3, 2**31, 2**60, 2**64, -(2**63), 10**30, 10**400, 0.5, 1e308, float("nan"), float("inf")]
ODD = [*NUMBERS, None, True, False, "", "x", "a" * 10**5, "\ud800", "\0", "é", [], {}, [[]], [1, "2"], {"a": {"b": {}}}]
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32}


def split(content):
    """Take a tensor file apart: its header, and the bytes of the tensors."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header, data, pad=True):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8 if pad else 0)
    return struct.pack("<Q", len(text)) + text + data


def tensors_of(header, data):
    """Read tensors as the header says, without the library's own reader."""
    found = {}
    for key, entry in header.items():
        if key != "__metadata__":
            start, end = entry["data_offsets"]
            flat = torch.frombuffer(bytearray(data[start:end]), dtype=TYPES[entry["dtype"]])
            found[key] = flat.reshape(entry["shape"])
    return found


def places(value, path=()):
    """Return the path of every entry in nested JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, part in inner for found in places(part, (*path, key)))]


def change_json(chance, value):
    """Drop, rename, exchange or overwrite one entry, or move a number a little."""
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
        inside[last] = copy.deepcopy(chance.choice(ODD))
    return value


def change_bytes(chance, content):
    """Flip bits, insert, remove, repeat or overwrite bytes, or cut at either end."""
    at, size = chance.randrange(len(content) + 1), chance.choice([1, 2, 8, 100])
    before, after = content[:at], content[at:]
    flipped = bytearray(content)
    for _ in range(chance.choice([1, size])):
        flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    changed = [
        before + chance.randbytes(size) + after,
        before + after[size:],
        before + before[-size:] + after,
        before + bytes(size) + after[size:],
        before,
        after,
        b"",
        content + chance.choice([b"\0", b" ", b"\n", chance.randbytes(size)]),
    ]
    return chance.choice([*[bytes(flipped)] * 3, *changed])


def odd_text(chance, text):
    """Write JSON as no library does."""
    return chance.choice(
        [
            *(b"[" * chance.choice([3, 900, 10**5]) + text, b'{"a":' * 10**4 + b"1" + b"}" * 10**4),
            *(b"{}", b"null", b"", b"\xff\xfe" + text, text.decode().encode("utf-16"), b"\xef\xbb\xbf" + text),
            *(text.replace(b'"', b"'"), text + text, text.replace(b'"field"', b'"field": {}, "field"', 1)),
            *(text.replace(b"{", b'{"%s": 1, ' % key, 1) for key in (b"format", b"residual_steer")),  # a key twice
            *(text.replace(b"0", b"NaN", 1), text.replace(b"1", b"9" * 5000, 1)),
            *(text.replace(b"a", b"\xff", 1), text.replace(b"a", b"\\ud800", 1)),
        ]
    )


class Folder:
    """The two files of a field, ready to be changed, each kind of change a method that begins with `by_`."""

    def __init__(self, path, chance, other):
        self.text, self.content = (path / DESCRIPTION).read_bytes(), (path / TENSORS).read_bytes()
        self.header, self.data = split(self.content)
        self.described = json.loads(self.text)
        self.chance, self.other = chance, other

    def write(self, path):
        (path / DESCRIPTION).write_bytes(self.text)
        (path / TENSORS).write_bytes(self.content)

    def sign(self, header, data, described):
        """Put a description in both files, with a digest that holds, where one can be made."""
        try:
            described["sha256"] = digest(described, tensors_of(header, data))
        except Exception:  # what was made of the description is none
            described["sha256"] = "0" * 64
        self.text = json.dumps(described).encode()
        self.content = join({**header, "__metadata__": {KEY: json.dumps(described)}}, data)

    def by_bytes(self):
        self.content = change_bytes(self.chance, self.content)

    by_more_bytes = by_bytes

    def by_a_bit(self):
        at, bit = self.chance.randrange(len(self.content)), 1 << self.chance.randrange(8)
        self.content = self.content[:at] + bytes([self.content[at] ^ bit]) + self.content[at + 1 :]

    def by_bytes_of_text(self):
        self.text = change_bytes(self.chance, self.text)

    def by_length(self):
        lengths = [0, 1, 7, 2**31, 2**60, 2**63, 2**64 - 1, len(self.data), len(self.content)]
        self.content = struct.pack("<Q", self.chance.choice(lengths)) + self.content[8:]

    def by_text(self):
        self.text = json.dumps(change_json(self.chance, self.described)).encode()

    def by_header(self):
        self.content = join(change_json(self.chance, self.header), self.data, pad=self.chance.random() < 0.5)

    def by_signed_description(self):
        described = self.described
        for _ in range(self.chance.choice([1, 1, 1, 2])):
            described = change_json(self.chance, described)
        self.sign(self.header, self.data, described)

    by_more_signed_descriptions = by_signed_description

    def by_signed_header(self):
        changed = change_json(self.chance, self.header)
        self.content = join({**changed, "__metadata__": {}}, self.data)
        self.sign(changed, self.data, self.described)

    def by_signed_data(self):
        start = self.chance.randrange(len(self.data))
        self.sign(self.header, self.data[:start] + self.chance.randbytes(1) + self.data[start + 1 :], self.described)

    def by_signed_types(self):
        tensors = tensors_of(self.header, self.data)
        key, kind = self.chance.choice([*tensors]), self.chance.choice([*TYPES.values(), torch.bool])
        tensors[key] = tensors[key].mul(self.chance.choice([1, 1e38])).to(kind)
        self.described["sha256"] = digest(self.described, tensors)
        self.text = json.dumps(self.described).encode()
        self.content = safetensors.torch.save(tensors, {KEY: self.text.decode()})

    def by_odd_text(self):
        self.text = odd_text(self.chance, self.text)

    def by_odd_header(self):
        self.content = join(odd_text(self.chance, json.dumps(self.header).encode()), self.data)

    def by_odd_metadata(self):
        text = odd_text(self.chance, self.header["__metadata__"][KEY].encode()).decode(errors="replace")
        self.header["__metadata__"][KEY] = self.chance.choice([text, 5, None, ["x"], {}])
        self.content = join(self.header, self.data)

    def by_claims(self):
        entry = self.header[self.chance.choice([key for key in self.header if key != "__metadata__"])]
        size = self.chance.choice([2**20, 2**40, 2**60, 2**64, -4, 10**40])
        start, end = entry["data_offsets"][0], len(self.data)
        claims = [{"shape": [size]}, {"shape": [size, 2**33, 2**33]}, {"data_offsets": [start, start + size]}]
        claims += [{"shape": [size // 4], "data_offsets": [0, size]}]
        entry |= self.chance.choice([*claims, {}])
        new = {"dtype": "F32", "shape": [size], "data_offsets": [end, end + 4 * size]}
        self.content = join(self.header | self.chance.choice([{}, {}, {"blocks.1.up.weight": new}]), self.data)

    def by_other_files(self):
        foreign = (split(self.other.content)[1] + self.data)[: len(self.data)]
        mixed = [(self.content, self.text), (self.other.text, self.content), (self.text, join(self.header, foreign))]
        self.text, self.content = self.chance.choice(mixed)

    def by_wrapped_names(self):
        wrap = self.chance.choice([lambda key: f"module.{key}", lambda key: key.replace(".up.", "._orig_mod.up.")])
        named = {key if key == "__metadata__" else wrap(key): entry for key, entry in self.header.items()}
        self.content = join(named, self.data)


KINDS = [name for name in vars(Folder) if name.startswith("by_")]


def contents(model):
    """Return what a field is: its options and every tensor of it."""
    base, state = steering_of(model)
    (spec,) = state.specs.values()
    return spec, {key: tensor.detach().clone() for key, tensor in state.tensors(base, spec.name).items()}


def same_bits(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()


@pytest.mark.parametrize("part", range(4))
def test_a_thousand_changed_folders_are_refused_or_say_what_they_give(tmp_path, part):
    original, _ = save_one(tmp_path / "field")
    rs.save(shake(rs.steer(vit(), rank=4, train="head"), None), tmp_path / "other")
    rs.load(model := vit(), original)
    expected = contents(model)
    rs.unsteer(model)
    before, outcomes = snapshot(model), {"refused": 0, "same": 0, "another": 0}
    place = tmp_path / "changed"
    place.mkdir()
    for case in range(part * CASES // 4, (part + 1) * CASES // 4):
        chance = random.Random(case)
        kind = KINDS[case % len(KINDS)]
        folder = Folder(original, chance, Folder(tmp_path / "other", chance, None))
        getattr(folder, kind)()
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
        assert "signed" in kind, f"case {case}, {kind}, gave another field than was saved"
        assert spec == open_field(place).spec, f"case {case}"
        inside = tensors_of(*split((place / TENSORS).read_bytes()))
        for key, value in tensors.items():
            assert same_bits(value, inside[key].to(value.dtype)), f"case {case}, {key}"
    assert min(outcomes.values()) > 0, outcomes
    assert_as(model, before)


def described(entry, value):
    """Overwrite an entry of the description, by its dotted name, in both files."""

    def change(description):
        *path, last = entry.split(".")
        for key in path:
            description = description[key]
        description[last] = value

    return lambda folder: rewrite(folder, None, change)


def tensor(key, value):
    """Overwrite or add a tensor, or remove it if its value is None."""
    return lambda folder: rewrite(
        folder, lambda tensors: tensors.pop(key) if value is None else tensors.update({key: value})
    )


def written(name, change):
    """Overwrite one of the files."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def longer(size):
    """Make the tensor file longer, without a byte on the disk."""

    def change(folder):
        with open(folder / TENSORS, "r+b") as file:
            file.truncate(file.seek(0, 2) + size)

    return change


def claims(key, shape, size):
    """Let a tensor claim a shape and some bytes more, and make the file as long as that."""

    def change(folder):
        header, data = split((folder / TENSORS).read_bytes())
        start, end = header[key]["data_offsets"]
        for entry in header.values():
            if "data_offsets" in entry and entry["data_offsets"][0] > start:
                entry["data_offsets"] = [at + size for at in entry["data_offsets"]]
        header[key] |= {"shape": shape, "data_offsets": [start, end + size]}
        (folder / TENSORS).write_bytes(join(header, data))
        longer(size)(folder)

    return change


BIAS, HEAD, INF = "blocks.0.up.bias", "train.head.weight", float("inf")
DAMAGE = {
    "no folder": (shutil.rmtree, "could not read a field.*No such file"),
    "no tensors": (lambda folder: (folder / TENSORS).unlink(), rf"No such file.*{TENSORS}"),
    "no description": (lambda folder: (folder / DESCRIPTION).unlink(), rf"No such file.*{DESCRIPTION}"),
    "a folder as file": (lambda f: ((f / TENSORS).unlink(), (f / TENSORS).mkdir()), "could not read a field"),
    "empty": (written(TENSORS, lambda _: b""), "there is none, or a damaged one"),
    "truncated": (written(TENSORS, lambda content: content[:-9]), "damaged"),
    "not safetensors": (written(TENSORS, lambda _: b"PK\x03\x04" * 99), "damaged"),
    "foreign": (
        written(TENSORS, lambda _: safetensors.torch.save({"lora_A": torch.zeros(2)})),
        "does not hold what it says: missing are .*blocks",
    ),
    "not JSON": (written(DESCRIPTION, lambda _: b"{"), "damaged one \\(JSONDecodeError"),
    "deep JSON": (written(DESCRIPTION, lambda _: b"[" * 10**5), "RecursionError"),
    "foreign JSON": (written(DESCRIPTION, lambda _: b"{}"), "needs str at 'format'; found None"),
    "a list": (written(DESCRIPTION, lambda _: b"[]"), "needs str at 'format'"),
    "a key twice": (written(DESCRIPTION, lambda text: text.replace(b"{", b'{"format": "x",', 1)), "has a key twice"),
    "edited": (written(DESCRIPTION, lambda text: text.replace(b'"scale": 0.5', b'"scale": 5.0')), "says other than"),
    "a missing tensor": (tensor("blocks.2.up.bias", None), "missing are blocks.2.up.bias"),
    "an extra tensor": (tensor("blocks.9.up.bias", torch.zeros(2)), "left over are blocks.9.up.bias"),
    "another shape": (tensor(BIAS, torch.zeros(31)), rf"{BIAS} has shape \(31,\); this model needs \(32,\)"),
    **{
        f"stored as {kind}": (tensor(BIAS, torch.zeros(32).to(kind)), f"{BIAS} is stored as {kind}; this model needs")
        for kind in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
    },
    "infinite": (tensor(BIAS, torch.full((32,), INF)), f"{BIAS} holds NaN or infinite numbers"),
    "too large": (tensor(BIAS, torch.full((32,), 1e39, dtype=torch.float64)), "numbers too large for torch.float32"),
    "a newer format": (described("format_version", 3), "version 3; this library"),
    "another format": (described("format", "peft"), "of format 'peft'"),
    "a bool for a number": (described("field.scale", True), "float at 'field.scale'; found True"),
    "an infinite scale": (described("field.scale", INF), "`scale` is a finite number"),
    "a scale beyond all floats": (described("field.scale", 10**400), "`scale` is a finite number"),
    "an unknown option": (described("field.gate", 1.0), "damaged one .*gate"),
    "nested config": (described("backbone.config", {"more": {"deeper": {}}}), "config, whose values are not plain"),
    "a large rank": (described("field.ranks", {"0": 2**30}), "`rank` is an integer from 1 to 32"),
    "a huge rank": (described("field.ranks", {"0": 10**30}), "`rank` is"),
    "a block too many": (described("field.ranks", {"3": 1}), "as ranks of 3"),
    "an unknown site": (described("field.site", "head"), "`site` is one of"),
    "an unknown activation": (described("field.activation", "x"), "`activation`"),
    "a bad name": (described("field.name", "a.b"), "a field's `name`"),
    "a trained tensor twice": (described("field.train", ["head.bias"] * 2), "as names of trained tensors"),
    "a trained tensor in two names": (
        described("field.train", ["head.weight", "head.bias", "module.head.bias"]),
        r"'head\.bias' and 'module\.head\.bias' become one without",
    ),
    "widths that do not count": (described("backbone.blocks", 4), "as widths of 4 blocks"),
    "blocks by the thousand": (
        lambda folder: rewrite(
            folder, None, lambda d: d["backbone"].update(blocks=10**4, widths=[*range(1, 10**4 + 1)])
        ),
        r"10000 blocks of width 1, 2, 3, 4, 5, 6, …; this model has vit, 3 blocks",
    ),
    "a tensor larger than the model's": (
        claims(HEAD, [2**30 + 160], 2**32),
        r"train\.head\.weight has shape \(1073741984,\); this model needs \(5, 32\)",
    ),
    "more bytes than its shape takes": (claims(HEAD, [5, 32], 2**32), "deserializing header: invalid"),
    "a header as long as the file": (
        lambda folder: ((folder / TENSORS).write_bytes(struct.pack("<Q", 2**32)), longer(2**32)(folder)),
        "header too large",
    ),
    "bytes after the tensors": (longer(2**32), "file not fully covered"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_before_it_takes_memory_and_changes_nothing(tmp_path, damage):
    folder, _ = save_one(tmp_path / "field")
    spoil, message = DAMAGE[damage]
    spoil(folder)
    tracemalloc.start()
    try:
        with refused(model := vit(), message):
            rs.load(model, folder)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()
