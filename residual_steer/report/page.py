"""What every page of a report begins with: its style, for light and dark, with no script and nothing to fetch."""

from .styles import INK, PAPER, QUIET

__all__ = ["THEMED", "page"]

THEMED = {INK: "var(--ink)", QUIET: "var(--quiet)", PAPER: "var(--paper)"}  # a picture's colours that follow the page's

_STYLE = """\
:root { color-scheme: light dark; --ink: #1b1b1f; --quiet: #6b6b75; --paper: #fefefe; --line: #d9d9de; --tint: #f3f3f6;
  --link: #0b57a4; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf1; --quiet: #a0a0ab; --paper: #17171b; --line: #3a3a42;
  --tint: #212127; --link: #8ab8ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 5rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.25; text-wrap: balance; }
h2 { margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { margin-top: 2rem; }
a { color: var(--link); }
p { max-width: 46rem; }
.wide { overflow-x: auto; margin: 1.5rem 0 .5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .5rem; }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--quiet); vertical-align: bottom; }
tbody th { font-weight: 400; }
.number { text-align: right; white-space: nowrap; }
figure { margin: 2rem 0; }
figure svg { display: block; width: 100%; max-width: 50rem; height: auto; }
ul.notes, figcaption { color: var(--quiet); font-size: .9rem; }
ul.notes { padding-left: 1.2rem; }
pre { overflow-x: auto; padding: .75rem 1rem; background: var(--tint); border-radius: .4rem; }
code, pre { font: .875rem/1.5 ui-monospace, monospace; }
details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--quiet); font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.25rem; font-size: .9rem; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
@media print { details { display: none; } }
"""


def page(title: str, body: str) -> str:
    """Return a whole page.

    Args:
        title: escaped.
        body: what stands in `<body>`.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
