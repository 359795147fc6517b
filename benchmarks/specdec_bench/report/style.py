"""The style sheet of the report: light and dark, desktop and phone, no font or script to load."""

STYLE = """
:root {
  color-scheme: light dark;
  --bg: #f6f7f9; --card: #ffffff; --ink: #16202b; --dim: #566473; --line: #dde2e8;
  --grid: #e8ecf0; --accent: #1f5fae; --good: #14704a; --bad: #b3261e; --warn: #8a5200;
  --badbg: #fdecea; --warnbg: #fff4dc; --goodbg: #e6f4ec;
  --c0: #2f6db5; --c1: #2a9d8f; --c2: #d9772b; --c3: #a23b8c; --c4: #6a56c2; --c5: #8a95a1;
  --t0: #2a62a3; --t1: #1b756b; --t2: #a4540f; --t3: #96337f; --t4: #5b48b0; --t5: #566473;
  --cpu: #86b0df; --slow: #d9772b; --slowcpu: #efbe93;
  --tok0: #d6e6f8; --tok1: #fbe3c8; --tok2: #d7efe6; --tok3: #eedcf0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #0e1318; --card: #161d24; --ink: #e6ecf2; --dim: #9dabb9; --line: #2b353f;
    --grid: #232c35; --accent: #79b3f5; --good: #63cf9b; --bad: #ff8a80; --warn: #f3bf66;
    --badbg: #3a1a19; --warnbg: #362a12; --goodbg: #15301f;
    --c0: #5b9ce6; --c1: #4dc4b3; --c2: #f09a52; --c3: #d07fc0; --c4: #9d8cf0; --c5: #7f8b97;
    --t0: #79b3f5; --t1: #5ad0bf; --t2: #f5a868; --t3: #dd97cf; --t4: #b1a3f5; --t5: #9dabb9;
    --cpu: #38618f; --slow: #f09a52; --slowcpu: #8a5a33;
    --tok0: #1f3c5c; --tok1: #56391a; --tok2: #1c4739; --tok3: #47294a;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--bg); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main, header > div { max-width: 1080px; margin: 0 auto; padding: 0 20px; }
header { padding: 34px 0 8px; }
h1 { font-size: 27px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 44px 0 12px; letter-spacing: -0.005em; }
h3 { font-size: 15px; margin: 0 0 10px; }
h4 { font-size: 13px; margin: 0 0 4px; font-weight: 600; overflow-wrap: anywhere; }
p { margin: 0 0 10px; }
a { color: var(--accent); }
.lead, .note { color: var(--dim); }
.note { font-size: 13px; margin: 10px 0 0; max-width: 76ch; }
nav { display: flex; flex-wrap: wrap; gap: 6px 16px; margin: 12px 0 0; font-size: 14px; }
.stamp { border-radius: 8px; padding: 12px 16px; margin: 14px 0; font-weight: 600; }
.stamp p { font-weight: 400; margin: 4px 0 0; overflow-wrap: anywhere; }
.stamp.bad { background: var(--badbg); color: var(--bad); border: 2px solid var(--bad); }
.stamp.warn { background: var(--warnbg); color: var(--warn); border: 2px solid var(--warn); }
.stamp strong { letter-spacing: 0.04em; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px;
  margin: 18px 0 0; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 13px 16px; min-width: 0; }
.tile b { display: block; font-size: 24px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { color: var(--dim); font-size: 13px; overflow-wrap: anywhere; }
.tile.bad b { color: var(--bad); } .tile.warn b { color: var(--warn); }
.tile.good b { color: var(--good); }
.card { padding: 18px 20px; margin: 0 0 16px; min-width: 0; }
.scroll { overflow-x: auto; margin: 0 -20px; padding: 0 20px; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px;
  font-variant-numeric: tabular-nums; }
th, td { padding: 7px 11px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { color: var(--dim); font-weight: 600; font-size: 12.5px; vertical-align: bottom;
  white-space: normal; line-height: 1.3; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td:first-child { font-weight: 600; white-space: normal; overflow-wrap: anywhere; min-width: 9em; }
th:last-child, td:last-child { padding-right: 0; }
tr:last-child td { border-bottom: 0; }
table.words td + td { white-space: normal; text-align: left; overflow-wrap: anywhere; }
table.words th { text-align: left; }
table.facts td { white-space: normal; overflow-wrap: anywhere; min-width: 8em; }
table.facts td:first-child { color: var(--dim); font-weight: 400; width: 34%; }
td.good { color: var(--good); } td.bad { color: var(--bad); font-weight: 600; }
td.warn { color: var(--warn); font-weight: 600; } td.dim { color: var(--dim); }
td.up { background: color-mix(in srgb, var(--c1) calc(var(--heat) * 30%), transparent); }
td.down { background: color-mix(in srgb, var(--slow) calc(var(--heat) * 30%), transparent); }
svg { display: block; max-width: 100%; height: auto; overflow: visible; }
svg.narrow { display: none; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  fill: var(--ink); font-variant-numeric: tabular-nums; }
svg .tick, svg .axis { fill: var(--dim); font-size: 11.5px; }
svg .name { font-size: 12.5px; paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
svg .value { font-weight: 600; font-size: 13px; }
svg text.bad { fill: var(--bad); font-weight: 700; }
svg text.inside { fill: var(--card); font-weight: 700; font-size: 11px; }
svg .grid { stroke: var(--grid); } svg .base { stroke: var(--dim); }
svg .one { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 4 3; fill: none; }
svg .whisker { stroke: var(--ink); stroke-width: 1.4; }
svg .wall.faster { fill: var(--c0); } svg .cpu.faster { fill: var(--cpu); }
svg .wall.slower { fill: var(--slow); } svg .cpu.slower { fill: var(--slowcpu); }
svg .again { fill: var(--c5); }
svg .band { fill: var(--c0); opacity: 0.1; }
svg .curve { fill: none !important; stroke-width: 2; }
svg .dashed { stroke-dasharray: 5 3; }
svg .c0 { fill: var(--c0); } svg .c1 { fill: var(--c1); } svg .c2 { fill: var(--c2); }
svg .c3 { fill: var(--c3); } svg .c4 { fill: var(--c4); } svg .c5 { fill: var(--c5); }
svg .curve.c0 { stroke: var(--c0); } svg .curve.c1 { stroke: var(--c1); }
svg .curve.c2 { stroke: var(--c2); } svg .curve.c3 { stroke: var(--c3); }
svg .curve.c4 { stroke: var(--c4); } svg .curve.c5 { stroke: var(--c5); }
svg .t0 { fill: var(--t0); } svg .t1 { fill: var(--t1); } svg .t2 { fill: var(--t2); }
svg .t3 { fill: var(--t3); } svg .t4 { fill: var(--t4); } svg .t5 { fill: var(--t5); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 0 0 12px; padding: 0;
  list-style: none; font-size: 13px; color: var(--dim); }
svg + .scroll, svg + svg + .scroll { margin-top: 14px; }
.side { display: grid; grid-template-columns: 390px minmax(0, 1fr); gap: 28px; align-items: start; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px;
  margin-right: 6px; vertical-align: -1px; }
.small { display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 26px; }
.small svg { margin-top: 6px; width: 100%; max-width: 340px; }
.small + .scroll { margin-top: 16px; }
td small { display: block; color: var(--dim); font-size: 12px; font-weight: 400; line-height: 1.3; }
td { vertical-align: top; }
details { margin: 0 0 10px; border: 1px solid var(--line); border-radius: 8px; }
summary { cursor: pointer; padding: 9px 14px; font-weight: 600; overflow-wrap: anywhere; }
summary small { color: var(--dim); font-weight: 400; }
.tokens { unicode-bidi: isolate;
  font: 13.5px/1.75 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono",
  monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; padding: 4px 14px 14px; }
.tokens .prompt { color: var(--dim); }
.tokens span span { border-right: 1px solid color-mix(in srgb, var(--ink) 22%, transparent); }
.tokens .r { border-radius: 3px; padding: 2px 0; }
.tokens .r0 { background: var(--tok0); } .tokens .r1 { background: var(--tok1); }
.tokens .r2 { background: var(--tok2); } .tokens .r3 { background: var(--tok3); }
footer { color: var(--dim); font-size: 13px; padding: 24px 0 48px; }
@media (max-width: 800px) {
  .side { grid-template-columns: minmax(0, 1fr); gap: 12px; }
  svg.wide { display: none; }
  svg.narrow { display: block; }
}
@media (max-width: 560px) {
  main, header > div { padding: 0 12px; }
  h1 { font-size: 23px; }
  .card { padding: 14px 14px; }
  .scroll { margin: 0 -14px; padding: 0 14px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 8px; }
  .tile { padding: 10px 12px; } .tile b { font-size: 20px; }
}
@media print {
  body { background: #fff; }
  .card, .tile { break-inside: avoid; }
  nav { display: none; }
}
"""
"""Colours are checked for contrast: text on its ground is at least 4.5 to 1 in both schemes."""
