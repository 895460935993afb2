"""Which cases are timed, the important ones first: a run that is cut short has those."""

from collections.abc import Iterator

from cases import Case

MAIN_T, MAIN_D = 16384, 4096
# seeds, rows: 16,384 seeds need as many channels, so a quarter of the rows moves the same bytes
SEEDS = ((1, MAIN_T), (64, MAIN_T), (1024, MAIN_T), (4096, MAIN_T), (16384, MAIN_T // 4))
RATIOS = (1, 2, 4)
SWEEP_T = (32, 128, 512, 2048, 8192, 65536)
SPAN_UNITS = 1024
SPAN_ACTIVE = ("64", "256", "512", "all")

OURS = ("triton",)
EAGER = ("triton", "torch")
ALL = ("triton", "torch", "torch.compile", "torch.compile sums", "legacy")
COMPILED = ("triton", "torch", "torch.compile")

Planned = tuple[Case, tuple[str, ...]]


def full() -> Iterator[Planned]:
    """Everything; about 110 cases."""
    yield from _headline()
    yield from _seeds_and_ratios()
    yield from _spans()
    yield from _isolated()
    yield from _optimizer()
    yield from _shares_and_functions()
    yield from _rows()


def quick() -> Iterator[Planned]:
    """One case of each kind, without compiled baselines and loops."""
    for case, _ in _headline():
        yield case, EAGER
    for S, T in SEEDS:
        yield _chunks("forward", S, T), OURS
    for mode in ("span forward", "span backward"):
        for active in ("64", "all"):
            yield _span(mode, active), EAGER
    yield next(_isolated())[0], OURS
    yield next(_optimizer())[0], ("triton", "torch fused")


def goals() -> Iterator[Planned]:
    """What the table of goals is made from, and little more."""
    yield _chunks("forward", 1024), ("triton", "torch", "torch.compile", "legacy")
    yield _chunks("backward", 1024), COMPILED
    yield _chunks("dormant", 1024), COMPILED
    yield _chunks("forward", 1024, phi="silu"), OURS
    yield _chunks("forward", 1024, ratio=4), COMPILED
    yield _chunks("forward", 1024, ratio=4, phi="silu"), OURS
    for mode in ("forward", "backward"):
        for S, T in SEEDS[1:]:
            yield _chunks(mode, S, T), OURS
    yield from _optimizer()
    yield _chunks("isolated", 1024, isolated=1024), OURS
    yield _chunks("isolated", 1024, isolated=256), OURS
    for mode in ("forward", "backward"):
        yield _chunks(mode, 1024, observe=False), OURS
        yield _chunks(mode, 1024, active="half"), OURS
        yield _chunks(mode, 1024, active="none"), OURS
        yield _chunks(mode, 1024, phi="gelu"), OURS
        yield _chunks(mode, 1024, phi="mixed"), OURS
        yield _chunks(mode, 1024, 32), OURS
    yield _chunks("backward", 1024, ratio=4), OURS
    yield _chunks("forward", 1024, ratio=2), OURS
    for dtype in ("fp16", "fp32"):
        yield _chunks("forward", 1024, dtype=dtype), OURS
    yield _chunks("forward", 1024, 65536), OURS
    yield _chunks("forward", 1), OURS
    for active in SPAN_ACTIVE:
        yield _span("span forward", active), ("triton", "torch.compile")
        yield _span("span backward", active), ("triton", "torch.compile")
    yield _span("span forward", "all", observe=False), ("triton", "torch.compile")


def smoke() -> Iterator[Planned]:
    """Tiny sizes that prove that the scripts run; what they measure means nothing."""
    yield Case("forward", 8, 4, 4, 4, phi="mixed", dtype="fp32"), EAGER
    yield Case("forward", 8, 4, 4, 4, dtype="fp32"), (*EAGER, "legacy")
    yield Case("backward", 8, 4, 4, 4, phi="mixed", dtype="fp32"), EAGER
    yield Case("backward", 8, 4, 4, 4, dtype="fp32"), (*EAGER, "legacy")
    yield Case("isolated", 8, 4, 4, 4, phi="mixed", dtype="fp32", isolated=2), EAGER
    yield Case("forward", 8, 4, 4, 4, dtype="fp32", active="half", observe=False), EAGER
    yield Case("dormant", 8, 4, 4, 4, dtype="fp32"), EAGER
    # wide chunks have kernels of their own
    for mode in ("forward", "backward"):
        yield Case(mode, 8, 2, 160, 8, dtype="fp32"), OURS
    for mode in ("span forward", "span backward"):
        yield Case(mode, 8, 4, 16, 1, dtype="fp32", active="2"), EAGER
    yield Case("optimizer", 1, 4, 4, 4, dtype="fp32", active="half"), (*EAGER, "torch fused")


def _headline() -> Iterator[Planned]:
    yield _chunks("forward", 1024), ALL
    yield _chunks("backward", 1024), ALL
    yield _chunks("dormant", 1024), COMPILED
    yield _chunks("forward", 1024, phi="silu"), OURS
    yield _chunks("forward", 1024, ratio=4), ALL
    yield _chunks("forward", 1024, ratio=4, phi="silu"), OURS


def _seeds_and_ratios() -> Iterator[Planned]:
    for mode in ("forward", "backward"):
        for ratio in RATIOS:
            for S, T in SEEDS:
                providers: tuple[str, ...] = ALL if ratio == 1 and S in (64, 4096) else OURS
                # the loop's backward over 4,096 seeds adds minutes and no insight
                if (mode, S) == ("backward", 4096):
                    providers = COMPILED
                yield _chunks(mode, S, T, ratio), providers


def _spans() -> Iterator[Planned]:
    for mode in ("span forward", "span backward"):
        for active in SPAN_ACTIVE:
            yield _span(mode, active), COMPILED
        yield _span(mode, "half"), OURS
        yield _span(mode, "all", observe=False), COMPILED
        yield _span(mode, "all", phi="gelu"), OURS


def _isolated() -> Iterator[Planned]:
    yield _chunks("isolated", 1024, isolated=256), EAGER
    yield _chunks("isolated", 1024, isolated=1024), EAGER
    yield _chunks("isolated", 1024, ratio=4, isolated=256), OURS


def _optimizer() -> Iterator[Planned]:
    # a pool of wide chunks, which is as large as a layer, and one of fine ones, which is tiny
    for S, C, H in ((16, 256, 1024), (1024, 4, 4)):
        for active in ("all", "half", "none"):
            case = Case("optimizer", 1, S, C, H, dtype="fp32", active=active)
            yield case, (*EAGER, "torch fused") if active == "all" else OURS


def _shares_and_functions() -> Iterator[Planned]:
    for mode in ("forward", "backward"):
        for active in ("none", "half"):
            yield _chunks(mode, 1024, active=active), EAGER
        for phi in ("silu", "gelu", "mixed"):
            yield _chunks(mode, 1024, phi=phi), EAGER
        for dtype in ("fp16", "fp32"):
            yield _chunks(mode, 1024, dtype=dtype), OURS
        yield _chunks(mode, 1024, observe=False), COMPILED if mode == "forward" else EAGER
    for phi in ("gelu", "mixed"):
        yield _chunks("forward", 1024, ratio=4, phi=phi), OURS


def _rows() -> Iterator[Planned]:
    for mode in ("forward", "backward"):
        for T in SWEEP_T:
            yield _chunks(mode, 1024, T), EAGER if T == 32 else OURS


def _chunks(mode: str, S: int, T: int = MAIN_T, ratio: int = 1, **rest: object) -> Case:
    C = max(MAIN_D, S) // S
    return Case(mode, T, S, C, C * ratio, **rest)  # type: ignore[arg-type]


def _span(mode: str, active: str, **rest: object) -> Case:
    return Case(mode, MAIN_T, SPAN_UNITS, MAIN_D, 1, active=active, **rest)  # type: ignore[arg-type]
