"""The real material that pictures are drawn from: tables, state boundaries and running text.

Tables and boundaries come from the package bokeh-sampledata, each set under its own licence (named below, and written to every sample); text comes
from the Python interpreter's own documentation strings. Nothing of it is part of this repository.
"""

import csv
import gzip
import inspect
import json
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files

import shapely

from workers.errors import WorkerError

__all__ = ["State", "Table", "load_paragraphs", "load_states", "load_tables"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """One row of a real table, ready for a bar chart: a few named values below one hundred."""

    title: str
    values: dict[str, int]
    licence: str


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """A state of the contiguous United States with its boundary in degrees."""

    name: str
    rings: tuple[tuple[tuple[float, float], ...], ...]
    """Outer rings as (longitude, latitude), the largest first."""
    centre: tuple[float, float]
    """Of its area, as (longitude, latitude)."""


def _read(name: str) -> bytes:
    try:
        data = (files("bokeh_sampledata") / "_data" / name).read_bytes()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise WorkerError(
            f"the charts and maps are drawn from {name} of the package bokeh-sampledata, which is not installed whole; "
            "install what Loupe needs again: make install, in its checkout"
        ) from error
    return gzip.decompress(data) if name.endswith(".gz") else data


def _rows(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(_read(name).decode("utf-8-sig").splitlines()))


@cache
def load_tables() -> tuple[Table, ...]:
    """Every usable row: life expectancy by country and year, unemployment by month, degrees by subject.

    Returns:
        Tables of at least six values in 10..99, in a fixed order.
    """
    tables = []
    by_country: dict[str, dict[str, int]] = {}
    for row in _rows("gapminder.csv.gz"):
        if row["life_expectancy"] and int(row["year"]) % 4 == 0:
            by_country.setdefault(row["country"], {})[row["year"]] = round(float(row["life_expectancy"]))
    tables += [
        Table(title=f"Life expectancy, {country}", values=values, licence="CC-BY-2.0 (Gapminder)")
        for country, values in sorted(by_country.items())
        if len(values) >= 6
    ]
    for row in _rows("percent-bachelors-degrees-women-usa.csv"):
        values = {subject: round(float(share)) for subject, share in row.items() if subject != "Year" and 10 <= round(float(share)) <= 99}
        if len(values) >= 6:
            tables.append(Table(title=f"Degrees to women, {row['Year']}", values=values, licence="public domain (US NCES)"))
    months = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
    for row in _rows("unemployment1948.csv"):
        values = {month: round(float(row[month]) * 10) for month in months if row[month] and 10 <= round(float(row[month]) * 10) <= 99}
        if len(values) >= 6:
            tables.append(Table(title=f"Unemployed per 1000, {row['Year']}", values=values, licence="public domain (US BLS)"))
    return tuple(tables)


@cache
def load_states() -> tuple[State, ...]:
    """The contiguous states in alphabetical order, with boundaries simplified to 0.05 degrees.

    Returns:
        48 states.

    Raises:
        WorkerError: the package that carries the boundaries is not installed.
    """
    states = []
    with as_file(files("bokeh_sampledata") / "_data" / "geographic_boundaries.db") as path:
        if not path.exists():
            raise WorkerError("the maps are drawn from the package bokeh-sampledata, which is not installed: make install, in Loupe's checkout")
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
            records = connection.execute("SELECT metadata, geometry FROM us_states ORDER BY id").fetchall()
    for metadata, geometry in records:
        name = json.loads(metadata)["name"]
        if name in {"Alaska", "Hawaii", "District of Columbia"}:
            continue
        shape = shapely.from_wkb(geometry).simplify(0.05)
        polygons = sorted(getattr(shape, "geoms", [shape]), key=lambda polygon: -polygon.area)
        states.append(
            State(
                name=name,
                rings=tuple(tuple((float(x), float(y)) for x, y in polygon.exterior.coords) for polygon in polygons if polygon.area > 0.01),
                centre=(float(shape.centroid.x), float(shape.centroid.y)),
            )
        )
    return tuple(sorted(states, key=lambda state: state.name))


_TEXT_MODULES = (
    "argparse", "ast", "asyncio", "bisect", "calendar", "codecs", "collections", "configparser", "contextlib", "copy", "csv", "datetime",
    "decimal", "difflib", "dis", "email", "enum", "fractions", "functools", "getopt", "heapq", "imaplib", "inspect", "io", "ipaddress",
    "json", "locale", "logging", "mailbox", "mimetypes", "numbers", "optparse", "os", "pathlib", "platform", "pprint", "random", "re",
    "sched", "shelve", "shlex", "shutil", "smtplib", "socket", "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap",
    "threading", "timeit", "tokenize", "trace", "unittest", "urllib.parse", "urllib.request", "uuid", "warnings",
    "weakref", "xmlrpc.client", "zipfile",
)  # fmt: skip
"""Modules that every Python has; turtle has much prose too, but needs Tk."""


@cache
def load_paragraphs() -> tuple[str, ...]:
    """Paragraphs of real English prose: documentation strings of Python's standard library (PSF licence).

    Returns:
        Paragraphs of 140 characters or more that begin with a capital letter, in a fixed order. They differ a little between Python versions,
        which therefore belong to a dataset's identity: see `material_versions`.
    """
    found: dict[str, None] = {}
    for name in _TEXT_MODULES:
        module = __import__(name, fromlist=["_"])
        members = [value for _, value in inspect.getmembers(module) if inspect.isclass(value) or inspect.isroutine(value)]
        for member in (module, *members):
            documentation = inspect.getdoc(member) or ""
            for paragraph in documentation.split("\n\n"):
                text = " ".join(paragraph.split())
                if len(text) >= 140 and text[0].isascii() and text[0].isupper() and text[1].islower() and text.isascii() and ">>>" not in text:
                    found.setdefault(text)
    return tuple(sorted(found))
