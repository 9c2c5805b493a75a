"""Damaged files: what tests of readers try, that whatever a file holds is read or refused."""

import random
import zipfile
from pathlib import Path


def mutated(data: bytes, seed: int) -> bytes:
    """Some bytes changed, cut out or doubled."""
    draw = random.Random(seed)
    found = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        if not found:
            break
        place = draw.randrange(len(found))
        kind = draw.randrange(3)
        if kind == 0:
            found[place] = draw.randrange(256)
        elif kind == 1:
            del found[place : place + draw.randint(1, 16)]
        else:
            found[place:place] = found[place : place + draw.randint(1, 16)]
    return bytes(found)


def with_other_digits(data: bytes, seed: int) -> bytes:
    """Up to three digits changed: what is JSON stays JSON, of other numbers."""
    draw = random.Random(seed)
    found = bytearray(data)
    places = [index for index, byte in enumerate(found) if chr(byte).isdigit() and byte < 128]
    for place in draw.sample(places, min(len(places), draw.randint(1, 3))):
        found[place] = draw.choice(b"0123456789")
    return bytes(found)


def mutated_archive(path: Path, seed: int) -> None:
    """Damage a zip archive in place: the file itself, one of its members, or the numbers in its largest JSON."""
    if seed % 3 == 0:
        path.write_bytes(mutated(path.read_bytes(), seed))
        return
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    if seed % 3 == 1:
        name = random.Random(seed).choice([name for name, data in members.items() if data])
        members[name] = mutated(members[name], seed)
    else:
        name = max((name for name in members if name.endswith(".json")), key=lambda name: len(members[name]))
        members[name] = with_other_digits(members[name], seed)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
