"""ICC profiles (version 2) made for tests: RGB by primaries and gamma, grey by gamma, CMYK inks that are all grey."""

import itertools
import struct

import numpy as np


D65 = (0.3127, 0.3290)
PRIMARIES = {  # red, green, blue
    "srgb": ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)),
    "p3": ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06)),
    "adobe": ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)),
}
D50 = np.array([0.9642, 1.0, 0.8249])


def xyz_matrix(primaries: str) -> np.ndarray:
    """(3, 3): linear RGB -> XYZ under D65."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in PRIMARIES[primaries]]).T
    x, y = D65
    return columns * np.linalg.solve(columns, [x / y, 1, (1 - x - y) / y])


def encode(light) -> np.ndarray:
    """Linear light in 0..1 as 8-bit sRGB."""
    light = np.clip(light, 0, 1)
    return np.round(255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055))


def as_srgb(colour, primaries: str, gamma: float) -> np.ndarray:
    """What an 8-bit colour of these primaries and this gamma is in sRGB."""
    light = (np.array(colour) / 255) ** gamma
    return encode(np.linalg.solve(xyz_matrix("srgb"), xyz_matrix(primaries) @ light))


def fixed(*numbers) -> bytes:
    return b"".join(struct.pack(">i", round(65536 * number)) for number in numbers)


def profile(space: bytes, connection: bytes, kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    table, data, start = b"", b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">2I", start + len(data), len(content))
        data += content + b"\0" * (-len(content) % 4)
    header = struct.pack(">I4sI", start + len(data), b"", 0x02400000) + kind + space + connection
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + fixed(*D50)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * gamma))


def rgb_profile(primaries: str, gamma: float) -> bytes:
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    white = xyz_matrix(primaries).sum(axis=1)
    matrix = np.linalg.inv(bradford) @ np.diag(bradford @ D50 / (bradford @ white)) @ bradford @ xyz_matrix(primaries)
    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(*D50)}
    for name, column in zip((b"r", b"g", b"b"), matrix.T):
        tags |= {name + b"XYZ": b"XYZ \0\0\0\0" + fixed(*column), name + b"TRC": curve(gamma)}
    return profile(b"RGB ", b"XYZ ", b"mntr", tags)


def grey_profile(gamma: float) -> bytes:
    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(*D50), b"kTRC": curve(gamma)}
    return profile(b"GRAY", b"XYZ ", b"mntr", tags)


def ink_profile() -> bytes:
    """CMYK inks that are all grey: lightness is 100 * (1 - K) * (1 - (C + M + Y) / 3)."""
    ramp = bytes(range(256))
    grid = [(1 - k) * (1 - (c + m + y) / 3) for c, m, y, k in itertools.product((0, 1), repeat=4)]
    lookup = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    lookup += ramp * 4 + b"".join(bytes([round(255 * lightness), 128, 128]) for lightness in grid) + ramp * 3
    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(*D50), b"A2B0": lookup}
    return profile(b"CMYK", b"Lab ", b"prtr", tags)
