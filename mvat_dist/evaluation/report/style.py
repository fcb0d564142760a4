"""The page's style sheet. Text has a contrast of 4.5 or more to its ground, marks of 3 (WCAG 2.1, AA)."""

from __future__ import annotations

LIGHT = {
    "ground": "#ffffff", "raised": "#f4f6f8", "ink": "#1b1f24", "muted": "#57606a", "line": "#c9d1d9",
    "link": "#0550ae", "better": "#0f6b2f", "worse": "#a40e26",
    "s0": "#5c5c5c", "s1": "#a85400", "s2": "#0067a8", "s3": "#00755a", "s4": "#99407f", "s5": "#7a5c00",
    "s6": "#5b4db3", "s7": "#b3382c",
}  # fmt: skip
DARK = {
    "ground": "#0f1419", "raised": "#1a2129", "ink": "#e6edf3", "muted": "#9fabb7", "line": "#3a444f",
    "link": "#79b8ff", "better": "#56d364", "worse": "#ff8e86",
    "s0": "#b8b8b8", "s1": "#f0a040", "s2": "#56b4e9", "s3": "#3fcf9f", "s4": "#e59ad0", "s5": "#d9c24a",
    "s6": "#a99bff", "s7": "#ff8a73",
}  # fmt: skip
"""Colours by name. The series s0 to s7 follow Okabe and Ito's colour-blind-safe set ("Color Universal
Design", 2008), darkened or lightened for the ground; shapes and dashes tell them apart without colour."""

STYLES = 8
"""Number of series styles."""

_RULES = """
*{box-sizing:border-box}
html{background:var(--ground);color:var(--ink);font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
body{margin:0 auto;max-width:84rem;padding:1rem 1.25rem 4rem}
h1{font-size:1.7rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1.3rem;margin:2.5rem 0 .5rem;padding-top:.75rem;border-top:1px solid var(--line)}
h3{font-size:1.05rem;margin:1.5rem 0 .5rem}
p,ul{max-width:52rem;margin:.5rem 0}
header p{color:var(--muted)}
a{color:var(--link)}
:focus-visible{outline:3px solid var(--link);outline-offset:2px}
.skip{position:absolute;left:-100rem}
.skip:focus{position:static}
nav ul{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;list-style:none;padding:0;max-width:none}
.missing{color:var(--muted);border-left:3px solid var(--line);padding-left:.75rem}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
.caption{color:var(--muted);font-size:.9rem;margin:1rem 0 0}
th,td{padding:.35rem .7rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
thead th{border-bottom:2px solid var(--line);vertical-align:bottom}
tbody th{font-weight:600;position:sticky;left:0;background:var(--ground);min-width:10.5rem;max-width:16rem}
td{min-width:5rem}
td.short{white-space:nowrap}
td:not(.short){min-width:12rem}
td small,th small{display:block;color:var(--muted);font-weight:400;white-space:nowrap}
.better small,.better .mark{color:var(--better);font-weight:600}
.worse small,.worse .mark{color:var(--worse);font-weight:600}
pre{background:var(--raised);padding:.75rem;overflow-x:auto;font-size:.85rem;border-radius:4px}
details{margin:.75rem 0}
summary{cursor:pointer;color:var(--link)}
@media (max-width:40rem){
body{padding:.5rem .75rem 3rem}
th,td{padding:.3rem .5rem}
tbody th{min-width:7rem;max-width:9rem}
td:not(.short){min-width:10rem}
}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,30rem),39.5rem));gap:1rem 2rem}
figure{margin:.5rem 0;min-width:0}
figcaption{color:var(--muted);font-size:.9rem}
.sounds{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr));gap:1rem}
.sounds img{display:block;width:100%;height:9rem;object-fit:fill;border:1px solid var(--line)}
.sounds figcaption{color:var(--ink)}
audio{width:100%;margin-top:.25rem}
svg.chart{display:block;width:100%;min-width:24rem;max-width:38rem;height:auto;font:12px system-ui,sans-serif}
.chart text{fill:var(--ink)}
.chart .tick{fill:var(--muted);font-size:11px}
.chart .grid{stroke:var(--line);stroke-width:1;opacity:.6}
.chart .axis,.chart .level{stroke:var(--muted);stroke-width:1;fill:none}
.chart .level{stroke-dasharray:5 4}
.chart .leader{stroke:var(--line);stroke-width:1;fill:none}
.chart .line{stroke:var(--c);stroke-width:2;fill:none;stroke-linejoin:round}
.chart .bar{stroke:var(--c);stroke-width:1.5}
.chart .dot{fill:var(--c);stroke:var(--ground);stroke-width:.75}
.chart .ring{fill:none;stroke:var(--ink);stroke-width:1.5}
.chart .plain{--c:var(--ink)}
"""


def _sheet() -> str:
    def variables(colours: dict[str, str]) -> str:
        return ";".join(f"--{name}:{value}" for name, value in colours.items())

    series = "".join(f".chart .s{number}{{--c:var(--s{number})}}\n" for number in range(STYLES))
    dark = f"@media (prefers-color-scheme:dark){{:root{{{variables(DARK)}}}}}"
    return f":root{{color-scheme:light dark;{variables(LIGHT)}}}\n{dark}{_RULES}{series}"


STYLE = _sheet()
