"""Writes `vectors.json`: flags, questions and the answers that the specification demands.

It shares no code with `esper.release`: murmur3, CBOR and the order of precedence are written once
more, in the plainest way, from their definitions. Run it only to change the specification:

    python tests/esper/release/make_vectors.py
"""

import json
import random
from pathlib import Path

ENVIRONMENTS = ("ci", "staging", "production")
NAMES = ("kasmina.parallel", "kasmina.triton", "tamiyo.learned", "tamiyo.remote", "shards.many")
MODELS = (
    None, "", "m", "gpt-10m", "resnet50", "spirals/host-32", "модель", "模型-7", "🌱",
    "x" * 23, "x" * 24, "x" * 255, "x" * 256, "ü" * 128, "a b", "0", "true",
    *(f"run-{i:04d}" for i in range(40)),
)  # fmt: skip


def murmur3_32(data: bytes) -> int:
    """MurmurHash3_x86_32 with seed 0 (A. Appleby, public domain)."""

    def rotate(x, by):
        return ((x << by) | (x >> (32 - by))) & 0xFFFFFFFF

    h = 0
    whole = len(data) // 4 * 4
    for i in range(0, whole, 4):
        k = int.from_bytes(data[i : i + 4], "little")
        h ^= rotate(k * 0xCC9E2D51 & 0xFFFFFFFF, 15) * 0x1B873593 & 0xFFFFFFFF
        h = (rotate(h, 13) * 5 + 0xE6546B64) & 0xFFFFFFFF
    k = int.from_bytes(data[whole:], "little")
    h ^= rotate(k * 0xCC9E2D51 & 0xFFFFFFFF, 15) * 0x1B873593 & 0xFFFFFFFF
    h ^= len(data)
    h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ h >> 16


def cbor_text(text: str) -> bytes:
    """RFC 8949, section 3, major type 3, in the shortest form."""
    data = text.encode()
    n = len(data)
    if n <= 23:
        return bytes([0b011_00000 | n]) + data
    if n <= 0xFF:
        return bytes([0b011_11000, n]) + data
    return bytes([0b011_11001, n // 256, n % 256]) + data


def bucket(salt: str, model: str) -> int:
    """Number 0 to 9,999 of a model; 0x82 begins a CBOR list of two."""
    return murmur3_32(b"\x82" + cbor_text(salt) + cbor_text(model)) * 10_000 // 2**32


def same(a, b) -> bool:
    return type(a) is type(b) and a == b


def specified(case, flags, name):
    """All that speaks for on or off, in the order of precedence; the first counts."""
    flag, model = flags[name], case["model"]
    if name in case["overrides"]:
        yield case["overrides"][name], "ENVIRONMENT"
    if case["environment"] in flag.get("environments", {}):
        yield flag["environments"][case["environment"]], "ENVIRONMENT"
    if flag.get("killed", False):
        yield False, "KILLED"
    if model in flag.get("blocked", []):
        yield False, "BLOCKED"
    for needed in flag.get("prerequisites", []):
        if not next(specified(case, flags, needed))[0]:
            yield False, "PREREQUISITE"
    if model in flag.get("allowed", []):
        yield True, "ALLOWED"
    for rule in flag.get("rules", []):
        if all(
            any(same(case["attributes"].get(key), value) for value in values)
            for key, values in rule["when"].items()
        ):
            yield rule["serve"], "RULE"
    if flag.get("rollout_bp") is not None:
        if model is None or model == "":
            yield False, "NO_MODEL"
        elif bucket(flag.get("salt") or name, model) < flag["rollout_bp"]:
            yield True, "IN_ROLLOUT"
        else:
            yield False, "OUT_OF_ROLLOUT"
    yield flag.get("default", False), "DEFAULT"


def some(rng, values, most):
    return rng.sample(values, rng.randint(0, most))


def make_flag(rng, earlier):
    """A flag with a few of all fields; mostly without those that leave nothing to the others."""
    flag = {"description": "drawn", "owner": "tests", "expires": "2099-01-01"}
    named = [m for m in MODELS if m]
    listed = rng.sample(named, 12)
    if rng.random() < 0.25:
        flag["environments"] = {e: rng.random() < 0.5 for e in some(rng, ENVIRONMENTS, 2)}
    if rng.random() < 0.12:
        flag["killed"] = True
    if rng.random() < 0.4:
        flag["blocked"] = listed[:6]
    if rng.random() < 0.4:
        flag["allowed"] = listed[6:]
    if rng.random() < 0.35:
        flag["prerequisites"] = some(rng, earlier, min(2, len(earlier)))
    if rng.random() < 0.4:
        flag["rules"] = [
            {"when": when, "serve": rng.random() < 0.5}
            for when in rng.sample(
                [
                    {"device": ["cuda"]},
                    {"device": ["cpu", "mps"]},
                    {"layers": [1, 2]},
                    {"compiled": [True]},
                    {"device": ["cuda"], "layers": [1]},
                ],
                2,
            )
        ]
    if rng.random() < 0.7:
        flag["rollout_bp"] = rng.choice((0, 1, 500, 2_500, 5_000, 9_999, 10_000))
        if rng.random() < 0.3:
            flag["salt"] = rng.choice(("2026", "kasmina", "s" * 30))
    elif rng.random() < 0.5:
        flag["default"] = True
    return flag


def make_document(rng):
    flags = {}
    for name in NAMES:
        flags[name] = make_flag(rng, tuple(flags))
    return {"version": 1, "environments": list(ENVIRONMENTS), "flags": flags}


def make_case(rng, documents):
    number = rng.randrange(len(documents))
    case = {
        "document": number,
        "environment": rng.choice((None, None, *ENVIRONMENTS)),
        "overrides": {rng.choice(NAMES): rng.random() < 0.5} if rng.random() < 0.1 else {},
        "flag": rng.choice(NAMES),
        "model": rng.choice(MODELS),
        "attributes": rng.choice((
            {}, {}, {"device": "cuda"}, {"device": "cpu", "layers": 2}, {"layers": 1},
            {"layers": True}, {"compiled": True}, {"compiled": 1}, {"device": "cuda", "layers": 1},
        )),
    }  # fmt: skip
    enabled, reason = next(specified(case, documents[number]["flags"], case["flag"]))
    return case | {"enabled": enabled, "reason": reason}


def vectors() -> str:
    """The whole file."""
    rng = random.Random(20261123)
    documents = [make_document(rng) for _ in range(40)]
    cases = [make_case(rng, documents) for _ in range(1_000)]
    buckets = [
        {"salt": salt, "model": model, "bucket": bucket(salt, model)}
        for salt in ("kasmina.parallel", "s" * 24, "ü")
        for model in MODELS
        if model
    ]
    lines = {
        key: ",\n".join(json.dumps(item, ensure_ascii=False) for item in items)
        for key, items in (("documents", documents), ("buckets", buckets), ("cases", cases))
    }
    text = ",\n".join(f'"{key}": [\n{body}\n]' for key, body in lines.items())
    return "{" + text + "}\n"


if __name__ == "__main__":
    Path(__file__).with_name("vectors.json").write_text(vectors(), encoding="utf-8")
