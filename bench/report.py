#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Turns what talpa_bench and the programs of bench/cuda wrote into one HTML page and Markdown."""

import argparse
import html
import json
import math
import os
import re
import sys

USAGE = """\
python3 bench/report.py RUN.json... [--html PAGE] [--markdown FILE] [--title TEXT]

RUN.json is what talpa_bench --benchmark_out=RUN.json --benchmark_out_format=json,
talpa_device_bench RUN.json or talpa_laboratory RUN.json wrote. The page holds its charts as inline SVG and needs no other file;
without --html and --markdown the table goes to the standard output."""

# What Google Benchmark says of every line; the rest are counters.
FIELDS = {
    "name", "run_name", "run_type", "family_index", "per_family_instance_index", "repetitions",
    "repetition_index", "threads", "iterations", "real_time", "cpu_time", "time_unit",
    "aggregate_name", "aggregate_unit", "label", "error_occurred", "error_message",
    "items_per_second", "bytes_per_second",
}
SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
COLOURS = ["#3366cc", "#dc3912", "#109618", "#ff9900", "#990099", "#0099c6", "#dd4477", "#66aa00",
           "#b82e2e", "#316395", "#994499", "#22aa99"]


class Refused(Exception):
    """A file that cannot be reported, said in one line."""


class Line:
    """One benchmark: its group, its other words, its parameters and what was measured."""

    def __init__(self, name, values):
        words, self.parameters = [], {}
        for part in re.split(r"[/ ]", name):
            key, colon, value = part.partition(":")
            if colon and key and value:
                self.parameters[key] = value
            elif part and part not in ("manual_time", "real_time", "process_time"):
                words.append(part.rstrip(","))
        self.group, self.label = words[0], " ".join(words[1:])
        self.values = values


def read(path):
    """The lines and the context of one file."""
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except OSError as error:
        raise Refused(f"cannot read '{path}': {error.strerror}") from None
    except (ValueError, UnicodeDecodeError):
        raise Refused(f"'{path}' is not JSON") from None
    if isinstance(data, list):
        return [device_line(entry, path) for entry in data], {}
    if not isinstance(data, dict) or not isinstance(data.get("benchmarks"), list):
        raise Refused(f"'{path}' has no benchmarks")
    # Where repetitions were asked for, their median stands for them.
    entries = [e for e in data["benchmarks"] if not e.get("error_occurred")]
    medians = {e.get("run_name") for e in entries if e.get("aggregate_name") == "median"}
    lines = []
    for entry in entries:
        name = entry.get("run_name") or entry.get("name")
        if entry.get("run_type") == "aggregate" or name in medians:
            if entry.get("aggregate_name") != "median":
                continue
        unit = SECONDS.get(entry.get("time_unit"))
        if not isinstance(name, str) or unit is None or "real_time" not in entry:
            raise Refused(f"'{path}' has a benchmark without name or time")
        values = {"us": float(entry["real_time"]) * unit * 1e6}
        for key, value in entry.items():
            if key not in FIELDS and isinstance(value, (int, float)):
                values[key] = float(value)
        lines.append(Line(name, values))
    return lines, data.get("context", {})


def device_line(entry, path):
    if not isinstance(entry, dict) or "name" not in entry or "us" not in entry:
        raise Refused(f"'{path}' has a line without name or time")
    line = Line(entry["name"], {"us": float(entry["us"])})
    if "beside" in entry and "ratio" in entry:
        line.parameters["beside"] = entry["beside"]
    for key, value in entry.items():
        if key not in ("name", "us") and isinstance(value, (int, float)):
            line.values[key] = float(value)
    return line


def number(x):
    """Three digits, without a power of ten where that is short."""
    if x != x:
        return "nan"
    if x == 0:
        return "0"
    size = math.floor(math.log10(abs(x)))
    if size >= 6 or size < -3:
        return f"{x:.2e}"
    return f"{x:.{max(0, 2 - size)}f}"


def groups_of(lines):
    groups = {}
    for line in lines:
        groups.setdefault(line.group, []).append(line)
    return groups


def columns_of(lines):
    """Parameters and counters of a group, each in the order in which they first come."""
    parameters, counters = {}, {}
    for line in lines:
        parameters.update(dict.fromkeys(line.parameters))
        counters.update(dict.fromkeys(line.values))
    return list(parameters), list(counters)


def cells_of(lines):
    """A table: its head and its rows, as text."""
    parameters, counters = columns_of(lines)
    head = ["name"] + parameters + counters
    rows = [[line.label] + [line.parameters.get(p, "") for p in parameters] +
            [number(line.values[c]) if c in line.values else "" for c in counters]
            for line in lines]
    return head, rows, 1 + len(parameters)


def markdown(title, groups, contexts):
    out = [f"# {title}", ""]
    out += [f"- {text}" for text in contexts] + ([""] if contexts else [])
    for group, lines in groups.items():
        head, rows, texts = cells_of(lines)
        out += [f"## {group}", "", "| " + " | ".join(head) + " |",
                "| " + " | ".join("---" if i < texts else "---:" for i in range(len(head))) + " |"]
        out += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        out.append("")
    return "\n".join(out)


def numeric(text):
    try:
        return float(text)
    except ValueError:
        return None


def axis_of(lines):
    """The parameter with most values, all of them positive numbers; None where none has two."""
    best, most = None, 1
    for parameter in columns_of(lines)[0]:
        values = {line.parameters.get(parameter) for line in lines} - {None}
        numbers = {numeric(v) for v in values}
        if None not in numbers and min(numbers, default=0) > 0 and len(numbers) > most:
            best, most = parameter, len(numbers)
    return best


def ticks(low, high):
    """Places for the marks of a logarithmic axis: powers of two or of ten, ten at most."""
    for base in (2, 10, 100, 1000):
        first = math.floor(math.log(low, base) + 1e-9)
        last = math.ceil(math.log(high, base) - 1e-9)
        if last - first <= 9:
            return [base**i for i in range(first, last + 1)]
    return [low, high]


def chart(title, axis, counter, series, equal=False):
    """An SVG with both axes logarithmic; `series` maps a name to its points. They are joined, or
    with `equal` stand alone on equal axes, whose diagonal is drawn."""
    width, height, left, bottom, top, right = 640, 320, 64, 40, 28, 16
    points = [p for of in series.values() for p in of]
    across, up = [p[0] for p in points], [p[1] for p in points]
    if equal:
        across = up = across + up
    xs, ys = ticks(min(across), max(across)), ticks(min(up), max(up))

    def place(value, marks, begin, end):
        low, high = math.log(marks[0]), math.log(marks[-1])
        return begin + (end - begin) * ((math.log(value) - low) / (high - low) if high > low else 0.5)

    def x_of(x):
        return place(x, xs, left, width - right)

    def y_of(y):
        return place(y, ys, height - bottom, top)

    svg = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">',
           f'<text x="{left}" y="16" class="t">{html.escape(title)}</text>']
    for x in xs:
        svg.append(f'<line x1="{x_of(x):.1f}" x2="{x_of(x):.1f}" y1="{top}" y2="{height - bottom}"/>'
                   f'<text x="{x_of(x):.1f}" y="{height - bottom + 16}" class="m">{number(x)}</text>')
    for y in ys:
        svg.append(f'<line x1="{left}" x2="{width - right}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}"/>'
                   f'<text x="{left - 6}" y="{y_of(y) + 4:.1f}" class="e">{number(y)}</text>')
    svg.append(f'<text x="{(left + width) / 2:.0f}" y="{height - 6}" class="m">{html.escape(axis)}</text>')
    if equal:
        svg.append(f'<line x1="{left}" x2="{width - right}" y1="{height - bottom}" y2="{top}"/>')
    for i, (name, of) in enumerate(series.items()):
        colour, of = COLOURS[i % len(COLOURS)], sorted(of)
        if not equal:
            path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in of)
            svg.append(f'<polyline points="{path}" style="stroke:{colour}"/>')
        for x, y in of:
            tip = html.escape(f"{name}: {counter} {number(y)} at {axis} {number(x)}")
            svg.append(f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3.5" style="fill:{colour}">'
                       f'<title>{tip}</title></circle>')
    svg.append("</svg>")
    legend = "".join(f'<span><i style="background:{COLOURS[i % len(COLOURS)]}"></i>'
                     f'{html.escape(name)}</span>' for i, name in enumerate(series))
    return "".join(svg) + f'<p class="legend">{legend}</p>'


def predictions_of(lines):
    """A chart of each counter over what a model predicts for it, `predicted_` before its name."""
    out = []
    for predicted in columns_of(lines)[1]:
        before, _, counter = predicted.partition("predicted_")
        series = {}
        for line in lines:
            x, y = line.values.get(predicted), line.values.get(counter)
            if not before and x is not None and y is not None and x > 0 and y > 0:
                series.setdefault(line.label or line.group, []).append((x, y))
        if series:
            title = f"{counter} over its prediction"
            out.append(f"<figure>{chart(title, predicted, counter, series, equal=True)}</figure>")
    return out


def charts_of(lines):
    """Charts of the first counter of its own, or the time, and of each ratio, over one parameter;
    before them those of predictions."""
    out = predictions_of(lines)
    axis = axis_of(lines)
    if axis is None:
        return "\n".join(out)
    _, counters = columns_of(lines)
    own = [c for c in counters if c != "us" and not c.endswith("/s")]
    wanted = (own[:1] or ["us"]) + [c for c in own[1:] if re.fullmatch("vs_.*(?<!_p[19]0)", c)]
    for counter in wanted:
        # One chart for each value of the parameters that several lines of a name differ in.
        pages = {}
        for line in lines:
            x, y = numeric(line.parameters.get(axis, "")), line.values.get(counter)
            if x is None or y is None or not y > 0:
                continue
            rest = " ".join(f"{k} {v}" for k, v in line.parameters.items() if k != axis)
            pages.setdefault(rest, {}).setdefault(line.label or line.group, []).append((x, y))
        for rest, series in pages.items():
            if any(len(of) > 1 for of in series.values()):
                out.append(f"<figure>{chart(f'{counter}  {rest}', axis, counter, series)}</figure>")
    return "\n".join(out)


STYLE = """
:root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;
padding:0 1rem}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px}
td,th{padding:.15rem .6rem;border-bottom:1px solid #8884;text-align:right}td.n,th.n{text-align:left}
div.scroll{overflow-x:auto}div.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(24rem,1fr));gap:1rem}
figure{margin:0}svg{width:100%;height:auto}svg line{stroke:#8884}svg text{font-size:11px;fill:currentColor}
svg .m{text-anchor:middle}svg .e{text-anchor:end}svg .t{font-size:13px;font-weight:600}
svg polyline{fill:none;stroke-width:1.8}.legend{font-size:12px;margin:.2rem 0}.legend span{margin-right:1em}
.legend i{display:inline-block;width:.8em;height:.8em;margin-right:.3em}
"""


def page(title, groups, contexts):
    out = ["<!doctype html>", '<html lang="en"><head><meta charset="utf-8">',
           '<meta name="viewport" content="width=device-width,initial-scale=1">',
           f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
           f"<h1>{html.escape(title)}</h1><ul>"]
    out += [f"<li>{html.escape(text)}</li>" for text in contexts] + ["</ul>"]
    for group, lines in groups.items():
        head, rows, texts = cells_of(lines)

        def row(tag, cells):
            return "<tr>" + "".join(
                f'<{tag} class="n">{html.escape(c)}</{tag}>' if i < texts else
                f"<{tag}>{html.escape(c)}</{tag}>" for i, c in enumerate(cells)) + "</tr>"

        out += [f"<h2>{html.escape(group)}</h2>", f'<div class="charts">{charts_of(lines)}</div>',
                '<details open><summary>Table</summary><div class="scroll"><table>', row("th", head)]
        out += [row("td", cells) for cells in rows] + ["</table></div></details>"]
    return "\n".join(out + ["</body></html>", ""])


def context_text(source, context):
    """What a run says of the machine, without its name."""
    parts = [source]
    if "date" in context:
        parts.append(str(context["date"]))
    if "num_cpus" in context:
        parts.append(f"{context['num_cpus']} processors at {context.get('mhz_per_cpu', '?')} MHz")
    if "library_build_type" in context:
        parts.append(f"benchmark library: {context['library_build_type']}")
    parts += [f"{k}: {v}" for k, v in context.items() if k.startswith("talpa_")]
    return ", ".join(parts)


def write(path, text):
    """All of the file or nothing."""
    partial = f"{path}.partial"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(partial, path)
    except OSError as error:
        if os.path.exists(partial):
            os.remove(partial)
        raise Refused(f"cannot write '{path}': {error.strerror}") from None


def main():
    parser = argparse.ArgumentParser(usage=USAGE, add_help=True)
    parser.add_argument("runs", nargs="+", metavar="RUN.json")
    parser.add_argument("--html", metavar="PAGE")
    parser.add_argument("--markdown", metavar="FILE")
    parser.add_argument("--title", default="Benchmarks")
    options = parser.parse_args()
    lines, contexts = [], []
    for path in options.runs:
        more, context = read(path)
        lines += more
        contexts.append(context_text(os.path.basename(path), context))
    if not lines:
        raise Refused("the runs have no lines")
    groups = groups_of(lines)
    if options.html:
        write(options.html, page(options.title, groups, contexts))
    text = markdown(options.title, groups, contexts)
    if options.markdown:
        write(options.markdown, text)
    elif not options.html:
        print(text, end="")


if __name__ == "__main__":
    try:
        main()
    except Refused as refusal:
        print(f"bench/report.py: {refusal}", file=sys.stderr)
        sys.exit(2)
