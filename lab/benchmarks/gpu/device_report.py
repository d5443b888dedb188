"""What was found on a GPU, as Markdown, JSON and pictures."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from lab.benchmarks.comparison import BLOCK, OPERATION, MeasuredPass
from lab.benchmarks.gpu.kernels import CANDIDATES
from lab.benchmarks.gpu.operation import Row
from lab.benchmarks.implementations import OURS, Case
from lab.benchmarks.machine import machine_line
from lab.benchmarks.measure import (
    DIFFERS,
    FORWARD,
    FORWARD_BACKWARD,
    MEASURED,
    UNAVAILABLE,
    Outcome,
)

_TITLES = {
    "tests": "The tests for CUDA",
    "block": "The operation and the block",
    "softmax": "Who computes the softmax",
    "detector": "The detector",
    "ddp": "The detector on several GPUs",
    "study": "The quick study",
}
_NOTES = {
    "block": """\
2 pictures of 800 × 1344. fwd is inference, bwd gives all gradients; times are by CUDA events, warm;
memory is the peak beyond inputs and weights. In half precision a block has float32 weights under
autocast. FLOPs are those of the N × N form, computed once; the share is of a plain matrix product
in the same precision.""",
    "softmax": """\
The operation alone. `softmax.choose` may take the kernels in bold; "nl_detectron" is what it takes
now. Papers that count what the backward pass computes twice have 7/6 of these TFLOP/s.""",
    "detector": """\
Mask R-CNN with random weights; 2 pictures of 800 × 1333 of noise with 7 objects each; inference of
one, in which nothing passes the score threshold. Memory is all that PyTorch holds at the peak.""",
    "study": "docs/STUDY.md has the same settings on a CPU, over 3 seeds.",
}


def write_report(output: Path, name: str, machine: Row, rows: Sequence[Row]) -> Path:
    """The report, and beside it the JSON and the pictures."""
    content = json.dumps({"machine": machine, "rows": rows}, indent=1)
    (output / f"{name}.json").write_text(content + "\n", encoding="utf-8")
    left_out = [row for row in rows if row["kind"] == "left out"]
    parts = [f"# {machine['name']}", machine_line(machine) + "; `make gpu-check`"]
    for section, title in _TITLES.items():
        own = [row for row in rows if row["section"] == section]
        if not own:
            continue
        took = sum(row["seconds"] for row in own if row["kind"] == "time")
        parts += [f"## {title}", f"{_NOTES.get(section, '')} ({took:.0f} s)".strip()]
        parts += filter(None, _WRITERS[section](own))
    parts += _pictures(rows, output, name, left_out)
    if left_out:
        lines = [[row["section"], row["what"], row["why"]] for row in left_out]
        parts += ["## Left out", _table(["section", "what", "why"], lines)]
    report = output / f"{name}.md"
    report.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return report


def is_sound(rows: Iterable[Row]) -> bool:
    """Did no test fail, and could all of ours be measured?"""
    return not any(
        row.get("failed") or (row.get("implementation") == OURS and row["status"] != MEASURED)
        for row in rows
    )


def _write_tests(rows: Sequence[Row]) -> list[str]:
    parts, keys = [], ("tests", "failures", "errors", "skipped")
    for row in (row for row in rows if row["kind"] == "tests"):
        parts.append(_table(keys, [[row[key] for key in keys]]))
        parts.append("\n".join(f"- {line}" for line in row["failed"]))
    return parts


def _write_block(rows: Sequence[Row]) -> list[str]:
    found, parts = _outcomes(rows), _write_peaks(rows)
    for pairwise in dict.fromkeys(case.pairwise for case, _ in found):
        lines = [
            [
                *(*_case_cells(case), name, *_cells(of_case[BLOCK]), *_cells(of_case[OPERATION])),
                *_speed(of_case[OPERATION].get(FORWARD_BACKWARD), case, rows),
            ]
            for (case, name), of_case in found.items()
            if case.pairwise == pairwise
        ]
        columns = ["fwd", "fwd + bwd", "memory"]
        headers = ["place", "precision", "implementation", *(f"block: {c}" for c in columns)]
        headers += [*(f"operation: {c}" for c in columns), "TFLOP/s", "share"]
        parts += [f"### {pairwise}", _table(headers, lines)]
    return parts


def _write_softmax(rows: Sequence[Row]) -> list[str]:
    lines, place = [], ["function", "place", "precision"]
    fastest: dict[Case, list[tuple[float, str]]] = {}
    for (case, name), of_case in _outcomes(rows).items():
        both = of_case[OPERATION].get(FORWARD_BACKWARD)
        note = both["note"].splitlines()[0][:200] if both and both["note"] else ""
        cells = [*_cells(of_case[OPERATION]), *_speed(both, case, rows), note]
        shown = f"**{name}**" if name in CANDIDATES else name
        lines.append([case.pairwise, *_case_cells(case), shown, *cells])
        if both and both["seconds"]:
            fastest.setdefault(case, []).append((both["seconds"], name))
    kinds: tuple[Collection[str] | None, ...] = (None, CANDIDATES, {OURS})
    best = [
        [case.pairwise, *_case_cells(case), *(_best(times, names) for names in kinds)]
        for case, times in fastest.items()
    ]
    chosen = [*place, "fastest", "fastest that may be chosen", "chosen now"]
    headers = [*place, "kernel", "fwd", "fwd + bwd", "memory", "TFLOP/s", "share", "note"]
    return [
        *_write_peaks(rows),
        *("### Fastest, forward + backward", _table(chosen, best)),
        *("### All", _table(headers, lines)),
    ]


def _write_detector(rows: Sequence[Row]) -> list[str]:
    headers = ["detector", "training, it/s", "peak memory", "inference, images/s"]
    lines = []
    for row in (row for row in rows if row["kind"] == "detector"):
        images = row["images_per_second"]
        speeds = (f"{row['iterations_per_second']:.2f}", "-" if images is None else f"{images:.2f}")
        lines.append([row["setting"], speeds[0], _bytes(row["memory_bytes"]), speeds[1]])
    return [_table(headers, lines)]


def _write_study(rows: Sequence[Row]) -> list[str]:
    found = [row for row in rows if row["kind"] == "study"]
    metrics = list(dict.fromkeys(key for row in found for key in row if key.endswith("/AP")))
    lines = [
        [row["run"], *(f"{row.get(m, float('nan')):.1f}" for m in metrics), f"{row['seconds']:.0f}"]
        for row in found
    ]
    return [_table(["run", *metrics, "seconds"], lines)]


_WRITERS = {
    "tests": _write_tests,
    "block": _write_block,
    "softmax": _write_softmax,
    "detector": _write_detector,
    "ddp": _write_detector,
    "study": _write_study,
}


def _write_peaks(rows: Sequence[Row]) -> list[str]:
    """What a plain matrix product reaches."""
    return [
        f"A plain product of two {row['size']:,} × {row['size']:,} matrices: "
        + ", ".join(f"{k} {v / 1e12:.4g} TFLOP/s" for k, v in row["flops_per_second"].items())
        for row in rows
        if row["kind"] == "peaks"
    ]


def _measured(row: Row) -> MeasuredPass:
    """As the benchmark had it."""
    case = Case(**{key: row[key] for key in Case.__dataclass_fields__})
    case = replace(case, image_size=tuple(row["image_size"]))  # in JSON a list
    outcome = Outcome(**{key: row[key] for key in Outcome.__dataclass_fields__})
    return MeasuredPass(case, row["implementation"], row["level"], row["pass"], outcome)


def _outcomes(rows: Sequence[Row]) -> dict[tuple[Case, str], dict[str, dict[str, Row]]]:
    """By case and implementation, level and pass: what was measured of those that take part."""
    found: dict[tuple[Case, str], dict[str, dict[str, Row]]] = {}
    for row in rows:
        if row["kind"] == "outcome" and row["status"] != UNAVAILABLE:
            key = _measured(row)
            of_case = found.setdefault(key[:2], {BLOCK: {}, OPERATION: {}})
            of_case[row["level"]][row["pass"]] = row
    return found


def _case_cells(case: Case) -> list[str]:
    pooled = {"none": "", "embeddings": ", pooled"}[case.subsample]
    return [f"{case.stage}{pooled}", case.precision]


def _cells(passes: dict[str, Row]) -> list[str]:
    """Forward, forward + backward, and the latter's memory."""
    both = passes.get(FORWARD_BACKWARD)
    times = [_time_or_status(passes.get(which)) for which in (FORWARD, FORWARD_BACKWARD)]
    return [*times, _bytes(both["memory_bytes"] if both else None)]


def _speed(row: Row | None, case: Case, rows: Sequence[Row]) -> list[str]:
    """TFLOP/s, and the share of a plain product's."""
    if not row or not row["flops"] or not row["seconds"]:
        return ["-", "-"]
    speed = row["flops"] / row["seconds"]
    peak = next(r for r in rows if r["kind"] == "peaks")["flops_per_second"][case.precision]
    return [f"{speed / 1e12:.4g}", f"{speed / peak:.0%}"]


def _time_or_status(row: Row | None) -> str:
    if row is None:
        return "-"
    if row["status"] == MEASURED:
        return _time(row["seconds"])
    return f"differs by {row['difference']:.1e}" if row["status"] == DIFFERS else row["status"]


def _best(times: Iterable[tuple[float, str]], only: Collection[str] | None) -> str:
    found = [(seconds, name) for seconds, name in times if only is None or name in only]
    return "-" if not found else f"{_time(min(found)[0])} {min(found)[1]}"


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def _bytes(number: int | None) -> str:
    return "-" if number is None else f"{number / 1e6:,.0f} MB"


def _table(headers: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """Empty without lines."""
    if not (lines := list(lines)):
        return ""
    rows = [headers, ["---"] * len(headers), *lines]
    return "\n".join(
        "| " + " | ".join(str(c).replace("|", "/") for c in row) + " |" for row in rows
    )


def _pictures(rows: Sequence[Row], output: Path, name: str, left_out: list[Row]) -> list[str]:
    """How many times ours the others take, a picture for each precision."""
    own = [row for row in rows if row["section"] == "block" and row["kind"] == "outcome"]
    found = [_measured(row) for row in own]
    parts = []
    try:
        from lab.benchmarks.benchmark_report import plot_ratios

        for precision in dict.fromkeys(row.case.precision for row in found):
            file = output / f"{name}_{precision}.png"
            plot_ratios([row for row in found if row.case.precision == precision], file)
            parts.append(f"![{precision}: times and memory of the others over ours]({file.name})")
    except ImportError as error:
        left_out.append({"section": "block", "what": "the pictures", "why": str(error)})
    return parts
