"""A report: how well each domain is protected, and what was saved over some days.

How a domain is, and what a prune would remove, is what ``status`` says. Days are of this host's
zone. Points that have left their sets are in none of its figures.

As one page of HTML it needs nothing else: no script, no font, no picture. Names come from sets and
guests: the template escapes all that it is given, and a policy in the page forbids whatever might
get through to load or to run anything.
"""

import base64
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any, Final

from nbdbackupd import plain
from nbdbackupd.errors import ConfigError, NbdbackupError
from nbdbackupd.model.health import Health, age_text
from nbdbackupd.model.host import Host
from nbdbackupd.model.space import own_bytes
from nbdbackupd.ops.sets.sets import sets_of
from nbdbackupd.ops.status import gather
from nbdbackupd.ops.status.status import DomainStatus, StatusReport
from nbdbackupd.plain import versioned
from nbdbackupd.units import human_size, human_time, local_time, utc_time

MOST_DAYS: Final = 3660
WIDTH: Final = 640
HEIGHT: Final = 140
BASE: Final = 118
"""Where the bars stand; below are the days."""

LEFT: Final = 64
TOP: Final = 10
AGE_WIDTH: Final = 90
MOST_AGE: Final = 1.5
"""Of the age that is critical; what is older has the whole bar."""

STYLE: Final = """
:root { color-scheme: light dark; --ink: #151515; --soft: #5c6370; --line: #d8dbe0;
  --page: #f4f5f7; --card: #ffffff; --accent: #0066cc; --ok: #2e7d32; --warning: #9a6700;
  --critical: #c9190b; --unknown: #6a4fa3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a0a7b2; --line: #3a3f47;
  --page: #16181c; --card: #1f2227; --accent: #6cb0ff; --ok: #6cc174; --warning: #e3b341;
  --critical: #ff7b6f; --unknown: #b7a1ea; } }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 24px; margin: 0 0 2px; } h2 { font-size: 17px; margin: 0 0 10px; }
.when { color: var(--soft); margin: 0 0 20px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 16px 18px; margin: 0 0 16px; overflow-x: auto; }
.figures { margin: 0; display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); }
.figures div { display: flex; flex-direction: column-reverse; }
.figures dt { color: var(--soft); font-size: 13px; } .figures dd { margin: 0; font-size: 22px;
  font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(360px, 1fr)); gap: 16px; }
.charts section { margin: 0; } .charts { margin: 0 0 16px; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; }
.bar { fill: var(--accent); } .area { fill: var(--accent); opacity: .18; }
.edge { fill: none; stroke: var(--accent); stroke-width: 2; } .grid { stroke: var(--line); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 500; font-size: 13px; }
th, td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; } .number { text-align: right; white-space: nowrap; }
.when-made { white-space: nowrap; } td.name { overflow-wrap: anywhere; min-width: 110px; }
.age svg { width: 90px; } .track { fill: var(--line); }
.health { font-weight: 600; white-space: nowrap; }
.ok { color: var(--ok); fill: var(--ok); } .warning { color: var(--warning); fill: var(--warning); }
.critical { color: var(--critical); fill: var(--critical); }
.unknown { color: var(--unknown); fill: var(--unknown); }
.wrong li { margin: 0 0 6px; overflow-wrap: anywhere; } ul { margin: 0; padding-left: 20px; }
.empty { color: var(--soft); margin: 0; }
@media print { body { background: none; } section { break-inside: avoid; } }
"""

PAGE: Final = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'sha256-{{ hash }}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<p class="when">{{ moment }}, from {{ first }} to {{ last }}</p>
<section aria-label="Figures"><dl class="figures">
{% for name, value in totals %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}</dl></section>
{% if wrong or notes %}<section class="wrong"><h2>What needs attention</h2>
<ul>{% for name, reason in wrong %}<li><strong>{{ name }}</strong>: {{ reason }}</li>
{% endfor %}{% for note in notes %}<li>{{ note }}</li>
{% endfor %}</ul></section>{% endif %}
<div class="charts">
{% for chart in charts %}<section><h2>{{ chart.title }}</h2>
<svg viewBox="0 0 {{ width }} {{ height }}" role="img" aria-label="{{ chart.title }}">
{% for mark in chart.marks %}<line class="grid" x1="{{ left }}" x2="{{ width }}" y1="{{ mark.y }}"
 y2="{{ mark.y }}"/><text x="{{ left - 8 }}" y="{{ mark.y + 4 }}" text-anchor="end">{{ mark.text }}
</text>
{% endfor %}{% for bar in chart.bars %}<rect class="bar" x="{{ bar.x }}" y="{{ bar.y }}"
 width="{{ bar.width }}" height="{{ bar.height }}" rx="1"><title>{{ bar.text }}</title></rect>
{% endfor %}{% if chart.edge %}<polygon class="area" points="{{ chart.area }}"/>
<polyline class="edge" points="{{ chart.edge }}"/>{% endif %}
<text x="{{ left }}" y="{{ height - 4 }}">{{ first }}</text>
<text x="{{ width }}" y="{{ height - 4 }}" text-anchor="end">{{ last }}</text>
</svg></section>
{% endfor %}</div>
<section><h2>Domains</h2>
{% if domains %}<table>
<thead><tr><th scope="col">Domain</th><th scope="col">Health</th><th scope="col">Newest point</th>
<th scope="col">Age</th><th scope="col" class="number">New points</th>
<th scope="col" class="number">New data</th><th scope="col" class="number">Total</th>
<th scope="col" class="number">Last run</th><th scope="col" class="number">Retention removes</th>
</tr></thead>
<tbody>
{% for each in domains %}<tr><td class="name">{{ each.cells[0] }}</td>
<td class="health {{ each.health }}">{{ each.health }}</td>
<td class="when-made">{{ each.cells[1] }}</td>
<td class="age">{{ each.cells[2] }}{% if each.age is not none %}
<svg viewBox="0 0 {{ age_width }} 6" aria-hidden="true"><rect class="track" width="{{ age_width }}"
 height="6" rx="3"/><rect class="{{ each.health }}" width="{{ each.age }}" height="6" rx="3"/></svg>
{% endif %}</td>
{% for cell in each.cells[3:8] %}<td class="number">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>{% else %}<p class="empty">No domain is known: libvirt, configuration
and repository name none.</p>{% endif %}</section>
{% if spaces %}<section><h2>Space</h2><ul>{% for each in spaces %}<li>{{ each }}</li>
{% endfor %}</ul></section>{% endif %}
</main>
</body>
</html>
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Day:
    """What the points of one day have added, and all bytes that were there at its end."""

    day: date
    points: int
    added: int
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainReport:
    """A domain as status has it; ``points`` and ``added`` (bytes) are those of the days told of."""

    status: DomainStatus
    points: int
    added: int

    @property
    def seconds(self) -> float | None:
        """How long the last run took, if its end was seen."""
        end = self.status.last_run
        if end is None or not end.ended:
            return None
        return (
            datetime.fromisoformat(end.ended) - datetime.fromisoformat(end.begun)
        ).total_seconds()

    def describe(self, now: datetime) -> dict[str, Any]:
        """As a JSON object: what ``status`` says of it, and what is ours."""
        told = {
            "new_points": self.points,
            "new_bytes": self.added,
            "last_run_seconds": self.seconds,
        }
        return {**self.status.describe(now), **told}


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The days are in order, without a gap, the last one is that of the report's moment."""

    host: str
    status: StatusReport
    domains: tuple[DomainReport, ...]
    days: tuple[Day, ...]

    @property
    def subject(self) -> str:
        """In a line: the host, and how many domains are not well."""
        bad = sum(each.status.verdict.health is not Health.OK for each in self.domains)
        how = f"{bad} of {len(self.domains)} domains need attention" if bad else "all is well"
        return f"Backups of {self.host}: {how}"

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON document, schema version 1; sizes in bytes."""
        return versioned(
            host=self.host,
            moment=utc_time(self.status.moment),
            health=self.status.health.value,
            notes=list(self.status.notes),
            file_systems=[each.space() for each in self.status.file_systems],
            days=[
                {"day": each.day.isoformat(), "points": each.points, "new_bytes": each.added,
                 "total_bytes": each.total}
                for each in self.days
            ],
            domains=[each.describe(self.status.moment) for each in self.domains],
        )  # fmt: skip


def build(host: Host, seconds: float, names: Sequence[str] = ()) -> Report:
    """Look at these domains, or at all, and at the days that began in the last ``seconds``.

    Raises as ``gather``. Sets that can't be read are told by it, and count for nothing here.
    """
    found = gather.gather(names, host)
    last = found.moment.astimezone().date()
    first = last - timedelta(days=min(MOST_DAYS, int(seconds // 86400)))
    made: dict[date, list[int]] = {}
    domains = []
    for each in found.domains:
        own = _made(each)
        recent = [size for day, sizes in own.items() if day >= first for size in sizes]
        domains.append(DomainReport(status=each, points=len(recent), added=sum(recent)))
        for day, sizes in own.items():
            made.setdefault(day, []).extend(sizes)
    name = os.uname().nodename
    return Report(host=name, status=found, domains=tuple(domains), days=_days(made, first, last))


def _made(each: DomainStatus) -> Mapping[date, list[int]]:
    """Bytes of each point of a domain, by the day it was made on."""
    found: dict[date, list[int]] = {}
    try:
        sets = sets_of(each.stored.directory) if each.stored.set else ()
    except NbdbackupError:
        return found
    for held in sets:
        if each.stored.uuids and held.uuid not in each.stored.uuids:
            continue
        sizes = own_bytes(held.known.points)
        for point in held.known.points:
            day = datetime.fromisoformat(point.created).astimezone().date()
            found.setdefault(day, []).append(sizes[point.id])
    return found


def _days(made: Mapping[date, list[int]], first: date, last: date) -> tuple[Day, ...]:
    total = sum(sum(sizes) for day, sizes in made.items() if day < first)
    found = []
    for number in range((last - first).days + 1):
        day = first + timedelta(days=number)
        sizes = made.get(day, [])
        total += sum(sizes)
        found.append(Day(day=day, points=len(sizes), added=sum(sizes), total=total))
    return tuple(found)


def rows(report: Report) -> list[tuple[str, ...]]:
    """The cells of a table for a terminal, its head first; the last is the health."""
    heads = ("DOMAIN", "NEWEST POINT", "AGE", "NEW POINTS", "NEW DATA", "TOTAL", "LAST RUN",
             "RETENTION REMOVES", "HEALTH")  # fmt: skip
    return [heads, *(cells(each, report.status.moment) for each in report.domains)]


def cells(each: DomainReport, now: datetime) -> tuple[str, ...]:
    """What is told of a domain, for people; a dash where there is nothing."""
    stored, unwanted = each.status.stored, each.status.unwanted
    newest, instant = stored.newest, stored.instant
    took = human_time(each.seconds) if each.seconds is not None else "-"
    return (
        each.status.name,
        local_time(newest.created) if newest is not None else "-",
        age_text((now - instant).total_seconds()) if instant is not None else "-",
        str(each.points),
        human_size(each.added),
        human_size(stored.all.stored_bytes) if newest is not None else "-",
        took,
        _unwanted(unwanted.points, unwanted.size),
        each.status.verdict.health.value,
    )


def _unwanted(points: int, size: int) -> str:
    """What is merged into a point that stays gives no space back that could be told before."""
    if not points:
        return "-"
    return f"{points} ({human_size(size)})" if size else str(points)


def problems(report: Report) -> list[tuple[str, str]]:
    """Each thing that is wrong, with its cure, after the domain's name."""
    return [
        (each.status.name, reason)
        for each in report.domains
        for reason in each.status.verdict.reasons
    ]


def totals(report: Report) -> list[tuple[str, str]]:
    """The figures at the head, each with its name."""
    held = sum(each.status.stored.all.stored_bytes for each in report.domains)
    added = sum(day.added for day in report.days)
    going = sum(each.status.unwanted.size for each in report.domains)
    return [
        ("domains", str(len(report.domains))),
        ("not well", str(len({name for name, _ in problems(report)}))),
        ("new points", str(sum(day.points for day in report.days))),
        ("new data", human_size(added)),
        ("stored in all", human_size(held)),
        ("retention removes", human_size(going)),
    ]


def summary(report: Report) -> str:
    """One line for people."""
    began, ended = report.days[0].day, report.days[-1].day
    figures = ", ".join(f"{name} {value}" for name, value in totals(report))
    return plain.line(f"{report.host}, {began} to {ended}: {figures}")


# -- the page


def html(report: Report) -> str:
    """The page. Raises ConfigError if jinja2 is not installed."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as err:
        raise ConfigError("a report as HTML needs jinja2: install python3-jinja2") from err
    from markupsafe import Markup

    environment = Environment(undefined=StrictUndefined, autoescape=True, trim_blocks=False)
    days = report.days
    added = _chart("New data by day", [day.added for day in days])
    added["bars"] = _bars(report)
    growth = _chart("Stored in all", [day.total for day in days])
    growth |= _curve([day.total for day in days])
    return environment.from_string(PAGE).render(
        style=Markup(STYLE),  # noqa: S704 - a text of this module
        hash=base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode(),
        title=plain.line(report.subject),
        moment=local_time(report.status.moment),
        first=days[0].day.isoformat(),
        last=days[-1].day.isoformat(),
        totals=totals(report),
        wrong=[(plain.line(name), plain.line(text)) for name, text in problems(report)],
        notes=[plain.line(each) for each in report.status.notes],
        charts=[added, growth],
        domains=[_row(each, report) for each in _worst_first(report.domains)],
        spaces=[plain.line(str(each)) for each in report.status.file_systems],
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        age_width=AGE_WIDTH,
    )


def _worst_first(domains: Sequence[DomainReport]) -> list[DomainReport]:
    return sorted(domains, key=lambda each: (-each.status.verdict.health.rank, each.status.name))


def _row(each: DomainReport, report: Report) -> dict[str, Any]:
    instant, age = each.status.stored.instant, None
    if instant is not None:
        seconds = max(0.0, (report.status.moment - instant).total_seconds())
        most = MOST_AGE * each.status.limits.critical
        age = max(3, round(AGE_WIDTH * min(1.0, seconds / most))) if most > 0 else AGE_WIDTH
    shown = [plain.line(cell) for cell in cells(each, report.status.moment)]
    return {"cells": shown, "health": Health(each.status.verdict.health).value, "age": age}


def _top(values: Sequence[int]) -> int:
    """A round size that no value exceeds."""
    most = max([*values, 1])
    step = int(1024 ** int(math.log(most, 1024)))
    for factor in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        if most <= factor * step:
            return factor * step
    return most


def _chart(title: str, values: Sequence[int]) -> dict[str, Any]:
    top = _top(values)
    marks = [
        {"y": _y(value, top), "text": human_size(value) if value else "0"}
        for value in (0, top // 2, top)
    ]
    return {"title": title, "marks": marks, "bars": [], "edge": "", "area": ""}


def _y(value: int, top: int) -> float:
    return round(BASE - (BASE - TOP) * value / top, 1)


def _bars(report: Report) -> list[dict[str, Any]]:
    days = report.days
    top = _top([day.added for day in days])
    pitch = (WIDTH - LEFT) / len(days)
    found = []
    for number, day in enumerate(days):
        if not day.added:
            continue
        y = _y(day.added, top)
        text = f"{day.day}: {day.points} points, {human_size(day.added)}"
        found.append(
            {"x": round(LEFT + pitch * (number + 0.12), 1), "y": y, "text": text,
             "width": round(max(1.0, pitch * 0.76), 1), "height": round(max(1.0, BASE - y), 1)}
        )  # fmt: skip
    return found


def _curve(values: Sequence[int]) -> dict[str, str]:
    top = _top(values)
    pitch = (WIDTH - LEFT) / max(1, len(values) - 1)
    places = [(round(LEFT + pitch * each, 1), _y(value, top)) for each, value in enumerate(values)]
    if len(places) == 1:
        places.append((WIDTH, places[0][1]))
    edge = " ".join(f"{x},{y}" for x, y in places)
    return {"edge": edge, "area": f"{LEFT},{BASE} {edge} {WIDTH},{BASE}"}
