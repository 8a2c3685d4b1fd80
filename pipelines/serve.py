"""`loupe serve`: the flow as a Prefect deployment with a cron schedule, the Prefect UI beside it, on one machine.

The server of this command has the scheduler and the UI; it shares its database with the short-lived servers of `loupe run`, so their runs show up
in the UI as well.
"""

import asyncio
import contextlib
import os
import re
import signal
import socket
from typing import TYPE_CHECKING
from zoneinfo import available_timezones

from model.errors import closest
from pipelines.errors import SettingError
from pipelines.flow_server import start_flow_server

if TYPE_CHECKING:
    from prefect.runner import Runner

__all__ = ["check_schedule", "serve_recipe"]

_CRON_FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day", 1, 31), ("month", 1, 12), ("weekday", 0, 7))


def check_schedule(cron: str, timezone: str, port: int) -> None:
    """Check what a schedule is made of before anything starts.

    Args:
        cron: five fields: minute, hour, day of the month, month, weekday.
        timezone: IANA name.
        port: that the UI will listen on; of no matter where PREFECT_API_URL names a server.

    Raises:
        SettingError: one of them cannot be; the message says what is allowed.
    """
    if len(cron.split()) != len(_CRON_FIELDS):
        raise _bad_cron(cron)
    if strange := _out_of_range(cron):
        raise _bad_cron(cron, f", where {strange} is out of range")
    if timezone not in available_timezones():
        hint = closest(timezone, available_timezones())
        raise SettingError(f"serve --timezone: found {timezone!r}; {hint}allowed: an IANA time zone such as 'UTC' or 'Europe/Berlin'")
    if not 1 <= port <= 65535:
        raise SettingError(f"serve --port: found {port}; allowed: 1 to 65535")
    if "PREFECT_API_URL" in os.environ:
        return  # the user's own server: none of ours will listen
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise SettingError(f"serve --port: found {port}, which cannot be listened on ({error.strerror}); allowed: a free port") from error


def _bad_cron(cron: str, why: str = "") -> SettingError:
    fields = ", ".join(f"{name} ({low} to {high})" for name, low, high in _CRON_FIELDS)
    return SettingError(
        f"serve --cron: found {cron!r}{why}; allowed: five fields, {fields}, each a number, a range, a list or *, such as '0 3 * * *'"
    )


def _out_of_range(cron: str) -> str | None:
    """The first number that its field cannot have. Everything else is for Prefect to judge, which takes seconds to import."""
    for (name, low, high), field in zip(_CRON_FIELDS, cron.split(), strict=True):
        for term in field.split(","):
            values = re.split("[/#]", term)[0]  # what follows is a step, or the week of the month
            for value in re.findall("[0-9]+", values):
                if not low <= float(value) <= high:
                    return f"{name} {value}"
    return None


def serve_recipe(recipe: str, root: str, settings: dict[str, str], *, cron: str, timezone: str, port: int) -> None:
    """Register the recipe's flow and run it on schedule until interrupted, by Ctrl-C or by SIGTERM.

    Args:
        recipe: name or whole path.
        root: where everything durable lies.
        settings: execution settings by name.
        cron: five fields; see `check_schedule`.
        timezone: IANA name.
        port: of the UI, on loopback.

    Raises:
        SettingError: a field of the schedule cannot be read.
    """
    # A scheduled run that fails says so in this terminal too; `loupe run` prints its own errors.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "ERROR")
    server = start_flow_server(ui=True, port=port)
    from prefect.runner import Runner
    from prefect.schedules import Cron
    from prefect.types.entrypoint import EntrypointType

    from pipelines.flow import loupe_flow
    from workers.storage import Store

    try:
        schedule = Cron(cron, timezone=timezone)
    except ValueError as error:
        raise _bad_cron(cron) from error
    server.wait_until_ready()
    print(f"Prefect UI: {server.url.removesuffix('/api')}   recipe: {recipe}   schedule: {cron} {timezone}   (Ctrl-C ends it)", flush=True)
    name = recipe.rpartition("/")[2].removesuffix(".toml")
    runner = Runner(name=name, pause_on_shutdown=False, limit=1)  # a restart must not leave the schedule paused
    runner.add_flow(
        loupe_flow,
        name=name,
        schedules=[schedule],
        parameters={"recipe": recipe, "root": Store(root).root, "settings": settings},
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(_serving(runner))


async def _serving(runner: "Runner") -> None:
    """Let a runner serve until Ctrl-C or SIGTERM, which end the run that is under way as well; at the second, without waiting for it.

    Prefect's own ways are not taken: for Ctrl-C it waits for the run's end, for SIGTERM it ends itself in mid-air and prints a traceback.
    """
    serving, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert serving is not None
    stopping: list[asyncio.Task[None]] = []

    def stop(*_: object) -> None:
        if stopping:
            serving.cancel()
        else:
            stopping.append(loop.create_task(runner.astop()))

    runner.handle_sigterm = lambda *_: loop.call_soon_threadsafe(stop)  # type: ignore[assignment, method-assign] # start() installs what stands there
    loop.add_signal_handler(signal.SIGINT, stop)
    await runner.start()
    await asyncio.gather(*stopping)
