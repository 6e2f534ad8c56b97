"""How many nodes the training graphs of GDSS's released models have: what their samples are drawn with."""

from __future__ import annotations

import math

# Nodes: number of training graphs. Counted in the authors' files; those of molecules in a sample of 4,000.
_COUNTS = {
    "community_small": "12:21 14:20 16:15 18:13 20:11",
    "ego_small": "4:56 5:32 6:20 7:16 8:9 9:6 10:5 11:4 12:3 13:3 14:1 16:5",
    "ENZYMES": (
        "10:2 11:5 12:12 13:6 14:11 15:8 16:6 17:4 18:13 19:10 20:13 21:14 22:13 23:8 24:18 25:15 26:19 27:19 "
        "28:16 29:10 30:10 31:5 32:12 33:10 34:12 35:6 36:8 37:9 38:13 39:13 40:16 41:13 42:19 43:5 44:18 "
        "45:4 46:9 47:4 48:13 49:3 50:8 51:5 52:7 54:2 55:3 56:2 57:3 58:1 60:4 62:2 64:1 66:3 74:1 96:1 "
        "121:1 123:1 125:1"
    ),
    "grid": (
        "110:1 121:1 130:1 132:1 140:2 143:3 144:1 150:4 156:2 160:1 165:2 168:2 169:1 170:1 176:2 180:5 "
        "190:3 192:2 195:1 196:1 204:3 208:1 209:1 210:1 216:5 221:3 228:2 234:1 238:2 240:1 247:1 252:3 "
        "255:2 266:1 270:2 272:2 285:1 288:3 304:1 306:3 324:2 342:2"
    ),
    "QM9": "4:3 5:1 6:24 7:114 8:517 9:3341",
}
# Heavy atoms of ZINC250k, from memory: a normal law with this mean and standard deviation, none below the smallest.
_ZINC = (23.2, 4.5, 6)
_EXACT = ("community_small", "ego_small", "ENZYMES", "grid")


def node_counts(data: str, nodes: int) -> tuple[list[int], bool]:
    """Number of training graphs with 0, 1, ..., ``nodes`` nodes, and whether that is approximate.

    Args:
        data: the authors' name of the set; another is taken to be all of the largest size.
        nodes: of the largest graph.
    """
    if data == "ZINC250k":
        mean, std, least = _ZINC
        weights = [math.exp(-0.5 * ((n - mean) / std) ** 2) if n >= least else 0.0 for n in range(nodes + 1)]
        return [round(1e5 * weight) for weight in weights], True
    counts = [0] * (nodes + 1)
    for pair in _COUNTS.get(data, f"{nodes}:1").split():
        size, count = map(int, pair.split(":"))
        counts[min(size, nodes)] += count
    return counts, data not in _EXACT
