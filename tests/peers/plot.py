#!/usr/bin/env python3
"""plot.py RESULTS.csv OUT.svg: bars of the medians that peers.py has measured. Standard library only."""
import csv
import statistics
import sys
from xml.sax.saxutils import escape

OURS = "mruntime"
PANELS = [
    ("prefill", "prefill of 512 tokens, tokens/s", "{:.0f}"),
    ("decode", "decode, tokens/s", "{:.1f}"),
    ("first", "start to first token, s", "{:.2f}"),
]
LABELS, PANEL, GAP, ROW, BAR, TOP = 128, 210, 46, 34, 12, 62
COLOURS = {True: ("#f0a35e", "#d9731a"), False: ("#b4bfcc", "#71839a")}

results, out = sys.argv[1:]
values, order = {}, []
with open(results, newline="") as file:
    rows = list(csv.DictReader(file))
for row in rows:
    program = (row["program"], row["type"])
    if program not in order:
        order.append(program)
    values.setdefault((program, row["metric"], int(row["threads"])), []).append(float(row["value"]))
medians = {key: statistics.median(of) for key, of in values.items()}

width = LABELS + len(PANELS) * (PANEL + GAP)
height = TOP + ROW * len(order) + 34
svg = [
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
    'font-family="sans-serif" font-size="12" fill="#1f2933">',
    f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
]


def text(x, y, content, **attributes):
    attributes = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
    svg.append(f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{escape(content)}</text>')


text(8, 20, "Qwen2.5-0.5B's shape, random weights; medians", font_weight="bold", font_size=14)
for i, (metric, title, form) in enumerate(PANELS):
    left = LABELS + i * (PANEL + GAP)
    text(left, TOP - 14, title, font_weight="bold")
    most = max(median for (_, m, _), median in medians.items() if m == metric)
    for j, program in enumerate(order):
        y = TOP + ROW * j
        ours = program[0] == OURS
        if i == 0:
            text(LABELS - 8, y + 16, " ".join(program), text_anchor="end", font_weight="bold" if ours else "normal")
        for k, threads in enumerate((1, 2)):
            if (program, metric, threads) not in medians:
                continue
            median = medians[program, metric, threads]
            length = max(1, median / most * PANEL)
            top = y + k * (BAR + 1)
            svg.append(f'<rect x="{left}" y="{top}" width="{length:.1f}" height="{BAR}" fill="{COLOURS[ours][k]}"/>')
            text(left + length + 4, top + BAR - 2, form.format(median), font_size=10)
about, bottom = rows[-1], TOP + ROW * len(order) + 18
for k, name in enumerate(("1 thread", "2 threads")):
    svg.append(f'<rect x="{8 + 90 * k}" y="{bottom - 10}" width="12" height="12" fill="{COLOURS[False][k]}"/>')
    text(25 + 90 * k, bottom, name)
text(width - 8, bottom, f"{about['cpu']}, {about['cores']} cores, Linux {about['kernel']}, {about['date'][:10]}",
     text_anchor="end", font_size=11)
svg.append("</svg>\n")
with open(out, "w") as file:
    file.write("\n".join(svg))
